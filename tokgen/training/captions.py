"""Captions of the training shards, and the vocabulary that reads them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokgen.generators.conditions import Prompts, dump_prompts, undump_prompts
from tokgen.text import SETTINGS, TextTokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """How captions are read. A class-conditional generator takes each different caption of the training shards as a class.

    Attributes:
        path: where the text vocabulary comes from: a folder that `TextTokenizer.save` or a generator's `save_pretrained`
            wrote, or a Hub name; None learns one from the captions of the training shards, the same from the same
            shards. For condition "features": Hub name or folder of the T5 encoder.
        vocab_size: upper bound of a learned vocabulary; also the size of the text embedding.
        special_words: words or phrases that get one id each.
        lowercase: captions are lower-cased.
        max_captions: captions read to learn from.
    """

    path: str | None = None
    vocab_size: int = 4096
    special_words: tuple[str, ...] = ()
    lowercase: bool = True
    max_captions: int = 1_000_000


def training_captions(data: Any, limit: int, variants: bool = True) -> Iterator[str]:
    """Captions of the training shards in their order, with the `variants` in the JSON metadata or without; `limit` at most."""
    from tokgen.data.decode import BadSample, decode_caption, decode_json
    from tokgen.data.tar import Unreadable, read_samples

    shards, count = data.sets["train"], 0
    for shard in shards.shards:
        chosen = None if shard.selected is None else set(shard.selected.tolist())
        with contextlib.suppress(Unreadable):  # the data module has said so
            samples = read_samples(
                shard.location,
                shards.allow_shell_urls,
                extensions=("txt", "json"),
                max_member_bytes=data.max_member_bytes,
                wanted=lambda index, chosen=chosen: chosen is None or index in chosen,
            )
            for _, sample in samples:
                texts = []
                try:
                    texts += [caption] if (caption := decode_caption(sample.members)) is not None else []
                    if variants and "json" in sample.members:
                        others = decode_json(sample.members["json"]).get("captions")
                        texts += [v for v in others if isinstance(v, str)] if isinstance(others, list) else []
                except BadSample:
                    continue
                for text in filter(None, texts):
                    yield text
                    count += 1
                    if count >= limit:
                        return


def named_vocabulary(text: Text) -> TextTokenizer:
    """The vocabulary of `text.path`."""
    if (Path(text.path) / SETTINGS).is_file():
        return TextTokenizer.load(text.path)
    return TextTokenizer.from_name(text.path, lowercase=text.lowercase)


def learned_vocabulary(data: Any, text: Text) -> TextTokenizer:
    """A vocabulary of the captions of the training shards, the same from the same shards."""
    start = time.monotonic()
    captions = list(training_captions(data, text.max_captions))
    vocabulary = TextTokenizer.train(captions, text.vocab_size, text.special_words, lowercase=text.lowercase)
    log.info(
        "text vocabulary: %d ids learned from %d captions in %.1f s",
        vocabulary.vocab_size, len(captions), time.monotonic() - start,
    )  # fmt: skip
    return vocabulary


def made_once(trainer: Any, make: Callable[[], Prompts]) -> Prompts:
    """What `make` gives on rank zero, on every rank."""
    made: list[str] = dump_prompts(make()) if trainer.is_global_zero else []
    return undump_prompts(trainer.strategy.broadcast(made))


def vocabulary_of(trainer: Any, text: Text) -> TextTokenizer:
    """The vocabulary of `text.path`, or one learned from the training captions, the same on all ranks."""
    if text.path is not None:
        return named_vocabulary(text)
    return made_once(trainer, lambda: learned_vocabulary(trainer.datamodule, text))
