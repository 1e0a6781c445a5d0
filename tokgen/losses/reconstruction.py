"""Pixel losses between a picture and its reconstruction."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tokgen.errors import ConfigError

KINDS = ("l1", "l2", "smooth_l1")


def reconstruction_loss(reconstruction: Tensor, target: Tensor, kind: str = "l2") -> Tensor:
    """Mean over all elements, scalar fp32, of |r - t|, (r - t)^2 or Huber's function of them with its knee at 0.1.

    Args:
        reconstruction: float (...), not clamped, so that what lies outside [0, 1] is punished.
        target: float of the same shape, in [0, 1].
        kind: "l1", "l2" or "smooth_l1".

    Raises:
        ConfigError: unknown kind.
    """
    reconstruction, target = reconstruction.float(), target.float()
    if kind == "l1":
        return F.l1_loss(reconstruction, target)
    if kind == "l2":
        return F.mse_loss(reconstruction, target)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(reconstruction, target, beta=0.1)
    raise ConfigError(f"unknown reconstruction loss {kind!r}; expected one of {', '.join(KINDS)}")
