"""Adversarial losses on a discriminator's logits, LeCam regularisation, and the adaptive weight.

All functions take logits of any shape, as (real, fake) in this order, and give an fp32 scalar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.quantizers.base import sum_over_ranks

KINDS = ("hinge", "non-saturating")


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the discriminator minimises.

    hinge: (E[max(0, 1 - real)] + E[max(0, 1 + fake)]) / 2 (Lim and Ye, arXiv 1705.02894).
    non-saturating: (E[softplus(-real)] + E[softplus(fake)]) / 2, which is binary cross-entropy with logits against
    targets 1 and 0 (Goodfellow et al., arXiv 1406.2661).

    Raises:
        ConfigError: unknown kind.
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind == "non-saturating":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    raise ConfigError(f"unknown adversarial loss {kind!r}; expected one of {', '.join(KINDS)}")


def generator_loss(fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the generator minimises: -E[fake] for hinge, E[softplus(-fake)] for non-saturating."""
    fake = fake.float()
    if kind == "hinge":
        return -fake.mean()
    if kind == "non-saturating":
        return F.softplus(-fake).mean()
    raise ConfigError(f"unknown adversarial loss {kind!r}; expected one of {', '.join(KINDS)}")


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al., arXiv 2104.03310, eq. 4): E[(real - a_F)^2] + E[(fake - a_R)^2].

    a_R and a_F are exponential moving averages of the discriminator's mean prediction on real and reconstructed pictures
    over all ranks; they are buffers, so that a checkpoint carries them.

    Args:
        decay: of the two averages.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Move the averages by this batch's logits (any shapes)."""
        sums = torch.stack([real.float().mean(), fake.float().mean(), real.new_ones((), dtype=torch.float32)])
        sums = sum_over_ranks(sums)
        means = sums[:2] / sums[2]
        self.real.lerp_(means[0], 1 - self.decay)
        self.fake.lerp_(means[1], 1 - self.decay)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The regulariser, fp32 scalar; in training the averages are moved first."""
        if self.training:
            self.update(real, fake)
        return (real.float() - self.fake).square().mean() + (fake.float() - self.real).square().mean()


def adaptive_weight(reconstruction_grad: Tensor, adversarial_grad: Tensor, maximum: float, eps: float = 1e-4) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + eps), clamped to [0, maximum] (VQGAN, arXiv 2012.09841, eq. 7).

    Args:
        reconstruction_grad, adversarial_grad: gradients of the two losses at the decoder's last layer, averaged over
            ranks, so that the weight is that of the whole batch.

    Returns:
        Scalar fp32, detached; 0 if a gradient is not finite.
    """
    weight = reconstruction_grad.float().norm() / (adversarial_grad.float().norm() + eps)
    return torch.nan_to_num(weight, nan=0.0, posinf=0.0).clamp(0, maximum).detach()
