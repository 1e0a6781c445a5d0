"""Run a function in two processes that are ranks of one gloo group."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


def run_on_ranks(work: Callable[[int, str], None], folder: Path, world: int = 2) -> None:
    """Call `work(rank, folder)` in `world` processes; raises what a rank raises. Results go into files of the folder."""
    torch.multiprocessing.spawn(_rank, (work, str(folder), world), nprocs=world)


def _rank(rank: int, work: Callable[[int, str], None], folder: str, world: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    work(rank, folder)
    Path(folder, f"done-{rank}").touch()
    while not all(Path(folder, f"done-{other}").exists() for other in range(world)):
        time.sleep(0.01)  # a rank that leaves first breaks the connections of the others
    # gloo's threads may outlive its group, and C++ aborts a process that ends while one of them runs
    os._exit(0)
