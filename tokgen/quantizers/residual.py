"""Residual vector quantization: each codebook quantizes what the ones before left over (SoundStream, arXiv 2107.03312).

Built on this package's `VQ`. `vector_quantize_pytorch.ResidualVQ` computes the same codes in eval mode (tested), but its
stages hold all N x K distances, and it keeps float statistics in the dtype of the module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.quantizers.base import CodeQuantizer, straight_through
from tokgen.quantizers.vq import VQ, rotate_to


class ResidualVQ(CodeQuantizer):
    """`num_quantizers` codebooks of one size; the code is the sum of the chosen codes (arXiv 2107.03312, algorithm 1).

    `ids` are (..., C). `lookup` also takes the ids of the first c < C codebooks, and gives the coarser code. Codebook c is
    `stages.c.codebook.weight`. Losses are those of `VQ`, each the mean over stages; gradients of the codes pass straight
    through the whole stack.

    Args:
        dim: channels of z.
        codebook_size: number of codes of each codebook.
        num_quantizers: number of codebooks C.
        code_dim, update, beta, decay, eps, kmeans_init, revive_below, rotation_trick, entropy_weight,
        entropy_temperature: see `tokgen.quantizers.vq.VQ`. The metric is "l2": lengths carry what remains to be coded.

    Raises:
        ConfigError: a value outside the above.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_quantizers: int,
        code_dim: int | None = None,
        update: str = "ema",
        beta: float = 0.25,
        decay: float = 0.99,
        eps: float = 1e-5,
        kmeans_init: bool = True,
        revive_below: float = 0.0,
        rotation_trick: bool = False,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        if num_quantizers < 1:
            raise ConfigError(f"ResidualVQ: num_quantizers {num_quantizers}; expected at least 1")
        super().__init__(dim, code_dim, (codebook_size,) * num_quantizers)
        self.rotation_trick = rotation_trick
        self.stages = nn.ModuleList(
            VQ(
                self.code_dim,
                codebook_size,
                update=update,
                beta=beta,
                decay=decay,
                eps=eps,
                kmeans_init=kmeans_init,
                revive_below=revive_below,
                entropy_weight=entropy_weight,
                entropy_temperature=entropy_temperature,
            )
            for _ in range(num_quantizers)
        )

    @classmethod
    def example_options(cls) -> dict[str, dict[str, Any]]:
        return {
            "ema": {"codebook_size": 16, "num_quantizers": 3, "revive_below": 0.05},
            "gradient": {
                "codebook_size": 32,
                "num_quantizers": 2,
                "code_dim": 4,
                "update": "gradient",
                "rotation_trick": True,
            },
        }

    def assign(self, y: Tensor) -> Tensor:
        ids = []
        for stage in self.stages:
            ids.append(stage.assign(y))  # (n,)
            y = y - stage.embed(ids[-1])
        return torch.stack(ids, -1)  # (n, C)

    def embed(self, ids: Tensor) -> Tensor:
        if ids.shape[-1] > len(self.stages):
            raise ConfigError(f"ids of {ids.shape[-1]} codebooks for a ResidualVQ of {len(self.stages)}")
        return torch.stack([stage.embed(i) for stage, i in zip(self.stages, ids.unbind(-1))]).sum(0)

    def train_step(self, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        residual, ids, losses = y, [], []
        for stage in self.stages:
            codes, i, terms = stage.fit(residual, keep)
            residual = residual - codes
            ids.append(i)
            losses.append(terms)
        total = (y - residual).detach()
        codes = rotate_to(y, total) if self.rotation_trick else straight_through(y, total)
        means = {name: torch.stack([terms[name] for terms in losses]).mean() for name in losses[0]}
        return codes, torch.stack(ids, -1), means
