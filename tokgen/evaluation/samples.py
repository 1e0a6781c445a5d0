"""The pictures, clips or motion maps that a report is about: which of a shard folder, each measured once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.decode import decode_class, decode_json
from tokgen.data.plan import Spans, reader_part
from tokgen.data.shard_set import ShardSet
from tokgen.data.tar import RawSample
from tokgen.errors import DataError
from tokgen.evaluation.protocol import FILTER, Protocol, reference_hash
from tokgen.quantizers.base import world_size

CLASS = "cls"  # the member that holds a class number; a field of this name is it


class EvaluationSet(ShardsDataModule):
    """Evenly spaced samples of a folder of image, video or motion shards, as a data module reads them in validation.

    They come in numbered batches: batch i holds samples [i batch_size, (i + 1) batch_size) of the set's order, whoever reads
    it. So processes can share the batches, and a later run can read those that an earlier one did not.

    Args:
        folder: shards.
        samples: how many of them; None takes all.
        label: also read this field of the samples' JSON (or the class number, "cls"); batches then hold "label", list[str].
        options: those of `ShardsDataModule`.

    Raises:
        DataError, ConfigError: as `ShardsDataModule.setup`; shards of another kind, fewer samples than asked for, or a first
            sample without that field.
    """

    def __init__(
        self, folder: str | os.PathLike[str], samples: int | None = None, label: str | None = None, **options: Any
    ) -> None:
        super().__init__(test=os.fspath(folder), **options)
        self.folder, self.label = os.fspath(folder), label
        self.setup("test")
        self.all = self.sets["test"]
        if self.all.kind not in ("images", "videos", "motion"):
            raise DataError(f"{folder} holds {self.all.kind}; evaluating needs image, video or motion shards")
        self.wanted = self.all.samples if samples is None else samples
        self.chosen = evenly(self.all, self.wanted)
        if self.wanted < world_size():
            raise DataError(f"{self.wanted} samples of {folder} are fewer than the {world_size()} ranks; start fewer")
        total = self.all.samples
        self.selection = f"every one of {total}" if self.wanted == total else f"evenly spaced among {total}"
        self.reference = reference_hash(folder)

    def _world(self) -> tuple[int, int]:
        return 0, 1  # batches are shared by their numbers

    def _samples(self, shards: ShardSet, train: bool) -> Any:
        samples = super()._samples(shards, train)
        return samples if self.label is None else _Labelled(samples, self.label, self.folder)

    @property
    def count(self) -> int:
        """Number of batches."""
        return -(-self.wanted // self.batch_size)

    def batches(self, numbers: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """The batches of these numbers (ascending; None: all), in an arbitrary order, each with its own as "number".

        Damaged samples are left out, without a repeat in their place; a batch may be empty.
        """
        numbers = list(range(self.count) if numbers is None else numbers)
        whole = [n for n in numbers if (n + 1) * self.batch_size <= self.wanted]
        # the short batch apart: several readers would each cut it elsewhere
        for part in (whole, numbers[len(whole) :]):
            if part:
                yield from self._read_batches(part)

    def _read_batches(self, numbers: list[int]) -> Iterator[dict[str, Any]]:
        size, workers = self.batch_size, max(1, self.num_workers)
        positions = [np.arange(n * size, min((n + 1) * size, self.wanted)) for n in numbers]
        self.sets["test"] = at_positions(self.chosen, np.concatenate(positions))
        for turn, batch in enumerate(self.test_dataloader()):
            # worker w makes batches w, w + workers, … of consecutive positions
            whole = Spans([(0, len(numbers) * size)])
            part = reader_part(whole, len(numbers), size, turn % workers, workers)
            valid = batch.pop("valid")
            keep = valid.nonzero()[:, 0].tolist()
            kept = {
                name: value[valid] if isinstance(value, torch.Tensor) else [value[i] for i in keep]
                for name, value in batch.items()
            }
            yield kept | {"number": numbers[part.positions.at(0) // size + turn // workers]}

    def protocol(self, name: str, version: int, samples: int, size: str, **more: Any) -> Protocol:
        """What figures over `samples` of these depend on."""
        if self.all.kind == "motion":
            units = {"filter": "none", "value_range": "maps as stored", "rounding": "none"}
            return Protocol(name, version, self.reference, samples, self.selection, size, "none", **units, **more)
        scaled = self.resize != "none"
        return Protocol(
            name, version, self.reference, samples, self.selection, size, self.resize, FILTER if scaled else "none", **more
        )  # fmt: skip

    def timing(self) -> dict[str, Any]:
        """For protocols of clips."""
        return {"frames": self.frames, "fps": self.fps, "frame_stride": self.frame_stride} if self.frames else {}


@dataclass(frozen=True)
class _Labelled:
    """A sample class that also reads a field of the JSON."""

    samples: Any
    field: str
    folder: str

    @property
    def extensions(self) -> tuple[str, ...]:
        return (*self.samples.extensions, "json", CLASS)

    def __call__(self, raw: RawSample, rng: Any) -> dict[str, Any]:
        return {**self.samples(raw, rng), "label": self._label(raw)}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self.samples.collate(items), "label": [item["label"] for item in items]}

    def _label(self, raw: RawSample) -> str:
        fields = decode_json(raw.members["json"]) if "json" in raw.members else {}
        if CLASS in raw.members:
            fields[CLASS] = decode_class(raw.members[CLASS])
        usable = sorted(name for name, value in fields.items() if isinstance(value, (str, int)))
        if self.field not in usable:
            raise DataError(
                f"sample {raw.key} of {self.folder} has no field {self.field!r} that names a class; its fields of text or whole "
                f"numbers are {', '.join(usable) or 'none'}"
            )
        return str(fields[self.field])


def evenly(shards: ShardSet, samples: int) -> ShardSet:
    """`samples` of a set, evenly spaced in its order: sample i * total // samples. Raises DataError if it has fewer."""
    total = shards.samples
    if not 1 <= samples <= total:
        raise DataError(f"{samples} samples were asked for, and {shards.shards[0].folder} holds {total}")
    return at_positions(shards, np.arange(samples, dtype=np.int64) * total // samples)


def at_positions(shards: ShardSet, positions: np.ndarray) -> ShardSet:
    """The samples of a set at these positions of its order, int64 (n,), ascending and each once."""
    if len(positions) == shards.samples:
        return shards
    start, kept = 0, []
    for shard in shards.shards:
        here = positions[(positions >= start) & (positions < start + shard.count)] - start
        if len(here):
            kept.append(replace(shard, selected=here if shard.selected is None else shard.selected[here]))
        start += shard.count
    return replace(shards, shards=tuple(kept))
