"""SimVQ: a frozen random codebook behind one learned linear layer (arXiv 2411.02038)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.quantizers.base import CodeQuantizer, masked_mean, straight_through
from tokgen.quantizers.search import nearest
from tokgen.quantizers.vq import rotate_to


class SimVQ(CodeQuantizer):
    """Nearest code of C W, where C (codebook_size, code_dim) stays as drawn and W (code_dim, code_dim) is learned.

    A step moves every code, used or not, through W; so no code dies (sec. 4). State: buffer `codebook.weight` (C) and
    parameter `transform.weight` (W transposed, as nn.Linear keeps it).

    Losses: codebook = mean (sg[y] - code)^2, commitment = beta * mean (y - sg[code])^2; means over all elements.

    Args:
        dim: channels of z.
        codebook_size: number of codes.
        code_dim: channels of the codes; if it differs from `dim`, linear projections lead in and out.
        beta: weight of the commitment term.
        rotation_trick: see `tokgen.quantizers.vq.VQ`.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        code_dim: int | None = None,
        beta: float = 0.25,
        rotation_trick: bool = False,
    ) -> None:
        super().__init__(dim, code_dim, (codebook_size,))
        self.beta, self.rotation_trick = beta, rotation_trick
        self.codebook = nn.Module()
        self.codebook.register_buffer("weight", torch.randn(codebook_size, self.code_dim) * self.code_dim**-0.5)
        self.transform = nn.Linear(self.code_dim, self.code_dim, bias=False)

    @classmethod
    def example_options(cls) -> dict[str, dict[str, Any]]:
        return {
            "plain": {"codebook_size": 48},
            "projected": {"codebook_size": 48, "code_dim": 4, "rotation_trick": True},
        }

    def transformed(self, codes: Tensor) -> Tensor:
        return F.linear(codes.float(), self.transform.weight.float())

    def assign(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            return nearest(y, self.transformed(self.codebook.weight))

    def embed(self, ids: Tensor) -> Tensor:
        return self.transformed(F.embedding(ids, self.codebook.weight))

    def train_step(self, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        ids = self.assign(y)
        codes = self.embed(ids)
        losses = {
            "codebook": masked_mean((codes - y.detach()).square(), keep),
            "commitment": self.beta * masked_mean((y - codes.detach()).square(), keep),
        }
        codes = codes.detach()
        return (rotate_to(y, codes) if self.rotation_trick else straight_through(y, codes)), ids, losses
