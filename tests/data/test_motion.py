"""Motion: found in clips that are known, brought into the published units, and kept in shards."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from shard_makers import write_images

from tokgen.data import motion
from tokgen.data.batches import Captions, MotionSamples
from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.decode import BadSample
from tokgen.data.motion import (
    SCALE,
    STD,
    codec_motion,
    displacements,
    match_blocks,
    motion_map,
    motion_shards,
    read_clips,
    vector_map,
)
from tokgen.data.shards import Manifest, ShardWriter
from tokgen.data.tar import RawSample, iter_samples
from tokgen.errors import ConfigError, DataError, InputError

av = pytest.importorskip("av")
FIELDS = ("source", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")


def moving(right: int, down: int, frames: int = 24, height: int = 96, width: int = 128, seed: int = 0) -> torch.Tensor:
    """A window over a large smooth texture: its content moves by that many pixels a frame. uint8 (T, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 40, 50, generator=generator) * 255
    big = torch.nn.functional.interpolate(coarse, (320, 400), mode="bicubic").clamp(0, 255).to(torch.uint8)[0]
    y, x = 100, 130  # in the middle; the window goes against the content
    return torch.stack(
        [big[:, y - down * t : y - down * t + height, x - right * t : x - right * t + width] for t in range(frames)]
    )


def video(frames: torch.Tensor, rate: int = 6, format: str = "mp4") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=format) as out:
        stream = out.add_stream("mpeg4", rate=rate, options={"g": "1", "flags": "+qscale", "global_quality": "118"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[2:], "yuv420p"
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


# -- finding motion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right, down", [(3, -2), (-4, 1), (0, 0), (1, 3)])
@pytest.mark.parametrize("find", [codec_motion, match_blocks])
def test_a_known_translation_is_found(find, right, down):
    vectors = find(moving(right, down))
    assert vectors.shape == (24, 2, 6, 8)
    assert (vectors[0] == 0).all()
    inside = vectors[:, :, 1:-1, 1:-1].flatten(2)  # content that comes in at the edges has no origin
    wanted = torch.tensor([right, down], dtype=torch.float32)
    for t in [*range(1, 12), *range(13, 24)]:
        assert torch.equal(inside[t].median(-1).values, wanted)
        assert (inside[t] == wanted[:, None]).all(0).float().mean() > 0.8


def test_the_codec_has_a_keyframe_every_twelve_frames_even_where_the_scene_changes():
    frames = moving(3, -2)
    frames[5:] = moving(3, -2, seed=1)[5:]  # a cut
    vectors = codec_motion(frames)
    still = [t for t in range(24) if not vectors[t].any()]
    assert still == [0, 12]


def test_block_matching_finds_two_objects_that_part():
    frames = moving(0, 0)
    square = moving(0, 0, 1, 32, 32, seed=5)[0]
    for t in range(24):
        frames[t, :, 32:64, 16 + 2 * t : 48 + 2 * t] = square
    vectors = match_blocks(frames)
    assert torch.equal(vectors[8, :, 2, 2], torch.tensor([2.0, 0.0]))  # pixels 32..48: inside the square
    assert torch.equal(vectors[8, :, 0, 7], torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize("right, down", [(16, 0), (-15, 16)])
def test_block_matching_reaches_as_far_as_it_says(right, down):
    vectors = match_blocks(moving(right, down, frames=2, height=128, width=160), search=16)
    assert torch.equal(vectors[1, :, 2:-2, 2:-2].flatten(1).median(-1).values, torch.tensor([right, down]).float())


@pytest.mark.parametrize("find", [codec_motion, match_blocks])
def test_frames_of_another_kind_are_named(find):
    with pytest.raises(InputError, match=r"expected uint8 \(T, 3, H, W\)"):
        find(torch.rand(24, 3, 32, 32))
    with pytest.raises(InputError, match="of at least 16 x 16"):
        find(torch.zeros(24, 3, 8, 32, dtype=torch.uint8))
    with pytest.raises(InputError, match="even sizes"):
        codec_motion(torch.zeros(24, 3, 33, 32, dtype=torch.uint8))


def vectors_of(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(list(rows), dtype=[(name, "i4") for name in FIELDS])


def test_vectors_are_pooled_as_published():
    vectors = vectors_of(
        (-1, 8, 8, -6, 4, 2),  # half pixels of the frame before: content came 3 to the right and 2 up
        (-1, 24, 8, 4, 8, 4),  # quarter pixels
        (-1, 40, 8, 0, 0, 2),  # at rest
        (-1, 36, 24, -2, 8, 2),  # two vectors in one cell: the larger of each direction
        (-1, 44, 24, -8, 2, 2),
        (-1, 8, 40, -20, -20, 2),  # in the last row of less than 16 pixels: dropped
        (-1, 72, 8, -20, -20, 2),  # outside
    )
    pooled = vector_map(vectors, 44, 64)
    assert pooled.shape == (2, 2, 4)
    expected = torch.zeros(2, 2, 4)
    expected[:, 0, 0] = torch.tensor([3.0, -2.0])
    expected[:, 0, 1] = torch.tensor([-1.0, -2.0])
    expected[:, 1, 2] = torch.tensor([4.0, -1.0])
    assert torch.equal(pooled, expected)

    # and as the publication says it: the maximum over 16 x 16 pixels of a map of -10000
    big = torch.full((1, 2, 44, 64), -10_000.0)
    for source, x, y, mx, my, scale in vectors.tolist():
        if x < 64:
            big[0, :, y, x] = torch.tensor([source * mx / scale, source * my / scale])
    slow = torch.nn.functional.max_pool2d(big, 16)[0]
    assert torch.equal(pooled, torch.where(slow == -10_000, 0, slow))


# -- maps ---------------------------------------------------------------------------------------------------------------


def test_maps_are_in_the_published_units():
    vectors = torch.zeros(24, 2, 11, 20)
    vectors[:, 0], vectors[:, 1] = 3.2, -1.8  # 1 % of the width, and of the height
    maps = motion_map(vectors, 180, 320)
    assert maps.shape == (24, 2, 20, 36) and maps.dtype == torch.float32
    assert (maps[0] == 0).all()
    wanted = torch.tensor([0.01 / 0.0993703 * 10, -0.01 / 0.1130276 * 10]).view(2, 1, 1)
    assert torch.allclose(maps[1:], wanted.expand(23, 2, 20, 36), rtol=1e-5)
    assert torch.allclose(displacements(maps, 180, 320)[5, :, 3, 3], torch.tensor([3.2, -1.8]))
    assert (STD, SCALE) == ((0.0993703, 0.1130276), 10.0)


def test_the_second_keyframe_is_the_mean_of_its_neighbours():
    vectors = torch.arange(24.0).view(24, 1, 1, 1).repeat(1, 2, 20, 36)
    vectors[12] = -99.0
    maps = displacements(motion_map(vectors, 320, 576), 320, 576)
    assert torch.allclose(maps[:, 0, 0, 0], torch.arange(24.0), atol=1e-4)


def test_resizing_is_bicubic():
    vectors = torch.randn(24, 2, 11, 20, generator=torch.Generator().manual_seed(0))
    maps = displacements(motion_map(vectors, 180, 320), 180, 320)
    wanted = torch.nn.functional.interpolate(vectors[5:6], (20, 36), mode="bicubic")[0]
    assert torch.allclose(maps[5], wanted, atol=1e-4)


def test_motion_of_your_own_is_checked():
    with pytest.raises(InputError, match=r"expected float \(T, 2, h, w\)"):
        motion_map(torch.zeros(24, 3, 8, 8), 100, 100)
    with pytest.raises(InputError, match="give 0 where the motion is unknown"):
        motion_map(torch.full((24, 2, 8, 8), float("nan")), 100, 100)


# -- reading videos -------------------------------------------------------------------------------------------------------


def test_frames_are_taken_at_six_a_second(tmp_path):
    shade = torch.arange(100).view(100, 1, 1, 1).expand(100, 3, 32, 48).to(torch.uint8) * 2
    (tmp_path / "a.mp4").write_bytes(video(shade, rate=24))
    clips = list(read_clips(tmp_path / "a.mp4"))  # 100 frames at 24 a second: 25 at 6
    assert len(clips) == 1 and clips[0].shape == (24, 3, 32, 48)
    found = clips[0].float().mean((1, 2, 3)) / 2
    assert torch.allclose(found, torch.arange(24.0) * 4, atol=1.0)  # every fourth; the codec rounds
    assert [len(list(read_clips(video(shade[:n], rate=6)))) for n in (23, 24, 47, 48)] == [0, 1, 1, 2]


def test_slow_videos_repeat_frames_and_large_ones_are_shrunk():
    frames = torch.arange(12).view(12, 1, 1, 1).expand(12, 3, 90, 160).to(torch.uint8) * 20
    (clip,) = read_clips(video(frames, rate=3), side=80)
    assert clip.shape == (24, 3, 44, 80)
    found = (clip.float().mean((1, 2, 3)) / 20).round()
    assert torch.equal(found, torch.arange(12.0).repeat_interleave(2))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "cannot be read as a video"),
        (b"not a video at all" * 100, "cannot be read as a video"),
        (None, "cannot be read as a video"),  # a whole one, cut off
        ("missing", "cannot be opened: No such file"),
    ],
)
def test_a_corrupt_file_is_one_error_that_names_it(tmp_path, data, message):
    path = tmp_path / "holiday.mp4"
    if data != "missing":
        path.write_bytes(video(moving(1, 1))[:5000] if data is None else data)
    with pytest.raises(DataError, match=message) as error:
        list(read_clips(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_pictures_is_named():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        out.mux(stream.encode(sound))
        out.mux(stream.encode())
    with pytest.raises(DataError, match=r"a\.mp4 holds no video"):
        list(read_clips(file.getvalue(), name="a.mp4"))


def test_an_unknown_codec_is_named():
    data = video(moving(1, 1), format="matroska").replace(b"V_MPEG4/ISO/ASP", b"V_NOBODY_KNOWS_")
    with pytest.raises(DataError, match="a kind that no decoder here knows"):
        list(read_clips(data, name="a.mkv"))


@pytest.mark.parametrize("seed", range(12))
def test_damage_gives_clips_or_one_kind_of_error(seed):
    rng, data = random.Random(seed), bytearray(video(moving(1, 1)[:, :, :32, :48]))
    for _ in range(rng.randint(1, 40)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        clips = list(read_clips(bytes(data), name="a.mp4"))
    except DataError as error:
        assert "a.mp4" in str(error)
    else:
        assert all(clip.shape == (24, 3, 32, 48) for clip in clips)


def test_playlists_that_open_other_files_are_not_read(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(video(moving(1, 1)))
    playlist = tmp_path / "list.mp4"
    playlist.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(DataError, match=r"list\.mp4 cannot be read as a video"):
        list(read_clips(playlist))


def test_a_damaged_time_stamp_does_not_fill_the_disk():
    class Frame:
        def __init__(self, time):
            self.time = time

    with pytest.raises(ValueError, match="stays for 900 seconds"):
        list(motion._at_rate([Frame(0.0), Frame(900.0)], 6.0, 6.0))


# -- shards ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    for i in range(3):
        (folder / f"v{i}.mp4").write_bytes(video(moving(i, -1, frames=48, seed=i)[:, :, :64, :96]))
    (folder / "more/v1.mp4").write_bytes(video(moving(2, 2)))
    (folder / "v0.txt").write_text("a texture that drifts\n")
    (folder / "broken.mp4").write_bytes(b"nothing")
    (folder / "short.mp4").write_bytes(video(moving(1, 1)[:10]))
    return folder


def contents(folder) -> dict[str, dict[str, bytes]]:
    found = {}
    for shard in Manifest.load(folder).shards:
        with open(folder / shard.name, "rb") as file:
            for _, raw in iter_samples(file, extensions=("npy", "txt"), max_member_bytes=1 << 20):
                found[raw.key] = dict(raw.members)
    return found


def test_shards_hold_the_motion_of_each_clip(videos, tmp_path, caplog):
    report = motion_shards(videos, tmp_path / "out", progress=False)
    assert (report.written, report.kept) == (7, 0)
    assert report.skipped == {"unreadable": 1, "too short": 1}
    assert "broken.mp4 cannot be read" in caplog.text and "short.mp4: too short" in caplog.text
    assert str(report) == "motion of 7 clips written, videos left out: 1 (too short), 1 (unreadable)"
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.kind, manifest.samples, manifest.meta["shape"]) == ("motion", 7, [24, 2, 20, 36])
    found = contents(tmp_path / "out")
    assert sorted(found) == ["more_v1_0000", *(f"v{i}_000{c}" for i in range(3) for c in range(2))]
    assert found["v0_0001"]["txt"] == b"a texture that drifts" and "txt" not in found["v1_0000"]

    data = ShardsDataModule(train=str(tmp_path / "out"), val=str(tmp_path / "out"), batch_size=7)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert data.kind == "motion" and batch["motion"].shape == (7, 24, 2, 20, 36)
    assert batch["motion"].dtype == torch.float32
    row = batch["key"].index("v2_0001")
    clip = list(read_clips(videos / "v2.mp4"))[1]
    wanted = motion_map(codec_motion(clip), *clip.shape[2:])
    assert torch.equal(batch["motion"][row], wanted.half().float())
    pixels = displacements(batch["motion"][row], 64, 96)
    assert torch.allclose(pixels[5].flatten(1).median(-1).values, torch.tensor([2.0, -1.0]), atol=0.05)
    assert batch["caption"][batch["key"].index("v0_0000")] == "a texture that drifts"
    assert batch["caption"][row] == ""
    assert next(iter(data.train_dataloader()))["motion"].shape[0] == 7


def test_an_interrupted_run_goes_on(videos, tmp_path, monkeypatch):
    motion_shards(videos, tmp_path / "whole", max_samples=2, progress=False)
    found = motion.METHODS["codec"]
    calls = []

    def dies_at_the_sixth(frames):
        calls.append(len(frames))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return found(frames)

    monkeypatch.setitem(motion.METHODS, "codec", dies_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        motion_shards(videos, tmp_path / "out", max_samples=2, progress=False)
    assert not (tmp_path / "out/manifest.json").exists()
    report = motion_shards(videos, tmp_path / "out", max_samples=2, progress=False)
    # two shards of two were whole; the fourth clip is the first of a video of two
    assert (report.kept, report.written) == (4, 3) and len(calls) == 6 + 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = motion_shards(videos, tmp_path / "out", max_samples=2, progress=False)
    assert (again.kept, again.written) == (7, 0) and len(calls) == 9
    with pytest.raises(DataError, match="begun with another meta"):
        motion_shards(videos, tmp_path / "out", method="match", progress=False)


def test_videos_in_shards_give_the_same_motion(videos, tmp_path):
    with ShardWriter(tmp_path / "packed", kind="videos", meta={"captions": False}) as writer:
        writer.write("v0", {"mp4": (videos / "v0.mp4").read_bytes(), "txt": "a texture that drifts"})
        writer.write("broken", {"mp4": b"nothing"})
        writer.write("v1", {"mp4": (videos / "v1.mp4").read_bytes()})
    report = motion_shards(tmp_path / "packed", tmp_path / "out", clips=1, progress=False)
    assert (report.written, report.skipped) == (2, {"unreadable": 1})
    motion_shards(videos, tmp_path / "folder", progress=False)
    found, files = contents(tmp_path / "out"), contents(tmp_path / "folder")
    assert sorted(found) == ["v0_0000", "v1_0000"]
    assert all(members == files[key] for key, members in found.items())


def test_what_cannot_work_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no videos"):
        motion_shards(tmp_path / "empty", tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="unknown method 'flow' to find motion; expected one of codec, match"):
        motion_shards(tmp_path / "empty", tmp_path / "out", method="flow")
    images = write_images(tmp_path / "images", [2])
    with pytest.raises(DataError, match="holds images; expected videos"):
        motion_shards(images, tmp_path / "out", progress=False)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.mp4").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"gives no clip; the first video left out: .*x\.mp4 cannot be read"):
        motion_shards(tmp_path / "bad", tmp_path / "out", progress=False)


def sample(array: np.ndarray) -> RawSample:
    file = io.BytesIO()
    np.save(file, array)
    return RawSample("k", {"npy": file.getvalue()})


def test_mirrored_motion_goes_the_other_way():
    array = np.random.default_rng(0).normal(size=(24, 2, 20, 36)).astype(np.float16)
    samples = MotionSamples(Captions(required=False), flip=True)
    seen = [samples(sample(array), random.Random(i))["motion"] for i in range(8)]
    plain = torch.from_numpy(array).float()
    mirrored = torch.stack([-plain.flip(-1)[:, 0], plain.flip(-1)[:, 1]], 1)
    kinds = [torch.equal(x, mirrored) - torch.equal(x, plain) for x in seen]
    assert set(kinds) == {1, -1}
    still = MotionSamples(flip=True, train=False)
    assert all(torch.equal(still(sample(array), random.Random(i))["motion"], plain) for i in range(8))


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.zeros((24, 2, 20, 35), np.float16), "bad motion"),
        (np.zeros((24, 2, 20, 36), np.int16), "bad motion"),
        (np.full((24, 2, 20, 36), np.inf, np.float16), "bad motion"),
    ],
)
def test_bad_maps_are_bad_samples(array, reason):
    with pytest.raises(BadSample) as error:
        MotionSamples()(sample(array), random.Random(0))
    assert error.value.reason == reason
