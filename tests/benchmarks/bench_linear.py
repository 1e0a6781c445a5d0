"""The two rows of a guided decoding step through `tokgen.nn.linear.linear` and through `F.linear`, at LlamaGen-B's shapes.

    OMP_NUM_THREADS=2 python tests/benchmarks/bench_linear.py

Each call has other weights, so that they come from memory as in a decoding step; medians of alternating rounds.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from tokgen.nn.linear import linear

SHAPES = {"wqkv": (2304, 768), "w1": (2048, 768), "w2": (768, 2048), "head": (16_384, 768)}
ROUNDS, BYTES = 7, 250_000_000


def run() -> list[dict]:
    rows = []
    for name, (n, k) in SHAPES.items():
        weights = [torch.randn(n, k) for _ in range(BYTES // (4 * n * k))]
        x = torch.randn(2, 1, k)
        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        with torch.no_grad():
            for turn in range(ROUNDS + 1):  # the first warms up
                for side, function in (("ours", linear), ("peer", F.linear)):
                    started = time.perf_counter()
                    for weight in weights:
                        function(x, weight)
                    if turn:
                        seconds[side].append((time.perf_counter() - started) / len(weights))
        ours, peer = (1e3 * statistics.median(seconds[side]) for side in ("ours", "peer"))
        note = f"{4 * n * k / ours / 1e6:.1f} GB/s of weights; peer: F.linear"
        rows.append(
            {
                "name": f"two rows, {name} {n} x {k}",
                "ours": ours,
                "peer": peer,
                "ratio": ours / peer,
                "unit": "ms",
                "note": note,
            }
        )
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
