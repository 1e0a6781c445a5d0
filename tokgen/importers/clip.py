"""Vision towers of CLIP and SigLIP as published, as `ClipViT`: OpenAI's layout, and that of transformers.

transformers 5 writes SigLIP's and CLIP's vision towers without the level `vision_model.` that older versions have; both are read.
Sizes come from the tensors, except the heads: 64 channels wide in CLIP, 16 in SigLIP's SO400M.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tokgen.encoders.clip import HALF, ClipViT, ClipViTConfig
from tokgen.errors import CheckpointError
from tokgen.importers.base import ImportReport, read_state_dict, rename
from tokgen.pretrained import load_strictly

HEAD_WIDTHS = {"clip": 64, "siglip": 72}
_BLOCK = r"transformer\.resblocks\.(\d+)"
OPENAI_KEYS = [
    (r"class_embedding", r"class_token"),
    (r"positional_embedding", r"positions"),
    (r"conv1\.weight", r"patch_embed.weight"),
    (r"ln_pre\.(\w+)", r"norm_pre.\1"),
    (r"ln_post\.(\w+)", r"norm.\1"),
    (rf"{_BLOCK}\.ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (rf"{_BLOCK}\.attn\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
    (rf"{_BLOCK}\.attn\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}\.mlp\.c_fc\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_BLOCK}\.mlp\.c_proj\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"proj", r"projection.weight"),
]
_TOP, _LAYER = r"(?:vision_model\.)?", r"(?:vision_model\.)?encoder\.layers\.(\d+)"
TRANSFORMERS_KEYS = [
    (rf"{_TOP}embeddings\.class_embedding", r"class_token"),
    (rf"{_TOP}embeddings\.position_embedding\.weight", r"positions"),
    (rf"{_TOP}embeddings\.patch_embedding\.(\w+)", r"patch_embed.\1"),
    (rf"{_TOP}pre_layrnorm\.(\w+)", r"norm_pre.\1"),  # spelt so
    (rf"{_TOP}post_layernorm\.(\w+)", r"norm.\1"),
    (rf"{_LAYER}\.layer_norm([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (rf"{_LAYER}\.self_attn\.([qkv])_proj\.(\w+)", r"blocks.\1.attn.\2.\3"),  # joined below
    (rf"{_LAYER}\.self_attn\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (rf"{_LAYER}\.mlp\.(fc[12])\.(\w+)", r"blocks.\1.mlp.\2.\3"),
    (r"visual_projection\.weight", r"projection.weight"),
]
_NOT_VISION = [
    (r"(?:text_model|text_projection|token_embedding|ln_final)\b.*|(?:logit_scale|logit_bias)", "of the text tower"),
    (r".*\.position_ids", "numbers 0, 1, 2, …"),
]


def clip_config(state: dict[str, Tensor], form: str, heads: int | None = None) -> ClipViTConfig:
    """The sizes of a vision tower in OpenAI's or transformers' layout.

    Args:
        form: "clip": all blocks, the final norm, and the projection if there is one. "siglip": without the last block, the final norm
            and the pooling, whose states are `hidden_states[-2]`.
        heads: None: of 64 channels (CLIP), 72 (SigLIP) each.

    Raises:
        CheckpointError: no such tower.
    """
    state = {key.removeprefix("vision_model."): value for key, value in state.items()}
    openai = "conv1.weight" in state
    try:
        patches = state["conv1.weight" if openai else "embeddings.patch_embedding.weight"]
        places = state["positional_embedding" if openai else "embeddings.position_embedding.weight"].shape[0]
        layer = "transformer.resblocks" if openai else "encoder.layers"
        hidden = state[f"{layer}.0.mlp.{'c_fc' if openai else 'fc1'}.weight"].shape[0]
        depth = 1 + max(int(m[1]) for key in state if (m := re.match(rf"{re.escape(layer)}\.(\d+)\.", key)))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"this is no CLIP or SigLIP vision tower: {error} is missing") from None
    dim, patch = patches.shape[0], patches.shape[-1]
    class_token = "class_embedding" in state or "embeddings.class_embedding" in state
    side = round((places - class_token) ** 0.5)
    projection = state.get("proj", state.get("visual_projection.weight"))
    sizes = {"image_size": side * patch, "patch": patch, "dim": dim, "hidden": hidden, "depth": depth}
    sizes["heads"] = heads or max(dim // HEAD_WIDTHS[form], 1)
    if form == "clip":
        embed = None if projection is None else projection.shape[1 if openai else 0]
        return ClipViTConfig(**sizes, embed_dim=embed, class_token=class_token)
    sizes["image_size"] = 384 if (side, patch) == (27, 14) else side * patch  # 27 * 14 = 378, and 6 pixels unseen
    return replace(ClipViTConfig.siglip(), **{**sizes, "depth": depth - 1})


def clip_weights(
    state: dict[str, Tensor], config: ClipViTConfig, where: str = "state dict"
) -> tuple[dict[str, Tensor], ImportReport]:
    """A vision tower under the names of a `ClipViT` of that configuration."""
    layer = r"(?:transformer\.resblocks|(?:vision_model\.)?encoder\.layers)"
    ignore = [(rf"{layer}\.{config.depth}\..*", "features are the states before the last block")]
    if not config.post_norm:
        ignore += [(rf"{_TOP}(?:post_layernorm|head)\..*", "features end before the final norm and the pooling")]
    if config.embed_dim is None:
        ignore += [(r"proj|visual_projection\.weight", "features are not projected")]
    table = OPENAI_KEYS if "conv1.weight" in state else TRANSFORMERS_KEYS
    renamed, report = rename(state, table, [*ignore, *_NOT_VISION], where)
    for i in range(config.depth):
        for kind in ("weight", "bias"):
            names = [f"blocks.{i}.attn.{part}.{kind}" for part in "qkv"]
            if all(name in renamed for name in names):
                renamed[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([renamed.pop(name) for name in names])
    report.mapped = {k: re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", to) for k, to in report.mapped.items()}
    if "proj" in report.mapped:
        renamed["projection.weight"] = renamed["projection.weight"].T.contiguous()
    return renamed, report


def clip_from_state_dict(
    state: dict[str, Tensor], form: str, where: str = "state dict", heads: int | None = None
) -> tuple[ClipViT, ImportReport]:
    """A vision tower in eval mode, and what was mapped and ignored.

    Args:
        form: "clip" or "siglip", see `clip_config`; "tokenflow" is CLIP as TokenFlow's encoder begins: not projected, and on pixels
            in [-1, 1].
    """
    if "visual.conv1.weight" in state:  # OpenAI's file of both towers
        rest = {key: value for key, value in state.items() if not key.startswith("visual.")}
        if not {"token_embedding.weight", "text_projection"} & rest.keys():
            raise CheckpointError(f"{where} has a visual tower, and beside it no text tower of CLIP")
        state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    config = clip_config(state, "siglip" if form == "siglip" else "clip", heads)
    if form == "tokenflow":
        config = replace(config, embed_dim=None, mean=HALF, std=HALF)
    renamed, report = clip_weights(state, config, where)
    tower = ClipViT(config)
    load_strictly(tower, {key: value.float() for key, value in renamed.items()}, where)
    return tower.eval(), report


def load_clip(path: str | Path, form: str, heads: int | None = None) -> tuple[ClipViT, ImportReport]:
    """Read a file of weights: model.safetensors or pytorch_model.bin of openai/clip-vit-base-patch16,
    google/siglip-so400m-patch14-384 and their kin; see `clip_from_state_dict`."""
    return clip_from_state_dict(read_state_dict(path), form, str(path), heads)
