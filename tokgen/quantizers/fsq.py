"""Finite scalar quantization: each channel bounded and rounded to a few levels (arXiv 2309.15505)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokgen.errors import ConfigError
from tokgen.quantizers.base import CodeQuantizer, straight_through


class FSQ(CodeQuantizer):
    """A grid of fixed codes, one of `levels[i]` values in [-1, 1] per channel. No losses, no state.

    The id is the number of the levels in mixed radix, the first channel fastest (sec. 3 and appendix A.1). The paper's
    choices of levels (table 1): 2^8 codes 8 6 5; 2^10 8 5 5 5; 2^12 7 5 5 5 5; 2^14 8 8 8 6 5; 2^16 8 8 8 5 5 5.

    Args:
        dim: channels of z. Unless it is len(levels), linear projections lead in and out.
        levels: number of levels of each channel, at least 3. (Two levels do not work in this scheme: a value of 0 lies in
            the middle of the upper one. For one bit per channel there are LFQ and BSQ.)

    Raises:
        ConfigError: fewer than 3 levels in a channel, no channel, or more codes than int64 counts.
    """

    def __init__(self, dim: int, levels: list[int]) -> None:
        if not levels or any(int(level) != level or level < 3 for level in levels):
            raise ConfigError(
                f"FSQ: levels {levels}; expected whole numbers of at least 3, such as [8, 5, 5, 5] (for 2 use lfq or bsq)"
            )
        if math.prod(levels) >= 2**62:
            raise ConfigError(f"FSQ: levels {levels} make more codes than a 64-bit id can count; use fewer channels")
        super().__init__(dim, len(levels), (math.prod(levels),))
        self.register_buffer("levels", torch.tensor(levels), persistent=False)  # int64 (c,)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)  # int64 (c,)

    @classmethod
    def example_options(cls) -> dict[str, dict[str, Any]]:
        return {
            "plain": {"levels": [5, 4, 3, 3, 3, 4, 3, 3]},
            "projected": {"levels": [8, 5, 5, 5]},
        }

    def bound(self, y: Tensor) -> Tensor:
        """y (n, c) into the open range that rounds to the levels, -L//2 .. (L-1)//2; even L are shifted by half a step.

        A margin of 1e-3 lets the outermost levels be reached. 0 stays 0 up to that margin.
        """
        half = (self.levels - 1).float() * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (y + (offset / half).atanh()).tanh() * half - offset

    def assign(self, y: Tensor) -> Tensor:
        # integers from here on: an id of 2^24 and more has no place in fp32
        digits = self.bound(y).nan_to_num(0.0).round().long() + self.levels // 2
        return (digits * self.basis).sum(-1)

    def embed(self, ids: Tensor) -> Tensor:
        width = self.levels // 2
        digits = ids[:, None] // self.basis % self.levels
        return (digits - width).float() / width

    def train_step(self, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        ids = self.assign(y.detach())
        return straight_through(self.bound(y) / (self.levels // 2), self.embed(ids)), ids, {}
