from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from llama_peer import to_transformers

from tokgen.errors import CheckpointError, ConfigError, InputError
from tokgen.generators.base import GENERATORS
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.nn.attention import apply_rope, rope_table

VARIANTS = {
    "plain": {},
    "2d": {"rope": "2d"},
    "gqa": {"n_kv_heads": 2},
    "mqa+qk-norm": {"n_kv_heads": 1, "qk_norm": True},
    "window 2": {"window": 2, "rope": "2d"},
    "window 4": {"window": 4},
    "window 2, tall": {"window": 2, "grid": (6, 4), "rope": "2d"},
    "video": {"window": 2, "grid": (2, 4, 4), "rope": "2d", "qk_norm": True},
    "two codebooks": {"codebook_sizes": (24, 9)},
    "two codebooks, window 2": {"codebook_sizes": (24, 9), "window": 2, "rope": "2d", "n_kv_heads": 2},
    "window 2, autoregressive head": {"window": 2, "window_head": "autoregressive"},
    "two codebooks, window 2, autoregressive head": {
        "codebook_sizes": (24, 9),
        "window": 2,
        "window_head": "autoregressive",
        "window_head_layers": 2,
    },
    "rep token, zero prefix": {"rep_token": True, "rope": "2d", "rope_prefix": "zero"},
    "sequence": {"layout": {"kind": "Sequence", "n": 7}},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def random_ids(model, batch):
    ids = torch.stack([torch.randint(k, (batch, model.layout.length)) for k in model.codebook_sizes], -1)
    return ids if len(model.codebook_sizes) > 1 else ids[..., 0]


# -- what the model computes --------------------------------------------------------------------------------------------


def test_window_one_is_exactly_the_plain_model(make, captions):
    model = make()
    kinds = {key.split(".")[0] for key in model.state_dict()}
    assert kinds == {"condition", "tok_embeddings", "layers", "norm", "output"}
    text_ids, text_mask = model.encode_prompts(captions)
    ids = random_ids(model, 4)
    # the plain model, written out: no windows, no cache, no skipped positions
    boi = model.condition.boi.expand(4, 1, -1)
    x = torch.cat([model.condition.embeddings(text_ids), boi, model.tok_embeddings(ids[:, :-1])], 1)
    real = F.pad(text_mask, (0, ids.shape[1]), value=True)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & real[:, None, None]
    rope = rope_table(positions[..., None], 16)
    for block in model.layers:
        x = block(x, rope, mask)
    plain = model.output(model.norm(x))[:, text_ids.shape[1] :]
    assert torch.allclose(model(text_ids, text_mask, ids).logits, plain, atol=1e-5, rtol=1e-5)
    # bit for bit when text is predicted as well, which keeps all positions of the last block as above
    assert torch.equal(model(text_ids, text_mask, ids, text_loss=1.0).logits, plain)


@pytest.mark.parametrize("kv", [4, 2])
def test_logits_are_those_of_transformers_llama(make, kv):
    pytest.importorskip("transformers")
    model = make(n_kv_heads=kv)
    text_ids, ids = torch.randint(280, (3, 6)), random_ids(model, 3)
    ours = model(text_ids, torch.ones(3, 6, dtype=torch.bool), ids).logits
    sequence = torch.cat([text_ids, torch.full((3, 1), 280), ids[:, :-1] + 281], 1)
    with torch.no_grad():
        theirs = to_transformers(model)(sequence).logits[:, 6:, 281:]
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


@each_variant
def test_cached_equals_full(make, captions, options):
    model = make(**options)
    text_ids, text_mask = model.encode_prompts(captions)
    ids = random_ids(model, 4)
    from tokgen.generators.token_shuffle import from_windows, to_windows

    full = model(text_ids, text_mask, ids).logits
    steps, codebooks, head = to_windows(ids, model.order), len(model.codebook_sizes), model.head()
    x, mask = model.prefix(text_ids, text_mask)
    p = x.shape[1]
    length = p + model.steps - 1
    cos, sin = model.rope(mask)
    keys = F.pad(mask, (0, length - p), value=True)
    for static in (False, True):
        cache = model.new_cache(4, length)
        seen = torch.ones(p, p, dtype=torch.bool).tril() & mask[:, None, None]
        hidden = [model.blocks(x, (cos[:, :p], sin[:, :p]), seen, cache, torch.arange(p), p)[:, -1:]]
        for k in range(1, model.steps):
            at, end = torch.tensor([p + k - 1]), p + k
            inputs = model.embed(steps[:, k - 1 : k], (k - 1) % codebooks)
            seen = (keys & (torch.arange(length) <= at) if static else keys[:, :end])[:, None, None]
            rope = cos[:, at], sin[:, at]
            hidden.append(model.blocks(inputs, rope, seen, cache, at, None if static else end))
        slots = model.to_slots(torch.cat(hidden, 1))
        if model.window_head is not None:
            slots = model.within_window(slots, model.shared_ids(steps)[..., :-1])
        slots = from_windows(slots, model.order, codebooks)
        for c, size in enumerate(model.codebook_sizes):
            logits = model.code_logits(slots[:, :, c], c, head)
            expected = full if codebooks == 1 else full[:, :, c, :size]
            assert torch.allclose(logits, expected, atol=2e-4, rtol=1e-4)


@each_variant
def test_stepwise_greedy_is_the_teacher_forced_argmax(make, captions, options):
    model = make(**options)
    tokens = model.generate(captions, temperature=0)
    logits = model(*model.encode_prompts(captions), tokens.ids).logits
    assert torch.equal(logits.argmax(-1), tokens.ids)
    assert tokens.ids.unique().numel() > 3


@each_variant
def test_padding_does_not_change_logits(make, captions, options):
    model = make(**options)
    ids = random_ids(model, 4)
    text_ids, text_mask = model.encode_prompts(captions)
    together = model(text_ids, text_mask, ids).logits
    wide_ids, wide_mask = model.encode_prompts(captions, pad_to=20)
    wide_ids[~wide_mask] = torch.randint(280, ((~wide_mask).sum(),))  # whatever lies under the mask
    assert torch.allclose(model(wide_ids, wide_mask, ids).logits, together, atol=1e-4, rtol=1e-4)
    for i, caption in enumerate(captions):
        alone = model(*model.encode_prompts([caption]), ids[i : i + 1]).logits
        assert torch.allclose(alone[0], together[i], atol=1e-4, rtol=1e-4)


def test_two_axes_turn_half_of_the_pairs_each():
    positions = torch.tensor([[[3, 0], [0, 5]]])
    cos, sin = rope_table(positions, 16)
    assert (sin[0, 0, :4] != 0).all()
    assert (sin[0, 0, 4:] == 0).all()
    assert (sin[0, 1, :4] == 0).all()
    assert (sin[0, 1, 4:] != 0).all()
    angle = 5 * 10_000.0 ** (-2 * torch.arange(4) / 8)
    assert torch.allclose(cos[0, 1, 4:], angle.cos(), atol=1e-6)


def test_rotation_depends_on_distance_only_and_keeps_length():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i, j):
        a = apply_rope(q, *rope_table(torch.tensor([[[i]]]), 16))
        return float((a * apply_rope(k, *rope_table(torch.tensor([[[j]]]), 16))).sum())

    assert score(7, 3) == pytest.approx(score(14, 10), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 5), abs=1e-3)
    rotated = apply_rope(q, *rope_table(torch.tensor([[[9]]]), 16))
    assert torch.allclose(rotated.norm(), q.norm(), atol=1e-5)


def test_image_positions_go_on_where_the_text_ends(make):
    model = make(grid=(4, 6), window=2, rope="2d")
    mask = torch.tensor([[True, True, True, True], [True, True, False, True]])  # the last one is begin-of-image
    cos, _ = model.rope(mask)
    expected = torch.tensor([[3, 0], [4, 0], [4, 1], [4, 2], [5, 0], [5, 1], [5, 2]])
    assert torch.equal(cos[0, 3:], rope_table(expected[None], 16)[0][0])
    assert torch.equal(cos[1, 3:], rope_table(expected[None] - torch.tensor([1, 0]), 16)[0][0])


# -- the loss -----------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_all_real_ids(make, captions):
    model = make(codebook_sizes=(24, 9), window=2)
    ids = random_ids(model, 4)
    mask = torch.rand(4, 16) < 0.6
    out = model(*model.encode_prompts(captions), ids, mask, z_loss=1e-2, label_smoothing=0.1)
    terms, squares, right = [], [], []
    for c, size in enumerate((24, 9)):
        logits = out.logits[:, :, c, :size][mask]
        assert (out.logits[:, :, c, size:] == -torch.inf).all()
        terms.append(F.cross_entropy(logits, ids[..., c][mask], reduction="none", label_smoothing=0.1))
        squares.append(logits.logsumexp(-1).square())
        right.append(logits.argmax(-1) == ids[..., c][mask])
    assert out.losses["ce"].item() == pytest.approx(torch.cat(terms).mean().item(), rel=1e-5)
    assert out.losses["z_loss"].item() == pytest.approx(1e-2 * torch.cat(squares).mean().item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(sum(out.losses.values()).item(), rel=1e-6)
    assert out.stats["accuracy"].item() == pytest.approx(torch.cat(right).float().mean().item())


def test_text_loss_predicts_the_next_real_text_id(make, captions):
    model = make()
    text_ids, text_mask = model.encode_prompts(captions)
    ids = random_ids(model, 4)
    out = model(text_ids, text_mask, ids, text_loss=0.5)
    assert out.text_logits.shape == (*text_ids.shape, 280)
    keep = text_mask[:, 1:]
    expected = F.cross_entropy(out.text_logits[:, :-1][keep], text_ids[:, 1:][keep])
    assert out.losses["text"].item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    assert model(text_ids, text_mask, ids).text_logits is None


def test_a_fresh_model_is_near_uniform_and_a_zero_head_exactly(make, captions):
    for options, tolerance in (({}, 0.1), ({"zero_head": True}, 1e-5)):
        model = make(std=None, **options)
        loss = model(*model.encode_prompts(captions), random_ids(model, 4)).loss
        assert loss.item() == pytest.approx(torch.tensor(24.0).log().item(), abs=tolerance)


def test_dropped_captions_are_the_unconditional_prompt(make, captions):
    model = make(caption_dropout=0.999999).train()
    ids = random_ids(model, 4)
    dropped = model.loss({"ids": ids, "caption": captions})
    unconditional = model(*model.encode_prompts([""] * 4), ids)
    assert torch.allclose(dropped.logits, unconditional.logits, atol=1e-4)
    kept = model.eval().loss({"ids": ids, "caption": captions})
    assert not torch.allclose(kept.logits, unconditional.logits, atol=1e-2)


@pytest.mark.parametrize("window", [1, 2])
def test_dropped_codes_leave_the_caption_alone(make, captions, window):
    model = make(window=window, code_dropout=0.999999, caption_dropout=0.0, std=0.2).train()
    ids, others = random_ids(model, 4), random_ids(model, 4)
    blind = [model.loss({"ids": i, "caption": captions}).logits for i in (ids, others)]
    torch.testing.assert_close(*blind)
    assert not torch.allclose(blind[0][0], blind[0][1])  # another caption
    seen = [model.eval().loss({"ids": i, "caption": captions}).logits for i in (ids, others)]
    assert not torch.allclose(*seen, atol=1e-2)
    torch.testing.assert_close(seen[0][:, 0], blind[0][:, 0])  # nothing comes before the first


def test_gradients_reach_every_parameter(make, captions):
    for options in ({"window": 2, "qk_norm": True}, {}):
        model = make(**options).train()
        model.loss({"ids": random_ids(model, 4), "caption": captions}).loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_loss_under_bf16_autocast_is_close(make, captions):
    model = make(window=2, std=0.05)
    batch = {"ids": random_ids(model, 4), "caption": captions}
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(batch)
    assert low.logits.dtype == torch.float32
    assert low.loss.item() == pytest.approx(model.loss(batch).loss.item(), rel=2e-2)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_four_captions_are_learned_and_drawn_greedily(make, captions, window):
    model = make(grid=(4, 4), window=window, std=None, caption_dropout=0.0, rope="2d").train()
    ids = random_ids(model, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(150):
        loss = model.loss({"ids": ids, "caption": captions}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert torch.equal(model.generate(captions, temperature=0).ids, ids)
    assert model.training


# -- errors and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"n_heads": 5}, "n_heads=5"),
        ({"n_kv_heads": 3}, "n_heads=4"),
        ({"rope": "3d"}, "rope='3d'"),
        ({"rope": "2d", "dim": 24}, "multiple of 4"),
        ({"rope": "2d", "layout": {"kind": "Sequence", "n": 4}}, "grid"),
        ({"token_dropout": 1.0}, "token_dropout"),
        ({"max_text": 0}, "max_text"),
        ({"window": 3}, "window"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, options, word):
    with pytest.raises(ConfigError, match=word):
        make(**options)


def test_ids_of_another_length_are_named(make, captions):
    model = make()
    with pytest.raises(InputError, match="expected 16 ids"):
        model.loss({"ids": torch.zeros(4, 9, dtype=torch.int64), "caption": captions})


def test_a_text_vocabulary_that_is_too_large_is_named(text):
    config = LlamaConfig(layout={"kind": "Grid", "h": 2, "w": 2}, codebook_sizes=(8,), text_vocab=20, dim=32, n_heads=2)
    with pytest.raises(ConfigError, match="text_vocab=20"):
        LlamaGenerator(config, text)
    with pytest.raises(ConfigError, match="cannot read prompts"):
        LlamaGenerator(config).generate(["cat"])


def test_feed_forward_is_llamas_rule():
    sizes = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 3200: 8704}
    for dim, hidden in sizes.items():
        assert LlamaConfig(layout={}, codebook_sizes=(8,), text_vocab=8, dim=dim).feed_forward == hidden


def test_save_and_load_keep_everything(make, captions, tmp_path):
    model = make(window=2, rope="2d", codebook_sizes=(24, 9))
    model.tokenizer_fingerprint, model.visual_tokenizer = "abc123", "../tokenizer"
    model.generation = {"guidance_scale": 2.0, "schedule": "interval", "guidance_interval": (0.2, 0.9), "top_k": 5}
    model.save_pretrained(tmp_path)
    again = GENERATORS["llama"].from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.fingerprint == model.fingerprint
    assert (again.tokenizer_fingerprint, again.visual_tokenizer) == ("abc123", "../tokenizer")
    tokens = again.generate(captions, generator=5)
    assert tokens.tokenizer == "abc123"
    assert torch.equal(tokens.ids, model.generate(captions, generator=5).ids)


def test_a_folder_with_an_unknown_default_is_named(make, tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "generation": {"top_q": 1}}))
    with pytest.raises(ConfigError, match="top_q"):
        LlamaGenerator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        LlamaGenerator.from_pretrained(tmp_path)


@pytest.mark.slow
def test_another_process_draws_the_same(make, captions, tmp_path):
    model = make(window=2)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, json; from tokgen.generators.llama import LlamaGenerator as L;"
        "print(json.dumps(L.from_pretrained(sys.argv[1]).generate(json.loads(sys.argv[2]),"
        "guidance_scale=3.0, generator=7).ids.tolist()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(captions)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours = model.generate(captions, guidance_scale=3.0, generator=7).ids
    assert json.loads(out.strip().splitlines()[-1]) == ours.tolist()
