"""Code vectors to the width of a language model: linear maps with GELU between them (LLaVA-1.5, arXiv 2310.03744, sec. 3.1).

ETT (arXiv 2505.10562, sec. 3.1) has such a projector and does not say how deep; two layers, of the model's width, are taken.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.nn.linear import Linear


class Projector(nn.Module):
    """(..., code_dim) to (..., dim).

    Args:
        code_dim: width of a code vector.
        dim: of the language model, and between the layers.
        layers: linear maps; 1 is a plain one.
    """

    def __init__(self, code_dim: int, dim: int, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(code_dim if i == 0 else dim, dim) for i in range(layers))

    def forward(self, codes: Tensor) -> Tensor:
        x = codes
        for i, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if i else x)
        return x
