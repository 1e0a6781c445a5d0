"""Trajectories to look at, in stable colours over their clip: a picture, a GIF or an MP4; and the writers of clips."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from tokgen.errors import InputError, MissingDependency
from tokgen.files import replacing
from tokgen.trajectories.base import Trajectories, as_frames

# -------------------------------------------------------------------------------------------------------------- colours


def colours(count: int) -> np.ndarray:
    """A colour for each of the trajectories 0 .. count - 1, uint8 (count, 3); a number has the same one in every clip.

    Hues are a golden section of the circle apart, so that any few that follow each other differ; lightness takes turns.
    """
    number = np.arange(count)
    hue = (number * 0.6180339887498949) % 1.0
    saturation = np.array([0.85, 0.6, 1.0])[number % 3]
    value = np.array([1.0, 0.8, 0.6, 0.95])[number // 3 % 4]
    wheel = np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1  # HSV's red, green and blue
    rgb = value[:, None] * (1 - saturation[:, None] * (1 - wheel.clip(0, 1)))
    return np.rint(255 * rgb).astype(np.uint8)


def boundaries(labels: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour has another label, bool (T, H, W)."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :, :-1] |= labels[:, :, :-1] != labels[:, :, 1:]
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return edge


def overlay(frames: np.ndarray, trajectories: Trajectories, opacity: float = 0.6) -> np.ndarray:
    """Trajectories over their clip, uint8 (T, H, W, 3): colours with white boundaries; what has none stays as it is.

    Args:
        frames: a clip, see `TrajectorySource`; its grid may be finer than that of the trajectories.
        opacity: of the colours, 0 to 1.

    Raises:
        InputError: another number of frames than the trajectories have, or an opacity outside of 0 to 1.
    """
    frames = as_frames(frames)
    if len(frames) != trajectories.shape[0]:
        raise InputError(
            f"{len(frames)} frames, and trajectories of {trajectories.shape[0]}; they belong to different clips"
        )
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity is {opacity}; expected 0 to 1")
    labels = trajectories.resized(*frames.shape[1:3]).labels  # (T, H, W)
    tints = colours(max(1, trajectories.count))[labels.clip(0)]  # (T, H, W, 3)
    mixed = np.rint(frames * (1 - opacity) + tints * opacity).astype(np.uint8)
    mixed = np.where((labels >= 0)[..., None], mixed, frames)
    mixed[boundaries(labels)] = 255
    return mixed


# ------------------------------------------------------------------------------------------------------------- pictures


def _rows(frames: np.ndarray, trajectories: Trajectories, reconstruction: np.ndarray | None) -> list[np.ndarray]:
    frames = as_frames(frames)
    rows = [frames, overlay(frames, trajectories)]
    if reconstruction is not None:
        rows.append(as_frames(reconstruction))
        if rows[2].shape != frames.shape:
            raise InputError(f"a reconstruction {rows[2].shape} of a clip {frames.shape}; expected the same shape")
    return rows


def picture(
    frames: np.ndarray, trajectories: Trajectories, reconstruction: np.ndarray | None = None, columns: int = 8
) -> np.ndarray:
    """A clip, its trajectories and, if given, its reconstruction as rows of frames with gaps: uint8 (height, width, 3).

    Args:
        frames, reconstruction: clips, see `TrajectorySource`.
        columns: frames shown, at most; evenly from the first to the last.

    Raises:
        InputError: clips that do not belong together.
    """
    rows = _rows(frames, trajectories, reconstruction)
    count = min(max(1, columns), len(rows[0]))
    shown = np.rint(np.linspace(0, len(rows[0]) - 1, count)).astype(int)
    gap = ((1, 1), (1, 1), (0, 0))
    lines = [np.concatenate([np.pad(row[i], gap, constant_values=255) for i in shown], 1) for row in rows]
    return np.concatenate(lines)


def film(frames: np.ndarray, trajectories: Trajectories, reconstruction: np.ndarray | None = None) -> np.ndarray:
    """The same side by side, as a clip: uint8 (T, H, 2 or 3 times W, 3)."""
    return np.concatenate(_rows(frames, trajectories, reconstruction), 2)


def write_picture(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    trajectories: Trajectories,
    reconstruction: np.ndarray | None = None,
    *,
    fps: float = 8.0,
    columns: int = 8,
) -> Path:
    """Write `picture` (.png) or `film` (.gif or .mp4), by the name's end. Raises InputError for another."""
    from PIL import Image

    path = check_picture(path)
    if path.suffix.lower() != ".png":
        return write_video(film(frames, trajectories, reconstruction), path, fps)
    drawn = Image.fromarray(picture(frames, trajectories, reconstruction, columns))
    with replacing(path) as partial:
        drawn.save(partial, format="PNG")
    return path


def check_picture(path: str | os.PathLike[str]) -> Path:
    """The path. Raises InputError if `write_picture` could not write it, which is known so before the work is done."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".gif", ".mp4"):
        raise InputError(
            f"trajectories are drawn as .png, .gif or .mp4; give a name that ends so instead of {path.name!r}"
        )
    return path


# ---------------------------------------------------------------------------------------------------------------- clips


def write_video(frames: np.ndarray, path: str | os.PathLike[str], fps: float = 8.0, crf: int = 18) -> Path:
    """Write a clip as .gif or .mp4, whole or not at all.

    Args:
        frames: a clip, see `TrajectorySource`.
        fps: frames a second; of a GIF, as its hundredths of a second allow.
        crf: of an MP4, see `mp4_bytes`.

    Raises:
        InputError: no clip, a rate that is not positive, or a name that ends otherwise.
        MissingDependency: an MP4 without PyAV.
    """
    path, frames = Path(path), as_frames(frames)
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise InputError(f"clips are written as .gif or .mp4; give a name that ends so instead of {path.name!r}")
    data = mp4_bytes(frames, fps, crf) if path.suffix.lower() == ".mp4" else gif_bytes(frames, fps)
    with replacing(path) as partial:
        partial.write_bytes(data)
    return path


def gif_bytes(frames: np.ndarray, fps: float = 8.0) -> bytes:
    """A clip as a GIF that repeats: 255 colours for the whole clip, without dithering, so that still parts stay."""
    from PIL import Image

    frames, fps = as_frames(frames), _rate(fps)
    t = len(frames)
    some = frames[np.linspace(0, t - 1, min(t, 16)).astype(int)].reshape(-1, frames.shape[2], 3)
    palette = Image.fromarray(some).quantize(255, method=Image.Quantize.MEDIANCUT)
    pages = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    ends = np.rint(np.arange(t + 1) * 100 / float(fps))  # hundredths of a second; most viewers show no less than two
    lengths = [10 * int(d) for d in np.maximum(2, np.diff(ends))]
    file = io.BytesIO()
    pages[0].save(
        file, "GIF", save_all=True, append_images=pages[1:], duration=lengths if t > 1 else lengths[0], loop=0
    )
    return file.getvalue()


def mp4_bytes(frames: np.ndarray, fps: float = 8.0, crf: int = 18, keyframes: int = 12) -> bytes:
    """A clip as MP4: H.264, or MPEG-4 part 2 where PyAV has no encoder of it; yuv420p, which every player takes.

    Odd sides grow by one (the edge repeated), as the format wants even ones. The same frames give the same bytes with the
    same encoder.

    Args:
        crf: quality of H.264, 0 (all of it) to 51; 18 looks like the original, 12 serves as training data.
        keyframes: from one to the next, at most; few make reading single frames fast.

    Raises:
        InputError: no clip, or a rate that is not positive.
        MissingDependency: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise MissingDependency('writing MP4 needs PyAV; install it with pip install "tokgen[video]"') from None
    frames, fps = as_frames(frames), _rate(fps)
    h, w = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    codec, options = "libx264", {"crf": str(crf), "preset": "medium", "g": str(keyframes)}
    if codec not in av.codecs_available:  # quality 118 is the unit of its scale; 2 is the best but one
        codec, options = "mpeg4", {"flags": "+qscale", "global_quality": str(118 * 2), "g": str(keyframes)}
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def _rate(fps: float) -> Fraction:
    if not 0 < fps <= 1000:
        raise InputError(f"{fps} frames a second; expected more than 0, up to 1000")
    return Fraction(fps).limit_denominator(1001)
