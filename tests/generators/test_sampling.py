from __future__ import annotations

import math
import shutil

import pytest
import torch

from tokgen.errors import ConfigError, InputError
from tokgen.generators.sampling import Noise, SamplingSettings, choose, filter_logits, guidance_weights

# -- guidance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "extra", "expected"),
    [
        ("constant", {}, [5, 5, 5, 5, 5]),
        ("linear", {}, [1, 2, 3, 4, 5]),
        ("half-linear", {}, [1, 2.6, 4.2, 5, 5]),
        ("cosine", {}, [1, 3 - math.sqrt(2), 3, 3 + math.sqrt(2), 5]),
        ("power", {"guidance_power": 2.0}, [1, 1.25, 2, 3.25, 5]),
        ("interval", {"guidance_interval": (0.2, 0.6)}, [1, 5, 5, 1, 1]),
        ("interval", {"guidance_interval": (0.4, 1.0)}, [1, 1, 5, 5, 5]),
    ],
)
def test_schedules_have_their_formulas_values(schedule, extra, expected):
    settings = SamplingSettings(guidance_scale=5.0, schedule=schedule, **extra)
    assert guidance_weights(settings, 5).tolist() == pytest.approx(expected, abs=1e-5)
    assert guidance_weights(settings, 1).shape == (1,)


def test_guidance_zero_is_the_unconditional_model_and_one_the_conditional(make, captions):
    model = make(window=2)
    args = {"generator": [3, 4, 5, 6]}
    conditional = model.generate(captions, **args).ids
    unconditional = model.generate([""] * 4, **args).ids
    assert not torch.equal(conditional, unconditional)
    assert torch.equal(model.generate(captions, guidance_scale=0.0, **args).ids, unconditional)
    nearly = model.generate(captions, guidance_scale=1.0 + 1e-7, **args).ids  # both branches run
    assert torch.equal(nearly, conditional)


def test_guidance_follows_its_formula_and_the_order_of_steps():
    logits = torch.randn(4, 2, 3, 10)  # rows, steps, slots, codes
    settings = SamplingSettings(temperature=0.5, top_k=4, top_p=0.9, min_p=0.05)
    noise, weight = Noise([1, 2], torch.device("cpu")).draw(2, 3, 10), torch.tensor([2.5, 0.5])
    guided = logits[2:] + weight.view(1, 2, 1, 1) * (logits[:2] - logits[2:])
    expected = (filter_logits(guided / 0.5, 4, 0.9, 0.05) + noise).argmax(-1)
    assert torch.equal(choose(logits, noise, weight, settings), expected)
    assert torch.equal(choose(logits, None, weight, settings), guided.argmax(-1))


# -- filters --------------------------------------------------------------------------------------------------------------


def brute_force(row, top_k, top_p, min_p):
    keep = dict(enumerate(row))
    if top_k:
        least = sorted(keep.values(), reverse=True)[: max(top_k, 1)][-1]
        keep = {i: v for i, v in keep.items() if v >= least}
    if top_p < 1:
        total = sum(math.exp(v) for v in keep.values())
        reached, least = 0.0, -math.inf
        for v in sorted(keep.values(), reverse=True):
            if reached >= top_p:
                break
            reached, least = reached + math.exp(v) / total, v
        keep = {i: v for i, v in keep.items() if v >= least}
    if min_p:
        total = sum(math.exp(v) for v in keep.values())
        most = max(math.exp(v) / total for v in keep.values())
        keep = {i: v for i, v in keep.items() if math.exp(v) / total >= min_p * most}
    return set(keep)


@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3, 1.0])
def test_filters_keep_the_right_ids(top_k, top_p, min_p):
    logits = torch.randn(6, 40, dtype=torch.float64) * torch.tensor([0.3, 1, 1, 2, 3, 5]).double()[:, None]
    filtered = filter_logits(logits, top_k, top_p, min_p)
    for row, out in zip(logits.tolist(), filtered):
        kept = set(torch.isfinite(out).nonzero()[:, 0].tolist())
        assert kept == brute_force(row, top_k, top_p, min_p)
        assert kept
    assert torch.equal(filtered[torch.isfinite(filtered)], logits[torch.isfinite(filtered)])


def test_ids_level_with_the_last_one_kept_are_kept():
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert torch.isfinite(filter_logits(logits, top_k=2)).tolist() == [True, True, True, False]
    assert torch.isfinite(filter_logits(logits, top_p=0.7)).tolist() == [True, True, True, False]


def test_draws_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5, -3.0])
    images = 2000
    noise = Noise(range(images), torch.device("cpu")).draw(8, 5)
    ids = choose(logits.expand(images, 8, 5), noise, None, SamplingSettings())
    share = ids.flatten().bincount(minlength=5) / ids.numel()
    p = logits.softmax(-1)
    deviation = (p * (1 - p) / ids.numel()).sqrt()
    assert ((share - p).abs() < 4 * deviation).all()


# -- seeds and batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"window": 2, "rope": "2d"}, {"n_kv_heads": 2}, {"codebook_sizes": (24, 9)}])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_depends_on_its_own_prompt_and_seed_alone(make, captions, options, guidance):
    model = make(**options)
    settings = {"guidance_scale": guidance, "schedule": "half-linear", "top_k": 12, "top_p": 0.95}
    prompts = [*captions, "", "an unseen and rather longer caption"]
    seeds = [11, 5, 11, 8, 3, 0]
    together = model.generate(prompts, generator=seeds, **settings).ids
    for i in range(len(prompts)):
        assert torch.equal(model.generate([prompts[i]], generator=[seeds[i]], **settings).ids[0], together[i])
    back = model.generate(prompts[::-1], generator=seeds[::-1], **settings).ids
    assert torch.equal(back.flip(0), together)
    assert together.flatten(1).unique(dim=0).shape[0] == len(prompts)


def test_seeds_come_in_four_ways(make, captions):
    model = make()
    by_int = model.generate(captions, generator=40).ids
    assert torch.equal(by_int, model.generate(captions, generator=[40, 41, 42, 43]).ids)
    tokens, report = model.sample(captions, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tokens.ids, model.generate(captions, generator=torch.Generator().manual_seed(1)).ids)
    assert torch.equal(tokens.ids, model.generate(captions, generator=report.seeds).ids)
    assert not torch.equal(model.generate(captions).ids, model.generate(captions).ids)
    with pytest.raises(InputError, match="3 seeds for 4 images"):
        model.generate(captions, generator=[1, 2, 3])


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (8, 2), (2, 4, 6)])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("codebook_sizes", [(24,), (5, 24)])
def test_length_and_range_are_always_right(make, captions, grid, window, codebook_sizes):
    model = make(grid=grid, window=window, codebook_sizes=codebook_sizes)
    tokens, report = model.sample(captions[:2], guidance_scale=2.0, generator=0)
    assert tokens.ids.shape[1] == math.prod(grid) == tokens.layout.length
    assert tokens.mask.all()
    assert tokens.validate().codebook_sizes == codebook_sizes
    assert report.ids == tokens.ids.numel()
    assert report.steps == math.prod(grid) // window**2 * len(codebook_sizes)
    assert report.ids_per_second > 0


def test_sampling_leaves_the_model_as_it_was(make, captions):
    model = make(token_dropout=0.5).train()
    first = model.generate(captions, generator=0).ids
    assert model.training
    assert torch.equal(model.eval().generate(captions, generator=0).ids, first)
    assert not model.training
    loss = model.loss({"ids": first, "caption": captions}).loss  # drawn ids can be trained on
    loss.backward()


def test_saved_defaults_apply_and_arguments_override_them(make, captions):
    model = make()
    model.generation = {"temperature": 0, "guidance_scale": 2.0}
    _, report = model.sample(captions)
    assert (report.settings.temperature, report.settings.guidance_scale) == (0, 2.0)
    _, report = model.sample(captions, temperature=0.7, guidance_scale=1.0, top_k=3)
    assert report.settings == SamplingSettings(temperature=0.7, top_k=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 2.0),
        ("schedule", "sine"), ("guidance_interval", (0.7, 0.2)), ("guidance_power", 0.0), ("guidance_scale", math.inf),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(make, name, value):
    with pytest.raises(ConfigError, match=name):
        make().generate(["cat"], **{name: value})


def test_prompts_must_be_a_list(make):
    with pytest.raises(InputError, match="wrap a single prompt"):
        make().generate("cat")
    with pytest.raises(InputError, match="at least one"):
        make().generate([])


def test_progress_is_shown(make, capsys):
    make(window=2).generate(["cat"], progress=True)
    assert "drawing" in capsys.readouterr().out


# -- compilation ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the C++ compiler takes half a minute of CPU time, much more on a busy machine
def test_compiled_ids_are_the_eager_ids(make, captions):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    model = make(window=2, rope="2d", n_kv_heads=2, qk_norm=True)
    settings = {"guidance_scale": 2.5, "schedule": "linear", "top_k": 10, "top_p": 0.9, "min_p": 0.01, "generator": 9}
    eager = model.generate(captions, **settings).ids
    tokens, report = model.sample(captions, compile=True, **settings)
    assert report.compiled
    assert torch.equal(tokens.ids, eager)
    longer = [c + ", again" for c in captions]  # another prompt length, the same compiled step
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(model.generate(longer, compile=True, **settings).ids, model.generate(longer, **settings).ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_missing_compiler_is_one_clear_sentence(make, monkeypatch):
    from tokgen.errors import MissingDependency

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingDependency, match="leave compile off"):
        make().generate(["cat"], compile=True)
