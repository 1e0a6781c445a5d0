"""The vision towers of SEED and LaVIT: features of the published code."""

from __future__ import annotations

import pytest
import reference
import torch

from tokgen.encoders.eva import EvaConfig, EvaViT
from tokgen.errors import CheckpointError
from tokgen.importers.eva import eva_from_state_dict, resample_positions

CASES = r"eva_vit(_lavit)?_small.*"


@torch.no_grad()
def test_numbers_are_the_published_ones(parity_case, close):
    case, expected = parity_case
    state = reference.state_dict(case)
    lavit = "lavit" in case["name"]
    published = {k.removeprefix("visual_encoder."): v for k, v in state.items() if not k.startswith("ln_vision")}
    config = case["config"]
    heads = config["vision_cfg"]["width"] // config["vision_cfg"]["head_width"] if lavit else config["vit"]["num_heads"]
    tower, report = eva_from_state_dict(published, "lavit" if lavit else "seed", heads=heads)
    assert set(report.mapped) | set(report.ignored) == set(published)

    image = reference.inputs(case)["image"]  # already normalised
    tokens = tower(image)
    close(case, expected, "tokens", tokens)
    pixels = (image * tower.std + tower.mean).clamp(0, 1)
    wanted = tower((pixels - tower.mean) / tower.std)
    assert torch.allclose(tower.features(pixels), wanted[:, 1:] if lavit else wanted, atol=1e-4)
    if lavit:
        close(case, expected, "patch_tokens", tokens[:, 1:])
        close(case, expected, "normed_cls", tower.norm(tokens[:, 0]))
        close(case, expected, "head", tower.head(tower.norm(tokens[:, 0])))
        return
    norm = torch.nn.LayerNorm(tokens.shape[-1], eps=config["ln_vision_eps"])
    norm.load_state_dict({k.removeprefix("ln_vision."): v for k, v in state.items() if k.startswith("ln_vision.")})
    close(case, expected, "tokens_ln_vision", norm(tokens))
    x = tower.patch_embed(image).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_token.expand(len(x), -1, -1), x], 1) + tower.positions
    close(case, expected, "block_1", tower.blocks[0](x))
    close(case, expected, "pos_embed_interpolated", resample_positions(published["pos_embed"], config["interp_grid"]))


@pytest.mark.parametrize(
    "config, parameters, keys",
    [(EvaConfig.seed(), 985_894_528, 511), (EvaConfig.lavit(), 1_012_588_928, 528)],
    ids=["SEED", "LaVIT"],
)
def test_paper_size_has_the_published_parameter_and_key_count(config, parameters, keys):
    with torch.device("meta"):
        tower = EvaViT(config)
    assert sum(p.numel() for p in tower.parameters()) == parameters
    assert len(tower.state_dict()) == keys
    assert tower.feature_shape == ((257, 1408) if config.keep_class_token else (256, 1408))


def test_the_file_of_another_family_is_refused_in_one_line():
    with pytest.raises(CheckpointError, match="no EVA-CLIP vision tower") as error:
        eva_from_state_dict({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, "seed")
    assert "\n" not in str(error.value)
