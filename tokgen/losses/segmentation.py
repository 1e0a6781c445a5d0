"""Losses between soft segments and given ones, whose order means nothing (TrajTok, arXiv 2602.22779, section 3).

Each given segment is matched to the prediction that overlaps it most, one to one (DETR: Carion et al. 2020, arXiv
2005.12872); dice and focal loss then ask the predictions to become what they were matched to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokgen.errors import InputError, MissingDependency


def first_appearance(labels: Tensor) -> Tensor:
    """Labels (B, N) renumbered 0, 1, ... in the order in which each row's first occur; -1 stays.

    Args:
        labels: integers from 0 up, -1 for none.
    """
    b, n = labels.shape
    count = int(labels.max()) + 1
    if count == 0:
        return labels.long()
    labels = labels.long()
    place = torch.arange(n, device=labels.device).expand(b, n)
    first = torch.full((b, count + 1), n, device=labels.device)  # the last column takes what has no label
    first.scatter_reduce_(1, labels.remainder(count + 1), place, "amin")
    order = first[:, :count].argsort(dim=1, stable=True)  # those that do not occur come last
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=labels.device).expand(b, count))
    return torch.where(labels >= 0, rank.gather(1, labels.clamp(min=0)), -1)


@torch.no_grad()
def match_segments(logits: Tensor, targets: Tensor) -> Tensor:
    """The prediction that belongs to each target segment, int64 (B, K): a permutation for each row.

    The Hungarian method on -IoU between the predictions' hard segments and the targets, over pixels with a target.

    Args:
        logits: (B, N, K).
        targets: int64 (B, N), 0 .. K-1, -1 for none.

    Raises:
        InputError: shapes or targets that do not fit.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingDependency(
            "matching segments needs scipy; install it with pip install 'tokgen[trajectory]'"
        ) from None
    b, n, k = logits.shape
    if targets.shape != (b, n) or (targets.numel() and int(targets.max()) >= k):
        raise InputError(
            f"targets {tuple(targets.shape)} reach {int(targets.max())}; expected {(b, n)} below {k}, the number of segments"
        )
    predicted = logits.argmax(-1)  # (B, N)
    known = targets >= 0
    row = torch.arange(b, device=logits.device)[:, None]
    joint = ((row * k + targets) * k + predicted)[known]
    shared = torch.bincount(joint, minlength=b * k * k).view(b, k, k).float()  # target x prediction
    union = shared.sum(2, keepdim=True) + shared.sum(1, keepdim=True) - shared
    cost = -(shared / union.clamp(min=1)).cpu().numpy()
    pairs = [torch.from_numpy(linear_sum_assignment(c)[1]) for c in cost]  # rows come in order
    return torch.stack(pairs).long().to(logits.device)


def segmentation_loss(
    logits: Tensor, targets: Tensor, dice_weight: float = 2.0, focal_weight: float = 1.0, gamma: float = 2.0
) -> dict[str, Tensor]:
    """The loss and its terms, fp32.

    Args:
        logits: (B, N, K) of each place belonging to each predicted segment.
        targets: integers (B, N) from 0 up, -1 for places that no term looks at. In each row segments are taken in the
            order in which they first appear; those beyond the K-th are not looked at either.
        gamma: of the focal loss.

    Returns:
        "loss", the weighted sum, "dice" and "focal" before weighting.
    """
    k = logits.shape[-1]
    targets = first_appearance(targets)
    targets = torch.where(targets < k, targets, -1)
    wanted = match_segments(logits, targets).gather(1, targets.clamp(min=0))  # (B, N): the prediction of each place
    known = targets >= 0
    log_p = logits.float().log_softmax(-1)
    dice = dice_loss(log_p.exp(), wanted, known)
    focal = focal_loss(log_p, wanted, known, gamma)
    return {"loss": dice_weight * dice + focal_weight * focal, "dice": dice, "focal": focal}


def dice_loss(p: Tensor, wanted: Tensor, known: Tensor, eps: float = 1e-6) -> Tensor:
    """1 - 2 |p t| / (|p| + |t|), the mean over each sample's segments that occur, then over samples (Milletari et al. 2016,
    arXiv 1606.04797). The published code counts the i-th segments of all samples of a batch as one; here they are apart.

    Args:
        p: probabilities (B, N, K). wanted: int64 (B, N), the segment of each place. known: bool (B, N), places that count.
    """
    p, known = p * known[..., None], known.to(p.dtype)
    zeros = p.new_zeros(p.shape[0], p.shape[2])
    hits = zeros.scatter_add(1, wanted, p.gather(2, wanted[..., None])[..., 0])  # (B, K)
    sizes = zeros.scatter_add(1, wanted, known)
    dice = (2 * hits + eps) / (p.sum(1) + sizes + eps)
    occurs = (sizes > 0).to(p.dtype)
    each = (occurs * (1 - dice)).sum(1) / occurs.sum(1).clamp(min=1)
    return each.mean()


def focal_loss(log_p: Tensor, wanted: Tensor, known: Tensor, gamma: float = 2.0) -> Tensor:
    """-(1 - p)^gamma log p of the wanted segment, the mean over each sample's known places, then over samples (Lin et al. 2017,
    arXiv 1708.02002), so that a batch may be cut into parts, for ranks or accumulation.

    Args:
        log_p: (B, N, K). wanted, known: as in `dice_loss`.
    """
    log_p = log_p.gather(2, wanted[..., None])[..., 0]
    each = -((1 - log_p.exp()).clamp(min=0) ** gamma) * log_p * known
    return (each.sum(1) / known.sum(1).clamp(min=1)).mean()
