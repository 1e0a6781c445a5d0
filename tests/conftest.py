from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--cases", help="folder of parity cases to run instead of tests/parity/cases")


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random state, in whatever order they run."""
    torch.manual_seed(0)
