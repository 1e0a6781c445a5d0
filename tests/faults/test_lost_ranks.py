"""Under torchrun a rank is killed: all start again from the last checkpoint, and the run is the one that nobody touched."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training import tiny
from tests.training.test_resume import RECIPE, losses
from tokgen.training.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 12
MARK = "TOKGEN_TEST_RUN"  # in the environment of all that a test starts


def free_port(first: int = 15000, beyond: int = 25000) -> int:
    """A port that nothing listens on, outside of those that the system gives away by itself."""
    while True:
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", random.SystemRandom().randrange(first, beyond)))
            return trial.getsockname()[1]


def recipe(folder: Path, steps: int = STEPS) -> Path:
    """A tiny autoencoder with all that has a state: discriminator, LeCam, EMA, dropout, a codebook of averages."""
    for split, count in (("train", 48), ("val", 11)):
        tiny.write_images(folder / "images" / split, count, count)
    path = folder / "recipe.yaml"
    text = RECIPE.format(shards=folder / "images", steps=steps).replace("every_n_steps: 5", "every_n_steps: 3")
    path.write_text(text)
    return path


def clean_environment(mark: Path, **more: str) -> dict[str, str]:
    """That of this process, without what an earlier run or a scheduler has left in it."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "SLURM_", "TORCHELASTIC_", "MASTER_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]])
    return {**own, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: str(mark), **more}


@contextlib.contextmanager
def started(command: list[str], mark: Path, **more: str) -> Iterator[subprocess.Popen]:
    """The process, its output in one stream; what is left of it and of its ranks is killed in the end."""
    process = subprocess.Popen(
        command, env=clean_environment(mark, **more), cwd=mark, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        for _ in range(2):  # torchrun could start a rank between two looks
            for pid in [process.pid, *processes(mark)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def processes(mark: Path, variable: str = "") -> dict[int, int]:
    """Processes that belong to a test, by pid, with the number that the environment variable holds."""
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, KeyError):
            if int(folder.name) == os.getpid():
                continue
            pairs = (pair.partition("=") for pair in (folder / "environ").read_bytes().decode().split("\0"))
            environment = {name: value for name, _, value in pairs}
            if environment[MARK] == str(mark):
                found[int(folder.name)] = int(environment[variable]) if variable else 0
    return found


def rank_pid(mark: Path, rank: int, variable: str = "RANK") -> int:
    (pid,) = [pid for pid, number in processes(mark, variable).items() if number == rank]
    return pid


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    path, end = run / "metrics.jsonl", time.monotonic() + 400
    while not (path.is_file() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < end, f"step {step} is not reached"
        time.sleep(0.02)


def torchrun(recipe: Path, run: Path, mark: Path) -> contextlib.AbstractContextManager[subprocess.Popen]:
    command = ["bash", str(ROOT / "train" / "torchrun.sh"), "-c", str(recipe), "--run_dir", str(run)]
    return started(command, mark, GPUS="2", MASTER=f"localhost:{free_port()}")


def untouched(recipe: Path, run: Path) -> Path:
    """The run directory of the same recipe on two ranks that nothing happens to; forked from a server, which spares an import."""
    port, fork = free_port(), multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["tokgen.training.lightning_cli"])
    ranks = [fork.Process(target=_rank, args=(rank, port, recipe, run)) for rank in range(2)]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(400)
        assert [rank.exitcode for rank in ranks] == [0, 0], (run / "rank.log").read_text()[-4000:]
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()
    return run


def _rank(rank: int, port: int, recipe: Path, run: Path) -> None:
    from tokgen.cli import main

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = {k: str(v) for k, v in names.items()} | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    environment = clean_environment(run, **environment)
    os.environ.clear()
    os.environ |= environment
    run.mkdir(parents=True, exist_ok=True)
    log = os.open(run / "rank.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    code = main(["fit", "-c", str(recipe), "--run_dir", str(run), "--trainer.devices", "2"])
    os._exit(code)  # gloo's threads may outlive its group


def assert_same_run(run: Path, other: Path, steps: int = STEPS) -> None:
    """Losses, weights, optimizer states and averages, bit for bit."""
    expected, found = losses(run), losses(other)
    assert sorted(expected) == sorted(found) == list(range(1, steps + 1))
    for step, row in expected.items():
        assert row == found[step], f"step {step} differs"
    one, two = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, other))
    parts = (
        lambda c: c["state_dict"],
        lambda c: c["callbacks"]["EMA"]["average"],
        lambda c: {f"{i}.{n}.{k}": v for i, o in enumerate(c["optimizer_states"]) for n, s in o["state"].items() for k, v in s.items()},
    )  # fmt: skip
    for part in parts:
        assert part(one).keys() == part(two).keys() and part(one)
        for name, value in part(one).items():
            assert torch.equal(value, part(two)[name]), name


@pytest.mark.slow
def test_killed_ranks_are_started_again_and_the_run_is_bitwise_the_same(tmp_path):
    """Rank 1 is killed, then rank 0, which writes checkpoints and log."""
    path, run = recipe(tmp_path), tmp_path / "run"
    with torchrun(path, run, tmp_path) as process:
        for rank, step in ((1, 4), (0, 8)):
            wait_for_step(process, run, step)
            os.kill(rank_pid(tmp_path, rank), signal.SIGKILL)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output[-4000:]
        assert not processes(tmp_path)
    assert_same_run(untouched(path, tmp_path / "untouched"), run)


@pytest.mark.slow
def test_a_signal_to_torchrun_reaches_the_ranks_which_save(tmp_path):
    path, run = recipe(tmp_path, steps=100_000), tmp_path / "run"
    with torchrun(path, run, tmp_path) as process:
        wait_for_step(process, run, 4)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=200)
        assert process.returncode != 0 and "signal 15: saved" in output, output[-4000:]
        assert not processes(tmp_path)
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == max(losses(run)) >= 4
