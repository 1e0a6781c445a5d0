"""`tokgen trajectories`: shards with the trajectories of each video, sidecars of one, and pictures of both."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokgen.cli import main
from tokgen.data.shards import MANIFEST, UNITS, Manifest, ShardWriter, verify
from tokgen.data.tar import iter_samples
from tokgen.errors import ConfigError, DataError, InputError
from tokgen.trajectories import precompute
from tokgen.trajectories.base import SOURCES, Trajectories, TrajectorySource
from tokgen.trajectories.picture import boundaries, colours, gif_bytes, mp4_bytes, overlay, picture, write_picture
from tokgen.trajectories.precompute import Finder, Frames, stored_clips, trajectory_shards, trajectory_sidecar

av = pytest.importorskip("av")
FRAMES = Frames(size=32, grid=16)


class Quarters(TrajectorySource):
    """What is dark has none; bright pixels are numbered by the quarter of the picture that they are in, with gaps."""

    name = "quarters"
    calls = 0

    def __init__(self, threshold: int = 100) -> None:
        self.threshold = threshold

    def track(self, video: np.ndarray) -> Trajectories:
        Quarters.calls += 1
        if video.mean() > 230:
            raise InputError("a clip that is white all over has no trajectories")
        h, w = video.shape[1:3]
        quarter = 2 * (np.arange(h) >= h / 2)[:, None] + (np.arange(w) >= w / 2)
        bright = video.mean(-1) > self.threshold
        return Trajectories(np.where(bright, 10 * quarter + 5, -1))

    def settings(self) -> dict:
        return {"threshold": self.threshold}


@pytest.fixture(autouse=True)
def quarters(monkeypatch):
    monkeypatch.setitem(SOURCES, "quarters", f"{__name__}:Quarters")
    monkeypatch.setattr(Quarters, "calls", 0)


def frames_of(i: int, t: int = 6, h: int = 32, w: int = 32) -> np.ndarray:
    """A bright square that wanders over a dark picture."""
    video = np.full((t, h, w, 3), 20, np.uint8)
    for k in range(t):
        x = (3 * k + 5 * i) % (w - 12)
        video[k, 8:20, x : x + 12] = (250, 200, 40 * (i % 5))
    return video


def make(folder: Path, count: int = 7, bad: tuple[int, ...] = (), white: tuple[int, ...] = ()) -> Path:
    with ShardWriter(folder, kind="videos", meta={"captions": True, "mine": 1}, max_samples=3) as writer:
        for i in range(count):
            video = np.full_like(frames_of(i), 255) if i in white else frames_of(i, 4 + i)
            data = mp4_bytes(video, 8, crf=8)
            data = data[:60] + bytes(len(data) - 60) if i in bad else data
            writer.write(f"v{i}", {"mp4": data, "txt": f"video {i}", "json": {"i": i}})
    return folder


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    found = {}
    for shard in Manifest.load(folder).shards:
        with open(folder / shard.name, "rb") as file:
            for _, raw in iter_samples(file, extensions=("mp4", "txt", "json", "traj.npy"), max_member_bytes=1 << 20):
                found[raw.key] = raw.members
    return found


def planes(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


# -- shards ------------------------------------------------------------------------------------------------------------


def test_shards_again_with_trajectories_beside_each_video(tmp_path):
    source, out = make(tmp_path / "in"), tmp_path / "out"
    report = trajectory_shards(source, out, {"type": "quarters"}, FRAMES, max_samples=3, progress=False)
    assert (report.written, report.kept, report.skipped) == (7, 0, {}) and not verify(out)
    meta = Manifest.load(out).meta
    made = {
        "source": {"type": "quarters", "threshold": 100},
        "size": 32,
        "resize": "crop",
        "grid": [16, 16],
        "fps": None,
    }
    assert meta == {"captions": True, "mine": 1, "trajectories": made}
    before, after = members(source), members(out)
    assert list(before) == list(after)
    for key, kept in before.items():
        assert {e: after[key][e] for e in kept} == kept
        labels = planes(after[key]["traj.npy"]).astype(int) - 1
        i = int(key[1:])
        truth = frames_of(i, 4 + i)[:, 1::2, 1::2].mean(-1) > 100  # the middle of a cell of 2 x 2 is at its last pixel
        assert planes(after[key]["traj.npy"]).dtype == np.uint8 and labels.shape == (4 + i, 16, 16)
        assert ((labels >= 0) == truth).mean() > 0.99
        numbers = np.unique(labels)
        assert numbers.tolist() == list(range(-1, labels.max() + 1)) and labels.max() >= 1  # compact
    each = sum(int(planes(m["traj.npy"]).max()) for m in after.values()) / 7
    assert str(report) == f"7 samples given trajectories ({each:.1f} each)"


def test_an_interrupted_run_goes_on_where_it_ended(tmp_path, monkeypatch):
    source, out, whole = make(tmp_path / "in"), tmp_path / "out", tmp_path / "whole"
    trajectory_shards(source, whole, {"type": "quarters"}, FRAMES, max_samples=2, progress=False)
    Quarters.calls = 0
    track = Quarters.track

    def until(self, video):
        if Quarters.calls == 5:
            raise KeyboardInterrupt
        return track(self, video)

    monkeypatch.setattr(Quarters, "track", until)
    with pytest.raises(KeyboardInterrupt):
        trajectory_shards(source, out, {"type": "quarters"}, FRAMES, max_samples=2, progress=False)
    assert not (out / MANIFEST).exists() and len(list(out.glob(f"{UNITS}/*/*.tar"))) == 2
    Quarters.calls = 0
    monkeypatch.setattr(Quarters, "track", track)
    report = trajectory_shards(source, out, {"type": "quarters"}, FRAMES, max_samples=2, progress=False)
    assert (report.kept, report.written, Quarters.calls) == (4, 3, 3)
    for path in whole.glob("*.tar"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    report = trajectory_shards(source, out, {"type": "quarters"}, FRAMES, max_samples=2, progress=False)
    assert (report.kept, report.written, Quarters.calls) == (7, 0, 3)


@pytest.mark.parametrize(
    "settings, frames, fact",
    [
        ({"type": "quarters", "threshold": 7}, FRAMES, "source"),
        ({"type": "quarters"}, Frames(size=32, grid=8), "grid"),
        ({"type": "quarters"}, Frames(size=16, grid=16), "size"),
        ({"type": "quarters"}, Frames(size=32, grid=16, resize="squash"), "resize"),
        ({"type": "quarters"}, Frames(size=32, grid=16, fps=4), "fps"),
    ],
)
def test_other_settings_are_not_mixed_in(tmp_path, settings, frames, fact):
    source, out = make(tmp_path / "in", 2), tmp_path / "out"
    trajectory_shards(source, out, {"type": "quarters"}, FRAMES, progress=False)
    with pytest.raises(DataError, match=f"with {fact} "):
        trajectory_shards(source, out, settings, frames, progress=False)
    assert not verify(out)


def test_bad_videos_are_left_out_and_counted(tmp_path, caplog):
    source, out = make(tmp_path / "in", 6, bad=(1, 4), white=(2,)), tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        report = trajectory_shards(source, out, {"type": "quarters"}, FRAMES, progress=False)
    assert sorted(members(out)) == ["v0", "v3", "v5"] and report.written == 3
    assert report.skipped.pop("not taken by the source") == 1 and sum(report.skipped.values()) == 2
    assert all(f"v{i}" in caplog.text for i in (1, 2, 4)) and "white all over" in caplog.text


def test_no_video_that_gives_trajectories_is_an_error(tmp_path):
    source = make(tmp_path / "in", 2, bad=(0, 1))
    with pytest.raises(DataError, match=r"no sample of .* can be used: 2 \("):
        trajectory_shards(source, tmp_path / "out", {"type": "quarters"}, FRAMES, progress=False)
    long = Frames(size=32, grid=16, max_frames=3)
    with pytest.raises(DataError, match=r"2 \(too long\)"):
        trajectory_shards(make(tmp_path / "long", 2), tmp_path / "out2", {"type": "quarters"}, long, progress=False)


def test_what_cannot_be_asked_for(tmp_path):
    source = make(tmp_path / "in", 1)
    with pytest.raises(ConfigError, match="voting"):
        trajectory_shards(source, tmp_path / "o", {"type": "nothing"}, progress=False)
    with pytest.raises(ConfigError, match="workers"):
        trajectory_shards(source, tmp_path / "o", {"type": "quarters"}, workers=-1, progress=False)
    for wrong in (
        {"size": 0},
        {"grid": 0},
        {"resize": "stretch"},
        {"fps": 0},
        {"fps": float("nan")},
        {"max_frames": 0},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Frames(**wrong)
    with ShardWriter(tmp_path / "pictures") as writer:
        writer.write("a", {"txt": "no video"})
    with pytest.raises(DataError, match="holds images"):
        trajectory_shards(tmp_path / "pictures", tmp_path / "o", {"type": "quarters"}, progress=False)
    with pytest.raises(DataError, match="without trajectories"):
        next(stored_clips(source))


def test_the_timeline_and_the_square(tmp_path):
    """Half the rate has every other frame; "crop" takes the middle, "squash" all."""
    wide = frames_of(0, 8, 32, 64)
    wide[:, :, :16] = 255  # at the left edge, which only "squash" sees
    file = tmp_path / "wide.mp4"
    file.write_bytes(mp4_bytes(wide, 8, crf=6))
    for resize, fps, count in (("crop", None, 8), ("squash", None, 8), ("crop", 4, 4)):
        frames = Frames(size=32, grid=32, resize=resize, fps=fps)
        pictures, found = Finder({"type": "quarters"}, frames)("wide", file)
        assert pictures.frames.shape == (count, 32, 32, 3) and found.shape == (count, 32, 32)
        assert (pictures.height, pictures.width, pictures.fps) == (32, 64, fps or 8)
        seen = wide[:, :, 16:48] if resize == "crop" else wide.reshape(8, 32, 32, 2, 3).mean(3)
        error = np.abs(pictures.frames.astype(float) - seen[:: 8 // count]).mean()
        assert error < 12 and ((found.labels[:, :, 0] >= 0).all() == (resize == "squash"))


def test_batches_hold_pictures_and_their_trajectories(tmp_path):
    from tokgen.data.datamodule import ShardsDataModule

    source, out = make(tmp_path / "in", 4), tmp_path / "out"
    trajectory_shards(source, out, {"type": "quarters"}, Frames(size=32, grid=32, fps=8), progress=False)
    data = ShardsDataModule(val=str(out), batch_size=2, frames=4, fps=8, image_size=32, resize="crop", num_workers=0)
    batches = list(data.val_dataloader())
    assert sum(len(b["key"]) for b in batches) == 4
    for batch in batches:
        bright = batch["pixels"].float().mean(2) > 100  # (B, T, h, w)
        assert batch["trajectories"].shape == (2, 4, 32, 32)
        assert ((batch["trajectories"] >= 0) == bright).float().mean() > 0.999
    with pytest.raises(ConfigError, match="fps"):
        list(ShardsDataModule(val=str(out), batch_size=2, frames=4, image_size=32, num_workers=0).val_dataloader())


# -- trajectories of one's own -----------------------------------------------------------------------------------------


def own(folder: Path, count: int, h: int = 24, w: int = 24) -> dict[str, np.ndarray]:
    labels = {f"v{i}": np.random.default_rng(i).integers(-1, 5, (4 + i, h, w)) for i in range(count)}
    for key, value in labels.items():
        Trajectories(value).save(folder / key)
    return labels


def test_arrays_are_taken_from_sidecars(tmp_path):
    source, own_ones = make(tmp_path / "in", 5), own(tmp_path / "own", 4)
    Trajectories(np.zeros((9, 4, 4), int)).save(tmp_path / "own" / "v2")  # of another length
    settings = {"type": "arrays", "folder": str(tmp_path / "own")}
    report = trajectory_shards(source, tmp_path / "out", settings, Frames(32, grid=24), progress=False)
    assert report.skipped == {"no trajectories": 1, "trajectories of another length": 1}
    made = Manifest.load(tmp_path / "out").meta["trajectories"]
    assert made["source"] == {"type": "arrays"} and made["folder"] == settings["folder"]
    for key, kept in members(tmp_path / "out").items():
        assert np.array_equal(planes(kept["traj.npy"]).astype(int) - 1, Trajectories(own_ones[key]).compact().labels)


def test_arrays_of_whole_frames_are_cut_as_the_frames_are(tmp_path):
    file = tmp_path / "v0.mp4"
    file.write_bytes(mp4_bytes(frames_of(0, 4, 32, 64), 8))
    labels = np.random.default_rng(0).integers(0, 300, (4, 16, 32))
    Trajectories(labels).save(tmp_path / "own" / "v0")
    settings = {"type": "arrays", "folder": str(tmp_path / "own")}
    _, crop = Finder(settings, Frames(32, grid=16))("v0", file)
    assert np.array_equal(crop.labels, Trajectories(labels[:, :, 8:24]).compact().labels)
    _, squash = Finder(settings, Frames(32, "squash", grid=16))("v0", file)
    assert np.array_equal(squash.labels, Trajectories(labels[:, :, 1::2]).compact().labels)
    Trajectories(labels[:, :, :20]).save(tmp_path / "own" / "v0")  # the aspect ratio of neither
    with pytest.raises(DataError, match="another shape"):
        trajectory_sidecar(file, tmp_path / "o", settings, Frames(32, grid=16))


def test_arrays_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        Finder({"type": "arrays", "folder": str(tmp_path / "nowhere")})
    for settings in ({"type": "arrays"}, {"type": "arrays", "folder": str(tmp_path), "more": 1}):
        with pytest.raises(ConfigError, match="folder"):
            Finder(settings)


@pytest.mark.slow
def test_workers_write_the_same(tmp_path):
    source = make(tmp_path / "in", 7, bad=(2,))
    own(tmp_path / "own", 6)
    settings = {"type": "arrays", "folder": str(tmp_path / "own")}
    reports = [
        trajectory_shards(source, tmp_path / str(n), settings, FRAMES, workers=n, max_samples=2, progress=False)
        for n in (0, 2)
    ]
    assert str(reports[0]) == str(reports[1]) and reports[0].written == 5 and sum(reports[0].skipped.values()) == 2
    for path in (tmp_path / "0").iterdir():
        assert (tmp_path / "2" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_processes_share_the_work(tmp_path):
    source = make(tmp_path / "in", 7, bad=(2,))
    own(tmp_path / "own", 7)
    settings = {"type": "arrays", "folder": str(tmp_path / "own")}
    trajectory_shards(source, tmp_path / "alone", settings, FRAMES, max_samples=2, progress=False)
    words = [
        sys.executable, "-m", "tokgen", "trajectories", source, tmp_path / "shared", "--source", "arrays",
        "--set", f"folder={tmp_path / 'own'}", "--size", FRAMES.size, "--grid", FRAMES.grid, "--max_samples", 2,
    ]  # fmt: skip
    both = [subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(int(re.search(r"(\d+) samples given", text)[1]) for text in said) == 6
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "shared").iterdir())
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()


def die(raw) -> None:
    os._exit(3)


@pytest.mark.slow
def test_a_process_that_dies_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(precompute, "_work", die)
    own(tmp_path / "own", 2)
    settings = {"type": "arrays", "folder": str(tmp_path / "own")}
    with pytest.raises(DataError, match="died at video v"):
        trajectory_shards(make(tmp_path / "in", 2), tmp_path / "o", settings, FRAMES, workers=1, progress=False)


# -- the command -------------------------------------------------------------------------------------------------------


def run(*words) -> int:
    return main([str(w) for w in words])


def test_the_command_on_shards(tmp_path, capsys):
    source, out, drawn = make(tmp_path / "in", 3, bad=(0,)), tmp_path / "out", tmp_path / "drawn.png"
    words = ("--source", "quarters", "--size", 32, "--grid", 8, "--fps", 4)
    assert run("trajectories", source, out, *words, "--set", "threshold=90", "--picture", drawn) == 0
    said = capsys.readouterr().out
    assert "2 samples given trajectories" in said and str(out) in said
    made = Manifest.load(out).meta["trajectories"]
    assert made["source"] == {"type": "quarters", "threshold": 90} and made["fps"] == 4 and made["grid"] == [8, 8]
    (key, pictures, found), _ = stored_clips(out)
    assert key == "v1" and found.shape == (3, 8, 8) and pictures.frames.shape == (3, 32, 32, 3)
    assert np.array_equal(np.asarray(Image.open(drawn)), picture(pictures.frames, found))
    assert run("trajectories", source, out, *words) == 2  # without --set
    assert "source" in capsys.readouterr().err


def test_the_command_on_one_video(tmp_path, capsys):
    file, stem = tmp_path / "clip.mp4", tmp_path / "deep" / "clip"
    file.write_bytes(mp4_bytes(frames_of(1), 8, crf=8))
    words = ("--source", "quarters", "--size", 32, "--grid", 16, "--picture", tmp_path / "clip.gif")
    assert run("trajectories", file, stem, *words) == 0
    assert "trajectories through 6 pictures" in capsys.readouterr().out
    found = Trajectories.load(stem)
    assert found.shape == (6, 16, 16) and found.count >= 2
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames == 6 and gif.size == (64, 32)
    # and back in, as arrays
    stem.with_name("clip_mask.npz").rename(tmp_path / "clip_mask.npz")
    stem.with_name("clip_graph.npz").rename(tmp_path / "clip_graph.npz")
    again = ("--source", "arrays", "--set", f"folder={tmp_path}", "--size", 32, "--grid", 16)
    assert run("trajectories", file, tmp_path / "again", *again) == 0
    assert np.array_equal(Trajectories.load(tmp_path / "again").labels, found.labels)


@pytest.mark.parametrize(
    "words, said",
    [
        (("--set", "threshold"), "key=value"),
        (("--set", "threshold=[1"), "key=value"),
        (("--set", "wrong=1"), "wrong"),
        (("--source", "nothing"), "nothing"),
        (("--picture", "x.bmp"), ".gif"),
        (("--grid", 0), "grid"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, words, said):
    file = tmp_path / "clip.mp4"
    file.write_bytes(mp4_bytes(frames_of(1), 8))
    assert run("trajectories", file, tmp_path / "o", "--source", "quarters", *words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not list(tmp_path.glob("o*"))


def test_a_video_that_is_none(tmp_path, capsys):
    (tmp_path / "clip.mp4").write_text("no video")
    assert run("trajectories", tmp_path / "clip.mp4", tmp_path / "o", "--source", "quarters") == 2
    assert "clip.mp4" in capsys.readouterr().err
    assert run("trajectories", tmp_path / "nowhere", tmp_path / "o", "--source", "quarters") == 2
    assert "nowhere" in capsys.readouterr().err


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_colours_are_stable_and_apart():
    many = colours(64).astype(int)
    assert np.array_equal(colours(200)[:64], many)
    apart = np.abs(many[:, None] - many[None]).max(-1) + 255 * np.eye(64, dtype=int)
    assert (
        apart.min() >= 12 and np.abs(np.diff(many, axis=0)).max(1).min() > 60
    )  # neighbours in number more than others


def test_boundaries_lie_between_labels():
    labels = np.array([[[0, 0, 1], [0, 0, 1], [2, 2, 2]]])
    wanted = [[[False, True, False], [True, True, True], [False, False, False]]]
    assert boundaries(labels).tolist() == wanted


def test_an_overlay_tints_what_has_a_trajectory_and_nothing_else():
    frames = np.full((2, 4, 8, 3), 100, np.uint8)
    labels = np.full((2, 2, 4), -1)
    labels[0, :, 2:] = 3  # half of the first frame
    drawn = overlay(frames, Trajectories(labels), 0.6)
    assert (drawn[1] == 100).all() and (drawn[0, :, :3] == 100).all() and (drawn[0, :, 3] == 255).all()
    assert (drawn[0, :, 4:] == np.rint(40 + 0.6 * colours(4)[3])).all()
    for wrong in (frames[:1], frames[..., :2]):
        with pytest.raises(InputError):
            overlay(wrong, Trajectories(labels))


def test_pictures_have_a_row_for_each_of_what_is_shown(tmp_path):
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None] * 40 + np.zeros((5, 6, 6, 3), np.uint8)
    nothing = Trajectories(np.full((5, 3, 3), -1))
    drawn = picture(frames, nothing, frames[::-1], columns=3)
    assert drawn.shape == (24, 24, 3)
    assert drawn[4, 4::8, 0].tolist() == [0, 80, 160] == drawn[12, 4::8, 0].tolist()
    assert drawn[20, 4::8, 0].tolist() == [160, 80, 0] and (drawn[0] == 255).all()
    with pytest.raises(InputError, match="same shape"):
        picture(frames, nothing, frames[:, :4])
    with pytest.raises(InputError, match=r"\.png"):
        write_picture(tmp_path / "x.jpg", frames, nothing)
    assert not list(tmp_path.iterdir())


def test_gif_and_mp4_hold_the_clip(tmp_path):
    frames = frames_of(2, 7, 31, 33)
    with Image.open(io.BytesIO(gif_bytes(frames, 8))) as gif:
        shown, lengths = [], []
        for k in range(gif.n_frames):
            gif.seek(k)
            shown.append(np.asarray(gif.convert("RGB")))
            lengths.append(gif.info["duration"])
    assert np.abs(np.stack(shown).astype(int) - frames).max() <= 8 and gif.info["loop"] == 0
    assert sum(lengths) == 880 and max(lengths) - min(lengths) <= 10  # 7 / 8 s, in hundredths
    data = mp4_bytes(frames, 12.5, crf=6)
    assert mp4_bytes(frames, 12.5, crf=6) == data
    with av.open(io.BytesIO(data)) as container:
        assert float(container.streams.video[0].average_rate) == 12.5
        shown = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert shown.shape == (7, 32, 34, 3)  # even sides
    assert np.abs(shown[:, :31, :33].astype(int) - frames).mean() < 6
    for wrong in (0, -1, float("nan"), 2000):
        with pytest.raises(InputError, match="frames a second"):
            mp4_bytes(frames, wrong)


def test_without_h264_the_older_codec_serves(monkeypatch):
    frames = frames_of(2, 7)
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    with av.open(io.BytesIO(mp4_bytes(frames, 8))) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        shown = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert shown.shape == frames.shape and np.abs(shown.astype(int) - frames).mean() < 8


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    frames, found = frames_of(0), Trajectories(np.zeros((6, 4, 4), int))
    write_picture(tmp_path / "a.mp4", frames, found)
    before = (tmp_path / "a.mp4").read_bytes()
    with av.open(io.BytesIO(before)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].frames) == (64, 6)

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("tokgen.files.os.replace", broken)
    for name in ("a.mp4", "a.gif", "a.png"):
        with pytest.raises(OSError, match="disk full"):
            write_picture(tmp_path / name, frames, found)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == before
