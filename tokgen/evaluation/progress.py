"""Measuring in parts: batches shared among processes, and what was measured kept where a process may be lost.

A set is cut into numbered batches (`EvaluationSet.batches`), whatever the number of processes. Each process counts its batches into
`Sums` and now and then writes them to a file of its own, with the numbers of the batches they cover. A later run takes the files
of the same model and protocol, measures the batches that none of them covers, and adds all up. Rank 0 does that, so that a
process may have nothing left to do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokgen.evaluation.metrics import below, within
from tokgen.evaluation.samples import EvaluationSet
from tokgen.pretrained import write_safetensors
from tokgen.quantizers.base import world_size

log = logging.getLogger(__name__)
FORMAT = "tokgen-partial-1"
PARTIAL = "partial"  # the folder within a report's, while it is being measured


class Facts:
    """Distinct plain values by name, in the order in which they came."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}

    def add(self, name: str, value: Any) -> None:
        kept = self.values.setdefault(name, [])
        if value not in kept:
            kept.append(value)

    def __getitem__(self, name: str) -> list[Any]:
        return self.values.get(name, [])

    def state(self) -> dict[str, Tensor]:
        return {"json": torch.frombuffer(bytearray(json.dumps(self.values).encode()), dtype=torch.uint8)}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        for name, values in json.loads(bytes(state["json"].tolist())).items():
            for value in values:
                self.add(name, value)


class Pictures:
    """What the first batches show: lists of pictures, uint8, by the batch's number."""

    def __init__(self) -> None:
        self.of: dict[int, list[Tensor]] = {}

    def add(self, number: int, *pictures: Tensor) -> None:
        self.of[number] = list(pictures)

    def state(self) -> dict[str, Tensor]:
        return {f"{number}.{i}": x for number, several in self.of.items() for i, x in enumerate(several)}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        for number in {int(name.partition(".")[0]) for name in state}:
            several = within(state, str(number))
            self.of[number] = [several[str(i)] for i in range(len(several))]

    def result(self) -> list[list[Tensor]]:
        """In the order of the batches."""
        return [self.of[number] for number in sorted(self.of)]


class Sums:
    """Measures by name, as attributes, each with `state` and `merge`; together they have both too."""

    def __init__(self, **measures: Any) -> None:
        self.measures = measures

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["measures"][name]
        except KeyError:
            raise AttributeError(name) from None

    def state(self) -> dict[str, Tensor]:
        return {name: x for key, m in self.measures.items() for name, x in below(key, m.state()).items()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        for key, measure in self.measures.items():
            if own := within(state, key):
                measure.merge(own)


class Progress:
    """What of a set this process measures, and what is kept of it.

    Args:
        data: the set.
        sums: what this process counts its batches into.
        identity: plain data on which the sums depend: the model, its settings, the protocol.
        folder: for the files, on a disk that all processes see; None keeps none, and takes up none.
        minutes: of measuring between two writes; a write after the last batch comes in any case.
    """

    def __init__(
        self,
        data: EvaluationSet,
        sums: Sums,
        identity: dict[str, Any],
        folder: Path | None = None,
        minutes: float = 5.0,
    ) -> None:
        self.data, self.sums, self.folder, self.seconds = data, sums, folder, 60 * minutes
        self.identity = json.loads(json.dumps({**identity, "batches": data.count, "batch_size": data.batch_size}))
        self.rank = torch.distributed.get_rank() if world_size() > 1 else 0
        self.taken: list[Path] = []  # files of earlier runs, on rank 0
        self.done: list[int] = []
        self.name = f"{uuid.uuid4().hex[:12]}.safetensors"
        covered = self._take_up() if self.rank == 0 else torch.zeros(data.count, dtype=torch.uint8)
        if world_size() > 1:
            torch.distributed.broadcast(covered, 0)
        left = (covered == 0).nonzero()[:, 0].tolist()
        self.left = left[self.rank * len(left) // world_size() : (self.rank + 1) * len(left) // world_size()]

    def _take_up(self) -> Tensor:
        """Choose the files of earlier runs to add up; which batches they cover, uint8 (batches,)."""
        covered = torch.zeros(self.data.count, dtype=torch.uint8)
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            identity, batches = _about(path)
            if not identity:
                continue  # it cannot be read
            unlike = sorted(n for n in self.identity if identity.get(n) != self.identity[n])
            if unlike:
                log.warning("%s is not taken up: it is of another %s.", path, ", ".join(unlike))
            elif bool(covered[batches].any()):
                log.warning("%s is not taken up: what it measured, another file has measured too.", path)
            else:
                covered[batches] = 1
                self.taken.append(path)
        if self.taken:
            log.warning(
                "%d of %d batches were measured before and are taken up from %s.",
                int(covered.sum()), self.data.count, self.folder,
            )  # fmt: skip
        return covered

    def batches(self) -> Iterator[dict[str, Any]]:
        """This process's batches that hold samples. One counts as measured when the next is asked for."""
        saved = time.monotonic()
        for batch in self.data.batches(self.left):
            if batch["key"]:
                yield batch
            self.done.append(batch["number"])
            if self.folder and time.monotonic() - saved >= self.seconds:
                self._save()
                saved = time.monotonic()
        if self.folder and self.done:
            self._save()

    def _save(self) -> None:
        about = {"format": FORMAT, "identity": json.dumps(self.identity), "batches": json.dumps(self.done)}
        write_safetensors(self.sums.state(), self.folder / self.name, about)

    def collect(self) -> bool:
        """Add up on rank 0 what all processes and earlier runs have measured; whether this is rank 0."""
        from safetensors.torch import load, load_file, save

        if self.rank:
            # the format takes no views
            state = {name: x.contiguous().clone() for name, x in self.sums.state().items()}
            blob = torch.frombuffer(bytearray(save(state)), dtype=torch.uint8)
            torch.distributed.send(torch.tensor([len(blob)]), 0)
            torch.distributed.send(blob, 0)
            return False
        for path in self.taken:
            self.sums.merge(load_file(path))
        for rank in range(1, world_size()):
            size = torch.zeros(1, dtype=torch.int64)
            torch.distributed.recv(size, rank)
            blob = torch.empty(int(size), dtype=torch.uint8)
            torch.distributed.recv(blob, rank)
            self.sums.merge(load(blob.numpy().tobytes()))
        return True


def _about(path: Path) -> tuple[dict[str, Any], list[int]]:
    """Identity and batches of a partial file; neither of one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, not {FORMAT}")
        return json.loads(about["identity"]), json.loads(about["batches"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        log.warning("%s cannot be read (%s: %s).", path, type(error).__name__, error)
        return {}, []


def clear(folder: str | os.PathLike[str]) -> None:
    """Remove the partial files of a report that is whole."""
    for path in Path(folder).glob("*.safetensors*"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(folder).rmdir()
