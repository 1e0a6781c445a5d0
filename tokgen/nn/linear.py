"""Linear layers that are also fast for the two rows of a guided decoding step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`. On the CPU in float32 and without gradients, two to four rows go as weight @ x^T: the same product, for which
    BLAS reads the weights at memory speed and not at a third of it (`tests/benchmarks/bench_linear.py`).
    """
    rows = x.numel() // x.shape[-1]
    if not 2 <= rows <= 4 or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    out = (weight @ x.reshape(rows, -1).T).T.contiguous()  # (rows, N)
    return (out if bias is None else out + bias).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
