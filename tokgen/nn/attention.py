"""Decoder blocks of the LLaMA family: RMSNorm, rotary positions, attention with a static cache, SwiGLU.

Parameter names and the rotation of interleaved pairs (2i, 2i + 1) are LlamaGen's (Sun et al. 2024, arXiv 2406.06525), so
its weights load without permuting rows. Attention always goes through `scaled_dot_product_attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.nn.linear import Linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019); the mean of squares in fp32.

    Args:
        dim: size of the last dimension.
        eps: added to the mean of squares.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight.to(x.dtype)


# -- rotary positions (Su et al. 2021, arXiv 2104.09864) ----------------------------------------------------------------


def rope_table(positions: Tensor, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation at given positions.

    With one axis, pair j turns by `position * base^(-2j / head_dim)`. With A axes the pairs are split evenly: the first
    `head_dim / 2A` follow axis 0, the next axis 1, and so on, each with frequencies `base^(-2j / (head_dim / A))`; for
    A = 2 these are LlamaGen's rows and columns.

    Args:
        positions: (B, L, A), any integer or float dtype.
        head_dim: a multiple of 2A.

    Returns:
        cos and sin, each float32 (B, L, head_dim / 2).
    """
    axes = positions.shape[-1]
    width = head_dim // axes  # channels that follow one axis
    frequency = base ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angle = (positions.float()[..., None] * frequency).flatten(-2)  # (B, L, A, width/2) -> (B, L, head_dim/2)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each interleaved pair of x (B, L, heads, head_dim) by the angle at its position; fp32 inside."""
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B, L, 1, head_dim/2)
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses this form but not complex numbers
        a, b = pairs.unbind(-1)
        out = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    else:  # one pass over memory instead of six: 3.4 times as fast, forward and backward
        out = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return out.flatten(-2).to(x.dtype)


# -- attention ----------------------------------------------------------------------------------------------------------


def prefix_attention(prefix_mask: Tensor, length: int) -> Tensor:
    """Which keys each query sees, bool (B, 1, L, L): causal, no padding; a padded token sees itself, so that none is blind."""
    seen = F.pad(prefix_mask, (0, length - prefix_mask.shape[1]), value=True)[:, None, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    return causal & seen | torch.eye(length, dtype=torch.bool, device=seen.device)


class KVCache:
    """Keys and values of all layers, allocated once for a whole sequence.

    Args:
        layers, batch, heads, length, head_dim: sizes; `heads` counts key-value heads.

    Attributes:
        k, v: one tensor (batch, heads, length, head_dim) per layer: in a compiled step, writing to a part of a tensor that all
            layers shared would copy all of it. Zeros at first: a slot that was never written is masked, and masking is
            only harmless over finite numbers.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.length = length
        self.k, self.v = (
            [torch.zeros(batch, heads, length, head_dim, device=device, dtype=dtype) for _ in range(layers)]
            for _ in range(2)
        )

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values of layer i; writing to them writes here."""
        return self.k[i], self.v[i]


class Attention(nn.Module):
    """Self-attention; `n_kv_heads < n_heads` is grouped-query attention (Ainslie et al. 2023).

    Args:
        dim: model width, a multiple of `n_heads`.
        n_heads: query heads.
        n_kv_heads: key-value heads, a divisor of `n_heads`; None means as many as query heads.
        qk_norm: RMSNorm over each head's queries and keys before they are rotated.
        eps: of the query and key norms.
        dropout, residual_dropout: on attention weights and on the output, in training.
        qkv_bias: biases on queries, keys and values (Qwen2's); there are no others.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        qk_norm: bool = False,
        eps: float = 1e-5,
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads or n_heads, dim // n_heads
        self.wqkv = Linear(dim, (n_heads + 2 * self.n_kv_heads) * self.head_dim, bias=qkv_bias)
        self.wo = Linear(n_heads * self.head_dim, dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.dropout, self.residual_dropout = dropout, residual_dropout

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        at: Tensor | None = None,
        end: int | None = None,
        keep: int = 0,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, L, dim).
            rope: cos and sin at these positions, (B, L, head_dim / 2) each.
            mask: bool, broadcastable to (B, heads, L, keys), True where a query sees a key; None is causal without a
                cache, and everything up to `end` with one.
            cache: one layer of a `KVCache`; the new keys and values are written to it.
            at: int64 (L,), the cache slots to write.
            end: attend to the first `end` slots only; None to all, which keeps shapes static for the compiler.
            keep: give the output of positions from here on only; needs a mask.

        Returns:
            (B, L - keep, dim).
        """
        b, length, _ = x.shape
        h, g = self.n_heads, self.n_kv_heads
        qkv = self.wqkv(x).view(b, length, h + 2 * g, self.head_dim)
        qk, v = qkv.split([h + g, g], 2)
        if self.q_norm is not None:
            q, k = qk.split([h, g], 2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        q, k = apply_rope(qk, *rope).split([h, g], 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, L, head_dim)
        if cache is not None:
            keys, values = cache
            keys.index_copy_(2, at, k.to(keys.dtype))
            values.index_copy_(2, at, v.to(values.dtype))
            k, v = (keys, values) if end is None else (keys[:, :, :end], values[:, :, :end])
            k, v = k.to(q.dtype), v.to(q.dtype)
        if keep:
            q, mask = q[:, :, keep:], mask[:, :, keep:]
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and cache is None,
            enable_gqa=h != g,
        )  # (B, heads, L - keep, head_dim)
        out = self.wo(out.transpose(1, 2).reshape(b, length - keep, h * self.head_dim))
        return F.dropout(out, self.residual_dropout, self.training)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) without biases (Shazeer 2020, arXiv 2002.05202); dropout on the output in training."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class DecoderBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, attention: Attention, feed_forward: SwiGLU, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(dim, eps), attention
        self.ffn_norm, self.feed_forward = RMSNorm(dim, eps), feed_forward

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        at: Tensor | None = None,
        end: int | None = None,
        keep: int = 0,
    ) -> Tensor:
        """As `Attention.forward`."""
        x = x[:, keep:] + self.attention(self.attention_norm(x), rope, mask, cache, at, end, keep)
        return x + self.feed_forward(self.ffn_norm(x))
