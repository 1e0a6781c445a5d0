"""Makes small real videos whose frames tell their number."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

BITS, CELL = 8, 8  # the number is drawn as blocks along the upper edge, lowest bit first


def barcode(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture of that number over a pattern that moves, uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([x + 3 * number, y + 2 * number, x + y + 5 * number], -1)
    frame = (128 + 50 * np.sin(waves / 9.0)).astype(np.uint8)
    for bit in range(BITS):
        frame[:CELL, bit * CELL : (bit + 1) * CELL] = 255 if number >> bit & 1 else 0
    return frame


def number(frame: np.ndarray) -> int:
    """The number drawn in a picture of 64 pixels width or a crop of the same; uint8 (H, W, 3)."""
    cells = frame[2 : CELL - 2, : BITS * CELL].astype(int).mean(-1).mean(0).reshape(BITS, CELL)[:, 2:-2].mean(1)
    return sum(int(cell > 128) << bit for bit, cell in enumerate(cells))


def numbers(frames: Sequence[np.ndarray]) -> list[int]:
    return [number(frame) for frame in frames]


def video(
    count: int = 40,
    codec: str = "libx264",
    format: str = "mp4",
    gop: int = 12,
    rate: int = 30,
    height: int = 48,
    width: int = 64,
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    start: int = 0,
    rotation: int = 0,
    audio: bool = False,
    mux: dict[str, str] | None = None,
    **options: Any,
) -> bytes:
    """An encoded video of the pictures 0 … count - 1.

    Args:
        times: of each frame, in ticks of 1 / rate; even without.
        start: the first frame's number.
        rotation: degrees in the display matrix.
    """
    file = io.BytesIO()
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    settings = {"g": str(gop), **quiet, **{name: str(value) for name, value in options.items()}}
    with av.open(file, "w", format=format, container_options=mux or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=settings)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = Fraction(1, rate)
        if rotation:
            stream.set_display_rotation(rotation)
        if audio:
            sound = out.add_stream("aac", rate=8000, layout="mono")
            quiet_frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            quiet_frame.sample_rate, quiet_frame.pts = 8000, 0
            out.mux(sound.encode(quiet_frame))
            out.mux(sound.encode())
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(barcode(start + i, height, width), format="rgb24")
            frame.pts, frame.time_base = (i if times is None else times[i]), Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def sound_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        sound = out.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        out.mux(sound.encode(frame))
        out.mux(sound.encode())
    return file.getvalue()
