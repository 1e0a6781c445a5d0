"""Is the drawn picture nearest to the one it was asked for? Retrieval among all reference pictures, in a stated space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokgen.errors import CheckpointError


@dataclass
class RetrievalReport:
    """Shares over the drawn pictures.

    Attributes:
        top1, top5: the picture asked for is the nearest, or among the five nearest, of all references.
        chance: what top1 would be for a picture drawn at random.
        space: the feature space, as it must be quoted with the figures.
        nearest: index of the nearest reference of each drawn picture, int64 (N,).
    """

    top1: float
    top5: float
    chance: float
    space: str
    nearest: Tensor


def pixel_features(pixels: Tensor) -> Tensor:
    """16 x 16 average-pooled RGB less its mean over the picture, (B, 768): a space without any trained network."""
    small = F.adaptive_avg_pool2d(pixels.float(), 16).flatten(1)
    return small - small.mean(1, keepdim=True)


def feature_space(name: str = "auto") -> tuple[str, Callable[[Tensor], Tensor]]:
    """(description, function) of a feature space; the function maps pixels (B, 3, H, W) in [0, 1] to (B, D).

    Args:
        name: "pixels" (see `pixel_features`), whatever `tokgen.encoders.base.load_encoder` takes ("mobilenet", "timm:…", a
            folder), or "auto": "mobilenet" where its weights are at hand, else "pixels".

    Raises:
        CheckpointError, MissingDependency: as `load_encoder`.
    """
    from tokgen.encoders.base import load_encoder

    if name == "pixels":
        return "16 x 16 pixels, cosine", pixel_features
    try:
        encoder = load_encoder("mobilenet" if name == "auto" else name)
    except CheckpointError:
        if name == "auto":
            return feature_space("pixels")
        raise
    return f"{encoder.name} ({encoder.dim}-d), cosine", encoder.embed


@torch.no_grad()
def embed_pictures(pixels: Tensor, space: tuple[str, Callable[[Tensor], Tensor]], batch_size: int = 128) -> Tensor:
    """Features of unit length, float (N, D), of pictures uint8 or float in [0, 1], (N, 3, H, W)."""
    parts = (p.float() / 255 if p.dtype == torch.uint8 else p.float() for p in pixels.split(batch_size))
    return F.normalize(torch.cat([space[1](p) for p in parts]), dim=1)


@torch.no_grad()
def evaluate_retrieval(
    drawn: Tensor,
    references: Tensor,
    targets: Tensor,
    space: tuple[str, Callable[[Tensor], Tensor]],
    batch_size: int = 128,
) -> RetrievalReport:
    """Nearest reference by cosine similarity.

    Args:
        drawn: uint8 or float (N, 3, H, W).
        references: uint8 or float (M, 3, H, W), all pictures a drawn one could be taken for.
        targets: int64 (N,), which reference each drawn picture was asked to be. Exact copies of it count as it.
    """
    reference = embed_pictures(references, space, batch_size)
    similarity = embed_pictures(drawn, space, batch_size) @ reference.T  # (N, M)
    order = similarity.topk(min(5, len(references)), dim=1).indices  # (N, 5)
    # a reference that looks exactly like the target is the target (some names share one picture)
    twin = (reference[order] * reference[targets][:, None]).sum(-1) > 1 - 1e-6  # (N, 5)
    hit = (order == targets[:, None]) | twin
    return RetrievalReport(
        hit[:, 0].double().mean().item(),
        hit.any(1).double().mean().item(),
        1 / len(references),
        space[0],
        order[:, 0],
    )


def matching_rates(images: Tensor, texts: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """How often the nearest caption of a picture is its own, and the other way round, among all.

    Args:
        images, texts: embeddings (N, D) of pictures and of their captions, normalised here.
        groups: int64 (N,), equal where captions are.

    Returns:
        "image_to_text" and "text_to_image", shares at rank 1, with "_5" at rank 5, and "pairs", N.
    """
    similarity = F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T  # (N, N)
    rates = {"pairs": torch.tensor(float(len(images)))}
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        nearest = groups[scores.topk(min(5, len(groups)), dim=1).indices] == groups[:, None]  # (N, 5)
        rates[name] = nearest[:, 0].float().mean()
        rates[f"{name}_5"] = nearest.any(1).float().mean()
    return rates
