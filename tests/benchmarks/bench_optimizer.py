"""The optimizer steps: fused AdamW, which the recipes ask for, against PyTorch's default; Muon against PyTorch's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.optim import AdamW

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
        _row("Muon step", MATRICES, Muon, torch.optim.Muon, "float32 on CPUs; peer: PyTorch's, bfloat16 everywhere"),
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


if __name__ == "__main__":
    print(run())
