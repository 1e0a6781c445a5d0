"""Emu3's tokenizer against transformers' `Emu3VQVAE`, with weights of either published layout."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tokgen
from tokgen.cli import main
from tokgen.errors import CheckpointError
from tokgen.importers.emu3 import emu3_from_state_dict, load_emu3
from tokgen.tokenizers.emu3 import Emu3, Emu3Config

SIZES = {
    "published": {"channel_multiplier": [1, 2, 2, 3], "num_res_blocks": 2, "attn_resolutions": [3], "hidden_size": 96},
    "small": {"channel_multiplier": [2, 1], "num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 32, "embed_dim": 6,
              "latent_channels": 6, "temporal_downsample_factor": 2},
    "pictures": {"channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": [0], "hidden_size": 32,
                 "temporal_downsample_factor": 1},
}  # fmt: skip


def vq_config(name: str) -> dict:
    return {"codebook_size": 96, "base_channels": 32, "channel_multiplier": [1, 2, 2, 3], **SIZES[name]}


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Statistics and norms as after training, biases that are not 0."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm3d):
            m.running_mean.normal_(std=0.5)
            m.running_var.uniform_(0.5, 2)
        if isinstance(m, nn.BatchNorm3d | nn.GroupNorm):
            m.weight.normal_(1, 0.2)
            m.bias.normal_(0, 0.2)
    return model.eval()


def theirs(name: str = "published") -> nn.Module:
    emu3 = pytest.importorskip("transformers.models.emu3")
    torch.manual_seed(0)
    return stir(emu3.Emu3VQVAE(emu3.Emu3VQVAEConfig(**vq_config(name))))


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The release's layout of transformers' state dict: other names, and attention projects by 1 x 1 convolutions."""
    out = {}
    for key, value in state.items():
        key = key.replace("down_block.down", "down").replace("up_block.up", "up")
        key = key.replace("middle_block.attn_norm", "mid.attn_1.norm").replace("middle_block", "mid")
        key = re.sub(r"attn_norms\.(\d)", r"attn.\1.norm", key)
        if "_proj" in key:
            key = key.replace("out_proj", "proj_out").replace("_proj.", ".")
            value = value[..., None, None] if value.ndim == 2 else value
        out[key] = value
    return out


@torch.no_grad()
@pytest.mark.parametrize("ndim", [4, 5])
@pytest.mark.parametrize("name", SIZES)
def test_codes_and_pixels_are_those_of_transformers(name, ndim):
    model = theirs(name)
    tokenizer, report = emu3_from_state_dict(model.state_dict())
    assert set(report.mapped) == set(model.state_dict()) and not report.ignored
    assert sum(p.numel() for p in tokenizer.parameters()) == sum(p.numel() for p in model.parameters())
    for wide in (False, True):
        pixels = tokenizer.example_pixels(2, wide=wide, ndim=ndim)
        # transformers crops padding by the first two axes of the codes, which are time and height of a clip: never here
        sizes = torch.full((2, 2), 1000)
        ids = torch.stack(model.encode(pixels * 2 - 1, image_sizes=sizes).image_tokens)
        tokens = tokenizer.encode(pixels)
        assert tuple(ids.shape[1:]) == tokens.layout.shape and ids.unique().numel() > 6
        assert torch.equal(tokens.ids, ids.flatten(1))
        other = torch.randint(0, 96, ids.shape)
        for codes in (ids, other):
            decoded = model.decode(codes)
            got = tokenizer.detokenize(tokgen.Tokens(codes.flatten(1), tokens.layout, (96,))) * 2 - 1
            assert got.shape == pixels.shape == decoded.shape
            assert (got - decoded).abs().max() <= 1e-5 * decoded.abs().max().clamp(min=1)


def test_both_layouts_are_the_same_model(tmp_path):
    state = theirs().state_dict()
    save_file(official(state), tmp_path / "model.safetensors")
    torch.save(official(state), tmp_path / "model.bin")
    expected, _ = emu3_from_state_dict(state)
    for path in (tmp_path / "model.safetensors", tmp_path / "model.bin", tmp_path):
        tokenizer, report = load_emu3(path)
        assert tokenizer.fingerprint == expected.fingerprint
        assert set(report.mapped) == set(official(state)) and set(report.mapped.values()) == set(tokenizer.state_dict())
    assert "decoder.up.3.attn.0.norm.conv_y.weight" in report.mapped  # lowest resolution: last there, first here
    assert report.mapped["decoder.up.3.attn.0.norm.conv_y.weight"] == "decoder.levels.0.attention.0.norm.scale.weight"
    assert tokenizer.config == Emu3Config(
        32, (1, 2, 2, 3), quantizer={**Emu3Config().quantizer, "codebook_size": 96}
    )  # temporal factor, blocks and code width are read off the tensors


def whole_model(folder, **sharding):
    """A random Emu3 of transformers, language model included, saved in `folder`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    words = {"<image>": 3, "<|extra_200|>": 4, **{f"<|visual token {i:06d}|>": 10 + i for i in range(96)}}
    config = transformers.Emu3Config(vq_config=vq_config("small"), text_config=text, vocabulary_map=words)
    model = transformers.Emu3ForConditionalGeneration(config)
    stir(model.model.vqmodel)
    model.save_pretrained(folder, **sharding)
    return model


def test_the_tokenizer_is_found_inside_a_whole_model(tmp_path):
    model = whole_model(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected, _ = emu3_from_state_dict(model.model.vqmodel.state_dict())
    tokenizer, report = load_emu3(tmp_path)
    assert tokenizer.fingerprint == expected.fingerprint
    assert all("vqmodel." in key for key in report.mapped) and len(report.mapped) == len(tokenizer.state_dict())
    assert report.ignored and set(report.ignored.values()) == {"of the language model"}
    # as the class names its modules, and as older files have them
    for prefix in ("model.vqmodel.", "vqmodel."):
        state = {f"{prefix}{key}": value for key, value in model.model.vqmodel.state_dict().items()}
        again, report = emu3_from_state_dict({**state, "lm_head.weight": torch.zeros(1)})
        assert again.fingerprint == expected.fingerprint and set(report.ignored) == {"lm_head.weight"}


def test_convert_writes_a_model_folder(tmp_path, capsys):
    model = whole_model(tmp_path / "emu3")
    code, printed = (
        main(["convert", "emu3", str(tmp_path / "emu3"), "--out", str(tmp_path / "out")]),
        capsys.readouterr(),
    )
    assert code == 0 and "tensors mapped" in printed.out, printed.err
    tokenizer = tokgen.load(tmp_path / "out")
    assert isinstance(tokenizer, Emu3)
    assert tokenizer.fingerprint == emu3_from_state_dict(model.model.vqmodel.state_dict())[0].fingerprint


def small_state() -> dict[str, torch.Tensor]:
    """A state dict of the release's layout, without transformers."""
    tokenizer = Emu3(Emu3Config(32, (1,), 1, quantizer={"type": "vq", "codebook_size": 8}))
    names = {"levels.0.blocks": "down.0.block", "levels.0.attention": "down.0.attn"}
    names |= {"mid.0": "mid.block_1", "mid.1": "mid.attn_1", "mid.2": "mid.block_2", ".proj.": ".proj_out."}
    out = {}
    for key, value in tokenizer.state_dict().items():
        if key.startswith("decoder"):
            key = re.sub(r"(norm\w*)\.norm\.", r"\1.norm_layer.", key).replace(".scale.", ".conv_y.")
            key = key.replace(".shift.", ".conv_b.").replace("levels.0.blocks", "up.0.block")
            key = key.replace("levels.0.attention", "up.0.attn")
        for ours, published in names.items():
            key = key.replace(ours, published)
        key = re.sub(r"temporal_(\w+)\.blocks\.0\.(conv\d)", r"\1.time_res_stack.0.\2.conv", key)
        key = re.sub(r"temporal_(\w+)\.blocks\.0", r"\1.time_res_stack.0", key)
        key = re.sub(r"temporal_(\w+)\.(?:down|up)sample\.(\d)", r"\1.time_conv.\2.conv.conv", key)
        key = key.replace("quantizer.codebook", "quantize.embedding")
        key = key.replace("pre_quant", "quant_conv.conv").replace("post_quant", "post_quant_conv.conv")
        out[key] = value
    return out


def test_what_is_missing_or_strange_is_named_in_one_line(tmp_path):
    state = small_state()
    assert len(emu3_from_state_dict(state)[1].mapped) == len(state)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.safetensors").write_bytes(b"\x08" + bytes(30))
    without = {k: v for k, v in state.items() if k != "decoder.time_conv.1.conv.conv.bias"}
    misshapen = {**state, "decoder.conv_out.weight": torch.zeros(4, 32, 3, 3)}
    cases = [
        (
            lambda: emu3_from_state_dict({**state, "wte.weight": torch.zeros(1)}, "x"),
            "x: keys that .* know: wte.weight",
        ),
        (lambda: emu3_from_state_dict(without, "x"), r"missing: temporal_decoder\.upsample\.1\.bias"),
        (lambda: emu3_from_state_dict(misshapen), r"wrong shape: decoder\.conv_out\.weight \(4, 32, 3, 3\)"),
        (lambda: emu3_from_state_dict({"a": torch.zeros(1)}), "no vision tokenizer of Emu3: 'encoder.conv_in.weight'"),
        (lambda: load_emu3(tmp_path / "none.safetensors"), "no checkpoint file at"),
        (lambda: load_emu3(tmp_path / "empty"), "has neither model.safetensors nor"),
        (lambda: load_emu3(tmp_path / "damaged.safetensors"), "damaged"),
    ]
    for mistake, message in cases:
        with pytest.raises(CheckpointError, match=message) as error:
            mistake()
        assert "\n" not in str(error.value)
