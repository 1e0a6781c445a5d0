"""Which samples an epoch reads, in which order and by which reader: integers from the manifests' counts and a seed alone.

See `tokgen.data.stream` for the plan as a whole.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True)
class Part:
    """One reader's part of an epoch: positions [start, start + size), in batches of the given sizes."""

    start: int
    batch_sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(self.batch_sizes)


def reader_part(start: int, samples: int, steps: int, batch_size: int, worker: int, workers: int) -> Part:
    """The part of `worker` in a rank's positions [start, start + samples), read in `steps` batches.

    Worker w makes batches w, w + workers, …; only the rank's last batch may be short, or empty (size 0) when another
    rank has one more sample.
    """
    sizes = [batch_size] * steps
    sizes[-1] = samples - (steps - 1) * batch_size
    before = sum(sum(sizes[w::workers]) for w in range(worker))
    return Part(start + before, tuple(sizes[worker::workers]))
