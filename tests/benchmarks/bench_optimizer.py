"""The optimizer step: fused AdamW, which the recipes ask for, against PyTorch's default."""

from __future__ import annotations

import statistics
import time

import torch

ROUNDS = 7


def run() -> list[dict]:
    """Milliseconds of one AdamW step over 20 M parameters in 80 tensors; medians of alternating rounds, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[bool, list[float]] = {True: [], False: []}
    optimizers = {}
    for fused in (True, False):
        parameters = [torch.nn.Parameter(torch.randn(512, 512)) for _ in range(80)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizers[fused] = torch.optim.AdamW(parameters, lr=1e-3, **({"fused": True} if fused else {}))
        optimizers[fused].step()
    for _ in range(ROUNDS):
        for fused, optimizer in optimizers.items():
            started = time.perf_counter()
            optimizer.step()
            times[fused].append(1000 * (time.perf_counter() - started))
    torch.set_num_threads(threads)
    ours, peer = statistics.median(times[True]), statistics.median(times[False])
    note = "20 M parameters; peer: AdamW(...) as PyTorch chooses; lower is better"
    return [{"name": "AdamW step", "ours": ours, "peer": peer, "ratio": ours / peer, "unit": "ms", "note": note}]


if __name__ == "__main__":
    print(run())
