"""Binary codes without a codebook: LFQ (MAGVIT-v2, arXiv 2310.05737) and BSQ (arXiv 2406.07548).

One bit per channel, its sign. Both train with the entropy term mean H(p_i) - H(mean p_i) over soft assignments
p_i = softmax(-|y_i - codes|^2 / temperature) to all 2^bits codes. Given y_i its bits are independent under p_i, each with
logit 4 s y / temperature (s: the size of a code's channels), so that nothing of size 2^bits is ever needed:

- H(p_i) is the sum of the entropies of the bits, exactly.
- H(mean p_i) does not factorise, because a mixture correlates the bits. It is computed over groups of bits, each group
  exactly, and summed (Open-MAGVIT2, arXiv 2409.04410; BSQ, sec. 3.2). The sum is an upper bound, tight if the groups are
  independent over the batch. One group of all bits is exact, and the default up to 12 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokgen.errors import ConfigError
from tokgen.quantizers.base import CodeQuantizer, masked_mean, straight_through

EXACT_BITS = 12  # entropies of the batch mean are exact up to here
GROUP_BITS = 9
CHUNK = 1 << 20  # probabilities of one block (4 MiB)


class _Binary(CodeQuantizer):
    """Codes of +-s in each channel; the id reads the signs as a binary number, first channel highest."""

    def __init__(
        self,
        dim: int,
        bits: int,
        beta: float,
        entropy_weight: float,
        diversity: float,
        temperature: float,
        group_bits: int | None,
    ) -> None:
        name = type(self).__name__
        if not 1 <= bits <= 62:
            raise ConfigError(f"{name}: bits {bits}; expected 1 to 62, the id is a 64-bit integer")
        if group_bits is not None and not 1 <= group_bits <= EXACT_BITS:
            raise ConfigError(f"{name}: group_bits {group_bits}; expected 1 to {EXACT_BITS}")
        if not temperature > 0:
            raise ConfigError(f"{name}: temperature {temperature}; expected a number above 0")
        super().__init__(dim, bits, (2**bits,))
        self.bits, self.beta = bits, beta
        self.entropy_weight, self.diversity, self.temperature = entropy_weight, diversity, temperature
        self.groups = bit_groups(bits, group_bits)
        self.register_buffer("basis", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)  # int64 (bits,)

    @property
    def size(self) -> float:
        """s, the absolute value of a code's channels."""
        return 1.0

    def metric_space(self, y: Tensor) -> Tensor:
        return y

    def assign(self, y: Tensor) -> Tensor:
        return ((y > 0) * self.basis).sum(-1)

    def embed(self, ids: Tensor) -> Tensor:
        return torch.where((ids[:, None] & self.basis) != 0, self.size, -self.size)

    def train_step(self, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        y = self.metric_space(y)
        ids = self.assign(y)
        codes = self.embed(ids)
        losses = {}
        if self.beta:
            losses["commitment"] = self.beta * masked_mean((y - codes).square(), keep)
        if self.entropy_weight:
            logits = (y if keep is None else y[keep]) * (4 * self.size / self.temperature)
            each, mean = bit_entropies(logits, self.groups)
            losses["entropy"] = self.entropy_weight * (each - self.diversity * mean)
        return straight_through(y, codes), ids, losses


class LFQ(_Binary):
    """Lookup-free quantization: codes of +-1 (arXiv 2310.05737, sec. 3.1).

    Losses: commitment = beta * mean (y - code)^2; entropy = entropy_weight * (mean H(p_i) - diversity * H(mean p_i)) in
    nats over this rank's batch (eq. 7).

    Args:
        dim: channels of z. Unless it is `bits`, linear projections lead in and out.
        bits: the codebook has 2^bits codes.
        beta: weight of the commitment term; 0 leaves it out.
        entropy_weight: weight of the entropy term; 0 leaves it out.
        diversity: weight of the batch's entropy inside the entropy term.
        temperature: of the soft assignments.
        group_bits: bits per group in the entropy of the batch, at most 12. Default: all bits if there are at most 12,
            else even groups of at most 9.

    Raises:
        ConfigError: a value outside the above.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        beta: float = 0.25,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 0.01,
        group_bits: int | None = None,
    ) -> None:
        super().__init__(dim, bits, beta, entropy_weight, diversity, temperature, group_bits)

    @classmethod
    def example_options(cls) -> dict[str, dict[str, Any]]:
        return {
            "plain": {"bits": 8},
            "projected": {"bits": 13, "temperature": 1.0},
        }


class BSQ(_Binary):
    """Binary spherical quantization: y on the unit sphere, codes of +-1/sqrt(bits) on it too (arXiv 2406.07548, sec. 3.1).

    Losses and arguments as in `LFQ`; temperature is 2 / tau of the paper's soft quantization (sec. 3.2).
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        beta: float = 0.25,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 0.01,
        group_bits: int | None = None,
    ) -> None:
        super().__init__(dim, bits, beta, entropy_weight, diversity, temperature, group_bits)

    @classmethod
    def example_options(cls) -> dict[str, dict[str, Any]]:
        return {
            "plain": {"bits": 8},
            "projected": {"bits": 36, "temperature": 1.0},
        }

    @property
    def size(self) -> float:
        return self.bits**-0.5

    def metric_space(self, y: Tensor) -> Tensor:
        return F.normalize(y, dim=-1)


def bit_groups(bits: int, group_bits: int | None = None) -> list[int]:
    """Sizes of the groups that `bits` bits fall into, as even as can be, none above `group_bits`."""
    if group_bits is None:
        group_bits = bits if bits <= EXACT_BITS else GROUP_BITS
    count = -(-bits // group_bits)
    return [bits // count + (i < bits % count) for i in range(count)]


def bit_entropies(logits: Tensor, groups: list[int]) -> tuple[Tensor, Tensor]:
    """(mean of H(p_i), sum over groups of H(mean of p_i)) in nats for independent bits.

    Args:
        logits: (n, bits), log-odds of each bit.
        groups: sizes of the groups of neighbouring bits; they sum to `bits`.

    Blocks of rows are recomputed in backward: memory is a few blocks of CHUNK probabilities, whatever n is.
    """
    if not len(logits):
        return logits.sum(), logits.sum()
    # H(sigmoid(a)) = softplus(-|a|) + |a| sigmoid(-|a|): exact where 1 - p would round to 1
    a = logits.abs()
    each = (F.softplus(-a) + a * torch.sigmoid(-a)).sum(1).mean()

    total = logits.new_zeros(())
    for group in logits.split(groups, dim=1):
        mean = logits.new_zeros(2 ** group.shape[1])
        for chunk in group.split(max(1, CHUNK >> group.shape[1])):
            mean = mean + checkpoint(_joint_sum, chunk, use_reentrant=False, preserve_rng_state=False)
        mean = mean / len(logits)
        total = total - (mean * mean.clamp(min=1e-12).log()).sum()
    return each, total


def _joint_sum(logits: Tensor) -> Tensor:
    """Sum over rows of the joint probabilities (2^g,) of g independent bits; logits (n, g), first bit highest."""
    joint = logits.new_ones(len(logits), 1)
    for p, q in zip(torch.sigmoid(-logits).unbind(1), torch.sigmoid(logits).unbind(1)):
        joint = (joint[:, :, None] * torch.stack([p, q], 1)[:, None]).flatten(1)  # (n, 2^i) -> (n, 2^(i+1))
    return joint.sum(0)
