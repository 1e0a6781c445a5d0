"""A rank of `tokgen evaluate` under torchrun is killed: the job starts again and goes on from what was measured."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokgen.cli import main
from tokgen.evaluation.report import Report

ROOT = Path(__file__).parents[2]
WORDS = ["evaluate", "tokenizer", str(ROOT / "assets/demo/tokenizer"), "--data", str(ROOT / "assets/demo/shards/val")]
WORDS += ["--samples", "24", "--batch_size", "2", "--learnability", "none", "--extractor", "none", "--device", "cpu"]


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in Linux's /proc")
def test_a_killed_rank_costs_no_more_than_what_was_not_yet_kept(tmp_path):
    assert main([*WORDS, "--out", str(tmp_path / "whole")]) == 0
    whole = Report.load(tmp_path / "whole")
    out, log = tmp_path / "lost", tmp_path / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--standalone", "--monitor-interval", "0.1", "-m", "tokgen", *WORDS]
    command += ["--out", str(out), "--save_every", "0"]
    with open(log, "w") as file:
        agent = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while len(list(out.glob("partial/*.safetensors"))) < 2:  # both have measured something
            assert agent.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        ranks = children(agent.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < killed + 60, "the other rank waits for the one that is lost"
            time.sleep(0.01)
        assert agent.wait(timeout=300) == 0, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
    found = re.search(r"(\d+) of 12 batches were measured before", log.read_text())
    assert found and 2 <= int(found[1]) < 12, log.read_text()
    report = Report.load(out)
    assert report.about["processes"] == 2 and not (out / "partial").exists()
    for group, figures in whole.figures.items():
        if group != "speed":
            assert report.protocols[group] == whole.protocols[group]
            for name, value in figures.items():
                assert report.figures[group][name] == pytest.approx(value, rel=1e-6), name
    assert (out / "pictures.png").read_bytes() == (tmp_path / "whole" / "pictures.png").read_bytes()
