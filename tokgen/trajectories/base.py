"""`Trajectories`, the label volume that every source gives and every tokenizer of trajectories takes; `TrajectorySource`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tokgen.errors import ConfigError, DataError, InputError
from tokgen.files import replacing

MAX_BYTES = 1 << 30  # of an array in a sidecar, unpacked


@dataclass(frozen=True, eq=False)
class Trajectories:
    """One clip's trajectories.

    Args:
        labels: int32 (T, H, W), each pixel's trajectory, 0 .. M-1; -1 where it has none. One number is one trajectory through
            the whole clip. Its grid may be coarser than the pixels.

    Raises:
        InputError: another shape, a dtype that is no integer, no pixel, or numbers below -1.
    """

    labels: np.ndarray

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if labels.ndim != 3 or labels.dtype.kind not in "iu" or 0 in labels.shape:
            raise InputError(f"trajectory labels are {labels.dtype} {labels.shape}; expected integers (T, H, W)")
        if labels.min() < -1 or labels.max() >= 2**31 - 1:
            raise InputError(f"trajectory labels reach {labels.min()}..{labels.max()}; expected -1 (none), 0, 1, ...")
        object.__setattr__(self, "labels", np.ascontiguousarray(labels, dtype=np.int32))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, H, W)."""
        return self.labels.shape

    @property
    def count(self) -> int:
        """M, one more than the largest number."""
        return int(self.labels.max()) + 1

    @property
    def panoptic(self) -> bool:
        """Whether every pixel belongs to a trajectory."""
        return bool((self.labels >= 0).all())

    def volumes(self) -> np.ndarray:
        """Pixels of each trajectory in each frame, int64 (M, T)."""
        t, m = self.shape[0], self.count
        keys = self.labels.astype(np.int64) + np.arange(t)[:, None, None] * (m + 1) + 1  # 0 of every frame: none
        return np.bincount(keys.ravel(), minlength=t * (m + 1)).reshape(t, m + 1)[:, 1:].T

    def compact(self) -> Trajectories:
        """The same with numbers that all occur, in order of first appearance (frame, then raster)."""
        flat = self.labels.ravel()
        values, first = np.unique(flat, return_index=True)
        keep = values >= 0
        values, order = values[keep], np.argsort(first[keep], kind="stable")
        table = np.full(self.count + 1, -1, np.int32)
        table[values[order]] = np.arange(len(order), dtype=np.int32)
        return Trajectories(table[self.labels])  # -1 reads the last entry, which stays -1

    def resized(self, height: int, width: int) -> Trajectories:
        """On another grid: the label at the centre of each cell."""
        _, h, w = self.shape
        rows = ((np.arange(height) + 0.5) * h / height).astype(np.int64)
        columns = ((np.arange(width) + 0.5) * w / width).astype(np.int64)
        return Trajectories(self.labels[:, rows[:, None], columns])

    # -- the published sidecar ----------------------------------------------------------------------------------------

    def to_sidecar(self) -> tuple[np.ndarray, np.ndarray]:
        """TrajViT's two arrays: mask (T, H, W), each frame's segments numbered from 1, 0 for none; and graph int64 (M, T), the
        segment of trajectory m in frame t, 0 where it is absent. A segment has its trajectory's number plus one."""
        dtype = np.uint8 if self.count < 256 else np.uint16 if self.count < 65536 else np.int32
        alive = self.volumes() > 0  # (M, T)
        return (self.labels + 1).astype(dtype), np.where(alive, np.arange(1, self.count + 1)[:, None], 0).astype(
            np.int64
        )

    @staticmethod
    def from_sidecar(mask: np.ndarray, graph: np.ndarray) -> Trajectories:
        """The inverse, for any numbering of each frame's segments. A segment that no trajectory claims has none (-1); one that
        several claim belongs to the first.

        Raises:
            InputError: shapes that do not belong together, or numbers below 0.
        """
        if mask.ndim != 3 or graph.ndim != 2 or graph.shape[1] != len(mask):
            raise InputError(f"mask {mask.shape} and graph {graph.shape}; expected (T, H, W) and (M, T) of one T")
        if (
            mask.dtype.kind not in "iu"
            or graph.dtype.kind not in "iu"
            or mask.min() < 0
            or (graph.size and graph.min() < 0)
        ):
            raise InputError("mask and graph hold integers from 0 up, 0 for none")
        labels = np.full(mask.shape, -1, np.int32)
        for t, frame in enumerate(mask):
            table = np.full(max(int(frame.max()), int(graph[:, t].max(initial=0))) + 1, -1, np.int32)
            table[graph[::-1, t]] = np.arange(len(graph) - 1, -1, -1, dtype=np.int32)
            table[0] = -1
            labels[t] = table[frame]
        return Trajectories(labels)

    def save(self, stem: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write `STEM_mask.npz` and `STEM_graph.npz` as TrajViT's loader reads them; each whole or not at all."""
        mask, graph = self.to_sidecar()
        paths = Path(f"{os.fspath(stem)}_mask.npz"), Path(f"{os.fspath(stem)}_graph.npz")
        for path, arrays in zip(paths, ({"arr_0": mask}, {"tensor": graph})):
            with replacing(path) as partial, open(partial, "wb") as file:
                np.savez_compressed(file, **arrays)
        return paths

    @staticmethod
    def load(stem: str | os.PathLike[str]) -> Trajectories:
        """Read `STEM_mask.npz` and `STEM_graph.npz`. Raises DataError that names the file if one is missing or not such a file."""
        stem = os.fspath(stem)
        return Trajectories.from_sidecar(
            _read_npz(f"{stem}_mask.npz", "arr_0"), _read_npz(f"{stem}_graph.npz", "tensor")
        )


def _read_npz(path: str, name: str) -> np.ndarray:
    """One array of a zip of plain arrays; its size is checked before it is unpacked, nothing is unpickled."""
    import lzma
    import zipfile
    import zlib

    from tokgen.data.decode import BadSample, decode_npy

    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            if info.file_size > MAX_BYTES:
                raise DataError(f"{path}: {name} has {info.file_size} bytes; at most {MAX_BYTES} are read")
            return decode_npy(archive.read(info))
    except FileNotFoundError:
        raise DataError(f"no trajectory file {path}; expected STEM_mask.npz beside STEM_graph.npz") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        KeyError,
        BadSample,
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
    ) as error:
        raise DataError(f"{path} cannot be read as an archive with an array {name!r} ({error})") from None


class TrajectorySource:
    """Finds the trajectories of a clip. Subclasses implement `track` and are registered in `SOURCES`.

    A source is deterministic: the same frames give the same labels, whatever came before.
    """

    name: ClassVar[str]

    def track(self, video: np.ndarray) -> Trajectories:
        """Trajectories of frames uint8 (T, H, W, 3), on a grid of the source's own."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What `build_source` makes an equal source from, beside its name; plain data."""
        raise NotImplementedError

    def __call__(self, video: Any) -> Trajectories:
        """Trajectories of a clip: uint8 (T, H, W, 3), or a uint8 or float tensor (T, 3, H, W), float in [0, 1].

        Raises:
            InputError: another shape, dtype or range.
        """
        return self.track(as_frames(video))


def as_frames(video: Any) -> np.ndarray:
    """A clip as uint8 (T, H, W, 3); see `TrajectorySource`."""
    if hasattr(video, "detach"):  # a tensor (T, 3, H, W)
        video = video.detach().cpu()
        if video.ndim != 4 or video.shape[1] != 3:
            raise InputError(f"a clip has shape {tuple(video.shape)}; expected a tensor (T, 3, H, W)")
        if video.is_floating_point():
            if video.numel() and (float(video.min()) < -1e-3 or float(video.max()) > 1 + 1e-3):
                raise InputError(f"a clip reaches {float(video.min()):.3g}..{float(video.max()):.3g}; expected [0, 1]")
            video = (video.float() * 255).round().clamp(0, 255).byte()
        video = video.permute(0, 2, 3, 1).numpy()
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape or video.dtype != np.uint8:
        raise InputError(f"a clip is {video.dtype} {video.shape}; expected uint8 (T, H, W, 3) with at least one frame")
    return np.ascontiguousarray(video)


SOURCES: dict[str, str] = {
    "voting": "tokgen.trajectories.voting:VotingTracker",
    "sam2": "tokgen.trajectories.sam2:SAM2Source",
    "segmenter": "tokgen.trajectories.segmenter:SegmenterSource",
}


def build_source(settings: dict[str, Any]) -> TrajectorySource:
    """A source from {"type": a name in `SOURCES`, ...its settings}. Raises ConfigError for an unknown name or setting."""
    import importlib

    settings = dict(settings)
    kind = settings.pop("type", None)
    if kind not in SOURCES:
        raise ConfigError(f"unknown trajectory source {kind!r}; expected type: one of {', '.join(SOURCES)}")
    module, _, name = SOURCES[kind].partition(":")
    try:
        return getattr(importlib.import_module(module), name)(**settings)
    except TypeError as error:
        raise ConfigError(f"trajectory source {kind}: {error}") from None
