"""EVA-CLIP g/14 towers as published: LAVIS's eva_vit_g.pth (SEED, BLIP-2) and LaVIT's eva_vitg_psz14.bin, as `EvaViT`.

The two have one layout. Sizes come from the tensors, except the heads, which are 88 channels wide in both publications.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tokgen.encoders.eva import EvaConfig, EvaViT
from tokgen.errors import CheckpointError
from tokgen.importers.base import ImportReport, read_state_dict, rename
from tokgen.pretrained import load_strictly

HEAD_WIDTH = 88

EVA_KEYS = [
    (r"cls_token", r"class_token"),
    (r"pos_embed", r"positions"),
    (r"patch_embed\.proj\.(\w+)", r"patch_embed.\1"),
    (r"(blocks\.\d+\.(?:norm[12]|attn|attn\.qkv|attn\.proj|mlp\.fc[12])\.\w+)", r"\1"),
    (r"((?:norm|head)\.\w+)", r"\1"),
]


def eva_config(state: dict[str, Tensor], form: str, heads: int | None = None) -> EvaConfig:
    """The sizes of a published tower.

    Args:
        form: "seed" (the last of the published blocks is left out, the class token kept) or "lavit".
        heads: None: of 88 channels each.

    Raises:
        CheckpointError: no such tower.
    """
    try:
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        places = state["pos_embed"].shape[1] - 1
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))
        state["blocks.0.attn.q_bias"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"this is no EVA-CLIP vision tower: {error} is missing") from None
    side = round(places**0.5)
    config = EvaConfig(side * patch, patch, dim, heads or max(dim // HEAD_WIDTH, 1), hidden, depth)
    if form == "seed":
        return replace(config, depth=depth - (depth == 40))
    embed = state["head.weight"].shape[0] if "head.weight" in state else None
    return replace(config, keep_class_token=False, embed_dim=embed)


def eva_weights(
    state: dict[str, Tensor], config: EvaConfig, where: str = "state dict"
) -> tuple[dict[str, Tensor], ImportReport]:
    """A published state dict under the names of an `EvaViT` of that configuration, positions resampled to its grid."""
    beyond = [rf"blocks\.{i}\..*" for i in range(config.depth, 64)]
    ignore = [(pattern, f"only {config.depth} blocks are used") for pattern in beyond]
    ignore += [(r"rel_pos_bias\..*|.*\.relative_position_index", "absolute positions are used")]
    if config.embed_dim is None:
        ignore += [(r"(norm|fc_norm|head)\..*", "features end before the final norm")]
    renamed, report = rename(state, EVA_KEYS, ignore, where)
    if "positions" in renamed:
        renamed["positions"] = resample_positions(renamed["positions"], config.image_size // config.patch)
    return renamed, report


def resample_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n * n, C), class token first, on a grid of side x side: bicubic, as BLIP-2 does."""
    first, grid = positions[:, :1], positions[:, 1:]
    n = round(grid.shape[1] ** 0.5)
    if n == side:
        return positions
    grid = grid.float().transpose(1, 2).unflatten(2, (n, n))
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2).to(first.dtype)], 1)


def eva_from_state_dict(
    state: dict[str, Tensor], form: str, where: str = "state dict", heads: int | None = None
) -> tuple[EvaViT, ImportReport]:
    """A tower in eval mode, and what was mapped and ignored; see `eva_config`."""
    config = eva_config(state, form, heads)
    renamed, report = eva_weights(state, config, where)
    tower = EvaViT(config)
    load_strictly(tower, renamed, where)
    return tower.eval(), report


def load_eva(path: str | Path, form: str) -> tuple[EvaViT, ImportReport]:
    """Read eva_vit_g.pth (form "seed") or eva_vitg_psz14.bin (form "lavit")."""
    return eva_from_state_dict(read_state_dict(path), form, str(path))
