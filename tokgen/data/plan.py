"""Which samples an epoch reads, in which order and by which reader: integers from the manifests' counts and a seed alone.

See `tokgen.data.stream` for the plan as a whole.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """Consecutive positions that lie in one shard: samples `low` to `high` (of the selected ones) of shard `shard`."""

    shard: int
    low: int
    high: int


class Passes:
    """The endless sequence of passes over a set's samples: maps ranges of positions to runs inside shards."""

    def __init__(self, counts: Sequence[int], seed: int, shuffle: bool):
        self.counts, self.seed, self.shuffle, self.total = list(counts), seed, shuffle, sum(counts)

    def _layout(self, number: int) -> tuple[list[int], list[int], int]:
        """(shards in order, position of the end of each, first position) of a pass."""
        order, first = list(range(len(self.counts))), 0
        if self.shuffle:
            rng = random.Random(f"{self.seed}/pass/{number}")
            rng.shuffle(order)
            first = rng.randrange(self.total)  # else the same tail of a single shard would be left over each epoch
        ends, at = [], 0
        for shard in order:
            at += self.counts[shard]
            ends.append(at)
        return order, ends, first

    def runs(self, start: int, count: int) -> list[Run]:
        runs = []
        while count > 0:
            number, offset = divmod(start, self.total)
            order, ends, first = self._layout(number)
            while count > 0 and offset < self.total:
                at = (first + offset) % self.total
                i = bisect.bisect_right(ends, at)
                n = min(ends[i] - at, self.total - offset, count)
                low = at - (ends[i] - self.counts[order[i]])
                runs.append(Run(order[i], low, low + n))
                offset, start, count = offset + n, start + n, count - n
        return runs


class BufferOrder:
    """0 … n-1 in the order in which a shuffle buffer of `size` elements emits them; size 1 keeps the order.

    `held` and `next` are the elements in the buffer and the first that has not entered it.
    """

    def __init__(self, n: int, size: int, rng: random.Random):
        self.n, self.rng, self.next = n, rng, min(n, max(1, size))
        self.held = list(range(self.next))

    def __iter__(self) -> BufferOrder:
        return self

    def __next__(self) -> int:
        if not self.held:
            raise StopIteration
        slot = int(self.rng.random() * len(self.held))  # a resume draws millions; randrange takes five times as long
        out = self.held[slot]
        if self.next < self.n:
            self.held[slot] = self.next
            self.next += 1
        else:
            self.held[slot] = self.held[-1]
            self.held.pop()
        return out


class Spans:
    """Positions in ascending order, held as ranges [low, high) that do not touch."""

    def __init__(self, ranges: Iterable[tuple[int, int]]):
        merged: list[tuple[int, int]] = []
        for low, high in sorted(r for r in ranges if r[0] < r[1]):
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self.ranges = merged
        self._ends = list(itertools.accumulate(high - low for low, high in merged))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def at(self, index: int) -> int:
        """The position at an index among them."""
        i = bisect.bisect_right(self._ends, index)
        return self.ranges[i][1] - (self._ends[i] - index)

    def between(self, low: int, high: int) -> Spans:
        """Those at the indices [low, high)."""
        found, before = [], 0
        for (first, _), end in zip(self.ranges, self._ends):
            found.append((first + max(low - before, 0), first + min(high, end) - before))
            before = end
        return Spans(found)


@dataclass(frozen=True)
class Part:
    """One reader's part of an epoch: its positions, in batches of the given sizes."""

    positions: Spans
    batch_sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.positions)


def reader_part(positions: Spans, steps: int, batch_size: int, worker: int, workers: int) -> Part:
    """The part of `worker` in a rank's positions, read in `steps` batches.

    Worker w makes batches w, w + workers, …; only the rank's last batch may be short, or empty (size 0) when another
    rank has one more sample.
    """
    sizes = [batch_size] * steps
    sizes[-1] = len(positions) - (steps - 1) * batch_size
    before = sum(sum(sizes[w::workers]) for w in range(worker))
    own = tuple(sizes[worker::workers])
    return Part(positions.between(before, before + sum(own)), own)


@dataclass(frozen=True)
class Cut:
    """Positions shared among the readers of all ranks, in whole batches; a remainder is left to nobody.

    Attributes:
        positions: of an epoch, or what is left of one.
        world, readers: ranks, and readers of each.
        steps, batch_size: batches of each rank, and samples of a batch.
        shuffle_buffer: of each reader.
        name: of the generators that its readers' orders come from.
    """

    positions: Spans
    world: int
    readers: int
    steps: int
    batch_size: int
    shuffle_buffer: int
    name: str

    def part(self, rank: int, reader: int) -> Part:
        each = self.steps * self.batch_size
        own = self.positions.between(rank * each, (rank + 1) * each)
        return reader_part(own, self.steps, self.batch_size, reader, self.readers)

    def order(self, rank: int, reader: int, size: int) -> BufferOrder:
        """The order in which a reader takes its `size` samples."""
        return BufferOrder(size, self.shuffle_buffer, random.Random(f"{self.name}/{rank}/{reader}"))

    def left(self, batches: int) -> Spans:
        """The positions that are in none of the first `batches` of any rank."""
        ranges = list(self.positions.between(self.world * self.steps * self.batch_size, len(self.positions)).ranges)
        for rank, reader in itertools.product(range(self.world), range(self.readers)):
            part = self.part(rank, reader)
            order = self.order(rank, reader, part.size)
            for _ in range(sum(part.batch_sizes[: len(range(reader, batches, self.readers))])):
                next(order)
            ranges += part.positions.between(order.next, part.size).ranges
            ranges += [(p, p + 1) for p in map(part.positions.at, order.held)]
        return Spans(ranges)


class Epochs:
    """The positions of each epoch, and how the readers share them.

    An epoch that was begun by other readers goes on with what they left: each position of it still comes once.

    Args:
        total: samples of the set.
        seed: of the readers' orders.
        contiguous: epochs follow each other through the passes, `steps` batches each; otherwise an epoch is a pass without its
            remainder.
        conditions: "world", "readers", "steps", "batch_size" and "shuffle_buffer", as `Cut` takes them.
    """

    SHARING = ("world", "readers", "steps", "batch_size", "shuffle_buffer")

    def __init__(self, total: int, seed: int, contiguous: bool, conditions: dict[str, int]):
        self.total, self.seed, self.contiguous, self.conditions = total, seed, contiguous, conditions
        self.origin = (0, 0)  # an epoch, and the position that it starts at; of contiguous ones
        self.begun: tuple[int, int, Cut] | None = None  # an epoch that others began, its start, and what is left of it
        self.before: list[dict[str, int]] = []  # under which conditions, and for how many "batches" each

    def start(self, epoch: int) -> int:
        """The position that an epoch starts at."""
        if self.begun is not None and self.begun[0] == epoch:
            return self.begun[1]
        if not self.contiguous:
            return epoch * self.total
        return self.origin[1] + (epoch - self.origin[0]) * self._size(self.conditions)

    def cut(self, epoch: int) -> Cut:
        if self.begun is not None and self.begun[0] == epoch:
            return self.begun[2]
        return self._whole(epoch, self.start(epoch), self.conditions)

    def go_on(self, epoch: int, start: int, before: Sequence[dict[str, int]]) -> bool:
        """Lay out an epoch that starts at `start` and was begun under other conditions; whether anything of it is left."""
        self.before, self.origin, self.begun = list(before), (epoch, start), None
        if not before:
            return True
        cut = self._whole(epoch, start, before[0])
        end = cut.positions.ranges[-1][1]
        for i, (was, now) in enumerate(zip(before, [*before[1:], self.conditions]), 1):
            left, step = cut.left(was["batches"]), now["world"] * now["batch_size"]
            steps = len(left) // step
            if self.contiguous:  # filled up to whole batches with what comes next
                steps = -(-len(left) // step)
                left, end = Spans([*left.ranges, (end, end + steps * step - len(left))]), end + steps * step - len(left)
            cut = Cut(left, **{**self._sharing(now), "steps": steps}, name=f"{self.seed}/buffer/{epoch}.{i}")
        self.origin = (epoch + 1, end)
        if cut.steps:
            self.begun = (epoch, start, cut)
        else:
            self.before = []
        return bool(cut.steps)

    def _whole(self, epoch: int, start: int, conditions: dict[str, int]) -> Cut:
        size = self._size(conditions) if self.contiguous else self.total
        return Cut(Spans([(start, start + size)]), **self._sharing(conditions), name=f"{self.seed}/buffer/{epoch}")

    def _size(self, conditions: dict[str, int]) -> int:
        return conditions["steps"] * conditions["batch_size"] * conditions["world"]

    def _sharing(self, conditions: dict[str, int]) -> dict[str, Any]:
        return {name: conditions[name] for name in self.SHARING}
