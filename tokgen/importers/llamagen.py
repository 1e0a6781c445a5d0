"""LlamaGen's published tokenizers (vq_ds16_c2i.pt, vq_ds8_c2i.pt, vq_ds16_t2i.pt; arXiv 2406.06525) as `VQGAN`.

The layout is a table; sizes come from the tensors, so that any LlamaGen-type checkpoint imports.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from torch import Tensor

from tokgen.errors import CheckpointError
from tokgen.importers.base import ImportReport, read_state_dict, rename
from tokgen.pretrained import load_strictly
from tokgen.tokenizers.vqgan import VQGAN, VQGANConfig

_PARTS = r"(encoder|decoder)"
VQ_KEYS = [
    (rf"{_PARTS}\.(conv_in|norm_out|conv_out)\.(\w+)", r"\1.\2.\3"),
    (rf"{_PARTS}\.conv_blocks\.(\d+)\.res\.(\d+)\.nin_shortcut\.(\w+)", r"\1.levels.\2.blocks.\3.shortcut.\4"),
    (rf"{_PARTS}\.conv_blocks\.(\d+)\.res\.(\d+)\.(\w+)\.(\w+)", r"\1.levels.\2.blocks.\3.\4.\5"),
    (rf"{_PARTS}\.conv_blocks\.(\d+)\.attn\.(\d+)\.proj_out\.(\w+)", r"\1.levels.\2.attention.\3.proj.\4"),
    (rf"{_PARTS}\.conv_blocks\.(\d+)\.attn\.(\d+)\.(\w+)\.(\w+)", r"\1.levels.\2.attention.\3.\4.\5"),
    (rf"{_PARTS}\.conv_blocks\.(\d+)\.(downsample|upsample)\.conv\.(\w+)", r"\1.\3.\2.\4"),
    (rf"{_PARTS}\.mid\.1\.proj_out\.(\w+)", r"\1.mid.1.proj.\2"),
    (rf"{_PARTS}\.mid\.(\d)\.(\w+)\.(\w+)", r"\1.mid.\2.\3.\4"),
    (r"quantize\.embedding\.weight", r"quantizer.codebook.weight"),
    (r"quant_conv\.(\w+)", r"pre_quant.\1"),
    (r"post_quant_conv\.(\w+)", r"post_quant.\1"),
]
VQ_IGNORED = [(r"quantize\.codebook_used", "a first-in-first-out record of recent ids, for a usage figure in training")]


def vq_config(state: dict[str, Tensor]) -> VQGANConfig:
    """The sizes of a published state dict, read off its tensors. Raises CheckpointError if it is no LlamaGen VQ model."""
    try:
        channels = state["encoder.conv_in.weight"].shape[0]
        levels = 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.conv_blocks\.(\d+)\.", k)))
        blocks = Counter(
            m[1] for k in state if (m := re.match(r"encoder\.conv_blocks\.(\d+)\.res\.\d+\.conv1\.weight", k))
        )
        mult = tuple(state[f"encoder.conv_blocks.{i}.res.0.conv2.weight"].shape[0] // channels for i in range(levels))
        codes, code_dim = state["quantize.embedding.weight"].shape
        z_channels = state["quant_conv.weight"].shape[1]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"this is not a LlamaGen VQ state dict: {error} is missing") from None
    quantizer = {"type": "vq", "codebook_size": codes, "metric": "cosine", "update": "gradient", "beta": 0.25}
    return VQGANConfig(channels, mult, blocks["0"], z_channels, code_dim, quantizer=quantizer)


def vq_from_state_dict(state: dict[str, Tensor], where: str = "state dict") -> tuple[VQGAN, ImportReport]:
    """A `VQGAN` in eval mode with the published weights, and what was mapped and ignored."""
    renamed, report = rename(state, VQ_KEYS, VQ_IGNORED, where)
    tokenizer = VQGAN(vq_config(state))
    load_strictly(tokenizer, _with_statistics(tokenizer, renamed), where)
    return tokenizer.eval(), report


def load_vq(path: str | Path) -> tuple[VQGAN, ImportReport]:
    """Read vq_ds16_c2i.pt, vq_ds8_c2i.pt or vq_ds16_t2i.pt (or training files of that layout)."""
    return vq_from_state_dict(read_state_dict(path), str(path))


def _with_statistics(tokenizer: VQGAN, state: dict[str, Tensor]) -> dict[str, Tensor]:
    # our quantizer's own training statistics have no published counterpart; they start fresh
    own = {k: v for k, v in tokenizer.quantizer.named_buffers() if f"quantizer.{k}" not in state}
    return {**state, **{f"quantizer.{k}": v for k, v in own.items() if f"quantizer.{k}" in tokenizer.state_dict()}}
