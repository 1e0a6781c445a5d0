"""Shards in, batches out: packing, streaming, exact resume.

A data set is a folder of plain tar files in webdataset naming beside a `manifest.json` (`tokgen.data.shards`).
`pack` makes such folders, `ShardWriter` writes them sample by sample, `ShardsDataModule` streams them into batches.

Names are imported when first used, so that reading a manifest needs neither torch nor lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "LoaderStats": "tokgen.data.stream",
    "Manifest": "tokgen.data.shards",
    "PackReport": "tokgen.data.pack",
    "ShardLoader": "tokgen.data.stream",
    "ShardWriter": "tokgen.data.shards",
    "ShardsDataModule": "tokgen.data.datamodule",
    "UnreadableVideo": "tokgen.data.video",
    "VideoReader": "tokgen.data.video",
    "build_manifest": "tokgen.data.shards",
    "decode_image": "tokgen.data.decode",
    "open_video": "tokgen.data.video",
    "verify": "tokgen.data.shards",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:  # for editors; at run time __getattr__ below finds them
    from tokgen.data.datamodule import ShardsDataModule  # noqa: F401
    from tokgen.data.decode import decode_image  # noqa: F401
    from tokgen.data.pack import PackReport  # noqa: F401
    from tokgen.data.shards import Manifest, ShardWriter, build_manifest, verify  # noqa: F401
    from tokgen.data.stream import LoaderStats, ShardLoader  # noqa: F401
    from tokgen.data.video import UnreadableVideo, VideoReader, open_video  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tokgen.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
