"""Processes that share one `tokgen tokenize`, and what is left when some of them are killed: the same bytes as of one alone."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokgen.data.shards import Manifest, verify

DEMO = Path(__file__).parents[2] / "assets" / "demo"
SOURCE, MODEL, MAX_SAMPLES = DEMO / "shards" / "val", DEMO / "tokenizer", 30  # 205 pictures: 7 units
PROCESSES = multiprocessing.get_context("forkserver")  # real processes that import torch only once
PROCESSES.set_forkserver_preload(["tokgen.hub", "tokgen.precompute", "rich.progress", "torchvision"])


def take_part(out, said=None, locks=True):
    """What a process of a plain `tokgen tokenize` does; its report goes into a file."""
    import torch

    import tokgen
    from tokgen.data import units
    from tokgen.precompute import tokenize_shards

    torch.set_num_threads(1)
    if not locks:

        def flock(file, operation):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        units.fcntl.flock = flock
    report = tokenize_shards(
        tokgen.load(MODEL, device="cpu"), SOURCE, out, batch_size=8, max_samples=MAX_SAMPLES, progress=False
    )
    if said is not None:
        Path(said).write_text(f"{report.written} {report.kept} {report.others}")


@pytest.fixture
def started():
    """Starts processes, and leaves none behind."""
    processes = []

    def start(*arguments, **options):
        process = PROCESSES.Process(target=take_part, args=arguments, kwargs=options)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "codes"
    process = PROCESSES.Process(target=take_part, args=(out,))
    process.start()
    process.join(240)
    assert process.exitcode == 0 and [s.samples for s in Manifest.load(out).shards] == [30] * 6 + [25]
    return contents(out)


def contents(folder):
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for(what, seconds=240):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing came of it"
        time.sleep(0.005)
    return found


def at_work(out, besides=()):
    """Name of a unit that is being written, and the process that does it, as its lock says."""
    for folder in out.glob(".units/*.tmp-*"):
        unit = folder.name.partition(".")[0]
        try:
            pid = int((out / ".units" / f"{unit}.lock").read_text().rpartition(" ")[2])
        except (FileNotFoundError, ValueError):  # being written
            continue
        if pid not in besides and not (out / ".units" / unit).exists():
            return unit, pid
    return None


def stop_at_work(out, besides=()):
    """Stop a process in the middle of a unit."""
    while True:
        unit, pid = wait_for(lambda: at_work(out, besides))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)
        if (out / ".units" / unit).exists() or not list(out.glob(f".units/{unit}.tmp-*")):  # it has just finished
            os.kill(pid, signal.SIGCONT)
            continue
        return unit, pid


def test_a_unit_is_its_process_s_until_that_dies_and_then_a_survivor_s(alone, tmp_path, started):
    out = tmp_path / "codes"
    processes = [started(out, tmp_path / f"said-{i}") for i in range(2)]
    unit, pid = stop_at_work(out)
    others = {f"{i:05d}" for i in range(7)} - {unit}
    wait_for(
        lambda: others <= {path.name for path in (out / ".units").iterdir()}
    )  # the other process makes all the rest
    time.sleep(1.2)  # and looks at this one again and again
    assert not (out / ".units" / unit).exists() and not (out / "manifest.json").exists()
    assert not list(out.glob("*.tar"))
    dead, survivor = sorted(processes, key=lambda process: process.pid != pid)
    os.kill(pid, signal.SIGKILL)
    survivor.join(240)
    assert (dead.exitcode, survivor.exitcode) == (-signal.SIGKILL, 0)
    assert contents(out) == alone and not verify(out)
    (said,) = tmp_path.glob("said-*")
    written, kept, others = map(int, said.read_text().split())
    assert written >= 25 and written + kept + others == 205


def test_another_number_of_processes_goes_on_after_all_were_killed(alone, tmp_path, started):
    out = tmp_path / "codes"
    processes = [started(out) for _ in range(3)]
    wait_for(lambda: len([path for path in out.glob(".units/*") if path.name.isdigit()]) >= 2)
    stop_at_work(out)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    made = {path.name: path.stat().st_mtime_ns for path in out.glob(".units/*/00000.tar") if path.parent.name.isdigit()}
    assert made and not (out / "manifest.json").exists()
    said = [tmp_path / "one", tmp_path / "two"]
    again = [started(out, name) for name in said]
    for process in again:
        process.join(240)
    assert [process.exitcode for process in again] == [0, 0]
    assert contents(out) == alone
    figures = [list(map(int, name.read_text().split())) for name in said]
    assert all(sum(figure) == 205 for figure in figures)
    assert sum(written for written, _, _ in figures) <= 205 - 2 * 30  # what was whole was not made again


def test_without_locks_units_are_made_twice_and_kept_once(alone, tmp_path, started):
    """As on file systems that know none: processes that begin together make the same units at the same time."""
    out = tmp_path / "codes"
    processes = [started(out, tmp_path / f"said-{i}", locks=False) for i in range(2)]
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(out) == alone
    assert sum(int(path.read_text().split()[0]) for path in tmp_path.glob("said-*")) == 205


@pytest.mark.slow
def test_torchrun_goes_on_after_the_loss_of_a_rank(alone, tmp_path):
    out = tmp_path / "codes"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "--monitor-interval", "0.1", "-m", "tokgen", "tokenize", str(SOURCE), "--model", str(MODEL), "--out", str(out),
        "--batch_size", "8", "--max_samples", str(MAX_SAMPLES), "--device", "cpu",
    ]  # fmt: skip
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _, pid = stop_at_work(out)
        wait_for(
            lambda: at_work(out, besides=(pid,)) or len(list(out.glob(".units/0000?"))) == 6
        )  # the other rank works too
        assert not (out / "manifest.json").exists()
        os.kill(pid, signal.SIGKILL)
        assert job.wait(240) == 0, (tmp_path / "said").read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert contents(out) == alone
    said = (tmp_path / "said").read_text()
    assert "Signal 9 (SIGKILL)" in said or "exitcode: -9" in said
    assert said.count("code shards are in") == 2  # both ranks ended well, the second time
