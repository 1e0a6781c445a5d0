"""Residual finite scalar quantization with nested dropout: each stage refines what the stages before it left over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.quantizers.base import CodeQuantizer, _linear
from tokgen.quantizers.fsq import FSQ


class ResidualFSQ(CodeQuantizer):
    """`num_quantizers` FSQ stages (arXiv 2309.15505) over learned projections; the code is the sum of the stages' codes.

    Stage i projects z minus the codes so far to a few channels, rounds them to its levels, and projects back. There is no
    codebook that could collapse and no loss. With nested dropout (Rippel et al. 2014, arXiv 1402.0915) the first stages learn to
    stand alone, so that fewer ids still decode. `ids` are (..., C); `lookup` also takes the first c < C of them.

    Args:
        dim: channels of z.
        levels: of every stage, see `FSQ`.
        num_quantizers: number of stages C.
        dropout: share of the vectors that, in training, keep only the first 1 .. C-1 stages, each number equally often.

    Raises:
        ConfigError: no stage, a dropout outside [0, 1], or levels that FSQ refuses.
    """

    def __init__(self, dim: int, levels: list[int], num_quantizers: int, dropout: float = 0.0) -> None:
        if num_quantizers < 1 or not 0 <= dropout <= 1:
            raise ConfigError(
                f"ResidualFSQ: num_quantizers {num_quantizers}, dropout {dropout}; expected at least 1, and a share in [0, 1]"
            )
        stages = [FSQ(dim, levels) for _ in range(num_quantizers)]
        super().__init__(dim, None, stages[0].codebook_sizes * num_quantizers)
        self.stages, self.dropout = nn.ModuleList(stages), dropout
        if dropout:  # its draws follow from the number of the step, so that training resumes exactly
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    def example_options(cls) -> dict[str, dict[str, Any]]:
        return {
            "plain": {"levels": [8, 5, 5], "num_quantizers": 3},
            "nested": {"levels": [4, 4, 3], "num_quantizers": 2, "dropout": 0.5},
        }

    def assign(self, y: Tensor) -> Tensor:
        ids = []
        for stage in self.stages:
            ids.append(stage.assign(_linear(stage.project_in, y)))  # (n,)
            y = y - _linear(stage.project_out, stage.embed(ids[-1]))
        return torch.stack(ids, -1)  # (n, C)

    def embed(self, ids: Tensor) -> Tensor:
        if ids.shape[-1] > len(self.stages):
            raise ConfigError(f"ids of {ids.shape[-1]} codebooks for a ResidualFSQ of {len(self.stages)}")
        parts = [_linear(s.project_out, s.embed(i)) for s, i in zip(self.stages, ids.unbind(-1))]
        return torch.stack(parts).sum(0)

    def train_step(self, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        n, count = len(y), len(self.stages)
        kept = torch.full((n,), count, device=y.device)
        if count > 1 and self.dropout:
            generator = torch.Generator().manual_seed(int(self.steps))
            fewer = torch.randint(1, count, (n,), generator=generator)
            cut = torch.rand(n, generator=generator) < self.dropout
            kept = torch.where(cut.to(y.device), fewer.to(y.device), kept)
            self.steps += 1
        codes, ids = torch.zeros_like(y), []
        for i, stage in enumerate(self.stages):
            part, chosen, _ = stage.train_step(_linear(stage.project_in, y - codes), None)
            codes = codes + torch.where((i < kept)[:, None], _linear(stage.project_out, part), 0)
            ids.append(chosen)
        return codes, torch.stack(ids, -1), {}
