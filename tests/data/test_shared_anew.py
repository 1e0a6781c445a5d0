"""An epoch that other ranks or readers began: what they left is shared anew, and every sample still comes once."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokgen.data.batches import ImageSamples
from tokgen.data.plan import Epochs, Spans
from tokgen.data.shard_set import ShardSet
from tokgen.data.stream import ShardLoader

SAMPLES = ImageSamples(size=12, resize="squash", flip=True, shift=3)
ROUTES = {  # (ranks, workers, batch size, shuffle buffer, batches of each rank) of one leg after the other; the last to the end
    "one to two": [(1, 0, 4, 8, 5), (2, 0, 4, 8, None)],
    "two to one": [(2, 0, 4, 8, 3), (1, 0, 4, 8, None)],
    "there and back": [(1, 0, 4, 8, 1), (3, 0, 2, 8, 2), (1, 0, 4, 8, 3), (2, 0, 4, 8, None)],
    "another batch size": [(1, 0, 4, 8, 5), (1, 0, 6, 8, None)],
    "another buffer": [(2, 0, 2, 48, 5), (2, 0, 2, 1, None)],
    "stopped before it began": [(2, 0, 4, 8, 2), (1, 0, 4, 8, 0), (3, 0, 4, 8, None)],
    "other workers": [(2, 0, 2, 8, 5), (1, 2, 4, 8, 3), (2, 1, 4, 8, None)],
}


class Leg:
    """The loaders of all ranks; they must agree on their state."""

    def __init__(self, folder: Any, ranks: int, workers: int, batch: int, buffer: int, state: Any, **options: Any):
        shards, sizes = ShardSet.open(folder), {"batch_size": batch, "num_workers": workers, "shuffle_buffer": buffer}
        self.loaders = [ShardLoader(shards, SAMPLES, rank=r, world=ranks, **sizes, **options) for r in range(ranks)]
        for loader in self.loaders if state is not None else ():
            loader.load_state_dict(state)

    def take(self, batches: int | None) -> list[tuple[str, torch.Tensor]]:
        """Keys and pictures of the next batches, at most to the end of the epoch."""
        found = []
        for loader in self.loaders:
            for i, batch in enumerate(loader):
                found += zip(batch["key"], batch["pixels"])
                if i + 1 == batches:
                    break
        states = [loader.state_dict() for loader in self.loaders]
        assert all(state == states[0] for state in states)
        return found

    def close(self) -> Any:
        for loader in self.loaders:
            loader.close()
        return self.loaders[0].state_dict()


@pytest.mark.parametrize("route", [pytest.param(r, marks=pytest.mark.slow if "workers" in n else ()) for n, r in ROUTES.items()], ids=list(ROUTES))  # fmt: skip
def test_each_sample_comes_once_and_is_the_same_picture(images, route):
    whole = dict(Leg(images, 1, 0, 4, 8, None).take(None))
    seen, state = [], None
    for ranks, workers, batch, buffer, count in route:
        leg = Leg(images, ranks, workers, batch, buffer, state)
        seen += leg.take(count) if count != 0 else []
        state = leg.close()
    assert state["epoch"] == 1 and state["batch"] == 0 and not state["before"]
    assert max(Counter(key for key, _ in seen).values()) == 1
    last = route[-1]
    assert 48 - len(seen) < last[0] * last[2], "only what fills no batch on every rank is left out"
    assert all(torch.equal(pixels, whole[key]) for key, pixels in seen), "its augmentation stays that of the epoch"
    ours, fresh = (Leg(images, *last[:4], s) for s in (state, {"epoch": 1, "batch": 0}))
    for (a, x), (b, y) in zip(ours.take(None), fresh.take(None)):
        assert a == b and torch.equal(x, y), "the next epoch knows nothing of it"
    ours.close(), fresh.close()


@pytest.mark.parametrize("route", [ROUTES[name] for name in ("one to two", "two to one", "there and back")])
def test_epochs_that_follow_each_other_lose_nothing(images, route):
    """Of `steps_per_epoch` batches: what a batch lacks at the end of what is left comes from the next."""
    places: list[int] = []
    state = None
    for ranks, workers, batch, buffer, count in [*route, (1, 0, 4, 8, None), (2, 0, 4, 8, None)]:
        leg = Leg(images, ranks, workers, batch, buffer, state, steps_per_epoch=7)
        for loader in leg.loaders:
            decode = loader.stream._decode
            loader.stream._decode = lambda raw, at, decode=decode: places.append(at) or decode(raw, at)
        leg.take(count)
        state = leg.close()
    assert sorted(places) == list(range(len(places))), "every position of the passes once, with no gap"


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(24, 120), steps=st.none() | st.integers(1, 9), epoch=st.integers(0, 2),
    legs=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 30), st.integers(1, 40)), min_size=2, max_size=4),
)  # fmt: skip
def test_no_position_is_lost_or_repeated(total, steps, epoch, legs):
    before: list[dict[str, int]] = []
    taken: list[int] = []
    start = epoch * 7 if steps else epoch * total
    for world, readers, batch, buffer, count in legs:
        each = {"world": world, "readers": readers, "batch_size": batch, "shuffle_buffer": buffer}
        epochs = Epochs(total, 0, steps is not None, {**each, "steps": steps or max(total // (world * batch), 1)})
        if not epochs.go_on(epoch, start, before):
            break
        cut = epochs.cut(epoch)
        count = min(count, cut.steps)
        for rank in range(world):
            for reader in range(readers):
                part = cut.part(rank, reader)
                order = cut.order(rank, reader, part.size)
                own = sum(part.batch_sizes[: len(range(reader, count, readers))])
                taken += [part.positions.at(next(order)) for _ in range(own)]
        left = cut.left(count)
        assert len(set(taken)) == len(taken) and not set(taken) & {left.at(i) for i in range(len(left))}
        if steps is None:
            assert sorted([*taken, *(left.at(i) for i in range(len(left)))]) == list(range(start, start + total))
        else:
            assert sorted([*taken, *(left.at(i) for i in range(len(left)))]) == list(
                range(start, epochs.start(epoch + 1))
            )
        if count == cut.steps:
            break
        before = [*before, {**epochs.conditions, "batches": count}]


def test_spans():
    spans = Spans([(7, 9), (3, 5), (5, 6), (11, 11)])
    assert spans.ranges == [(3, 6), (7, 9)] and len(spans) == 5
    assert [spans.at(i) for i in range(5)] == [3, 4, 5, 7, 8]
    assert spans.between(2, 4).ranges == [(5, 6), (7, 8)] and spans.between(4, 9).ranges == [(8, 9)]
    assert not len(spans.between(5, 5)) and not len(Spans([]))


def test_it_is_said_when_readers_change(images, caplog):
    first = Leg(images, 1, 0, 4, 8, None)
    first.take(2)
    second = Leg(images, 2, 0, 4, 8, first.close())
    with caplog.at_level(logging.INFO, "tokgen.data.stream"):
        second.take(1)
    assert "shared anew: world was 1, is 2; steps was 12, is 6" in caplog.text


def test_what_is_left_of_a_shard_is_read_in_one_pass(images, monkeypatch):
    """The rest of a large shuffle buffer are single samples all over the shards: each shard is still opened once."""
    from tokgen.data import tar

    first = Leg(images, 1, 0, 4, 24, None)
    first.take(6)
    opened = []
    real = tar.open_bytes
    monkeypatch.setattr(tar, "open_bytes", lambda *a: opened.append(a[0]) or real(*a))
    second = Leg(images, 2, 0, 4, 24, first.close())
    assert len(second.loaders[0].stream.epochs.cut(0).positions.ranges) > 8
    second.take(None)
    assert len(opened) <= len(set(opened)) + 2, "one that two ranks share, or that the pass begins within, twice"
