"""Two processes on one batch are one process on it."""

from __future__ import annotations

import pytest
import ranks
import tiny
import torch

from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.generators.llama import LlamaGenerator
from tokgen.precompute import tokenize_shards
from tokgen.training.checkpoint import read_checkpoint


@pytest.mark.slow
def test_ddp_equals_one_process(tmp_path):
    """Tokenizer, EMA codebook, delayed discriminator, LeCam, adaptive weight, clipping."""
    ranks.both("autoencoder", tmp_path, tmp_path)
    one, two = (torch.load(tmp_path / f"autoencoder{n}.pt", weights_only=True) for n in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_projector_beside_the_generator_trains_alike_on_ranks(tmp_path):
    """ARRA's projector, copied (DDP) and split (FSDP2), saved and resumed, has the weights of one process."""
    visual, teacher = tiny.tokenizer(), ContrastiveEncoder(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 12, 8, 4))
    for split, count in (("train", 48), ("val", 10)):
        source = tiny.write_images(tmp_path / "images" / split, count, count)
        tokenize_shards(visual, source, tmp_path / "codes" / split, encoder=teacher, progress=False)
    ranks.both("aligned", tmp_path / "codes", tmp_path)
    one, ddp, fsdp = (read_checkpoint(tmp_path / n / "checkpoints" / "last.ckpt") for n in ("one", "ddp", "fsdp"))
    assert any(name.startswith("projector.") for name in one["state_dict"])
    for other in (ddp, fsdp):
        assert one["global_step"] == other["global_step"] == 4
        for name, value in one["state_dict"].items():
            torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-3, atol=1e-5)
    published = [
        LlamaGenerator.from_pretrained(tmp_path / n / "generator").state_dict() for n in ("one", "ddp", "fsdp")
    ]
    assert published[0].keys() == published[1].keys() == published[2].keys()


@pytest.mark.slow
def test_fsdp_equals_one_process(tmp_path):
    """Weights, EMA, the published folder, pictures, and a checkpoint that one process can read and two resume from."""
    visual = tiny.tokenizer()
    visual.eval().save_pretrained(tmp_path / "visual")
    for split in ("train", "val"):
        tiny.write_codes(tmp_path / "codes" / split, 48 if split == "train" else 10, 0, visual.fingerprint)
    ranks.both("generator", tmp_path / "codes", tmp_path)
    one, two = (read_checkpoint(tmp_path / f"generator{n}" / "checkpoints" / "last.ckpt") for n in (1, 2))
    assert one["global_step"] == two["global_step"] == 6
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-3, atol=1e-5)
    pictures = [sorted(p.name for p in (tmp_path / f"generator{n}" / "images").iterdir()) for n in (1, 2)]
    assert pictures[0] == pictures[1] == ["samples-0000003.png", "samples-0000006.png"]
    averages = [c["callbacks"]["EMA"]["average"] for c in (one, two)]
    assert averages[0].keys() == averages[1].keys()
    published = LlamaGenerator.from_pretrained(tmp_path / "generator2" / "generator").state_dict()
    for name, value in averages[0].items():
        torch.testing.assert_close(averages[1][name], value, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(published[name.removeprefix("generator.")], averages[1][name])
