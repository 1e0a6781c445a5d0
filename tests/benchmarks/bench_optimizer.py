"""What a training step has beside forward and backward: fused AdamW, which the recipes ask for, against PyTorch's default, Muon
against PyTorch's own, and the guard against the whole step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from tests.training import tiny
from tokgen.training.guard import Guard
from tokgen.training.muon import Muon

ROUNDS = 7
MATRICES = [(256, 256)] * 16 + [(704, 256)] * 8 + [(256, 704)] * 4  # four blocks of width 256


def run() -> list[dict]:
    """Milliseconds of one step on one thread; medians of alternating rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [
        _row(
            "AdamW step",
            [(512, 512)] * 80,
            lambda p: AdamW(p, fused=True),
            AdamW,
            "peer: AdamW(...) as PyTorch chooses",
        ),
        _row(
            "Muon step",
            MATRICES,
            Muon,
            torch.optim.Muon,
            "peer: PyTorch's; both in bfloat16 where the CPU multiplies it, else ours in float32",
        ),
        _guard(),
    ]
    torch.set_num_threads(threads)
    return rows


def _row(name: str, shapes: list[tuple[int, int]], ours: Callable, peer: Callable, note: str) -> dict:
    optimizers, times = [], ([], [])
    for make in (ours, peer):
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizers.append(make(parameters))
        optimizers[-1].step()
    for _ in range(ROUNDS):
        for optimizer, taken in zip(optimizers, times):
            started = time.perf_counter()
            optimizer.step()
            taken.append(1000 * (time.perf_counter() - started))
    one, other = map(statistics.median, times)
    note = f"{sum(a * b for a, b in shapes) / 1e6:.0f} M parameters; {note}; lower is better"
    return {"name": name, "ours": one, "peer": other, "ratio": one / other, "unit": "ms", "note": note}


class _Timed(Guard):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.hooks, self.last = [], [], 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        started = time.perf_counter()
        super().on_train_batch_end(*args)
        ended = time.perf_counter()
        self.hooks.append(1000 * (ended - started))
        self.steps.append(1000 * (ended - self.last))
        self.last = ended


def _guard() -> dict:
    """The guard within a run of a very small tokenizer and discriminator, whose steps are as short as any."""
    with tempfile.TemporaryDirectory() as folder:
        images, guard = Path(folder, "images"), _Timed()
        for split in ("train", "val"):
            tiny.write_images(images / split, 48, 0)
        tiny.trainer(Path(folder, "run"), guard, max_steps=200).fit(tiny.autoencoder(), datamodule=tiny.shards(images))
    hook, step = statistics.median(guard.hooks), statistics.median(guard.steps)
    note = f"{len(guard.tracks)} losses; peer: the whole step of a tokenizer for pictures of {tiny.SIZE} px"
    return {"name": "Guard, a step", "ours": hook, "peer": step, "ratio": hook / step, "unit": "ms", "note": note}


if __name__ == "__main__":
    print(run())
