"""TokenFlow-t2i: logits and greedy ids, of one pass and of three, of the published code."""

from __future__ import annotations

import dataclasses

import pytest
import reference
import torch
import torch.nn.functional as F

from tokgen.generators.next_scale import generate
from tokgen.generators.sampling import SamplingSettings
from tokgen.generators.tokenflow import TokenFlowGenerator
from tokgen.importers.base import rename
from tokgen.importers.tokenflow_t2i import T2I_IGNORED, T2I_KEYS, fill_t2i, t2i_config

CASES = r"tokenflow_t2i"


def imported(case):
    state, published = reference.state_dict(case), case["config"]
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    _, report = rename(shapes, T2I_KEYS, T2I_IGNORED, case["name"])
    config = t2i_config(
        shapes,
        published["words"] + 1,  # and [PAD]
        None,
        published["scales"],
        tuple(published["image_begin"]),
        published,
        case["name"],
    )
    generator = TokenFlowGenerator(dataclasses.replace(config, max_text=published["max_text"]))
    fill_t2i(generator, state.items(), report, case["name"])
    assert set(report.mapped) == set(case["keys"])
    generator.take_codebook(F.normalize(reference.inputs(case)["table"], dim=-1))
    return generator.eval()


def prompts(case):
    """Captions, and after them the negative prompt, as `encode_prompts` would give them."""
    rows = [*case["config"]["captions"], case["config"]["negative"]]
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(lengths.max()) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(
        mask, torch.tensor([i for row in rows for i in row])
    )
    return ids, mask


@torch.no_grad()
def test_logits_are_the_published_ones(parity_case, close):
    case, expected = parity_case
    ids, mask = prompts(case)
    close(case, expected, "logits", imported(case)(ids[:-1], mask[:-1], reference.inputs(case)["ids"]).logits)


@pytest.mark.parametrize("passes", [1, 3])
def test_greedy_ids_are_the_published_ones(parity_case, close, passes):
    case, expected = parity_case
    ids, mask = prompts(case)
    settings = SamplingSettings(
        guidance_scale=1 + case["config"]["cfg"], schedule="linear", temperature=0, passes=((1, 1.0),) * (passes - 1)
    )
    away = ids[-1:].expand_as(ids[:-1]), mask[-1:].expand_as(mask[:-1])
    drawn, _ = generate(imported(case), ids[:-1], mask[:-1], settings, seeds=range(len(ids) - 1), unconditional=away)
    close(case, expected, f"greedy_{passes}", drawn[..., 0])
