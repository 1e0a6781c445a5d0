"""Reading videos: 16 frames spread over a clip, opened each time, against PyAV and decord as one would call them; one thread."""

from __future__ import annotations

import io
import statistics
import time
from functools import partial

import av
import numpy as np

from tests.data.video_makers import numbers, video
from tokgen.data.decoders import AvDecoder, importable
from tokgen.data.video import _current, open_video

FRAMES, WIDTH, HEIGHT, PICKED, ROUNDS = 240, 480, 320, 16, 25


def _ours(data: bytes, wanted: np.ndarray, backend: str) -> np.ndarray:
    with open_video(data, backend) as reader:
        return reader.get_frames(wanted)


def _here(data: bytes, wanted: np.ndarray) -> np.ndarray:
    """Our decoder of PyAV without the process around it."""
    return np.stack(list(AvDecoder(data, 1 << 26).frames(wanted.tolist())))


def _pyav(data: bytes, wanted: np.ndarray) -> np.ndarray:
    """The usual loop: seek to each frame's time, decode forward until it comes."""
    frames = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        step = round(1 / (stream.average_rate * stream.time_base))
        for index in wanted.tolist():
            container.seek(index * step, stream=stream)
            frames.append(next(f for f in container.decode(stream) if f.pts >= index * step).to_ndarray(format="rgb24"))
    return np.stack(frames)


def _decord(data: bytes, wanted: np.ndarray) -> np.ndarray:
    import decord

    return decord.VideoReader(io.BytesIO(data), num_threads=1).get_batch(wanted).asnumpy()


def _processor() -> float:
    """Seconds of processor time that this process and its decoder's have taken, all threads, those that ended too (Linux)."""
    clocks = [~process._process.pid << 3 | 2 for process in _current]  # what clock_getcpuclockid(3) gives
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def run() -> list[dict]:
    """Milliseconds of processor time from bytes to 16 frames of 240, medians of alternating rounds, for two distances of
    keyframes."""
    rows = []
    for gop in (12, 250):
        data = video(FRAMES, gop=gop, height=HEIGHT, width=WIDTH)
        wanted = np.linspace(0, FRAMES - 1, PICKED).astype(np.int64)
        readers = {"av": partial(_ours, backend="av"), "av, no process": _here, "PyAV": _pyav}
        if not importable("decord"):
            readers |= {"decord": partial(_ours, backend="decord"), "raw decord": _decord}
        if not importable("torchcodec"):
            readers["torchcodec"] = partial(_ours, backend="torchcodec")
        times: dict[str, list[float]] = {name: [] for name in readers}
        for name, read in readers.items():  # once before, and the very frames
            assert numbers(read(data, wanted)) == wanted.tolist(), name
        for _ in range(ROUNDS):
            for name, read in readers.items():
                started = _processor()
                read(data, wanted)
                times[name].append(_processor() - started)
        median = {name: 1e3 * statistics.median(found) for name, found in times.items()}
        for ours in ("av", "av, no process", "decord", "torchcodec"):
            for peer in ("PyAV", "raw decord"):
                if ours in median and peer in median:
                    note = f"{PICKED} of {FRAMES} frames of {WIDTH} x {HEIGHT}, H.264, open included; peer: {peer}"
                    ratio = median[ours] / median[peer]
                    row = {"name": f"{ours}, gop {gop}", "ours": median[ours], "peer": median[peer], "ratio": ratio}
                    rows.append({**row, "unit": "ms", "note": note})
    return rows


if __name__ == "__main__":
    from tests.benchmarks.__main__ import table

    print(table(run()))
