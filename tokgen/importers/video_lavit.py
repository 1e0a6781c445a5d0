"""Video-LaVIT's published motion tokenizer (motion_tokenizer.bin; arXiv 2402.03161) as `MotionTokenizer`.

Sizes come from the tensors. They do not say how many heads there are, nor how the places of a map divide into height and
width: both are the publication's unless given.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokgen.errors import CheckpointError
from tokgen.importers.base import ImportReport, read_state_dict, rename
from tokgen.pretrained import load_strictly
from tokgen.tokenizers.video_lavit_motion import MotionConfig, MotionTokenizer

HEAD_WIDTH = 64

_BLOCK = r"((?:encoder|decoder)\.blocks\.\d+)"
MOTION_KEYS = [
    (r"encoder\.pos_embed", r"encoder.places"),
    (r"encoder\.temp_pos", r"encoder.times"),
    (rf"{_BLOCK}\.(norm[012]|mlp\.fc[12])\.(\w+)", r"\1.\2.\3"),
    (rf"{_BLOCK}\.(spatial|temporal)_attention\.(.+)", r"\1.\2.\3"),
    (r"encoder\.down_sample_layers\.(\d)\.(conv\.\w+)", r"encoder.downs.\1.\2"),
    (r"decoder\.up_sample_layers\.(\d)\.(conv\.\w+)", r"decoder.ups.\1.\2"),
    (r"((?:encoder|decoder)\.(?:norm|in_proj)\.\w+)", r"\1"),
    (r"encode_task_layer\.(.+)", r"pre_quant.\1"),
    (r"decode_task_layer\.(.+)", r"head.\1"),
    (r"quantize\.embedding\.weight", r"quantizer.codebook.weight"),
]
# the running statistics that BEiT v2's quantizer keeps in training; the published file is for inference and lists none
MOTION_IGNORED = [
    (r"quantize\.(embedding\.)?(initted|cluster_size|embed_avg)", "statistics of training; ours start again")
]


def motion_config(
    state: dict[str, Tensor], heads: int | None = None, size: tuple[int, int] | None = None
) -> MotionConfig:
    """The sizes of a published motion tokenizer.

    Args:
        heads: of attention; None: of 64 channels each, 8 at the published width.
        size: height and width of the maps; None: 20 x 36.

    Raises:
        CheckpointError: no such tokenizer, or maps of another size.
    """
    try:
        dim = state["encoder.in_proj.weight"].shape[0]
        places, frames = state["encoder.pos_embed"].shape[1], state["encoder.temp_pos"].shape[1]
        hidden = state["encoder.blocks.0.mlp.fc1.weight"].shape[0]
        state["encoder.blocks.0.temporal_attention.q_bias"]
        depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"encoder\.blocks\.(\d+)\.", key)))
        codes, code_dim = state["quantize.embedding.weight"].shape
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"this is no motion tokenizer of Video-LaVIT: {error} is missing") from None
    height, width = size or (MotionConfig.height, MotionConfig.width)
    if height * width != places:
        raise CheckpointError(f"the motion tokenizer's maps have {places} places, not {height} x {width}; give size")
    quantizer = {**MotionConfig().quantizer, "codebook_size": codes}
    sizes: dict[str, Any] = {"frames": frames, "height": height, "width": width, "code_dim": code_dim}
    return MotionConfig(dim, heads or max(dim // HEAD_WIDTH, 1), hidden, depth, quantizer=quantizer, **sizes)


def motion_from_state_dict(
    state: dict[str, Tensor],
    where: str = "state dict",
    heads: int | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[MotionTokenizer, ImportReport]:
    """A `MotionTokenizer` in eval mode with the published weights, and what was mapped and ignored; see `motion_config`."""
    config = motion_config(state, heads, size)
    renamed, report = rename(state, MOTION_KEYS, MOTION_IGNORED, where)
    tokenizer = MotionTokenizer(config)
    own = tokenizer.quantizer.state_dict(prefix="quantizer.")
    load_strictly(tokenizer, {**{k: v for k, v in own.items() if k not in renamed}, **renamed}, where)
    _begin_statistics(tokenizer)
    return tokenizer.eval(), report


@torch.no_grad()
def _begin_statistics(tokenizer: MotionTokenizer) -> None:
    # moving averages as of a codebook that has just been started at these codes: training goes on from here, not from k-means
    codebook = tokenizer.quantizer.codebook
    codebook.ema_count.fill_(codebook.start_count)
    codebook.ema_sum.copy_(codebook.weight * codebook.start_count)
    codebook.started.fill_(True)


def load_motion_tokenizer(
    path: str | Path, heads: int | None = None, size: tuple[int, int] | None = None
) -> tuple[MotionTokenizer, ImportReport]:
    """Read motion_tokenizer.bin (or any file of that layout); see `motion_config`."""
    return motion_from_state_dict(read_state_dict(path), str(path), heads, size)
