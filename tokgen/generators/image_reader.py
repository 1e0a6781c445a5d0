"""Reading pictures: a visual tokenizer's codes before the text of a causal language model.

    position   0        1 … M            M+1 …
    input      begin    the M places     prompt, caption
    predicts                    caption  caption … end

The places are vectors of the tokenizer, projected (ETT, arXiv 2505.10562, sec. 3.1): p(x_t | picture, x_<t) then has a
gradient into whatever made them. Or they are embeddings of the ids, learned here: the baseline that knows nothing of the
codebook. `begin` stands there only if the language model has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError, InputError
from tokgen.generators.language_model import LanguageModel
from tokgen.nn.projector import Projector
from tokgen.pretrained import Pretrained
from tokgen.tokenizers.base import VisualTokenizer
from tokgen.tokens import Tokens


@dataclass(frozen=True)
class VisualInputConfig:
    """What a picture becomes before a language model reads it.

    Args:
        kind: "embeddings": code vectors through a projector; "indices": an embedding of its own for each id.
        dim: width of the language model.
        code_dim: for "embeddings": width of the code vectors.
        layers: for "embeddings": of the projector.
        codebook_sizes: for "indices": ids of each codebook; the embeddings of a place's ids are added.
    """

    kind: str
    dim: int
    code_dim: int = 0
    layers: int = 2
    codebook_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("embeddings", "indices"):
            raise ConfigError(f"visual input {self.kind!r}; expected embeddings or indices")
        if self.kind == "embeddings" and (self.code_dim < 1 or self.layers < 1):
            raise ConfigError(f"visual input: code_dim {self.code_dim} and layers {self.layers} must be at least 1")


class VisualInput(Pretrained):
    """(B, M, dim) of a picture's tokens and code vectors; see `VisualInputConfig`."""

    type_name = "visual-input"
    config_class = VisualInputConfig

    def __init__(self, config: VisualInputConfig) -> None:
        super().__init__(config)
        self.projector = self.table = None
        if config.kind == "embeddings":
            self.projector = Projector(config.code_dim, config.dim, config.layers)
        else:
            self.table = nn.Embedding(sum(config.codebook_sizes), config.dim)
            nn.init.normal_(self.table.weight, std=0.02)
            starts = torch.tensor([0, *config.codebook_sizes[:-1]]).cumsum(0)
            self.register_buffer("starts", starts, persistent=False)

    @classmethod
    def of(cls, tokenizer: VisualTokenizer, dim: int, kind: str = "embeddings", layers: int = 2) -> VisualInput:
        """For a tokenizer and a language model of width `dim`. Raises ConfigError for a tokenizer without vectors."""
        if kind == "embeddings":
            return cls(VisualInputConfig(kind, dim, tokenizer.code_dim, layers))
        return cls(VisualInputConfig(kind, dim, codebook_sizes=tuple(tokenizer.codebook_sizes)))

    def forward(self, tokens: Tokens, codes: Tensor | None) -> Tensor:
        """Inputs (B, M, dim).

        Args:
            tokens: ids (B, M) or (B, M, C); all must be real.
            codes: their vectors (B, M, code_dim), with gradients if they are to get any; "indices" needs none.
        """
        if self.projector is not None:
            return self.projector(codes)
        ids = tokens.ids if tokens.ids.ndim == 3 else tokens.ids[..., None]  # (B, M, C)
        return self.table(ids + self.starts).sum(2)


@dataclass
class Reading:
    """What reading a batch of captioned pictures gives.

    Attributes:
        loss: mean cross-entropy of the caption's ids and their end, nats, a scalar with gradients; 0 if there are none.
        count: of these ids.
        correct: how many of them were the likeliest.
    """

    loss: Tensor
    count: Tensor
    correct: Tensor


class ImageReader(nn.Module):
    """A language model that reads pictures.

    Args:
        lm: the language model.
        visual: what pictures become; of the same width.
        prompt: text between picture and caption, the same for all; nothing is learned from it.
        max_text: ids of a caption at most, its end included; longer ones are cut.
    """

    def __init__(self, lm: LanguageModel, visual: VisualInput, prompt: str = "", max_text: int = 128) -> None:
        super().__init__()
        if visual.config.dim != lm.dim:
            raise ConfigError(
                f"the visual input is {visual.config.dim} wide, the language model {lm.dim}; make it anew"
            )
        if max_text < 1:
            raise ConfigError(f"max_text is {max_text}; the end of a caption alone needs 1")
        self.lm, self.visual, self.prompt, self.max_text = lm, visual, prompt, max_text

    def forward(
        self, tokens: Tokens, codes: Tensor | None, captions: Sequence[str], valid: Tensor | None = None
    ) -> Reading:
        """Predict each caption from its picture.

        Args:
            tokens, codes: as `VisualInput.forward`, B pictures.
            captions: B strings.
            valid: bool (B,), which of them count; None means all.

        Raises:
            InputError: not B strings.
        """
        if len(captions) != len(tokens.ids):
            raise InputError(f"{len(captions)} captions for {len(tokens.ids)} pictures; give one for each")
        ids, asked = self.text_ids(captions, tokens.ids.device)  # (B, T)
        if valid is not None:
            asked = asked & valid[:, None]
        x, places = self.inputs(tokens, codes, ids[:, :-1])
        logits = self.lm(x, ids.shape[1], places)  # (B, T, V); the last place predicts the first id
        targets = ids.masked_fill(~asked, -100)
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        count = asked.sum()
        return Reading(total / count.clamp(min=1), count, (logits.argmax(-1) == targets).sum())

    def inputs(self, tokens: Tokens, codes: Tensor | None, ids: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Inputs (B, L, dim) of pictures and the text after them (B, T), and where the places lie."""
        text = self.lm.embed(ids)
        picture = self.visual(tokens, codes).to(text.dtype)  # (B, M, dim)
        parts, first = [picture, text], 0
        if self.lm.begin is not None:
            parts = [self.lm.embed(ids.new_full((len(ids), 1), self.lm.begin)), *parts]
            first = 1
        return torch.cat(parts, 1), (first, picture.shape[1])

    def text_ids(self, captions: Sequence[str], device: Any = None) -> tuple[Tensor, Tensor]:
        """Prompt, caption and end of each text, int64 (B, T), padded on the right, and which are predicted, bool (B, T)."""
        vocabulary = self.lm.text
        rows, real = (t[:, 1:] for t in vocabulary.encode(captions, self.max_text))  # without the vocabulary's begin
        lengths = real.sum(1, keepdim=True)
        rows = F.pad(rows, (0, 1), value=vocabulary.pad_id).scatter(1, lengths, self.lm.end)
        asked = torch.arange(rows.shape[1]) <= lengths
        before = self._prompt_ids().expand(len(rows), -1)
        ids = torch.cat([before, rows], 1)
        return ids.to(device), torch.cat([torch.zeros_like(before, dtype=torch.bool), asked], 1).to(device)

    def _prompt_ids(self) -> Tensor:
        if not self.prompt:
            return torch.empty(1, 0, dtype=torch.int64)
        return self.lm.text.encode([self.prompt], 1 << 20)[0][:, 1:]

    @torch.no_grad()
    def caption(self, tokens: Tokens, codes: Tensor | None) -> list[str]:
        """The likeliest next id, again and again, for each of B pictures. There is no cache: for looking, not for serving."""
        training = self.training
        self.eval()
        ids = self._prompt_ids().to(tokens.ids.device).expand(len(tokens.ids), -1)
        start, ended = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        while ids.shape[1] - start < self.max_text and not bool(ended.all()):
            x, places = self.inputs(tokens, codes, ids)
            following = self.lm(x, 1, places)[:, -1].argmax(-1).masked_fill(ended, self.lm.end)
            ended = ended | (following == self.lm.end)
            ids = torch.cat([ids, following[:, None]], 1)
        self.train(training)
        said = ids[:, start:]
        return self.lm.text.decode(said, (said == self.lm.end).cumsum(1) == 0)
