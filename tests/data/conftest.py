from __future__ import annotations

from pathlib import Path

import pytest
from shard_makers import write_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """48 images in 4 shards of 12."""
    return write_images(tmp_path / "images", [12, 12, 12, 12])
