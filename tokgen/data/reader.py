"""Samples of a reader's part by their ordinals, from shards that are read forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tokgen.data.plan import Run
from tokgen.data.shard_set import ShardSet
from tokgen.data.tar import Damage, RawSample, Unreadable, read_samples

MISSING = "missing: "  # how the problem of a sample begins that its manifest lists and its shard does not hold


class PartReader:
    """Fetches a part's samples by their ordinal, reading shards forward and keeping what is asked for later.

    Args:
        runs: where the part's samples lie, in order.
        held, first: the ordinals below `first` that are still needed; all from `first` on are.
    """

    def __init__(self, shards: ShardSet, runs: Sequence[Run], held: Sequence[int], first: int, options: dict[str, Any]):
        self.shards, self.runs, self.options = shards, runs, options
        self._starts = [0]
        for run in runs:
            self._starts.append(self._starts[-1] + run.high - run.low)
        self._needed, self._first = set(held), first
        self._forward = self._read(lambda o: o >= first or o in self._needed)
        self._kept: dict[int, tuple[RawSample, str]] = {}

    def take(self, ordinal: int) -> tuple[RawSample, str]:
        """(sample, shard name), for the last time."""
        self.look(ordinal)
        return self._kept.pop(ordinal)

    def look(self, ordinal: int) -> tuple[RawSample, str]:
        """As `take`, for samples that will be taken later."""
        while ordinal not in self._kept:
            found, sample, name = next(self._forward)
            self._kept[found] = (sample, name)
        return self._kept[ordinal]

    def again(self, ordinal: int) -> tuple[RawSample, str]:
        """A sample that was taken before: reads its shard anew."""
        _, sample, name = next(self._read(lambda o: o == ordinal))
        return sample, name

    def _read(self, needed: Any) -> Iterator[tuple[int, RawSample, str]]:
        number = 0
        while number < len(self.runs):
            first, shard = number, self.shards.shards[self.runs[number].shard]
            ordinals: dict[int, int] = {}  # index in the shard -> ordinal
            # what is left of a begun epoch may be many runs of one shard, which is read once
            while number < len(self.runs) and (number == first or self._follows(number)):
                run, start = self.runs[number], self._starts[number]
                within = range(run.low, run.high)
                indices = within if shard.selected is None else shard.selected[run.low : run.high].tolist()
                ordinals |= {index: start + i for i, index in enumerate(indices) if needed(start + i)}
                number += 1
            if ordinals:
                yield from self._read_shard(shard, ordinals)

    def _follows(self, number: int) -> bool:
        """Whether a run lies behind the one before it in the same shard."""
        before, run = self.runs[number - 1], self.runs[number]
        return before.shard == run.shard and before.high <= run.low

    def _read_shard(self, shard: Any, ordinals: dict[int, int]) -> Iterator[tuple[int, RawSample, str]]:
        last = max(ordinals)
        damage = Damage()
        options = {"wanted": lambda index: index in ordinals, "damage": damage, **self.options}
        try:
            for index, sample in read_samples(shard.location, self.shards.allow_shell_urls, **options):
                if index in ordinals:
                    yield ordinals.pop(index), sample, shard.location
                if index >= last:
                    break
        except Unreadable as error:  # what was read before it is used
            damage.add(str(error))
        for ordinal in ordinals.values():  # listed in the manifest, not found in the shard
            yield ordinal, RawSample("", problem=MISSING + ", ".join(damage.notes)), shard.location
