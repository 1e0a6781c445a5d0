"""Codes by their vectors in the tokenizer's codebook: embeddings through a projector, logits by inner products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tokgen
from tokgen.errors import ConfigError
from tokgen.generators.token_shuffle import from_windows, to_windows

EMBEDDING = {"code_embedding": "codebook", "code_dim": 6}
HEAD = {"code_head": "codebook", "code_dim": 6}
BOTH = {**EMBEDDING, **HEAD}
VARIANTS = {
    "embedding": EMBEDDING,
    "head": HEAD,
    "both": BOTH,
    "both, one layer": {**BOTH, "code_layers": 1},
    "both, window 2": {**BOTH, "window": 2, "rope": "2d"},
    "both, window 2, autoregressive head": {**BOTH, "window": 2, "window_head": "autoregressive"},
    "both, biases": {**BOTH, "qkv_bias": True},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def build(make, options):
    """With a codebook, and weights wide enough that predictions differ from id to id."""
    model = make(**options)
    torch.manual_seed(5)
    model.take_codebook(torch.randn(24, 6))
    return model


def ids_of(model, batch=4):
    return torch.randint(24, (batch, model.layout.length))


def test_what_is_computed_is_what_is_said(make, captions):
    model = build(make, BOTH)
    assert model.needs_codebook and model.tok_embeddings is None
    assert {k for k in model.state_dict() if k.startswith("codes.")} == {
        "codes.codebook",
        *(f"codes.projector.layers.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")),
    }
    assert not any(name.startswith("codes.codebook") for name, _ in model.named_parameters())
    ids, table = ids_of(model), model.codes.codebook
    first, second = model.codes.projector.layers
    expected = second(F.gelu(first(table[ids])))
    assert torch.allclose(model.embed(ids[..., None]), expected, atol=1e-6)
    hidden = torch.randn(4, 3, 64)
    logits = model.code_logits(model.to_slots(hidden), 0, model.head())[:, :, 0]
    assert torch.allclose(logits, model.output(model.norm(hidden)) @ table.T, atol=1e-4)
    assert logits.shape == (4, 3, 24) and logits.dtype == torch.float32
    plain = make()
    assert not plain.needs_codebook and plain.codes is None


def test_it_starts_level_whatever_the_codebook(make, captions):
    """The head starts at zero, and learns; the codebook never."""
    model = make(std=0, **BOTH)
    model.take_codebook(100 * torch.randn(24, 6))
    table = model.codes.codebook.clone()
    prompt, mask = model.encode_prompts(captions)
    ids = ids_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        out = model.train()(prompt, mask, ids)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[0] == pytest.approx(torch.tensor(24.0).log().item(), abs=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(model.codes.codebook, table)
    assert all(p.grad is not None for p in model.codes.parameters())


@each_variant
def test_cached_decoding_is_the_teacher_forced_argmax(make, captions, options):
    model = build(make, options)
    tokens = model.generate(captions, temperature=0)
    prompt, mask = model.encode_prompts(captions)
    if options.get("window_head") != "autoregressive":
        assert torch.equal(model(prompt, mask, tokens.ids).logits.argmax(-1), tokens.ids)
        assert len(tokens.ids.unique()) > 3
    again = model.generate(captions, temperature=0, speculative=4)
    assert torch.equal(again.ids, tokens.ids)
    # ids that stay are read as those that were drawn
    kept = model.generate(captions, temperature=0, given=tokens)
    assert torch.equal(kept.ids, tokens.ids)


@each_variant
def test_saved_and_loaded_it_is_the_same(make, captions, options, tmp_path):
    model = build(make, options)
    model.save_pretrained(tmp_path)
    loaded = tokgen.load(tmp_path)
    prompt, mask = model.encode_prompts(captions)
    ids = ids_of(model)
    assert torch.equal(model(prompt, mask, ids).logits, loaded(prompt, mask, ids).logits)


@each_variant
def test_an_int8_copy_draws(make, captions, options):
    """Its predictions are near; as a draft it changes no id."""
    model = build(make, options)
    small = model.int8()
    prompt, mask = model.encode_prompts(captions)
    ids = ids_of(model)
    with torch.no_grad():
        whole, rough = (m(prompt, mask, ids).logits.log_softmax(-1) for m in (model, small))
    assert (whole - rough).abs().mean() < 0.15 * whole.std()
    drawn = model.generate(captions, generator=3)
    assert torch.equal(model.generate(captions, generator=3, speculative=4, draft=small).ids, drawn.ids)


@pytest.mark.slow
def test_a_compiled_step_draws_the_same(make, captions):
    model = build(make, BOTH)
    plain = model.generate(captions, generator=3)
    assert torch.equal(model.generate(captions, generator=3, compile=True).ids, plain.ids)


def test_a_generator_starts_from_one_of_another_window(make, captions):
    """Projector, codebook and head are taken over."""
    source, target = build(make, BOTH), make(**BOTH, window=2)
    fresh = target.start_from(source)
    assert {name.split(".")[0] for name in fresh} == {"shuffle", "unshuffle"}
    assert torch.equal(target.codes.codebook, source.codes.codebook)
    steps = to_windows(ids_of(target), target.order)
    assert from_windows(target.embed_codes(steps)[..., None], target.order, 1).shape[1] == 16
    with pytest.raises(ConfigError, match="cannot start from a generator of other sizes: "):
        make().start_from(source)


def test_wrong_codebooks_are_named(make):
    with pytest.raises(ConfigError, match=r"needs one codebook \(here 2\)"):
        make(codebook_sizes=(24, 9), **BOTH)
    with pytest.raises(ConfigError, match="code_dim 0"):
        make(code_embedding="codebook")
    with pytest.raises(ConfigError, match="code_head='cosine'"):
        make(code_head="cosine")
    model = make(**BOTH)
    with pytest.raises(ConfigError, match=r"codebook is \(24, 5\), the generator reads one of \(24, 6\)"):
        model.take_codebook(torch.randn(24, 5))
    with pytest.raises(ConfigError, match="NaN"):
        model.take_codebook(torch.full((24, 6), torch.nan))
    with pytest.raises(ConfigError, match="embeddings of its own"):
        make().take_codebook(torch.randn(24, 6))
    # forgotten, it shows
    assert bool(model.embed(torch.zeros(1, 1, 1, dtype=torch.int64)).isnan().all())
