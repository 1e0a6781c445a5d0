"""TokenFlow's tokenizers as published (Hub: ByteVisionLab/TokenFlow), as `TokenFlow`: variants B and XL.

tokenflow_clipb_32k_enhanced.pt is B with the enhanced decoder, tokenflow_siglip_32k.pt XL. Sizes come from the tensors, the variant
from the keys of the semantic encoder. The two published codebooks become the two halves of one table, whose rows share the index.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokgen.encoders.clip import HALF, ClipViTConfig
from tokgen.errors import CheckpointError, ConfigError
from tokgen.importers.base import ImportReport, read_state_dict, rename
from tokgen.importers.clip import clip_config, clip_weights
from tokgen.importers.llamagen import VQ_KEYS
from tokgen.pretrained import load_strictly
from tokgen.tokenizers.tokenflow import SCALES_14, SCALES_27, TokenFlow, TokenFlowConfig

TOWER = "encoder_vqkd."
TABLE = "quantizer.quantizer.codebooks.0.weight"
_BLOCK = r"decoder_vqkd\.blocks\.(\d+)"
TOKENFLOW_KEYS = [
    *[rule for rule in VQ_KEYS if not rule[0].startswith("quantize")],  # both pixel networks are LlamaGen's
    (r"quantize\.embedding_(vqkd|vqgan)\.weight", r"codes.\1"),  # joined below
    (r"(en|de)code_task_layer\.(\d)\.(\w+)", r"\1code_task.\2.\3"),
    (r"decoder_vqkd\.cls_token", r"semantic_decoder.class_token"),
    (r"decoder_vqkd\.pos_embed", r"semantic_decoder.positions"),
    (r"decoder_vqkd\.patch_embed\.proj\.(\w+)", r"semantic_decoder.enter.\1"),
    (rf"{_BLOCK}\.(.+)", r"semantic_decoder.blocks.\1.\2"),
    (r"decoder_vqkd\.fc_norm\.(\w+)", r"semantic_decoder.norm.\1"),
]
TOKENFLOW_IGNORED = [
    (r"quantize\.codebook_used", "a first-in-first-out record of recent ids, for a usage figure in training"),
    (r"scaling_layer\.(shift|scale)", "mean and deviation of the encoder's preprocessing, which its configuration has"),
]


def _side(places: int) -> int:
    return round((places - 1) ** 0.5)


def tokenflow_config(
    state: dict[str, Tensor], tower: ClipViTConfig, resolution: int | None = None, scales: tuple[int, ...] | None = None
) -> TokenFlowConfig:
    """The sizes of a published state dict. Raises CheckpointError, in one line, if it is none of TokenFlow's.

    Args:
        tower: of its semantic encoder.
        resolution: of variant B: 256 for interpolated positions; None: the size it was trained for.
        scales: None: the published ones of that grid.
    """
    try:
        levels = 1 + max(int(m[1]) for key in state if (m := re.match(r"encoder\.conv_blocks\.(\d+)\.", key)))
        first = [state[f"encoder.conv_blocks.{i}.res.0.conv2.weight"].shape[0] for i in range(levels)]
        channels = state["encoder.conv_in.weight"].shape[0]
        blocks = {
            part: Counter(
                m[1] for key in state if (m := re.match(rf"{part}\.conv_blocks\.(\d+)\.res\.\d+\.conv1\.weight", key))
            )
            for part in ("encoder", "decoder")
        }
        last = state[f"decoder.conv_blocks.{levels - 1}.res.0.conv2.weight"].shape[0]
        codes, semantic_dim = state["quantize.embedding_vqkd.weight"].shape
        native = _side(state["decoder_vqkd.pos_embed"].shape[1])
        config: dict[str, Any] = {
            "semantic_dim": semantic_dim,
            "pixel_dim": state["quantize.embedding_vqgan.weight"].shape[1],
            "quantizer": {"type": "dual-vq", "codebook_size": codes, "beta": 0.25},
            "channels": channels,
            "channel_mult": tuple(width // channels for width in first),
            "num_res_blocks": blocks["encoder"]["0"],
            "z_channels": state["quant_conv.weight"].shape[1],
            "target_dim": state["decode_task_layer.2.weight"].shape[0],
            "decoder_dim": state["decoder_vqkd.cls_token"].shape[-1],
            "decoder_depth": 1 + max(int(m[1]) for key in state if (m := re.match(rf"{_BLOCK}\.", key))),
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"this is no TokenFlow state dict: {error} is missing") from None
    if last != channels or blocks["decoder"]["0"] != blocks["encoder"]["0"] + 1:  # enhanced
        config |= {"decoder_channels": last, "decoder_res_blocks": blocks["decoder"]["0"] - 1}
    config["position_grid"] = native
    if resolution is not None:
        if not tower.class_token:
            raise ConfigError(
                "a resolution is an option of TokenFlow B; this one is XL, at the size it was trained for"
            )
        tower = dataclasses.replace(tower, image_size=resolution, position_grid=native)
    grid = tower.grid
    if scales is None:
        known = {side: published for published in (SCALES_14, (*SCALES_14, 16), SCALES_27) for side in [published[-1]]}
        if grid not in known:
            raise CheckpointError(f"no published TokenFlow has a grid of {grid} x {grid}; give its scales")
        scales = known[grid]
    side = grid * 2 ** (levels - 1)
    config |= {
        "scales": scales,
        "image_size": tower.image_size,
        "pixel_size": None if side == tower.image_size else side,
    }
    if native == grid:
        config["position_grid"] = None
    return TokenFlowConfig(semantic_encoder={"type": "clip", "config": dataclasses.asdict(tower)}, **config)


def tokenflow_from_state_dict(
    state: dict[str, Tensor],
    resolution: int | None = None,
    where: str = "state dict",
    scales: tuple[int, ...] | None = None,
    vit_heads: int | None = None,
) -> tuple[TokenFlow, ImportReport]:
    """A `TokenFlow` in eval mode with the published weights, and what was mapped and ignored.

    Args:
        resolution, scales: see `tokenflow_config`.
        vit_heads: of the semantic encoder; None: as published.

    Raises:
        CheckpointError: a file of another family, variant L (whose weights were never published), or a key that is missing or unknown.
    """
    tower_state = {key.removeprefix(TOWER): value for key, value in state.items() if key.startswith(TOWER)}
    if not tower_state:
        raise CheckpointError(f"{where} holds no TokenFlow tokenizer: it has no {TOWER}…")
    if any(key.startswith("patch_embed.backbone.") for key in tower_state):
        raise CheckpointError(f"{where} is TokenFlow L (ViTamin), which was not published; B and XL can be imported")
    form = "clip" if "class_embedding" in tower_state else "siglip"
    tower = clip_config(tower_state, form, vit_heads)
    if form == "clip":  # the student sees pixels in [-1, 1]
        tower = dataclasses.replace(tower, mean=HALF, std=HALF)
    config = tokenflow_config(state, tower, resolution, scales)
    ours, of_tower = clip_weights(tower_state, tower, where)
    rest = {key: value for key, value in state.items() if not key.startswith(TOWER)}
    renamed, report = rename(rest, TOKENFLOW_KEYS, TOKENFLOW_IGNORED, where)
    report.mapped |= {f"{TOWER}{key}": f"semantic_encoder.{to}" for key, to in of_tower.mapped.items()}
    report.ignored |= {f"{TOWER}{key}": why for key, why in of_tower.ignored.items()}
    report.mapped = {key: TABLE if to.startswith("codes.") else to for key, to in report.mapped.items()}
    renamed[TABLE] = torch.cat([renamed.pop("codes.vqkd"), renamed.pop("codes.vqgan")], 1)
    renamed |= {f"semantic_encoder.{key}": value for key, value in ours.items()}

    tokenizer = TokenFlow(config)
    own = tokenizer.state_dict()  # a counter of our own has no published counterpart; it starts anew
    fresh = {key: own[key] for key in ("quantizer.step",)}
    load_strictly(tokenizer, {**fresh, **renamed}, where)
    return tokenizer.eval(), report


def load_tokenflow(path: str | Path, resolution: int | None = None) -> tuple[TokenFlow, ImportReport]:
    """Read tokenflow_clipb_32k_enhanced.pt or tokenflow_siglip_32k.pt, or a checkpoint of the released training code.

    Of the containers that these may have, the averaged weights ("ema") are taken, else "model", else "state_dict".

    Args:
        resolution: of variant B: 256 to interpolate its positions, as the release's evaluation at 256 px does.
    """
    state = read_state_dict(path, ("ema", "model", "state_dict"))
    return tokenflow_from_state_dict(state, resolution, str(path))
