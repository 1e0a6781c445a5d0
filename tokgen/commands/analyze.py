"""`tokgen analyze`: code shards as a language, next to others and to their captions."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokgen.errors import ConfigError, DataError, InputError

if TYPE_CHECKING:
    import numpy as np

    from tokgen.evaluation.language import Corpus, Measures


def analyze(
    codes: list[str],
    out: str,
    text: bool = False,
    ids: int | None = None,
    merges: int = 1000,
    holdout: float = 0.1,
    plots: bool = True,
    seed: int = 0,
) -> None:
    """Measure code shards as a language: Zipf, innovation, entropy, n-grams, neighbours; each next to shuffled controls.

    Args:
        codes: folders of code shards, as `tokgen tokenize` writes them; several are compared.
        out: folder for report.json, report.md and plots.
        text: also measure the captions of the shards: their words, and byte pairs of as many types as the largest codebook.
        ids: measure at most so many ids of each language, of sentences drawn at random; most measures depend on the number.
        merges: units that byte pairs of ids are merged to.
        holdout: share of the sentences that n-gram models and merged units are tested on.
        plots: draw them, which needs matplotlib; --no_plots leaves them out.
        seed: of what is drawn: controls, order, held-out sentences.
    """
    import numpy as np

    from tokgen.evaluation.language import study
    from tokgen.evaluation.plots import check_plots, plot_studies
    from tokgen.files import replacing, write_json

    if not 0 < holdout < 1:
        raise ConfigError(f"holdout is {holdout}; it is a share of the sentences above 0 and below 1, such as 0.1")
    if merges < 0 or (ids is not None and ids < 1):
        raise ConfigError(f"merges is {merges} and ids is {ids}; merges are 0 or more, and ids 1 or more")
    if plots:
        check_plots()
    read = {name: read_codes(folder) for name, folder in _names(codes).items()}
    languages = {name: corpus for folder, found in read.items() for name, corpus in found.languages(folder).items()}
    if text:
        captions = list(dict.fromkeys(c for found in read.values() for c in found.captions))
        if len([caption for _, caption in captions if caption]) < 2:
            raise DataError(f"{', '.join(codes)}: --text needs captions, and the samples have none; leave it out")
        languages |= caption_languages([c for _, c in captions], max(max(r.codebook_sizes) for r in read.values()))
    studies: dict[str, Mapping[str, Measures]] = {}
    for name, corpus in languages.items():
        if ids is not None:
            corpus = corpus.sample(ids, np.random.default_rng([seed, 99]))
        if len(corpus.lengths) < 2:
            raise InputError(f"{name} has {len(corpus.lengths)} sentence to measure; give more samples, or more --ids")
        print(f"measuring {name}: {len(corpus.lengths)} sentences, {len(corpus.ids)} ids")
        studies[name] = study(corpus, seed, merges=merges, holdout=holdout)
    folder = Path(out)
    settings = {"ids": ids, "merges": merges, "holdout": holdout, "seed": seed}
    about = {name: {"folder": codes[i], **found.about()} for i, (name, found) in enumerate(read.items())}
    found = {name: {kind: asdict(m) for kind, m in each.items()} for name, each in studies.items()}
    write_json(_plain({"settings": settings, "codes": about, "languages": found}), folder / "report.json")
    drawn = plot_studies(studies, folder) if plots else []
    with replacing(folder / "report.md") as temporary:
        temporary.write_text(report(studies, [path.name for path in drawn]), encoding="utf-8")
    print(comparison(studies))
    print(f"\nreport.json, report.md{' and plots' if plots else ''} are in {out}")


def _names(folders: list[str]) -> dict[str, str]:
    """A name for each folder: its own, with those above it where that is not enough."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise InputError(f"a folder is named twice in {', '.join(folders)}; name each once")
    deep = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return {"/".join(p[-deep:]): folder for p, folder in zip(parts, folders)}


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Codes:
    """All codes of a folder: `rows` of int64 (n,) or (n, C), with (key, caption) of each; and what could not be read, by reason."""

    codebook_sizes: tuple[int, ...]
    layout: dict[str, Any]
    tokenizer: str
    rows: list[np.ndarray] = field(default_factory=list)
    captions: list[tuple[str, str]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer,
            "layout": self.layout,
            "codebook_sizes": list(self.codebook_sizes),
            "skipped": self.skipped,
        }

    def languages(self, name: str) -> dict[str, Corpus]:
        """One of a single codebook. Of several: each by itself, and jointly, in the order that a language model reads them."""
        import numpy as np

        from tokgen.evaluation.language import Corpus

        shape = tuple(self.layout[axis] for axis in ("t", "h", "w") if self.layout.get(axis) is not None)
        if self.layout.get("kind") != "Grid" or any(len(row) != math.prod(shape) for row in self.rows):
            shape = None
        if self.rows[0].ndim == 1:
            return {name: Corpus.of(self.rows, self.codebook_sizes[0], shape)}
        sizes = np.array(self.codebook_sizes)
        found = {
            f"{name}, codebook {c}": Corpus.of([row[:, c] for row in self.rows], int(size), shape)
            for c, size in enumerate(sizes)
        }
        joint = [(row + np.cumsum(sizes) - sizes).ravel() for row in self.rows]
        return {**found, f"{name}, joint": Corpus.of(joint, int(sizes.sum()))}


def read_codes(folder: str) -> Codes:
    """All samples of a folder of code shards.

    Raises:
        FileNotFoundError, DataError: no such folder, shards of another kind, without their codebooks' sizes or without a
            readable sample, or samples of different numbers of codebooks.
    """
    from tokgen.data.batches import Captions, CodeSamples
    from tokgen.data.decode import MAX_MEMBER_BYTES, BadSample
    from tokgen.data.shards import Manifest
    from tokgen.data.tar import iter_samples, join, open_bytes

    manifest = Manifest.load(folder)
    if manifest.kind != "codes":
        raise DataError(
            f"{folder} holds {manifest.kind}; code shards are analyzed, which `tokgen tokenize {folder} --model MODEL` makes"
        )
    sizes = tuple(manifest.meta.get("codebook_sizes") or ())
    if not sizes:
        raise DataError(f'{folder}: its manifest names no "codebook_sizes"; write the codes with `tokgen tokenize`')
    decode = CodeSamples(Captions(required=False), sizes)
    found = Codes(sizes, dict(manifest.meta.get("layout") or {}), str(manifest.meta.get("tokenizer", "")))
    for shard in manifest.shards:
        with open_bytes(join(folder, shard.name)) as file:
            for _, raw in iter_samples(file, extensions=decode.extensions, max_member_bytes=MAX_MEMBER_BYTES):
                try:
                    item = decode(raw, random.Random(0))
                except BadSample as error:
                    found.skipped[error.reason] = found.skipped.get(error.reason, 0) + 1
                    continue
                found.rows.append(item["ids"][: item["length"]].numpy())
                found.captions.append((raw.key, item["caption"]))
    if not found.rows:
        raise DataError(f"{folder} has no readable codes ({found.skipped or 'no samples'}); write them again")
    shapes = {row.shape[1:] for row in found.rows}
    if len(shapes) > 1 or (shapes != {(len(sizes),)} and (shapes != {()} or len(sizes) > 1)):
        raise DataError(f"{folder}: ids of a position have shapes {sorted(shapes)}, and its codebooks are {sizes}")
    return found


def caption_languages(captions: list[str], vocabulary: int) -> dict[str, Corpus]:
    """Captions as "words" (lower-cased; punctuation marks are words) and as "byte pairs" of up to so many types.

    Byte pairs have their 256 bytes at least; the vocabulary of both is that of the types there are. Empty captions are left out.
    """
    from tokgen.evaluation.language import Corpus
    from tokgen.text import TextTokenizer

    words = [found for caption in captions if (found := re.findall(r"\w+|[^\w\s]", caption.lower()))]
    numbers = {word: i for i, word in enumerate(sorted({word for row in words for word in row}))}
    texts = [caption for caption in captions if caption.strip()]
    fixed = 2  # padding and begin come first, and are no words
    pairs = TextTokenizer.train(texts, max(vocabulary, 256) + fixed)
    ids, mask = pairs.encode(texts, max_length=max(map(len, texts)) * 4 + 2)
    rows = [row[real][1:].numpy() - fixed for row, real in zip(ids, mask)]
    return {
        "words": Corpus.of([[numbers[word] for word in row] for row in words], len(numbers)),
        "byte pairs": Corpus.of(rows, pairs.vocab_size - fixed),
    }


# -- reporting --------------------------------------------------------------------------------------------------------


def _rows(m: Measures) -> dict[str, float]:
    """The figures of the tables."""
    first = m.zipf[1]
    rows: dict[str, float] = {
        "sentences": m.sentences,
        "ids": m.ids,
        "vocabulary K": m.vocabulary,
        "share of K used": m.entropy.used,
        "Zipf exponent": first.zipf.exponent,
        "R² of log-log": first.zipf.r2,
        "Kolmogorov-Smirnov": first.zipf.ks,
        "Zipf-Mandelbrot exponent": first.mandelbrot.exponent,
        "its shift": first.mandelbrot.shift,
        "its R²": first.mandelbrot.r2,
        "its Kolmogorov-Smirnov": first.mandelbrot.ks,
    }
    for n, found in m.zipf.items():
        if n > 1:
            rows[f"Zipf exponent, {n}-grams"] = found.zipf.exponent
            rows[f"{n}-grams that occur once"] = found.once
    rows |= {
        "innovation exponent": m.innovation.exponent,
        "new per 1,000 ids, at the end": 1000 * m.innovation.late,
        "sentences to 90 % of types": m.innovation.sentences_to_90,
        "entropy, bits": m.entropy.bits,
        "entropy / log2 K": m.entropy.normalised,
        "gzip, bits per id": m.compression.gzip,
        "xz, bits per id": m.compression.xz,
        "xz / log2 K": m.compression.xz_share,
    }
    rows |= {f"perplexity, {n}-grams": 2**bits for n, bits in m.ngrams.items()}
    for along, found in m.information.items():
        rows |= {
            f"information {along}, {d} apart, bits above chance": each.excess
            for d, each in found.items()
            if d in (1, 4)
        }
    rows |= {
        "neighbours the same": m.cooccurrence.repeats,
        "frequent pairs": m.cooccurrence.frequent,
        "PMI of frequent pairs, bits": m.cooccurrence.pmi,
        "normalised PMI": m.cooccurrence.npmi,
        "different ids per id of a sentence": m.cooccurrence.variety,
        "units per id, merged": m.merging.length,
        "depth of merges": m.merging.depth,
    }
    return rows


def _table(columns: Mapping[str, Mapping[str, float]]) -> str:
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        lines.append(f"| {row} | " + " | ".join(_number(column.get(row)) for column in columns.values()) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    if float(value).is_integer() and abs(value) >= 2:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3f}"


def comparison(studies: Mapping[str, Mapping[str, Measures]]) -> str:
    """A Markdown table: a column for each language."""
    return _table({name: _rows(each["ids"]) for name, each in studies.items()})


def report(studies: Mapping[str, Mapping[str, Measures]], plots: list[str]) -> str:
    """report.md: the comparison, the plots, and each language next to its controls."""
    heads = {"ids": "measured", "within": "shuffled within sentences", "shuffled": "shuffled", "uniform": "uniform"}
    parts = ["# The language of visual tokens", comparison(studies), *(f"![{Path(p).stem}]({p})" for p in plots)]
    for name, each in studies.items():
        parts += [f"## {name}", _table({heads[kind]: _rows(measures) for kind, measures in each.items()})]
    return "\n\n".join(parts) + "\n"


def _plain(value: Any) -> Any:
    """What is not a number becomes null, as JSON knows none."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
