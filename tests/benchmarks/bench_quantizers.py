"""Time and peak memory of quantizers on one thread.

    python tests/benchmarks/bench_quantizers.py [search] [training]

search: nearest-code search and eval forward against vector-quantize-pytorch. Both sides get the same vectors and the same
codebook, and are compared by the share of equal ids.
training: forward and backward of IBQ, entropy term included, against the same step written out with whole N x K matrices, as
published, and against VQ and SimVQ, which have no softmax.

Time is the median of alternating calls; peak memory is what one call adds to the resident set of a fresh process.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from tokgen.quantizers.base import Quantizer
from tokgen.quantizers.ibq import IBQ
from tokgen.quantizers.search import nearest
from tokgen.quantizers.simvq import SimVQ
from tokgen.quantizers.vq import VQ

sys.path.insert(0, str(Path(__file__).parents[1] / "quantizers"))
from peak_memory import peak_of

VECTORS, SIZES, DIMS, REPETITIONS = 4096, (8192, 16384, 131072), (8, 256), 3
BATCH, TRAINING_SIZES, TRAINING_DIMS = 1024, (1024, 16384, 131072), (32, 256)


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
    """All rows; takes some minutes and 8 GiB, because the peers do."""
    return [*rows(repetitions), *training_rows(repetitions)]


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


# -- a step of training -----------------------------------------------------------------------------------------------


class WrittenOut(nn.Module):
    """Index backpropagation as published (arXiv 2412.02692, sec. 3.2), the one-hot and soft assignments as N x K matrices."""

    def __init__(self, dim: int, codebook_size: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(codes (n, dim), loss) of z (n, dim)."""
        codebook = self.codebook.weight
        logits = z @ codebook.T
        soft = logits.softmax(-1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(-1, keepdim=True), 1.0)
        codes, rows = (hard - soft.detach() + soft) @ codebook, hard @ codebook
        quantization = (codes - z).square().mean() + (rows.detach() - z).square().mean()
        quantization = quantization + 0.25 * (rows - z.detach()).square().mean()
        p, log_p = (logits / 0.01).softmax(-1), (logits / 0.01).log_softmax(-1)
        mean = p.mean(0)
        entropy = -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
        return codes, quantization + 0.05 * entropy


def trainee(name: str, k: int, d: int) -> tuple[nn.Module, Tensor]:
    """(quantizer in training mode, z (BATCH, d)), both drawn by one seed."""
    torch.manual_seed(0)
    kinds = {"IBQ": IBQ, "written out": WrittenOut, "VQ": VQ, "SimVQ": SimVQ}
    return kinds[name](d, k).train(), torch.randn(BATCH, d, requires_grad=True)


def train_step(module: nn.Module, z: Tensor) -> Tensor:
    """Gradient (n, d) of a step, of losses and of a decoder's wish; the gradients of the codebook are dropped again."""
    out = module(z)
    codes, loss = (out.codes, sum(out.losses.values())) if isinstance(module, Quantizer) else out
    z.grad = None
    (codes.square().mean() + loss).backward()
    module.zero_grad()
    return z.grad


def training_rows(repetitions: int = REPETITIONS) -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    peers = ("written out", "VQ", "SimVQ")
    for d in TRAINING_DIMS:
        for k in TRAINING_SIZES:
            cases = [trainee(name, k, d) for name in ("IBQ", *peers)]
            for module, z in cases:
                train_step(module, z[:64].detach().requires_grad_())  # warm up
            calls = [lambda m=module, z=z: train_step(m, z) for module, z in cases]
            (ours, *times), (gradient, exact, *_) = alternate(*calls, repetitions=repetitions)
            agree = f"gradients agree to {(gradient - exact).abs().max() / exact.abs().max():.0e}"
            del cases, calls
            used, *peaks = (_training_memory(name, k, d) for name in ("IBQ", *peers))
            for name, taken, peak in zip(peers, times, peaks):
                note = agree if name == "written out" else ""
                what = f"IBQ against {name}, K {k}, dim {d}"
                yield _row(f"step of {what}", ours, taken, "ms", f"{BATCH} vectors; {note}".rstrip("; "))
                yield _row(f"memory of {what}", used, peak, "MiB", "")
    torch.set_num_threads(threads)


def _training_memory(name: str, k: int, d: int) -> float:
    setup = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bench_quantizers
module, z = bench_quantizers.trainee({name!r}, {k}, {d})
bench_quantizers.train_step(module, z[:64].detach().requires_grad_())
"""
    return peak_of(setup, "bench_quantizers.train_step(module, z)") / 2**20


def _row(name: str, ours: float, peer: float, unit: str, note: str) -> Row:
    return Row(name=name, ours=ours, peer=peer, ratio=ours / peer, unit=unit, note=note)


if __name__ == "__main__":
    parts = {"search": rows, "training": training_rows}
    print(f"{'':52} {'ours':>10} {'peer':>10} {'ratio':>7}  unit")
    for part in sys.argv[1:] or parts:
        for row in parts[part]():
            print(
                f"{row['name']:52} {row['ours']:10.1f} {row['peer']:10.1f} {row['ratio']:7.3f}  {row['unit']:4} {row['note']}",
                flush=True,
            )
