"""TokenFlow's files as they are found: containers, the enhanced decoder, XL under both of transformers' namings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

import tokgen
from tokgen.cli import main
from tokgen.errors import CheckpointError, ConfigError
from tokgen.importers.tokenflow import TABLE, load_tokenflow, tokenflow_from_state_dict
from tokgen.tokenizers.tokenflow import TokenFlow, TokenFlowConfig

PARITY = Path(__file__).parent.parent / "parity"
sys.path.insert(0, str(PARITY))

import reference  # noqa: E402


def published(name: str = "tokenflow_b_small") -> dict[str, torch.Tensor]:
    return reference.state_dict(reference.load(PARITY / f"cases/{name}.json")[0])


def foreign(model: TokenFlow) -> dict[str, torch.Tensor]:
    """The published names of a model of ours, except the semantic encoder's, written by hand."""
    out = {}
    for key, value in model.state_dict().items():
        if key.startswith("semantic_encoder.") or key == "quantizer.step":
            continue
        if key == TABLE:
            out["quantize.embedding_vqkd.weight"], out["quantize.embedding_vqgan.weight"] = value.split((32, 8), 1)
            continue
        part, _, rest = key.partition(".")
        if part in ("encoder", "decoder"):
            rest = rest.replace("levels.", "conv_blocks.").replace(".blocks.", ".res.").replace(".attention.", ".attn.")
            rest = rest.replace(".shortcut.", ".nin_shortcut.").replace(".proj.", ".proj_out.")
            for way in ("upsample", "downsample"):
                if rest.startswith(f"{way}."):
                    _, level, kind = rest.split(".")
                    rest = f"conv_blocks.{level}.{way}.conv.{kind}"
        elif part == "semantic_decoder":
            rest = (
                rest.replace("class_token", "cls_token")
                .replace("positions", "pos_embed")
                .replace("enter.", "patch_embed.proj.")
            )
            rest = rest.replace("norm.", "fc_norm.") if rest.startswith("norm.") else rest
        names = {"pre_quant": "quant_conv", "post_quant": "post_quant_conv", "semantic_decoder": "decoder_vqkd"}
        names |= {"encode_task": "encode_task_layer", "decode_task": "decode_task_layer"}
        out[f"{names.get(part, part)}.{rest}"] = value
    return out | {"quantize.codebook_used": torch.zeros(131072)}


def siglip(grid: int = 4):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 144, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=14 * grid, patch_size=14)).eval()


def small_xl(tower, **changes) -> tuple[TokenFlow, dict[str, torch.Tensor]]:
    """A small XL of random weights, and its published state dict with transformers' own tower in it."""
    sizes = {"image_size": 56, "patch": 14, "dim": 144, "heads": 2, "hidden": 200, "depth": 2}
    vit = {**TokenFlowConfig.siglip().semantic_encoder["config"], **sizes}
    small = {"image_size": 56, "pixel_size": 64, "scales": (1, 2, 4), "channels": 32, "z_channels": 32}
    small |= {"num_res_blocks": 1, "decoder_dim": 144, "target_dim": 144}
    small["quantizer"] = {"type": "dual-vq", "codebook_size": 100, "beta": 0.25}
    model = TokenFlow(
        TokenFlowConfig.siglip(**{**small, "semantic_encoder": {"type": "clip", "config": vit}, **changes})
    )
    scaling = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    return model, {**foreign(model), **scaling, **{f"encoder_vqkd.{k}": v for k, v in tower.state_dict().items()}}


@pytest.mark.parametrize("container", ["ema", "model", "state_dict", None])
def test_files_make_a_tokenizer_that_can_be_published(tmp_path, container):
    state = published()
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    files = {"ema": {"model": other, "ema": state}, "model": {"model": state}, "state_dict": {"state_dict": state}}
    data = state if container is None else {**files[container], "steps": 7, "args": argparse.Namespace(lr=1e-4)}
    torch.save(data, tmp_path / "tokenflow.pt")
    if container == "ema":
        main(
            [
                "convert",
                "tokenflow",
                str(tmp_path / "tokenflow.pt"),
                "--out",
                str(tmp_path / "model"),
                "--resolution",
                "256",
            ]
        )
        model = tokgen.load(tmp_path / "model")
        assert model.config.image_size == 256 and model.config.scales[-1] == 16 and model.config.position_grid == 14
    else:
        model, report = load_tokenflow(tmp_path / "tokenflow.pt")
        assert set(report.mapped) | set(report.ignored) == set(state)
        assert "usage figure" in report.ignored["quantize.codebook_used"]
    assert torch.equal(model.encoder.conv_in.weight, state["encoder.conv_in.weight"])
    both = [state[f"quantize.embedding_{name}.weight"] for name in ("vqkd", "vqgan")]
    assert torch.equal(model.state_dict()[TABLE], torch.cat(both, 1))


@pytest.mark.parametrize("level", ["", "vision_model."])
@torch.no_grad()
def test_xl_imports_under_both_names_of_its_tower(level):
    torch.manual_seed(0)
    tower = siglip()
    model, state = small_xl(tower)
    prefix = "encoder_vqkd."
    state = {
        prefix + level + key.removeprefix(prefix).removeprefix("vision_model.")
        if key.startswith(prefix)
        else key: value
        for key, value in state.items()
    }
    got, report = tokenflow_from_state_dict(state, scales=(1, 2, 4))
    assert set(report.mapped) | set(report.ignored) == set(state)
    assert got.config == model.config
    x = torch.rand(2, 3, 56, 56)
    hidden = tower(pixel_values=x * 2 - 1, output_hidden_states=True).hidden_states[-2]
    expected = got.encode_task(hidden).unflatten(1, (4, 4))
    torch.testing.assert_close(got.encode_features(x)[..., :32], expected, rtol=1e-4, atol=1e-5)
    # all but the tower is the model's own
    ours = {key: value for key, value in model.state_dict().items() if not key.startswith("semantic_encoder.")}
    assert all(torch.equal(got.state_dict()[key], value) for key, value in ours.items())


def test_the_enhanced_decoder_is_known_by_its_tensors():
    model, state = small_xl(siglip(), decoder_channels=64, decoder_res_blocks=2)
    got, _ = tokenflow_from_state_dict(state, scales=(1, 2, 4))
    assert (got.config.decoder_channels, got.config.decoder_res_blocks, got.config.num_res_blocks) == (64, 2, 1)
    assert torch.equal(got.decoder.conv_in.weight, model.decoder.conv_in.weight)


@pytest.mark.parametrize(
    "config, keys",
    [(TokenFlowConfig(), 549), (TokenFlowConfig.clipb(enhanced=True), 649), (TokenFlowConfig.siglip(), 848)],
    ids=["B", "B enhanced", "XL"],
)
def test_published_files_have_as_many_keys(config, keys):
    """Counted on the published modules; ours differ by what is written here."""
    with torch.device("meta"):
        model = TokenFlow(config)
    own = len(foreign(model)) + sum(key.startswith("semantic_encoder.") for key in model.state_dict())
    if config.image_size == 384:
        own += 26 * 4  # queries, keys and values apart
        own += 16 + 2 + 11 + 2  # the last block, the final norm, the pooling, the scaling layer
    assert own == keys


def test_what_does_not_fit_is_named():
    state = published()
    with pytest.raises(CheckpointError, match="does not know: something"):
        tokenflow_from_state_dict({**state, "something": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="holds no TokenFlow tokenizer"):
        tokenflow_from_state_dict({"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="was not published"):
        tokenflow_from_state_dict({"encoder_vqkd.patch_embed.backbone.stem.conv1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no TokenFlow state dict: 'quant_conv\.weight' is missing"):
        tokenflow_from_state_dict({key: value for key, value in state.items() if key != "quant_conv.weight"})
    with pytest.raises(CheckpointError, match=r"missing: pre_quant\.bias"):
        tokenflow_from_state_dict({key: value for key, value in state.items() if key != "quant_conv.bias"})


def test_what_the_variants_do_not_have_is_named():
    _, state = small_xl(siglip())
    with pytest.raises(CheckpointError, match="grid of 4 x 4; give its scales"):
        tokenflow_from_state_dict(state)
    with pytest.raises(ConfigError, match="option of TokenFlow B"):
        tokenflow_from_state_dict(state, resolution=256)
