"""From a sequence of codes back to the features of a picture's places (LaVIT, arXiv 2309.04669, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokgen.nn.vit import CrossBlock


class FeatureDecoder(nn.Module):
    """Learned queries, one for each place, read the codes by cross-attention and become the features of their places.

    Codes get a position by their order among the tokens, not by their place in the picture.

    Args:
        code_dim, length: channels of the codes, and the greatest number of them.
        places, dim: number and channels of the features.
        width, heads, hidden, depth: of the transformer.
    """

    def __init__(
        self, code_dim: int, length: int, places: int, dim: int, width: int, heads: int, hidden: int, depth: int
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(code_dim, width)
        self.positions = nn.Parameter(torch.zeros(1, length, width))
        self.queries = nn.Parameter(torch.zeros(1, places, width))
        self.blocks = nn.ModuleList(CrossBlock(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-5)
        self.leave = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim))
        for p in (self.positions, self.queries):
            nn.init.trunc_normal_(p, std=0.02)

    def context(self, codes: Tensor, mask: Tensor) -> Tensor:
        """What the queries read, (B, n, width), of codes (B, n, code_dim) and mask bool (B, n)."""
        order = (mask.cumsum(1) - 1).clamp(min=0)  # wherever padding stands, before the tokens or after
        return self.enter(codes.to(self.enter.weight.dtype)) + self.positions[0][order]

    def forward(self, codes: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Features (B, N, dim) of codes (B, n, code_dim).

        Args:
            mask: bool (B, n), True where a code is real; None: all are.
            weight: float (B, n), 1 where a code is real: factors of the attention weights before they are normalised. They
                change nothing, but carry gradients to the selector, as the masks of the merger do.
        """
        mask = torch.ones(codes.shape[:2], dtype=torch.bool, device=codes.device) if mask is None else mask
        context, seen = self.context(codes, mask), mask
        if weight is not None:
            logits = weight.masked_fill(~mask, 1).log()  # a factor of exp(a) is a summand of a
            seen = logits.masked_fill(~mask, -torch.inf)
        x = self.queries.expand(len(codes), -1, -1)
        for block in self.blocks:
            x = block(x, context, seen)
        return self.leave(self.norm(x))
