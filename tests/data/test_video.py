"""Reading videos: the very frames that were asked for, from files of all kinds, and a decoder that may die."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
from video_makers import barcode, number, numbers, video

from tokgen.data import video as module
from tokgen.data.decode import BadSample
from tokgen.data.decoders import importable
from tokgen.data.video import UnreadableVideo, open_video
from tokgen.errors import ConfigError, DataError, InputError, MissingDependency

BACKENDS = [name for name in ("av", "decord", "torchcodec") if not importable(name)]
OPEN = {"x264-params": "open-gop=1"}
FILES = {
    "gop 12": {},
    "gop 250": {"count": 100, "gop": 250},
    "b-frames": {"bf": 3, "gop": 30},
    "open gop": {"bf": 3, "gop": 10, **OPEN},
    "matroska": {"format": "matroska"},
    "open gop, matroska": {"format": "matroska", "bf": 3, "gop": 10, **OPEN},
    "quicktime": {"format": "mov", "audio": True},
    "hevc": {"codec": "libx265"},
    "mpeg-4": {"codec": "mpeg4"},
    "mpeg-4, b-frames": {"codec": "mpeg4", "bf": 2},
    "avi": {"codec": "mpeg4", "format": "avi", "bf": 2},
    "h264 in avi": {"format": "avi", "bf": 3},
    "vp8": {"codec": "libvpx", "format": "webm"},
    "vp9": {"codec": "libvpx-vp9", "format": "webm"},
    "av1": {"codec": "libsvtav1", "preset": 10},
    "one frame": {"count": 1},
    "odd sizes": {"height": 49, "width": 67, "pix_fmt": "yuv444p"},
    "starts late": {"times": range(100, 140)},
    "fragments": {"mux": {"movflags": "frag_keyframe+empty_moov"}},
    "no duration": {"format": "matroska", "mux": {"live": "1"}},
    "variable rate": {"count": 10, "times": [0, 1, 2, 5, 6, 10, 11, 12, 20, 21]},
}
# where decord 0.6 would give other frames (found here by the drawn numbers) or none
NOT_FOR_DECORD = {
    "open gop",
    "open gop, matroska",
    "hevc",
    "mpeg-4, b-frames",
    "avi",
    "h264 in avi",
    "av1",
    "no duration",
}
NOT_FOR_TORCHCODEC = {"avi", "h264 in avi"}
REFUSED = {"av": set(), "decord": NOT_FOR_DECORD, "torchcodec": NOT_FOR_TORCHCODEC}


@pytest.fixture(scope="module", params=FILES)
def made(request):
    codec = FILES[request.param].get("codec", "libx264")
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this FFmpeg cannot write {codec}")
    return request.param, video(**FILES[request.param]), FILES[request.param].get("count", 40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_are_the_ones_asked_for(made, backend):
    name, data, count = made
    if name in REFUSED[backend]:
        with pytest.raises(UnreadableVideo), open_video(data, backend) as reader:
            reader.get_frames(range(len(reader)))
        return
    with open_video(data, backend) as reader:
        assert len(reader) == count and reader.backend == backend
        assert reader.size == (FILES[name].get("width", 64), FILES[name].get("height", 48))
        frames = reader.get_frames(range(count))
        assert frames.dtype == np.uint8 and frames.shape == (count, *reader.size[::-1], 3)
        assert numbers(frames) == list(range(count))
        some = np.random.default_rng(0).integers(0, count, 20)
        assert np.array_equal(reader.get_frames(some), frames[some])  # any order, repeats
        for i in some[:8].tolist():  # one at a time, back and forth
            assert np.array_equal(reader.get_frames([i])[0], frames[i])
        assert np.array_equal(np.stack(list(reader.frames(np.sort(some)))), frames[np.sort(some)])
        times = FILES[name].get("times") or range(count)
        assert np.allclose(reader.times, (np.array(times) - times[0]) / 30, atol=2e-3)
        if count > 1:
            assert reader.fps == pytest.approx((count - 1) / (times[-1] - times[0]) * 30, rel=2e-3)


@pytest.mark.skipif("decord" not in BACKENDS, reason="decord is not installed")
def test_backends_agree_to_the_pixel():
    data = video(gop=250)
    assert np.array_equal(*(open_video(data, b).get_frames(range(0, 40, 3)) for b in ("av", "decord")))


def test_colours_come_in_the_order_red_green_blue():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream("ffv1", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "bgr0"
        red = np.zeros((16, 32, 3), np.uint8)
        red[:, :16, 0] = 255
        out.mux(stream.encode(av.VideoFrame.from_ndarray(red, format="rgb24")))
        out.mux(stream.encode())
    assert np.array_equal(open_video(file.getvalue()).get_frames([0])[0], red)


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_turned_videos_stand_upright(degrees):
    plain, turned = open_video(video()), open_video(video(rotation=degrees))
    assert turned.size == (plain.size if degrees == 180 else plain.size[::-1])
    quarters = degrees // 90  # against the clock, as FFmpeg's display matrix says it
    expected = np.stack([np.rot90(frame, quarters) for frame in plain.get_frames([3, 17])])
    apart = np.abs(turned.get_frames([3, 17]).astype(int) - expected)
    assert apart.mean() < 2  # the encoder was told of it, and is not the same to the bit


def test_an_edit_list_hides_frames():
    whole, file = video(bf=2), io.BytesIO()
    options = {"use_editlist": "1", "avoid_negative_ts": "disabled"}
    with av.open(io.BytesIO(whole)) as source, av.open(file, "w", format="mp4", container_options=options) as out:
        stream = source.streams.video[0]
        copy, step = out.add_stream_from_template(stream), round(1 / 30 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - 5 * step, packet.dts - 5 * step, copy
                out.mux(packet)
    with open_video(file.getvalue()) as reader:
        assert numbers(reader.get_frames(range(len(reader)))) == list(range(5, 40))
        assert [number(reader.get_frames([i])[0]) for i in (30, 2, 17)] == [35, 7, 22]


def test_what_comes_before_the_first_keyframe_is_left_out():
    file = io.BytesIO()
    with av.open(io.BytesIO(video(gop=12, bf=0))) as source, av.open(file, "w", format="matroska") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in list(source.demux(stream))[5:-1]:
            packet.stream = copy
            out.mux(packet)
    with open_video(file.getvalue()) as reader:
        assert numbers(reader.get_frames(range(len(reader)))) == list(range(12, 40))


# -- timeline -----------------------------------------------------------------------------------------------------------


def test_the_timeline_has_an_even_rate():
    reader = open_video(video(count=30))  # a second
    assert reader.timeline().tolist() == list(range(30))
    assert reader.timeline(10).tolist() == list(range(0, 30, 3))
    assert reader.timeline(20).tolist()[:6] == [0, 1, 3, 4, 6, 7]  # 1.5 is as near to 1 as to 2: the earlier
    assert reader.timeline(60).tolist()[:6] == [0, 0, 1, 1, 2, 2] and len(reader.timeline(60)) == 60
    assert len(reader.timeline(7.5)) == 8 and reader.timeline(0.1).tolist() == [0]
    assert open_video(video(count=1)).timeline(4).tolist() == [0]


def test_the_timeline_of_a_variable_rate_takes_the_nearest_frames():
    reader = open_video(video(count=10, times=[0, 1, 2, 5, 6, 10, 11, 12, 20, 21]))  # at 30 a second
    expected = [min(range(10), key=lambda i: (abs(reader.times[i] - k / 15), i)) for k in range(12)]
    assert reader.timeline(15).tolist() == expected


def test_damaged_time_stamps_make_no_endless_timeline():
    reader = open_video(video(count=3, times=[0, 1, 3 * 10**6], format="matroska"), name="far.mp4")
    with pytest.raises(UnreadableVideo, match=r"far\.mp4 .* damaged time stamps \(it lasts .* seconds\)"):
        reader.timeline(30)
    with pytest.raises(ConfigError, match="fps is 0; expected frames a second above 0"):
        reader.timeline(0)


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_wrong_requests_are_named(tmp_path):
    reader = open_video(video(), name="clip.mp4")
    with pytest.raises(InputError, match=r"frames 3 … 40 of clip\.mp4, which has 40: 0 … 39"):
        reader.get_frames([3, 40])
    with pytest.raises(InputError, match="frames -1"):
        reader.get_frames([-1])
    with pytest.raises(InputError, match="expected a list of integers"):
        reader.get_frames([0.5])
    with pytest.raises(InputError, match="do not decrease"):
        next(reader.frames([3, 2]))
    with pytest.raises(InputError, match="more than 4 GiB"):
        reader.get_frames(np.zeros(500_000, np.int64))
    assert reader.get_frames([]).shape == (0, 48, 64, 3)
    with pytest.raises(ConfigError, match="unknown video backend 'ffmpeg'; expected one of auto, av"):
        open_video(video(), "ffmpeg")
    with pytest.raises(DataError, match=r"nothing\.mp4 cannot be read as a video: no such file"):
        open_video(tmp_path / "nothing.mp4")
    with pytest.raises(UnreadableVideo, match=r"too many pixels \(frames of 64 x 48, at most 1000"):
        open_video(video(), max_pixels=1000)
    if "torchcodec" not in BACKENDS:
        with pytest.raises(MissingDependency, match=r"tokgen\[video\].*torchcodec"):
            open_video(video(), "torchcodec")


def test_a_file_is_known_by_its_bytes(tmp_path):
    path = tmp_path / "http:not an address.jpg"
    path.write_bytes(video(format="matroska"))
    with open_video(path) as reader:
        assert number(reader.get_frames([7])[0]) == 7
    playlist = b"#EXTM3U\n#EXTINF:4,\n" + os.fsencode(path) + b"\n"
    with pytest.raises(UnreadableVideo, match="not a video file"):
        open_video(playlist)


# -- the decoder's process ----------------------------------------------------------------------------------------------


def test_the_decoder_imports_neither_torch_nor_the_package():
    code = "import sys, tokgen.data.decoders; assert not {'torch', 'av', 'tokgen.data.decode'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readers_share_a_decoder_and_let_go_of_it():
    first, second = open_video(video(start=50)), open_video(video())
    pieces = first.frames([0, 5, 9])
    assert number(next(pieces)) == 50
    assert number(second.get_frames([30])[0]) == 30  # in between
    assert number(next(pieces)) == 55
    del pieces  # not used up
    assert number(second.get_frames([3])[0]) == 3
    (process,) = module._current
    first.close()
    del second
    gc.collect()
    assert len(process.closed) == 2
    with open_video(video()):  # tells it
        assert not process.closed
    assert number(first.get_frames([1])[0]) == 51  # opened anew
    assert module._current == [process]


def pid() -> int:
    return module._decoder()._process.pid


def test_a_decoder_that_died_between_requests_is_replaced():
    reader = open_video(video())
    before = pid()
    os.kill(before, signal.SIGKILL)
    module._current[0]._process.wait()
    assert number(reader.get_frames([9])[0]) == 9
    assert pid() != before


@pytest.mark.parametrize(
    "death, reason, detail",
    [
        (signal.SIGSEGV, "decoder crashed", "SIGSEGV"),
        (signal.SIGABRT, "decoder crashed", "SIGABRT"),
        (signal.SIGALRM, "decoder hangs", "a minute"),
    ],
)
def test_a_decoder_that_dies_at_work_is_an_error_that_names_the_video(death, reason, detail):
    reader, other = open_video(video(), name="clip.mp4"), open_video(video(start=60))
    process = pid()
    os.kill(process, signal.SIGSTOP)  # so that the request is under way when it dies

    def kill():
        time.sleep(0.3)
        os.kill(process, death)
        os.kill(process, signal.SIGCONT)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(UnreadableVideo, match=rf"clip\.mp4 cannot be read as a video: {reason} .*{detail}") as error:
        reader.get_frames(range(40))
    thread.join()
    assert error.value.reason == reason
    assert number(other.get_frames([2])[0]) == 62  # others go on, with a new one
    assert number(reader.get_frames([4])[0]) == 4


def test_a_decoder_that_hangs_ends_itself():
    code = "from tokgen.data import decoders\ndecoders._alarm(1)\nwhile True: pass"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGALRM


def test_memory_is_limited():
    code = (
        "from tokgen.data import decoders; import numpy as np; decoders.MEMORY = 1 << 28; decoders._limit_memory()\n"
        "np.ones(1 << 26, np.uint8)\ntry: np.ones(1 << 29, np.uint8)\nexcept MemoryError: print('refused')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "refused\n"


def test_interrupted_reading_leaves_nothing_for_the_next(monkeypatch):
    reader = open_video(video())
    read = module._Decoder.read
    calls = iter([read, lambda self, into: (_ for _ in ()).throw(KeyboardInterrupt)])
    with monkeypatch.context() as patch:
        patch.setattr(module._Decoder, "read", lambda self, into: next(calls)(self, into))
        with pytest.raises(KeyboardInterrupt):
            reader.get_frames([0, 1, 2])
    assert numbers(reader.get_frames([20, 21])) == [20, 21]


def _in_child(reader, found) -> None:
    found.put((numbers(reader.get_frames([11, 3])), pid()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_reader_carried_over_a_fork_opens_the_video_anew():
    reader = open_video(video())
    pieces = reader.frames(range(40))
    next(pieces)
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    children = [context.Process(target=_in_child, args=(reader, found)) for _ in range(2)]
    for child in children:
        child.start()
    results = [found.get(timeout=60) for _ in children]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert [frames for frames, _ in results] == [[11, 3], [11, 3]]
    assert len({pid(), *(process for _, process in results)}) == 3
    assert number(next(pieces)) == 1  # and the parent's is as it was


def test_the_decoder_ends_with_the_process_that_reads(tmp_path):
    (tmp_path / "a.mp4").write_bytes(video())
    code = (
        "import sys, os; from tokgen.data import video; video.open_video(sys.argv[1]); "
        "print(video._decoder()._process.pid, flush=True); os._exit(0)"  # without any farewell
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "a.mp4"], capture_output=True, text=True, check=True)
    for _ in range(100):
        try:
            os.kill(int(out.stdout), 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{int(out.stdout)}/stat") as file:
            if file.read().split()[2] == "Z":  # ended, and nobody has asked yet
                return
        time.sleep(0.05)
    pytest.fail("the decoder is still there")


def test_errors_are_kinds_that_callers_know():
    with pytest.raises(DataError) as error:
        open_video(b"", name="empty.mp4")
    assert str(error.value) == "empty.mp4 cannot be read as a video: empty file" and error.value.reason == "empty file"
    assert not isinstance(error.value, BadSample)


def test_drawn_numbers_are_read_back():
    assert numbers([barcode(i) for i in range(256)]) == list(range(256))
