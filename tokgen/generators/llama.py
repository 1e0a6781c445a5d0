"""A LLaMA-type decoder over [text, begin-of-image, image tokens], with Token-Shuffle windows.

The decoder is LlamaGen's (Sun et al. 2024, arXiv 2406.06525, section 2.2): RMSNorm, SwiGLU, rotary positions, no biases.
Text is not a separate encoder's features but byte-pair ids in the same sequence, as in Token-Shuffle (Ma et al. 2025,
arXiv 2504.17789), whose windows sit between embeddings and blocks and between blocks and head. `window=1` is the plain
model: no further module exists.

One sequence of a caption of T ids (padded on the right) and S decoding steps:

    position   0 … T-1     T      T+1 … T+S-1
    input      text ids    BOI    step 1 … step S-1
    predicts               step 1 step 2 … step S

A step is one codebook of one window: window^2 ids predicted in parallel. The prediction shifts by one step.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError, InputError
from tokgen.generators.base import Generator, GeneratorOutput
from tokgen.generators.text import TextTokenizer
from tokgen.generators.token_shuffle import TokenShuffle, TokenUnshuffle, from_windows, to_windows, window_order
from tokgen.nn.attention import Attention, DecoderBlock, KVCache, RMSNorm, SwiGLU, rope_table
from tokgen.tokens import Grid, Layout


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a `LlamaGenerator`; the defaults are LlamaGen's GPT-B.

    Args:
        layout: `Layout.to_dict()` of a full item of the visual tokenizer, e.g. {"kind": "Grid", "h": 8, "w": 8}.
        codebook_sizes: codes of each codebook.
        text_vocab: text ids are below this.
        max_text: text ids per caption at most, the begin-of-sequence id included.
        dim, n_layers, n_heads: width, blocks, heads.
        n_kv_heads: key-value heads (grouped-query attention); None means `n_heads`.
        hidden: width of the feed-forward; None is LLaMA's rule, int(8 dim / 3) rounded up to `multiple_of`.
        rope: "1d": a token's position is its index among the real tokens of its row. "2d": half of the pairs turn by
            row, half by column; text token i is at (i, 0), and the image's rows go on where the text ends, so a window
            in row r and column q after p text and begin tokens is at (p + r, q). Frames of a video follow one another
            in rows. Codebooks of one window share a place.
        rope_base: theta.
        qk_norm: normalise queries and keys per head.
        norm_eps: of every RMSNorm.
        window: Token-Shuffle's s; 1 is the plain model.
        fusion_blocks: residual MLP blocks on each side when window > 1.
        token_dropout, attention_dropout, residual_dropout, ffn_dropout: on the input sequence, attention weights,
            attention output and feed-forward output.
        caption_dropout: share of captions dropped in training, so that guidance has an unconditional model.
        zero_head: start the code head at zero (uniform predictions, as LlamaGen) rather than at N(0, 0.02).
    """

    layout: dict[str, Any]
    codebook_sizes: tuple[int, ...]
    text_vocab: int
    max_text: int = 64
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int | None = None
    hidden: int | None = None
    multiple_of: int = 256
    rope: str = "1d"
    rope_base: float = 10_000.0
    qk_norm: bool = False
    norm_eps: float = 1e-5
    window: int = 1
    fusion_blocks: int = 2
    token_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    ffn_dropout: float = 0.0
    caption_dropout: float = 0.1
    zero_head: bool = False

    @property
    def feed_forward(self) -> int:
        """Width of the feed-forward."""
        return self.hidden or math.ceil(int(8 * self.dim / 3) / self.multiple_of) * self.multiple_of

    def check(self) -> None:
        """Raise ConfigError, naming the value, if sizes do not fit together."""
        kv = self.n_kv_heads or self.n_heads
        if self.dim % self.n_heads:
            raise ConfigError(f"dim={self.dim} is not a multiple of n_heads={self.n_heads}")
        if self.n_heads % kv:
            raise ConfigError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={kv}")
        if self.rope not in ("1d", "2d"):
            raise ConfigError(f"rope={self.rope!r}; expected '1d' or '2d'")
        pairs = 2 if self.rope == "1d" else 4
        if (self.dim // self.n_heads) % pairs:
            raise ConfigError(
                f"rope={self.rope!r} needs a head width that is a multiple of {pairs}; dim={self.dim} over "
                f"n_heads={self.n_heads} gives {self.dim // self.n_heads}"
            )
        if self.window > 1 and self.dim % self.window**2:
            raise ConfigError(f"dim={self.dim} is not a multiple of window^2={self.window**2}")
        if self.rope == "2d" and not isinstance(Layout.from_dict(self.layout), Grid):
            raise ConfigError(f"rope='2d' needs tokens on a grid, not {Layout.from_dict(self.layout)}; use '1d'")
        if self.max_text < 1 or self.text_vocab < 1:
            raise ConfigError(f"max_text={self.max_text} and text_vocab={self.text_vocab} must be at least 1")
        for name in ("token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected 0 <= {name} < 1")


class LlamaGenerator(Generator):
    """Causal decoder over text and code ids. See the module and `Generator` for arguments.

    Attributes:
        steps: S, decoding steps per image = windows x codebooks.
        slots: window^2, ids of one step.
    """

    type_name = "llama"
    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig, text: TextTokenizer | None = None, **kwargs: Any) -> None:
        config.check()
        if text is not None and text.vocab_size > config.text_vocab:
            raise ConfigError(f"the text tokenizer has {text.vocab_size} ids but text_vocab={config.text_vocab}")
        super().__init__(config, text, **kwargs)
        c = config
        self.layout = Layout.from_dict(c.layout)
        self.codebook_sizes, self.max_text = tuple(c.codebook_sizes), c.max_text
        starts = [0, *itertools.accumulate(self.codebook_sizes)]
        self.codebook_ranges = list(itertools.pairwise(starts))
        self.register_buffer("order", window_order(self.layout, c.window), persistent=False)
        self.slots = self.order.shape[1]
        self.steps = self.order.shape[0] * len(self.codebook_sizes)
        self.register_buffer("places", self._places(), persistent=False)  # (S, axes)

        self.text_embeddings = nn.Embedding(c.text_vocab, c.dim)
        self.boi = nn.Parameter(torch.empty(c.dim))
        self.tok_embeddings = nn.Embedding(starts[-1], c.dim)
        if c.window > 1:
            self.shuffle = TokenShuffle(c.dim, c.window, c.fusion_blocks, c.norm_eps)
            self.unshuffle = TokenUnshuffle(c.dim, c.window, c.fusion_blocks, c.norm_eps)
        self.layers = nn.ModuleList(
            DecoderBlock(
                Attention(
                    c.dim, c.n_heads, c.n_kv_heads, c.qk_norm, c.norm_eps, c.attention_dropout, c.residual_dropout
                ),
                SwiGLU(c.dim, c.feed_forward, c.ffn_dropout),
                c.dim,
                c.norm_eps,
            )
            for _ in range(c.n_layers)
        )
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, starts[-1], bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02) everywhere, divided by sqrt(2 n_layers) where a branch joins the residual stream (GPT-2)."""
        c = self.config
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                joins = name.endswith((".wo", ".w2", ".fc2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * c.n_layers) if joins else 0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.boi, std=0.02)
        if c.zero_head:
            nn.init.zeros_(self.output.weight)

    def _places(self) -> Tensor:
        """Where each step's input lies relative to the end of the prefix, int64 (S, axes)."""
        codebooks = len(self.codebook_sizes)
        if self.config.rope == "1d":
            return torch.arange(self.steps)[:, None]
        columns = self.layout.w // self.config.window
        window = torch.arange(self.steps) // codebooks
        return torch.stack([window // columns, window % columns], -1)

    # -- the parts, in the order of the sequence ------------------------------------------------------------------------

    def prefix(self, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Text and begin-of-image: embeddings (B, T + 1, dim) and mask (B, T + 1)."""
        boi = self.boi.expand(len(text_ids), 1, -1)
        x = torch.cat([self.text_embeddings(text_ids), boi.to(self.text_embeddings.weight.dtype)], 1)
        return x, F.pad(text_mask, (0, 1), value=True)

    def rope(self, prefix_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rotations of the whole sequence, cos and sin (B, P + S, head_dim / 2); masked tokens take no position."""
        index = prefix_mask.cumsum(1)  # of a real token: its position + 1
        prefix = torch.zeros(*index.shape, self.places.shape[1], dtype=torch.int64, device=index.device)
        prefix[..., 0] = (index - 1).clamp(min=0)
        image = self.places.repeat(len(index), 1, 1)
        image[..., 0] += index[:, -1:]
        positions = torch.cat([prefix, image], 1)
        return rope_table(positions, self.config.dim // self.config.n_heads, self.config.rope_base)

    def embed(self, ids: Tensor, codebook: int = 0) -> Tensor:
        """Inputs (B, m, dim) of m consecutive steps (B, m, slots), the first of which is of the given codebook."""
        codebooks = len(self.codebook_sizes)
        if codebooks > 1:
            starts = [self.codebook_ranges[(codebook + i) % codebooks][0] for i in range(ids.shape[1])]
            ids = ids + torch.tensor(starts, device=ids.device)[:, None]
        x = self.tok_embeddings(ids)  # (B, m, slots, dim)
        return self.shuffle(x) if self.config.window > 1 else x[:, :, 0]

    def blocks(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        at: Tensor | None = None,
        end: int | None = None,
        keep: int = 0,
    ) -> Tensor:
        """All decoder blocks, before the final norm; arguments as `Attention.forward`, `keep` in the last block only."""
        for i, block in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            x = block(x, rope, mask, None if cache is None else cache.layer(i), at, end, keep if last else 0)
        return x

    def to_slots(self, hidden: Tensor) -> Tensor:
        """What each id of a step is predicted from: hidden states (B, m, dim) to (B, m, slots, channels)."""
        hidden = self.norm(hidden)
        return self.unshuffle(hidden) if self.config.window > 1 else hidden[:, :, None]

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, channels) and bias of the map from a slot to code logits; with windows, expand and head in one."""
        if self.config.window > 1:
            return self.unshuffle.folded(self.output.weight)
        return self.output.weight, None

    def code_logits(self, slots: Tensor, codebook: int, head: tuple[Tensor, Tensor | None]) -> Tensor:
        """float32 logits (..., K) over one codebook's own ids."""
        low, high = self.codebook_ranges[codebook]
        weight, bias = head
        if len(self.codebook_sizes) > 1:
            weight, bias = weight[low:high], None if bias is None else bias[low:high]
        return F.linear(slots, weight, bias).float()

    def text_logits(self, hidden: Tensor) -> Tensor:
        """float32 logits (B, T, text_vocab) of the next text id; the head is the text embedding, transposed."""
        return F.linear(self.norm(hidden), self.text_embeddings.weight).float()

    def new_cache(self, batch: int, length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `length` positions."""
        c = self.config
        weight = self.tok_embeddings.weight
        return KVCache(
            c.n_layers, batch, c.n_kv_heads or c.n_heads, length, c.dim // c.n_heads,
            device=weight.device, dtype=dtype or weight.dtype,
        )  # fmt: skip

    # -- training -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        text_ids: Tensor,
        text_mask: Tensor,
        code_ids: Tensor,
        code_mask: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        text_loss: float = 0.0,
    ) -> GeneratorOutput:
        """See `Generator.forward`. The cross-entropy is the mean over all real ids.

        Raises:
            InputError: code_ids of another length or number of codebooks than the configuration's.
        """
        codebooks = len(self.codebook_sizes)
        ids = code_ids if code_ids.ndim == 3 else code_ids[..., None]  # (B, N, C)
        if ids.shape[1:] != (self.layout.length, codebooks):
            raise InputError(
                f"code_ids have shape {tuple(code_ids.shape)}; expected {self.layout.length} ids of {codebooks} "
                f"codebook(s) per item, as in {self.layout}"
            )
        x, prefix_mask = self.prefix(text_ids, text_mask)
        p = x.shape[1]
        steps = to_windows(ids, self.order)  # (B, S, slots)
        x = torch.cat([x, self.embed(steps[:, :-1])], 1)  # (B, P + S - 1, dim)
        x = F.dropout(x, self.config.token_dropout, self.training)
        length = x.shape[1]
        cos, sin = self.rope(prefix_mask)
        seen = F.pad(prefix_mask, (0, length - p), value=True)[:, None, None]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril() & seen  # (B, 1, L, L)
        # Nothing is read from the text positions of the last block unless they predict text: 5 % of a step saved.
        hidden = self.blocks(x, (cos[:, :length], sin[:, :length]), mask, keep=0 if text_loss else p - 1)

        slots = self.to_slots(hidden[:, -self.steps :])  # (B, S, slots, channels)
        slots = from_windows(slots, self.order, codebooks)  # (B, N, C, channels), in the layout's order
        head = self.head()
        keep = torch.ones_like(ids[..., 0], dtype=torch.bool) if code_mask is None else code_mask  # (B, N)
        count = keep.sum() * codebooks
        logits = [self.code_logits(slots[:, :, c], c, head) for c in range(codebooks)]
        targets = [ids[..., c].masked_fill(~keep, -100) for c in range(codebooks)]
        losses = {
            "ce": sum(
                F.cross_entropy(l.flatten(0, 1), t.flatten(), reduction="sum", label_smoothing=label_smoothing)
                for l, t in zip(logits, targets)
            )
            / count
        }
        if z_loss:
            losses["z_loss"] = z_loss * sum((l.logsumexp(-1).square() * keep).sum() for l in logits) / count
        text_logits = None
        if text_loss:
            text_logits = self.text_logits(hidden[:, : p - 1])
            following = text_ids[:, 1:].masked_fill(~text_mask[:, 1:], -100)
            ce = F.cross_entropy(text_logits[:, :-1].flatten(0, 1), following.flatten(), reduction="sum")
            losses["text"] = text_loss * ce / text_mask[:, 1:].sum().clamp(min=1)  # every caption may be dropped
        with torch.no_grad():
            accuracy = sum((l.argmax(-1) == t).sum() for l, t in zip(logits, targets)) / count
        widest = max(self.codebook_sizes)
        padded = [F.pad(l, (0, widest - l.shape[-1]), value=-math.inf) for l in logits] if codebooks > 1 else logits
        return GeneratorOutput(
            loss=sum(losses.values()),
            logits=torch.stack(padded, 2) if codebooks > 1 else logits[0],
            losses=losses,
            stats={"accuracy": accuracy},
            text_logits=text_logits,
        )
