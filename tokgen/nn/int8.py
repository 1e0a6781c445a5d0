"""Weight-only int8: each output channel's weights as 8-bit integers and one scale, activations in bfloat16.

A decoding step reads every weight once and does little with it, so its time is that of reading: a quarter of the bytes of
float32. The product accumulates in float32 and is rounded to bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8  # up to here the CPU kernel beats unpacking the weights first
WHOLE = 32  # the CPU kernel reads past the end of rows that are not whole vectors: a width must be a multiple of this


@dataclass(frozen=True)
class Int8Weight:
    """A matrix (N, K) as int8 `values` (N, K) times `scale` (N,) in bfloat16. Slices are of rows."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """Symmetric rounding, the largest magnitude of each row at 127."""
        weight = weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        # rounded for the scale as it is stored, so that its own rounding adds nothing
        scale = scale.bfloat16()
        values = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        return cls(values.contiguous(), scale)

    def __getitem__(self, rows: slice) -> Int8Weight:
        return Int8Weight(self.values[rows], self.scale[rows])

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., K) times the transposed matrix, plus the bias: (..., N), in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()  # (M, K)
        if x.device.type == "cpu" and len(rows) <= FEW_ROWS and rows.shape[1] % WHOLE == 0:
            out = torch.ops.aten._weight_int8pack_mm(rows, self.values, self.scale)
        else:
            out = F.linear(rows, self.values.to(rows.dtype)) * self.scale
        out = out.to(x.dtype) if bias is None else out.to(x.dtype) + bias
        return out.view(*x.shape[:-1], len(self.scale))


class Int8Linear(nn.Module):
    """A frozen linear layer with int8 weights.

    Args:
        weight, bias: of the layer to round, (N, K) and (N,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        packed = Int8Weight.of(weight)
        self.register_buffer("values", packed.values)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.bias)


def to_int8(module: nn.Module) -> nn.Module:
    """Replace every `nn.Linear` inside `module`, in place; other layers stay. Returns it."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child.weight, child.bias))
        else:
            to_int8(child)
    return module
