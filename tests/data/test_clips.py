"""Clips: which frames of a video a batch holds, squared as pictures are, with their trajectories; the same after a resume."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from video_makers import barcode, number, video

from tokgen.data.batches import resize_image
from tokgen.data.clips import ClipSamples
from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.decode import BadSample, decode_trajectories
from tokgen.data.shards import ShardWriter
from tokgen.data.tar import RawSample
from tokgen.data.video import open_video
from tokgen.errors import ConfigError, DataError

SOURCE = {"source": {"type": "voting"}, "size": 64, "resize": "squash", "grid": [6, 8], "fps": 15}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def planes(count: int, dtype=np.uint8) -> np.ndarray:
    """Stored trajectories: in plane k, the left half has number k, the right half 200, and one corner none."""
    stored = np.empty((count, 6, 8), dtype)
    stored[:, :, :4] = np.arange(count)[:, None, None] + 1
    stored[:, :, 4:] = 201
    stored[:, 0, 0] = 0
    return stored


def sample(trajectories: np.ndarray | None = None, **options) -> RawSample:
    extras = {} if trajectories is None else {"traj.npy": npy(trajectories)}
    return RawSample("clip", {"mp4": video(**options), "txt": b"waves", **extras})


def shown(pixels: torch.Tensor) -> list[int]:
    """The numbers drawn in frames (T, 3, H, W)."""
    return [number(frame.permute(1, 2, 0).numpy()) for frame in pixels]


def write_videos(folder: Path, count: int = 12, trajectories: bool = False, **options) -> Path:
    meta = {"trajectories": SOURCE} if trajectories else {}
    with ShardWriter(folder, kind="videos", meta=meta, max_samples=5) as writer:
        for i in range(count):
            extras = {"traj.npy": planes(20)} if trajectories else {}
            data = video(start=10 * i, gop=6, **options)
            writer.write(f"v{i:02d}", {"mp4": data, "txt": f"video {i}", **extras})
    return folder


# -- which frames -------------------------------------------------------------------------------------------------------


def test_validation_takes_the_middle():
    samples = ClipSamples(frames=8, size=64, resize="squash", train=False)
    item = samples(sample(), None)
    assert item["pixels"].shape == (8, 3, 64, 64) and item["pixels"].dtype == torch.uint8
    raw = ClipSamples(frames=8, resize="none", train=False)(sample(), None)
    assert shown(raw["pixels"]) == list(range(16, 24))
    assert (raw["caption"], raw["key"]) == ("waves", "clip")


@pytest.mark.parametrize(
    "count, fps, stride, span, starts",
    [
        (20, None, 1, range(8), range(13)),
        (30, None, 3, range(0, 24, 3), range(9)),
        (60, 10, 2, range(0, 48, 6), range(0, 18, 3)),
    ],
)
def test_training_starts_anywhere_and_keeps_its_distances(count, fps, stride, span, starts):
    samples, raw = ClipSamples(frames=8, fps=fps, stride=stride, resize="none"), sample(count=count)
    found = set()
    for seed in range(80):
        numbers = shown(samples(raw, random.Random(seed))["pixels"])
        assert [n - numbers[0] for n in numbers] == list(span)
        found.add(numbers[0])
    assert found == set(starts)


def test_a_shorter_video_repeats_its_last_frame():
    samples = ClipSamples(frames=8, stride=2, resize="none")
    assert shown(samples(sample(count=5), random.Random(0))["pixels"]) == [0, 2, 4, 4, 4, 4, 4, 4]
    assert shown(samples(sample(count=1), random.Random(0))["pixels"]) == [0] * 8
    exact = ClipSamples(frames=8, fps=10, resize="none", train=False)
    assert shown(exact(sample(count=24), None)["pixels"]) == list(range(0, 24, 3))


def test_another_rate_repeats_or_leaves_out_frames():
    samples = ClipSamples(frames=6, fps=60, resize="none", train=False)
    assert shown(samples(sample(count=3), None)["pixels"]) == [0, 0, 1, 1, 2, 2]


# -- what is done to them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_frames_are_squared_as_pictures_are(resize):
    raw = sample(width=80, height=48)
    item = ClipSamples(frames=4, size=32, resize=resize, train=False)(raw, None)
    with open_video(raw.members["mp4"]) as reader:
        frames = torch.from_numpy(reader.get_frames(range(18, 22))).permute(0, 3, 1, 2)
    assert torch.equal(item["pixels"], torch.stack([resize_image(frame, 32, resize) for frame in frames]))


def test_a_drawn_crop_is_one_for_the_whole_clip():
    # a picture of columns that stands still: where the crop lies shows, and whether it moves
    raw = sample(width=128, height=32, count=6, codec="ffv1", pix_fmt="bgr0", format="matroska")
    raw.members["mkv"] = raw.members.pop("mp4")
    frames = open_video(raw.members["mkv"]).get_frames(range(6))
    samples = ClipSamples(frames=6, size=32, resize="random_crop")
    lefts = set()
    for seed in range(12):
        pixels = samples(raw, random.Random(seed))["pixels"].permute(0, 2, 3, 1).numpy()
        fits = [left for left in range(97) if np.array_equal(pixels, frames[:, :, left : left + 32])]
        assert len(fits) == 1
        lefts.add(fits[0])
    assert len(lefts) > 6


def test_flips_mirror_the_whole_clip_and_its_trajectories():
    samples = ClipSamples(frames=4, fps=15, resize="none", flip=True, trajectories=(6, 8))
    raw, seen = sample(planes(20), codec="ffv1", pix_fmt="bgr0", format="matroska"), set()
    raw.members["mkv"] = raw.members.pop("mp4")
    for seed in range(12):
        item = samples(raw, random.Random(seed))
        plain = torch.equal(item["pixels"][0, :, -4:], item["pixels"][0, :, -4:].flip(-1))
        assert not plain
        flipped = item["trajectories"][0, 0, -1] == -1  # the corner without trajectory
        assert (item["trajectories"][:, 0, -1 if flipped else 0] == -1).all()
        pixels = item["pixels"].flip(-1) if flipped else item["pixels"]
        assert [
            torch.equal(p.permute(1, 2, 0), torch.from_numpy(barcode(n))) for p, n in zip(pixels, shown(pixels))
        ] == [True] * 4
        seen.add(bool(flipped))
    assert seen == {True, False}
    still = ClipSamples(frames=4, resize="none", flip=True, train=False)(sample(), None)
    assert shown(still["pixels"]) == [18, 19, 20, 21]


# -- trajectories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_trajectories_are_those_of_the_frames_and_compact(dtype):
    samples = ClipSamples(frames=4, fps=15, stride=2, resize="none", trajectories=(6, 8))
    raw = sample(planes(20, dtype))
    for seed in range(6):
        item = samples(raw, random.Random(seed))
        labels = item["trajectories"]
        assert labels.shape == (4, 6, 8) and labels.dtype == torch.int32
        first = shown(item["pixels"])[0] // 2  # 30 frames a second, seen at 15
        assert shown(item["pixels"]) == [2 * first, 2 * first + 4, 2 * first + 8, 2 * first + 12]
        assert (labels[:, 0, 0] == -1).all()
        # plane by plane the left half has another number; in order of first appearance the right half comes first, at (0, 4)
        left = [labels[t, 1:, :4].unique().tolist() for t in range(4)]
        right = labels[:, :, 4:].unique().tolist()
        assert sorted([*(n for (n,) in left), *right]) == [0, 1, 2, 3, 4]
        assert left[0] == [0] and right == [1] and left[1:] == [[2], [3], [4]]


def test_bad_trajectories_are_named():
    samples = ClipSamples(frames=4, fps=15, resize="none", train=False, trajectories=(6, 8))

    def reason(trajectories):
        with pytest.raises(BadSample) as error:
            samples(sample(trajectories), None)
        return error.value.reason

    assert reason(None) == "no trajectories"
    assert reason(planes(19)) == "bad trajectories"  # not one for each position of the timeline
    assert reason(planes(20)[:, :5]) == "bad trajectories"
    assert reason(planes(20).astype(np.float32)) == "bad trajectories"
    assert reason(planes(20).astype(np.int32) - 1) == "bad trajectories"
    with pytest.raises(BadSample, match=r"bad trajectories: number -1: 0 \(none\) or more"):
        decode_trajectories(npy(np.full((1, 2, 2), -1, np.int32)), (1, 2, 2))


# -- as a data module ---------------------------------------------------------------------------------------------------


def module(folder: Path, **changes) -> ShardsDataModule:
    options = {"batch_size": 3, "image_size": 64, "resize": "squash", "frames": 4, "fps": 15, "shuffle_buffer": 4}
    return ShardsDataModule(train=str(folder), val=str(folder), **{**options, **changes})


def test_batches_of_clips(tmp_path):
    data = module(write_videos(tmp_path / "v", trajectories=True), random_flip=True)
    data.setup("fit")
    assert data.kind == "videos" and data.meta["trajectories"] == SOURCE
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        assert batch["pixels"].shape == (3, 4, 3, 64, 64) and batch["pixels"].dtype == torch.uint8
        assert batch["trajectories"].shape == (3, 4, 6, 8) and batch["trajectories"].dtype == torch.int32
    assert sorted(key for batch in batches for key in batch["key"]) == [f"v{i:02d}" for i in range(12)]
    assert all(c == f"video {int(k[1:])}" for b in batches for c, k in zip(b["caption"], b["key"]))
    first = next(iter(data.val_dataloader()))
    assert first["key"] == ["v00", "v01", "v02"] and first["valid"].all()
    # squash to the square changes the height only, so the numbers can be read: positions 8 … 11 of 20, at 30 a second
    assert shown(first["pixels"][1]) == [10 + n for n in (16, 18, 20, 22)]


def test_trajectories_are_left_out_or_demanded(tmp_path):
    folder, bare = write_videos(tmp_path / "v", 3, trajectories=True), write_videos(tmp_path / "bare", 3)
    data = module(folder, trajectories=False, fps=None)
    data.setup("fit")
    assert "trajectories" not in next(iter(data.train_dataloader())) and "trajectories" not in data.meta
    with pytest.raises(ConfigError, match="were made for fps 15, and the data module has fps 8; give it"):
        module(folder, fps=8).setup("fit")
    with pytest.raises(ConfigError, match=r"made for fps 15 and resize squash, .* trajectories=False"):
        module(folder, fps=None, resize="random_crop").setup("fit")
    with pytest.raises(ConfigError, match="does not hold trajectories of one source"):
        module(bare, trajectories=True).setup("fit")
    with pytest.raises(ConfigError, match="give frames"):
        module(folder, frames=None, trajectories=True).setup("fit")
    with pytest.raises(DataError, match=r"trajectories of train come from .*voting.*, those of val from nowhere"):
        ShardsDataModule(
            train=str(folder), val=str(bare), frames=4, fps=15, image_size=64, resize="squash", batch_size=2
        ).setup("fit")
    mixed = module(bare)
    mixed.folders = {"train": [str(folder), str(bare)], "val": None, "test": None}
    mixed.setup("fit")
    assert "trajectories" not in next(iter(mixed.train_dataloader()))


def test_options_that_cannot_work_are_named(tmp_path):
    folder = write_videos(tmp_path / "v", 3)
    for changes, message in (
        ({"fps": 0}, "fps is a number of frames a second above 0"),
        ({"frames": 0}, "frames 0 and frame_stride 1: both are 1 or more"),
        ({"frame_stride": 0}, "frame_stride 0"),
        ({"image_size": None}, "needs image_size"),
        ({"resize": "stretch"}, "is not one of crop"),
        ({"video_backend": "vlc"}, "video_backend 'vlc' is not one of auto, av"),
        ({"random_shift": 2}, "random_shift moves images and not clips"),
    ):
        with pytest.raises(ConfigError, match=message):
            module(folder, **changes).setup("fit")
    with ShardWriter(tmp_path / "sizes", kind="videos") as writer:
        for i, width in enumerate((64, 80)):
            writer.write(f"v{i}", {"mp4": video(4, width=width), "txt": "waves"})
    with pytest.raises(DataError, match=r'\(48, 80\).* and resize is "none", which needs one size'):
        list(module(tmp_path / "sizes", resize="none", image_size=None, batch_size=2).train_dataloader())


def same(one: dict, other: dict) -> bool:
    tensors = all(torch.equal(one[name], other[name]) for name in ("pixels", "trajectories"))
    return tensors and one["key"] == other["key"] and one["caption"] == other["caption"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_is_exact(tmp_path, workers):
    folder = write_videos(tmp_path / "v", 12, trajectories=True)
    options = {"random_flip": True, "num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    data = module(folder, **options)
    data.setup("fit")  # opens a video here, before the workers are forked
    loader = data.train_dataloader()
    whole = [batch for _ in range(2) for batch in loader]
    assert len(whole) == 8 and not same(whole[0], whole[4])
    data.teardown()
    again = module(folder, **options)
    again.setup("fit")
    loader = again.train_dataloader()
    batches = iter(loader)
    for i in range(2):
        assert same(next(batches), whole[i])
    state = loader.state_dict()
    again.teardown()
    resumed = module(folder, **options)
    resumed.setup("fit")
    loader = resumed.train_dataloader()
    loader.load_state_dict(state)
    rest = [batch for _ in range(2) for batch in loader]
    assert len(rest) == 6 and all(same(a, b) for a, b in zip(rest, whole[2:]))
    resumed.teardown()


def test_a_spawned_worker_reads_the_same(tmp_path):
    folder = write_videos(tmp_path / "v", 6, trajectories=True)
    read = []
    for options in ({}, {"num_workers": 1, "multiprocessing_context": "spawn"}):
        data = module(folder, random_flip=True, **options)
        data.setup("fit")
        read.append(list(data.train_dataloader()))
        data.teardown()
    assert len(read[0]) == len(read[1]) == 2 and all(map(same, *read))
