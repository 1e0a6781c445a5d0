"""Weight-only int8 is the nearest matrix with 127 steps a row, whichever way it is multiplied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokgen.nn import int8
from tokgen.nn.int8 import Int8Linear, Int8Weight, to_int8


def test_rounding_is_within_half_a_step():
    weight = torch.randn(24, 40) * torch.logspace(-6, 3, 24)[:, None]
    packed = Int8Weight.of(weight)
    step = packed.scale.float()[:, None]
    # the scale itself is rounded to bfloat16, which may cost the largest value of a row up to 1/256 of it
    bound = torch.maximum(step / 2, weight.abs() / 256 + step / 2)
    assert ((packed.values * step - weight).abs() <= bound).all()
    assert packed.values.abs().amax(1).min() >= 126
    zero = Int8Weight.of(torch.zeros(3, 4))
    assert zero.values.eq(0).all() and zero.scale.isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, int8.FEW_ROWS, int8.FEW_ROWS + 1, 40])
def test_the_product_is_that_of_the_rounded_matrix(rows):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    layer = Int8Linear(linear.weight, linear.bias)
    x = torch.randn(rows, 64).bfloat16().float()
    exact = x @ (layer.values * layer.scale.float()[:, None]).T + linear.bias
    torch.testing.assert_close(layer(x), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(layer(x), linear(x), rtol=5e-2, atol=3e-2)
    assert layer(x).dtype == torch.float32 and layer(x.bfloat16()).dtype == torch.float32  # the bias is float32
    assert layer(x.view(1, rows, 64)).shape == (1, rows, 48)


@pytest.mark.parametrize("width", [8, 18, 24, 40])
def test_widths_that_are_no_whole_vectors(width):
    torch.manual_seed(0)
    packed, x = Int8Weight.of(torch.randn(12, width)), torch.randn(3, width).bfloat16()
    exact = x.float() @ (packed.values * packed.scale.float()[:, None]).T
    torch.testing.assert_close(packed.linear(x).float(), exact, rtol=2e-2, atol=5e-2)


def test_slices_are_of_rows():
    packed, x = Int8Weight.of(torch.randn(10, 16)), torch.randn(2, 16)
    torch.testing.assert_close(packed[3:7].linear(x), packed.linear(x)[:, 3:7])


def test_only_linear_layers_change():
    module = to_int8(nn.Sequential(nn.Embedding(5, 8), nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8))))
    assert isinstance(module[1][0], Int8Linear) and module[1][0].bias is None
    assert isinstance(module[0], nn.Embedding) and isinstance(module[1][1], nn.LayerNorm)
    assert not [name for name, _ in module.named_parameters() if name.startswith("1.0")]
