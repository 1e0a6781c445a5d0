"""TrajViT's encoder as published (RAIVNLab/trajvit), as `TrajViT`: alone, or inside the checkpoint of the whole contrastive model.

Sizes come from the tensors; the side of the frames does not show in them. What the release computes from its weights is what its
checkpoints were trained with, so that all of the `legacy_` switches are on, see `tokgen.encoders.trajvit`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tokgen.encoders.trajvit import TrajViT, TrajViTConfig
from tokgen.errors import CheckpointError
from tokgen.importers.base import ImportReport, read_state_dict, rename
from tokgen.pretrained import load_strictly

# The encoder's own keys begin with "vision_encoder.vit" too, so that the prefix of the whole model cannot be stripped blindly.
_TOP = r"(?:module\.)?(?:vision_encoder\.)?"
_NET = rf"{_TOP}appearance_tokenizer"
_RESNET = rf"{_NET}\.resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)"
_VIT = rf"{_TOP}vision_encoder\.vit"
_BLOCK = rf"{_VIT}\.encoder\.layer\.(\d+)"
_LAYER = r"(norm_media|norm_latents|to_q|to_kv|to_out)"
TRAJVIT_KEYS = [
    (rf"{_TOP}vision_encoder\.cls_token", r"transformer.class_token"),
    (rf"{_BLOCK}\.attention\.attention\.(query|key|value)\.(\w+)", r"transformer.blocks.\1.attn.\2.\3"),  # joined below
    (rf"{_BLOCK}\.attention\.output\.dense\.(\w+)", r"transformer.blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}\.intermediate\.dense\.(\w+)", r"transformer.blocks.\1.mlp.fc1.\2"),
    (rf"{_BLOCK}\.output\.dense\.(\w+)", r"transformer.blocks.\1.mlp.fc2.\2"),
    (rf"{_BLOCK}\.layernorm_before\.(\w+)", r"transformer.blocks.\1.norm1.\2"),
    (rf"{_BLOCK}\.layernorm_after\.(\w+)", r"transformer.blocks.\1.norm2.\2"),
    (rf"{_NET}\.resnet\.embedder\.embedder\.convolution\.(\w+)", r"backbone.stem.conv.\1"),
    (rf"{_NET}\.resnet\.embedder\.embedder\.normalization\.(\w+)", r"backbone.stem.norm.\1"),
    (rf"{_RESNET}\.layer\.0\.convolution\.(\w+)", r"backbone.stages.\1.\2.first.conv.\3"),
    (rf"{_RESNET}\.layer\.0\.normalization\.(\w+)", r"backbone.stages.\1.\2.first.norm.\3"),
    (rf"{_RESNET}\.layer\.1\.convolution\.(\w+)", r"backbone.stages.\1.\2.second.conv.\3"),
    (rf"{_RESNET}\.layer\.1\.normalization\.(\w+)", r"backbone.stages.\1.\2.second.norm.\3"),
    (rf"{_RESNET}\.shortcut\.convolution\.(\w+)", r"backbone.stages.\1.\2.shortcut.conv.\3"),
    (rf"{_RESNET}\.shortcut\.normalization\.(\w+)", r"backbone.stages.\1.\2.shortcut.norm.\3"),
    (rf"{_NET}\.linear_layers\.(\d+)\.(\w+)", r"stage_projections.\1.\2"),
    (rf"{_NET}\.layer_norm\.(\w+)", r"stage_norm.\1"),
    (rf"{_TOP}appearance_token_mapper\.(latents|norm\.\w+)", r"appearance.\1"),
    (rf"{_TOP}appearance_token_mapper\.layers\.(\d+)\.0\.{_LAYER}\.(\w+)", r"appearance.layers.\1.\2.\3"),
    (rf"{_TOP}pos_encoder\.motion_token_mapper\.(latents|norm\.\w+)", r"position.\1"),
    (rf"{_TOP}pos_encoder\.motion_token_mapper\.layers\.(\d+)\.0\.{_LAYER}\.(\w+)", r"position.layers.\1.\2.\3"),
]
TRAJVIT_IGNORED = [
    (rf"{_VIT}\.embeddings\..*", "trajectories take the place of patches and their positions"),
    (rf"{_VIT}\.pooler\..*", "the class token is taken as it is"),
    (rf"{_VIT}\.layernorm\..*", "the release never applies it"),
    (r".*\.rotary_emb\.freqs", "follows from the width of a head"),
    (r"(?:module\.)?text_encoder\..*", "of the text tower"),
    (r"(?:module\.)?(?:vision_proj|text_proj|itm_head)\.\w+|(?:module\.)?temp", "of the space shared with the text tower"),
]  # fmt: skip


def trajvit_config(state: dict[str, Tensor], where: str = "state dict") -> TrajViTConfig:
    """The sizes of a published encoder, for frames of 224 px and all `legacy_` switches on.

    Raises:
        CheckpointError: no such encoder.
    """
    own = {
        re.sub(rf"^{_TOP}(?=appearance_|pos_encoder|vision_encoder\.(?:vit|cls))", "", k): v for k, v in state.items()
    }

    def count(pattern: str) -> int:
        return 1 + max(int(m[1]) for key in own if (m := re.match(pattern, key)))

    try:
        stages = count(r"appearance_tokenizer\.linear_layers\.(\d+)\.")
        layers = [count(rf"appearance_tokenizer\.resnet\.encoder\.stages\.{i}\.layers\.(\d+)\.") for i in range(stages)]
        widths = [own[f"appearance_tokenizer.linear_layers.{i}.weight"].shape[1] for i in range(stages)]
        dim = own["appearance_tokenizer.layer_norm.weight"].shape[0]
        # half of a head's channels turn, two by two
        head = 4 * own["appearance_token_mapper.layers.0.0.rotary_emb.freqs"].shape[0]
        hidden = own["vision_encoder.vit.encoder.layer.0.intermediate.dense.weight"].shape[0]
        depth = count(r"vision_encoder\.vit\.encoder\.layer\.(\d+)\.")
        appearance = count(r"appearance_token_mapper\.layers\.(\d+)\.")
        position = count(r"pos_encoder\.motion_token_mapper\.layers\.(\d+)\.")
    except (KeyError, ValueError) as error:
        missing = error if isinstance(error, KeyError) else "layers of one of its parts"
        raise CheckpointError(f"{where}: this is no TrajViT encoder with resamplers: {missing} is missing") from None
    sizes = {
        "widths": tuple(widths),
        "layers": tuple(layers),
        "dim": dim,
        "heads": max(dim // head, 1),
        "hidden": hidden,
    }
    depths = {"depth": depth, "appearance_depth": appearance, "position_depth": position}
    return replace(TrajViTConfig.released(), **sizes, **depths)


def trajvit_from_state_dict(state: dict[str, Tensor], where: str = "state dict") -> tuple[TrajViT, ImportReport]:
    """The encoder in eval mode, and what was mapped and ignored.

    Raises:
        CheckpointError: keys that this importer does not know, or that are missing, or shapes that do not fit.
    """
    config = trajvit_config(state, where)
    renamed, report = rename(state, TRAJVIT_KEYS, TRAJVIT_IGNORED, where)
    for i in range(config.depth):
        for kind in ("weight", "bias"):
            names = [f"transformer.blocks.{i}.attn.{part}.{kind}" for part in ("query", "key", "value")]
            if all(name in renamed for name in names):
                renamed[f"transformer.blocks.{i}.attn.qkv.{kind}"] = torch.cat([renamed.pop(name) for name in names])
    report.mapped = {k: re.sub(r"\.attn\.(query|key|value)\.", ".attn.qkv.", to) for k, to in report.mapped.items()}
    if "transformer.class_token" in renamed:
        renamed["transformer.class_token"] = renamed["transformer.class_token"].flatten()  # (1, 1, dim)
    encoder = TrajViT(config)
    floats = {k: v.float() if v.is_floating_point() else v for k, v in renamed.items()}
    load_strictly(encoder, floats, where)
    return encoder.eval(), report


def load_trajvit(path: str | Path) -> tuple[TrajViT, ImportReport]:
    """Read a checkpoint of the release (its weights under "model") or a file of the encoder's tensors alone."""
    return trajvit_from_state_dict(read_state_dict(path), str(path))
