"""Emu3's published vision tokenizer (arXiv 2409.18869) as `Emu3`, in both layouts that it is published in.

The release's own (BAAI/Emu3-VisionTokenizer), and that of transformers' `Emu3VQVAE`, alone or inside a whole Emu3 model, whose language
model is left out. Sizes come from the tensors.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from tokgen.errors import CheckpointError
from tokgen.importers.base import ImportReport, read_state_dict, rename
from tokgen.importers.sharded import shapes_in, tensors_in, weight_files
from tokgen.pretrained import load_strictly
from tokgen.tokenizers.emu3 import Emu3, Emu3Config

INSIDE = r"(?:model\.)?vqmodel\."  # where a whole Emu3 model has its tokenizer

# transformers' names of parts -> the release's
TRANSFORMERS_PARTS = [
    (r"^(encoder|decoder)\.(?:down|up)_block\.", r"\1."),
    (r"^(encoder|decoder)\.middle_block\.attn_norm\.", r"\1.mid.attn_1.norm."),
    (r"^(encoder|decoder)\.middle_block\.", r"\1.mid."),
    (r"\.attn_norms\.(\d+)\.", r".attn.\1.norm."),
    (r"\.([qkv])_proj\.", r".\1."),
    (r"\.out_proj\.", r".proj_out."),
]
# the release's names of parts -> ours
PARTS = [
    (r"\.norm_layer\.", r".norm."),
    (r"\.conv_y\.", r".scale."),
    (r"\.conv_b\.", r".shift."),
    (r"\.nin_shortcut\.", r".shortcut."),
    (r"\.proj_out\.", r".proj."),
    (r"\.mid\.block_1\.", r".mid.0."),
    (r"\.mid\.attn_1\.", r".mid.1."),
    (r"\.mid\.block_2\.", r".mid.2."),
]
EMU3_KEYS = [
    (r"((?:encoder|decoder)\.(?:conv_in|mid|norm_out|conv_out)\..+)", r"\1"),
    (r"encoder\.down\.(\d+)\.block\.(.+)", r"encoder.levels.\1.blocks.\2"),
    (r"encoder\.down\.(\d+)\.attn\.(.+)", r"encoder.levels.\1.attention.\2"),
    (r"encoder\.down\.(\d+)\.downsample\.conv\.(\w+)", r"encoder.downsample.\1.\2"),
    (r"(encoder|decoder)\.time_res_stack\.(\d+)\.(norm[12])\.(\w+)", r"temporal_\1.blocks.\2.\3.\4"),
    (r"(encoder|decoder)\.time_res_stack\.(\d+)\.(conv[12])\.conv\.(\w+)", r"temporal_\1.blocks.\2.\3.\4"),
    (r"encoder\.time_conv\.(\d+)\.conv\.conv\.(\w+)", r"temporal_encoder.downsample.\1.\2"),
    (r"decoder\.time_conv\.(\d+)\.conv\.conv\.(\w+)", r"temporal_decoder.upsample.\1.\2"),
    (r"quant_conv\.conv\.(\w+)", r"pre_quant.\1"),
    (r"post_quant_conv\.conv\.(\w+)", r"post_quant.\1"),
    (r"quantize\.embedding\.weight", r"quantizer.codebook.weight"),
]


def decoder_keys(levels: int) -> list[tuple[str, str]]:
    """Rules for the decoder's levels, which count from high resolution to low there and the other way round here."""
    rules = []
    for theirs in range(levels):
        level, ours = rf"decoder\.up\.{theirs}\.", levels - 1 - theirs
        rules += [
            (rf"{level}block\.(.+)", rf"decoder.levels.{ours}.blocks.\1"),
            (rf"{level}attn\.(.+)", rf"decoder.levels.{ours}.attention.\1"),
            (rf"{level}upsample\.conv\.(\w+)", rf"decoder.upsample.{ours}.\1"),
        ]
    return rules


def emu3_config(state: dict[str, Tensor]) -> Emu3Config:
    """The sizes of a state dict in the release's layout. Raises CheckpointError if it is no vision tokenizer of Emu3."""

    def count(pattern: str) -> int:
        return len({m[1] for key in state if (m := re.match(pattern, key))})

    try:
        channels = state["encoder.conv_in.weight"].shape[0]
        levels, blocks = count(r"encoder\.down\.(\d+)\."), count(r"encoder\.down\.0\.block\.(\d+)\.")
        mult = tuple(state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] // channels for i in range(levels))
        codes, code_dim = state["quantize.embedding.weight"].shape
        state["decoder.norm_out.norm_layer.weight"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"this is no vision tokenizer of Emu3: {error} is missing") from None
    quantizer = {**Emu3Config().quantizer, "codebook_size": codes}
    halvings = count(r"encoder\.time_conv\.(\d+)\.")
    return Emu3Config(channels, mult, blocks, code_dim, 2**halvings, quantizer=quantizer)


def emu3_from_state_dict(state: dict[str, Tensor], where: str = "state dict") -> tuple[Emu3, ImportReport]:
    """An `Emu3` in eval mode with the published weights, and what was mapped and ignored. Either layout, see the module.

    Raises:
        CheckpointError: tensors that are missing, unknown or misshapen.
    """
    whole = any(re.match(INSIDE, key) for key in state)  # with a language model
    # {key in the file: its name in the release's layout}
    names = {key: _names(re.sub(f"^{INSIDE}", "", key), TRANSFORMERS_PARTS) for key in state}
    names = {key: name for key, name in names.items() if not whole or re.match(INSIDE, key)}
    published = {name: state[key] for key, name in names.items()}
    config = emu3_config(published)
    ours = {_names(name, PARTS): value for name, value in published.items()}
    renamed, report = rename(ours, [*EMU3_KEYS, *decoder_keys(len(config.channel_mult))], [], where)
    tokenizer = Emu3(config)
    load_strictly(tokenizer, {key: _as_convolution(key, value) for key, value in renamed.items()}, where)
    mapped = {key: report.mapped[_names(name, PARTS)] for key, name in names.items()}
    ignored = {key: "of the language model" for key in state if key not in names}
    return tokenizer.eval(), ImportReport(mapped, ignored)


def load_emu3(path: str | Path) -> tuple[Emu3, ImportReport]:
    """Read model.safetensors of BAAI/Emu3-VisionTokenizer, or a file or folder of safetensors in transformers' layout.

    Of a whole Emu3 model only the tokenizer's tensors are read.
    """
    path = Path(path)
    if not path.is_dir() and (path.suffix != ".safetensors" or not path.is_file()):
        return emu3_from_state_dict(read_state_dict(path), str(path))
    files = weight_files(path) if path.is_dir() else [path]
    names = shapes_in(files)
    inside = {name for name in names if re.match(INSIDE, name)}
    state = dict.fromkeys(names, torch.empty(0)) | dict(tensors_in(files, inside or None))
    return emu3_from_state_dict(state, str(path))


def _names(key: str, parts: list[tuple[str, str]]) -> str:
    for pattern, replacement in parts:
        key = re.sub(pattern, replacement, key)
    return key


def _as_convolution(key: str, value: Tensor) -> Tensor:
    # transformers has the projections of attention as matrices
    is_matrix = re.search(r"\.(attention\.\d+|mid\.1)\.(q|k|v|proj)\.weight$", key) and value.ndim == 2
    return value[:, :, None, None] if is_matrix else value
