"""Nearest-code search and eval forward against vector-quantize-pytorch: time and peak memory on one thread.

    python tests/benchmarks/bench_quantizers.py

Both sides get the same vectors and the same codebook, and are compared by the share of equal ids. Time is the
median of alternating calls; peak memory is what one call adds to the resident set of a fresh process.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from tokgen.quantizers.search import nearest
from tokgen.quantizers.vq import VQ

sys.path.insert(0, str(Path(__file__).parents[1] / "quantizers"))
from peak_memory import peak_of

VECTORS, SIZES, DIMS, REPETITIONS = 4096, (8192, 16384, 131072), (8, 256), 3


class Row(TypedDict):
    """One line of the table: `ratio` is ours / peer, below 1 where ours is better."""

    name: str
    ours: float
    peer: float
    ratio: float
    unit: str
    note: str


def build(k: int, d: int) -> tuple[Tensor, VQ, VectorQuantize]:
    """(z (1, VECTORS, d), our quantizer, theirs) with one codebook, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(1, VECTORS, d, generator=generator), torch.randn(k, d, generator=generator)
    ours, theirs = VQ(d, k).eval(), VectorQuantize(dim=d, codebook_size=k).eval()
    with torch.no_grad():
        ours.codebook.weight.copy_(codebook)
        theirs._codebook.embed.copy_(codebook[None])
    return z, ours, theirs


def alternate(*calls: Callable[[], Any], repetitions: int) -> tuple[list[float], list[Any]]:
    """(median milliseconds, last result) of each call, taken in turns so that other load hits all alike.

    Processor time: on one thread it is wall-clock time without what other programs take.
    """
    times: list[list[float]] = [[] for _ in calls]
    results = [None] * len(calls)
    for _ in range(repetitions):
        for i, call in enumerate(calls):
            start = time.process_time()
            results[i] = call()
            times[i].append(1e3 * (time.process_time() - start))
    return [statistics.median(taken) for taken in times], results


def run(repetitions: int = REPETITIONS) -> list[Row]:
    """All rows; takes some minutes and 8 GiB, because the peer does."""
    return list(rows(repetitions))


@torch.no_grad()
def rows(repetitions: int = REPETITIONS) -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for d in DIMS:
        for k in SIZES:
            z, ours, theirs = build(k, d)
            flat, codebook = z[0], ours.codebook.weight
            nearest(flat[:64], codebook), ours(z[:, :64]), theirs(z[:, :64])  # warm up
            (search, forward, peer), (_, out, (_, ids, _)) = alternate(
                lambda f=flat, c=codebook: nearest(f, c),
                lambda q=ours, z=z: q(z),
                lambda q=theirs, z=z: q(z),
                repetitions=repetitions,
            )
            note = f"{VECTORS} vectors; {100 * (out.ids == ids).float().mean().item():.2f} % same ids"
            yield _row(f"search, K {k}, dim {d}", search, peer, "ms", note)
            yield _row(f"eval forward, K {k}, dim {d}", forward, peer, "ms", note)
            yield _row(f"peak memory, K {k}, dim {d}", *(_memory(k, d, i) for i in (1, 2)), "MiB", "of eval forward")
    torch.set_num_threads(threads)


def _memory(k: int, d: int, which: int) -> float:
    setup = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bench_quantizers
parts = bench_quantizers.build({k}, {d})
z, quantizer = parts[0], parts[{which}]
torch.set_grad_enabled(False)
quantizer(z[:, :64])
"""
    return peak_of(setup, "quantizer(z)") / 2**20


def _row(name: str, ours: float, peer: float, unit: str, note: str) -> Row:
    return Row(name=name, ours=ours, peer=peer, ratio=ours / peer, unit=unit, note=note)


if __name__ == "__main__":
    print(f"{'':36} {'ours':>10} {'vector-q-p':>10} {'ratio':>7}  unit")
    for row in rows():
        print(
            f"{row['name']:36} {row['ours']:10.1f} {row['peer']:10.1f} {row['ratio']:7.3f}  {row['unit']:4} {row['note']}",
            flush=True,
        )
