"""IBQ's published tokenizers as `VQGAN`: SEED-Voken's (imagenet256_16384.ckpt and others; arXiv 2412.02692) and Emu3.5's.

Both have the layout of taming-transformers; sizes come from the tensors. SEED-Voken's files are Lightning checkpoints that
hold the losses' networks too, and a moving average of the weights, under names whose dots were dropped.
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

_EMA = "model_ema."
IBQ_IGNORED = [
    (r"loss\..+", "networks of the losses: discriminator, perceptual distance"),
    (r"model_ema\.loss\w+", "moving average of the discriminator"),
    (r"model_ema\.(decay|num_updates)", "state of the moving average"),
]


def ibq_keys(levels: int) -> list[tuple[str, str]]:
    """The table of keys of a model of so many resolutions."""
    parts = r"(encoder|decoder)"
    table = [
        (rf"{parts}\.(conv_in|norm_out|conv_out)\.(\w+)", r"\1.\2.\3"),
        (rf"{parts}\.mid\.block_1\.(\w+)\.(\w+)", r"\1.mid.0.\2.\3"),
        (rf"{parts}\.mid\.attn_1\.proj_out\.(\w+)", r"\1.mid.1.proj.\2"),
        (rf"{parts}\.mid\.attn_1\.(\w+)\.(\w+)", r"\1.mid.1.\2.\3"),
        (rf"{parts}\.mid\.block_2\.(\w+)\.(\w+)", r"\1.mid.2.\2.\3"),
        (r"quantize\.embedding\.weight", r"quantizer.codebook.weight"),
        (r"quant_conv\.(\w+)", r"pre_quant.\1"),
        (r"post_quant_conv\.(\w+)", r"post_quant.\1"),
    ]
    for level in range(levels):
        # the decoder counts its resolutions from the highest, though it starts with the lowest
        for theirs, ours in (
            (rf"encoder\.down\.{level}", f"encoder.levels.{level}"),
            (rf"decoder\.up\.{level}", f"decoder.levels.{levels - 1 - level}"),
        ):
            part, _, number = ours.split(".")
            table += [
                (rf"{theirs}\.block\.(\d+)\.nin_shortcut\.(\w+)", rf"{ours}.blocks.\1.shortcut.\2"),
                (rf"{theirs}\.block\.(\d+)\.(\w+)\.(\w+)", rf"{ours}.blocks.\1.\2.\3"),
                (rf"{theirs}\.attn\.(\d+)\.proj_out\.(\w+)", rf"{ours}.attention.\1.proj.\2"),
                (rf"{theirs}\.attn\.(\d+)\.(\w+)\.(\w+)", rf"{ours}.attention.\1.\2.\3"),
                (rf"{theirs}\.(downsample|upsample)\.conv\.(\w+)", rf"{part}.\1.{number}.\2"),
            ]
    return table


def ibq_config(state: dict[str, Tensor], l2_normalize: bool = False) -> VQGANConfig:
    """The sizes of a published state dict, read off its tensors. Raises CheckpointError if it is no IBQ tokenizer."""
    try:
        channels = state["encoder.conv_in.weight"].shape[0]
        blocks = Counter(int(m[1]) for k in state if (m := re.match(r"encoder\.down\.(\d+)\.block\.\d+\.conv1\.w", k)))
        mult = tuple(state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] // channels for i in sorted(blocks))
        codes, code_dim = state["quantize.embedding.weight"].shape
        z_channels = state["quant_conv.weight"].shape[1]
        blocks_a_level = blocks[0]
        state["decoder.up.0.block.0.conv1.weight"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"this is not an IBQ state dict: {error} is missing") from None
    quantizer = {"type": "ibq", "codebook_size": codes} | ({"metric": "cosine"} if l2_normalize else {})
    return VQGANConfig(channels, mult, blocks_a_level, z_channels, code_dim, quantizer=quantizer)


def average_names(state: dict[str, Tensor], where: str) -> dict[str, str]:
    """{key of a weight: key of its moving average}.

    The average of `encoder.conv_in.weight` is called `model_ema.encoderconv_inweight`; where the dots were can only be found
    by way of the plain names.

    Raises:
        CheckpointError: no average, or one that does not cover all weights.
    """
    weights = [key for key in state if not key.startswith((_EMA, "loss."))]
    names = {key: _EMA + key.replace(".", "") for key in weights}
    missing = [key for key, name in names.items() if name not in state]
    if missing:
        raise CheckpointError(
            f"{where} holds no moving average of {len(missing)} of its {len(names)} weights, such as {missing[0]}; take the "
            "weights themselves (ema=False)"
        )
    return names


def ibq_from_state_dict(
    state: dict[str, Tensor], where: str = "state dict", ema: bool | None = None, l2_normalize: bool = False
) -> tuple[VQGAN, ImportReport]:
    """A `VQGAN` in eval mode with the published weights, and what was mapped and ignored.

    Args:
        ema: True takes the moving average of the weights, with which the publication evaluates; False the weights
            themselves; None the average if there is one.
        l2_normalize: whether vectors and codes are normalised, an option of Emu3.5's code that the tensors do not tell.
    """
    config = ibq_config(state, l2_normalize)
    table, ignored = ibq_keys(len(config.channel_mult)), list(IBQ_IGNORED)
    if ema is None:
        ema = any(re.fullmatch(r"model_ema\.encoder\w+", key) for key in state)
    if ema:
        names = average_names(state, where)
        averages = set(names.values())
        weights = {key: state[names.get(key, key)] for key in state if key not in averages}
        renamed, report = rename(weights, table, ignored, where)
        report.mapped = {names[key]: ours for key, ours in report.mapped.items()}
        report.ignored |= dict.fromkeys(names, "its moving average is taken")
    else:
        ignored.append((r"model_ema\.\w+", "moving average; the weights themselves are taken"))
        renamed, report = rename(state, table, ignored, where)
    tokenizer = VQGAN(config)
    load_strictly(tokenizer, renamed, where)
    return tokenizer.eval(), report


def load_ibq(path: str | Path, ema: bool | None = None, l2_normalize: bool = False) -> tuple[VQGAN, ImportReport]:
    """Read a Lightning checkpoint of SEED-Voken or Emu3.5's model.ckpt; see `ibq_from_state_dict`."""
    return ibq_from_state_dict(read_state_dict(path), str(path), ema, l2_normalize)
