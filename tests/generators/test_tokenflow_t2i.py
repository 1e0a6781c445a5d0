"""TokenFlow's next-scale generator: what each slot sees and reads, one call a scale, further passes, and learning."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from tokgen.errors import ConfigError, InputError
from tokgen.generators.base import GENERATORS
from tokgen.generators.sampling import Noise, SamplingSettings, filter_logits
from tokgen.generators.tokenflow import TokenFlowGenerator, TokenFlowGeneratorConfig
from tokgen.tokens import Scales, Tokens

SCALES, CODES, WIDTH = (1, 2, 3, 5), 24, 8
STARTS = [0, 1, 5, 14, 39]
N = STARTS[-1]


@pytest.fixture
def build(text):
    """A small generator with a random codebook, its weights drawn wide, so that its predictions differ clearly."""

    def make(std=0.15, table=None, **options):
        sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden": 96, "max_text": 40, "code_dim": WIDTH, **options}
        sizes.setdefault("layout", Scales(SCALES).to_dict())
        model = TokenFlowGenerator(TokenFlowGeneratorConfig(codebook_sizes=(CODES,), text_vocab=280, **sizes), text)
        if std:
            for p in model.parameters():
                torch.nn.init.normal_(p, std=std) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
        model.take_codebook(F.normalize(torch.randn(CODES, model.config.code_dim), dim=-1) if table is None else table)
        return model.eval()

    return make


def random_ids(batch, n=N):
    return torch.randint(CODES, (batch, n))


# -- what the model computes --------------------------------------------------------------------------------------------


def plain_maps(table, ids, scales):
    """The running map, written out: each scale's codes at its own side, then the whole map at the next side."""
    rows = []
    for row in ids:
        start, running = 0, 0.0
        for side, following in itertools.pairwise(scales):
            codes = torch.stack([table[i] for i in row[start : start + side * side]]).view(side, side, -1)
            running = running + codes.permute(2, 0, 1)[None]
            running = F.interpolate(running, size=(following, following), mode="bicubic")
            rows.append(running[0].permute(1, 2, 0).reshape(following * following, -1))
            start += side * side
    return torch.cat(rows).view(len(ids), -1, table.shape[1])


def test_the_running_map_is_that_of_the_release_and_not_the_tokenizers(build):
    model, ids = build(), random_ids(2)
    maps = model.maps(ids, len(SCALES))
    assert maps.shape == (2, N - 1, WIDTH)
    torch.testing.assert_close(maps, plain_maps(model.codes.codebook, ids, SCALES))
    # the tokenizer brings each scale to the last side by itself
    summed = sum(
        F.interpolate(
            model.codes.codebook[ids[:, a:b]].view(2, s, s, -1).permute(0, 3, 1, 2), size=(5, 5), mode="bicubic"
        )
        for s, a, b in zip(SCALES[:-1], STARTS, STARTS[1:])
    )
    last = maps[:, -25:].mT.unflatten(2, (5, 5))
    assert (last - summed).norm() > 0.01 * summed.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.maps(ids, len(SCALES)), maps)


def peer_logits(model, text_ids, ids):
    """The whole model written out for one caption without padding: names and order of the paper, no cache, no skipping."""
    c = model.config
    own = dict(model.named_parameters())
    begin = own["condition.boi"][None] if not c.image_begin else own["condition.embeddings.weight"][list(c.image_begin)]
    words = torch.cat([own["condition.embeddings.weight"][text_ids], begin])
    features = plain_maps(model.codes.codebook, ids[None], model.scales)[0]
    hidden = F.gelu(features @ own["codes.projector.layers.0.weight"].T + own["codes.projector.layers.0.bias"])
    image = hidden @ own["codes.projector.layers.1.weight"].T + own["codes.projector.layers.1.bias"]
    p, total = len(words), len(words) + len(image)
    level = torch.tensor([0] * p + [i + 1 for i, s in enumerate(model.scales) for _ in range(s * s)][1:])
    x = torch.cat([words, image]) + own["levels.weight"][level]
    x[p - 1 :] += own["positions"]
    group = torch.tensor([*range(-p + 1, 0), *[i for i, s in enumerate(model.scales) for _ in range(s * s)]])
    sees = group[:, None] >= group
    width = c.dim // c.n_heads
    angle = torch.arange(total)[:, None] * c.rope_base ** (-torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def norm(v, weight, eps):
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps) * weight

    for i in range(c.n_layers):
        w = {k.removeprefix(f"layers.{i}."): v for k, v in own.items() if k.startswith(f"layers.{i}.")}
        q, k, v = (x @ w["attention.wqkv.weight"].T).view(total, 3, c.n_heads, width).unbind(1)
        q, k = (norm(t, w[f"attention.{n}_norm.weight"], 1e-6) for t, n in ((q, "q"), (k, "k")))
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)
        x = x + norm(mixed.flatten(1) @ w["attention.wo.weight"].T, w["attention_norm.weight"], c.norm_eps)
        inner = F.silu(x @ w["feed_forward.w1.weight"].T) * (x @ w["feed_forward.w3.weight"].T)
        x = x + norm(inner @ w["feed_forward.w2.weight"].T, w["ffn_norm.weight"], c.norm_eps)
    return norm(x[p - 1 :], own["norm.weight"], c.norm_eps) @ own["output.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("image_begin", [(), (7, 30, 9)])
def test_logits_are_those_of_the_model_written_out(build, captions, image_begin):
    model = build(image_begin=image_begin)
    ids = random_ids(len(captions))
    text_ids, text_mask = model.encode_prompts(captions)
    logits = model(text_ids, text_mask, ids).logits
    assert logits.std() > 0.1
    for row, (words, mask) in enumerate(zip(text_ids, text_mask)):
        # captions of other lengths stand beside it in the batch, and the image stands elsewhere in the sequence
        torch.testing.assert_close(logits[row], peer_logits(model, words[mask], ids[row]), atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_code_is_seen_by_later_scales_alone(build, captions):
    model, ids = build(), random_ids(4)
    prompt = model.encode_prompts(captions)
    before = model(*prompt, ids).logits
    for scale, (start, stop) in enumerate(itertools.pairwise(STARTS)):
        for place in {start, stop - 1}:
            other = ids.clone()
            other[:, place] = (other[:, place] + 7) % CODES
            change = (model(*prompt, other).logits - before).abs().amax(-1)  # (B, N)
            assert (change[:, :stop] == 0).all()
            if scale + 1 < len(SCALES):
                assert (change[:, stop:].amax(1) > 1e-3).all()


@torch.no_grad()
def test_slots_of_a_scale_see_one_another(build, captions):
    """A slot's prediction depends on the inputs of its whole scale, of places after it too, and on no later scale."""
    model, ids = build(), random_ids(4)
    prompt, features = model.encode_prompts(captions), model.maps(ids, len(SCALES))
    x, mask = model.prefix(*prompt)
    changed = features.clone()
    changed[:, STARTS[3] - 2] += 3.0  # the last slot of the third scale
    logits = []
    for f in (features, changed):
        inputs = torch.cat([x, model.embed(f, 1)], 1)
        rope = model.rope(prompt[0].shape[1], inputs.shape[1])
        hidden = model.blocks(inputs, rope, model.attends(mask, len(SCALES)))
        logits.append(model.code_logits(hidden[:, -N:]))
    change = (logits[1] - logits[0]).abs().amax(-1)
    assert (change[:, : STARTS[2]] == 0).all()
    assert (change[:, STARTS[2] :] > 1e-4).all()


@torch.no_grad()
def test_padding_does_not_change_logits(build, captions):
    model, ids = build(), random_ids(4)
    text_ids, text_mask = model.encode_prompts(captions)
    together = model(text_ids, text_mask, ids).logits
    wide_ids, wide_mask = model.encode_prompts(captions, pad_to=40)
    wide_ids[~wide_mask] = torch.randint(280, ((~wide_mask).sum(),))  # whatever lies under the mask
    torch.testing.assert_close(model(wide_ids, wide_mask, ids).logits, together, atol=1e-4, rtol=1e-4)
    for i, caption in enumerate(captions):
        alone = model(*model.encode_prompts([caption]), ids[i : i + 1]).logits
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=1e-4)


# -- the loss -----------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_all_real_codes(build, captions):
    model, ids, mask = build(), random_ids(4), torch.rand(4, N) < 0.6
    out = model(*model.encode_prompts(captions), ids, mask, z_loss=1e-2, label_smoothing=0.1)
    assert (out.logits.shape, out.logits.dtype) == ((4, N, CODES), torch.float32)
    kept, expected = out.logits[mask], ids[mask]
    assert out.losses["ce"].item() == pytest.approx(
        F.cross_entropy(kept, expected, label_smoothing=0.1).item(), rel=1e-5
    )
    assert out.losses["z_loss"].item() == pytest.approx(1e-2 * kept.logsumexp(-1).square().mean().item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(sum(out.losses.values()).item(), rel=1e-6)
    assert out.stats["accuracy"].item() == pytest.approx((kept.argmax(-1) == expected).float().mean().item())


def test_text_loss_predicts_the_next_real_text_id(build, captions):
    model, ids = build(), random_ids(4)
    text_ids, text_mask = model.encode_prompts(captions)
    out = model(text_ids, text_mask, ids, text_loss=0.5)
    assert out.text_logits.shape == (*text_ids.shape, 280)
    for i, caption in enumerate(captions):  # in the columns of the prompt, wherever the caption stands in the batch
        alone = model(*model.encode_prompts([caption]), ids[i : i + 1], text_loss=0.5).text_logits[0]
        torch.testing.assert_close(out.text_logits[i, : len(alone)], alone, atol=1e-4, rtol=1e-4)
    keep = text_mask[:, 1:]
    expected = F.cross_entropy(out.text_logits[:, :-1][keep], text_ids[:, 1:][keep])
    assert out.losses["text"].item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    assert model(text_ids, text_mask, ids).text_logits is None


def test_hidden_states_are_those_of_the_slots_that_predict(build, captions):
    model, ids = build(), random_ids(4)
    prompt = model.encode_prompts(captions)
    last = model(*prompt, ids, hidden_of=2)
    torch.testing.assert_close(model.code_logits(last.hidden), last.logits)
    first = model(*prompt, ids, hidden_of=1)
    assert first.hidden.shape == (4, N, 64)
    assert not torch.allclose(first.hidden, last.hidden, atol=0.1)
    torch.testing.assert_close(first.logits, last.logits)
    with pytest.raises(ConfigError, match="hidden_of=3"):
        model(*prompt, ids, hidden_of=3)


def test_gradients_reach_every_parameter_and_no_code_vector(build, captions):
    for options in ({}, {"image_begin": (3, 4), "n_kv_heads": 2}):
        model = build(**options).train()
        model.loss({"ids": random_ids(4), "caption": captions}).loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        assert ("condition.boi" in dict(model.named_parameters())) == (not options)
        assert "codes.codebook" not in dict(model.named_parameters())


def test_dropped_captions_are_the_unconditional_prompt(build, captions):
    model, ids = build(caption_dropout=0.999999).train(), random_ids(4)
    dropped = model.loss({"ids": ids, "caption": captions})
    unconditional = model(*model.encode_prompts([""] * 4), ids)
    torch.testing.assert_close(dropped.logits, unconditional.logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(
        model.eval().loss({"ids": ids, "caption": captions}).logits, unconditional.logits, atol=0.01
    )


def test_loss_under_bf16_autocast_is_close(build, captions):
    model = build(std=0.05)
    batch = {"ids": random_ids(4), "caption": captions}
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(batch)
    assert low.logits.dtype == torch.float32
    assert low.loss.item() == pytest.approx(model.loss(batch).loss.item(), rel=2e-2)


# -- drawing ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_one_call_a_scale_draws_what_the_whole_model_says(build, captions, guidance):
    """Cached and scale by scale as uncached and at once: the ids of each scale are the argmax of teacher-forced logits."""
    model = build(std=0.3)
    how = {"temperature": 0, "guidance_scale": guidance, "schedule": "linear"}
    tokens, report = model.sample(captions, **how)
    assert (report.calls, report.steps, report.ids) == (len(SCALES), len(SCALES), 4 * N)
    assert tokens.layout == Scales(SCALES)
    logits = model(*model.encode_prompts(captions), tokens.ids).logits
    if guidance != 1:
        empty = model(*model.encode_prompts([""] * 4), tokens.ids).logits
        # published: (1 + t) l_c - t l_u, t from 0 to cfg = guidance - 1
        t = torch.cat([torch.full((s * s,), (guidance - 1) * i / 3) for i, s in enumerate(SCALES)])[:, None]
        logits = (1 + t) * logits - t * empty
    assert torch.equal(logits.argmax(-1), tokens.ids)
    assert tokens.ids.unique().numel() > 6


@torch.no_grad()
def test_cached_logits_equal_uncached(build, captions, monkeypatch):
    from tokgen.generators import next_scale

    model, seen = build(), []
    choose = next_scale.choose
    monkeypatch.setattr(next_scale, "choose", lambda logits, *a: [seen.append(logits[:, 0]), choose(logits, *a)][1])
    tokens = model.generate(captions, generator=3)
    full = model(*model.encode_prompts(captions), tokens.ids).logits
    torch.testing.assert_close(torch.cat(seen, 1), full, atol=2e-4, rtol=1e-4)


def test_a_large_scale_is_drawn_in_parts(build, captions, monkeypatch):
    from tokgen.generators import next_scale

    model = build(std=0.3)
    how = {"temperature": 0, "guidance_scale": 3.0, "passes": [(4, 1.0)]}
    whole = model.generate(captions, **how).ids
    monkeypatch.setattr(next_scale, "SLOTS", 4)
    assert torch.equal(model.generate(captions, **how).ids, whole)
    random = model.generate(captions, generator=3).ids
    assert random[:, 5:].unique(dim=1).shape[1] > 9  # the parts have noise of their own


@torch.no_grad()
def uncached(model, caption, seed, top_k, top_p, passes, guidance=1.0, other=""):
    """Sampling as released: the whole sequence anew in every call, further passes from the second scale on."""
    settings = SamplingSettings(guidance_scale=guidance, schedule="linear", top_k=top_k, top_p=top_p, passes=passes)
    noise = Noise([seed], torch.device("cpu"))
    prompts = [model.encode_prompts([p]) for p in (caption, other)]
    ids = torch.zeros(1, N, dtype=torch.int64)
    for i, (start, stop) in enumerate(itertools.pairwise(STARTS)):
        rounds = [(settings.top_k, settings.top_p), *(settings.passes if i else ())]
        for number, (k, p) in enumerate(rounds):
            features = model.maps(ids, len(SCALES))
            if number:  # the map at this side with the scale's own codes
                s = SCALES[i]
                own = model.codes.codebook[ids[:, start:stop]].view(1, s, s, -1).permute(0, 3, 1, 2)
                at_side = features[:, start - 1 : stop - 1].mT.unflatten(2, (s, s)) + own
                features[:, start - 1 : stop - 1] = at_side.flatten(2).mT
            logits = []
            for prompt in prompts:
                x, mask = model.prefix(*prompt)
                x = torch.cat([x, model.embed(features, 1)], 1)
                rope = model.rope(prompt[0].shape[1], x.shape[1])
                hidden = model.blocks(x, rope, model.attends(mask, len(SCALES)))
                logits.append(model.code_logits(hidden[:, -N:])[:, start:stop])
            w = 1 + (guidance - 1) * i / (len(SCALES) - 1)
            guided = filter_logits(logits[1] + w * (logits[0] - logits[1]), k, p)
            ids[:, start:stop] = (guided + noise.draw(stop - start, CODES)).argmax(-1)
    return ids


@pytest.mark.parametrize("passes", [(), ((1, 1.0),), ((6, 0.8), (1, 1.0))])
def test_further_passes_are_those_of_the_release(build, captions, passes):
    model = build(std=0.3)
    how = {"top_k": 12, "top_p": 0.9, "guidance_scale": 3.0, "schedule": "linear", "negative_prompt": "blurry"}
    tokens, report = model.sample(captions, passes=passes, generator=[5, 6, 7, 8], **how)
    assert report.calls == 1 + 3 * (1 + len(passes))
    for i, caption in enumerate(captions):
        assert torch.equal(tokens.ids[i], uncached(model, caption, 5 + i, 12, 0.9, passes, 3.0, "blurry")[0])
    once = model.generate(captions, generator=[5, 6, 7, 8], **how)
    assert torch.equal(once.ids, tokens.ids) == (not passes)


def test_the_same_seed_draws_the_same_in_any_batch(build, captions):
    model = build()
    how = {"guidance_scale": 2.0, "top_k": 8, "passes": [[4, 0.9]], "negative_prompt": "cat"}
    together = model.generate(captions, generator=[3, 4, 5, 6], **how).ids
    for i, caption in enumerate(captions):
        assert torch.equal(model.generate([caption], generator=3 + i, **how).ids[0], together[i])
    assert not torch.equal(model.generate(captions, generator=[9, 9, 9, 9], **how).ids, together)


def test_a_negative_prompt_is_what_guidance_leads_away_from(build, captions):
    model, how = build(), {"generator": [1, 2, 3, 4]}
    away = model.generate(captions, guidance_scale=0.0, negative_prompt="blurry", **how).ids
    assert torch.equal(away, model.generate(["blurry"] * 4, **how).ids)
    assert torch.equal(model.generate(captions, guidance_scale=0.0, **how).ids, model.generate([""] * 4, **how).ids)
    plain = model.generate(captions, **how).ids
    assert torch.equal(model.generate(captions, negative_prompt="blurry", **how).ids, plain)  # guidance is off


def test_given_codes_stay_and_whole_scales_cost_one_call(build, captions):
    model = build()
    given = Tokens(random_ids(1), Scales(SCALES), (CODES,))
    tokens, report = model.sample(captions, given=given.prefix(STARTS[2]), generator=4)
    assert torch.equal(tokens.ids[:, : STARTS[2]], given.ids[:, : STARTS[2]].expand(4, -1))
    assert (report.calls, report.steps, report.ids) == (2, 2, 4 * (N - STARTS[2]))
    # as drawn by itself, where it was drawn
    whole = model.generate(captions, generator=4, temperature=0)
    again, _ = model.sample(captions, given=whole.prefix(STARTS[2]), temperature=0)
    assert torch.equal(again.ids, whole.ids)
    # single codes stay too, in further passes as well, and later scales know them
    keep = torch.rand(4, N) < 0.3
    some = model.generate(captions, given=given, keep=keep, passes=[(4, 0.9)], generator=4)
    assert torch.equal(some.ids[keep], given.ids.expand(4, -1)[keep])
    everything, report = model.sample(captions, given=given)
    assert torch.equal(everything.ids, given.ids.expand(4, -1))
    assert (report.calls, report.ids) == (0, 0)


def test_what_this_loop_does_not_have_is_named(build, captions, make):
    model = build()
    for arguments, word in (
        ({"speculative": 2}, "leave out speculative"),
        ({"draft": model}, "leave out speculative"),
        ({"compile": True}, "leave out compile"),
        ({"passes": [(0, 0.0)]}, "passes"),
        ({"passes": [3]}, "passes"),
        ({"passes": 2}, "passes"),
        ({"passes": [("a", 1.0)]}, "passes"),
        ({"negative_prompt": 3}, "negative_prompt"),
    ):
        with pytest.raises(ConfigError, match=word):
            model.generate(captions, **arguments)
    with pytest.raises(ConfigError, match="scale by scale"):
        make().generate(captions, passes=[(1, 1.0)])


def test_an_int8_copy_draws_nearly_the_same_and_is_not_saved(build, captions, tmp_path):
    model = build()
    rounded = model.int8()
    prompt, ids = model.encode_prompts(captions), random_ids(4)
    theirs, ours = rounded(*prompt, ids).logits, model(*prompt, ids).logits
    assert (theirs - ours).norm() < 0.1 * ours.norm()
    assert rounded.generate(captions, generator=1, guidance_scale=2.0).ids.shape == (4, N)
    with pytest.raises(ConfigError, match="int8"):
        rounded.save_pretrained(tmp_path)


# -- learning -----------------------------------------------------------------------------------------------------------


def test_four_captions_are_learned_and_drawn_greedily(build, captions):
    model = build(std=None, caption_dropout=0.0).train()
    ids = random_ids(4)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(120):
        loss = model.loss({"ids": ids, "caption": captions}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert torch.equal(model.generate(captions, temperature=0).ids, ids)
    assert model.training


# -- sizes, errors and files ----------------------------------------------------------------------------------------------


def test_the_default_is_the_published_size():
    with torch.device("meta"):
        model = TokenFlowGenerator(TokenFlowGeneratorConfig(image_begin=(1, 2, 3)))
    assert (model.layout.length, model.levels.weight.shape, model.positions.shape) == (817, (10, 4096), (817, 4096))
    # the published file has 7.03 B: with the words of the head and the codes of the embedding, which nothing reads here
    unread = 32_001 * 4096 + 32_768 * 4096
    assert sum(p.numel() for p in model.parameters()) + unread == 7_027_204_096


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"layout": {"kind": "Grid", "h": 4, "w": 4}}, "begin with 1"),
        ({"layout": {"kind": "Scales", "sizes": [2, 4]}}, "begin with 1"),
        ({"n_heads": 5}, "n_heads=5"),
        ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"code_dim": 0}, "code_dim=0"),
        ({"image_begin": (280,)}, "image_begin"),
        ({"caption_dropout": 1.0}, "caption_dropout"),
    ],
)
def test_sizes_that_do_not_fit_are_named(build, options, word):
    with pytest.raises(ConfigError, match=word):
        build(**options)


def test_a_missing_or_wrong_codebook_is_named(build, captions, text, tmp_path):
    model = build()
    with pytest.raises(ConfigError, match=r"config\.code_dim"):
        model.take_codebook(torch.zeros(CODES, WIDTH + 1))
    bare = TokenFlowGenerator(model.config, text)
    for use in (
        lambda: bare.generate(captions),
        lambda: bare.loss({"ids": random_ids(4), "caption": captions}),
        lambda: bare.save_pretrained(tmp_path),
    ):
        with pytest.raises(ConfigError, match="take_codebook"):
            use()
    with pytest.raises(InputError, match="expected 39 ids"):
        model.loss({"ids": random_ids(4, 38), "caption": captions})


def test_save_and_load_keep_everything(build, captions, tmp_path):
    model = build(image_begin=(5, 6))
    model.tokenizer_fingerprint, model.visual_tokenizer = "abc123", "../tokenizer"
    model.generation = {
        "guidance_scale": 8.5, "schedule": "linear", "top_k": 12, "top_p": 0.8,
        "passes": [[10, 0.8], [1, 1.0]], "negative_prompt": "blurry",
    }  # fmt: skip
    model.save_pretrained(tmp_path)
    again = GENERATORS["tokenflow-t2i"].from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again.codes.codebook, model.codes.codebook)
    tokens, report = again.sample(captions, generator=5)
    assert tokens.tokenizer == "abc123"
    assert report.settings.passes == ((10, 0.8), (1, 1.0))
    assert json.loads(json.dumps(report.settings.__dict__))["passes"] == [[10, 0.8], [1, 1.0]]
    assert torch.equal(tokens.ids, model.generate(captions, generator=5).ids)


def test_start_from_a_generator_of_other_scales(build):
    small, large = build(layout=Scales((1, 2)).to_dict()), build()
    assert set(large.start_from(small)) == {"levels.weight", "positions"}
    assert torch.equal(large.layers[1].attention.wqkv.weight, small.layers[1].attention.wqkv.weight)
    assert torch.equal(large.codes.codebook, small.codes.codebook)
    same = build()
    assert same.start_from(large) == []
    assert torch.equal(same.positions, large.positions)
    with pytest.raises(ConfigError, match="other sizes"):
        large.start_from(build(dim=32))
