"""Contrastive loss between pictures and captions (CLIP: Radford et al. 2021, arXiv 2103.00020, figure 3)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    groups: Tensor | None = None,
    label_smoothing: float = 0.0,
    negatives: Literal["ranks", "ranks-detached", "local"] = "ranks",
) -> Tensor:
    """Symmetric cross-entropy of finding the caption of a picture, and the picture of a caption, over all ranks.

    Captions that are equal are no negatives of each other: the target is even over them, where CLIP would punish one.

    Args:
        images, texts: embeddings (B, D), normalised here.
        scale: factor of the cosines (BLIP-2 and SEED divide them by a learned temperature: pass 1 / temperature).
        groups: int64 (B,), equal where captions are; None: all differ.
        label_smoothing: this much of the target is spread evenly over all candidates.
        negatives: "ranks": the rows of all ranks, with gradients. "ranks-detached": of all ranks, and no gradient flows
            through the gathered side, as in BLIP-2 and SEED. "local": of this rank only, which may then be called alone.

    Returns:
        The mean over this rank's rows; with negatives="ranks" its gradient, averaged over ranks as DDP does, is that of the
        whole batch.
    """
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    several = negatives != "local" and dist.is_initialized() and dist.get_world_size() > 1
    if groups is None:
        first = dist.get_rank() * len(images) if several else 0
        groups = first + torch.arange(len(images), device=images.device)
    all_images, all_texts, all_groups = images, texts, groups
    if several:
        all_images, all_texts = gather(images), gather(texts)
        if negatives == "ranks-detached":
            all_images, all_texts = all_images.detach(), all_texts.detach()
        parts = [torch.empty_like(groups) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, groups.contiguous())
        all_groups = torch.cat(parts)
    same = (groups[:, None] == all_groups[None]).float()  # (B, all)
    target = same / same.sum(1, keepdim=True)
    to_text = F.cross_entropy(scale * images @ all_texts.T, target, label_smoothing=label_smoothing)
    to_image = F.cross_entropy(scale * texts @ all_images.T, target, label_smoothing=label_smoothing)
    return (to_text + to_image) / 2


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, through which gradients flow back to the rank they came from."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))
