"""Transformer blocks of vision transformers: LayerNorm first, attention with biases, GELU.

Parameter names (`qkv`, `proj`, `fc1`, `fc2`, `q_bias`, `v_bias`) are those of timm and EVA, so that published weights map
without renaming. Attention goes through `scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim, heads: width, and heads that it is split into.
        bias: of queries, keys and values: "all" in one vector, "qv" as EVA has it (`q_bias` and `v_bias`, none on keys,
            which would change nothing), "none".
    """

    def __init__(self, dim: int, heads: int, bias: str = "all") -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias == "all")
        if bias == "qv":
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        else:
            self.q_bias = self.v_bias = None
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, heads, N, d), of x (B, N, dim)."""
        bias = self.qkv.bias
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (B, N, dim) -> (B, N, dim); `mask` bool, broadcastable to (B, heads, N, N), True where a query sees a key."""
        q, k, v = self.project(x)
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)))


class CrossAttention(nn.Module):
    """Multi-head attention to other tokens.

    Args:
        dim, heads: as in `SelfAttention`.
        context_dim: width of the tokens that are attended to.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(context_dim or dim, dim)
        self.value = nn.Linear(context_dim or dim, dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, N, d), keys and values (B, heads, M, d)."""
        parts = self.query(x), self.key(context), self.value(context)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        return q, k, v

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, dim), context (B, M, context_dim), `mask` bool broadcastable to (B, heads, N, M) -> (B, N, dim)."""
        q, k, v = self.project(x, context)
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class MLP(nn.Module):
    """fc2(activation(fc1 x)), both with bias; `activation` one of `ACTIVATIONS`."""

    def __init__(self, dim: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm1 x), then x + mlp(norm2 x).

    Args:
        dim, heads, hidden: width, heads, width inside the MLP.
        eps: of the norms.
        bias: see `SelfAttention`.
        activation: see `MLP`.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, eps: float = 1e-6, bias: str = "all", activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps), SelfAttention(dim, heads, bias)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps), MLP(dim, hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, causal)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """x + attention(norm0 x), then x + cross-attention(norm1 x, context), then x + mlp(norm2 x).

    Args:
        context_dim: width of the context; None: that of x.
    """

    def __init__(self, dim: int, heads: int, hidden: int, context_dim: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm0, self.self_attn = nn.LayerNorm(dim, eps), SelfAttention(dim, heads)
        self.norm1, self.cross_attn = nn.LayerNorm(dim, eps), CrossAttention(dim, heads, context_dim)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps), MLP(dim, hidden)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """`context_mask` (B, M): bool, True where a token of the context is real, or float, added to the logits."""
        mask = None if context_mask is None else context_mask[:, None, None]
        x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), context, mask)
        return x + self.mlp(self.norm2(x))


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Learned positions (..., n * n, C) for a grid of side x side, bicubic, as DINO's code does it.

    The scale is given as (side + 0.1) / n instead of the size, which moves the sampled places a little: networks that were
    run this way need it. fp32 under any autocast.
    """
    n = round(positions.shape[-2] ** 0.5)
    if n == side:
        return positions
    with torch.autocast(positions.device.type, enabled=False):
        grid = positions.float().reshape(1, n, n, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(*positions.shape[:-2], side * side, -1).to(positions.dtype)
