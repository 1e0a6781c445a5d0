"""Tokens and layouts: what goes in comes out, and what cannot work says so."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from tokgen import Grid, Layout, Scales, Sequence, Tokens, Trajectories
from tokgen.errors import CheckpointError, InputError

LAYOUTS = [
    Grid(2, 3),
    Grid(4, 2, 3),
    Sequence(5),
    Sequence(5, nested=True),
    Scales((1, 2, 4)),
    Trajectories(8, 4, 4, 10),
]


def tokens(batch=3, codebooks=1, layout=None, **kwargs):
    layout = layout or Grid(2, 3)
    shape = (batch, layout.length) if codebooks == 1 else (batch, layout.length, codebooks)
    sizes = tuple(range(7, 7 + codebooks))
    return Tokens(torch.randint(0, 7, shape), layout, sizes, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_layout_survives_plain_data(layout):
    assert Layout.from_dict(layout.to_dict()) == layout
    assert layout.prefixes()[-1] == layout.length
    assert list(layout.prefixes()) == sorted(layout.prefixes())


def test_layout_prefixes_are_those_that_decode():
    assert Grid(2, 3).prefixes() == (6,)
    assert Scales((1, 2, 4)).prefixes() == (1, 5, 21)
    assert Sequence(3).prefixes() == (3,)
    assert Sequence(3, nested=True).prefixes() == (1, 2, 3)
    assert Grid(4, 2, 3).t == 4 and Grid(t=4, h=2, w=3) == Grid(4, 2, 3) != Grid(2, 3)


@pytest.mark.parametrize("codebooks", [1, 3])
def test_file_round_trip_is_exact(tmp_path, codebooks):
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 6])
    side = {"box": torch.randint(0, 9, (3, 2, 4))}
    before = tokens(3, codebooks, mask=mask, tokenizer="abc", side=side, side_sizes={"box": 9})
    before.save(tmp_path / "t.safetensors")
    after = Tokens.load(tmp_path / "t.safetensors")
    assert torch.equal(after.ids, before.ids) and torch.equal(after.mask, mask)
    assert torch.equal(after.side["box"], side["box"])
    for name in ("layout", "codebook_sizes", "tokenizer", "side_sizes"):
        assert getattr(after, name) == getattr(before, name)


@pytest.mark.parametrize("codebooks", [1, 3])
def test_sequence_round_trip_is_exact_and_codebooks_do_not_overlap(codebooks):
    before = tokens(codebooks=codebooks)
    ids, mask = before.to_sequence()
    assert ids.shape == mask.shape == (3, 6 * codebooks)
    assert int(ids.max()) < before.vocabulary == sum(before.codebook_sizes)
    assert torch.equal(before.from_sequence(ids, mask).ids, before.ids)


def test_padding_is_zero_and_not_counted_in_bits():
    mask = torch.tensor([[True, True, False, False, False, False]])
    some = Tokens(torch.full((1, 6), 5), Grid(2, 3), (8,), mask)
    assert some.ids.tolist() == [[5, 5, 0, 0, 0, 0]]
    assert some.bits.tolist() == [6.0]


def test_side_information_counts_in_bits():
    side = {"box": torch.zeros(2, 4, dtype=torch.int64)}
    some = tokens(2, side=side, side_sizes={"box": 16})
    assert some.bits.tolist() == pytest.approx([6 * math.log2(7) + 4 * 4] * 2)


def test_items_and_cat_are_inverse():
    whole = tokens(4)
    again = Tokens.cat(list(whole))
    assert torch.equal(again.ids, whole.ids) and len(whole[1:3]) == 2 and len(whole[-1]) == 1
    assert torch.equal(whole[-1].ids[0], whole.ids[-1])


def test_cat_pads_to_the_longest():
    layout = Sequence(6)
    short, long = (
        Tokens(torch.ones(1, 2, dtype=torch.int64), layout, (4,)),
        Tokens(torch.ones(1, 5).long(), layout, (4,)),
    )
    both = Tokens.cat([short, long])
    assert both.lengths.tolist() == [2, 5] and both.ids[0].tolist() == [1, 1, 0, 0, 0]


def test_cat_refuses_tokens_of_two_tokenizers():
    with pytest.raises(InputError, match="tokenizer differs: 'a' and 'b'"):
        Tokens.cat([tokens(tokenizer="a"), tokens(tokenizer="b")])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Tokens(torch.zeros(1, 6, dtype=torch.int32), Grid(2, 3), (8,)), "must be int64"),
        (lambda: Tokens(torch.zeros(6).long(), Grid(2, 3), (8,)), r"must be \(B, N\)"),
        (lambda: Tokens(torch.zeros(1, 7).long(), Grid(2, 3), (8,)), "do not fit"),
        (lambda: Tokens(torch.zeros(1, 6, 2).long(), Grid(2, 3), (8,)), "2 codebook"),
        (lambda: Tokens(torch.zeros(1, 6).long(), Grid(2, 3), (8,), torch.ones(1, 6)), "must be bool"),
        (lambda: Tokens(torch.full((1, 6), 8), Grid(2, 3), (8,)).validate(), "its 8 codes are 0..7"),
        (lambda: tokens().prefix(3), "does not decode; allowed: 6"),
        (lambda: Grid(0, 3), "at least 1"),
        (lambda: Layout.from_dict({"kind": "Spiral"}), "unknown token layout 'Spiral'"),
    ],
)
def test_what_cannot_work_says_so(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not tokens")
    with pytest.raises(CheckpointError, match="not a tokgen token file"):
        Tokens.load(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no token file"):
        Tokens.load(tmp_path / "y.safetensors")


def test_import_is_light_and_quick():
    code = (
        "import sys, time; t = time.perf_counter(); import tokgen; t = time.perf_counter() - t\n"
        "heavy = {'lightning', 'transformers', 'diffusers', 'decord'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert t < 2, t\n"
        "from tokgen import Tokens, VisualTokenizer, load\n"
        "heavy = {'lightning', 'transformers', 'diffusers', 'decord'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
