"""What is particular to LaVIT: which places are kept, what kept ones read, what the decoder sees, and its stages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import tokgen
from tokgen.errors import ConfigError, InputError, TokenizerMismatch
from tokgen.nn.token_merger import (
    TokenMerger,
    TokenSelector,
    draw_places,
    dropped_mask,
    masked_softmax,
    select_places,
    visible_mask,
)
from tokgen.nn.vit import CrossBlock
from tokgen.tokenizers.lavit import LAVIT, diffusion_pipeline, mark_kept
from tokgen.tokens import Sequence, Tokens
from tokgen.training.base import decay_groups
from tokgen.training.staged import Stage, StagedModule

PLACES, DIM = 64, 64


def lavit(example: str = "eva", **changes) -> LAVIT:
    torch.manual_seed(0)
    return LAVIT(dataclasses.replace(LAVIT.example_configs()[example], **changes)).eval()


def kept_unevenly(tokenizer: LAVIT, counts=(5, 64, 1, 20)) -> tuple[torch.Tensor, torch.Tensor]:
    """(features (B, N, C), keep bool (B, N)) with so many kept places, at random ones."""
    features = torch.randn(len(counts), PLACES, DIM)
    keep = torch.zeros(len(counts), PLACES, dtype=torch.bool)
    for row, count in zip(keep, counts):
        row[torch.randperm(PLACES)[:count]] = True
    return features, keep


# -- the softmax under a policy ---------------------------------------------------------------------------------------


def test_masked_softmax_is_an_exact_one_up_to_eps_where_the_largest_logit_is_seen():
    logits = torch.randn(2, 3, 6, 6)
    mask = torch.ones(2, 1, 6, 6).tril()
    exact = logits.masked_fill(mask == 0, -torch.inf).softmax(-1)
    assert (masked_softmax(logits, mask) - exact).abs().max() < 1e-4


def test_masked_softmax_takes_the_maximum_over_masked_keys_too():
    logits = torch.tensor([[[[0.0, 30.0, 0.0, 0.0]]]])
    weights = masked_softmax(logits, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    # e^-30 is nothing beside eps: nearly uniform over all keys, the masked one included; an exact one gives 1/3, 0
    assert torch.allclose(weights, torch.full_like(weights, 0.25), atol=1e-4)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_masks_at_their_ends(kept):
    keep = torch.full((2, 8), kept)
    logits = torch.randn(2, 2, 8, 8)
    own, cross = masked_softmax(logits, visible_mask(keep)), masked_softmax(logits, dropped_mask(keep))
    assert torch.allclose(own.sum(-1), torch.ones(2, 2, 8)) and torch.allclose(cross.sum(-1), torch.ones(2, 2, 8))
    if kept:  # causal among all; nothing dropped: uniform over all
        assert torch.allclose(own, own.tril(), atol=1e-5)
        assert torch.equal(cross, torch.full_like(cross, 1 / 8))
    else:  # each sees itself; all dropped: an ordinary softmax
        assert torch.allclose(own, torch.eye(8).expand_as(own), atol=1e-4)
        assert torch.allclose(cross, logits.softmax(-1), atol=1e-5)


def test_a_kept_place_sees_kept_ones_before_it_and_a_dropped_one_itself_too():
    keep = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert visible_mask(keep)[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert dropped_mask(keep)[0, 0].tolist() == [[0, 1, 0, 1]]


# -- selection --------------------------------------------------------------------------------------------------------


def scores_of(margin: torch.Tensor) -> torch.Tensor:
    return torch.stack([margin, torch.zeros_like(margin)], -1).log_softmax(-1)


def test_some_token_is_always_kept():
    margin = torch.randn(3, PLACES) - 100
    scores = scores_of(margin)
    for keep in (select_places(scores), select_places(scores, threshold=0.9), draw_places(scores) > 0.5):
        assert keep.sum(1).tolist() == [1, 1, 1]
    assert torch.equal(select_places(scores).int().argmax(1), margin.argmax(1))


def test_as_many_places_are_kept_as_a_draw_keeps_on_average_and_as_evenly():
    undecided = scores_of(torch.randn(4, PLACES) * 0.1 - 0.7)  # about a third each
    keep = select_places(undecided)
    assert torch.equal(keep.sum(1), undecided[..., 0].exp().sum(1).round().long())
    assert all(4 >= gap >= 2 for row in keep for gap in row.nonzero()[:, 0].diff())
    assert select_places(undecided, threshold=0.5).sum(1).max() < 5  # where the likelier rule keeps next to nothing
    sure = scores_of(torch.randn(4, PLACES).sign() * 9)
    assert torch.equal(select_places(sure), select_places(sure, threshold=0.5))


def test_a_budget_is_the_same_rule_after_a_shift_of_all_odds():
    margin = torch.randn(4, PLACES) * 3
    for count in (1, 7, 40, 64):
        assert select_places(scores_of(margin), count).sum(1).tolist() == [count] * 4
        assert torch.equal(select_places(scores_of(margin + 2), count), select_places(scores_of(margin), count))
    sure = torch.full((1, PLACES), -20.0)
    wanted = torch.randperm(PLACES)[:16]
    sure[0, wanted] = 20.0
    assert select_places(scores_of(sure), 16)[0].nonzero()[:, 0].tolist() == sorted(wanted.tolist())
    more, fewer = select_places(scores_of(sure), 30)[0], select_places(scores_of(sure), 5)[0]
    assert bool(more[wanted].all()) and int(fewer[wanted].sum()) == 5


def test_the_selector_reads_the_place_and_the_mean_of_all_in_fp32():
    selector = TokenSelector(DIM)
    x = torch.randn(2, PLACES, DIM)
    order = torch.randperm(PLACES)
    assert torch.allclose(selector(x)[:, order], selector(x[:, order]), atol=1e-6)
    other = x.clone()
    other[:, -1] += 10 * torch.randn(DIM)
    assert not torch.equal(selector(other)[:, 0], selector(x)[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selector(x), selector(x.float())) and selector(x).dtype == torch.float32


@pytest.mark.parametrize("keep, count", [(1, 1), (16, 16), (64, 64), (0.25, 16), (1.0, 64), (0.001, 1), (0.5, 32)])
def test_the_budget_is_met_exactly(keep, count):
    tokenizer = lavit()
    pixels = tokenizer.example_pixels()
    tokens = tokenizer.encode(pixels, keep=keep)
    assert tokens.lengths.tolist() == [count] * 3 and tokens.layout == Sequence(PLACES)
    assert tokenizer.keep_map(pixels, keep=keep).flatten(1).sum(1).tolist() == [count] * 3


def test_a_lower_threshold_keeps_more():
    tokenizer = lavit()
    pixels = tokenizer.example_pixels()
    probability = tokenizer.selector(tokenizer.encoder.features(pixels))[..., 0].exp().detach()
    for threshold in (0.45, float(probability.median()), 0.55):
        wanted = (probability > threshold).sum(1).clamp(min=1)
        assert tokenizer.encode(pixels, threshold=threshold).lengths.tolist() == wanted.tolist()


def test_a_drawn_selection_is_that_of_its_generator_and_follows_the_probabilities():
    tokenizer = lavit()
    pixels = tokenizer.example_pixels()
    draws = [tokenizer.encode(pixels, sample=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0].ids, draws[1].ids) and not torch.equal(draws[0].mask, draws[2].mask)
    margin = torch.linspace(-2, 2, PLACES).expand(2000, -1)
    for keep in (
        select_places(scores_of(margin), sample=torch.Generator().manual_seed(0)),
        draw_places(scores_of(margin)),
    ):
        assert (keep.float().mean(0) - margin[0].sigmoid()).abs().max() < 0.06


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": 0}, "keep is a count of 0; expected 1 to 64"),
        ({"keep": 65}, "expected 1 to 64"),
        ({"keep": 1.5}, "expected above 0 and at most 1.0"),
        ({"keep": True}, "keep is True; expected a share"),
        ({"threshold": 1.0}, "expected a probability between 0 and 1"),
        ({"keep": 3, "threshold": 0.5}, "one of keep, threshold and sample"),
    ],
)
def test_bad_options_get_one_clear_error(options, message):
    tokenizer = lavit()
    with pytest.raises(InputError, match=message):
        tokenizer.encode(tokenizer.example_pixels(), **options)


# -- merging ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_gathered_is_masked_without_cross_talk():
    tokenizer = lavit()
    features, keep = kept_unevenly(tokenizer)
    for parameter in tokenizer.merger.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    masked = tokenizer.merger
    gathered = TokenMerger(DIM, 4, 96, 2, "gathered")
    gathered.load_state_dict(masked.state_dict())
    (one, real, places), (two, also, same) = masked.kept(features, keep), gathered.kept(features, keep)
    assert torch.equal(real, also) and torch.equal(places, same) and real.sum(1).tolist() == [5, 64, 1, 20]
    assert (one - two)[real].abs().max() < 5e-6
    for i in range(len(keep)):
        alone = gathered.kept(features[i : i + 1], keep[i : i + 1])[0]
        assert (alone[0] - two[i][real[i]]).abs().max() < 2e-6


@torch.no_grad()
def test_a_kept_place_reads_no_later_kept_one_but_any_dropped_one():
    tokenizer = lavit()
    features, keep = kept_unevenly(tokenizer, (20,))
    gathered = TokenMerger(DIM, 4, 96, 2, "gathered")
    before, _, places = gathered.kept(features, keep)
    later, dropped = features.clone(), features.clone()
    later[0, places[0, 10]] += 1
    dropped[0, int((~keep[0]).nonzero()[-1])] += 1
    changed = (gathered.kept(later, keep)[0] != before).any(-1)[0]
    assert changed.tolist() == [False] * 10 + [True] * 10
    assert (gathered.kept(dropped, keep)[0] != before).any(-1).all()


def test_the_selector_learns_through_the_masks_of_the_merger():
    tokenizer = lavit().train()
    features = torch.randn(2, PLACES, DIM)
    tokenizer.merger(features, draw_places(tokenizer.selector(features))).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in tokenizer.selector.parameters())
    tokenizer.zero_grad()
    tokenizer.stage_step("codebook", {"features": features}).losses["cosine"].backward()  # through the codes as well
    assert all(p.grad.abs().sum() > 0 for p in tokenizer.selector.parameters())


def test_the_decoder_tells_the_selector_what_each_kept_token_is_worth():
    tokenizer = lavit()
    scores = torch.zeros(2, PLACES, 2, requires_grad=True)
    keep = draw_places(scores.log_softmax(-1))
    codes, real, places = tokenizer.compress(torch.randn(2, PLACES, DIM), (keep > 0.5).detach())
    got = tokenizer.decoder(codes, real, keep.gather(1, places))
    assert torch.allclose(got, tokenizer.decoder(codes, real), atol=1e-6)  # it changes gradients alone
    got.square().sum().backward()
    kept = keep > 0.5
    assert (scores.grad[kept].abs().sum(-1) > 0).all() and not scores.grad[~kept].any()


def test_the_gradient_of_a_place_is_bounded_where_the_published_softmax_blows_it_up(monkeypatch):
    tokenizer = lavit().train()
    with torch.no_grad():
        for block in tokenizer.merger.blocks:
            block.self_attn.qkv.weight[: 2 * DIM].mul_(40)  # extreme logits, often largest at a masked key
            block.cross_attn.query.weight.mul_(40)
    gradients = []

    def spied(scores, keep=None):
        raw = draw_places(scores, keep)
        mask = raw * 1  # what the tokenizer hangs its bound on; its gradient reaches `raw` bounded
        raw.register_hook(gradients.append)
        return mask

    monkeypatch.setattr("tokgen.tokenizers.lavit.draw_places", spied)
    features = 3 * torch.randn(2, PLACES, DIM)
    tokenizer.stage_step("features", {"features": features}).losses["cosine"].backward()
    assert float(gradients[0].abs().max()) == 0.5  # 1 / B, reached

    keep = draw_places(tokenizer.selector(features)).detach().requires_grad_()
    codes, real, _ = tokenizer.compress(features, keep)
    (1 - F.cosine_similarity(features, tokenizer.decoder(codes, real), dim=-1).mean()).backward()
    assert float(keep.grad.abs().max()) > 5


def test_a_drawn_mask_is_hard_with_the_gradient_of_its_probability():
    margin = torch.zeros(4, PLACES, requires_grad=True)
    keep = draw_places(scores_of(margin))
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    keep.sum().backward()
    assert (margin.grad > 0).all() and (margin.grad <= 0.25).all()


# -- codes and the decoder ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_decoder_sees_the_order_of_tokens_and_not_their_places():
    tokenizer = lavit()
    codes, mask = torch.randn(1, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    x = tokenizer.decoder(codes, mask)
    assert not torch.allclose(tokenizer.decoder(codes.flip(1), mask), x, atol=1e-4)
    # padding before, between or after the tokens changes nothing
    for at in ([2, 3, 4, 5, 6, 7], [0, 1, 3, 4, 6, 9], [0, 1, 2, 3, 4, 5]):
        wide, seen = torch.randn(1, 10, 8), torch.zeros(1, 10, dtype=torch.bool)
        wide[:, at], seen[:, at] = codes, True
        assert torch.allclose(tokenizer.decoder(wide, seen), x, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("impl", ["masked", "gathered"])
def test_a_picture_does_not_depend_on_its_batch_nor_on_padding(impl):
    tokenizer = lavit(merger_impl=impl)
    features, keep = kept_unevenly(tokenizer)
    vectors, real, _ = tokenizer.compress(features, keep)
    tokens = tokenizer.as_tokens(tokenizer.quantizer(vectors, real).ids, real)
    decoded = tokenizer.decode_features(tokens)
    assert tokens.lengths.tolist() == [5, 64, 1, 20] and tokens.ids.shape == (4, 64)
    for i in range(4):
        vectors, real, _ = tokenizer.compress(features[i : i + 1], keep[i : i + 1])
        alone = tokenizer.as_tokens(tokenizer.quantizer(vectors, real).ids, real)
        assert torch.equal(alone.ids[0], tokens.ids[i, : alone.ids.shape[1]])
        assert (tokenizer.decode_features(alone)[0] - decoded[i]).abs().max() < 2e-6


def test_encoding_is_deterministic_and_leaves_the_codebook_alone_in_training_too():
    tokenizer = lavit().train()
    pixels = tokenizer.example_pixels()
    state = {k: v.clone() for k, v in tokenizer.state_dict().items()}
    first, again = tokenizer.encode(pixels), tokenizer.encode(pixels)
    assert torch.equal(first.ids, again.ids) and first.tokenizer == ""
    assert torch.equal(tokenizer.eval().encode(pixels).ids, first.ids)
    assert all(torch.equal(v, state[k]) for k, v in tokenizer.state_dict().items())


def test_examples_have_unequal_lengths():
    for name in LAVIT.example_configs():
        tokenizer = lavit(name)
        lengths = tokenizer.encode(tokenizer.example_pixels()).lengths.tolist()
        assert lengths == [20] * 3 if name == "fixed" else len(set(lengths)) > 1, (name, lengths)


def test_tokens_that_cannot_be_decoded_get_one_clear_error():
    tokenizer = lavit()
    ids, mask = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[True] * 3, [False] * 3])
    with pytest.raises(InputError, match="picture 1 has no token"):
        tokenizer.decode(Tokens(ids, Sequence(PLACES), (64,), mask))
    with pytest.raises(InputError, match="65 tokens a picture; this lavit has 64"):
        tokenizer.decode(Tokens(torch.zeros(1, 65, dtype=torch.int64), Sequence(65), (64,)))


# -- training ---------------------------------------------------------------------------------------------------------


def step(tokenizer, optimizer, stage, features):
    output = tokenizer.stage_step(stage, {"features": features})
    optimizer.zero_grad()
    sum(output.losses.values()).backward()
    optimizer.step()
    return output


def test_the_ratio_term_brings_the_share_of_kept_places_to_its_aim():
    tokenizer = lavit(keep_ratio=0.2).train()
    optimizer = torch.optim.Adam(decay_groups(tokenizer), 3e-3)
    features = torch.randn(16, PLACES, DIM)
    first = step(tokenizer, optimizer, "features", features)
    for _ in range(30):
        last = step(tokenizer, optimizer, "features", features)
    assert first.stats["kept"] > 25 and abs(float(last.stats["kept"]) - 0.2 * PLACES) < 3
    assert last.losses["cosine"] < first.losses["cosine"] and set(last.losses) == {"cosine", "ratio"}
    assert last.stats["kept_std"] > 0


def test_a_fixed_count_is_kept_in_training_without_a_ratio_term():
    tokenizer = lavit("fixed").train()
    output = tokenizer.stage_step("features", {"features": torch.randn(4, PLACES, DIM)})
    assert (
        float(output.stats["kept"]) == 20 and float(output.stats["kept_std"]) == 0 and set(output.losses) == {"cosine"}
    )
    output.losses["cosine"].backward()
    assert all(p.grad.abs().sum() > 0 for p in tokenizer.selector.parameters())
    assert tokenizer.eval().encode(tokenizer.example_pixels()).lengths.tolist() == [20] * 3
    assert tokenizer.encode(tokenizer.example_pixels(), keep=7).lengths.tolist() == [7] * 3


def test_the_codebook_starts_among_the_vectors_of_kept_places_alone():
    tokenizer = lavit().train()
    features = torch.randn(8, PLACES, DIM)
    torch.manual_seed(1)
    output = tokenizer.stage_step("codebook", {"features": features})
    assert set(output.losses) == {"cosine", "ratio", "commitment"} and "usage" in output.stats
    torch.manual_seed(1)
    with torch.no_grad():
        keep = draw_places(tokenizer.selector(features))
        vectors, real, _ = tokenizer.compress(features, keep)
    assert bool(tokenizer.quantizer.codebook.started)
    assert int(real.sum()) == int(output.tokens.lengths.sum())
    codes = tokenizer.quantizer.codebook.weight
    assert torch.allclose(codes.norm(dim=1), torch.ones(len(codes)))
    twin = lavit().quantizer.train()
    twin(vectors[real])  # the same without padding: the same codebook
    assert torch.allclose(twin.codebook.weight, codes, atol=1e-6)


def test_validation_selects_without_noise():
    tokenizer = lavit()
    features = torch.randn(4, PLACES, DIM)
    with torch.no_grad():
        outputs = [tokenizer.stage_step("codebook", {"features": features}) for _ in range(2)]
    assert torch.equal(outputs[0].tokens.ids, outputs[1].tokens.ids)
    assert torch.equal(outputs[0].tokens.ids, tokenizer.tokenize_features(features).ids)


def test_stages_train_their_parts_and_freeze_names_a_part():
    tokenizer = lavit()
    module = StagedModule(
        tokenizer, [Stage("features", 2), Stage("codebook", 2, freeze=("selector",)), Stage("pixels", 2)]
    )
    named = {id(p): n.split(".")[0] for n, p in tokenizer.named_parameters()}
    trained = [{named[id(p)] for p in parameters} for parameters in module.trained]
    parts = {"selector", "merger", "bottleneck", "decoder"}
    assert trained == [parts, parts - {"selector"}, {"pixel_decoder"}]
    tokenizer.train().selector.requires_grad_(False)
    sum(tokenizer.stage_step("codebook", {"features": torch.randn(2, PLACES, DIM)}).losses.values()).backward()
    assert all(p.grad is None for p in tokenizer.selector.parameters())
    assert tokenizer.merger.blocks[0].self_attn.qkv.weight.grad.abs().sum() > 0


def test_a_step_in_bfloat16_is_finite_and_scores_are_not_rounded():
    tokenizer = lavit().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer.stage_step("codebook", {"features": torch.randn(2, PLACES, DIM)})
    sum(output.losses.values()).backward()
    grads = [p.grad for p in tokenizer.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)


# -- what a language model reads, and what a user sees --------------------------------------------------------------------


@torch.no_grad()
def test_continuous_features_come_from_a_merger_of_their_own():
    tokenizer = lavit(understanding_dim=48)
    pixels = tokenizer.example_pixels()
    features, real = tokenizer.features_for_llm(pixels)
    assert features.shape == (3, int(real.sum(1).max()), 48)
    assert torch.equal(real, tokenizer.encode(pixels).mask)
    ids = tokenizer.encode(pixels).ids
    for p in tokenizer.merger.parameters():
        p.add_(torch.randn_like(p))
    assert torch.equal(tokenizer.features_for_llm(pixels)[0], features)
    assert not torch.equal(tokenizer.encode(pixels).ids, ids)
    with pytest.raises(ConfigError, match=r"give config\.understanding_dim"):
        lavit().features_for_llm(pixels)


def test_kept_places_are_marked_in_the_picture():
    tokenizer = lavit()
    pixels = tokenizer.example_pixels()
    kept = tokenizer.keep_map(pixels, keep=10)
    assert kept.shape == (3, 8, 8) and kept.dtype == torch.bool
    marked = mark_kept(pixels, kept)
    wide = F.interpolate(kept[:, None].float(), scale_factor=4).bool().expand_as(pixels)
    assert torch.equal(marked[wide], pixels[wide]) and torch.allclose(marked[~wide], 0.375 + 0.25 * pixels[~wide])
    with pytest.raises(InputError, match="do not fit"):
        mark_kept(pixels, kept[:2])


# -- pixels by diffusion ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of tiny random diffusion models, saved as published ones are: Stable Diffusion 1 and XL."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    folders = {}
    for kind, width in (("lowres", 24), ("highres", 24 + 40)):
        torch.manual_seed(0)
        extra = {}
        if kind == "highres":
            extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
            extra |= {"projection_class_embeddings_input_dim": 6 * 8 + 40}
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=8,
            norm_num_groups=4,
            **extra,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp(kind)
        for name, part in (
            ("unet", unet),
            ("vae", vae),
            ("scheduler", DDIMScheduler(steps_offset=1, clip_sample=False)),
        ):
            part.save_pretrained(folder / name)
        folders[kind] = folder
    return folders


@pytest.mark.parametrize("kind", ["lowres", "highres"])
def test_pipelines_draw_any_number_of_pictures_each_from_its_seed(published, kind):
    tokenizer = lavit(condition=kind, condition_dims=(24, 40))
    tokens = tokenizer.encode(tokenizer.example_pixels())
    condition = tokenizer.condition(tokens)
    assert condition["prompt_embeds"].shape == (3, PLACES, 24 if kind == "lowres" else 64)
    if kind == "highres":
        assert condition["pooled_prompt_embeds"].shape == (3, 40)
    pipeline = diffusion_pipeline(published[kind], kind)
    pipeline.set_progress_bar_config(disable=True)
    images = tokenizer.draw(tokens, pipeline, num_inference_steps=2)
    assert images.shape == (3, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    alone = tokenizer.draw(tokens[1], pipeline, num_inference_steps=2, generator=[1])
    assert torch.allclose(alone[0], images[1], atol=1e-5)
    assert not torch.allclose(tokenizer.draw(tokens[1], pipeline, num_inference_steps=2, generator=5)[0], images[1])
    other = tokenizer.encode(tokenizer.example_pixels(seed=1))
    assert not torch.allclose(tokenizer.draw(other, pipeline, num_inference_steps=2), images)
    if kind == "highres":
        with pytest.raises(InputError, match="is for condition 'lowres'"):
            tokenizer.draw(tokens, pipeline, unconditional=torch.zeros(1, 7, 64))


def test_the_unet_does_not_see_the_padding_of_the_unconditional_states(published):
    tokenizer = lavit(condition="lowres", condition_dims=(24, 40))
    tokens = tokenizer.encode(tokenizer.example_pixels())
    pipeline = diffusion_pipeline(published["lowres"], "lowres")
    pipeline.set_progress_bar_config(disable=True)
    states = torch.randn(1, 7, 24)
    padded = F.pad(states, (0, 0, 0, PLACES - 7))
    zeros = tokenizer.draw(tokens, pipeline, num_inference_steps=2)
    short = tokenizer.draw(tokens, pipeline, num_inference_steps=2, unconditional=states)
    whole = tokenizer.draw(tokens, pipeline, num_inference_steps=2, unconditional=padded)
    assert not torch.allclose(short, zeros, atol=1e-5) and not torch.allclose(short, whole, atol=1e-5)
    # what stands under the mask does not matter: 7 states repeated are the same attention as the 7 states
    repeated = tokenizer.draw(tokens, pipeline, num_inference_steps=2, unconditional=states.repeat(1, 9, 1))
    assert torch.allclose(short, repeated, atol=1e-4)
    assert not pipeline.unet._forward_pre_hooks  # the pipeline is left as it was
    for wrong in (states[0], states[..., :5], torch.zeros(1, PLACES + 1, 24)):
        with pytest.raises(InputError, match=r"expected \(1, up to 64, 24\)"):
            tokenizer.draw(tokens, pipeline, unconditional=wrong)


def test_a_pipeline_that_does_not_fit_gets_one_clear_error(published, tmp_path):
    tokenizer = lavit(condition="highres", condition_dims=(24, 40))
    tokens = tokenizer.encode(tokenizer.example_pixels())
    with pytest.raises(ConfigError, match="needs a StableDiffusionXLPipeline"):
        tokenizer.draw(tokens, diffusion_pipeline(published["lowres"], "lowres"))
    with pytest.raises(ConfigError, match="UNet reads conditions of width 64, and this lavit gives 72"):
        wide = lavit(condition="highres", condition_dims=(32, 40))
        wide.draw(wide.encode(wide.example_pixels()), published["highres"])
    with pytest.raises(InputError, match="2 seeds for 3 pictures"):
        tokenizer.draw(tokens, published["highres"], generator=[1, 2])
    with pytest.raises(ConfigError, match="has no folder 'vae'"):
        diffusion_pipeline(tmp_path, "lowres")
    with pytest.raises(ConfigError, match="conditions no diffusion model"):
        lavit().condition(tokens)
    with pytest.raises(TokenizerMismatch, match="made by tokenizer"):
        lavit(condition="highres", condition_dims=(24, 40), code_dim=4).condition(tokens)


# -- configuration and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"merger_impl": "fast"}, "merger_impl is 'fast'; expected masked or gathered"),
        ({"condition": "sd3"}, "condition is 'sd3'"),
        ({"keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ({"fixed_keep": 65, "threshold": None}, "fixed_keep is 65; expected 1 to 64"),
        ({"fixed_keep": 6}, "fixed_keep and threshold are two rules"),
        ({"merger_heads": 5}, "merger_heads 5 does not divide"),
        ({"decoder_heads": 5}, "decoder_dim 32 is not a multiple"),
        ({"quantizer": {"type": "vq", "codebook_size": 8, "metric": "sphere"}}, "'sphere' with update 'ema'"),
    ],
)
def test_bad_configurations_get_one_clear_error(change, message):
    with pytest.raises(ConfigError, match=message):
        lavit(**change)


def test_an_encoder_with_a_class_token_is_refused():
    encoder = LAVIT.example_configs()["eva"].encoder
    spec = {**encoder, "config": {**encoder["config"], "keep_class_token": True}}
    with pytest.raises(ConfigError, match="65 features, which is no square"):
        lavit(encoder=spec)


def test_a_published_folder_has_both_mergers_and_encodes_alike(tmp_path):
    tokenizer = lavit(understanding_dim=16, condition="lowres")
    again = tokgen.load(tokenizer.save_pretrained(tmp_path))
    pixels = tokenizer.example_pixels()
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(pixels, keep=9).ids, tokenizer.encode(pixels, keep=9).ids)
    assert torch.equal(again.features_for_llm(pixels)[0], tokenizer.features_for_llm(pixels)[0])


def test_merger_blocks_are_those_of_the_decoder():
    assert isinstance(lavit().merger.blocks[0], CrossBlock)
