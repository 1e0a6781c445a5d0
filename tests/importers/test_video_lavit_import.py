"""Video-LaVIT's motion tokenizer file as it is found: sizes, names, and training that goes on from it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tokgen.errors import CheckpointError
from tokgen.importers.video_lavit import load_motion_tokenizer, motion_config, motion_from_state_dict

PARITY = Path(__file__).parent.parent / "parity"
sys.path.insert(0, str(PARITY))

import reference  # noqa: E402


def published() -> dict[str, torch.Tensor]:
    return reference.state_dict(reference.load(PARITY / "cases/video_lavit_motion.json")[0])


def test_a_file_loads_and_encodes(tmp_path):
    state = published()
    torch.save(state, tmp_path / "motion_tokenizer.bin")
    tokenizer, report = load_motion_tokenizer(tmp_path / "motion_tokenizer.bin", heads=4)
    assert len(report.mapped) == len(state) == 515 and not report.ignored and not tokenizer.training
    assert torch.equal(tokenizer.quantizer.codebook.weight, state["quantize.embedding.weight"])
    tokens = tokenizer.encode(tokenizer.example_pixels(1))
    assert tokens.ids.shape == (1, 135) and tokenizer.decode(tokens).shape == (1, 24, 2, 20, 36)


def test_sizes_come_from_the_tensors():
    with torch.device("meta"):
        state = {
            "encoder.in_proj.weight": torch.empty(512, 2),
            "encoder.pos_embed": torch.empty(1, 720, 512),
            "encoder.temp_pos": torch.empty(1, 24, 512),
            "encoder.blocks.0.mlp.fc1.weight": torch.empty(2048, 512),
            "encoder.blocks.0.temporal_attention.q_bias": torch.empty(512),
            "encoder.blocks.11.norm0.weight": torch.empty(512),
            "quantize.embedding.weight": torch.empty(1024, 32),
        }
    config = motion_config(state)
    assert (config.dim, config.heads, config.hidden, config.depth) == (512, 8, 2048, 12)
    assert config == type(config)()
    assert motion_config(state, heads=16, size=(36, 20)).heads == 16
    with pytest.raises(CheckpointError, match="720 places, not 20 x 40; give size"):
        motion_config(state, size=(20, 40))


def test_training_goes_on_from_the_published_codes():
    tokenizer, _ = motion_from_state_dict(published(), heads=4)
    codebook = tokenizer.quantizer.codebook
    before = codebook.weight.clone()
    vectors = torch.nn.functional.normalize(before[:64], dim=-1)
    tokenizer.quantizer.train()(vectors)
    used = torch.zeros(len(before), dtype=torch.bool)
    used[tokenizer.quantizer.assign(vectors)] = True
    # no k-means: codes that nothing chose are what they were, those that were chosen have moved a little
    assert torch.equal(codebook.weight[~used], before[~used]) and used.sum() < 65
    moved = torch.nn.functional.cosine_similarity(codebook.weight[used], before[used])
    assert moved.min() > 0.95


def test_what_is_missing_or_strange_is_named():
    state = published()
    with pytest.raises(CheckpointError, match="does not know: surprise"):
        motion_from_state_dict({**state, "surprise": torch.zeros(1)}, heads=4)
    with pytest.raises(CheckpointError, match=r"missing: decoder\.ups\.3\.conv\.bias"):
        motion_from_state_dict({k: v for k, v in state.items() if k != "decoder.up_sample_layers.3.conv.bias"}, heads=4)
    with pytest.raises(CheckpointError, match=r"no motion tokenizer of Video-LaVIT: 'encoder\.temp_pos' is missing"):
        motion_from_state_dict({k: v for k, v in state.items() if k != "encoder.temp_pos"})


def test_statistics_of_training_are_left_out_with_a_word():
    _, report = motion_from_state_dict({**published(), "quantize.cluster_size": torch.zeros(1024)}, heads=4)
    assert list(report.ignored) == ["quantize.cluster_size"]
