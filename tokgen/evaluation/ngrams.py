"""Sentences of ids (`Corpus`), their shuffled controls, counts of n-grams by sorting, and the Kneser-Ney model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tokgen.errors import InputError

CONTROLS = ("within", "shuffled", "uniform")


# -- the corpus -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Corpus:
    """Sentences of ids.

    Args:
        ids: int64 (T,), the sentences one after another.
        lengths: int64 (S,), how many ids each has; they sum to T.
        vocabulary: K, ids are in 0..K-1.
        shape: (h, w) or (t, h, w) where every sentence is such a grid in raster order, else None.

    Raises:
        InputError: no sentence, an empty one, ids out of range, or lengths and shape that do not fit.
    """

    ids: np.ndarray
    lengths: np.ndarray
    vocabulary: int
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "lengths"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))
        if not len(self.lengths) or self.lengths.min() < 1 or self.lengths.sum() != len(self.ids):
            raise InputError(
                f"a corpus needs sentences of 1 id or more; lengths name {len(self.lengths)} of {int(self.lengths.sum())} "
                f"ids in all, and {len(self.ids)} ids were given"
            )
        if self.ids.min() < 0 or self.ids.max() >= self.vocabulary:
            raise InputError(
                f"ids reach {self.ids.min()}..{self.ids.max()}; a vocabulary of {self.vocabulary} is stated"
            )
        if self.shape is not None and (self.lengths != math.prod(self.shape)).any():
            raise InputError(
                f"sentences of {self.lengths.min()} to {self.lengths.max()} ids are no grids of {self.shape}"
            )

    @classmethod
    def of(cls, sentences: Iterable[np.ndarray], vocabulary: int, shape: tuple[int, ...] | None = None) -> Corpus:
        """Of integer arrays (n,), one for each sentence."""
        rows = [np.asarray(row, dtype=np.int64) for row in sentences]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return cls(np.concatenate(rows) if rows else np.zeros(0, np.int64), lengths, vocabulary, shape)

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths  # (S,)

    @property
    def sentence(self) -> np.ndarray:
        """Of each id, the number of its sentence, int64 (T,)."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def take(self, sentences: np.ndarray) -> Corpus:
        """Some of the sentences, by number, in the order given."""
        rows = [self.ids[a : a + n] for a, n in zip(self.starts[sentences], self.lengths[sentences])]
        return Corpus.of(rows, self.vocabulary, self.shape)

    def sample(self, ids: int, rng: np.random.Generator) -> Corpus:
        """Drawn sentences of at most so many ids together (but one at least), in the order they have here."""
        if ids >= len(self.ids):
            return self
        order = rng.permutation(len(self.lengths))
        count = int(np.searchsorted(np.cumsum(self.lengths[order]), ids, side="right"))
        return self.take(np.sort(order[: max(count, 1)]))

    def split(self, holdout: float, rng: np.random.Generator) -> tuple[Corpus, Corpus]:
        """(to learn from, to test on), by sentence, one at least on each side. Raises InputError for a single sentence."""
        if len(self.lengths) < 2:
            raise InputError(
                "a single sentence cannot be split into one part to learn from and one to test on; give more"
            )
        order = rng.permutation(len(self.lengths))
        count = min(max(round(holdout * len(order)), 1), len(order) - 1)
        return self.take(np.sort(order[count:])), self.take(np.sort(order[:count]))

    def control(self, name: str, rng: np.random.Generator) -> Corpus:
        """One of `CONTROLS`, with as many sentences as long."""
        if name == "within":
            ids = self.ids[np.lexsort((rng.random(len(self.ids)), self.sentence))]
        elif name == "shuffled":
            ids = rng.permutation(self.ids)
        elif name == "uniform":
            ids = rng.integers(0, self.vocabulary, len(self.ids))
        else:
            raise InputError(f"control {name!r} is not one of {', '.join(CONTROLS)}")
        return Corpus(ids, self.lengths, self.vocabulary, self.shape)

    def context(self, order: int) -> np.ndarray:
        """Of each id, itself and the `order` - 1 before it, oldest first: int64 (T, order); K stands before a sentence's first."""
        position = np.arange(len(self.ids)) - np.repeat(self.starts, self.lengths)
        columns = np.full((len(self.ids), order), self.vocabulary, dtype=np.int64)
        for back in range(order):
            there = np.flatnonzero(position >= back)
            columns[there, order - 1 - back] = self.ids[there - back]
        return columns

    def pairs(self, distance: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids `distance` apart in the same sentence, in its order: two int64 (P,)."""
        keep = np.flatnonzero(self.sentence[:-distance] == self.sentence[distance:])
        return self.ids[keep], self.ids[keep + distance]

    def pairs_along(self, axis: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids `distance` apart along an axis of the grid (-1 across, -2 down, -3 time): two int64 (P,)."""
        grid = np.moveaxis(self.ids.reshape(-1, *self.shape), axis, -1)
        return grid[..., :-distance].ravel(), grid[..., distance:].ravel()


def tally(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, ascending, and how often each occurs."""
    keys = np.sort(keys)
    edges = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1)) if len(keys) else np.zeros(0, np.int64)
    return keys[edges], np.diff(edges, append=len(keys))


def key(columns: np.ndarray, base: int) -> np.ndarray:
    """Rows of ids (M, n) below `base` as one int64 each, the first the most significant."""
    if base ** columns.shape[1] >= 2**63:
        raise InputError(f"{columns.shape[1]}-grams of {base} ids have no 63-bit keys; use a lower order")
    keys = np.zeros(len(columns), dtype=np.int64)
    for column in columns.T:
        keys = keys * base + column
    return keys


# -- n-gram models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Level:
    """Counts of one order: n-grams by key, and what follows each context."""

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    types: np.ndarray
    discount: float

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray, base: int) -> _Level:
        contexts, types = tally(keys // base)
        totals = np.add.reduceat(counts, np.cumsum(types) - types)  # keys ascend, so each context's stand together
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        # Ney's estimate; half a count more keeps it inside (0, 1), so that nothing has probability 0
        return cls(keys, counts, contexts, totals, types, (once + 0.5) / (once + 2 * twice + 1))


def _find(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where there is none."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


class KneserNey:
    """An n-gram model with interpolated Kneser-Ney smoothing (Kneser and Ney 1995; Chen and Goodman 1998, section 4.1.6).

    The highest order counts n-grams, the lower ones in how many contexts each occurs (at the beginning of a sentence, where
    there is but one context, they count too); each order takes its discount off and gives it to the next lower one; below
    single ids all K are equally probable. A sentence's end is not foreseen: pictures have theirs by their size.
    """

    def __init__(self, corpus: Corpus, order: int) -> None:
        if order < 1:
            raise InputError(f"an n-gram model has an order of 1 or more, not {order}")
        self.order, self.vocabulary, self.base = order, corpus.vocabulary, corpus.vocabulary + 1
        columns = corpus.context(order)
        keys, counts = tally(key(columns, self.base))
        levels = [_Level.of(keys, counts, self.base)]
        for n in range(order - 1, 0, -1):
            keys, contexts = tally(keys % self.base**n)  # one of each distinct longer n-gram: contexts to the left
            _, counts = tally(key(columns[:, order - n :], self.base))
            begins = keys // self.base ** (n - 1) == corpus.vocabulary
            levels.append(_Level.of(keys, np.where(begins, counts, contexts), self.base))
        self.levels = levels[::-1]

    def probability(self, contexts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """p(id | context), float64 (M,): contexts int64 (M, order - 1), oldest first, K before a sentence's first; ids (M,)."""
        p = np.full(len(ids), 1 / self.vocabulary)
        for n, level in enumerate(self.levels, start=1):
            context = key(contexts[:, self.order - n :], self.base)
            count = _find(level.keys, level.counts, context * self.base + ids)
            total = _find(level.contexts, level.totals, context)
            types = _find(level.contexts, level.types, context)
            kept = np.maximum(count - level.discount, 0) + level.discount * types * p
            p = np.where(total > 0, kept / np.maximum(total, 1), p)
        return p

    def bits(self, corpus: Corpus) -> float:
        """Mean of -log2 p over the ids of a corpus; 2 to this is the perplexity."""
        columns = corpus.context(self.order)
        return float(-np.log2(self.probability(columns[:, :-1], columns[:, -1])).mean())
