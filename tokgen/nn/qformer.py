"""The Q-Former (BLIP-2: Li et al. 2023, arXiv 2301.12597, section 3.1): BERT whose input is a few learned queries.

The queries attend to each other, in every second layer also to the features of a picture, and so become a short sequence
that stands for it. Captions may pass through the same self-attention, with feed-forward layers of their own. SEED
(arXiv 2307.08041, section 3) lets each query see only those before it, `causal=True`.

BERT's form: normalisation after each residual sum (eps 1e-12), exact GELU, dropout 0.1 on embeddings, attention and outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError, InputError
from tokgen.nn.vit import MLP, CrossAttention, join_heads


class QFormerLayer(nn.Module):
    """Self-attention of all, cross-attention of the queries, feed-forward of each kind; x + f(x) is normalised after each.

    Args:
        dim, heads, hidden: width, heads, width inside the feed-forward.
        context_dim: width of the features that queries attend to; None: a layer without cross-attention.
        text: with a feed-forward for text.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, context_dim: int | None, text: bool, dropout: float, eps: float
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention, self.attention_norm = CrossAttention(dim, heads), nn.LayerNorm(dim, eps)
        self.cross = None if context_dim is None else CrossAttention(dim, heads, context_dim)
        self.cross_norm = None if context_dim is None else nn.LayerNorm(dim, eps)
        self.query_mlp, self.query_norm = MLP(dim, hidden), nn.LayerNorm(dim, eps)
        self.text_mlp = MLP(dim, hidden) if text else None
        self.text_norm = nn.LayerNorm(dim, eps) if text else None

    def attend(self, attention: CrossAttention, x: Tensor, to: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """`attention` of x (B, N, dim) to others (B, M, ·), with dropout on its weights in training."""
        q, k, v = attention.project(x, to)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)
        return attention.proj(join_heads(y))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(
        self,
        x: Tensor,
        queries: int,
        context: Tensor | None,
        mask: Tensor | None,
        context_mask: Tensor | None,
        causal: bool,
    ) -> Tensor:
        """x (B, Q + T, dim): `queries` queries, then text; `mask` bool, broadcastable to (B, heads, Q + T, Q + T)."""
        x = self.attention_norm(x + self.drop(self.attend(self.attention, x, x, mask, causal)))
        q, t = x[:, :queries], x[:, queries:]
        if queries:
            if self.cross is not None:
                q = self.cross_norm(q + self.drop(self.attend(self.cross, q, context, context_mask, False)))
            q = self.query_norm(q + self.drop(self.query_mlp(q)))
        if t.shape[1]:
            t = self.text_norm(t + self.drop(self.text_mlp(t)))
        return torch.cat([q, t], 1)


class QFormer(nn.Module):
    """Learned queries that read features, and captions if it has a text side. The defaults are BERT-base.

    Args:
        queries: number of learned queries.
        context_dim: width of the features that they read.
        causal: a query sees the queries up to itself only. It holds for any number of queries. (In SEED's published code
            causality is a side effect of there being exactly 32.)
        dim, heads, hidden, layers: width, heads, width inside the feed-forward, layers.
        cross_attention_freq: layers 0, f, 2 f, ... attend to the features.
        text_vocab: ids of the text side; 0: none.
        max_positions: positions of the text side.
        dropout: in training, on embeddings, attention weights and outputs.

    Attributes:
        queries: (1, Q, dim). They have no positions: they differ, and that is enough.
    """

    def __init__(
        self,
        queries: int,
        context_dim: int,
        causal: bool = False,
        dim: int = 768,
        heads: int = 12,
        hidden: int = 3072,
        layers: int = 12,
        cross_attention_freq: int = 2,
        text_vocab: int = 0,
        max_positions: int = 512,
        dropout: float = 0.1,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if dim % heads or min(queries, layers, cross_attention_freq) < 1:
            raise ConfigError(
                f"QFormer: dim {dim} must be a multiple of heads {heads}, and queries {queries}, layers {layers} and "
                f"cross_attention_freq {cross_attention_freq} at least 1"
            )
        self.causal, self.dropout = causal, dropout
        self.queries = nn.Parameter(torch.empty(1, queries, dim))
        self.words = nn.Embedding(text_vocab, dim) if text_vocab else None
        self.places = nn.Embedding(max_positions, dim) if text_vocab else None
        self.norm = nn.LayerNorm(dim, eps)
        self.layers = nn.ModuleList(
            QFormerLayer(
                dim, heads, hidden, None if i % cross_attention_freq else context_dim, text_vocab > 0, dropout, eps
            )
            for i in range(layers)
        )
        nn.init.normal_(self.queries, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    # -- the three ways through it --------------------------------------------------------------------------------------

    def forward(self, context: Tensor, queries: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        """Queries after reading features: (B, Q, dim) of context (B, M, context_dim).

        Args:
            queries: (1 or B, Q', dim) in place of the learned ones.
            context_mask: bool (B, M), True where a feature is real.
        """
        x = self._start(self.queries if queries is None else queries).expand(len(context), -1, -1)
        return self._run(x, x.shape[1], context, None, context_mask, self.causal)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States (B, T, dim) of text ids int64 (B, T); `mask` bool (B, T), True where real. Text sees both ways.

        Raises:
            InputError: no text side, or more ids than it has positions.
        """
        return self._run(self._text(ids), 0, None, mask[:, None, None], None, False)

    def join(self, context: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Queries and text in one pass, (B, Q + T, dim): all see all, but queries each other as `causal` says.

        As `forward` and `read`; the mode in which BLIP-2 matches pictures with captions.
        """
        text = self._text(ids)
        q = self.queries.shape[1]
        x = torch.cat([self._start(self.queries).expand(len(context), -1, -1), text], 1)  # (B, Q + T, dim)
        n = x.shape[1]
        sees = torch.ones(n, n, dtype=torch.bool, device=x.device)
        if self.causal:
            sees[:q, :q] = sees[:q, :q].tril()
        real = F.pad(mask, (q, 0), value=True)  # (B, Q + T)
        return self._run(x, q, context, sees & real[:, None, None], None, False)

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _start(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(x), self.dropout, self.training)

    def _text(self, ids: Tensor) -> Tensor:
        if self.words is None:
            raise InputError("this Q-Former has no text side; build it with text_vocab")
        if ids.shape[1] > self.places.num_embeddings:
            raise InputError(f"{ids.shape[1]} text ids for {self.places.num_embeddings} positions; cut them before")
        return self._start(self.words(ids) + self.places.weight[: ids.shape[1]])

    def _run(
        self,
        x: Tensor,
        queries: int,
        context: Tensor | None,
        mask: Tensor | None,
        context_mask: Tensor | None,
        causal: bool,
    ) -> Tensor:
        context_mask = None if context_mask is None else context_mask[:, None, None]
        for layer in self.layers:
            x = layer(x, queries, context, mask, context_mask, causal)
        return x
