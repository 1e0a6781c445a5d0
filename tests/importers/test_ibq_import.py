"""IBQ's published files as they are found: Lightning checkpoints with losses and a moving average, and Emu3.5's plain ones."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

import tokgen
from tokgen.cli import main
from tokgen.errors import CheckpointError
from tokgen.importers.ibq import ibq_from_state_dict, load_ibq
from tokgen.tokenizers.vqgan import VQGAN, VQGANConfig

CONFIG = VQGANConfig(32, (1, 2, 2), 2, 24, 16, quantizer={"type": "ibq", "codebook_size": 40})
MID = {"0": "block_1", "1": "attn_1", "2": "block_2"}


def published_name(key: str) -> str:
    """What taming-transformers calls one of our tensors, written down by hand from its modules."""
    last = len(CONFIG.channel_mult) - 1
    key = re.sub(r"^encoder\.levels\.", "encoder.down.", key)
    key = re.sub(r"^decoder\.levels\.(\d)", lambda m: f"decoder.up.{last - int(m[1])}", key)
    key = re.sub(r"^encoder\.downsample\.(\d)", r"encoder.down.\1.downsample.conv", key)
    key = re.sub(r"^decoder\.upsample\.(\d)", lambda m: f"decoder.up.{last - int(m[1])}.upsample.conv", key)
    key = re.sub(r"\.mid\.(\d)", lambda m: f".mid.{MID[m[1]]}", key)
    key = key.replace(".blocks.", ".block.").replace(".attention.", ".attn.").replace(".shortcut.", ".nin_shortcut.")
    key = key.replace(".proj.", ".proj_out.").replace("quantizer.codebook", "quantize.embedding")
    return key.replace("pre_quant.", "quant_conv.").replace("post_quant.", "post_quant_conv.")


def tokenizer(seed: int) -> VQGAN:
    torch.manual_seed(seed)
    return VQGAN(CONFIG).eval()


def plain(model: VQGAN) -> dict[str, torch.Tensor]:
    return {published_name(key): value for key, value in model.state_dict().items()}


def lightning(weights: VQGAN, averages: VQGAN) -> dict:
    """A checkpoint of SEED-Voken's trainer."""
    losses = {
        "loss.discriminator.main.0.weight": torch.randn(4, 3, 4, 4),
        "loss.discriminator.main.3.running_mean": torch.randn(4),
        "loss.perceptual_loss.net.slice1.0.bias": torch.randn(4),
    }
    state = {
        **plain(weights),
        **losses,
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(-1),
    }
    for key, value in {**plain(averages), "loss.discriminator.main.0.weight": torch.randn(4, 3, 4, 4)}.items():
        state["model_ema." + key.replace(".", "")] = value
    return {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {}}], "callbacks": {"EMA": {"n": 1}}}


def outputs(model: VQGAN) -> tuple[torch.Tensor, ...]:
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out = model(pixels)
    return out.tokens.ids, out.reconstruction


def same(one: VQGAN, two: VQGAN) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(two)))


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(lightning(tokenizer(1), tokenizer(2)), tmp_path / "imagenet256_40.ckpt")
    return tmp_path / "imagenet256_40.ckpt"


def test_names_are_all_different_and_level_zero_is_the_finest():
    names = [published_name(key) for key in tokenizer(1).state_dict()]
    assert len(set(names)) == len(names)
    assert plain(tokenizer(1))["decoder.up.0.block.0.conv2.weight"].shape[0] == 32
    assert "decoder.up.2.attn.2.proj_out.weight" in names and "decoder.up.0.upsample.conv.weight" not in names


def test_the_moving_average_is_taken(checkpoint):
    imported, report = load_ibq(checkpoint)
    assert imported.config == CONFIG and not imported.training
    assert same(imported, tokenizer(2)) and not same(imported, tokenizer(1))
    count = len(CONFIG_KEYS := tokenizer(1).state_dict())
    assert len(report.mapped) == count and set(report.mapped.values()) == set(CONFIG_KEYS)
    assert all(key.startswith("model_ema.") for key in report.mapped)
    reasons = Counter(report.ignored.values())
    assert reasons["its moving average is taken"] == count and len(report.ignored) == count + 3 + 2 + 1


def test_the_weights_themselves_on_demand(checkpoint):
    imported, report = load_ibq(checkpoint, ema=False)
    assert same(imported, tokenizer(1))
    assert not any(key.startswith("model_ema.") for key in report.mapped)


def test_emu3_5_has_plain_keys(tmp_path):
    torch.save({k: v.bfloat16() for k, v in plain(tokenizer(1)).items()}, tmp_path / "model.ckpt")
    imported, report = load_ibq(tmp_path / "model.ckpt")
    assert same(imported, tokenizer(1).bfloat16().float()) and not report.ignored
    normalised, _ = load_ibq(tmp_path / "model.ckpt", l2_normalize=True)
    assert normalised.config.quantizer["metric"] == "cosine"
    norms = normalised.quantizer.lookup(torch.arange(40)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(40))


def test_convert_writes_a_model_folder(checkpoint, tmp_path, capsys):
    for words, seed in (([], 2), (["--ema", "false"], 1)):
        assert main(["convert", "ibq", str(checkpoint), "--out", str(tmp_path / "out"), *words]) == 0
        assert "tensors mapped" in capsys.readouterr().out
        assert same(tokgen.load(tmp_path / "out"), tokenizer(seed))


def test_what_does_not_fit_is_refused(checkpoint, tmp_path):
    state = lightning(tokenizer(1), tokenizer(2))["state_dict"]
    for key in ("encoder.down.0.extra.weight", "model_ema.encoderextraweight", "teacher.weight"):
        with pytest.raises(CheckpointError, match=key):
            ibq_from_state_dict({**state, key: torch.zeros(1)}, ema=None if "ema" in key else False)
    with pytest.raises(
        CheckpointError, match=r"moving average of 1 of its \d+ weights.*encoder\.conv_in\.bias.*ema=False"
    ):
        ibq_from_state_dict({k: v for k, v in state.items() if k != "model_ema.encoderconv_inbias"})
    with pytest.raises(CheckpointError, match="no moving average"):
        ibq_from_state_dict(plain(tokenizer(1)), ema=True)
    with pytest.raises(CheckpointError, match=r"missing: decoder\.conv_out\.bias"):
        ibq_from_state_dict({k: v for k, v in plain(tokenizer(1)).items() if k != "decoder.conv_out.bias"})
    with pytest.raises(CheckpointError, match="not an IBQ state dict"):
        ibq_from_state_dict({"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)})


def test_objects_beside_the_weights_are_not_unpickled(tmp_path):
    torch.save({**lightning(tokenizer(1), tokenizer(2)), "hyper_parameters": CONFIG}, tmp_path / "odd.ckpt")
    with pytest.raises(
        CheckpointError, match=r"odd\.ckpt cannot be read as plain weights.*VQGANConfig.*save its tensors alone"
    ):
        load_ibq(tmp_path / "odd.ckpt")
