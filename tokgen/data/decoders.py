"""Video decoders, and the small process they run in.

A decoder is C code that is fed bytes from strangers. decord 0.6 took its process down with 9 of 365 small files that had been
damaged at random; FFmpeg 8 (PyAV 18) survived 12,000, but took 1.6 GB of memory for one of 8 KB, and half a minute for a
header that lists 50 million frames. So no decoder runs in the process that trains: `serve` is the whole of another one, with
a limit of memory and of time, and `tokgen.data.video` turns its death into an error that names the file. It costs a tenth
more of processor time (16 frames of 480 x 320) and 60 MB. It imports neither torch nor the rest of the package.

A decoder is made of bytes or a path, and has

    times                float64 (N,), when each frame is shown, in seconds from the first one on
    size                 (width, height) of the picture as it is shown
    fps                  frames in a second, on average; 0 when there is no telling
    frames(indices)      uint8 (H, W, 3) for each of increasing indices
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

CONTAINERS = "mov,mp4,matroska,webm,avi"  # the demuxers that may look at a file; others can open files and addresses
MAX_FRAMES = 1 << 20  # of one file: 9 hours at 30 a second
STEP_SECONDS = 60  # to open a file, or to decode the next packet: far above any honest one
MEMORY = 4 << 30  # that decoding may take: 16 reference frames of MAX_PIXELS, and the picture


class Unreadable(Exception):
    """A video that cannot be read. `reason` is a short fixed phrase, to count by."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _too_large(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Unreadable("too many pixels", f"frames of {width} x {height}, at most {max_pixels} pixels are taken")


def _mean_rate(times: np.ndarray, otherwise: float) -> float:
    return (len(times) - 1) / float(times[-1]) if len(times) > 1 and times[-1] > 0 else otherwise


# ----------------------------------------------------------------------------------------------------------------- PyAV


class AvDecoder:
    """PyAV. Frames are found by their time stamps, not by what the container says about places.

    A first pass over the packets, without decoding, notes time stamp and keyframe of each: the frames in the order of
    their time stamps are what the file shows. To decode one, packets are read (from wherever seeking gets, and that is
    checked) up to the last keyframe before it, and decoded from there until a frame with its time stamp comes out. So
    frames that depend on later ones, edit lists, a first time stamp other than 0, and wrong or missing indices and counts
    make no difference. Where time stamps are missing (as in AVI) or not unique, frames are counted from the beginning.

    Not frames are: what an edit list hides, what comes before the first keyframe, and packets that are never shown (VP8).
    """

    def __init__(self, source: bytes | str, max_pixels: int):
        import av
        from av.video.reformatter import VideoReformatter

        self._av, self._source, self._max_pixels = av, source, max_pixels
        self._rgb = VideoReformatter()  # one for all frames: it keeps its tables
        self._container: Any = None
        with self._named("unreadable video"):
            self._open()
            rate = self._stream.average_rate
            self._index()
        with self._named("damaged frames"):
            if self._stamps is None:
                seconds = self._count()
            else:
                seconds = (self._stamps - self._stamps[0]) * float(self._stream.time_base)
            self._first: Any = None  # the first frame, decoded already
            if not len(seconds):
                raise Unreadable("no frames")
            frame = self._frame(0)
        self.times = seconds
        self.fps = _mean_rate(seconds, float(rate or 0))
        self._shape = frame.width, frame.height
        # degrees against the clock, from the display matrix; other angles and mirrored pictures are not known from cameras
        self._quarters = round(frame.rotation / 90) % 4
        self.size = self._shape[::-1] if self._quarters % 2 else self._shape
        self._first = self._picture(frame)

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        with self._named("damaged frames"):
            for index in indices:
                yield self._first if index == 0 else self._picture(self._frame(index))

    @contextlib.contextmanager
    def _named(self, reason: str) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            raise Unreadable("too much memory", str(error)) from error
        except (self._av.FFmpegError, OSError, ValueError, IndexError, EOFError) as error:
            raise Unreadable(reason, getattr(error, "strerror", None) or str(error)) from error

    def _open(self) -> None:
        """Open the container anew: the next packet is the first."""
        if self._container is not None:
            self._container.close()
        # an open file, not a path: a name can then not be taken for an address
        file = io.BytesIO(self._source) if isinstance(self._source, bytes) else open(self._source, "rb")
        options = {"format_whitelist": CONTAINERS}
        self._container = self._av.open(file, "r", options=options, metadata_errors="replace")
        if not self._container.streams.video:
            raise Unreadable("no video stream")
        self._stream = self._container.streams.video[0]
        self._codec = self._stream.codec_context
        if self._codec is None:
            raise Unreadable("unknown codec", "no decoder here knows it; convert it to H.264")
        _too_large(self._stream.width, self._stream.height, self._max_pixels)
        self._codec.options = {"max_pixels": str(self._max_pixels)}
        self._codec.thread_count = 1
        self._packets = self._read()
        self._ahead = 0  # the packet that comes next, by its place in the file
        self._fed: int | None = None  # the one that the decoder gets next; None before a keyframe was chosen
        self._out: deque[Any] = deque()  # frames that came out and were not taken

    def _read(self) -> Iterator[Any]:
        """Packets of the stream; those without content (dropped frames, the end) are passed over."""
        return (packet for packet in self._container.demux(self._stream) if packet.size)

    # -- which frames there are ------------------------------------------------------------------------------------------

    def _index(self) -> None:
        hides = self._codec.name in ("vp8", "libvpx")  # shows a frame or not, by a bit of its own (RFC 6386, 9.1)
        stamps: list[int | None] = []
        shown: list[bool] = []
        keys: list[int] = []  # places of keyframes
        self._places: dict[tuple[int | None, int], int] = {}  # by what tells packets apart
        for place, packet in enumerate(self._packets):
            if packet.is_corrupt:
                raise Unreadable("cut off", f"the file ends inside frame {place}")
            if place == MAX_FRAMES:
                raise Unreadable("too many frames", f"at most {MAX_FRAMES} are taken; cut the video")
            if packet.is_keyframe:
                keys.append(place)
            stamps.append(packet.pts)
            shown.append(not packet.is_discard and not (hides and not memoryview(packet)[0] & 0x10))
            self._places[packet.pts, packet.size] = place
        self._total = self._ahead = len(stamps)
        self._keys = np.array(keys or [0], np.int64)
        self._stamps: np.ndarray | None = None
        if not stamps:
            raise Unreadable("no frames")
        visible = [place for place in range(int(self._keys[0]), self._total) if shown[place]]
        found = [stamps[place] for place in visible]
        self._of: list[int | None] = stamps
        if None in found or len(set(found)) < len(found) or self._container.format.name == "avi":
            return  # they must be counted; AVI has the time of decoding only
        first = stamps[self._keys[0]]  # leading frames need a keyframe that is not there
        order = sorted((stamp, place) for stamp, place in zip(found, visible) if first is None or stamp >= first)
        if not order:
            raise Unreadable("no frames")
        self._stamps = np.array([stamp for stamp, _ in order], np.int64)
        self._place = np.array([place for _, place in order], np.int64)

    @property
    def closed(self) -> bool:
        """Whether nothing that comes after a keyframe in the file is shown before it, nor the other way round."""
        if self._stamps is None:
            return False
        order = np.argsort(self._place)
        places, stamps = self._place[order], self._stamps[order]  # as in the file
        least = np.minimum.accumulate(stamps[::-1])[::-1]  # from each on
        most = np.maximum.accumulate(stamps)  # up to each
        return bool(((stamps == least) & (stamps == most))[np.isin(places, self._keys)].all())

    def _count(self) -> np.ndarray:
        """Decode everything, for the times of the frames where time stamps of packets do not tell."""
        self._open()
        self._fed = 0
        stamps, rate = [], float(self._stream.average_rate or 25)
        while (frame := self._next_frame()) is not None:
            stamps.append(np.nan if frame.pts is None else frame.pts * float(self._stream.time_base))
            if len(stamps) > MAX_FRAMES:
                raise Unreadable("too many frames", f"at most {MAX_FRAMES} are taken; cut the video")
        seconds = np.array(stamps, np.float64)
        if not (np.diff(seconds) > 0).all() or np.isnan(seconds).any():
            seconds = np.arange(len(stamps)) / rate
        self._open()
        self._taken = 0  # frames that have come out
        return seconds - seconds[:1]

    # -- one of them -----------------------------------------------------------------------------------------------------

    def _frame(self, index: int) -> Any:
        if self._stamps is None:
            return self._counted(index)
        stamp, place = int(self._stamps[index]), int(self._place[index])
        # the last keyframe that is both before it in the file and shown no later
        number = int(np.searchsorted(self._keys, place, side="right")) - 1
        while number and ((at := self._of[self._keys[number]]) is None or at > stamp):
            number -= 1
        key = int(self._keys[number])
        if self._fed is None or key > self._fed or stamp <= self._last:
            self._go(key)
        while (frame := self._next_frame()) is not None:
            if frame.pts is None:
                raise Unreadable("damaged frames", "a frame without time stamp")
            self._last = frame.pts
            if frame.is_corrupt and frame.pts >= self._start:
                raise Unreadable("damaged frames", f"on the way to frame {index}")
            if frame.pts >= stamp:
                break
        if frame is None or frame.pts != stamp:
            raise Unreadable("damaged frames", f"frame {index} does not come out")
        return frame

    def _counted(self, index: int) -> Any:
        if self._fed is None or index < self._taken:
            self._open()
            self._fed, self._taken = 0, 0
        while (frame := self._next_frame()) is not None:
            self._taken += 1
            if frame.is_corrupt:
                break
            if self._taken > index:
                return frame
        raise Unreadable("damaged frames", f"frame {index} does not come out")

    def _go(self, key: int) -> None:
        """Make the keyframe at that place the next packet, and the decoder ready for it."""
        far = 256  # packets that are read faster than sought
        if not 0 <= key - self._ahead < far:
            at = self._of[key]
            packet = None
            if at is not None:
                with contextlib.suppress(self._av.FFmpegError):
                    self._container.seek(at, stream=self._stream)
                    self._packets = self._read()
                    packet = next(self._packets, None)
            place = None if packet is None else self._places.get((packet.pts, packet.size))
            if place is None or place > key:
                self._open()
            else:
                self._packets, self._ahead = _chain(packet, self._packets), place
        while self._ahead < key:
            next(self._packets, None)
            self._ahead += 1
        self._codec.flush_buffers()
        self._out.clear()
        at = self._of[key]
        self._fed, self._last, self._start = key, -(1 << 63), -(1 << 63) if at is None else at

    def _next_frame(self) -> Any:
        """The next frame that comes out; None at the end."""
        while not self._out:
            if self._fed > self._total:
                return None
            _alarm(STEP_SECONDS)
            packet = next(self._packets, None)
            self._ahead += 1
            if packet is None:
                self._fed = self._total
            self._fed += 1
            self._out.extend(self._codec.decode(packet))
        return self._out.popleft()

    def _picture(self, frame: Any) -> np.ndarray:
        if (frame.width, frame.height) != self._shape:
            first, now = (" x ".join(map(str, n)) for n in (self._shape, (frame.width, frame.height)))
            raise Unreadable("frame size changes", f"from {first} to {now}")
        pixels = self._rgb.reformat(frame, format="rgb24").to_ndarray()  # (H, W, 3)
        return np.ascontiguousarray(np.rot90(pixels, self._quarters)) if self._quarters else pixels


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


# ------------------------------------------------------------------------------------------------------------ the others


class DecordDecoder:
    """decord 0.6, which is no longer maintained.

    After seeking it counts from the keyframe on, and so gives wrong frames where some that come after a keyframe in the file
    are shown before it: open groups of pictures, as x265 makes them and x264 may, and MPEG-4 part 2 with B-frames. Such
    videos are refused, as far as PyAV is there to tell.
    """

    def __init__(self, source: bytes | str, max_pixels: int):
        import decord

        index = None if importable("av") else AvDecoder(source, max_pixels)
        if index is not None and not index.closed:
            raise Unreadable("not for decord", "frames around keyframes would be wrong ones; use the backend av")
        self._errors = (decord.DECORDError, RuntimeError, ValueError, IndexError)
        with self._named("unreadable video"):
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            self._reader = decord.VideoReader(file, num_threads=1)  # more, and a fork aborts
            count = len(self._reader)
            if not 0 < count <= MAX_FRAMES:
                raise Unreadable("too many frames" if count else "no frames")
            height, width = self._reader[0].shape[:2]
            _too_large(width, height, max_pixels)
            # (N, 2): from, to
            stamps = np.asarray(self._reader.get_frame_timestamp(range(count)), np.float64)[:, 0]
        self.size = width, height
        self.times = np.maximum.accumulate(stamps - stamps[0])
        self.fps = _mean_rate(self.times, float(self._reader.get_avg_fps()))
        if index is not None:
            if len(index.times) != count:
                raise Unreadable("not for decord", f"it finds {count} of {len(index.times)} frames; use the backend av")
            self.times, self.fps = index.times, index.fps

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        with self._named("damaged frames"):
            for index in indices:
                _alarm(STEP_SECONDS)
                pixels = self._reader[index].asnumpy()
                if pixels.shape != (*self.size[::-1], 3):  # such as four channels where the display matrix turns it
                    raise Unreadable("not for decord", f"a frame comes out as {pixels.shape}; use the backend av")
                yield pixels

    @contextlib.contextmanager
    def _named(self, reason: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise Unreadable(reason, str(error).strip().splitlines()[-1] if str(error).strip() else "") from error


class TorchcodecDecoder:
    """torchcodec, which finds frames as `AvDecoder` does. It does not tell their times, so these are PyAV's."""

    def __init__(self, source: bytes | str, max_pixels: int):
        from torchcodec.decoders import VideoDecoder

        index = AvDecoder(source, max_pixels)
        self.times, self.size, self.fps = index.times, index.size, index.fps
        try:
            self._decoder = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)
        except (RuntimeError, ValueError) as error:
            raise Unreadable("unreadable video", str(error).strip().partition("\n")[0]) from error
        if len(self._decoder) != len(self.times):
            raise Unreadable("unreadable video", f"{len(self.times)} frames, of which it finds {len(self._decoder)}")

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            _alarm(STEP_SECONDS)
            try:
                yield self._decoder.get_frame_at(index).data.numpy()
            except (RuntimeError, ValueError, IndexError) as error:
                raise Unreadable("damaged frames", str(error).strip().partition("\n")[0]) from error


DECODERS = {"av": AvDecoder, "torchcodec": TorchcodecDecoder, "decord": DecordDecoder}  # in the order that "auto" tries


def importable(backend: str) -> str:
    """ "" if the backend can be imported here, or what goes wrong; torchcodec raises more than ImportError."""
    import importlib

    try:
        for module in ("av", "torchcodec.decoders") if backend == "torchcodec" else (backend,):
            importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


# ---------------------------------------------------------------------------------------------------------- the process


def _alarm(seconds: int) -> None:
    """End this process in so many seconds, unless told otherwise before; 0 stops the clock. A decoder that hangs ends so."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory(lift: bool = False) -> None:
    """`MEMORY` beyond what is in use now, or no limit; on systems that can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if lift or hard == resource.RLIM_INFINITY or used + MEMORY <= hard:
            resource.setrlimit(resource.RLIMIT_AS, (hard if lift else used + MEMORY, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve() -> None:
    """Answer requests on standard input until it ends.

    A request is a line of JSON: {"open": number, "backend", "max_pixels", "path"} or, in place of the path, "bytes": how
    many follow; {"read": number, "indices"}; {"close": number}. An answer is a line of JSON, {"bytes": how many follow, …}
    or {"error": reason, "detail"}; "read" has one for each frame.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # what libraries print must not get between the answers
        os.dup2(null, number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads
    opened: dict[int, Any] = {}
    known: dict[str, str] = {}

    def answer(content: Any = None, **facts: Any) -> None:
        _alarm(0)
        if content is not None:
            facts["bytes"] = content.nbytes
        answers.write(json.dumps(facts).encode() + b"\n")
        if content is not None:
            answers.write(memoryview(content).cast("B"))
        answers.flush()

    def backend(name: str) -> str:
        """The backend that a name stands for, imported."""
        for candidate in DECODERS if name == "auto" else (name,):
            if candidate not in known:
                _limit_memory(lift=True)  # torch alone may need more than is left
                known[candidate] = importable(candidate)
                _limit_memory()
            if not known[candidate]:
                return candidate
        raise ImportError("; ".join(f"{c}: {known[c]}" for c in (DECODERS if name == "auto" else (name,))))

    answer()  # ready
    for line in requests:
        request = json.loads(line)
        if "close" in request:
            opened.pop(request["close"], None)
            continue
        try:
            if "open" in request:
                source = request["path"] if "path" in request else requests.read(request["bytes"])
                name = backend(request["backend"])
                _alarm(STEP_SECONDS)
                decoder = opened[request["open"]] = DECODERS[name](source, request["max_pixels"])
                answer(decoder.times, size=decoder.size, fps=decoder.fps, backend=name)
            else:
                decoder = opened[request["read"]]
                _alarm(STEP_SECONDS)
                for pixels in decoder.frames(request["indices"]):
                    answer(np.ascontiguousarray(pixels))
        except ImportError as error:
            answer(missing=str(error)[:1000])
        except Unreadable as error:
            answer(error=error.reason, detail=error.detail[:500])
        except MemoryError:
            answer(error="too much memory", detail="")
        except Exception as error:  # whatever else a stranger's bytes bring about
            answer(error="unreadable video", detail=f"{type(error).__name__}: {error}"[:500])
