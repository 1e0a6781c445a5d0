"""Peak memory of a statement, measured on the resident set of a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import sys
sys.path.insert(0, {here!r})
from peak_memory import peak, reset
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
{setup}
before = reset()
{statement}
print(peak() - before)
"""


def peak_of(setup: str, statement: str) -> int:
    """Bytes by which `statement` raises the peak of the resident set over what it is after `setup`."""
    program = _PROGRAM.format(here=str(Path(__file__).parent), setup=setup, statement=statement)
    # a fixed threshold: glibc would raise it at the first large block that is freed, and keep and scatter later ones
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return int(run.stdout.split()[-1])


def reset() -> int:
    """Forget the peak so far where the system can; the resident set from which the next one counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return peak()


def peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
