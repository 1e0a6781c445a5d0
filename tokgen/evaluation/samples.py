"""The pictures or clips that a report is about: which of a shard folder, each once on the union of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.shard_set import ShardSet
from tokgen.errors import DataError
from tokgen.evaluation.protocol import FILTER, Protocol, reference_hash
from tokgen.quantizers.base import world_size


class EvaluationSet(ShardsDataModule):
    """Evenly spaced samples of a folder of image or video shards, as a data module reads them in validation.

    Where there is a default process group, its ranks share the samples.

    Args:
        folder: shards.
        samples: how many of them; None takes all.
        options: those of `ShardsDataModule`.

    Raises:
        DataError, ConfigError: as `ShardsDataModule.setup`; shards of another kind, or fewer samples than asked for.
    """

    def __init__(self, folder: str | os.PathLike[str], samples: int | None = None, **options: Any) -> None:
        super().__init__(test=os.fspath(folder), **options)
        self.folder = os.fspath(folder)
        self.setup("test")
        whole = self.sets["test"]
        if whole.kind not in ("images", "videos"):
            raise DataError(f"{folder} holds {whole.kind}; evaluating needs image or video shards")
        self.wanted = whole.samples if samples is None else samples
        self.sets["test"] = evenly(whole, self.wanted)
        if self.wanted < world_size():
            raise DataError(f"{self.wanted} samples of {folder} are fewer than the {world_size()} ranks; start fewer")
        every = (
            f"every one of {whole.samples}" if self.wanted == whole.samples else f"evenly spaced among {whole.samples}"
        )
        self.selection, self.reference = every, reference_hash(folder)

    def _world(self) -> tuple[int, int]:
        world = world_size()
        return (torch.distributed.get_rank() if world > 1 else 0), world

    def batches(self) -> Iterator[dict[str, Any]]:
        """This rank's batches without the repeats that stand in for bad or missing samples; some may be empty."""
        for batch in self.test_dataloader():
            valid = batch.pop("valid")
            keep = valid.nonzero()[:, 0].tolist()
            yield {
                name: value[valid] if isinstance(value, torch.Tensor) else [value[i] for i in keep]
                for name, value in batch.items()
            }

    def protocol(self, name: str, version: int, samples: int, size: str, **more: Any) -> Protocol:
        """What figures over `samples` of these depend on."""
        scaled = self.resize != "none"
        return Protocol(
            name, version, self.reference, samples, self.selection, size, self.resize, FILTER if scaled else "none", **more
        )  # fmt: skip

    def timing(self) -> dict[str, Any]:
        """For protocols of clips."""
        return {"frames": self.frames, "fps": self.fps, "frame_stride": self.frame_stride} if self.frames else {}


def evenly(shards: ShardSet, samples: int) -> ShardSet:
    """`samples` of a set, evenly spaced in its order: sample i * total // samples. Raises DataError if it has fewer."""
    total = shards.samples
    if not 1 <= samples <= total:
        raise DataError(f"{samples} samples were asked for, and {shards.shards[0].folder} holds {total}")
    if samples == total:
        return shards
    chosen, start, kept = np.arange(samples, dtype=np.int64) * total // samples, 0, []
    for shard in shards.shards:
        here = chosen[(chosen >= start) & (chosen < start + shard.count)] - start
        if len(here):
            kept.append(replace(shard, selected=here if shard.selected is None else shard.selected[here]))
        start += shard.count
    return replace(shards, shards=tuple(kept))
