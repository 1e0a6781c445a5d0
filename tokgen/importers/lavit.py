"""LaVIT's published tokenizer (rain1011/LaVIT-7B-v1 and -v2; Jin et al. 2024, arXiv 2309.04669) as `LAVIT`.

The publication is in parts:

    eva_vitg_psz14.bin               the vision tower
    tokenizer_encoder.bin            selector, merger, bottleneck and codebook
    tokenizer_decoder.bin            decoder, and the projection to a Stable Diffusion 1 UNet, or
    highres_tokenizer_decoder.bin    decoder, and the projections to a Stable Diffusion XL UNet
    visual_weight.bin                another merger, trained on with the language model, and the projection to it

There are two mergers: codes come from that of tokenizer_encoder.bin, continuous features for the language model from that of
visual_weight.bin. (The published class has one, and the second file overwrites it; codes made then are wrong.) `LAVIT` holds
both. Which keys are in which file follows from the published modules and the files' sizes; a file that holds others is
refused by name, and keys of parts that belong to another file are ignored and reported.

Sizes come from the tensors, except the heads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from tokgen.encoders.eva import EvaViT
from tokgen.errors import CheckpointError
from tokgen.importers.base import ImportReport, read_state_dict, rename
from tokgen.importers.eva import HEAD_WIDTH, eva_config, eva_weights
from tokgen.pretrained import load_strictly
from tokgen.tokenizers.lavit import LAVIT, LavitConfig

_INSIDE = r"(?:model\.)?(?:visual_tokenizer\.)?"  # Video-LaVIT's language models hold the same keys under this prefix
_MLP = r"mlp\.fc[12]\.\w+"


def _merger_keys(ours: str) -> list[tuple[str, str]]:
    block = rf"{_INSIDE}causal_encoder\.blocks\.(\d+)"
    return [
        (rf"{block}\.(norm[012]\.\w+|{_MLP})", rf"{ours}.blocks.\1.\2"),
        (rf"{block}\.token_causal_attn\.((?:qkv|proj)\.\w+)", rf"{ours}.blocks.\1.self_attn.\2"),
        (rf"{block}\.token_cross_attn\.((?:query|key|value|proj)\.\w+)", rf"{ours}.blocks.\1.cross_attn.\2"),
        (rf"{_INSIDE}causal_encoder\.ln_vision\.(\w+)", rf"{ours}.origin_norm.\1"),
        (rf"{_INSIDE}causal_encoder\.norm\.(\w+)", rf"{ours}.norm.\1"),
    ]


TOKENIZER_KEYS = [
    (r"token_predictor\.in_conv\.0\.(\w+)", r"selector.norm.\1"),
    (r"token_predictor\.in_conv\.1\.(\w+)", r"selector.lift.\1"),
    (r"token_predictor\.out_conv\.([024])\.(\w+)", r"selector.score.\1.\2"),
    *_merger_keys("merger"),
    (r"quantize\.embedding\.weight", r"quantizer.codebook.weight"),
    (r"encode_task_layer\.([02])\.(\w+)", r"bottleneck.\1.\2"),
]
TOKENIZER_IGNORED = [
    (r"encoder\..*", "the vision tower has a file of its own"),
    (r"vit_proj\..*", "the projection to the language model belongs to the merger of visual_weight.bin"),
]

VISUAL_KEYS = [*_merger_keys("understanding.merger"), (rf"{_INSIDE}vit_proj\.(\w+)", r"understanding.projection.\1")]
VISUAL_IGNORED = [
    (rf"{_INSIDE}(encoder|token_predictor|quantize|encode_task_layer)\..*", "codes are made by tokenizer_encoder.bin"),
]

DECODER_KEYS = [
    (r"in_proj\.(\w+)", r"decoder.enter.\1"),
    (r"pos_embed", r"decoder.positions"),
    (r"query_embed", r"decoder.queries"),
    (r"blocks\.(\d+)\.(norm[012]\.\w+|(?:self|cross)_attn\.\w+\.\w+|" + _MLP + r")", r"decoder.blocks.\1.\2"),
    (r"norm\.(\w+)", r"decoder.norm.\1"),
    (r"decode_task_layer\.([02])\.(\w+)", r"decoder.leave.\1.\2"),
    (r"unet_proj\.(\w+)", r"conditioner.prompts.0.\1"),
    (r"unet_proj_1\.(\w+)", r"conditioner.prompts.0.\1"),
    (r"unet_proj_2\.(\w+)", r"conditioner.prompts.1.\1"),
    (r"unet_attnpool\.positional_embedding", r"conditioner.pool.positions"),
    (r"unet_attnpool\.q_proj\.(\w+)", r"conditioner.pool.query.\1"),
    (r"unet_attnpool\.k_proj\.(\w+)", r"conditioner.pool.key.\1"),
    (r"unet_attnpool\.v_proj\.(\w+)", r"conditioner.pool.value.\1"),
    (r"unet_attnpool\.c_proj\.(\w+)", r"conditioner.pool.proj.\1"),
]


def lavit_config(
    encoder: dict[str, Tensor],
    tokenizer: dict[str, Tensor],
    decoder: dict[str, Tensor],
    visual_weight: dict[str, Tensor] | None = None,
    heads: int | None = None,
) -> LavitConfig:
    """The sizes of the published parts.

    Args:
        heads: of the tower, the merger and the decoder; None: of 88 channels each in the tower, and as many in the others.

    Raises:
        CheckpointError: a part that is none of LaVIT's.
    """
    tower = eva_config(encoder, "lavit", heads)
    try:
        part, sign = "tokenizer", "causal_encoder.blocks.0.mlp.fc1.weight"
        hidden = tokenizer[sign].shape[0]
        codes, code_dim = tokenizer[sign := "quantize.embedding.weight"].shape
        part, sign = "decoder", "in_proj.weight"
        width = decoder[sign].shape[0]
        decoder_hidden = decoder[sign := "blocks.0.mlp.fc1.weight"].shape[0]
        highres = "unet_proj_1.weight" in decoder
        first = decoder[sign := "unet_proj_1.weight" if highres else "unet_proj.weight"].shape[0]
        second = decoder[sign := "unet_proj_2.weight"].shape[0] if highres else LavitConfig.condition_dims[1]
        part, sign, understanding = "visual_weight", "vit_proj.weight", None
        if visual_weight is not None:
            understanding = next(v.shape[0] for k, v in visual_weight.items() if k.endswith(sign))
    except (KeyError, StopIteration, ValueError):
        raise CheckpointError(f"{part}: this is no such part of LaVIT: {sign} is missing") from None
    heads = heads or max(tower.dim // HEAD_WIDTH, 1)
    quantizer = {**LavitConfig().quantizer, "codebook_size": codes}
    return LavitConfig(
        image_size=tower.image_size,
        encoder={"type": "eva", "config": asdict(tower)},
        merger_heads=heads,
        merger_hidden=hidden,
        merger_depth=_depth(tokenizer, r"causal_encoder\."),
        code_dim=code_dim,
        quantizer=quantizer,
        decoder_dim=width,
        decoder_heads=heads,
        decoder_hidden=decoder_hidden,
        decoder_depth=_depth(decoder),
        understanding_dim=understanding,
        condition="highres" if highres else "lowres",
        condition_dims=(first, second),
    )


def _depth(state: dict[str, Tensor], prefix: str = "") -> int:
    return 1 + max(int(m[1]) for key in state if (m := re.match(rf"{prefix}blocks\.(\d+)\.", key)))


def lavit_from_state_dicts(
    encoder: dict[str, Tensor],
    tokenizer: dict[str, Tensor],
    decoder: dict[str, Tensor],
    visual_weight: dict[str, Tensor] | None = None,
    heads: int | None = None,
    where: Sequence[str] = ("encoder", "tokenizer", "decoder", "visual_weight"),
) -> tuple[LAVIT, ImportReport]:
    """A tokenizer in eval mode with the published weights, and what was mapped and ignored, each key as "part/key"."""
    config = lavit_config(encoder, tokenizer, decoder, visual_weight, heads)
    module = LAVIT(config)
    tower = module.encoder
    assert isinstance(tower, EvaViT)
    parts = [
        eva_weights(encoder, tower.config, where[0]),
        rename(tokenizer, TOKENIZER_KEYS, TOKENIZER_IGNORED, where[1]),
        rename(decoder, DECODER_KEYS, [], where[2]),
    ]
    if visual_weight is not None:
        parts.append(rename(visual_weight, VISUAL_KEYS, VISUAL_IGNORED, where[3]))
    parts[0] = ({f"encoder.{k}": v for k, v in parts[0][0].items()}, parts[0][1])
    parts[0][1].mapped = {k: f"encoder.{v}" for k, v in parts[0][1].mapped.items()}
    report, state = ImportReport(), {}
    for name, (renamed, part) in zip(("encoder", "tokenizer", "decoder", "visual_weight"), parts):
        state |= renamed
        report.mapped |= {f"{name}/{k}": v for k, v in part.mapped.items()}
        report.ignored |= {f"{name}/{k}": v for k, v in part.ignored.items()}
    load_strictly(module, {**_statistics(module, state), **state}, " and ".join(where[: len(parts)]))
    return module.eval(), report


def _statistics(module: LAVIT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The codebook's moving averages, which are not published: they start at the codes, and k-means has been."""
    codebook = module.quantizer.codebook
    own = {f"quantizer.codebook.{k}": v for k, v in codebook.named_buffers() if k != "weight"}
    codes = state.get("quantizer.codebook.weight", codebook.weight)
    own["quantizer.codebook.ema_sum"] = codes.float() * codebook.start_count
    own["quantizer.codebook.started"] = torch.ones((), dtype=torch.bool)
    return own


def load_lavit(
    encoder: str | Path,
    tokenizer: str | Path,
    decoder: str | Path,
    visual_weight: str | Path | None = None,
    heads: int | None = None,
) -> tuple[LAVIT, ImportReport]:
    """Read the published files.

    Args:
        encoder: eva_vitg_psz14.bin.
        tokenizer: tokenizer_encoder.bin.
        decoder: tokenizer_decoder.bin (config.condition "lowres") or highres_tokenizer_decoder.bin ("highres").
        visual_weight: visual_weight.bin, for `LAVIT.features_for_llm`; None: without.
        heads: see `lavit_config`.

    Raises:
        CheckpointError: a file that is missing, or is another part.
    """
    paths = [p for p in (encoder, tokenizer, decoder, visual_weight) if p is not None]
    return lavit_from_state_dicts(*map(read_state_dict, paths), heads=heads, where=[str(p) for p in paths])
