from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import pytest
import tiny
import torch

torch.set_num_threads(1)  # the tensors are tiny: threads would wait for each other


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        yield
    for name in [n for n in os.environ if n.startswith("PL_")]:
        del os.environ[name]  # Lightning leaves the seed of a run behind, for this process and those it starts


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder `images` with train (48 pictures in 4 shards) and val (10)."""
    folder = tmp_path_factory.mktemp("shards") / "images"
    tiny.write_images(folder / "train", 48, 0)
    tiny.write_images(folder / "val", 10, 1)
    return folder


@pytest.fixture(scope="session")
def code_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder `codes` with train (48 items) and val (10)."""
    folder = tmp_path_factory.mktemp("shards") / "codes"
    tiny.write_codes(folder / "train", 48, 0)
    tiny.write_codes(folder / "val", 10, 1)
    return folder
