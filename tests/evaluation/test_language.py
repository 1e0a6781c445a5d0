"""Measures of language on sequences whose true values are known."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from tokgen.cli import main
from tokgen.commands.analyze import caption_languages, read_codes
from tokgen.data.shards import ShardWriter
from tokgen.errors import DataError, InputError
from tokgen.evaluation.language import (
    compression,
    cooccurrence,
    entropy,
    fit_zipf,
    frequencies,
    information,
    innovation,
    measure,
    merging,
    mutual_information,
)
from tokgen.evaluation.ngrams import Corpus, KneserNey, tally


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def corpus(ids, length, vocabulary, shape=None):
    return Corpus(ids, np.full(len(ids) // length, length), vocabulary, shape)


def powers(exponent, vocabulary, shift=0.0):
    p = (np.arange(1, vocabulary + 1) + shift) ** -exponent
    return p / p.sum()


def markov(transition, sentences, length, rng):
    """Sentences of a Markov chain that start evenly, int64 (sentences * length,), drawn all at once by inverse transform."""
    cumulative = transition.cumsum(1)
    rows = np.zeros((sentences, length), dtype=np.int64)
    rows[:, 0] = rng.integers(0, len(transition), sentences)
    for t in range(1, length):
        rows[:, t] = (rng.random(sentences)[:, None] > cumulative[rows[:, t - 1]]).sum(1)
    return np.minimum(rows, len(transition) - 1).ravel()


# -- the corpus -------------------------------------------------------------------------------------------------------


def test_counting_agrees_with_numpy(rng):
    keys = rng.integers(-5, 50, 300)
    for mine, theirs in zip(tally(keys), np.unique(keys, return_counts=True)):
        assert (mine == theirs).all()
    assert [len(part) for part in tally(keys[:0])] == [0, 0]


def test_nothing_crosses_the_border_of_sentences():
    ragged = Corpus.of([np.array([1, 2, 3]), np.array([4]), np.array([5, 6])], 7)
    assert ragged.context(3).tolist() == [[7, 7, 1], [7, 1, 2], [1, 2, 3], [7, 7, 4], [7, 7, 5], [7, 5, 6]]
    assert [pair.tolist() for pair in ragged.pairs(1)] == [[1, 2, 5], [2, 3, 6]]
    assert frequencies(ragged, 2).total == 3
    assert ragged.take(np.array([2, 0])).ids.tolist() == [5, 6, 1, 2, 3]


def test_pairs_of_a_grid_follow_its_axes():
    clip = corpus(np.arange(12), 12, 12, (2, 2, 3))
    for axis, step, count in ((-1, 1, 8), (-2, 3, 6), (-3, 6, 6)):
        a, b = clip.pairs_along(axis, 1)
        assert len(a) == count and (b - a == step).all()


def test_controls_keep_what_they_say(rng):
    language = Corpus.of([np.array([0, 0, 1]), np.array([2, 3, 3, 4, 5])], 50)
    within, shuffled, uniform = (language.control(name, rng) for name in ("within", "shuffled", "uniform"))
    assert sorted(within.ids[:3]) == [0, 0, 1] and sorted(within.ids[3:]) == [2, 3, 3, 4, 5]
    assert sorted(shuffled.ids) == sorted(language.ids)
    draws = [language.control("shuffled", rng).ids[:3].max() for _ in range(20)]
    assert max(draws) > 1  # ids do leave their sentence
    assert all((c.lengths == language.lengths).all() for c in (within, shuffled, uniform))
    with pytest.raises(InputError, match="sideways"):
        language.control("sideways", rng)


def test_split_and_sample_take_whole_sentences(rng):
    language = Corpus.of([np.full(1 + i % 3, i) for i in range(30)], 30)
    train, test = language.split(0.1, rng)
    assert len(test.lengths) == 3 and sorted({*train.ids} | {*test.ids}) == list(range(30))
    assert not {*train.ids} & {*test.ids}
    some = language.sample(20, rng)
    assert 17 <= len(some.ids) <= 20 and (np.diff(some.ids) >= 0).all()
    assert (some.lengths == [1 + i % 3 for i in dict.fromkeys(some.ids)]).all()
    with pytest.raises(InputError, match="single sentence"):
        language.take(np.array([0])).split(0.1, rng)


@pytest.mark.parametrize(
    "ids, lengths, shape, word",
    [
        ([0, 9], [1, 1], None, "vocabulary of 9"),
        ([0, 1], [1], None, "2 ids were given"),
        ([0], [0, 1], None, "1 id or more"),
        ([0, 1, 2, 3], [4], (3, 2), "no grids"),
    ],
)
def test_what_is_no_corpus_is_refused(ids, lengths, shape, word):
    with pytest.raises(InputError, match=word):
        Corpus(np.array(ids), np.array(lengths), 9, shape)


# -- measures with known truth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
def test_zipf_exponent_is_found(exponent, rng):
    counts = rng.multinomial(200_000, powers(exponent, 1000))
    fit = fit_zipf(counts)
    assert abs(fit.exponent - exponent) < 0.05
    assert fit.r2 > 0.97 and fit.ks < 0.01


def test_zipf_mandelbrot_finds_the_shift(rng):
    counts = rng.multinomial(1_000_000, powers(1.2, 1000, shift=8.0))
    fit, plain = fit_zipf(counts, mandelbrot=True), fit_zipf(counts)
    assert abs(fit.exponent - 1.2) < 0.05 and abs(fit.shift - 8) < 1.5
    assert fit.ks < 0.005 < plain.ks and fit.r2 > plain.r2


def test_equal_frequencies_have_no_exponent():
    assert abs(fit_zipf(np.full(50, 7)).exponent) < 1e-6
    assert math.isnan(fit_zipf(np.array([5])).exponent)


def test_heaps_exponent_of_an_open_vocabulary(rng):
    # of Zipf's law with exponent 2 and no end, types grow as the square root of ids
    ids = np.minimum(rng.zipf(2.0, 200_000), 10**6)
    found = innovation(corpus(ids, 20, 10**6 + 1), rng)
    assert abs(found.exponent - 0.5) < 0.05 and found.r2 > 0.98
    closed = innovation(corpus(rng.integers(0, 10, 2000), 20, 10), rng)
    assert closed.late == 0 and closed.sentences_to_90 <= 4 and closed.types[-1] == 10


def test_n_grams_of_uniform_ids_have_perplexity_k(rng):
    train, test = corpus(rng.integers(0, 16, 3000 * 64), 64, 16).split(0.1, rng)
    for n, tolerance in ((1, 0.02), (2, 0.05), (3, 0.4)):  # what counting 16^n cells costs
        assert abs(2 ** KneserNey(train, n).bits(test) - 16) < tolerance


def test_uniform_ids_say_log_k_and_nothing_of_each_other(rng):
    found = measure(corpus(rng.integers(0, 64, 1000 * 64), 64, 64, (8, 8)), orders=1)
    assert abs(found.entropy.corrected - 6) < 0.002 and found.entropy.bits < found.entropy.corrected
    assert abs(found.entropy.normalised - 1) < 1e-3 and found.entropy.used == 1
    assert abs(2 ** found.ngrams[1] - 64) < 0.2
    assert set(found.information) == {"sequence", "down", "across"}
    bias = 63**2 / (2 * math.log(2))  # of the estimate, in bits times the number of pairs
    for pairs, bits in ((1000 * 63, found.information["sequence"][1]), (1000 * 56, found.information["down"][1])):
        assert abs(bits.bits - bias / pairs) < 0.005 and abs(bits.excess) < 0.003
    assert abs(found.cooccurrence.repeats - 1 / 64) < 0.002
    assert abs(found.cooccurrence.by_chance - 1 / 64) < 1e-4 and abs(found.cooccurrence.pmi) < 0.1
    assert 0.75 < found.merging.length < 0.85  # 1,000 units of 4,096 pairs, and nothing more
    assert 5.9 < found.compression.gzip < 6.6


def test_bigrams_find_the_entropy_rate_of_a_markov_chain(rng):
    transition = rng.dirichlet(np.full(12, 0.3), size=12)
    chain = corpus(markov(transition, 2000, 50, rng), 50, 12)
    train, test = chain.split(0.2, rng)
    state = np.bincount(chain.ids, minlength=12) / len(chain.ids)
    rate = -(state @ np.where(transition > 0, transition * np.log2(np.maximum(transition, 1e-300)), 0).sum(1))
    bits = [KneserNey(train, n).bits(test) for n in (1, 2, 3)]
    first = (math.log2(12) - rate) / 50  # the first id of a sentence is even
    assert abs(bits[1] - rate - first) < 0.03
    assert bits[0] > bits[1] + 0.5 and abs(bits[2] - bits[1]) < 0.03
    # one step of a chain tells entropy minus rate; shuffling destroys it
    known = mutual_information(*chain.pairs(1))
    assert abs(known - (entropy(chain).bits - rate)) < 0.05
    assert mutual_information(*chain.control("shuffled", rng).pairs(1)) < 0.002


def test_a_periodic_sequence_holds_no_news(rng):
    periodic = corpus(np.tile(np.arange(16), 800), 64, 16)
    found = measure(periodic)
    assert found.entropy.bits == pytest.approx(4) and 2 ** found.ngrams[1] == pytest.approx(16, rel=0.01)
    assert 2 ** found.ngrams[2] < 1.1
    assert all(each.excess == pytest.approx(4, abs=0.06) for each in found.information["sequence"].values())
    assert found.compression.gzip < 0.1 and found.compression.xz < 0.2
    assert found.merging.length < 1 / 16 and found.merging.depth > 3
    assert found.cooccurrence.pmi == pytest.approx(4, abs=0.01) and found.cooccurrence.repeats == 0


def test_within_sentences_order_goes_and_topic_stays(rng):
    # each sentence is of one of two topics with 8 ids each, and climbs within it
    topic = rng.integers(0, 2, 500)
    ids = (topic[:, None] * 8 + (rng.integers(0, 8, 500)[:, None] + np.arange(24)) % 8).ravel()
    language = corpus(ids, 24, 16)
    own, within, shuffled = (
        mutual_information(*c.pairs(1))
        for c in (language, language.control("within", rng), language.control("shuffled", rng))
    )
    assert own == pytest.approx(4, abs=0.02) and within == pytest.approx(1, abs=0.15) and shuffled < 0.03


def test_information_of_a_grid_has_a_direction(rng):
    # rows of one id each: all across, nothing down
    grids = np.repeat(rng.integers(0, 8, (400, 8)), 8, axis=1).ravel()
    found = information(corpus(grids, 64, 8, (8, 8)), rng)
    assert found["across"][4].excess > 2.95 and abs(found["down"][1].excess) < 0.02
    assert max(found["across"]) == 4 and max(found["sequence"]) == 32


def test_compression_packs_ids_in_whole_bytes(rng):
    constant = compression(corpus(np.zeros(20_000, np.int64), 100, 300))
    assert constant.uniform == pytest.approx(math.log2(300)) and constant.xz < 0.1
    wide = compression(corpus(rng.integers(0, 2**16, 20_000), 100, 2**16))
    assert wide.xz == pytest.approx(16, abs=0.2) and wide.gzip_share > 0.99


def test_cooccurrence_counts_neighbours_of_grids():
    board = np.indices((4, 4)).sum(0).ravel() % 2
    found = cooccurrence(corpus(np.tile(board, 10), 16, 2, (4, 4)))
    assert found.repeats == 0 and found.by_chance == pytest.approx(0.5)
    assert found.pmi == pytest.approx(1) and found.npmi == pytest.approx(1) and found.frequent == 1
    assert found.variety == 2 / 16


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kneser_ney_probabilities_sum_to_one(order, rng):
    ids = rng.choice(20, 600, p=powers(1.0, 20))
    ids[ids == 7] = 3  # an id that never occurs
    model = KneserNey(corpus(ids, 12, 20), order)
    contexts = np.array([[20, 20], [20, 3], [0, 1], [7, 7], [3, 7], [7, 3], [19, 18]])[:, 3 - order :]
    for context in contexts:
        p = model.probability(np.tile(context, (20, 1)), np.arange(20))
        assert p.sum() == pytest.approx(1, abs=1e-12) and p.min() > 0


def test_kneser_ney_by_hand():
    # a b, a b, c b: "b" follows 2 contexts and the beginning none; Ney's discounts with half a count
    model = KneserNey(Corpus.of([[0, 1], [0, 1], [2, 1]], 3), 2)
    unigram, bigram = model.levels
    assert unigram.counts.tolist() == [1, 2, 1]  # contexts: of "a" and "c" the beginning; of "b" "a" and "c"
    d1, d2 = 2.5 / 5, 2.5 / 7  # once 2, twice 1; bigrams: <a 2, <c 1, ab 2, cb 1 -> once 2, twice 2
    assert (unigram.discount, bigram.discount) == pytest.approx((d1, d2))
    b = (2 - d1) / 4 + d1 * 3 / 4 / 3
    assert model.probability(np.array([[0]]), np.array([1]))[0] == pytest.approx((2 - d2) / 2 + d2 / 2 * b)
    assert model.probability(np.array([[1]]), np.array([1]))[0] == pytest.approx(b)  # "b" was no context


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="63-bit"):
        KneserNey(Corpus.of([[0, 1], [1, 2]], 2**40), 2)


def test_merging_finds_units_of_units(rng):
    # words of four ids in a random order: two levels of pairs
    words = rng.permutation(64).reshape(16, 4)
    language = corpus(words[rng.integers(0, 16, (300, 6))].ravel(), 24, 64)
    found = merging(*language.split(0.2, rng), merges=48)
    assert found.length == pytest.approx(0.25) and found.depth >= 2
    broken = merging(*language.control("shuffled", rng).split(0.2, rng), merges=48)
    assert broken.length > 0.85 and broken.depth < 0.4
    assert merging(*language.split(0.2, rng), merges=0).length == 1


def test_information_does_not_mistake_places_for_ties(rng):
    # the ids at either place are free, but each place has ids of its own: shuffling all of them would tell otherwise
    places = np.stack([rng.integers(0, 8, 3000), rng.integers(8, 16, 3000)], 1).ravel()
    found = information(corpus(places, 2, 16), rng)["sequence"][1]
    assert abs(found.excess) < 0.01


# -- the command ------------------------------------------------------------------------------------------------------


def write(folder, rows, captions, **meta):
    with ShardWriter(folder, kind="codes", meta=meta) as writer:
        for i, (row, caption) in enumerate(zip(rows, captions)):
            writer.write(f"{i:03d}", {"npy": np.asarray(row, dtype=np.int16), "txt": caption})
    return str(folder)


@pytest.fixture
def grids(tmp_path, rng):
    captions = [f"{colour} {thing}, flat style" for colour in ("red", "blue") for thing in ("fish", "cat", "heart") * 4]
    rows = rng.integers(0, 30, (24, 16))
    grid = {"kind": "Grid", "h": 4, "w": 4}
    return write(tmp_path / "grids", rows, captions, layout=grid, codebook_sizes=[32], tokenizer="abc")


def test_command_compares_languages(grids, tmp_path, rng, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    rows = [rng.integers(0, 8, (rng.integers(3, 9), 2)) for _ in range(20)]
    ragged = {"kind": "Sequence", "n": 8, "nested": False}
    dual = write(tmp_path / "dual", rows, ["a cat"] * 20, layout=ragged, codebook_sizes=[8, 8])
    out = tmp_path / "report"
    assert main(["analyze", grids, dual, "--out", str(out), "--text", "--merges", "20"]) == 0
    report = json.loads((out / "report.json").read_text())
    names = ["grids", "dual, codebook 0", "dual, codebook 1", "dual, joint", "words", "byte pairs"]
    assert list(report["languages"]) == names
    assert set(report["languages"]["grids"]) == {"ids", "within", "shuffled", "uniform"}
    joint = report["languages"]["dual, joint"]["ids"]
    assert joint["vocabulary"] == 16 and joint["ids"] == 2 * sum(len(row) for row in rows)
    assert set(report["languages"]["grids"]["ids"]["information"]) == {"sequence", "down", "across"}
    assert report["codes"]["grids"]["tokenizer"] == "abc"
    page = (out / "report.md").read_text()
    assert all(f"## {name}\n" in page for name in names) and "![zipf](zipf.png)" in page
    for plot in ("zipf", "innovation", "perplexity", "information"):
        assert (out / f"{plot}.png").read_bytes().startswith(b"\x89PNG") and (out / f"{plot}.png").stat().st_size > 5000
    assert "perplexity, 3-grams" in capsys.readouterr().out


def test_joint_reading_offsets_each_codebook(tmp_path):
    folder = write(tmp_path / "c", [[[1, 2], [3, 0]], [[0, 0], [1, 1]]], ["", ""], codebook_sizes=[4, 5])
    languages = read_codes(folder).languages("c")
    assert languages["c, joint"].ids.tolist() == [1, 6, 3, 4, 0, 4, 1, 5]
    assert languages["c, codebook 1"].ids.tolist() == [2, 0, 0, 1] and languages["c, codebook 1"].vocabulary == 5


def test_captions_are_words_and_byte_pairs():
    languages = caption_languages(["Red fish, flat style", "", "red cat, flat style"] * 2, 270)
    words, pairs = languages["words"], languages["byte pairs"]
    assert words.vocabulary == 6 and words.lengths.tolist() == [5, 5, 5, 5]
    assert len(pairs.lengths) == 4 and pairs.vocabulary <= 270 and len(pairs.ids) < len("Red fish, flat style") * 4


def test_without_captions_text_is_refused(tmp_path, capsys):
    folder = write(tmp_path / "c", [[1, 2], [3, 0]], ["", ""], codebook_sizes=[4])
    assert main(["analyze", folder, "--out", str(tmp_path / "r"), "--text", "--no_plots"]) == 2
    assert "captions" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_plots_without_matplotlib_are_refused_before_any_work(grids, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["analyze", grids, "--out", str(tmp_path / "r")]) == 2
    assert "tokgen[plots]" in capsys.readouterr().err and not (tmp_path / "r").exists()
    assert main(["analyze", grids, "--out", str(tmp_path / "r"), "--no_plots", "--ids", "100", "--merges", "5"]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["languages"]["grids"]["ids"]["ids"] == 96 and not list((tmp_path / "r").glob("*.png"))


def test_other_folders_are_refused(tmp_path, capsys):
    with ShardWriter(tmp_path / "images", kind="images") as writer:
        writer.write("a", {"txt": "a"})
    with pytest.raises(DataError, match="tokgen tokenize"):
        read_codes(str(tmp_path / "images"))
    with pytest.raises(DataError, match="codebook_sizes"):
        read_codes(write(tmp_path / "bare", [[1]], [""]))
    with pytest.raises(DataError, match="codes out of range"):
        read_codes(write(tmp_path / "wild", [[9]], [""], codebook_sizes=[4]))
    folder = write(tmp_path / "one", [[1, 2]], ["a"], codebook_sizes=[4])
    assert main(["analyze", folder, "--out", str(tmp_path / "r"), "--no_plots"]) == 2
    assert main(["analyze", folder, folder, "--out", str(tmp_path / "r"), "--no_plots"]) == 2
    assert "named twice" in capsys.readouterr().err
