"""Weights as Hugging Face folders hold them: safetensors, in one file or several with an index. Read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from tokgen.errors import CheckpointError
from tokgen.pretrained import WEIGHTS

INDEX = WEIGHTS + ".index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder. Raises CheckpointError if there are none, or not all that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"it names {name!r}, which is no file of this folder")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}; only safetensors are read") from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from None
    files = [folder / name for name in names]
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {path.name}, which {INDEX} names; copy it again")
    return files


def shapes_in(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes, without reading tensors. Raises CheckpointError for a damaged file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with _opened(path) as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return shapes


def tensors_in(files: list[Path], names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, all or those of these names. Raises CheckpointError for a damaged file."""
    for path in files:
        with _opened(path) as file:
            for key in file.keys():
                if names is None or key in names:
                    yield key, file.get_tensor(key)


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy it again") from None
