"""How well a tokenizer keeps pictures, and how much of its codebook it uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokgen.evaluation.metrics import CodeHistogram, Means, pixel_errors
from tokgen.images import to_uint8
from tokgen.tokenizers.base import VisualTokenizer


@dataclass
class ReconstructionReport:
    """Figures over a set of pictures.

    Attributes:
        psnr: dB, per picture on 8-bit values, then the mean over pictures.
        l1: mean absolute error in [0, 1].
        usage: share of the codes that occur at least once in the set, for each codebook the mean.
        perplexity: exp of the entropy of the code histogram, mean over codebooks.
        tokens, bits: per picture.
    """

    images: int
    psnr: float
    l1: float
    usage: float
    perplexity: float
    tokens: float
    bits: float


@torch.no_grad()
def evaluate_reconstruction(tokenizer: VisualTokenizer, pixels: Tensor, batch_size: int = 64) -> ReconstructionReport:
    """Encode and decode uint8 pictures (N, 3, H, W); decoded pixels are rounded to 8 bits before PSNR is taken."""
    means, histogram = Means(), None
    for batch in pixels.split(batch_size):
        tokens = tokenizer.encode(batch)
        errors = pixel_errors(to_uint8(tokenizer.decode(tokens)), batch)
        means.add({"psnr": errors["psnr"], "l1": errors["l1"], "tokens": tokens.lengths, "bits": tokens.bits})
        histogram = histogram or CodeHistogram(tokens.codebook_sizes)
        histogram.update(tokens)
    mean, codes = means.result(("psnr", "l1", "tokens", "bits")), histogram.result()
    usage, perplexity = (sum(codes[name]) / len(codes[name]) for name in ("usage", "perplexity"))
    return ReconstructionReport(len(pixels), mean["psnr"], mean["l1"], usage, perplexity, mean["tokens"], mean["bits"])


def read_pictures(
    folder: str | os.PathLike[str], size: int | None = None, where: dict[str, list] | None = None
) -> tuple[Tensor, list[str], list[dict]]:
    """All pictures of an image shard folder: (uint8 (N, 3, H, W), captions, metadata). For sets that fit in memory.

    Args:
        size: side of the square pictures; None keeps them (all must have one size).
        where: keep samples whose JSON has one of the listed values, such as {"group": ["animals-nature"]}.
    """
    pictures, captions, about = [], [], []
    for picture, caption, data in _samples(folder, size):
        if all(data.get(key) in values for key, values in (where or {}).items()):
            pictures.append(picture)
            captions.append(caption)
            about.append(data)
    return torch.stack(pictures), captions, about


def _samples(folder, size: int | None) -> Iterator[tuple[Tensor, str, dict]]:
    from tokgen.data.batches import resize_image
    from tokgen.data.decode import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, decode_caption, decode_image, decode_json
    from tokgen.data.shards import Manifest
    from tokgen.data.tar import iter_samples, join, open_bytes

    for shard in Manifest.load(folder).shards:
        with open_bytes(join(os.fspath(folder), shard.name)) as file:
            kinds = (*IMAGE_EXTENSIONS, "txt", "json")
            for _, raw in iter_samples(file, extensions=kinds, max_member_bytes=MAX_MEMBER_BYTES):
                picture = decode_image(next(raw.members[e] for e in IMAGE_EXTENSIONS if e in raw.members))
                data = decode_json(raw.members["json"]) if "json" in raw.members else {}
                caption = decode_caption(raw.members) or ""
                yield picture if size is None else resize_image(picture, size), caption, data
