"""Trajectories found once for a whole set of videos: `KEY.traj.npy` beside each video of shards; or a sidecar of one."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tokgen.data.batches import resize_image
from tokgen.data.decode import TRAJECTORIES, VIDEO_EXTENSIONS, BadSample, decode_trajectories
from tokgen.data.shards import Manifest, ShardWriter
from tokgen.data.tar import RawSample
from tokgen.data.units import UnitsReport, begun_meta, share_units, units_of
from tokgen.data.video import UnreadableVideo, open_video
from tokgen.errors import ConfigError, DataError, InputError
from tokgen.trajectories.base import Trajectories, TrajectorySource, build_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frames:
    """Which pictures of a video trajectories are found in, and where they are kept.

    Args:
        size: side of the square pictures that a source sees.
        resize: "crop" or "squash", see `tokgen.data.batches.resize_image`.
        grid: side of the square grid that trajectories are kept on.
        fps: pictures a second: the frames nearest in time to k / fps; None takes every frame of the file.
        max_frames: videos of more pictures are left out, as all of them are held in memory at once.

    Raises:
        ConfigError: a value that cannot be.
    """

    size: int = 160
    resize: str = "crop"
    grid: int = 56
    fps: float | None = None
    max_frames: int = 3000

    def __post_init__(self) -> None:
        if self.resize not in ("crop", "squash"):
            raise ConfigError(f"resize is {self.resize!r}; expected crop or squash")
        for name in ("size", "grid", "max_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ConfigError(f"fps is {self.fps}; expected more than 0, or none for every frame of the file")


class Finder:
    """From a video to its pictures and their trajectories on a grid.

    Args:
        settings: of a source, see `build_source`; or {"type": "arrays", "folder": DIR}, trajectories of your own: those of
            the video KEY are read from DIR/KEY_mask.npz and DIR/KEY_graph.npz, see `Trajectories.load`. They have a plane
            for each picture, of the whole frame (its aspect ratio) or of the square picture.
        frames: which pictures.

    Raises:
        ConfigError: unknown source or settings.
        DataError: no such folder of arrays.
    """

    def __init__(self, settings: Mapping[str, Any], frames: Frames = Frames()) -> None:
        self.frames = frames
        self.source: TrajectorySource | None = None
        if settings.get("type") != "arrays":
            self.source = build_source(dict(settings))
            self.settings = {"type": settings["type"], **self.source.settings()}
            return
        if set(settings) != {"type", "folder"}:
            raise ConfigError(f"source arrays has the setting folder, and no other; got {', '.join(settings)}")
        self.folder = Path(str(settings["folder"]))
        if not self.folder.is_dir():
            raise DataError(f"no folder {self.folder} of trajectories; expected KEY_mask.npz and KEY_graph.npz there")
        self.settings = {"type": "arrays", "folder": str(self.folder)}

    def __call__(self, key: str, data: bytes | str | os.PathLike[str]) -> tuple[Pictures, Trajectories]:
        """A video's pictures, and their trajectories (T, grid, grid), with numbers that all occur.

        Raises:
            BadSample, DataError, InputError: a video that cannot be read, is too long, or has no trajectories.
        """
        pictures = read_pictures(data, self.frames, key if isinstance(data, bytes) else "")
        found = self._kept(key, pictures) if self.source is None else self.source(pictures.frames)
        if len(found.labels) != len(pictures.frames):
            raise BadSample(
                "trajectories of another length", f"{len(found.labels)} for {len(pictures.frames)} pictures"
            )
        return pictures, found.resized(self.frames.grid, self.frames.grid).compact()

    def _kept(self, key: str, pictures: Pictures) -> Trajectories:
        if not (self.folder / f"{key}_mask.npz").is_file():
            raise BadSample("no trajectories", f"there is no {self.folder / key}_mask.npz")
        found = Trajectories.load(self.folder / key)
        _, h, w = found.shape
        if h == w:  # of the square picture
            return found
        # of the whole frame: its aspect ratio, but for a row or column that was rounded
        if abs(h * pictures.width - w * pictures.height) > max(pictures.width, pictures.height):
            wanted = f"{pictures.height} x {pictures.width}"
            raise BadSample("trajectories of another shape", f"{h} x {w} for frames of {wanted}")
        if self.frames.resize == "crop":
            side = min(h, w)
            top, left = (h - side) // 2, (w - side) // 2
            found = Trajectories(found.labels[:, top : top + side, left : left + side])
        return found


class Pictures(NamedTuple):
    """Those of a video's timeline, uint8 (T, S, S, 3); the height and width of its frames, and pictures a second."""

    frames: np.ndarray
    height: int
    width: int
    fps: float


def read_pictures(data: bytes | str | os.PathLike[str], frames: Frames, name: str = "") -> Pictures:
    """The pictures of a video. Raises BadSample or DataError if it cannot be read, or is too long."""
    with open_video(data, name=name) as video:
        shown = video.timeline(frames.fps)
        if len(shown) > frames.max_frames:
            raise BadSample("too long", f"{len(shown)} pictures, and at most {frames.max_frames} are taken at once")
        pictures = np.empty((len(shown), frames.size, frames.size, 3), np.uint8)
        for picture, frame in zip(pictures, video.frames(shown)):
            square = resize_image(torch.from_numpy(frame).permute(2, 0, 1), frames.size, frames.resize)
            picture[:] = square.permute(1, 2, 0).numpy()
        width, height = video.size
        return Pictures(pictures, height, width, frames.fps or video.fps or 1.0)


# --------------------------------------------------------------------------------------------------------------- shards


def trajectory_shards(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Mapping[str, Any],
    frames: Frames = Frames(),
    *,
    workers: int = 0,
    max_samples: int = 500,
    progress: bool = True,
) -> UnitsReport:
    """Video shards again, with the trajectories of each video beside it: `KEY.traj.npy`, the label of each
    place plus one (0 for none), uint8, uint16 or int32 (T, h, w).

    There is a plane for each position of the video's timeline. Processes that are given the same arguments share the work, and a
    run that was interrupted continues after the shards that were whole, see `tokgen.data.units`; a complete folder is left as it is.
    Videos that cannot be read, or are too long, are left out, counted and named in the log.

    Args:
        source: a folder of video shards with a manifest.
        out: folder to write. Its manifest's meta has "trajectories": {"source": the source's type and settings, "size",
            "resize", "grid": [h, w], "fps", and of arrays "folder"} beside what the source's meta says.
        settings: of the source of trajectories, see `Finder`.
        frames: which pictures of a video are looked at, and how.
        workers: processes of this one that find trajectories; 0 does it here. Their number does not change what is written.
        max_samples: samples in a shard; what a process takes at a time, and so the most that its loss costs.

    Raises:
        DataError: `source` is no folder of video shards, none of its videos gives trajectories, `out` was begun with other
            settings, or a worker died.
        ConfigError: unknown source, settings or number of workers.
    """
    if workers < 0:
        raise ConfigError(f"workers is {workers}; expected 0 or more")
    manifest = Manifest.load(source)
    if manifest.kind != "videos":
        raise DataError(
            f"{source} holds {manifest.kind}; trajectories are of video shards, as `tokgen pack` writes them"
        )
    finder = Finder(settings, frames)
    grid = [frames.grid, frames.grid]
    made = {"source": finder.settings, "size": frames.size, "resize": frames.resize, "grid": grid, "fps": frames.fps}
    if finder.source is None:  # the folder apart: two sets of arrays are of one source
        made |= {"source": {"type": "arrays"}, "folder": finder.settings["folder"]}
    made = json.loads(json.dumps(made))  # as a manifest has it
    _check_begun(out, made)
    count = 0

    def write(samples: Iterator[RawSample], writer: ShardWriter, skipped: Counter) -> None:
        nonlocal count
        for raw, planes in _found(samples, finder, pool, workers):
            if isinstance(planes, BadSample):
                skipped[planes.reason] += 1
                log.warning("Left out a video, %s: %s.", raw.key, planes)
                continue
            members = {e: raw.members[e] for e in (*VIDEO_EXTENSIONS, "txt", "json") if e in raw.members}
            writer.write(raw.key, {**members, TRAJECTORIES: planes})
            count += int(planes.max())

    # spawned, not forked: libraries that have started threads here do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (finder.settings, frames)) if workers else None
    try:
        report = share_units(
            source, out, write, kind="videos", meta={**manifest.meta, "trajectories": made},
            extensions=(*VIDEO_EXTENSIONS, "txt", "json"), max_samples=max_samples, done="given trajectories",
            progress="finding trajectories" if progress else None,
        )  # fmt: skip
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
    if report.written:
        report.done += f" ({count / report.written:.1f} each)"
    return report


def stored_clips(folder: str | os.PathLike[str]) -> Iterator[tuple[str, Pictures, Trajectories]]:
    """Key, pictures and trajectories of each video of a folder that `trajectory_shards` wrote, but unreadable ones.

    Raises:
        DataError: no such folder of shards, or its manifest says nothing of trajectories.
    """
    manifest = Manifest.load(folder)
    made = manifest.meta.get("trajectories")
    if not isinstance(made, dict):
        raise DataError(f"{folder} holds {manifest.kind} without trajectories; `tokgen trajectories` finds them")
    frames = Frames(made["size"], made["resize"], made["grid"][0], made["fps"])
    everything = units_of(manifest, max(manifest.samples, 1))
    for raw in (raw for unit in everything for raw in unit.samples(folder, (*VIDEO_EXTENSIONS, TRAJECTORIES))):
        data = next((raw.members[e] for e in VIDEO_EXTENSIONS if e in raw.members), None)
        if raw.problem or data is None or TRAJECTORIES not in raw.members:
            continue
        with contextlib.suppress(BadSample, DataError):
            pictures = read_pictures(data, frames, raw.key)
            shape = (len(pictures.frames), *made["grid"])
            labels = decode_trajectories(raw.members[TRAJECTORIES], shape).astype(np.int32) - 1
            yield raw.key, pictures, Trajectories(labels)


def _check_begun(out: str | os.PathLike[str], made: dict[str, Any]) -> None:
    """Raises DataError that says how what `out` holds differs from what is asked for now."""
    before = (begun_meta(out) or {}).get("trajectories")
    for fact in made if before else ():
        if before.get(fact) != made[fact]:
            raise DataError(
                f"{out} holds trajectories with {fact} {before.get(fact)}, and this run has {made[fact]}; "
                "give another folder or remove this one"
            )


def _found(
    samples: Iterator[RawSample], finder: Finder, pool: ProcessPoolExecutor | None, workers: int
) -> Iterator[tuple[RawSample, np.ndarray | BadSample]]:
    """Samples in their order, and their planes or what is wrong with them."""
    if pool is None:
        for raw in samples:
            yield raw, _planes(finder, raw)
        return
    waiting: deque[tuple[RawSample, Future]] = deque()
    try:
        for raw in samples:
            waiting.append((raw, pool.submit(_work, raw)))
            if len(waiting) > 2 * workers:  # no more videos in memory than keep all of them busy
                raw, future = waiting.popleft()
                yield raw, future.result()
        while waiting:
            raw, future = waiting.popleft()
            yield raw, future.result()
    except BrokenProcessPool:
        raise DataError(
            f"a process that finds trajectories died at video {raw.key} or soon after it; whole shards are kept, and "
            "workers=0 shows where"
        ) from None


def _planes(finder: Finder, raw: RawSample) -> np.ndarray | BadSample:
    data = next((raw.members[e] for e in VIDEO_EXTENSIONS if e in raw.members), None)
    try:
        if raw.problem or data is None:
            raise BadSample(raw.problem or "no video")
        _, found = finder(raw.key, data)
        return found.to_sidecar()[0]
    except BadSample as bad:
        return bad
    except UnreadableVideo as error:
        return BadSample(error.reason, str(error))
    except (DataError, InputError) as error:
        return BadSample(
            "unreadable trajectories" if isinstance(error, DataError) else "not taken by the source", str(error)
        )


_finder: Finder | None = None  # of a worker process


def _begin(settings: Mapping[str, Any], frames: Frames) -> None:
    global _finder
    torch.set_num_threads(1)  # there is a process for each core
    _finder = Finder(settings, frames)


def _work(raw: RawSample) -> np.ndarray | BadSample:
    return _planes(_finder, raw)


# ------------------------------------------------------------------------------------------------------------- one file


def trajectory_sidecar(
    file: str | os.PathLike[str],
    stem: str | os.PathLike[str],
    settings: Mapping[str, Any],
    frames: Frames = Frames(),
) -> tuple[Pictures, Trajectories]:
    """The trajectories of one video, written as TrajViT's loader reads them: `STEM_mask.npz` and `STEM_graph.npz`.

    Args:
        file: a video.
        stem: of the files to write.
        settings, frames: as in `trajectory_shards`; of arrays, the video's key is its name without the end.

    Raises:
        DataError: it cannot be read, is too long, or has no trajectories.
        ConfigError: unknown source or settings.
    """
    finder = Finder(settings, frames)
    try:
        pictures, found = finder(Path(file).stem, file)
    except BadSample as bad:
        raise DataError(f"{file} is not given trajectories ({bad})") from None
    found.save(stem)
    return pictures, found
