"""Codes as a generator knows them by the tokenizer's codebook, not by embeddings and logits of its own.

What a language model has learned to read through a projector (ETT, arXiv 2505.10562, sec. 3.1) it can then draw with: the
input of a code is its projected vector. ETT does not say how its generator predicts a code; a linear map to the width of
the codebook, and the inner product with each vector, needs neither embeddings nor a head that grow with the codebook.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.nn.linear import linear
from tokgen.nn.projector import Projector


class CodeVectors(nn.Module):
    """A frozen codebook, and the projector that embeds its vectors.

    Attributes:
        codebook: float32 (K, code_dim), saved with the weights; NaN until it is given, so that forgetting it shows.

    Args:
        codes: K.
        code_dim: width of a vector.
        dim: of the generator.
        layers: of the projector; 0: there is none, and `forward` is not called.
    """

    def __init__(self, codes: int, code_dim: int, dim: int, layers: int) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.full((codes, code_dim), math.nan))
        self.projector = Projector(code_dim, dim, layers) if layers else None

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., dim) of ids int64 (...)."""
        return self.projector(F.embedding(ids, self.codebook))

    def take(self, table: Tensor) -> None:
        """Keep the vectors of the codes. Raises ConfigError for another shape, or vectors that are not finite."""
        if table.shape != self.codebook.shape:
            raise ConfigError(
                f"the tokenizer's codebook is {tuple(table.shape)}, the generator reads one of {tuple(self.codebook.shape)}; "
                "set config.code_dim, or use the tokenizer that it was made for"
            )
        if not bool(table.isfinite().all()):
            raise ConfigError("the tokenizer's codebook holds NaN or infinite values; train the tokenizer anew")
        with torch.no_grad():
            self.codebook.copy_(table)

    def logits(self, states: Tensor) -> Tensor:
        """(..., K) inner products of states (..., code_dim) with all codes."""
        return linear(states, self.codebook.to(states.dtype))
