"""Parity with the published implementations: see `reference.py` for how weights and inputs come about.

`pytest tests/parity --cases DIR` runs every case of another folder (other sizes, salts, batches); a case name without an
adapter is skipped with a word.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import reference  # noqa: E402


def folder(config) -> Path:
    return Path(config.getoption("--cases") or HERE / "cases")


def pytest_generate_tests(metafunc):
    if "parity_case" in metafunc.fixturenames:
        # a module says which cases it adapts by a regular expression over their names
        pattern = metafunc.module.CASES
        files = sorted(folder(metafunc.config).glob("*.json"))
        names = [f.stem for f in files if re.fullmatch(pattern, f.stem)]
        metafunc.parametrize("parity_case", names, indirect=True)


@pytest.fixture
def parity_case(request):
    """(case, expected outputs) of the named case."""
    return reference.load(folder(request.config) / f"{request.param}.json")


@pytest.fixture
def close():
    """assert_close at the case's own absolute tolerance for that output."""

    def check(case, expected, name, got):
        want = expected[name]
        assert tuple(got.shape) == tuple(want.shape), f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        tolerance = case["tolerances"][name]
        if tolerance == 0:
            assert torch.equal(got.to(want.dtype), want), f"{name}: {(got != want).sum()} of {want.numel()} differ"
        else:
            worst = (got.double() - want.double()).abs().max().item()
            assert worst <= tolerance, f"{name}: off by {worst:.3g}, tolerance {tolerance:.3g}"

    return check
