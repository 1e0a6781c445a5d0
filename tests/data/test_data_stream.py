"""What the loader promises: order, splits, equal steps, exact resume, and damage that is counted."""

from __future__ import annotations

import logging
import os
import tarfile
from pathlib import Path

import pytest
import torch
from shard_makers import image_bytes, write_codes, write_images

from tokgen.data.batches import Captions, CodeSamples, ImageSamples
from tokgen.data.plan import BufferOrder, Passes
from tokgen.data.shard_set import ShardSet
from tokgen.data.shards import ShardWriter
from tokgen.data.stream import ShardLoader
from tokgen.errors import DataError

IMAGES = ImageSamples(Captions(variants=0.5, word_dropout=0.3), 12, "random_crop", flip=True, shift=2)


def loader(folder: Path | list[Path], samples=IMAGES, **options) -> ShardLoader:
    return ShardLoader(ShardSet.open(folder), samples, **{"batch_size": 4, "shuffle_buffer": 8, **options})


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


# ------------------------------------------------------------------------------------------------------ order and split


def test_batches_are_as_documented(images):
    batch = next(iter(loader(images)))
    assert set(batch) == {"pixels", "caption", "key"}
    assert batch["pixels"].dtype == torch.uint8 and batch["pixels"].shape == (4, 3, 12, 12)
    assert batch["pixels"].is_contiguous()


def test_each_sample_once_per_epoch_in_another_order_each_time(images):
    data = loader(images)
    epochs = [keys(data) for _ in range(3)]
    assert all(sorted(epoch) == [f"k{i:03d}" for i in range(48)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    first = [[int(k[1:]) // 12 for k in epoch] for epoch in epochs]
    assert len({tuple(shards) for shards in first}) == 3  # the shards' order changes too, not only the samples' in them


def test_order_depends_on_the_seed_and_nothing_else(images):
    assert keys(loader(images, seed=1)) == keys(loader(images, seed=1))
    assert keys(loader(images, seed=1)) != keys(loader(images, seed=2))
    before = torch.get_rng_state()
    list(loader(images, num_workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_is_each_samples_own_and_changes_with_epoch_and_seed(tmp_path):
    write_images(tmp_path / "s", [16])
    samples = ImageSamples(size=12, resize="squash", flip=True, shift=3)

    def pixels(data: ShardLoader) -> dict[str, torch.Tensor]:
        return {key: x for batch in data for key, x in zip(batch["key"], batch["pixels"])}

    first = loader(tmp_path / "s", samples)
    epochs = [pixels(first), pixels(first), pixels(loader(tmp_path / "s", samples, seed=1))]
    for a, b in ((0, 1), (0, 2)):
        assert sum(not torch.equal(epochs[a][key], epochs[b][key]) for key in epochs[a]) > 12
    other_buffer = pixels(loader(tmp_path / "s", samples, shuffle_buffer=3))  # another order, the same pictures
    assert all(torch.equal(epochs[0][key], other_buffer[key]) for key in epochs[0])


@pytest.mark.parametrize("shard_sizes", [[48], [12] * 4, [1, 40, 7], [5] * 9 + [3]])
@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (2, 2), (3, 2), (4, 3)])
def test_any_shards_split_over_any_readers_without_repeats(tmp_path, shard_sizes, world, workers):
    write_images(tmp_path / "s", shard_sizes)
    seen, steps = [], set()
    for rank in range(world):
        data = loader(tmp_path / "s", batch_size=2, rank=rank, world=world, num_workers=workers)
        runs = 0
        for worker in range(max(1, workers)):  # the readers, without starting processes
            batches = list(data.stream._batches(5, worker, max(1, workers), 0))
            runs += len(batches)
            seen += keys(batches)
        steps.add(runs)
        assert runs == len(data) == 48 // (world * 2)
    assert len(steps) == 1
    assert sorted(seen) == [f"k{i:03d}" for i in range(48)]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_share_the_epoch_however_they_are_started(images, context):
    seen = []
    for rank, workers in ((0, 2), (1, 0)):
        options = {"num_workers": workers, "multiprocessing_context": context if workers else None}
        data = loader(images, rank=rank, world=2, **options)
        epochs = [keys(data) for _ in range(2)]  # the same workers make both
        assert epochs[0] != epochs[1]
        seen.append(epochs)
        data.close()
    for epoch in range(2):
        assert sorted(seen[0][epoch] + seen[1][epoch]) == [f"k{i:03d}" for i in range(48)]


def test_uneven_samples_give_equal_steps_and_no_repeat(tmp_path):
    write_images(tmp_path / "s", [3, 17, 1, 10])  # 31 samples, 2 ranks, batches of 4: 3 steps
    epochs = []
    for epoch in range(4):
        seen = []
        for rank in range(2):
            data = loader(tmp_path / "s", rank=rank, world=2)
            data.epoch = epoch
            batches = list(data)
            assert len(batches) == len(data) == 3
            seen += keys(batches)
        assert len(seen) == len(set(seen)) == 24
        epochs.append(frozenset(seen))
    assert len(set(epochs)) > 1  # the remainder is not always the same


def test_one_shards_remainder_is_not_always_the_same(tmp_path):
    write_images(tmp_path / "s", [10])
    data = loader(tmp_path / "s")
    assert len(set().union(*(keys(data) for _ in range(12)))) == 10


@pytest.mark.parametrize("steps", [5, 12, 30])
def test_steps_per_epoch_covers_the_data_evenly(images, steps):
    """Epochs shorter or longer than the data go on where the last ended: over 12 · steps batches, no sample is favoured."""
    data = loader(images, steps_per_epoch=steps)
    assert len(data) == steps
    counts = dict.fromkeys([f"k{i:03d}" for i in range(48)], 0)
    for _ in range(12):
        batches = list(data)
        assert len(batches) == steps
        for key in keys(batches):
            counts[key] += 1
    assert set(counts.values()) == {steps}


def test_several_folders_are_one_set(tmp_path):
    write_images(tmp_path / "a", [5, 3])
    write_images(tmp_path / "b", [8], start=8)
    assert sorted(keys(loader([tmp_path / "a", tmp_path / "b"]))) == [f"k{i:03d}" for i in range(16)]


def test_shuffle_buffer_emits_everything_within_its_reach():
    import random

    order = list(BufferOrder(100, 10, random.Random(0)))
    assert sorted(order) == list(range(100)) and order != list(range(100))
    assert all(element <= place + 9 for place, element in enumerate(order))  # not before it could enter the buffer
    assert list(BufferOrder(5, 1, random.Random(0))) == list(range(5))


def test_passes_map_each_position_to_one_sample():
    passes = Passes([3, 5, 1], seed=0, shuffle=True)
    runs = passes.runs(0, 18)
    samples = [(run.shard, i) for run in runs for i in range(run.low, run.high)]
    assert len(samples) == 18
    assert sorted(samples[:9]) == sorted(samples[9:]) == [(0, 0), (0, 1), (0, 2), *[(1, i) for i in range(5)], (2, 0)]
    for start in range(18):  # any cut gives the same sequence
        cut = [(r.shard, i) for r in passes.runs(start, 18 - start) for i in range(r.low, r.high)]
        assert cut == samples[start:]


# ----------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (2, 2), (5, 0), (3, 2)])
@pytest.mark.parametrize("total, batch", [(31, 4), (16, 4), (9, 4), (3, 2)])
def test_validation_has_each_sample_once_on_the_union_of_ranks(tmp_path, world, workers, total, batch):
    write_images(tmp_path / "s", [total // 2, total - total // 2])
    real, steps = [], set()
    for rank in range(world):
        data = loader(tmp_path / "s", batch_size=batch, rank=rank, world=world, train=False)
        batches = [b for w in range(max(1, workers)) for b in data.stream._batches(0, w, max(1, workers), 0)]
        steps.add((len(batches), len(data)))
        for b in batches:
            assert b["valid"].shape == (len(b["key"]),)
            real += [key for key, valid in zip(b["key"], b["valid"].tolist()) if valid]
    assert sorted(real) == [f"k{i:03d}" for i in range(total)]
    assert len(steps) == 1 and len(set(next(iter(steps)))) == 1


def test_validation_is_the_same_each_time(images):
    data = loader(images, ImageSamples(size=12, train=False), train=False)
    a = list(data)
    next(iter(data))  # an abandoned look, such as a sanity check
    b = list(data)
    assert len(a) == len(b) == 12 and all(same(x, y) for x, y in zip(a, b))
    assert keys(a) == [f"k{i:03d}" for i in range(48)]


# --------------------------------------------------------------------------------------------------------------- resume


def check_resume(folder: Path, stop: int, steps: int, **options) -> None:
    """Batches after a resume at `stop` equal the uninterrupted run's, bit for bit, augmentation included."""
    whole = loader(folder, **options)
    expected = []
    while len(expected) < steps:
        expected += list(whole)
    first = loader(folder, **options)
    seen, state = [], None
    while state is None:
        for batch in first:
            seen.append(batch)
            if len(seen) == stop:
                state = first.state_dict()
                break
    first.close()
    second = loader(folder, **options)
    second.load_state_dict(state)
    after: list = []
    while len(seen) + len(after) < steps:
        after += list(second)
    for place, (a, b) in enumerate(zip(expected, seen + after)):
        assert same(a, b), f"batch {place}"
    for data in (whole, second):
        data.close()


@pytest.mark.parametrize("stop", [1, 5, 11, 12, 13, 17])
def test_resume_is_exact_mid_epoch_and_at_the_boundary(images, stop):
    check_resume(images, stop, 30)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 12, 14])
def test_resume_is_exact_with_two_workers(images, stop):
    check_resume(images, stop, 30, num_workers=2)


def test_resume_is_exact_on_each_rank_from_the_state_of_rank_zero(images):
    def batches_of(rank: int, state: dict | None = None, count: int = 12) -> tuple[list, dict]:
        data = loader(images, rank=rank, world=2)
        if state is not None:
            data.load_state_dict(state)
        seen: list = []
        while True:
            for batch in data:
                seen.append(batch)
                if len(seen) == count:
                    return seen, data.state_dict()

    _, state = batches_of(0, count=4)
    for rank in range(2):
        whole, _ = batches_of(rank)
        rest, _ = batches_of(rank, state, count=8)
        assert all(same(a, b) for a, b in zip(whole[4:], rest))


def test_resume_is_exact_with_steps_per_epoch(images):
    check_resume(images, 9, 30, steps_per_epoch=7)


def test_skipping_on_resume_decodes_nothing_and_opens_only_what_is_left(images, monkeypatch):
    from tokgen.data import batches, tar

    data = loader(images, shuffle_buffer=2)
    data.load_state_dict({"epoch": 0, "batch": 11})
    decoded, opened = [], []
    real_decode, real_open = batches.decode_image, tar.open_bytes
    monkeypatch.setattr(batches, "decode_image", lambda *a: decoded.append(1) or real_decode(*a))
    monkeypatch.setattr(tar, "open_bytes", lambda *a: opened.append(a[0]) or real_open(*a))
    assert len(list(data)) == 1
    assert len(decoded) == 4
    assert len(opened) <= 2


def test_resume_with_other_data_is_said(images, tmp_path, caplog):
    data = loader(images)
    next(iter(data))
    state = data.state_dict()
    write_images(tmp_path / "more", [50])
    for other, said in (
        (loader(tmp_path / "more"), "samples was 48, is 50"),
        (loader(images, seed=1), "seed was 0, is 1"),
    ):
        with caplog.at_level(logging.WARNING):
            other.load_state_dict(state)
            next(iter(other))
        assert "cannot be resumed exactly" in caplog.text and said in caplog.text


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_abandoned_epoch_is_followed_by_its_rest(images, workers):
    data = loader(images, num_workers=workers)
    seen = [batch for _, batch in zip(range(5), data)]
    assert data.state_dict()["batch"] == 5
    seen += list(data)
    assert data.state_dict()["epoch"] == 1
    assert keys(seen) == keys(loader(images, num_workers=workers))
    data.close()


# --------------------------------------------------------------------------------------------------------------- damage


def header_of(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return next(m.offset for m in tar if m.name == name)


def cut_in_data(path: Path) -> None:
    os.truncate(path, header_of(path, "k018.png") + 512 + 100)


def cut_at_boundary(path: Path) -> None:
    os.truncate(path, header_of(path, "k018.png"))


def cut_in_header(path: Path) -> None:
    os.truncate(path, header_of(path, "k018.png") + 200)


def overwrite_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = header_of(path, "k018.png")
    data[at : at + 512] = b"\x55" * 512
    path.write_bytes(data)


def zero_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = header_of(path, "k018.png")
    data[at : at + 512] = bytes(512)
    path.write_bytes(data)


def garbage(path: Path) -> None:
    path.write_bytes(b"<html>404 not found</html>" * 500)


def gzipped(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(path.read_bytes()))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = {  # what happens to the second shard (k012 … k023): bad samples by reason, missing samples
    cut_in_data: ({"cut off": 1}, 5),
    cut_at_boundary: ({}, 6),
    cut_in_header: ({}, 6),
    overwrite_header: ({"no image": 1}, 0),
    zero_header: ({"no image": 1}, 0),
    garbage: ({}, 12),
    gzipped: ({}, 12),
    emptied: ({}, 12),
}


@pytest.mark.parametrize("harm", DAMAGE, ids=lambda f: f.__name__)
def test_damage_is_counted_and_everything_else_is_delivered(images, harm, caplog):
    harm(images / "00001.tar")
    skipped, missing = DAMAGE[harm]
    plain = ImageSamples(size=12)
    data = loader(images, plain)
    batches = list(data)
    assert len(batches) == 12 and all(len(b["key"]) == 4 for b in batches)
    assert data.stats.skipped == skipped and data.stats.missing == missing
    lost = missing + sum(skipped.values())
    assert data.stats.read == 48 - lost
    seen = set(keys(batches))
    assert len(seen) == 48 - lost
    assert {f"k{i:03d}" for i in (*range(12), *range(24, 48))} <= seen
    assert ("00001.tar" in str(data.stats.damaged)) == bool(missing)
    assert "00001.tar" in caplog.text
    for stop in (3, 7):
        check_resume(images, stop, 20)


@pytest.mark.parametrize("harm", [cut_in_data, garbage], ids=lambda f: f.__name__)
def test_damage_in_validation_is_flagged_not_repeated(images, harm):
    harm(images / "00001.tar")
    lost = sum(DAMAGE[harm][0].values()) + DAMAGE[harm][1]
    real = []
    for rank in range(2):
        for batch in loader(images, ImageSamples(size=12, train=False), rank=rank, world=2, train=False):
            real += [key for key, valid in zip(batch["key"], batch["valid"].tolist()) if valid]
    assert len(real) == len(set(real)) == 48 - lost


def write_with_bad(folder: Path, bad: dict[int, dict], total: int = 40) -> Path:
    with ShardWriter(folder, max_samples=10) as writer:
        for i in range(total):
            writer.write(f"k{i:03d}", bad.get(i, {"png": image_bytes(i), "txt": f"t {i}"}))
    return folder


BAD = {
    3: {"png": b"\x89PNG not really", "txt": "x"},
    12: {"png": image_bytes(1)[:200], "txt": "x"},
    17: {"png": image_bytes(1), "txt": "  \n"},
    21: {"png": image_bytes(1)},
    22: {"txt": "no picture"},
    30: {"png": image_bytes(1), "txt": b"\xff\xfe\xfa"},
}


def test_bad_samples_are_counted_by_reason_and_replaced(tmp_path):
    data = loader(write_with_bad(tmp_path / "s", BAD), ImageSamples(size=12), max_bad_fraction=0.2)
    batches = list(data)
    assert [len(b["key"]) for b in batches] == [4] * 10
    assert data.stats.skipped == {
        "unreadable image": 2, "empty caption": 1, "no caption": 1, "no image": 1, "text is not UTF-8": 1,
    }  # fmt: skip
    assert (data.stats.read, data.stats.missing, data.stats.bad) == (34, 0, 6)
    assert {f"k{i:03d}" for i in range(40) if i not in BAD} == set(keys(batches))
    assert any("k017" in name for name in data.stats.examples["empty caption"])
    assert data.stats.as_dict()["skipped/empty_caption"] == 1
    assert all(len(set(b["key"])) == 4 for b in batches)  # a stand-in is never already in its batch


def test_resume_is_exact_with_bad_samples(tmp_path):
    folder = write_with_bad(tmp_path / "s", BAD)
    for stop in (1, 4, 9, 10, 13):
        check_resume(folder, stop, 25, max_bad_fraction=0.5)


@pytest.mark.slow
def test_counts_reach_the_main_process_from_workers(tmp_path):
    data = loader(write_with_bad(tmp_path / "s", BAD), num_workers=2, max_bad_fraction=0.5)
    assert all("_report" not in batch for batch in data)
    assert (data.stats.bad, data.stats.read) == (6, 34)
    data.close()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_too_many_bad_samples_end_the_run_with_a_clear_error(tmp_path, workers):
    folder = write_with_bad(tmp_path / "s", BAD)
    data = loader(folder, num_workers=workers)
    with pytest.raises(DataError, match=r"4 bad samples in this epoch's 40 .* max_bad_fraction=0\.01"):
        list(data)
    data.close()


def test_no_bad_sample_is_tolerated_at_zero(tmp_path):
    folder = write_with_bad(tmp_path / "s", {3: BAD[3]})
    with pytest.raises(DataError, match="unreadable image"):
        list(loader(folder, max_bad_fraction=0))
    assert len(list(loader(folder))) == 10  # one odd file does not end a tiny data set


def test_mostly_missing_data_ends_the_run(images):
    for name in ("00000", "00001", "00002"):
        garbage(images / f"{name}.tar")
    with pytest.raises(DataError, match="missing from damaged shards"):
        list(loader(images))


def test_nothing_readable_is_an_error_and_not_an_endless_search(tmp_path):
    folder = write_with_bad(tmp_path / "s", dict.fromkeys(range(8), BAD[3]), total=8)
    with pytest.raises(DataError, match="No readable sample"):
        list(loader(folder, max_bad_fraction=1))


def test_a_shard_that_vanishes_is_counted(images, caplog):
    data = loader(images)
    (images / "00002.tar").unlink()
    batches = list(data)
    assert len(batches) == 12 and (data.stats.missing, data.stats.read) == (12, 36)
    assert set(keys(batches)) == {f"k{i:03d}" for i in (*range(24), *range(36, 48))}
    assert "00002.tar could not be read (No such file or directory)" in caplog.text


# ------------------------------------------------------------------------------------------------------------- the codes


@pytest.mark.parametrize("codebooks", [None, 3])
def test_ragged_codes_are_padded_and_masked(tmp_path, codebooks):
    lengths = [3, 7, 5, 1, 6, 2, 7, 4]
    write_codes(tmp_path / "c", lengths, codebooks)
    samples = CodeSamples(codebook_sizes=(64,) * (codebooks or 1))
    seen = {}
    for batch in loader(tmp_path / "c", samples, train=False):
        ids, mask = batch["ids"], batch["mask"]
        assert ids.dtype == torch.int64 and mask.dtype == torch.bool
        assert ids.shape == (4, mask.shape[1]) + ((codebooks,) if codebooks else ())
        assert (ids[~mask] == 0).all()
        seen.update(zip(batch["key"], mask.sum(1).tolist()))
    assert list(seen.values()) == lengths


def test_codes_outside_their_codebook_are_bad(tmp_path):
    write_codes(tmp_path / "c", [4] * 8)
    data = loader(tmp_path / "c", CodeSamples(codebook_sizes=(8,)), max_bad_fraction=1)
    with pytest.raises(DataError, match="No readable sample"):
        list(data)


def test_stored_length_masks_fixed_size_codes(tmp_path):
    import numpy as np

    with ShardWriter(tmp_path / "c", kind="codes") as writer:
        for i in range(4):
            writer.write(f"{i}", {"npy": np.full(6, 9), "txt": "x", "json": {"length": i + 1}})
    (batch,) = loader(tmp_path / "c", CodeSamples(), train=False)
    assert batch["mask"].sum(1).tolist() == [1, 2, 3, 4]
    assert (batch["ids"] == 9).equal(batch["mask"])
