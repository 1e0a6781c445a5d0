"""TokenFlow's text-to-image decoder: next-scale prediction over the codes of a multi-scale tokenizer.

Qu et al. 2024, "TokenFlow: Unified Image Tokenizer for Multimodal Understanding and Generation" (arXiv 2412.03069v2, section
3.3), and its released code. One sequence of a caption, a begin of the image, and S maps of codes, of sides s_1 = 1 … s_S:

    slot       caption, begin …   last of begin   s_2^2        …   s_S^2
    input      text embeddings    text embedding  map of 1         map of 1 … S-1, at size s_S
    predicts                      scale 1         scale 2      …   scale S, each slot the code at its own place

A scale is predicted in one call: its slots see the text, all earlier scales and one another. Their input is no embedding of
ids but a picture: the codes' vectors of all earlier scales, from coarse to fine each added to the map so far, which is then
resized (bicubic) to the next side. This running map is the generator's own. The tokenizer brings every scale to the last
side at once and sums there, which is not the same; the published weights need this one.

The decoder is Llama's with the norms moved: x + norm(attention(x)), x + norm(SwiGLU(x)), and RMSNorm of every head's queries
and keys ("norm re-ordering" and "QK-norm" of the paper). Captions are padded on the left. The release lets padding take
positions; rotations depend on distances alone, so that this is the same as none.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError, InputError
from tokgen.generators.base import Generator, GeneratorOutput
from tokgen.generators.code_vectors import CodeVectors
from tokgen.generators.conditions import Prompts, TextCondition, to_the_end
from tokgen.nn.attention import Attention, DecoderBlock, KVCache, RMSNorm, SwiGLU, prefix_attention, rope_table
from tokgen.nn.int8 import Int8Linear, to_int8
from tokgen.nn.linear import Linear
from tokgen.text import TextTokenizer
from tokgen.tokens import Layout, Scales

if TYPE_CHECKING:
    from tokgen.generators.decoding import SamplingReport
    from tokgen.generators.sampling import SamplingSettings

PUBLISHED_SCALES = (1, 2, 4, 6, 8, 10, 12, 14, 16)  # of the tokenizer at 256 px: 817 codes
QK_EPS = 1e-6  # of query and key norms, whatever the others have


@dataclass(frozen=True)
class TokenFlowGeneratorConfig:
    """Sizes of a `TokenFlowGenerator`; the defaults are the published model's, Llama-2-7B at 256 px.

    Args:
        layout: `Scales(...).to_dict()` of the tokenizer; the first side is 1, a code that the text alone predicts.
        codebook_sizes: codes of its one codebook.
        text_vocab: text ids are below this. The published 32,000 words and a padding id.
        max_text: ids per caption at most, the begin-of-sequence id included.
        code_dim: width of the tokenizer's code vectors.
        dim, n_layers, n_heads: width, blocks, heads.
        n_kv_heads: key-value heads (grouped-query attention); None means `n_heads`.
        hidden: width of the feed-forward.
        rope_base: theta.
        norm_eps: of the RMSNorms, those of queries and keys aside (1e-6).
        image_begin: text ids that stand between caption and codes. The published model writes the word "<img>", which is
            several ids; () is one learned vector.
        caption_dropout: share of captions dropped in training, so that guidance has an unconditional model.
    """

    layout: dict[str, Any] = field(default_factory=lambda: Scales(PUBLISHED_SCALES).to_dict())
    codebook_sizes: tuple[int, ...] = (32_768,)
    text_vocab: int = 32_001
    max_text: int = 128
    code_dim: int = 40
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    hidden: int = 11_008
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    image_begin: tuple[int, ...] = ()
    caption_dropout: float = 0.1

    def check(self) -> None:
        """Raise ConfigError, naming the value, if sizes do not fit together."""
        layout, kv = Layout.from_dict(self.layout), self.n_kv_heads or self.n_heads
        if not isinstance(layout, Scales) or layout.sizes[0] != 1:
            raise ConfigError(
                f"layout={layout}; next-scale prediction needs Scales that begin with 1, as TokenFlow's tokenizer has them"
            )
        if len(self.codebook_sizes) != 1:
            raise ConfigError(f"codebook_sizes={self.codebook_sizes}; next-scale prediction is of one codebook")
        if self.dim % (2 * self.n_heads):
            raise ConfigError(f"dim={self.dim} over n_heads={self.n_heads} is no even head width")
        if self.n_heads % kv:
            raise ConfigError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={kv}")
        for name in ("text_vocab", "max_text", "code_dim", "n_layers", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected at least 1")
        if not all(0 <= i < self.text_vocab for i in self.image_begin):
            raise ConfigError(f"image_begin={self.image_begin}; expected text ids below text_vocab={self.text_vocab}")
        if not 0 <= self.caption_dropout < 1:
            raise ConfigError(f"caption_dropout={self.caption_dropout}; expected 0 <= caption_dropout < 1")


class LeftPaddedText(TextCondition):
    """Captions moved to the end of their rows, then the begin of the image: text ids, or one learned vector without any."""

    def __init__(self, vocab: int, dim: int, image_begin: Sequence[int] = ()) -> None:
        super().__init__(vocab, dim)
        self.register_buffer("begin", torch.tensor(image_begin, dtype=torch.int64), persistent=False)
        if image_begin:
            self.boi = None

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T + M, dim) and which are real (B, T + M), of ids (B, T) and a begin of M ids."""
        ids, mask = to_the_end(ids[..., None], mask)
        x = self.embeddings(ids[..., 0])
        begin = self.boi[None].to(x.dtype) if self.boi is not None else self.embeddings(self.begin)  # (M, dim)
        return torch.cat([x, begin.expand(len(x), -1, -1)], 1), F.pad(mask, (0, len(begin)), value=True)


class PostNormBlock(DecoderBlock):
    """x + norm(attention(x)), then x + norm(SwiGLU(x)); the parameters are those of `DecoderBlock`."""

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
        x = x[:, keep:] + self.attention_norm(self.attention(x, rope, mask, cache, at, end, keep))
        return x + self.ffn_norm(self.feed_forward(x))


class TokenFlowGenerator(Generator):
    """Next-scale decoder over a caption. See the module and `Generator` for arguments.

    A new one has no codebook until `take_codebook` or weights are loaded.

    Attributes:
        scales: sides of the maps.
        scale_starts: index of the first code of each scale, and N at the end.
    """

    type_name = "tokenflow-t2i"
    config_class = TokenFlowGeneratorConfig

    def __init__(self, config: TokenFlowGeneratorConfig, text: Prompts | None = None, **kwargs: Any) -> None:
        config.check()
        if text is not None and not isinstance(text, TextTokenizer):
            raise ConfigError(f"TokenFlow's generator reads text ids and was given {type(text).__name__}")
        if text is not None and text.vocab_size > config.text_vocab:
            raise ConfigError(f"the text tokenizer has {text.vocab_size} ids but text_vocab={config.text_vocab}")
        super().__init__(config, text, **kwargs)
        c = config
        self.layout = Layout.from_dict(c.layout)
        self.codebook_sizes, self.max_text = tuple(c.codebook_sizes), c.max_text
        self.scales, self.scale_starts = self.layout.sizes, (0, *self.layout.prefixes())
        n = self.layout.length
        scale_of = torch.cat([torch.full((s * s,), i) for i, s in enumerate(self.scales)])
        self.register_buffer("scale_of", scale_of, persistent=False)  # (N,)
        self.register_buffer("order", torch.arange(n)[:, None], persistent=False)  # each code is a step of its own
        self._has_codebook = False  # known to have one

        self.condition = LeftPaddedText(c.text_vocab, c.dim, c.image_begin)
        self.codes = CodeVectors(self.codebook_sizes[0], c.code_dim, c.dim, layers=2)
        self.levels = nn.Embedding(len(self.scales) + 1, c.dim)  # 0 is text; row 1 is never read, scale 1 being text's
        self.positions = nn.Parameter(torch.empty(n, c.dim))  # of the slot that predicts each code
        self.layers = nn.ModuleList(
            PostNormBlock(
                Attention(c.dim, c.n_heads, c.n_kv_heads, qk_norm=True, eps=QK_EPS),
                SwiGLU(c.dim, c.hidden),
                c.dim,
                c.norm_eps,
            )
            for _ in range(c.n_layers)
        )
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = Linear(c.dim, self.codebook_sizes[0], bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Levels and positions as published, N(0, 1 / (3 dim)) cut at two deviations; the projector as torch does; all else
        N(0, 0.02), as a Llama before training."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not name.startswith("codes."):
                nn.init.normal_(module.weight, std=0.02)
        if self.condition.boi is not None:
            nn.init.normal_(self.condition.boi, std=0.02)
        std = math.sqrt(1 / (3 * self.config.dim))
        for weight in (self.levels.weight, self.positions):
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    def start_from(self, source: TokenFlowGenerator) -> list[str]:
        """Take every weight of `source`, which may have other scales, and its codebook.

        Returns:
            names of the weights that stay as initialised: levels and positions of other scales.

        Raises:
            ConfigError: any other weight differs in shape or is missing.
        """
        theirs, own = source.state_dict(), self.state_dict()
        fresh = [k for k in ("levels.weight", "positions") if source.scales != self.scales]
        wrong = [k for k in {**theirs, **own} if k not in fresh]
        wrong = [k for k in wrong if k not in theirs or k not in own or theirs[k].shape != own[k].shape]
        if wrong:
            raise ConfigError(
                f"cannot start from a generator of other sizes: {', '.join(wrong[:4])} differ; only scales may"
            )
        self.load_state_dict({k: v for k, v in theirs.items() if k not in fresh}, strict=False)
        return fresh

    # -- the tokenizer's codebook --------------------------------------------------------------------------------------

    @property
    def needs_codebook(self) -> bool:
        return True

    def take_codebook(self, table: Tensor) -> None:
        """See `Generator.take_codebook`. Raises ConfigError for a table of another shape, or one that is not finite."""
        self.codes.take(table)

    def _check_codebook(self) -> None:
        if not self._has_codebook and not bool(self.codes.codebook.isfinite().all()):
            raise ConfigError(
                "this generator has no code vectors; call take_codebook(tokenizer.codebook_table()) with its tokenizer"
            )
        self._has_codebook = True

    # -- the running map ------------------------------------------------------------------------------------------------

    def add_scale(self, running: Tensor | None, ids: Tensor, scale: int) -> Tensor:
        """The map of all scales up to one, float32 (B, code_dim, s, s), from that before it at the same side, and its ids.

        Args:
            running: float32 (B, code_dim, s, s); None for the first scale.
            ids: int64 (B, s^2).
        """
        side = self.scales[scale]
        codes = F.embedding(ids, self.codes.codebook).float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return codes if running is None else running + codes

    def resize(self, running: Tensor, scale: int) -> Tensor:
        """A map at the side of `scale`: bicubic, without antialiasing, corners not aligned."""
        return F.interpolate(running, size=(self.scales[scale],) * 2, mode="bicubic", align_corners=False)

    @torch.no_grad()
    def maps(self, ids: Tensor, scales: int) -> Tensor:
        """Features float32 (B, slots, code_dim) that the slots of scales 2 … `scales` read, of ids (B, N)."""
        running, out = None, [ids.new_zeros(len(ids), 0, self.config.code_dim, dtype=torch.float32)]
        for i in range(scales - 1):
            running = self.add_scale(running, ids[:, self.scale_starts[i] : self.scale_starts[i + 1]], i)
            running = self.resize(running, i + 1)
            out.append(running.flatten(2).mT)
        return torch.cat(out, 1)

    # -- the parts, in the order of the sequence ------------------------------------------------------------------------

    def prefix(self, prompt: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What stands before the second scale: embeddings (B, P, dim) and which of them are real (B, P)."""
        self._check_codebook()
        x, mask = self.condition(prompt, prompt_mask)
        x = x + self.levels.weight[0].to(x.dtype)
        return torch.cat([x[:, :-1], x[:, -1:] + self.positions[:1].to(x.dtype)], 1), mask

    def embed(self, features: Tensor, start: int) -> Tensor:
        """Inputs (B, m, dim) of the slots of codes start … start + m - 1, from the running map there (B, m, code_dim)."""
        part = slice(start, start + features.shape[1])
        x = self.codes.projector(features.to(self.norm.weight.dtype))
        return x + self.levels(self.scale_of[part] + 1).to(x.dtype) + self.positions[part].to(x.dtype)

    def rope(self, text: int, length: int) -> tuple[Tensor, Tensor]:
        """Rotations (1, length, head_dim / 2), cos and sin, of captions of `text` columns and what follows.

        The image stands at the same positions however long the captions are, where padding to max_text would put it.
        """
        c = self.config
        positions = torch.arange(length, device=self.positions.device) + (c.max_text - text)
        return rope_table(positions[None, :, None], c.dim // c.n_heads, c.rope_base)

    def attends(self, prefix_mask: Tensor, scales: int) -> Tensor:
        """Which keys each query sees, bool (B, 1, L, L): causal in the text, whole scales in the image, no padding."""
        slots, p = self.scale_starts[scales], prefix_mask.shape[1]
        mask = prefix_attention(prefix_mask, p + slots - 1)
        scale = self.scale_of[:slots]
        mask[:, :, p - 1 :, p - 1 :] = scale[:, None] >= scale
        return mask

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
        """Decoder blocks, before the final norm; arguments as `LlamaGenerator.blocks`."""
        start, stop = part or (0, len(self.layers))
        for i in range(start, stop):
            last = i + 1 == len(self.layers)
            x = self.layers[i](x, rope, mask, None if cache is None else cache.layer(i), at, end, keep if last else 0)
        return x

    def code_logits(self, hidden: Tensor) -> Tensor:
        """float32 logits (B, m, K) from the last block's output."""
        return self.output(self.norm(hidden)).float()

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` positions."""
        c, like = self.config, self.positions
        heads = c.n_kv_heads or c.n_heads
        return KVCache(c.n_layers, batch, heads, length, c.dim // c.n_heads, device=like.device, dtype=like.dtype)

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
        """See `Generator.forward`. The cross-entropy is the mean over all codes of all scales, as published.

        The head has the codes alone. The published one has words too, which sampling leaves out, and was also trained to
        write an end after the last code.

        Raises:
            InputError: code_ids of another length. ConfigError: `hidden_of` beyond the blocks.
        """
        ids = code_ids[..., 0] if code_ids.ndim == 3 else code_ids  # (B, N)
        if code_ids.shape[1:] not in ((self.layout.length,), (self.layout.length, 1)):
            raise InputError(
                f"code_ids have shape {tuple(code_ids.shape)}; expected {self.layout.length} ids per item, as in {self.layout}"
            )
        if hidden_of is not None and not 1 <= hidden_of <= len(self.layers):
            raise ConfigError(f"hidden_of={hidden_of}; expected a block from 1 to {len(self.layers)}")
        x, prefix_mask = self.prefix(prompt, prompt_mask)
        p = x.shape[1]
        x = torch.cat([x, self.embed(self.maps(ids, len(self.scales)), 1)], 1)  # (B, P + N - 1, dim)
        rope = self.rope(prompt.shape[1], x.shape[1])
        mask = self.attends(prefix_mask, len(self.scales))
        # nothing is read from the text positions of the last block unless they predict
        keep = 0 if text_loss else p - 1
        states = None
        if hidden_of is not None and hidden_of < len(self.layers):
            x = self.blocks(x, rope, mask, part=(0, hidden_of))
            states = x[:, p - 1 :]
            hidden = self.blocks(x, rope, mask, keep=keep, part=(hidden_of, len(self.layers)))
        else:
            hidden = self.blocks(x, rope, mask, keep=keep)
            states = hidden[:, -self.layout.length :] if hidden_of is not None else None

        logits = self.code_logits(hidden[:, -self.layout.length :])  # (B, N, K)
        keep = torch.ones_like(ids, dtype=torch.bool) if code_mask is None else code_mask
        count, targets = keep.sum(), ids.masked_fill(~keep, -100)
        ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=label_smoothing)
        losses = {"ce": ce / count}
        if z_loss:
            losses["z_loss"] = z_loss * (logits.logsumexp(-1).square() * keep).sum() / count
        text_logits = None
        if text_loss:
            text_logits = self._text_logits(hidden[:, : prompt.shape[1]], prompt_mask)
            following = prompt[:, 1:].masked_fill(~prompt_mask[:, 1:], -100)
            ce = F.cross_entropy(text_logits[:, :-1].flatten(0, 1), following.flatten(), reduction="sum")
            losses["text"] = text_loss * ce / prompt_mask[:, 1:].sum().clamp(min=1)  # every caption may be dropped
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == targets).sum() / count
        return GeneratorOutput(
            loss=sum(losses.values()),
            logits=logits,
            losses=losses,
            stats={"accuracy": accuracy},
            text_logits=text_logits,
            hidden=states,
        )

    def _text_logits(self, hidden: Tensor, prompt_mask: Tensor) -> Tensor:
        """float32 (B, T, text_vocab) in the prompt's own columns; the head is the text embedding, transposed."""
        columns = prompt_mask.int().argsort(dim=1, stable=True).argsort(dim=1)  # where `to_the_end` put each id
        hidden = hidden.gather(1, columns[..., None].expand_as(hidden))
        return F.linear(self.norm(hidden), self.condition.embeddings.weight).float()

    # -- drawing --------------------------------------------------------------------------------------------------------

    def draw(
        self, prompt: Tensor, prompt_mask: Tensor, settings: SamplingSettings, seeds: Sequence[int], **how: Any
    ) -> tuple[Tensor, SamplingReport]:
        """See `Generator.draw` and `tokgen.generators.next_scale.generate`."""
        from tokgen.generators import next_scale

        return next_scale.generate(self, prompt, prompt_mask, settings, seeds, **how)

    def int8(self) -> TokenFlowGenerator:
        """A copy with int8 weights in all linear layers but the projector, to draw with; it cannot be trained or saved."""
        made = copy.deepcopy(self).eval().requires_grad_(False)
        codes, made.codes = made.codes, None
        to_int8(made)
        made.codes = codes  # its few channels are not worth it
        return made

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> Path:
        """As `Generator.save_pretrained`. Raises ConfigError for an int8 copy or without code vectors."""
        if isinstance(self.output, Int8Linear):
            raise ConfigError("this generator is an int8 copy for drawing; save the one that it was made from")
        self._check_codebook()
        return super().save_pretrained(folder, **kwargs)
