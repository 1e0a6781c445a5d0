"""Motion of video clips, as Video-LaVIT's motion tokenizer reads it (arXiv 2402.03161, section 3.1 and appendix).

A clip is 24 frames at 6 per second, in two groups of one keyframe and eleven frames after it. Motion is one displacement for
each block of 16 x 16 pixels of each frame: how far its content has moved since the frame before, to the right and down. It
comes from

    codec_motion    the encoder of MPEG-4 part 2, which the clip is passed through in memory, as published
    match_blocks    a search of our own: no codec needed, and only whole pixels
    anything else   such as optical flow: an array (24, 2, h, w) of displacements in pixels

and `motion_map` makes maps (24, 2, 20, 36) of it. `motion_shards` does all that to a folder of videos.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokgen.data.decode import MAX_MEMBER_BYTES, MAX_PIXELS, VIDEO_EXTENSIONS, BadSample, decode_caption
from tokgen.data.shards import Manifest, ShardWriter, safe_key
from tokgen.data.tar import iter_samples, join, open_bytes
from tokgen.errors import ConfigError, DataError, InputError, MissingDependency

log = logging.getLogger(__name__)

FRAMES, HEIGHT, WIDTH = 24, 20, 36  # of a motion map
GROUP = 12  # frames from one keyframe to the next
FPS = 6.0
BLOCK = 16  # pixels, both sides
# of displacements to the right and down, as parts of the frame's width and height (the mean is 0), and what maps are
# multiplied by beyond that; published
STD = (0.0993703, 0.1130276)
SCALE = 10.0

UNSET = -10_000.0
MAX_STILL = 60.0  # seconds that a frame may stay on the screen: more is a damaged time stamp
CONTAINERS = "mov,mp4,matroska,webm,avi"  # the demuxers that may look at a file; others can open files and addresses


# --------------------------------------------------------------------------------------------------------------- frames


def read_clips(
    source: str | os.PathLike[str] | bytes, fps: float = FPS, side: int = 640, name: str | None = None
) -> Iterator[Tensor]:
    """The clips of a video, one after the other: uint8 (24, 3, H, W), `fps` frames a second; a rest too short is left out.

    At time k / fps stands the frame that is on the screen then.

    Args:
        source: a file (mp4, mov, webm, mkv, avi), or its bytes.
        side: larger pictures are shrunk until their longer side has this many pixels. The published code takes clips at
            about this size; blocks of 16 pixels then give about as many vectors as a map has places.
        name: of the source, for messages; its path if None.

    Raises:
        DataError: the file is missing, damaged, no video, or too large to be decoded; the message names it.
        MissingDependency: PyAV is not installed.
    """
    if not fps > 0 or side < 2 * BLOCK:
        raise ConfigError(f"read_clips: fps {fps}, side {side}; expected fps above 0 and side of at least {2 * BLOCK}")
    name = name or ("a video" if isinstance(source, bytes) else os.fspath(source))
    frames: list[Tensor] = []
    for frame in _frames_at(source, fps, side, name):
        frames.append(frame)
        if len(frames) == FRAMES:
            yield torch.stack(frames)
            frames = []


def _frames_at(source: str | os.PathLike[str] | bytes, fps: float, side: int, name: str) -> Iterator[Tensor]:
    """The frames on the screen at 0, 1 / fps, 2 / fps, …, each uint8 (3, H, W)."""
    av = _av()
    try:
        # an open file, not a path: a name can then not be taken for an address
        opened = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
    except OSError as error:
        raise DataError(f"{name} cannot be opened: {error.strerror or error}") from None
    try:
        with opened as file:
            with av.open(file, "r", options={"format_whitelist": CONTAINERS}) as container:
                if not container.streams.video:
                    raise DataError(f"{name} holds no video; expected one of {', '.join(VIDEO_EXTENSIONS)}")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise DataError(f"{name} holds video of a kind that no decoder here knows; convert it to H.264")
                width, height = stream.width, stream.height
                if not 0 < width * height <= MAX_PIXELS:
                    raise DataError(f"{name} has frames of {width} x {height}; at most {MAX_PIXELS} pixels are taken")
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
                scale = min(1.0, side / max(width, height))
                # even, as codecs that halve the colour want it
                width, height = (max(BLOCK, round(n * scale / 2) * 2) for n in (width, height))
                for frame in _at_rate(container.decode(stream), float(stream.average_rate or fps), fps):
                    pixels = frame.to_ndarray(format="rgb24", width=width, height=height)  # (H, W, 3)
                    yield torch.from_numpy(pixels).permute(2, 0, 1)
    except av.FFmpegError as error:
        raise DataError(f"{name} cannot be read as a video: {error.strerror or error}") from None
    except (OSError, ValueError, IndexError, EOFError) as error:
        raise DataError(f"{name} cannot be read as a video: {error}") from None


def _at_rate(frames: Iterable[Any], rate: float, fps: float) -> Iterator[Any]:
    """Of frames that come at about `rate` a second, those on the screen at 0, 1 / fps, … after the first."""
    shown, since, start, wanted = None, 0.0, 0.0, 0
    for frame in frames:
        at = since + 1 / rate if frame.time is None else frame.time
        if shown is None:
            start = at
        elif at - since > MAX_STILL:
            raise ValueError(f"a frame stays for {at - since:.0f} seconds, so its time stamps are damaged")
        while shown is not None and start + wanted / fps < at - 1e-6:
            yield shown
            wanted += 1
        shown, since = frame, at
    while shown is not None and start + wanted / fps < since + 1 / rate - 1e-6:
        yield shown
        wanted += 1


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingDependency("reading videos needs PyAV: pip install 'tokgen[video]'") from None
    return av


# -------------------------------------------------------------------------------------------------------------- vectors


def codec_motion(frames: Tensor, quality: int = 3) -> Tensor:
    """Motion vectors of the encoder of MPEG-4 part 2: float (T, 2, H // 16, W // 16), pixels to the right and down.

    The clip is encoded in memory, a keyframe every 12 frames and no others, no frames predicted from later ones, and the
    vectors are read off the stream (`vector_map`). Keyframes have none: 0 there, to be filled in by `motion_map`.

    Args:
        frames: uint8 (T, 3, H, W), sizes even and at least 16.
        quality: the encoder's quantizer, 1 (best) to 31. Not published; with coarse pictures the encoder saves bits by
            vectors that do not follow the content.

    Raises:
        InputError: frames of another kind. MissingDependency: PyAV is not installed.
    """
    _check_frames(frames)
    if frames.shape[2] % 2 or frames.shape[3] % 2:
        raise InputError(f"frames are {frames.shape[2]} x {frames.shape[3]}; the codec needs even sizes")
    av = _av()
    height, width = frames.shape[-2:]
    file = io.BytesIO()
    # a high threshold keeps changes of scene from becoming keyframes; 118 is FFmpeg's FF_QP2LAMBDA
    options = {"g": str(GROUP), "bf": "0", "sc_threshold": "1000000000", "flags": "+qscale"}
    options["global_quality"] = str(118 * quality)
    with av.open(file, "w", format="avi") as out:
        stream = out.add_stream("mpeg4", rate=int(FPS), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    file.seek(0)
    maps = torch.zeros(len(frames), 2, height // BLOCK, width // BLOCK)
    with av.open(file, "r", format="avi") as back:
        stream = back.streams.video[0]
        stream.codec_context.options = {"flags2": "+export_mvs"}
        for t, frame in enumerate(back.decode(stream)):
            vectors = frame.side_data.get("MOTION_VECTORS")
            if vectors is not None:
                maps[t] = vector_map(vectors.to_ndarray(), height, width)
    return maps


def vector_map(vectors: np.ndarray, height: int, width: int) -> Tensor:
    """One frame's motion vectors as a map, float (2, height // 16, width // 16), pixels to the right and down.

    As published: a vector is source * motion / scale, written at the pixel where its block lies (its middle, `dst_x`,
    `dst_y`, as FFmpeg gives it) into a map of -10000, of which the maximum over each 16 x 16 pixels is taken, for both
    directions apart; 0 where there was no vector (blocks coded without one). A last row or column of less than 16 pixels
    is dropped.

    Args:
        vectors: structured, with fields source, dst_x, dst_y, motion_x, motion_y, motion_scale (FFmpeg's AVMotionVector).
    """
    rows, columns = height // BLOCK, width // BLOCK
    scale = vectors["source"] / np.maximum(vectors["motion_scale"], 1)
    moved = np.stack([scale * vectors["motion_x"], scale * vectors["motion_y"]]).astype(np.float32)  # (2, n)
    row, column = vectors["dst_y"].astype(np.int64) // BLOCK, vectors["dst_x"].astype(np.int64) // BLOCK
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    at = torch.from_numpy(row[inside] * columns + column[inside])
    out = torch.full((2, rows * columns), UNSET)
    # the maximum over a cell of the big map, without the big map
    out.scatter_reduce_(1, at.expand(2, -1), torch.from_numpy(moved[:, inside]), "amax")
    return torch.where(out == UNSET, 0.0, out).unflatten(1, (rows, columns))


def match_blocks(frames: Tensor, search: int = 16) -> Tensor:
    """Motion by block matching: float (T, 2, H // 16, W // 16), whole pixels to the right and down; 0 in the first frame.

    For each block of 16 x 16 pixels of a frame, the displacement within `search` at which the frame before differs least
    (sum of absolute differences of luma): tried in steps of two pixels at half the resolution, then refined by one pixel. A
    small charge on length makes flat areas rest. The same frames give the same vectors everywhere, without any codec.

    Args:
        frames: uint8 (T, 3, H, W), sizes at least 16.
        search: pixels in each direction.
    """
    _check_frames(frames)
    if search < 2:
        raise ConfigError(f"match_blocks: search {search}; expected at least 2 pixels")
    rows, columns = frames.shape[2] // BLOCK, frames.shape[3] // BLOCK
    luma = frames[:, :, : rows * BLOCK, : columns * BLOCK].float()
    luma = (luma * luma.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)  # (T, 1, H, W)
    out = luma.new_zeros(len(frames), 2, rows, columns)
    if len(frames) < 2:
        return out

    # at half the resolution every displacement is tried on all frames at once
    half = F.avg_pool2d(luma, 2)
    reach, (h, w) = search // 2, half.shape[-2:]
    before, now = F.pad(half[:-1], (reach,) * 4, mode="replicate"), half[1:]
    best = now.new_full((len(now), 1, rows, columns), float("inf"))
    coarse = torch.zeros(len(now), 2, rows, columns)
    # from rest outwards, so that of equals the shortest stays
    shifts = sorted((dx * dx + dy * dy, dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1))
    for length, dy, dx in shifts:
        there = before[:, :, reach - dy : reach - dy + h, reach - dx : reach - dx + w]
        cost = F.avg_pool2d((now - there).abs(), BLOCK // 2) + 0.02 * length**0.5  # (T - 1, 1, rows, columns)
        better = cost < best
        best = torch.where(better, cost, best)
        coarse = torch.where(better, coarse.new_tensor([dx, dy]).view(2, 1, 1), coarse)

    # at full resolution, one pixel around each block's own
    y = torch.arange(rows * BLOCK).view(-1, 1)  # (H, 1)
    x = torch.arange(columns * BLOCK)
    dx, dy = (2 * coarse).long().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3).unbind(1)  # (T - 1, H, W)
    best = now.new_full((len(now), rows, columns), float("inf"))
    for ry, rx in sorted(((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)), key=lambda r: r[0] ** 2 + r[1] ** 2):
        row, column = (y - dy - ry).clamp(0, len(y) - 1), (x - dx - rx).clamp(0, len(x) - 1)
        there = luma[:-1].flatten(1).gather(1, (row * len(x) + column).flatten(1)).view(len(now), len(y), len(x))
        cost = F.avg_pool2d((luma[1:, 0] - there).abs(), BLOCK)
        fine = 2 * coarse + coarse.new_tensor([rx, ry]).view(2, 1, 1)
        cost = cost + 0.01 * fine.square().sum(1).sqrt()
        better = cost < best
        best = torch.where(better, cost, best)
        out[1:] = torch.where(better[:, None], fine, out[1:])
    return out


def _check_frames(frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or min(frames.shape[2:]) < BLOCK:
        raise InputError(
            f"frames are {frames.dtype} {tuple(frames.shape)}; expected uint8 (T, 3, H, W) of at least {BLOCK} x {BLOCK}"
        )


METHODS = {"codec": codec_motion, "match": match_blocks}


# ----------------------------------------------------------------------------------------------------------------- maps


def motion_map(vectors: Tensor, height: int, width: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Tensor:
    """Displacements as the map that a motion tokenizer reads: float32 (T, 2, 20, 36).

    Divided by the frame's width and height and by `STD`, times `SCALE`; then resized (bicubic, corners not aligned: what
    PyTorch does unless told otherwise; the publication says bicubic only). Keyframes have no motion of their own: in the
    first of the clip it is 0, and in each later one (frame 12) the mean of its two neighbours, whatever `vectors` says, so
    that vectors of all origins give maps of one kind.

    Args:
        vectors: float (T, 2, h, w), pixels to the right and down since the frame before, at the frame's blocks or pixels.
        height, width: of the frames that the displacements are of, in pixels.
        size: of the map.

    Raises:
        InputError: another shape, or numbers that are not finite.
    """
    if vectors.ndim != 4 or vectors.shape[1] != 2 or not vectors.is_floating_point() or len(vectors) < 2:
        raise InputError(
            f"motion vectors are {vectors.dtype} {tuple(vectors.shape)}; expected float (T, 2, h, w): pixels to the right and down"
        )
    if not torch.isfinite(vectors).all():
        raise InputError("motion vectors hold numbers that are not finite; give 0 where the motion is unknown")
    motion = vectors.float() / _units(height, width, SCALE, vectors.device)
    motion[0] = 0
    for t in range(GROUP, len(motion), GROUP):
        motion[t] = (motion[t - 1] + motion[t + 1]) / 2 if t + 1 < len(motion) else motion[t - 1]
    if motion.shape[2:] == size:
        return motion
    return F.interpolate(motion, size=size, mode="bicubic", align_corners=False)


def displacements(motion: Tensor, height: int, width: int, scale_factor: float = SCALE) -> Tensor:
    """Pixels to the right and down of motion maps (..., 2, h, w), for frames of height x width; undoes `motion_map`'s units.

    Args:
        scale_factor: 1 for what `MotionTokenizer.reconstruct` gives.
    """
    return motion.float() * _units(height, width, scale_factor, motion.device)


def _units(height: int, width: int, scale: float, device: torch.device) -> Tensor:
    """Pixels that 1 in a map stands for, (2, 1, 1)."""
    return torch.tensor([width * STD[0] / scale, height * STD[1] / scale], device=device).view(2, 1, 1)


# --------------------------------------------------------------------------------------------------------------- shards


@dataclass
class MotionReport:
    """Clips written by this call and already there before it, and videos left out, by reason."""

    written: int = 0
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def __str__(self) -> str:
        text = f"motion of {self.written} clips written"
        if self.kept:
            text += f", {self.kept} kept from an earlier run"
        if self.skipped:
            text += ", videos left out: " + ", ".join(f"{n} ({reason})" for reason, n in sorted(self.skipped.items()))
        return text


def motion_shards(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str = "codec",
    fps: float = FPS,
    side: int = 640,
    clips: int | None = None,
    max_samples: int = 2_000,
    progress: bool = True,
) -> MotionReport:
    """Find the motion of every clip of a set of videos and write it as motion shards, which motion tokenizers train on.

    A sample is `KEY.npy`, float16 (24, 2, 20, 36), and `KEY.txt` where its video has a caption. A run that was interrupted
    continues where its last whole shard ended. Videos that cannot be read, or are shorter than a clip (4 seconds at 6
    frames a second), are left out, counted and named in the log.

    Args:
        source: a folder of videos (mp4, mov, webm, mkv; NAME.txt beside NAME.mp4 is its caption), or of video shards, as
            `tokgen pack` writes them.
        out: folder of the motion shards.
        method: "codec" (MPEG-4 part 2 motion vectors, as published) or "match" (block matching).
        fps: frames a second; the publication has 6.
        side: longer side that larger pictures are shrunk to, in pixels.
        clips: of each video, at most; None takes all.
        max_samples: samples in a shard, and so the most that an interruption costs.
        progress: show a progress bar.

    Raises:
        DataError: no videos there, none that gives a clip, or `out` was made with other options.
        ConfigError: unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r} to find motion; expected one of {', '.join(METHODS)}")
    if clips is not None and clips < 1:
        raise ConfigError(f"clips is {clips}; expected at least 1, or None for all")
    videos = _Videos(source)
    meta = {
        "shape": [FRAMES, 2, HEIGHT, WIDTH],
        "std": list(STD),
        "scale_factor": SCALE,
        "motion": {"method": method, "fps": fps, "side": side, "clips": clips},
        "source": {"folder": Path(source).name},
    }
    report = MotionReport()
    with ShardWriter(out, kind="motion", meta=meta, max_samples=max_samples, resume=True) as writer:
        report.kept = writer.samples
        done = {key.rpartition("_")[0] for key in writer.keys}  # videos of which there are clips already
        problem = ""
        for key, name, data, caption in videos.track(progress):
            # the last of them may have been cut short by the end of a shard
            if key in done and len(done) > 1:
                done.remove(key)
                continue
            try:
                if isinstance(data, BadSample):
                    raise data
                found = 0
                for i, frames in enumerate(read_clips(data, fps, side, name)):
                    if i == clips:
                        break
                    found += 1
                    clip = f"{key}_{i:04d}"
                    if clip in writer.keys:
                        continue
                    motion = motion_map(METHODS[method](frames), *frames.shape[-2:])
                    members: dict[str, Any] = {"npy": motion.numpy().astype(np.float16)}
                    writer.write(clip, {**members, **({"txt": caption} if caption else {})})
                    report.written += 1
                if not found:
                    raise BadSample("too short", f"less than {FRAMES} frames at {fps:g} a second")
            except (BadSample, DataError) as error:
                report.skip(error.reason if isinstance(error, BadSample) else "unreadable")
                problem = problem or (f"{name}: {error}" if isinstance(error, BadSample) else str(error))
                log.warning("Left out a video: %s.", f"{name}: {error}" if isinstance(error, BadSample) else error)
        if not writer.samples:
            raise DataError(f"{source} gives no clip; the first video left out: {problem or 'there is none'}")
    return report


class _Videos:
    """The videos of a folder, or of a folder of video shards, in an order that is always the same."""

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.source = os.fspath(source)
        folder = Path(source)
        self.files: list[Path] = []
        self.manifest: Manifest | None = None
        if folder.is_dir() and not any(folder.glob("manifest*.json")):
            found = (f for f in folder.rglob("*") if f.suffix[1:].lower() in VIDEO_EXTENSIONS and f.is_file())
            self.files = sorted(found)
            if not self.files:
                raise DataError(f"{source} holds no videos; expected files such as .{', .'.join(VIDEO_EXTENSIONS)}")
            return
        self.manifest = Manifest.load(source)
        if self.manifest.kind != "videos":
            raise DataError(
                f"{source} holds {self.manifest.kind}; expected videos, in a folder or packed by `tokgen pack`"
            )

    def track(self, progress: bool) -> Iterator[tuple[str, str, Any, str]]:
        """(key, name, path or bytes or what is wrong, caption) of each; keys are all different."""
        from rich.progress import track

        total = len(self.files) if self.manifest is None else self.manifest.samples
        videos: Iterable[tuple[str, str, Any, str]] = self._of_shards() if self.manifest else self._of_folder()
        taken: set[str] = set()
        for name, where, data, caption in track(videos, "finding motion", total) if progress else videos:
            base = key = safe_key(name, 70)
            number = 1
            while key in taken:
                key, number = f"{base}-{number}", number + 1
            taken.add(key)
            yield key, where, data, caption

    def _of_folder(self) -> Iterator[tuple[str, str, Any, str]]:
        for path in self.files:
            text = path.with_suffix(".txt")
            caption: str | None = ""
            try:
                caption = decode_caption({"txt": text.read_bytes()}) if text.is_file() else ""
            except BadSample as bad:
                yield path.relative_to(self.source).with_suffix("").as_posix(), str(path), bad, ""
                continue
            yield path.relative_to(self.source).with_suffix("").as_posix(), str(path), path, caption or ""

    def _of_shards(self) -> Iterator[tuple[str, str, Any, str]]:
        for shard in self.manifest.shards:
            with open_bytes(join(self.source, shard.name)) as file:
                extensions = (*VIDEO_EXTENSIONS, "txt", "json")
                for _, raw in iter_samples(file, extensions=extensions, max_member_bytes=MAX_MEMBER_BYTES):
                    data: Any = next((raw.members[e] for e in VIDEO_EXTENSIONS if e in raw.members), None)
                    caption: str | None = ""
                    try:
                        if raw.problem or data is None:
                            raise BadSample(raw.problem or "no video")
                        caption = decode_caption(raw.members)
                    except BadSample as bad:
                        data = bad
                    yield raw.key, f"{raw.key} in {join(self.source, shard.name)}", data, caption or ""
