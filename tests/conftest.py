from __future__ import annotations

import os

# Small tensors: a second thread costs more than it brings, and processes that tests start share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--cases", help="folder of parity cases to run instead of tests/parity/cases")


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random state, in whatever order they run."""
    torch.manual_seed(0)
