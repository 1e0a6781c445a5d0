"""What stands before the codes: byte-pair text, a class, or a text encoder's features.

A condition turns its tensors into the prefix of the sequence and knows their unconditional counterpart. The prompt
encoders beside them turn what a user writes into these tensors.

    kind        tensors                      prefix                            unconditional
    text        ids (B, T), right-padded     embeddings, then begin-of-image   begin-of-sequence and begin-of-image alone
    class       labels (B, 1)                one embedding                     a row of its own
    features    (B, T, D), left-padded       projected by an MLP               stored rows in place of all T

`class` and `features` are LlamaGen's (Sun et al. 2024, arXiv 2406.06525, section 2.2): there the last condition token
predicts the first code. `text` is Token-Shuffle's and ARRA's: one sequence without a separate encoder.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import CheckpointError, ConfigError, InputError, MissingDependency
from tokgen.files import write_json
from tokgen.text import SETTINGS, TextTokenizer


class TextCondition(nn.Module):
    """Text ids and one begin-of-image vector.

    Args:
        vocab: text ids are below this.
        dim: model width.
    """

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab, dim)
        self.boi = nn.Parameter(torch.empty(dim))

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T + 1, dim) and which are real (B, T + 1) of ids int64 (B, T)."""
        x = self.embeddings(ids)
        return torch.cat([x, self.boi.to(x.dtype).expand(len(x), 1, -1)], 1), F.pad(mask, (0, 1), value=True)

    def null(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The unconditional prompt in the same shape: only the first id is real."""
        alone = torch.zeros_like(mask)
        alone[:, 0] = True
        return ids, alone


class ClassCondition(nn.Module):
    """One embedding per class, and one more for "no class"."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.classes = classes
        self.embeddings = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, dim) of labels int64 (B, 1)."""
        return self.embeddings(labels), mask

    def null(self, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(labels, self.classes), mask


class FeatureCondition(nn.Module):
    """Features of a frozen text encoder through Linear, GELU (tanh form), Linear, without biases.

    The unconditional rows are drawn once and never trained, as published; they replace all rows of a caption, and the
    caption's mask stays.

    Args:
        length: rows T.
        features: their width D.
        dim: model width.
    """

    def __init__(self, length: int, features: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.register_buffer("unconditional", torch.randn(length, features) / features**0.5)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, dim) of features (B, T, D)."""
        features = features.to(self.fc1.weight.dtype)
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh")), mask

    def null(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.unconditional.to(features.dtype).expand_as(features), mask


# -- prompts to tensors -------------------------------------------------------------------------------------------------


class ClassNames:
    """Prompts of a class-conditional generator: a name, or a class index as a number or digits.

    Args:
        names: name of each class, all different; a name that looks like a number is found by name first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.settings = {"kind": "classes", "names": self.names}
        self.index = {name: i for i, name in enumerate(self.names)}
        if len(self.index) != len(self.names):
            raise ConfigError("class names must all be different")

    def encode(
        self, prompts: Sequence[str | int], max_length: int = 1, pad_to: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Labels int64 (B, 1) and mask (B, 1); "" is the unconditional class. Raises InputError for an unknown class."""
        labels = torch.tensor([[self._label(p)] for p in prompts], dtype=torch.int64)
        return labels, torch.ones_like(labels, dtype=torch.bool)

    def _label(self, prompt: str | int) -> int:
        if prompt in self.index:
            return self.index[prompt]
        if prompt == "":
            return len(self.names)
        try:
            label = int(prompt)
        except ValueError:
            label = -1
        if not 0 <= label < len(self.names):
            shown = ", ".join(self.names[:5])
            raise InputError(
                f"no class {prompt!r}; expected a number from 0 to {len(self.names) - 1} or a name such as {shown}"
            )
        return label

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_json(self.settings, Path(folder) / SETTINGS)


class T5Features:
    """Prompts of a feature-conditional generator: the last hidden state of a T5 encoder, padded on the left with zeros.

    The encoder stays outside the generator's weights; it is loaded from where `name` says when first needed.

    Args:
        name: Hub name or local folder, such as "google/flan-t5-xl" (2,048 channels).
        length: rows; longer captions are cut.
        lowercase: LlamaGen lower-cases captions (and cleans them of markup, which is left to the data).
    """

    def __init__(self, name: str, length: int = 120, lowercase: bool = True) -> None:
        self.name, self.length, self.lowercase = name, length, lowercase
        self.settings = {"kind": "t5", "name": name, "length": length, "lowercase": lowercase}
        self._model: Any = None

    def load(self) -> T5Features:
        """Load the encoder now. Raises MissingDependency, CheckpointError."""
        if self._model is None:
            try:
                from transformers import AutoTokenizer, T5EncoderModel
            except ImportError:
                raise MissingDependency(
                    f"text encoder {self.name!r} needs transformers; install it with pip install 'tokgen[transformers]'"
                ) from None
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.name)
                self._model = T5EncoderModel.from_pretrained(self.name).eval().requires_grad_(False)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"no T5 encoder at {self.name!r} ({type(error).__name__}); expected a Hub name or a local folder"
                ) from None
        return self

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.load()._model.config.d_model

    def to(self, device: torch.device | str) -> T5Features:
        self.load()._model.to(device)
        return self

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], max_length: int | None = None, pad_to: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features float (B, length, D) and mask bool (B, length), real rows at the end; "" has none but its end id.

        Raises:
            InputError: not a list of strings.
        """
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise InputError("prompts must be a list of strings; wrap a single string as [prompt]")
        self.load()
        prompts = [p.lower() if self.lowercase else p for p in prompts]
        batch = self._tokenizer(
            prompts, max_length=self.length, padding="max_length", truncation=True, return_tensors="pt"
        )
        if bool((batch["attention_mask"].sum(1) == self.length).any()):
            warnings.warn(f"a caption fills all {self.length} rows and may have been cut", stacklevel=2)
        device = next(self._model.parameters()).device
        mask = batch["attention_mask"].to(device)
        features = self._model(batch["input_ids"].to(device), attention_mask=mask).last_hidden_state
        return to_the_end(features, mask.bool())

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_json(self.settings, Path(folder) / SETTINGS)


def to_the_end(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, T, D) that are real (B, T) moved to the end in their order, with zeros before them, and their mask.

    The last row, which predicts the first code, is then a real one in every caption.
    """
    order = mask.int().argsort(dim=1, stable=True)  # padding first
    mask = mask.gather(1, order)
    features = features.gather(1, order[..., None].expand_as(features))
    return features.masked_fill(~mask[..., None], 0), mask


Prompts = TextTokenizer | ClassNames | T5Features


def load_prompts(folder: str | os.PathLike[str]) -> Prompts:
    """The prompt encoder that a generator's folder was saved with. Raises CheckpointError if it is missing or damaged."""
    path = Path(folder) / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return _make(settings) or TextTokenizer.load(folder)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def dump_prompts(prompts: Prompts) -> list[str]:
    """A prompt encoder as two strings, for a checkpoint or another process; `undump_prompts` reads them."""
    vocabulary = prompts.tokenizer.to_str() if isinstance(prompts, TextTokenizer) else ""
    return [vocabulary, json.dumps(prompts.settings)]


def undump_prompts(dumped: list[str]) -> Prompts:
    from tokenizers import Tokenizer

    settings = json.loads(dumped[1])
    return _make(settings) or TextTokenizer(Tokenizer.from_str(dumped[0]), settings)


def _make(settings: dict[str, Any]) -> ClassNames | T5Features | None:
    if settings["kind"] == "classes":
        return ClassNames(settings["names"])
    if settings["kind"] == "t5":
        return T5Features(settings["name"], settings["length"], settings["lowercase"])
    return None  # a TextTokenizer's
