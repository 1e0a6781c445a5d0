"""A LLaMA-type decoder over [condition, image tokens], with Token-Shuffle windows.

The decoder is LlamaGen's (Sun et al. 2024, arXiv 2406.06525, section 2.2): RMSNorm, SwiGLU, rotary positions, no biases.
The condition is a class, a text encoder's features (both LlamaGen's), or text ids in the same sequence, as in
Token-Shuffle (Ma et al. 2025, arXiv 2504.17789), whose windows sit between embeddings and blocks and between blocks and
head. `window=1` is the plain model: no further module exists.

One sequence of a prefix of P tokens (see `conditions`; for text its ids and begin-of-image) and S decoding steps:

    position   0 … P-2     P-1    P … P+S-2
    input      prefix …    prefix step 1 … step S-1
    predicts               step 1 step 2 … step S

A step is one codebook of one window: window^2 ids. The prediction shifts by one step.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError, InputError
from tokgen.generators.base import Generator, GeneratorOutput
from tokgen.generators.code_vectors import CodeVectors
from tokgen.generators.conditions import ClassCondition, FeatureCondition, Prompts, TextCondition
from tokgen.generators.ends import End, code_losses, code_targets, together, with_room
from tokgen.generators.token_shuffle import (
    TokenShuffle,
    TokenUnshuffle,
    WindowHead,
    from_windows,
    to_windows,
    window_order,
)
from tokgen.nn.attention import Attention, DecoderBlock, KVCache, RMSNorm, SwiGLU, prefix_attention, rope_table
from tokgen.nn.int8 import Int8Linear, Int8Weight, to_int8
from tokgen.nn.linear import Linear, linear
from tokgen.text import TextTokenizer
from tokgen.tokens import Grid, Layout

Head = tuple[Tensor | Int8Weight, Tensor | None]
CHOICES = {
    "condition": ("text", "class", "features"),
    "rope": ("1d", "2d"),
    "rope_prefix": ("positions", "zero"),
    "window_head": ("independent", "autoregressive"),
    "code_embedding": ("table", "codebook"),
    "code_head": ("linear", "codebook"),
}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a `LlamaGenerator`; the defaults are LlamaGen's GPT-B.

    Args:
        layout: `Layout.to_dict()` of a full item of the visual tokenizer, e.g. {"kind": "Grid", "h": 8, "w": 8}.
        codebook_sizes: codes of each codebook.
        condition: "text", "class" or "features", see `tokgen.generators.conditions`.
        text_vocab: for "text": ids are below this.
        max_text: for "text" ids per caption at most, the begin-of-sequence id included; for "features" their rows.
        num_classes: for "class".
        feature_dim: for "features": their width.
        dim, n_layers, n_heads: width, blocks, heads.
        n_kv_heads: key-value heads (grouped-query attention); None means `n_heads`.
        hidden: width of the feed-forward; None is LLaMA's rule, int(8 dim / 3) rounded up to `multiple_of`.
        rope: "1d": a token's position is its index among the real tokens of its row. "2d": half of the pairs turn by
            row, half by column; prefix token i is at (i, 0), and the image's rows go on where the prefix ends, so a
            window in row r and column q after p prefix tokens is at (p + r, q). Frames of a video follow one another
            in rows. Codebooks of one window share a place.
        rope_prefix: "positions", as above, or "zero", as LlamaGen's weights were trained: the rotation of a prefix token
            is the number 0, so that its queries and keys vanish and all of the prefix is attended to evenly; the image
            then starts at (0, 0).
        rope_base: theta.
        qk_norm: normalise queries and keys per head.
        qkv_bias: biases on queries, keys and values, as Qwen2 has them.
        norm_eps: of every RMSNorm.
        window: Token-Shuffle's s; 1 is the plain model.
        fusion_blocks: residual MLP blocks on each side when window > 1.
        window_head: "independent": the ids of a window are drawn independently given the past, as in the paper;
            "autoregressive": by a small causal head over the window's slots (see `WindowHead`).
        window_head_dim, window_head_layers: of that head; a width of None means dim / window.
        rep_token: one learned vector between prefix and codes, ARRA's <REP> (Xie et al. 2025, arXiv 2503.07334, table 5);
            the first step is then predicted from it.
        code_embedding: what a code enters with: "table", an embedding of its own, or "codebook", its vector in the
            tokenizer's codebook through a projector. Codebook and projector are those of `CodeVectors`.
        code_head: what predicts a code: "linear", one map to all of them, or "codebook", a map to the codebook's width and
            the inner product with each vector. That one starts at zero, whatever the codebook's scale.
        code_dim, code_layers: for "codebook": width of its vectors, and layers of the projector.
        ends: for codes of which items have different numbers: an item is drawn until it ends, see `tokgen.generators.ends`.
            The layout's length is the most positions.
        field_embedding: add to a code's embedding a vector of its codebook, for positions of many codebooks.
        token_dropout, attention_dropout, residual_dropout, ffn_dropout: on the input sequence, attention weights,
            attention output and feed-forward output.
        code_dropout: share of steps whose input is zeroed in training, so that what follows is learned from the condition
            too and not only from the codes before it (word dropout: Bowman et al. 2016, arXiv 1511.06349, section 3.1).
        caption_dropout: share of captions dropped in training, so that guidance has an unconditional model.
        zero_head: start the code head at zero (uniform predictions, as LlamaGen) rather than at N(0, 0.02).
    """

    layout: dict[str, Any]
    codebook_sizes: tuple[int, ...]
    condition: str = "text"
    text_vocab: int = 0
    max_text: int = 64
    num_classes: int = 1000
    feature_dim: int = 2048
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int | None = None
    hidden: int | None = None
    multiple_of: int = 256
    rope: str = "1d"
    rope_prefix: str = "positions"
    rope_base: float = 10_000.0
    qk_norm: bool = False
    qkv_bias: bool = False
    norm_eps: float = 1e-5
    window: int = 1
    fusion_blocks: int = 2
    window_head: str = "independent"
    window_head_dim: int | None = None
    window_head_layers: int = 1
    rep_token: bool = False
    code_embedding: str = "table"
    code_head: str = "linear"
    code_dim: int = 0
    code_layers: int = 2
    ends: bool = False
    field_embedding: bool = False
    token_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    ffn_dropout: float = 0.0
    code_dropout: float = 0.0
    caption_dropout: float = 0.1
    zero_head: bool = False

    @property
    def feed_forward(self) -> int:
        """Width of the feed-forward."""
        return self.hidden or math.ceil(int(8 * self.dim / 3) / self.multiple_of) * self.multiple_of

    @property
    def reads_codebook(self) -> bool:
        """Whether codes are embedded or predicted by their vectors."""
        return "codebook" in (self.code_embedding, self.code_head)

    def check(self) -> None:
        """Raise ConfigError, naming the value, if sizes do not fit together."""
        kv = self.n_kv_heads or self.n_heads
        if self.dim % self.n_heads:
            raise ConfigError(f"dim={self.dim} is not a multiple of n_heads={self.n_heads}")
        if self.n_heads % kv:
            raise ConfigError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={kv}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(known)}")
        pairs = 2 if self.rope == "1d" else 4
        if (self.dim // self.n_heads) % pairs:
            raise ConfigError(
                f"rope={self.rope!r} needs a head width that is a multiple of {pairs}; dim={self.dim} over "
                f"n_heads={self.n_heads} gives {self.dim // self.n_heads}"
            )
        if self.window > 1 and self.dim % self.window**2:
            raise ConfigError(f"dim={self.dim} is not a multiple of window^2={self.window**2}")
        if self.window_head == "autoregressive" and self.window == 1:
            raise ConfigError("window_head='autoregressive' needs a window above 1; a window of 1 has one slot")
        if self.ends and self.window > 1:
            raise ConfigError(f"ends=True needs window=1; an item may end within a window of {self.window}")
        if self.reads_codebook and (len(self.codebook_sizes) > 1 or self.code_dim < 1 or self.code_layers < 1):
            raise ConfigError(
                f"code_embedding or code_head 'codebook' needs one codebook (here {len(self.codebook_sizes)}), code_dim "
                f"{self.code_dim} and code_layers {self.code_layers} of at least 1"
            )
        if self.rope == "2d" and not isinstance(Layout.from_dict(self.layout), Grid):
            raise ConfigError(f"rope='2d' needs tokens on a grid, not {Layout.from_dict(self.layout)}; use '1d'")
        needed = {
            "text": ("max_text", "text_vocab"),
            "class": ("num_classes",),
            "features": ("max_text", "feature_dim"),
        }
        for name in needed[self.condition]:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; condition={self.condition!r} needs at least 1")
        for name, value in vars(self).items():
            if name.endswith("_dropout") and not 0 <= value < 1:
                raise ConfigError(f"{name}={value}; expected 0 <= {name} < 1")


class LlamaGenerator(Generator):
    """Causal decoder over a condition and code ids. See the module and `Generator` for arguments.

    Attributes:
        steps: S, decoding steps per image = windows x codebooks.
        slots: window^2, ids of one step.
    """

    type_name = "llama"
    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig, text: Prompts | None = None, **kwargs: Any) -> None:
        config.check()
        if isinstance(text, TextTokenizer) and text.vocab_size > config.text_vocab:
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

        self.condition = {
            "text": lambda: TextCondition(c.text_vocab, c.dim),
            "class": lambda: ClassCondition(c.num_classes, c.dim),
            "features": lambda: FeatureCondition(c.max_text, c.feature_dim, c.dim),
        }[c.condition]()
        self.rep = nn.Parameter(torch.empty(c.dim)) if c.rep_token else None
        by_vector = c.code_embedding == "codebook"
        self.tok_embeddings = None if by_vector else nn.Embedding(starts[-1], c.dim)
        self.fields = nn.Embedding(len(self.codebook_sizes), c.dim) if c.field_embedding else None
        self.codes: CodeVectors | None = None
        if c.reads_codebook:
            self.codes = CodeVectors(starts[-1], c.code_dim, c.dim, c.code_layers if by_vector else 0)
        if c.window > 1:
            self.shuffle = TokenShuffle(c.dim, c.window, c.fusion_blocks, c.norm_eps)
            independent = c.window_head == "independent"
            self.unshuffle = TokenUnshuffle(c.dim, c.window, c.fusion_blocks, c.norm_eps, expand=independent)
        self.window_head: WindowHead | None = None
        if c.window_head == "autoregressive":
            width = c.window_head_dim or c.dim // c.window
            self.window_head = WindowHead(c.dim, c.window, width, c.window_head_layers, c.norm_eps)
        self.layers = nn.ModuleList(
            DecoderBlock(
                Attention(
                    c.dim,
                    c.n_heads,
                    c.n_kv_heads,
                    c.qk_norm,
                    c.norm_eps,
                    c.attention_dropout,
                    c.residual_dropout,
                    c.qkv_bias,
                ),
                SwiGLU(c.dim, c.feed_forward, c.ffn_dropout),
                c.dim,
                c.norm_eps,
            )
            for _ in range(c.n_layers)
        )
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = Linear(c.dim, c.code_dim if c.code_head == "codebook" else starts[-1], bias=False)
        self.end = End(c.dim) if c.ends else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02) everywhere, divided by sqrt(2 n_layers) where a branch joins the residual stream (GPT-2)."""
        c = self.config
        for name, module in self.named_modules():
            if name.startswith("codes."):
                continue  # a projector starts as linear layers do by themselves: the scale of the vectors is not known
            if isinstance(module, (nn.Linear, nn.Embedding)):
                joins = name.endswith((".wo", ".w2", ".fc2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * c.n_layers) if joins else 0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, TextCondition):
                nn.init.normal_(module.boi, std=0.02)
        if self.rep is not None:
            nn.init.normal_(self.rep, std=0.02)
        if c.zero_head or c.code_head == "codebook":
            nn.init.zeros_(self.output.weight)

    def start_from(self, source: LlamaGenerator) -> list[str]:
        """Take every weight of `source`, which may have another grid or window; positions are computed, not stored.

        Returns:
            names of the weights that `source` does not have (of windows and their head, ends, fields) and that stay as initialised.

        Raises:
            ConfigError: weights of `source` that have no place here, or another shape.
        """
        theirs, own = source.state_dict(), self.state_dict()
        grown = ("shuffle.", "unshuffle.", "window_head.", "rep", "end.", "fields.")
        lost = [k for k in theirs if k not in own and not k.startswith(grown)]
        missing = [k for k in own if k not in theirs and not k.startswith(grown)]
        shapes = [k for k in theirs if k in own and theirs[k].shape != own[k].shape and not k.startswith(grown)]
        if lost or missing or shapes:
            names = ", ".join([*lost, *missing, *shapes][:4])
            raise ConfigError(
                f"cannot start from a generator of other sizes: {names} differ; only grid, window, its head, rep_token, ends and field_embedding may"
            )
        taken = {k: v for k, v in theirs.items() if k in own and v.shape == own[k].shape}
        self.load_state_dict(taken, strict=False)
        return [k for k in own if k not in taken]

    @property
    def needs_codebook(self) -> bool:
        return self.codes is not None

    def take_codebook(self, table: Tensor) -> None:
        if self.codes is None:
            super().take_codebook(table)
        self.codes.take(table)

    def _places(self) -> Tensor:
        """Where each step's input lies relative to the end of the prefix, int64 (S, axes)."""
        codebooks = len(self.codebook_sizes)
        if self.config.rope == "1d":
            return torch.arange(self.steps)[:, None]
        columns = self.layout.w // self.config.window
        window = torch.arange(self.steps) // codebooks
        return torch.stack([window // columns, window % columns], -1)

    # -- the parts, in the order of the sequence ------------------------------------------------------------------------

    def prefix(self, prompt: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What stands before the codes: embeddings (B, P, dim) and which of them are real (B, P)."""
        x, mask = self.condition(prompt, prompt_mask)
        if self.rep is not None:
            x = torch.cat([x, self.rep.to(x.dtype).expand(len(x), 1, -1)], 1)
            mask = F.pad(mask, (0, 1), value=True)
        return x, mask

    def rope(self, prefix_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rotations of the whole sequence, cos and sin (B, P + S, head_dim / 2); masked tokens take no position."""
        index = prefix_mask.cumsum(1)  # of a real token: its position + 1
        prefix = torch.zeros(*index.shape, self.places.shape[1], dtype=torch.int64, device=index.device)
        prefix[..., 0] = (index - 1).clamp(min=0)
        image = self.places.repeat(len(index), 1, 1)
        if self.config.rope_prefix == "positions":
            image[..., 0] += index[:, -1:]
        positions = torch.cat([prefix, image], 1)
        cos, sin = rope_table(positions, self.config.dim // self.config.n_heads, self.config.rope_base)
        if self.config.rope_prefix == "zero":
            cos[:, : index.shape[1]] = sin[:, : index.shape[1]] = 0
        return cos, sin

    def shared_ids(self, ids: Tensor, codebook: int = 0) -> Tensor:
        """Rows of the embedding table that all codebooks share, for m consecutive steps (B, m, slots)."""
        codebooks = len(self.codebook_sizes)
        if codebooks == 1:
            return ids
        starts = [self.codebook_ranges[(codebook + i) % codebooks][0] for i in range(ids.shape[1])]
        return ids + torch.tensor(starts, device=ids.device)[:, None]

    def embed(self, ids: Tensor, codebook: int = 0) -> Tensor:
        """Inputs (B, m, dim) of m consecutive steps (B, m, slots), the first of which is of the given codebook."""
        x = self.embed_codes(self.shared_ids(ids, codebook))  # (B, m, slots, dim)
        if self.fields is not None:
            own = torch.arange(codebook, codebook + ids.shape[1], device=ids.device) % len(self.codebook_sizes)
            x = x + self.fields(own)[:, None]
        return self.shuffle(x) if self.config.window > 1 else x[:, :, 0]

    def embed_codes(self, shared: Tensor) -> Tensor:
        """Embeddings (..., dim) of shared ids (...)."""
        return self.codes(shared) if self.tok_embeddings is None else self.tok_embeddings(shared)

    def blocks(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        at: Tensor | None = None,
        end: int | None = None,
        keep: int = 0,
        part: tuple[int, int] | None = None,
    ) -> Tensor:
        """Decoder blocks, before the final norm; arguments as `Attention.forward`, `keep` in the last block only.

        Args:
            part: run blocks part[0] … part[1] - 1 only.
        """
        start, stop = part or (0, len(self.layers))
        for i in range(start, stop):
            last = i + 1 == len(self.layers)
            x = self.layers[i](x, rope, mask, None if cache is None else cache.layer(i), at, end, keep if last else 0)
        return x

    def to_slots(self, hidden: Tensor) -> Tensor:
        """A position's state as one vector per id of the step: (B, m, dim) to (B, m, slots, channels)."""
        hidden = self.norm(hidden)
        return self.unshuffle(hidden) if self.config.window > 1 else hidden[:, :, None]

    def within_window(self, slots: Tensor, before: Tensor) -> Tensor:
        """What ids are predicted from, for the autoregressive window head.

        Args:
            slots: (B, m, slots, channels) from `to_slots`, or the first k + 1 of a step's slots.
            before: shared ids (see `shared_ids`) of all but the last of them, int64 (B, m, slots - 1).

        Returns:
            (B, m, slots, window_head_dim).
        """
        return self.window_head(slots, self.embed_codes(before))

    def head(self) -> Head:
        """Weight (V, channels) and bias of the map from a slot to code logits; with windows, expand and head in one.

        With code_head "codebook" V is code_dim: `code_logits` does the rest.
        """
        if isinstance(self.output, Int8Linear):
            return self.output.weight, self.output.bias
        if self.window_head is not None:
            return self.window_head.folded(self.output.weight)
        if self.config.window > 1:
            return self.unshuffle.folded(self.output.weight)
        return self.output.weight, None

    def code_logits(self, slots: Tensor, codebook: int, head: Head) -> Tensor:
        """float32 logits (..., K) over one codebook's own ids; with ends K is one more for the first, and the last of it the end."""
        low, high = self.codebook_ranges[codebook]
        weight, bias = head
        if len(self.codebook_sizes) > 1:
            weight, bias = weight[low:high], None if bias is None else bias[low:high]
        if isinstance(weight, Int8Weight):
            out = weight.linear(slots, bias)
        else:
            out = linear(slots, weight, bias)
        out = (self.codes.logits(out) if self.config.code_head == "codebook" else out).float()
        return out if self.end is None or codebook else torch.cat([out, self.end(slots)], -1)

    def counted(self, mask: Tensor) -> Tensor:
        ends = 0 if self.end is None else (mask.any(1) & (mask.sum(1) < self.layout.length)).sum()
        return super().counted(mask) + ends

    def text_logits(self, hidden: Tensor) -> Tensor:
        """float32 logits (B, T, text_vocab) of the next text id; the head is the text embedding, transposed."""
        return F.linear(self.norm(hidden), self.condition.embeddings.weight).float()

    def new_cache(self, batch: int, length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `length` positions."""
        c = self.config
        weight = self.norm.weight
        return KVCache(
            c.n_layers, batch, c.n_kv_heads or c.n_heads, length, c.dim // c.n_heads,
            device=weight.device, dtype=dtype or weight.dtype,
        )  # fmt: skip

    def int8(self) -> LlamaGenerator:
        """A copy with int8 weights in all linear layers, to draw with or to guess for speculative decoding; embeddings and
        norms stay. It cannot be trained or saved. Products are in bfloat16, in which two logits are often level, so that its
        ids may change with the machine and with compilation.
        """
        made = copy.deepcopy(self).eval().requires_grad_(False)
        if isinstance(self.output, Int8Linear):
            return made
        weight, bias = self.head()
        codes, made.codes = made.codes, None
        to_int8(made)
        made.codes = codes  # embeds
        made.output = Int8Linear(weight, bias)
        return made

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> Path:
        """As `Generator.save_pretrained`. Raises ConfigError for an int8 copy."""
        if isinstance(self.output, Int8Linear):
            raise ConfigError("this generator is an int8 copy for drawing; save the one that it was made from")
        return super().save_pretrained(folder, **kwargs)

    # -- training -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        prompt: Tensor,
        prompt_mask: Tensor,
        code_ids: Tensor,
        code_mask: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        text_loss: float = 0.0,
        hidden_of: int | None = None,
    ) -> GeneratorOutput:
        """See `Generator.forward`. The cross-entropy is the mean over all real ids and, with ends, over the ends.

        Raises:
            InputError: code_ids of another length or number of codebooks than the configuration's.
            ConfigError: `text_loss` without text, or `hidden_of` beyond the blocks.
        """
        codebooks = len(self.codebook_sizes)
        ids = code_ids if code_ids.ndim == 3 else code_ids[..., None]  # (B, N, C)
        real = torch.ones_like(ids[..., 0], dtype=torch.bool) if code_mask is None else code_mask  # (B, N)
        if self.end is not None and ids.shape[2] == codebooks:
            ids, real = with_room(ids, real, self.layout.length)
        elif ids.shape[1:] != (self.layout.length, codebooks):
            raise InputError(
                f"code_ids have shape {tuple(code_ids.shape)}; expected {self.layout.length} ids of {codebooks} "
                f"codebook(s) per item, as in {self.layout}; where items have different numbers of them, set ends"
            )
        if text_loss and self.config.condition != "text":
            raise ConfigError(f"text_loss needs condition='text', not {self.config.condition!r}; set it to 0")
        if hidden_of is not None and not 1 <= hidden_of <= len(self.layers):
            raise ConfigError(f"hidden_of={hidden_of}; expected a block from 1 to {len(self.layers)}")
        x, prefix_mask = self.prefix(prompt, prompt_mask)
        p = x.shape[1]
        order = self.order[: ids.shape[1]]  # with ends of as many positions as the batch has
        steps = to_windows(ids, order)  # (B, S, slots)
        codes = self.embed(steps[:, :-1])  # (B, S - 1, dim)
        if self.training and self.config.code_dropout:
            codes = codes * (torch.rand_like(codes[..., :1]) >= self.config.code_dropout)
        x = torch.cat([x, codes], 1)  # (B, P + S - 1, dim)
        x = F.dropout(x, self.config.token_dropout, self.training)
        length = x.shape[1]
        cos, sin = self.rope(prefix_mask)
        rope, mask = (cos[:, :length], sin[:, :length]), prefix_attention(prefix_mask, length)
        # Nothing is read from the text positions of the last block unless they predict text: 5 % of a step saved.
        keep = 0 if text_loss else p - 1
        if hidden_of is not None and hidden_of < len(self.layers):
            x = self.blocks(x, rope, mask, part=(0, hidden_of))
            states = x[:, p - 1 :]
            hidden = self.blocks(x, rope, mask, keep=keep, part=(hidden_of, len(self.layers)))
        else:
            hidden = self.blocks(x, rope, mask, keep=keep)
            states = hidden[:, -steps.shape[1] :] if hidden_of is not None else None

        slots = self.to_slots(hidden[:, -steps.shape[1] :])  # (B, S, slots, channels)
        if self.window_head is not None:
            slots = self.within_window(slots, self.shared_ids(steps)[..., :-1])
        slots = from_windows(slots, order, codebooks)  # (B, N, C, channels), in the layout's order
        head = self.head()
        logits = [self.code_logits(slots[:, :, c], c, head) for c in range(codebooks)]
        targets = code_targets(ids, real, None if self.end is None else self.codebook_sizes[0])
        losses, accuracy = code_losses(logits, targets, label_smoothing, z_loss)
        text_logits = None
        if text_loss:
            text_logits = self.text_logits(hidden[:, : prompt.shape[1]])
            following = prompt[:, 1:].masked_fill(~prompt_mask[:, 1:], -100)
            ce = F.cross_entropy(text_logits[:, :-1].flatten(0, 1), following.flatten(), reduction="sum")
            losses["text"] = text_loss * ce / prompt_mask[:, 1:].sum().clamp(min=1)  # every caption may be dropped
        return GeneratorOutput(
            loss=sum(losses.values()),
            logits=together(logits),
            losses=losses,
            stats={"accuracy": accuracy},
            text_logits=text_logits,
            hidden=states,
        )
