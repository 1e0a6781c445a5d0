"""Blocks of guessed steps, and ids that are given: what comes out is what step-by-step decoding gives."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from test_llama import VARIANTS

from tokgen.errors import ConfigError, InputError, TokenizerMismatch
from tokgen.generators import decoding
from tokgen.tokens import Grid, Tokens

each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
SETTINGS = {"guidance_scale": 2.0, "schedule": "linear", "top_k": 12, "generator": 3}


@each_variant
@pytest.mark.parametrize("width", [2, 3, 50])
def test_ids_are_those_of_step_by_step_decoding(make, captions, options, width):
    model = make(**options)
    plain, one = model.sample(captions[:2], **SETTINGS)
    tokens, report = model.sample(captions[:2], speculative=width, **SETTINGS)
    assert torch.equal(tokens.ids, plain.ids)
    assert one.calls == one.steps == model.steps == report.steps
    assert report.calls <= model.steps
    greedy = {"temperature": 0.0}
    assert torch.equal(
        model.generate(captions, speculative=width, **greedy).ids, model.generate(captions, **greedy).ids
    )


def test_right_guesses_save_calls(make, captions):
    """A model that repeats one id whatever comes before: every guess is right, but for the first."""
    model = make()
    with torch.no_grad():
        for p in model.output.parameters():
            p.zero_()
        model.norm.weight.zero_()
    plain, _ = model.sample(captions, temperature=0)
    tokens, report = model.sample(captions, temperature=0, speculative=5)
    assert torch.equal(tokens.ids, plain.ids)
    assert report.calls == 1 + 3  # 15 steps after the first, five at a time
    assert report.steps_per_call == 4


def test_the_distribution_is_the_models(make):
    """Chi-square against the exact probabilities of every picture of three steps of three codes."""
    model = make(layout={"kind": "Sequence", "n": 3}, codebook_sizes=(3,), std=0.4)
    prompt = ["cat"]
    pictures = torch.tensor(list(itertools.product(range(3), repeat=3)))
    ids, mask = model.encode_prompts(prompt * len(pictures))
    logits = model(ids, mask, pictures).logits.log_softmax(-1)
    p = logits.gather(-1, pictures[..., None]).sum((1, 2)).exp()  # (27,)
    assert abs(p.sum().item() - 1) < 1e-5 and p.max() > 1.5 / 27  # not uniform
    draws = 6000
    tokens, _ = model.sample(prompt * draws, generator=0, speculative=2)
    index = (tokens.ids * torch.tensor([9, 3, 1])).sum(1)
    counts = index.bincount(minlength=27)
    chi2 = ((counts - draws * p).square() / (draws * p)).sum().item()
    assert chi2 < 54.1  # 26 degrees of freedom, 0.1 %
    # blocks of one image each accept what they may, and still follow the distribution
    for draft in (None, model.int8()):
        some = torch.cat([model.generate(prompt, generator=i, speculative=2, draft=draft).ids for i in range(50)])
        assert torch.equal(some, tokens.ids[:50])


def test_a_block_of_none_and_a_draft_of_other_steps_are_refused(make):
    model = make(window=2)
    with pytest.raises(ConfigError, match="speculative=0"):
        model.generate(["cat"], speculative=0)
    with pytest.raises(ConfigError, match="speculative=1"):
        model.generate(["cat"], draft=model.int8())
    with pytest.raises(ConfigError, match="in 16 steps"):
        model.generate(["cat"], draft=make(), speculative=4)


# -- drafts ---------------------------------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("kind", ["int8", "another model"])
def test_ids_do_not_depend_on_the_draft(make, captions, options, kind):
    model = make(**options)
    draft = model.int8() if kind == "int8" else make(**options)
    for settings in (SETTINGS, {"temperature": 0.0}):
        plain = model.generate(captions[:3], **settings)
        tokens, report = model.sample(captions[:3], speculative=4, draft=draft, **settings)
        assert torch.equal(tokens.ids, plain.ids)
        assert (report.draft_calls > 0) == (model.steps > 1) and report.calls <= model.steps


def test_a_perfect_draft_is_accepted_whole(make, captions):
    model = make()
    tokens, report = model.sample(captions, speculative=5, draft=model, **SETTINGS)
    assert torch.equal(tokens.ids, model.generate(captions, **SETTINGS).ids)
    assert report.calls == 1 + 3 and report.steps_per_call == 4  # 15 steps after the first, five at a time
    # the prompt, four guesses a block, and from the second block on the step that the block before left out
    assert report.draft_calls == 1 + 4 + 5 + 5


def test_a_draft_knows_what_is_given(make, captions):
    model = make(window=2)
    given, keep = all_ids(model, 4), torch.rand(4, 16) < 0.4
    settings = {"given": given, "keep": keep, **SETTINGS}
    tokens, report = model.sample(captions, speculative=3, draft=model, **settings)
    assert torch.equal(tokens.ids, model.generate(captions, **settings).ids)
    assert report.calls == 1 + 1  # four steps: the first, and a block of three


# -- given ids ------------------------------------------------------------------------------------------------------------


def all_ids(model, batch):
    ids = torch.stack([torch.randint(k, (batch, model.layout.length)) for k in model.codebook_sizes], -1)
    ids = ids if len(model.codebook_sizes) > 1 else ids[..., 0]
    return Tokens(ids, model.layout, model.codebook_sizes)


@each_variant
@pytest.mark.parametrize("width", [1, 3])
def test_given_ids_stay_and_the_others_are_drawn_in_order(make, captions, options, width):
    model = make(**options)
    given = all_ids(model, 2)
    keep = torch.rand(2, model.layout.length) < 0.5
    tokens, report = model.sample(captions[:2], given=given, keep=keep, speculative=width, **SETTINGS)
    assert torch.equal(tokens.ids[keep], given.ids[keep])
    assert report.ids == (~keep).sum() * len(model.codebook_sizes)
    # every drawn id is the greedy choice given all before it, given ones included
    greedy = model.generate(captions[:2], given=given, keep=keep, speculative=width, temperature=0).ids
    best = model(*model.encode_prompts(captions[:2]), greedy).logits.argmax(-1)
    assert torch.equal(greedy[~keep], best[~keep])


def test_a_prefix_is_completed_as_it_would_have_gone_on(make, captions):
    for options in ({}, {"codebook_sizes": (24, 9)}, {"layout": {"kind": "Sequence", "n": 7}}):
        model = make(**options)
        whole, full = model.sample(captions, **SETTINGS)
        n = 5
        prefix = Tokens(whole.ids[:, :n], model.layout, model.codebook_sizes)
        again, report = model.sample(captions, given=prefix, **SETTINGS)
        assert torch.equal(again.ids, whole.ids)
        assert report.calls == full.calls - n * len(model.codebook_sizes)  # one call for all that was given
        nothing, report = model.sample(captions, given=whole, **SETTINGS)
        assert torch.equal(nothing.ids, whole.ids) and report.calls == report.ids == 0


def test_one_item_is_given_to_all_images(make, captions):
    model = make(window=2)
    given, keep = all_ids(model, 1), torch.arange(16)[None] < 8
    ids = model.generate(captions, given=given, keep=keep, generator=0).ids
    assert torch.equal(ids[:, :8], given.ids[:, :8].expand(4, -1))
    assert ids[:, 8:].unique(dim=0).shape[0] == 4


def test_given_ids_that_do_not_fit_are_named(make, captions):
    model = make()
    model.tokenizer_fingerprint = "a" * 16
    given = all_ids(model, 2)
    with pytest.raises(InputError, match="4 image"):
        model.generate(captions, given=given)
    with pytest.raises(InputError, match="keep"):
        model.generate(captions[:2], given=given, keep=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="Grid"):
        model.generate(captions[:2], given=Tokens(given.ids, Grid(2, 8), (24,)))
    with pytest.raises(TokenizerMismatch, match=r"b{16}"):
        model.generate(captions[:2], given=Tokens(given.ids, model.layout, (24,), tokenizer="b" * 16))
    with pytest.raises(TokenizerMismatch, match=r"\(24, 24\)"):
        model.generate(captions[:2], given=Tokens(torch.zeros(2, 16, 2, dtype=torch.int64), model.layout, (24, 24)))


# -- compiled -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_blocks_with_given_ids_are_the_eager_ones(make, captions):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    model = make(window=2, window_head="autoregressive")
    given, keep = all_ids(model, 4), torch.rand(4, 16) < 0.3
    settings = {"given": given, "keep": keep, "speculative": 2, **SETTINGS}
    int8 = model.int8()
    tokens, report = model.sample(captions, compile=True, draft=int8, **settings)
    assert report.compiled
    assert torch.equal(tokens.ids, model.generate(captions, **settings).ids)
    # in bfloat16 two logits are often level, and fused kernels round elsewhere
    same = int8.generate(captions, compile=True, **SETTINGS).ids == int8.generate(captions, **SETTINGS).ids
    assert same[:, [0, 1, 4, 5]].all() and same.float().mean() > 0.8


def test_the_loop_never_reads_beyond_the_noise_it_keeps(make, captions):
    model = make(codebook_sizes=(24, 9))
    noise = decoding._StepNoise(model, [1, 2], torch.device("cpu"))
    first = noise.of(0, 4)
    assert [tuple(n.shape) for n in first] == [(2, 1, 24), (2, 1, 9), (2, 1, 24), (2, 1, 9)]
    noise.forget(2)
    assert all(torch.equal(a, b) for a, b in zip(noise.of(2, 3)[:2], first[2:]))
    assert sorted(noise.kept) == [2, 3, 4]
