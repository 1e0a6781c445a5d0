"""Videos as arrays: `open_video` gives the frames that are asked for, exactly those, and never takes the process down.

All decoding happens in a process of its own (`tokgen.data.decoders` says why), one for each process that reads, started
with the first video and again whenever a file has killed it. It costs a copy of the pixels through a pipe, and the memory
of a Python with a decoder in it. It is never shared across a fork: a reader that is carried over opens its video anew.

>>> with open_video("clip.mp4") as video:
...     frames = video.get_frames(video.timeline(fps=8)[:16])  # uint8 (16, H, W, 3)
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokgen.data.decode import MAX_PIXELS
from tokgen.data.decoders import DECODERS, MAX_FRAMES
from tokgen.errors import ConfigError, DataError, InputError, MissingDependency

BACKENDS = ("auto", *DECODERS)
MAX_CLIP_BYTES = 4 << 30  # of the frames of one call
_CHUNK = 32 << 20  # bytes of pixels that are on their way at once


class UnreadableVideo(DataError):
    """A video that cannot be read. `reason` is a short fixed phrase, to count by."""

    def __init__(self, name: str, reason: str, detail: str = ""):
        super().__init__(f"{name} cannot be read as a video: {reason}{f' ({detail})' if detail else ''}")
        self.reason = reason


def open_video(
    source: str | os.PathLike[str] | bytes, backend: str = "auto", *, name: str = "", max_pixels: int = MAX_PIXELS
) -> VideoReader:
    """Open a video, with its first picture decoded.

    Args:
        source: an MP4, QuickTime, Matroska, WebM or AVI file, or its bytes; what it is called does not matter.
        backend: "av" (PyAV), "torchcodec" or "decord"; "auto" takes the first of these that is installed. All give the same
            frames of sound files; PyAV finds the most damage, and knows the most odd ones.
        name: of the video, for messages; its path if empty.
        max_pixels: of a frame; more is refused before it is decoded.

    Raises:
        UnreadableVideo: a DataError that names the video: missing, damaged, of no kind that is known, or too large.
        MissingDependency: the backend is not installed.
        ConfigError: no such backend.
    """
    return VideoReader(source, backend, name=name, max_pixels=max_pixels)


class VideoReader:
    """An open video: a context manager with `len`, the frames of the file as it shows them. See `open_video`.

    Phone videos are turned as they are meant to be seen, by quarters; pixels that are not square stay as they are.

    Attributes:
        times: float64 (N,), when each frame is shown, in seconds after the first.
        fps: frames in a second, on average; 0 when the file does not tell (one frame).
        size: (width, height) of the frames.
        backend: that decodes them.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, backend: str, *, name: str, max_pixels: int):
        if backend not in BACKENDS:
            raise ConfigError(f"unknown video backend {backend!r}; expected one of {', '.join(BACKENDS)}")
        self._source: bytes | str = source if isinstance(source, bytes) else os.path.abspath(source)
        self._name = name or ("a video" if isinstance(source, bytes) else os.fspath(source))
        self._asked, self._max_pixels = backend, max_pixels
        self._check_start()
        self._process, self._number = None, 0
        self._open()

    def _check_start(self) -> None:
        """Refuse what is no video by its first bytes, before any decoder sees it."""
        if isinstance(self._source, bytes):
            start = self._source[:12]
        else:
            try:
                with open(self._source, "rb") as file:
                    start = file.read(12)
            except OSError as error:
                raise UnreadableVideo(self._name, "no such file", error.strerror or str(error)) from None
        if not start:
            raise UnreadableVideo(self._name, "empty file")
        iso = start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # ISO/IEC 14496-12, 4.2
        matroska = start[:4] == b"\x1a\x45\xdf\xa3"  # RFC 8794, 11.2.1
        if not (iso or matroska or (start[:4] == b"RIFF" and start[8:] == b"AVI ")):
            raise UnreadableVideo(self._name, "not a video file", "neither MP4, QuickTime, Matroska, WebM nor AVI")

    def _open(self) -> None:
        """Open it in this process's decoder, if it is not open there."""
        process = _decoder()
        if process is self._process:
            return
        number = next(_numbers)
        request: dict[str, Any] = {"open": number, "backend": self._asked, "max_pixels": self._max_pixels}
        with process.exchange(self._name) as talk:
            facts = talk.open(request, self._source)
            times = np.empty(facts["bytes"] // 8, np.float64)
            talk.read(times)
        self._process, self._number = process, number
        self.times, self.fps, self.backend = times, float(facts["fps"]), str(facts["backend"])
        self.size: tuple[int, int] = (int(facts["size"][0]), int(facts["size"][1]))

    def __len__(self) -> int:
        return len(self.times)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the decoder; frames that are asked for later open the video again."""
        process, self._process = getattr(self, "_process", None), None
        if process is not None:
            process.closed.append(self._number)

    def timeline(self, fps: float | None = None) -> np.ndarray:
        """The video at an even rate: the frames nearest in time to k / fps, k = 0, 1, …, as int64 (T',) indices.

        It ends with the video: the last frame lasts as long as one does on average. Of two frames that are equally near,
        the earlier.

        Args:
            fps: positions in a second; None: every frame of the file.

        Raises:
            ConfigError: fps is not above 0. UnreadableVideo: the time stamps are damaged, as they make it endless.
        """
        if fps is None:
            return np.arange(len(self), dtype=np.int64)
        if not fps > 0:
            raise ConfigError(f"fps is {fps}; expected frames a second above 0, or None for every frame of the file")
        end = self.times[-1] + (1 / self.fps if self.fps else 0)
        if not end * fps < MAX_FRAMES:
            raise UnreadableVideo(self._name, "damaged time stamps", f"it lasts {end:.0f} seconds")
        count = max(1, int(np.ceil(end * fps - 1e-4)))
        between = (self.times[1:] + self.times[:-1]) / 2
        return np.searchsorted(between + 1e-6, np.arange(count) / fps).astype(np.int64)

    def get_frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Frames in the order of `indices` (any order, with repeats): uint8 (N, H, W, 3), R, G, B.

        Raises:
            InputError: an index outside 0 … len - 1, or more frames than 4 GiB.
            UnreadableVideo: one of them is damaged.
        """
        wanted, back = np.unique(self._checked(indices), return_inverse=True)
        width, height = self.size
        if len(back) * width * height * 3 > MAX_CLIP_BYTES:
            raise InputError(
                f"{len(back)} frames of {width} x {height} are more than {MAX_CLIP_BYTES >> 30} GiB; take fewer at once, "
                f"or one after the other from `frames`"
            )
        found = np.empty((len(wanted), height, width, 3), np.uint8)
        at = 0
        for chunk in self._chunks(wanted):
            found[at : at + len(chunk)] = chunk
            at += len(chunk)
        return found if np.array_equal(back, np.arange(len(wanted))) else found[back]

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The same one after the other, each uint8 (H, W, 3), for indices that do not decrease; repeats are one array."""
        indices = self._checked(indices)
        if (np.diff(indices) < 0).any():
            raise InputError("frames one after the other are for indices that do not decrease; use get_frames")
        wanted, counts = np.unique(indices, return_counts=True)
        pictures = (frame for chunk in self._chunks(wanted) for frame in chunk)
        for frame, count in zip(pictures, counts):
            for _ in range(count):
                yield frame

    def _checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        found = np.asarray(indices)
        if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise InputError(f"frame indices are {found.dtype} {found.shape}; expected a list of integers")
        if found.size and not 0 <= found.min() <= found.max() < len(self):
            raise InputError(
                f"frames {found.min()} … {found.max()} of {self._name}, which has {len(self)}: 0 … {len(self) - 1}"
            )
        return found.astype(np.int64)

    def _chunks(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """Frames of increasing indices, uint8 (n, H, W, 3) each time."""
        width, height = self.size
        step = max(1, _CHUNK // (width * height * 3))
        for start in range(0, len(wanted), step):
            part = wanted[start : start + step]
            self._open()  # again, in a forked process, or if another video has killed the decoder
            chunk = np.empty((len(part), height, width, 3), np.uint8)
            with self._process.exchange(self._name) as talk:
                talk.send({"read": self._number, "indices": part.tolist()})
                for frame in chunk:
                    talk.answer(frame.nbytes)
                    talk.read(frame)
            yield chunk


# ---------------------------------------------------------------------------------------------------- the decoder's process


class _Decoder:
    """The process that decodes for this one."""

    def __init__(self) -> None:
        code = (
            "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from tokgen.data.decoders import serve; serve()"
        )
        home = str(Path(__file__).resolve().parents[2])  # of this package, wherever it was imported from
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps([*sys.path, home])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if not self._process.stdout.readline():
            self.stop()
            raise DataError(f"the process that decodes videos does not start; try: {sys.executable} -c 'import tokgen'")
        with contextlib.suppress(ImportError, OSError, AttributeError):  # Linux: fewer turns for each picture
            import fcntl

            fcntl.fcntl(self._process.stdout.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)
        self._lock = threading.Lock()
        self.closed: list[int] = []  # videos that nobody reads any more

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    @contextlib.contextmanager
    def exchange(self, name: str) -> Iterator[_Decoder]:
        """One request and all of its answers, about the video of that name; whatever breaks it off ends the process."""
        with self._lock:
            self._name = name
            try:
                while self.closed:
                    self.send({"close": self.closed.pop()})
                yield self
            except (_Died, OSError):
                code = self._end()
                raise UnreadableVideo(name, *code) from None
            except (UnreadableVideo, MissingDependency):
                raise  # an answer
            except BaseException:
                self.stop()  # such as Ctrl-C between two frames: what comes next would be another's
                raise

    def _end(self) -> tuple[str, str]:
        """(reason, detail) of the process's death."""
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        if code is not None and -code == getattr(signal, "SIGALRM", None):
            return "decoder hangs", "stopped after a minute without a frame"
        cause = signal.Signals(-code).name if code and code < 0 else f"code {code}"
        return "decoder crashed", f"its process ended with {cause}"

    def send(self, request: dict[str, Any], content: bytes = b"") -> None:
        self._process.stdin.write(json.dumps(request).encode() + b"\n" + content)
        self._process.stdin.flush()

    def open(self, request: dict[str, Any], source: bytes | str) -> dict[str, Any]:
        """Send a video, and the facts about it."""
        if isinstance(source, bytes):
            self.send({**request, "bytes": len(source)}, source)
        else:
            self.send({**request, "path": source})
        return self.answer()

    def answer(self, size: int | None = None) -> dict[str, Any]:
        line = self._process.stdout.readline(1 << 16)
        if not line.endswith(b"\n"):
            raise _Died
        facts: dict[str, Any] = json.loads(line)
        if "missing" in facts:
            raise MissingDependency(f"reading videos needs a decoder: pip install 'tokgen[video]' ({facts['missing']})")
        if "error" in facts:
            raise UnreadableVideo(self._name, facts["error"], facts["detail"])
        if size is not None and facts["bytes"] != size:
            self.stop()
            raise UnreadableVideo(self._name, "frame size changes")
        return facts

    def read(self, into: np.ndarray) -> None:
        view = memoryview(into).cast("B")
        while len(view):
            count = self._process.stdout.readinto(view)
            if not count:
                raise _Died
            view = view[count:]


class _Died(Exception):
    pass


_numbers = itertools.count()
_current: list[_Decoder] = []  # none or one
_starting = threading.Lock()


def _decoder() -> _Decoder:
    """This process's decoder, started if there is none that lives."""
    with _starting:
        if not _current or not _current[0].alive:
            _current[:] = [_Decoder()]
        return _current[0]


def _forget() -> None:
    """In a forked process: the decoder is the parent's."""
    global _starting
    _starting = threading.Lock()
    _inherited.extend(_current)
    _current.clear()


_inherited: list[_Decoder] = []  # kept, so that nobody waits for a process that is no child

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@atexit.register
def _stop() -> None:
    for process in _current:
        process.stop()
