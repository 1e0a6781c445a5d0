"""How well a tokenizer keeps pictures, and how much of its codebook it uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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
    psnr, l1, lengths, bits, counts = [], [], [], [], None
    for batch in pixels.split(batch_size):
        tokens = tokenizer.encode(batch)
        decoded = to_uint8(tokenizer.decode(tokens)).cpu()
        error = (decoded.double() - batch.double()) / 255
        # a perfect picture counts as the error of half a level, 54 dB, not as infinity
        mse = error.square().mean((1, 2, 3)).clamp(min=(0.5 / 255) ** 2)
        psnr.append(-10 * mse.log10())
        l1.append(error.abs().mean((1, 2, 3)))
        lengths.append(tokens.lengths.cpu())
        bits.append(tokens.bits.cpu())
        counts = _histograms(tokens, counts)
    share = [(c > 0).double().mean() for c in counts]
    entropy = [-(p * p.clamp(min=1e-12).log()).sum() for p in (c / c.sum() for c in counts)]
    mean = lambda parts: torch.cat(parts).double().mean().item()  # noqa: E731
    return ReconstructionReport(
        len(pixels), mean(psnr), mean(l1), torch.stack(share).mean().item(),
        torch.stack([e.exp() for e in entropy]).mean().item(), mean(lengths), mean(bits),
    )  # fmt: skip


def _histograms(tokens, counts: list[Tensor] | None) -> list[Tensor]:
    ids = tokens.ids if tokens.ids.ndim == 3 else tokens.ids[..., None]
    new = [
        torch.bincount(ids[..., c][tokens.mask].cpu(), minlength=size).double()
        for c, size in enumerate(tokens.codebook_sizes)
    ]
    return new if counts is None else [a + b for a, b in zip(counts, new)]


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
