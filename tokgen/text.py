"""Captions as ids: a byte-level byte-pair vocabulary, trained on captions or taken from a published model.

Every string encodes (the alphabet is the 256 bytes), and decoding gives the normalised string back. Ids are padded on
the right: the begin-of-sequence id is then always in column 0, so that dropping a caption for guidance means masking the
columns after it, no query row is ever without a key, and the real ids of a prompt sit in the same columns in any batch.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokgen.errors import CheckpointError, ConfigError, InputError, MissingDependency
from tokgen.files import replacing, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY, SETTINGS = "tokenizer.json", "text.json"

# Outside the 256 characters that stand for bytes, so that no text can encode to them.
PAD, BOS = "⟨pad⟩", "⟨bos⟩"

# GPT-2's split into words, numbers, punctuation and spaces (Radford et al. 2019), in Oniguruma's notation.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class TextTokenizer:
    """Strings to ids (B, T) with a mask, and back. Make one with `train`, `from_name` or `load`.

    Attributes:
        vocab_size: ids are below this.
        pad_id, bos_id: the padding id (always masked) and the id that begins every row.
        truncated: how many strings `encode` has cut so far.
    """

    def __init__(self, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.pad_id, self.bos_id = int(settings["pad_id"]), int(settings["bos_id"])
        self.truncated = 0

    # -- ways to make one ---------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        vocab_size: int,
        special_words: Sequence[str] = (),
        lowercase: bool = False,
        normalize_whitespace: bool = True,
    ) -> TextTokenizer:
        """Learn a byte-pair vocabulary; the same captions give the same vocabulary.

        Args:
            captions: strings.
            vocab_size: upper bound of ids: 2 for padding and begin, the special words, 256 bytes, then merges.
            special_words: words or phrases that become one id wherever they stand as whole words ("3d style").
            lowercase: lower-case everything, here and in `encode`.
            normalize_whitespace: runs of whitespace become one space and the ends are trimmed, here and in `encode`.

        Raises:
            ConfigError: vocab_size too small for the fixed entries, or an empty or repeated special word.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        settings = {"kind": "bpe", "pad_id": 0, "bos_id": 1, "lowercase": lowercase}
        settings |= {"normalize_whitespace": normalize_whitespace, "prefix_space": True}
        words = [_normalise(word, settings) for word in special_words]
        if "" in words or len(set(words)) != len(words):
            raise ConfigError(f"special_words {list(special_words)} hold an empty or repeated word")
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        fixed = 2 + len(words) + len(alphabet)
        if vocab_size < fixed:
            raise ConfigError(
                f"vocab_size={vocab_size} is too small: padding, begin, {len(words)} special words and 256 bytes need {fixed}"
            )
        # Special words teach no merges: they are cut out here and get an id of their own below.
        special = re.compile("|".join(f"(?<!\\w){re.escape(w)}(?!\\w)" for w in _longest_first(words)) or r"(?!)")
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = _splitter([])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2 - len(words), initial_alphabet=alphabet, show_progress=False
        )
        learner.train_from_iterator((" " + special.sub("", _normalise(c, settings)) for c in captions), trainer)
        learned = json.loads(learner.to_str())["model"]

        entries = [PAD, BOS, *(_as_bytes(" " + word) for word in words)]
        entries += [piece for piece in sorted(learned["vocab"], key=learned["vocab"].get) if piece not in entries]
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
        # ignore_merges: a piece that is in the vocabulary is taken whole, which makes special words one id
        model = models.BPE(vocab={piece: i for i, piece in enumerate(entries)}, merges=merges, ignore_merges=True)
        return cls(_assemble(Tokenizer(model), words), {**settings, "special_words": words})

    @classmethod
    def from_name(
        cls, name: str, lowercase: bool = False, normalize_whitespace: bool = True, revision: str | None = None
    ) -> TextTokenizer:
        """The vocabulary of a published model, by Hub name or local path, through transformers' AutoTokenizer.

        Raises:
            MissingDependency: transformers is not installed. CheckpointError: no such tokenizer, or it is not a fast one.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise MissingDependency(
                f"text tokenizer {name!r} needs transformers; install it with pip install 'tokgen[transformers]'"
            ) from None
        try:
            source = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no text tokenizer at {name!r} ({type(error).__name__}); expected a Hub name or a local folder"
            ) from None
        if not source.is_fast:
            raise CheckpointError(f"{name!r} has no fast tokenizer (tokenizer.json); choose a model that has one")
        first = next(
            (i for i in (source.bos_token_id, source.cls_token_id, source.eos_token_id) if i is not None), None
        )
        if first is None:
            raise CheckpointError(f"{name!r} has neither a begin, class nor end token to begin prompts with")
        pad = first if source.pad_token_id is None else source.pad_token_id
        settings = {"kind": "auto", "name": name, "pad_id": pad, "bos_id": first, "lowercase": lowercase}
        settings |= {"normalize_whitespace": normalize_whitespace, "prefix_space": False, "special_words": []}
        backend = type(source.backend_tokenizer).from_str(source.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, settings)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TextTokenizer:
        """Read what `save` wrote. Raises CheckpointError if it is missing or damaged."""
        from tokenizers import Tokenizer

        folder = Path(folder)
        for name in (VOCABULARY, SETTINGS):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} has no {name}; expected a folder with {VOCABULARY} and {SETTINGS}")
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            return cls(Tokenizer.from_str((folder / VOCABULARY).read_text(encoding="utf-8")), settings)
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            raise CheckpointError(f"the text tokenizer in {folder} cannot be read: {error}") from None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `text.json` into the folder, each whole or not at all."""
        folder = Path(folder)
        with replacing(folder / VOCABULARY) as temporary:
            temporary.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
        write_json(self.settings, folder / SETTINGS)

    # -- use ----------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def normalise(self, text: str) -> str:
        """The string that `decode(encode([text]))` gives back."""
        return _normalise(text, self.settings)

    def encode(self, texts: Sequence[str], max_length: int, pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the right.

        Args:
            texts: B strings; "" is the unconditional prompt.
            max_length: ids per row at most, the begin id included; longer strings are cut, counted in `truncated`, and
                warned about once.
            pad_to: T, at least the longest row; None pads to the longest.

        Returns:
            ids int64 (B, T) and mask bool (B, T), True where real; column 0 is the begin id.

        Raises:
            InputError: not a list of strings, or max_length below 1.
        """
        if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
            raise InputError("texts must be a list of strings; wrap a single string as [text]")
        if max_length < 1:
            raise InputError(f"max_length is {max_length}; the begin id alone needs 1")
        space = " " if self.settings["prefix_space"] else ""
        inputs = [space + text if text else "" for text in map(self.normalise, texts)]
        rows = [e.ids for e in self.tokenizer.encode_batch(inputs, add_special_tokens=False)]
        cut = sum(len(row) > max_length - 1 for row in rows)
        if cut and not self.truncated:
            longest = max(map(len, rows)) + 1
            warnings.warn(
                f"{cut} of {len(rows)} texts are longer than {max_length} ids (up to {longest}) and were cut; "
                "`truncated` counts them from here on",
                stacklevel=2,
            )
        self.truncated += cut
        rows = [[self.bos_id, *row[: max_length - 1]] for row in rows]
        width = max([pad_to or 1, *map(len, rows)])
        ids = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return ids.view(len(rows), width), torch.arange(width) < lengths[:, None]

    def decode(self, ids: Tensor, mask: Tensor | None = None) -> list[str]:
        """Strings of ids (B, T); padding, masked ids and the begin id are left out."""
        keep = (ids != self.pad_id) & (ids != self.bos_id)
        if mask is not None:
            keep &= mask
        texts = [self.tokenizer.decode(row[k].tolist(), skip_special_tokens=False) for row, k in zip(ids, keep)]
        return [t.removeprefix(" ") for t in texts] if self.settings["prefix_space"] else texts


def _normalise(text: str, settings: dict[str, Any]) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no bytes
    if settings["normalize_whitespace"]:
        text = " ".join(text.split())
    return text.lower() if settings["lowercase"] else text


def _longest_first(words: Iterable[str]) -> list[str]:
    return sorted(words, key=lambda w: (-len(w), w))


def _as_bytes(text: str) -> str:
    """The text in the alphabet of byte-level vocabularies, in which a space is written Ġ."""
    from tokenizers import pre_tokenizers

    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in pieces)


def _splitter(words: Sequence[str]) -> Any:
    """Split text into special words (with the space before them) and GPT-2's pieces, written as bytes."""
    from tokenizers import Regex, pre_tokenizers

    escaped = [re.sub(r"([^\w\s])", r"\\\1", word) for word in _longest_first(words)]
    special = rf" (?:{'|'.join(escaped)})(?![\p{{L}}\p{{N}}])|" if words else ""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(special + WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _assemble(tokenizer: Tokenizer, words: Sequence[str]) -> Tokenizer:
    from tokenizers import decoders

    tokenizer.pre_tokenizer = _splitter(words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
