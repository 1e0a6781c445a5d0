"""The language of visual tokens: what corpus linguistics says of sequences of ids, with controls.

The questions are those of Chan et al. 2024, "Analyzing The Language of Visual Tokens" (arXiv 2411.05001): are ids
distributed as Zipf says words are, how fast do new ones appear, how much do they tell and how far do they compress, how
well does an n-gram model foresee them, which go together, and do they build greater units? The estimators are standard
ones and named where they stand; that they are the paper's own is not claimed. See docs/language.md.

A `Corpus` is pictures (or captions) as sentences of ids. `study` measures one, and three others of the same size that say
what a figure would be without what it is meant to show:

    within      the ids of each picture in random order: what is left is what pictures are about, not how they are laid out
    shuffled    all ids in random order: what is left is how frequent each is
    uniform     ids drawn evenly: what is left is the size of the sample

Counting is sorting of int64 keys; a million ids take seconds.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from tokgen.errors import InputError
from tokgen.evaluation.ngrams import CONTROLS, Corpus, KneserNey, key, tally

DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128)
AXES = ("time", "down", "across")  # of a grid (t, h, w); (h, w) has the last two
FREQUENT = 5  # pairs that occur less often say little about their own probability


def _bits(counts: np.ndarray) -> float:
    """Entropy of relative frequencies, in bits."""
    p = counts / counts.sum()
    return max(float(-(p * np.log2(p)).sum()), 0.0)


# -- frequency and rank: Zipf -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """p(r) in proportion to (r + shift)^-exponent for the ranks r = 1..n of the n types that occur.

    Attributes:
        r2: share of the variance of log frequency over ranks that the fit explains; below 0 it is worse than a constant.
        ks: Kolmogorov-Smirnov distance, the greatest difference between the two cumulative distributions over ranks.
    """

    exponent: float
    shift: float
    r2: float
    ks: float


def fit_zipf(counts: np.ndarray, mandelbrot: bool = False) -> PowerLaw:
    """Maximum likelihood of the truncated power law; with `mandelbrot` also of the shift q >= 0 (Zipf-Mandelbrot), else 0.

    Ranks are those of the sample, so that chance alone gives a small positive exponent: the uniform control says how small.
    The likelihood in the exponent is that of an exponential family, and Newton's method finds its one maximum; the shift
    is sought on a grid up to n and by golden section around its best point.

    Args:
        counts: of each type, in any order; zeros are left out.
    """
    counts = np.sort(counts[counts > 0])[::-1].astype(np.float64)
    n, ranks = len(counts), np.arange(1, len(counts) + 1, dtype=np.float64)
    if n < 2:
        return PowerLaw(math.nan, 0.0, math.nan, math.nan)

    def exponent(shift: float) -> tuple[float, np.ndarray, float]:
        x = np.log(ranks + shift)
        mean, s = counts @ x / counts.sum(), 0.0
        for _ in range(100):
            p = np.exp(-s * (x - x[0]))
            p /= p.sum()
            expected = p @ x
            step = (expected - mean) / max(p @ (x - expected) ** 2, 1e-300)
            s += float(np.clip(step, -1, 1))
            if abs(step) < 1e-8:
                break
        log_p = -s * x - (np.log(np.exp(-s * (x - x[0])).sum()) - s * x[0])
        return s, log_p, float(counts @ log_p)

    shift = 0.0
    if mandelbrot:
        grid = np.concatenate([[0.0], np.geomspace(0.1, n, 24)])
        best = int(np.argmax([exponent(q)[2] for q in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        golden = (math.sqrt(5) - 1) / 2
        for _ in range(30):
            a, b = high - golden * (high - low), low + golden * (high - low)
            low, high = (low, b) if exponent(a)[2] >= exponent(b)[2] else (a, high)
        shift = max((0.0, float(grid[best]), (low + high) / 2), key=lambda q: exponent(q)[2])
    s, log_p, _ = exponent(shift)
    share = counts / counts.sum()
    spread = np.square(np.log(share) - np.log(share).mean()).sum()
    r2 = 1 - np.square(np.log(share) - log_p).sum() / spread if spread > 1e-12 else math.nan
    ks = np.abs(np.cumsum(share) - np.cumsum(np.exp(log_p))).max()
    return PowerLaw(s, shift, float(r2), float(ks))


@dataclass(frozen=True)
class Frequencies:
    """Of n-grams inside sentences.

    Attributes:
        types, total: distinct n-grams, and all.
        once: share of the types that occur once.
        zipf: the power law. mandelbrot: with a shift, of single ids only.
        ranks, shares: the curve at up to 200 ranks, evenly apart in their logarithm.
    """

    types: int
    total: int
    once: float
    zipf: PowerLaw
    mandelbrot: PowerLaw | None
    ranks: list[int] = field(repr=False)
    shares: list[float] = field(repr=False)


def frequencies(corpus: Corpus, n: int = 1) -> Frequencies:
    """Frequency against rank of n-grams, none across the border of sentences (Zipf 1949; Mandelbrot 1953)."""
    columns = corpus.context(n)
    _, counts = tally(key(columns[columns[:, 0] < corpus.vocabulary], corpus.vocabulary))
    if not len(counts):
        raise InputError(f"no sentence has {n} ids; {n}-grams need longer ones")
    ordered = np.sort(counts)[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), 200).round().astype(np.int64))
    return Frequencies(
        types=len(counts),
        total=int(counts.sum()),
        once=float((counts == 1).mean()),
        zipf=fit_zipf(counts),
        mandelbrot=fit_zipf(counts, mandelbrot=True) if n == 1 else None,
        ranks=ranks.tolist(),
        shares=(ordered[ranks - 1] / counts.sum()).tolist(),
    )


# -- innovation: Heaps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Innovation:
    """Types seen against ids seen, sentences in random order.

    Attributes:
        exponent: of types = c ids^exponent, least squares in logarithms at up to 60 points evenly apart in them (Heaps' law);
            a vocabulary that is used up bends the curve, and the exponent says little of it: see `late` and the control.
        r2: of that line.
        late: new types per id in the last tenth of the ids.
        sentences_to_90: sentences that hold 90 % of all types that ever occur.
        seen, types: the curve.
    """

    exponent: float
    r2: float
    late: float
    sentences_to_90: int
    seen: list[int] = field(repr=False)
    types: list[int] = field(repr=False)


def innovation(corpus: Corpus, rng: np.random.Generator) -> Innovation:
    """How fast new ids appear: the growth of the vocabulary with the text (Heaps 1978)."""
    mixed = corpus.take(rng.permutation(len(corpus.lengths)))
    _, first = np.unique(mixed.ids, return_index=True)
    first = np.sort(first)
    seen = np.unique(np.geomspace(1, len(mixed.ids), 60).round().astype(np.int64))
    types = np.searchsorted(first, seen)  # first occurrences among the first `seen` ids
    x, y = np.log(seen), np.log(types)
    spread = np.square(y - y.mean()).sum()
    slope, intercept = np.polyfit(x, y, 1) if len(x) > 1 else (0.0, y[0])
    r2 = 1 - np.square(y - slope * x - intercept).sum() / spread if spread > 1e-12 else math.nan
    tail = max(len(mixed.ids) // 10, 1)
    ninety = first[math.ceil(0.9 * len(first)) - 1]
    return Innovation(
        exponent=float(slope),
        r2=float(r2),
        late=float((first >= len(mixed.ids) - tail).sum() / tail),
        sentences_to_90=int(mixed.sentence[ninety]) + 1,
        seen=seen.tolist(),
        types=types.tolist(),
    )


# -- entropy and compression ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entropy:
    """Bits per id: of relative frequencies; with Miller's and Madow's correction for a finite sample; that as a share of log2 K."""

    bits: float
    corrected: float
    normalised: float
    used: float  # share of the vocabulary that occurs


def entropy(corpus: Corpus) -> Entropy:
    """Of single ids (Miller 1955 for the correction: (types - 1) / 2N nats; never above log2 K)."""
    _, counts = tally(corpus.ids)
    most = math.log2(corpus.vocabulary)
    bits = _bits(counts)
    corrected = min(bits + (len(counts) - 1) / (2 * len(corpus.ids) * math.log(2)), most)
    return Entropy(bits, corrected, corrected / most if most else 0.0, len(counts) / corpus.vocabulary)


@dataclass(frozen=True)
class Compression:
    """Bits per id: at uniform length, log2 K; as gzip and xz leave them; and their share of uniform length."""

    uniform: float
    gzip: float
    xz: float
    gzip_share: float
    xz_share: float


def compression(corpus: Corpus) -> Compression:
    """Dictionary compression of the ids, each in as few whole bytes as hold log2 K bits, sentences as they are stored."""
    uniform = max(math.log2(corpus.vocabulary), 1e-9)
    width = max(math.ceil(uniform / 8), 1)
    packed = corpus.ids.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    sizes = (len(gzip.compress(packed, 9, mtime=0)), len(lzma.compress(packed, preset=6)))
    bits = [8 * size / len(corpus.ids) for size in sizes]
    return Compression(uniform, *bits, *(b / uniform for b in bits))


# -- what goes together -----------------------------------------------------------------------------------------------


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Bits that one of paired ids (P,) tells of the other, from relative frequencies: too high where pairs are few."""
    if not len(a):
        return math.nan
    own = [counts[counts > 0] for counts in (np.bincount(a), np.bincount(b))]
    joint = tally(a * (int(b.max()) + 1) + b)[1]
    return max(_bits(own[0]) + _bits(own[1]) - _bits(joint), 0.0)


@dataclass(frozen=True)
class Information:
    """Bits, and what the same estimate says of as many pairs of the same ids put together at random, whose truth is 0."""

    bits: float
    chance: float

    @property
    def excess(self) -> float:
        return self.bits - self.chance


def information(
    corpus: Corpus, rng: np.random.Generator, distances: Iterable[int] = DISTANCES
) -> dict[str, dict[int, Information]]:
    """Mutual information against distance: along the "sequence" and, of grids, along each axis ("across", "down", "time").

    Real pairs fill fewer cells than random ones and are overestimated less, so that the excess errs downwards, the more so
    the fewer pairs there are to a code.
    """

    def of(pairs: tuple[np.ndarray, np.ndarray]) -> Information:
        a, b = pairs
        return Information(mutual_information(a, b), mutual_information(a, rng.permutation(b)))

    distances = list(distances)
    longest = int(corpus.lengths.max())
    found = {"sequence": {d: of(corpus.pairs(d)) for d in distances if d < longest}}
    for axis in range(-len(corpus.shape or ()), 0):
        there = [d for d in distances if d < corpus.shape[axis]]
        found[AXES[axis]] = {d: of(corpus.pairs_along(axis, d)) for d in there}
    return found


@dataclass(frozen=True)
class Cooccurrence:
    """Of neighbours: next ids of a sequence, or those to the right, below and after in grids.

    Attributes:
        distinct: different pairs per pair.
        repeats: share of the pairs whose two ids are the same. by_chance: what frequencies alone would make it.
        frequent: share of the pairs that occur at least `FREQUENT` times.
        pmi, npmi: of those, the mean pointwise mutual information, log2 p(a, b) / p(a) p(b), and the same over -log2 p(a, b)
            (Church and Hanks 1990; Bouma 2009), by occurrence; NaN where none is frequent.
        variety: different ids of a sentence per id.
    """

    distinct: float
    repeats: float
    by_chance: float
    frequent: float
    pmi: float
    npmi: float
    variety: float


def cooccurrence(corpus: Corpus) -> Cooccurrence:
    """Which ids stand next to each other, and how strongly."""
    axes = range(-len(corpus.shape or ()), 0)
    parts = [corpus.pairs_along(axis, 1) for axis in axes] if corpus.shape else [corpus.pairs(1)]
    a, b = (np.concatenate(side) for side in zip(*parts))
    own = tally(corpus.sentence * corpus.vocabulary + corpus.ids)[0]
    variety = len(own) / len(corpus.ids)
    if not len(a):
        return Cooccurrence(*[math.nan] * 6, variety)
    keys, counts = tally(a * corpus.vocabulary + b)
    first = np.bincount(a, minlength=corpus.vocabulary) / len(a)
    second = np.bincount(b, minlength=corpus.vocabulary) / len(a)
    often = counts >= FREQUENT
    joint = counts[often] / len(a)
    pmi = np.log2(joint / (first[keys[often] // corpus.vocabulary] * second[keys[often] % corpus.vocabulary]))
    weight = joint / joint.sum() if often.any() else joint
    # a pair that is all there is has probability 1: nothing to normalise by, and its PMI is 0
    npmi = pmi / np.maximum(-np.log2(joint), 1e-12)
    mean = lambda x: float(weight @ x) if often.any() else math.nan  # noqa: E731
    return Cooccurrence(
        distinct=len(keys) / len(a),
        repeats=float((a == b).mean()),
        by_chance=float(first @ second),
        frequent=float(joint.sum()),
        pmi=mean(pmi),
        npmi=mean(npmi),
        variety=variety,
    )


# -- hierarchy --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merging:
    """What merging pairs into units makes of sentences that it did not learn from.

    Attributes:
        merges: units learned, up to the number asked for; a pair seen once is none.
        length: units per id, 1 where nothing merges.
        depth: of the merges above an id, mean over ids; 0 where nothing merges, 1 for units of two.
    """

    merges: int
    length: float
    depth: float


def merging(train: Corpus, test: Corpus, merges: int = 1000) -> Merging:
    """Byte-pair encoding of ids (Gage 1994; Sennrich et al. 2016), learned on one part of a corpus and applied to another.

    It stands for grammar induction: the more a language is built of units of units, the shorter and the deeper it comes out.
    It sees the sequence only, in grids the rows.
    """
    from tokenizers import Tokenizer, models, trainers

    types = np.unique(np.concatenate([train.ids, test.ids]))
    points = np.arange(len(types)) + 0x100
    points[points >= 0xD800] += 0x800  # characters without the surrogates
    if points[-1] > 0x10FFFF:
        raise InputError(f"merging takes up to 1,111,808 different ids, and the corpus has {len(types)}")
    letters = np.array([chr(point) for point in points])

    def texts(corpus: Corpus) -> list[str]:
        row = "".join(letters[np.searchsorted(types, corpus.ids)])
        return [row[a : a + n] for a, n in zip(corpus.starts, corpus.lengths)]

    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(types) + merges, min_frequency=2, initial_alphabet=letters.tolist(), show_progress=False
    )
    learner.train_from_iterator(texts(train), trainer)
    units = sorted(learner.get_vocab().items(), key=lambda unit: unit[1])  # in the order they were made
    depth = dict.fromkeys(letters.tolist(), 0)
    for left, right in _merges(learner):
        depth[left + right] = 1 + max(depth[left], depth[right])
    pieces = [piece for row in learner.encode_batch(texts(test), add_special_tokens=False) for piece in row.tokens]
    total = len(test.ids)
    return Merging(
        merges=len(units) - len(types),
        length=len(pieces) / total,
        depth=sum(len(piece) * depth[piece] for piece in pieces) / total,
    )


def _merges(tokenizer: object) -> list[tuple[str, str]]:
    import json

    found = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in found]


# -- all of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """All measures of a corpus. `ngrams`: bits per id of held-out sentences, by order; `zipf`: by n."""

    sentences: int
    ids: int
    vocabulary: int
    entropy: Entropy
    compression: Compression
    zipf: dict[int, Frequencies]
    innovation: Innovation
    ngrams: dict[int, float]
    information: dict[str, dict[int, Information]]
    cooccurrence: Cooccurrence
    merging: Merging


def measure(corpus: Corpus, seed: int = 0, orders: int = 3, merges: int = 1000, holdout: float = 0.1) -> Measures:
    """Everything above of one corpus.

    Args:
        seed: of the order in which innovation reads, and of what is held out.
        orders: n-grams of 1 to so many ids.
        merges: units that `merging` learns.
        holdout: share of the sentences that n-gram models and merging are tested on, and do not learn from.
    """
    rng = np.random.default_rng(seed)
    longest = min(orders, int(corpus.lengths.max()))
    train, test = corpus.split(holdout, rng)
    return Measures(
        sentences=len(corpus.lengths),
        ids=len(corpus.ids),
        vocabulary=corpus.vocabulary,
        entropy=entropy(corpus),
        compression=compression(corpus),
        zipf={n: frequencies(corpus, n) for n in range(1, longest + 1)},
        innovation=innovation(corpus, rng),
        ngrams={n: KneserNey(train, n).bits(test) for n in range(1, orders + 1)},
        information=information(corpus, rng),
        cooccurrence=cooccurrence(corpus),
        merging=merging(train, test, merges),
    )


def study(corpus: Corpus, seed: int = 0, **options: int | float) -> dict[str, Measures]:
    """{"ids": the corpus measured, "within": …, "shuffled": …, "uniform": …}; options as those of `measure`."""
    controls = {name: corpus.control(name, np.random.default_rng([seed, i])) for i, name in enumerate(CONTROLS)}
    return {name: measure(each, seed, **options) for name, each in {"ids": corpus, **controls}.items()}
