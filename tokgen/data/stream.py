"""Streaming shards into batches: equal steps on every rank, another order each epoch, exact resume from two numbers.

Everything about an epoch except the bytes follows from the manifests: which samples, in which order, in which batch of
which reader. That plan is laid out as positions of one endless global sequence, the passes over the data set:

1. pass p is a permutation of the shards drawn from (seed, p), started at a drawn sample, one position per sample;
2. an epoch is a range of positions (a pass without its remainder, or the next `steps_per_epoch` batches), cut into
   equal parts for the ranks, and each rank's part into whole batches for its workers. The cuts fall inside shards
   where they must, so one shard serves any number of readers;
3. each reader emits its positions as a shuffle buffer with its own generator (seed, epoch, rank, worker) would;
4. a sample's augmentations come from a generator of (seed, position).

So the state is (epoch, batches done), equal on all ranks. Resuming replays step 3 on integers: no file is opened for
samples that are already done, nothing is decoded. Where ranks, readers, batch size or buffer are not those of before, the
positions that no batch has held yet are shared anew, as in steps 2 and 3: each still comes once.

A sample that cannot be read keeps its place in the plan: it is counted, and the next readable sample of the reader's order
after that batch stands in for it, which depends on the plan and the data only.

Rank and world size are arguments; nothing is read from the environment, so it does not matter how workers are started.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tokgen.data.decode import EXTENSIONS, MAX_MEMBER_BYTES, BadSample
from tokgen.data.plan import BufferOrder, Epochs, Part, Passes, Spans, reader_part
from tokgen.data.reader import MISSING, PartReader
from tokgen.data.shard_set import ShardSet, some
from tokgen.data.tar import RawSample
from tokgen.errors import DataError

log = logging.getLogger(__name__)

_ALWAYS_TOLERATED = 3  # bad samples per epoch that never stop a run, so that one odd file does not end a tiny data set
_MISSING_LIMIT = 0.5  # part of an epoch that may be missing from damaged shards


# --------------------------------------------------------------------------------------------------------- the stream


class ShardStream(IterableDataset):
    """Batches of one rank, made by this process or by DataLoader workers. Use it through `ShardLoader`.

    Each batch is a dict of what the sample class collates, and "_report": what was read, bad and missing for it.
    """

    def __init__(
        self,
        shards: ShardSet,
        samples: Any,
        *,
        batch_size: int,
        steps: int,
        rank: int,
        world: int,
        readers: int,
        seed: int,
        train: bool,
        shuffle_buffer: int,
        contiguous: bool,
        max_member_bytes: int,
    ):
        self.shards, self.samples = shards, samples
        self.batch_size, self.steps, self.rank, self.world = batch_size, steps, rank, world
        self.seed, self.train, self.shuffle_buffer = seed, train, shuffle_buffer
        conditions = {
            "world": world, "readers": max(1, readers), "steps": steps, "batch_size": batch_size, "shuffle_buffer": shuffle_buffer,
        }  # fmt: skip
        self.epochs = Epochs(shards.samples, seed, contiguous, conditions)
        self.options = {"extensions": frozenset(samples.extensions) & EXTENSIONS, "max_member_bytes": max_member_bytes}
        self.position = torch.zeros(2, dtype=torch.int64).share_memory_()  # (epoch, batches done), seen by live workers

    def part(self, epoch: int, worker: int, workers: int) -> Part:
        """The positions and batch sizes of one reader in an epoch."""
        if self.train:
            return self.epochs.cut(epoch).part(self.rank, worker)
        total = self.shards.samples
        low, high = self.rank * total // self.world, (self.rank + 1) * total // self.world
        return reader_part(Spans([(low, high)]), self.steps, self.batch_size, worker, workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, done = self.position.tolist()
        # A DataLoader asks its workers in turn from worker 0 on, also when it starts in the middle of an epoch.
        worker = (worker + done) % workers
        try:
            yield from self._batches(epoch, worker, workers, skip=len(range(worker, done, workers)))
        except DataError as error:  # DataLoader would wrap it in a worker's traceback
            yield {"_error": str(error)}

    def _batches(self, epoch: int, worker: int, workers: int, skip: int) -> Iterator[dict[str, Any]]:
        part = self.part(epoch, worker, workers)
        passes = Passes([s.count for s in self.shards.shards], self.seed, self.train)
        runs = [run for low, high in part.positions.ranges for run in passes.runs(low, high - low)]

        def fresh_order() -> BufferOrder:
            if self.train:
                return self.epochs.cut(epoch).order(self.rank, worker, part.size)
            return BufferOrder(part.size, 1, random.Random(0))

        order = fresh_order()
        for _ in range(sum(part.batch_sizes[:skip])):
            next(order)
        reader = PartReader(self.shards, runs, order.held, order.next, self.options)
        ahead: deque[int] = deque()  # ordinals that were looked at before their turn
        for size in part.batch_sizes[skip:]:
            ordinals = [ahead.popleft() if ahead else next(order) for _ in range(size)]
            report: dict[str, Any] = {"read": 0, "bad": [], "missing": {}}
            items: list[Any] = []
            bad_rows = []
            for row, ordinal in enumerate(ordinals):
                raw, where = reader.take(ordinal)
                item, reason, detail = self._decode(raw, part.positions.at(ordinal))
                items.append(item)
                if item is not None:
                    report["read"] += 1
                    continue
                bad_rows.append(row)
                if reason == "missing":
                    count, _ = report["missing"].get(where, (0, ""))
                    report["missing"][where] = (count + 1, detail)
                else:
                    report["bad"].append((reason, f"{raw.key} in {where}"))
            if bad_rows:
                spare = self._stand_ins(reader, order, ahead, fresh_order)
                for row in bad_rows:
                    items[row] = self._first_good(spare, part.positions.at(ordinals[row]))
            if not items:  # another rank has one more sample: a repeat, flagged, keeps the number of steps equal
                items = [self._padding()]
            batch = self.samples.collate(items)
            if not self.train:
                batch["valid"] = torch.ones(len(items), dtype=torch.bool)
                batch["valid"][bad_rows if size else 0] = False
            batch["_report"] = report
            yield batch

    def _decode(self, raw: RawSample, position: int) -> tuple[Any, str, str]:
        """(item, "", "") or (None, reason, detail)."""
        if raw.problem is not None:
            if raw.problem.startswith(MISSING):
                return None, "missing", raw.problem[len(MISSING) :]
            return None, raw.problem, ""
        try:
            return self.samples(raw, random.Random(f"{self.seed}/sample/{position}")), "", ""
        except BadSample as error:
            return None, error.reason, str(error)

    def _stand_ins(
        self, reader: PartReader, order: BufferOrder, ahead: deque[int], fresh_order: Any
    ) -> Iterator[RawSample]:
        """Samples of the reader's order after the current batch, then from its beginning."""
        index = 0
        while True:
            if index == len(ahead):
                ordinal = next(order, None)
                if ordinal is None:
                    break
                ahead.append(ordinal)
            yield reader.look(ahead[index])[0]
            index += 1
        for ordinal in fresh_order():
            yield reader.again(ordinal)[0]

    def _first_good(self, spare: Iterator[RawSample], position: int) -> Any:
        for raw in spare:
            item, _, _ = self._decode(raw, position)
            if item is not None:
                return item
        raise DataError(
            f"No readable sample is left to stand in for the damaged ones of {some([s.location for s in self.shards.shards])}; "
            f"`tokgen.data.verify` says what is wrong with a shard folder."
        )

    def _padding(self) -> Any:
        passes = Passes([s.count for s in self.shards.shards], self.seed, shuffle=False)
        reader = PartReader(self.shards, passes.runs(0, passes.total), [], 0, self.options)
        return self._first_good((reader.take(o)[0] for o in range(passes.total)), 0)


# --------------------------------------------------------------------------------------------------------- the loader


@dataclass
class LoaderStats:
    """What a loader has read on this rank since it was made.

    Attributes:
        read: samples delivered in their own place.
        skipped: bad samples by reason ("empty caption", "unreadable image", "cut off", …).
        missing: samples that manifests list and shards do not hold.
        examples: for each reason, the first few samples.
        damaged: shard -> what was wrong with it.
    """

    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    missing: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        return sum(self.skipped.values())

    def add(self, report: Mapping[str, Any]) -> None:
        """Take in the report of one batch; log each reason and each damaged shard the first time."""
        self.read += report["read"]
        for reason, name in report["bad"]:
            if reason not in self.skipped:
                log.warning("Skipped a sample: %s (%s). Others like it are counted, not logged.", reason, name)
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
            examples = self.examples.setdefault(reason, [])
            if len(examples) < 5 and name not in examples:
                examples.append(name)
        for shard, (count, detail) in report["missing"].items():
            if shard not in self.damaged:
                self.damaged[shard] = detail or "ends early"
                log.warning("%s holds fewer samples than its manifest lists (%s).", shard, self.damaged[shard])
            self.missing += count

    def as_dict(self) -> dict[str, int]:
        """Flat counts for a logger: read, missing, skipped, and skipped/REASON."""
        each = {f"skipped/{reason.replace(' ', '_')}": count for reason, count in sorted(self.skipped.items())}
        return {"read": self.read, "missing": self.missing, "skipped": self.bad, **each}

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        return (
            f"{self.read} samples read, {self.bad} skipped{f' ({reasons})' if reasons else ''}, {self.missing} missing"
        )


class ShardLoader:
    """Batches of one rank; sized, and stateful in the sense of Lightning (`state_dict`, `load_state_dict`).

    Iterating runs to the end of the epoch: from its beginning, or from where `load_state_dict` put it. An iteration that
    was abandoned is followed by the rest of its epoch, so that a trainer which cuts epochs short, or counts them in its
    own way, loses no batch. With `train=False` each iteration is the same: all samples in order.

    Args:
        shards: the data set.
        samples: an instance of `ImageSamples`, `CodeSamples`, `ClipSamples`, `VideoSamples` or `MotionSamples`.
        batch_size: samples per batch on each rank.
        rank, world: this process among all.
        num_workers: reader processes; 0 reads in this one. The order of samples depends on it.
        seed: orders and augmentations follow from it.
        train: shuffle and repeat. Otherwise every sample comes exactly once on the union of ranks, the last batch may be
            short, and batches carry "valid" (bool (B,)): False for a repeat that stands in for a bad sample, or that
            keeps the number of steps equal on all ranks.
        shuffle_buffer: samples (undecoded) that each reader draws from.
        steps_per_epoch: batches per epoch on each rank; None: floor(samples / (world · batch_size)). With a number,
            epochs follow each other through the passes, so that none is favoured.
        max_bad_fraction: DataError when more than this part of a rank's epoch is bad (three samples are always
            tolerated, except with 0). Samples missing from damaged shards are counted apart; they end the run when they
            are more than half.
        max_member_bytes: larger members make their sample bad.
        pin_memory, multiprocessing_context: as in torch's DataLoader.

    Raises:
        DataError: fewer samples than one batch on every rank; while iterating: too many bad or missing samples, none that can be read.
    """

    def __init__(
        self,
        shards: ShardSet,
        samples: Any,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        train: bool = True,
        shuffle_buffer: int = 1000,
        steps_per_epoch: int | None = None,
        max_bad_fraction: float = 0.01,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        pin_memory: bool = False,
        multiprocessing_context: str | None = None,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("shuffle_buffer", shuffle_buffer, 0),
            ("steps_per_epoch", 1 if steps_per_epoch is None else steps_per_epoch, 1),
            ("max_member_bytes", max_member_bytes, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in 0 … {world - 1}.")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is a part of the samples, in [0, 1], not {max_bad_fraction}.")
        total = shards.samples
        if train:
            steps = steps_per_epoch or total // (world * batch_size)
            if total < world * batch_size:
                readers = f" on each of {world} ranks" if world > 1 else ""
                raise DataError(
                    f"{some([s.location for s in shards.shards], 1)}: {total} samples do not fill one batch of {batch_size}{readers}; "
                    f"use batch_size {max(1, total // world)} or less."
                )
        else:
            most = -(-total // world)  # samples of the fullest rank
            steps = -(-most // batch_size)
        self.steps, self.num_workers, self.train = steps, num_workers, train
        self.max_bad_fraction = max_bad_fraction
        self.stats = LoaderStats(missing=shards.unreadable if rank == 0 else 0)
        self.stream = ShardStream(
            shards, samples, batch_size=batch_size, steps=steps, rank=rank, world=world, readers=num_workers, seed=seed, train=train,
            shuffle_buffer=shuffle_buffer, contiguous=steps_per_epoch is not None, max_member_bytes=max_member_bytes,
        )  # fmt: skip
        readers = max(1, num_workers)
        self._planned = sum(self.stream.part(0, w, readers).size for w in range(readers))  # an epoch's, on this rank
        self.epoch, self.batch = 0, 0
        self._epoch_bad = self._epoch_missing = 0
        self._news = logging.NOTSET, ""  # of what was resumed, for the log
        self._batches = self.stream
        if num_workers:
            self._batches = DataLoader(
                self.stream, batch_size=None, num_workers=num_workers, persistent_workers=True, pin_memory=pin_memory,
                multiprocessing_context=multiprocessing_context,
                generator=torch.Generator(),  # else each epoch would draw from the global one
            )  # fmt: skip

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Lightning does not come back after the last batch, so all bookkeeping happens before a batch is handed out.
        if not self.train:
            self.epoch = self.batch = 0
        if self._news[1]:
            log.log(*self._news)
            self._news = logging.NOTSET, ""
        self._epoch_bad = self._epoch_missing = 0
        self.stream.position.copy_(torch.tensor([self.epoch, self.batch]))
        for batch in self._batches:
            if "_error" in batch:
                raise DataError(batch["_error"])
            self._account(batch.pop("_report"))
            self.batch += 1
            last = self.left == 0
            if last:
                self.epoch, self.batch = self.epoch + 1, 0
                if self._epoch_bad or self._epoch_missing:
                    log.warning("Data so far: %s.", self.stats)
            yield batch
            if last:
                return

    def _account(self, report: Mapping[str, Any]) -> None:
        self.stats.add(report)
        self._epoch_bad += len(report["bad"])
        self._epoch_missing += sum(count for count, _ in report["missing"].values())
        planned = self._planned
        allowed = max(_ALWAYS_TOLERATED, self.max_bad_fraction * planned) if self.max_bad_fraction else 0
        if self._epoch_bad > allowed:
            worst = max(self.stats.skipped, key=self.stats.skipped.get)
            raise DataError(
                f"{self._epoch_bad} bad samples in this epoch's {planned} are more than max_bad_fraction="
                f"{self.max_bad_fraction} allows: {self.stats}. Most are {worst!r}, such as {self.stats.examples[worst][0]}. "
                f"Pack the data set anew, or raise max_bad_fraction."
            )
        if self._epoch_missing > _MISSING_LIMIT * planned:
            raise DataError(
                f"{self._epoch_missing} of this epoch's {planned} samples are missing from damaged shards "
                f"({some([f'{shard}: {what}' for shard, what in self.stats.damaged.items()])}). Copy or pack them again."
            )

    @property
    def left(self) -> int:
        """Batches that are left of this epoch."""
        return (self.stream.epochs.cut(self.epoch).steps if self.train else self.steps) - self.batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from; equal on all ranks."""
        epochs = self.stream.epochs
        begun = epochs.begun is not None and epochs.begun[0] == self.epoch
        place = {"epoch": self.epoch, "batch": self.batch, "start": epochs.start(self.epoch)}
        return {**place, "before": list(epochs.before) if begun else [], **self._conditions()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, without losing or repeating a sample.

        Ranks, readers, batch size and shuffle buffer may differ: what no batch has held yet is then shared anew, and "batch"
        counts from there. With another data set, seed, or way of counting epochs, the place is kept as a number of batches; when
        the loader is iterated, a warning says what differs.
        """
        epochs, changed = self.stream.epochs, self.changed(state)
        said = "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in changed.items())
        state = {**self._conditions(), **state}
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self.close()  # readers that have begun know another layout
        if not changed.keys() <= set(Epochs.SHARING):
            self._news = logging.WARNING, f"The data position cannot be resumed exactly: {said}."
            if self.batch >= self.steps:
                self.epoch, self.batch = self.epoch + 1, 0
            return
        was = {name: int(state[name]) for name in Epochs.SHARING}
        of_old = self.epoch * (was["steps"] * was["batch_size"] * was["world"] if epochs.contiguous else epochs.total)
        before = [dict(each) for each in state.get("before", ())]
        if changed and self.batch:
            before.append({**was, "batches": self.batch})
            self.batch = 0
            self._news = logging.INFO, f"What is left of the epoch is shared anew: {said}."
        if not epochs.go_on(self.epoch, int(state.get("start", of_old)), before):
            self.epoch, self.batch = self.epoch + 1, 0

    def changed(self, state: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """What differs between the conditions of a state and those of this loader: name -> (there, here)."""
        return {k: (state[k], now) for k, now in self._conditions().items() if state.get(k, now) != now}

    def _conditions(self) -> dict[str, int]:
        stream = self.stream
        return {
            "samples": stream.shards.samples, "seed": stream.seed, "contiguous": int(stream.epochs.contiguous),
            **stream.epochs.conditions,
        }  # fmt: skip

    def close(self) -> None:
        """Stop the reader processes; the loader can still be iterated, which starts them again."""
        iterator = getattr(self._batches, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._batches._iterator = None
