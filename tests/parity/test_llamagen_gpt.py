"""LlamaGen's decoders, by class and by text features: logits and greedy ids of the published code."""

from __future__ import annotations

import pytest
import reference
import torch

from tokgen.generators.conditions import to_the_end
from tokgen.generators.decoding import generate
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.generators.sampling import SamplingSettings
from tokgen.importers.llamagen_gpt import GPT_SIZES, gpt_from_state_dict

CASES = r"llamagen_gpt_.*"


def imported(case):
    published = case["config"]["ModelArgs"]
    grid = round(published["block_size"] ** 0.5)
    generator, report = gpt_from_state_dict(reference.state_dict(case), grid=grid, heads=published["n_head"])
    assert set(report.mapped) == set(case["keys"]) and not report.ignored
    return generator


def prompts(case, expected, close):
    """The condition's tensors and mask."""
    inputs = reference.inputs(case)
    if "class_labels" in inputs:
        labels = inputs["class_labels"][:, None]
        return labels, torch.ones_like(labels, dtype=torch.bool)
    # the features come right-padded from a text encoder
    features, lengths = inputs["caption"], torch.tensor(case["config"]["caption_lengths"])
    right = torch.arange(features.shape[1]) < lengths[:, None]
    mask = to_the_end(features, right)[1]
    close(case, expected, "caption_mask", mask.long())
    return features * mask[..., None], mask


@torch.no_grad()
def test_logits_are_the_published_ones(parity_case, close):
    case, expected = parity_case
    generator = imported(case)
    prompt, mask = prompts(case, expected, close)
    ids = reference.inputs(case)["ids"]
    ids = torch.cat([ids, ids[:, :1]], 1)  # the last id is predicted but never read
    close(case, expected, "logits", generator(prompt, mask, ids).logits)
    null, null_mask = generator.condition.null(prompt, mask)
    close(case, expected, "logits_uncond", generator(null, null_mask, ids).logits)


@pytest.mark.parametrize("scale", [1, 4])
def test_greedy_ids_are_the_published_ones(parity_case, close, scale):
    case, expected = parity_case
    generator = imported(case)
    prompt, mask = prompts(case, expected, close)
    settings = SamplingSettings(guidance_scale=float(scale), temperature=0)
    ids, _ = generate(generator, prompt, mask, settings, seeds=range(len(prompt)))
    close(case, expected, f"greedy_cfg{scale}", ids[..., 0])


PARAMETERS = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "XXXL": 3_893_027_840,
    "1B": 1_199_616_000,
    "3B": 3_096_659_200,
    "7B": 6_614_589_440,
}
TEXT_MILLIONS = {"B": 112.3, "L": 345.0, "XL": 777.7, "XXL": 1415}


def parameters(name: str, **options) -> int:
    (dim, layers), heads = GPT_SIZES[name]
    layout = {"kind": "Grid", "h": 16, "w": 16}
    with torch.device("meta"):
        config = LlamaConfig(layout, (16384,), dim=dim, n_layers=layers, n_heads=heads, rope="2d", **options)
        return sum(p.numel() for p in LlamaGenerator(config).parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_have_the_published_parameter_counts(name):
    assert parameters(name, condition="class") == PARAMETERS[name]
    if name in TEXT_MILLIONS:
        text = parameters(name, condition="features", max_text=120)
        assert text / 1e6 == pytest.approx(TEXT_MILLIONS[name], rel=5e-4)
