"""The layer for few rows is the ordinary one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokgen.nn.linear import Linear, linear


@pytest.mark.parametrize("shape", [(1, 16), (2, 1, 16), (3, 16), (1, 4, 16), (5, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_ordinary_linear_layer(shape, bias):
    layer, x = Linear(16, 24, bias=bias), torch.randn(shape)
    with torch.no_grad():
        out = layer(x)
    assert out.shape == (*shape[:-1], 24) and out.is_contiguous()
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)  # with gradients
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_other_dtypes_stay_as_they_are():
    x, weight = torch.randn(2, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    assert torch.equal(linear(x, weight), F.linear(x, weight))
