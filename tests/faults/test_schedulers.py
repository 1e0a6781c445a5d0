"""`train/slurm.sh` under a stand-in for SLURM: signals save and put the job back into the queue once, crashes do not.

The stand-in for `srun` starts the tasks with SLURM's variables, and does what --kill-on-bad-exit=1 does: SIGTERM to the other
tasks when one has failed, and SIGKILL later. Its code is SLURM's: 128 + the highest signal that ended a task, else the highest
code of one.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from test_lost_ranks import (
    ROOT,
    STEPS,
    assert_same_run,
    free_port,
    processes,
    rank_pid,
    recipe,
    started,
    untouched,
    wait_for_step,
)

from tests.training.test_resume import losses
from tokgen.training.callbacks import requeue
from tokgen.training.checkpoint import read_checkpoint

SRUN = """#!/usr/bin/env python3
import os, subprocess, sys, time
command = [a for i, a in enumerate(sys.argv[1:], 1) if not all(b.startswith("--") for b in sys.argv[1:i + 1])]
tasks = []
for i in range(int(os.environ["SLURM_NTASKS"])):
    own = {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
    tasks.append(subprocess.Popen(command, env={**os.environ, **own}))
end = None
while any(t.poll() is None for t in tasks):
    if end is None and any(t.poll() for t in tasks):
        end = time.monotonic() + 30
        [t.terminate() for t in tasks]
    if end is not None and time.monotonic() > end:
        [t.kill() for t in tasks]
    time.sleep(0.02)
codes = [t.returncode for t in tasks]
sys.exit(128 - min(codes) if min(codes) < 0 else max(codes))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> "$SCONTROL_CALLS"\n'


def programs(folder: Path) -> Path:
    """A folder for the PATH."""
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    return folder / "bin"


class Job:
    """A job of two tasks on one machine, which may be submitted several times."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.calls, self.arguments = folder, folder / "calls", arguments
        self.id = f"{free_port() - 15000:04d}"  # Lightning takes the port from the last four digits
        names = {"JOB_ID": self.id, "JOB_NAME": "tokgen", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1"}
        names |= {"NODELIST": "127.0.0.1", "SUBMIT_DIR": str(ROOT)}
        self.environment = {f"SLURM_{k}": v for k, v in names.items()} | {"SCONTROL_CALLS": str(self.calls)}
        self.path = f"{programs(folder)}{os.pathsep}{os.environ['PATH']}"

    def submit(self):
        command = ["env", f"PATH={self.path}", "bash", str(ROOT / "train" / "slurm.sh"), *self.arguments]
        return started(command, self.folder, **self.environment)

    def signal(self, number: int) -> None:
        """As SLURM does: to the tasks, and not to the script."""
        for task in (0, 1):
            os.kill(rank_pid(self.folder, task, "SLURM_PROCID"), number)

    @property
    def requeued(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.mark.slow
def test_a_job_that_is_signalled_goes_on_when_it_comes_again(tmp_path):
    """Time is up after step 3, the job is preempted after step 7, and ends when it comes for the third time."""
    path, run = recipe(tmp_path), tmp_path / "run"
    job = Job(tmp_path, "-c", str(path), "--run_dir", str(run), "--checkpoint.every_n_steps", "1000")
    for times, (number, step) in enumerate(((signal.SIGUSR1, 3), (signal.SIGTERM, 7)), 1):
        with job.submit() as process:
            wait_for_step(process, run, step)
            job.signal(number)
            output, _ = process.communicate(timeout=200)
        assert process.returncode == 143 and f"signal {int(number)}: saved" in output, output[-4000:]
        assert job.requeued == [f"requeue incomplete {job.id}"] * times
        assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == max(losses(run)) >= step
    with job.submit() as process:
        output, _ = process.communicate(timeout=400)
    assert process.returncode == 0 and not processes(tmp_path), output[-4000:]
    assert len(job.requeued) == 2
    assert not list(run.rglob("hpc_ckpt_*")), "Lightning's handlers saved, too"
    assert_same_run(untouched(path, tmp_path / "untouched"), run, STEPS)


@pytest.mark.slow
def test_a_run_that_fails_is_not_put_back_into_the_queue(tmp_path):
    """A misspelt flag. The first task to end has SLURM end the other with SIGTERM, and srun's code is 143 then."""
    job = Job(tmp_path, "-c", str(recipe(tmp_path)), "--run_dir", str(tmp_path / "run"), "--trainer.max_step", "3")
    with job.submit() as process:
        output, _ = process.communicate(timeout=400)
    assert process.returncode in (2, 143) and "max_step" in output, output[-4000:]
    assert job.requeued == [] and not processes(tmp_path)


def test_requeueing_outside_of_slurm_and_without_scontrol(tmp_path, monkeypatch, caplog):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(programs(tmp_path)) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("SCONTROL_CALLS", str(tmp_path / "calls"))
    requeue()
    assert not (tmp_path / "calls").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "11")
    requeue()
    assert (tmp_path / "calls").read_text() == "requeue incomplete 4700_11\n" and not caplog.records
    (tmp_path / "bin" / "scontrol").write_text(
        "#!/bin/sh\necho Requested operation is presently disabled >&2\nexit 1\n"
    )
    requeue()
    (tmp_path / "bin" / "scontrol").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    requeue()
    first, second = (record.getMessage() for record in caplog.records)
    assert "presently disabled" in first and "No such file" in second and "submit it again" in second


def test_the_script_is_one_that_sbatch_reads():
    text = (ROOT / "train" / "slurm.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    head = text[: text.index("\nset -")].splitlines()
    assert {"#SBATCH --signal=SIGUSR1@120", "#SBATCH --requeue"} <= set(head)
