"""Files written whole or not at all. Imports nothing heavy: reading a manifest needs no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokgen.errors import causes


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is flushed to disk and renamed to `path`, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def why_unwritten(error: BaseException) -> str | None:
    """A few words for a failure to write, of whichever library; None if the error is something else."""
    for cause in causes(error):
        if isinstance(cause, OSError):
            if cause.errno in (errno.ENOSPC, errno.EDQUOT):
                return "the disk is full"
            if cause.errno == errno.EFBIG:
                return "the file would exceed the size limit of this process"
            if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return "the folder is not writable"
            if cause.errno in (errno.EEXIST, errno.ENOTDIR):
                return f"{cause.filename} is in the way, or a part of its path is, which is no folder"
            return os.strerror(cause.errno) if cause.errno else str(cause)
        if isinstance(cause, RuntimeError) and ("enforce fail" in str(cause) or "PytorchStreamWriter" in str(cause)):
            return "the disk is full, or its writing failed"
        if type(cause).__name__ == "SafetensorError" and "os error 28" in str(cause):
            return "the disk is full"
    return None


def write_json(data: Any, path: str | os.PathLike[str]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
