"""What is particular to the VQGAN tokenizer: sizes, folding, inputs, and the folder it is published in."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import tokgen
from tokgen.errors import CheckpointError, ConfigError, InputError, TokenizerMismatch
from tokgen.importers.llamagen import load_vq
from tokgen.tokenizers.vqgan import VQGAN, VQGANConfig


def tiny(**changes):
    options = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 32, "code_dim": 4}
    torch.manual_seed(0)
    return VQGAN(VQGANConfig(**{**options, "quantizer": {"type": "vq", "codebook_size": 32}, **changes})).eval()


@pytest.mark.parametrize("mult, patch, factor", [((1,), 8, 8), ((1, 2), 1, 2), ((1, 1, 2), 2, 8)])
def test_factor_is_patch_times_levels(mult, patch, factor):
    tokenizer = tiny(channel_mult=mult, patch=patch)
    tokens = tokenizer.encode(torch.rand(2, 3, 2 * factor, 3 * factor))
    assert tokenizer.factor == factor
    assert tokens.layout == tokgen.Grid(2, 3) and tokens.ids.shape == (2, 6)


def test_uint8_pil_and_float_inputs_give_the_same_ids():
    tokenizer = tiny()
    pixels = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    ids = [tokenizer.encode(x).ids for x in (pixels, pixels / 255, pictures)]
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])
    assert torch.equal(tokenizer.encode(pictures[1]).ids, ids[0][1:])


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.rand(3, 8, 8), r"add a dimension with x\[None\]"),
        (torch.rand(1, 8, 8, 3), "channels before height and width"),
        (torch.rand(1, 3, 9, 8), "multiples of 2, for example 8 x 8"),
        (torch.rand(1, 3, 8, 8) * 255, "expected \\[0, 1\\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int32), "expected uint8"),
        ("cat.png", "expected a tensor, a PIL image"),
    ],
)
def test_bad_pixels_get_one_clear_error(pixels, message):
    with pytest.raises(InputError, match=message):
        tiny().encode(pixels)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"channels": 30}, "multiple of 32"),
        ({"quantizer": {"type": "vqq"}}, "unknown quantizer 'vqq'; expected one of"),
        ({"quantizer": {"type": "vq", "size": 3}}, "no option 'size'; expected"),
        ({"quantizer": {}}, "names no type"),
        ({"patch": 0}, "patch is 0"),
    ],
)
def test_bad_configurations_get_one_clear_error(change, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**change)


def test_published_folder_loads_again(tmp_path):
    tokenizer = tiny()
    tokenizer.save_pretrained(tmp_path)
    again = tokgen.load(tmp_path)
    assert again.config == tokenizer.config and again.fingerprint == tokenizer.fingerprint
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(again.decode(again.encode(pixels)), tokenizer.decode(tokenizer.encode(pixels)))


def test_tokens_of_another_tokenizer_are_refused():
    tokenizer, other = tiny(), tiny()
    with torch.no_grad():
        other.post_quant.weight.add_(1)
    tokens = tokenizer.encode(torch.rand(1, 3, 8, 8))
    with pytest.raises(TokenizerMismatch, match="made by tokenizer"):
        other.decode(tokens)
    assert other.decode(tokens, check=False).shape == (1, 3, 8, 8)


def test_fingerprint_follows_every_weight():
    tokenizer = tiny()
    before = tokenizer.fingerprint
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias[0] += 1e-6
    assert tokenizer.fingerprint != before


def test_damaged_folders_get_one_clear_error(tmp_path):
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        tokgen.load(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        tokgen.load(tmp_path)
    (tmp_path / "config.json").write_text('{"type": "vqgan", "config": {"chanels": 3}}')
    with pytest.raises(ConfigError, match="unknown key 'chanels'"):
        tokgen.load(tmp_path)
    (tmp_path / "config.json").write_text('{"type": "gan"}')
    with pytest.raises(CheckpointError, match="of type 'gan'"):
        tokgen.load(tmp_path)
    with pytest.raises(CheckpointError, match="no model folder at"):
        tokgen.load(tmp_path / "nowhere")


def test_importer_names_keys_it_does_not_know(tmp_path):
    torch.save(
        {"model": {"encoder.conv_in.weight": torch.zeros(1), "transformer.wte": torch.zeros(1)}}, tmp_path / "x.pt"
    )
    with pytest.raises(CheckpointError, match=r"does not know: transformer\.wte"):
        load_vq(tmp_path / "x.pt")


def test_importer_does_not_unpickle(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    with open(tmp_path / "x.pt", "wb") as file:
        pickle.dump({"model": Trap()}, file)
    with pytest.raises(CheckpointError, match="cannot be read as plain weights"):
        load_vq(tmp_path / "x.pt")
    assert not (tmp_path / "sprung").exists()
