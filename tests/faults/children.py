"""Children of a test process: forked from a server, so that little is imported again, and never left behind."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fork(work: Callable[..., int | None], log: Path, *args: Any) -> multiprocessing.Process:
    """A child that runs `work(*args)`, ends with the code that it returns, and prints into a file.

    From a server that has computed nothing: torch lets no child of a process that has gone backward go backward itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tokgen.training.lightning_cli"])
    process = context.Process(target=_child, args=(log, work, args))
    process.start()
    return process


def _child(log: Path, work: Callable[..., int | None], args: tuple[Any, ...]) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    sys.exit(work(*args))


def exit_codes(processes: list[multiprocessing.Process], seconds: float = 240) -> list[int | None]:
    """Exit codes; None of a process that was still running after some time and was killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def run_ranks(work: Callable[..., None], folder: Path, *args: Any) -> tuple[list[int | None], list[str]]:
    """Run `work(rank, folder, *args)` in two processes that Lightning takes for those of `torchrun`: exit codes and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"log-{rank}" for rank in range(2)]
    codes = exit_codes([fork(_rank, logs[rank], rank, port, work, folder, *args) for rank in range(2)])
    return codes, [log.read_text() for log in logs]


def _rank(rank: int, port: int, work: Callable[..., None], *args: Any) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    work(rank, *args)
