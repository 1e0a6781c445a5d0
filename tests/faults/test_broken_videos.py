"""Broken videos: each a named error, the process alive, and training goes on."""

from __future__ import annotations

import io
import logging
import random
import struct

import av
import lightning as L
import numpy as np
import pytest
import torch

from tests.data.video_makers import numbers, sound_only, video
from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.decoders import importable
from tokgen.data.pack import pack
from tokgen.data.shards import ShardWriter
from tokgen.data.video import UnreadableVideo, open_video
from tokgen.errors import DataError
from tokgen.tokenizers.emu3 import Emu3, Emu3Config
from tokgen.training.autoencoder import AutoencoderLoss, AutoencoderModule
from tokgen.training.base import Schedule

BACKENDS = [name for name in ("av", "decord", "torchcodec") if not importable(name)]


def patched(data: bytes, find: bytes, offset: int, new: bytes) -> bytes:
    at = data.index(find) + offset
    return data[:at] + new + data[at + len(new) :]


def flipped(data: bytes) -> bytes:
    """Bits turned over in every packet of the picture data, and nowhere else."""
    at, changed = data.index(b"mdat") + 40, bytearray(data)
    for i in range(at, data.index(b"moov") - 8, 60):
        changed[i] ^= 0x5A
    return bytes(changed)


def no_frames() -> bytes:
    """A file that was begun and never written to."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as out:
        stream = out.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    return file.getvalue()


def billion_frames() -> bytes:
    """The table of sizes says that a billion frames of one byte follow, in one chunk."""
    data = patched(video(), b"stsz", 8, struct.pack(">II", 1, 10**9))
    return patched(data, b"stsc", 12, struct.pack(">III", 1, 10**9, 1))


def huge() -> bytes:
    """Frames of 16,000 x 16,000 pixels, says the header (FFmpeg itself refuses more); FFV1 knows no better."""
    data = video(2, codec="ffv1", format="matroska", width=320, height=256)
    claim = struct.pack(">H", 16000)
    return patched(patched(data, b"\xb0\x82\x01\x40", 2, claim), b"\xba\x82\x01\x00", 2, claim)  # PixelWidth, -Height


def garbage_index() -> bytes:
    """A Matroska file whose cues, and all from there on, are noise."""
    data = video(format="matroska")
    at = data.rindex(b"\x1c\x53\xbb\x6b")  # Cues
    return data[:at] + np.random.default_rng(0).bytes(len(data) - at)


WHOLE = video(bf=2)
BROKEN = {
    "empty": (b"", "empty file"),
    "text": (b"this is not a video at all\n" * 40, "not a video file"),
    "header cut off": (WHOLE[:20], "unreadable video"),
    "moov missing": (WHOLE[: WHOLE.index(b"moov") - 4], "unreadable video"),
    "cut off in the middle": (video(mux={"movflags": "frag_keyframe+empty_moov"})[:1200], None),
    "packets flipped": (flipped(WHOLE), "damaged frames"),
    "sound only": (sound_only(), "no video stream"),
    "no frames": (no_frames(), "no frames"),
    "a billion frames": (billion_frames(), None),
    "huge frames": (huge(), "too many pixels"),
    "unknown codec": (WHOLE.replace(b"avc1", b"zzzz"), "unknown codec"),
    "another container": (b"FLV\x01\x05\x00\x00\x00\x09" + bytes(500), "not a video file"),
    "a playlist": (b"#EXTM3U\n#EXTINF:4,\n/etc/hostname\n", "not a video file"),
    "zeros": (bytes(4000), "not a video file"),
    "zeros after the start": (WHOLE[:40] + bytes(len(WHOLE) - 40), "unreadable video"),
    "garbage codec header": (WHOLE.replace(b"avcC\x01", b"avcC\x07"), None),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_video_is_a_named_error(kind, backend):
    data, reason = BROKEN[kind]
    with pytest.raises(UnreadableVideo, match=r"^clip\.mp4 cannot be read as a video: ") as error:
        with open_video(data, backend, name="clip.mp4", max_pixels=1 << 20) as reader:
            reader.get_frames(range(len(reader)))
    if reason and backend == "av":
        assert error.value.reason == reason


def test_a_garbage_index_is_not_needed():
    with open_video(garbage_index()) as reader:
        assert numbers(reader.get_frames([39, 0, 20])) == [39, 0, 20]


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        kind = rng.randrange(5)
        at = rng.randrange(len(changed))
        if kind == 0:
            for _ in range(rng.choice([1, 4, 30])):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # near the ends, where headers are
            for _ in range(rng.choice([1, 4, 20])):
                near = rng.randrange(min(2000, len(changed)))
                changed[near if rng.random() < 0.5 else len(changed) - 1 - near] = rng.choice([0, 127, 128, 255])
        elif kind == 2:
            changed = changed[: max(at, 20)]
        elif kind == 3:
            length = len(changed[at : at + 16])
            changed[at : at + 16] = bytes(length)
        else:
            changed[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
    return bytes(changed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mutated_videos_give_named_errors_only(backend):
    seeds = [
        video(20, **options)
        for options in (
            {},
            {"bf": 3, "gop": 20},
            {"format": "matroska"},
            {"codec": "mpeg4"},
            {"codec": "mpeg4", "format": "avi", "bf": 2},
            {"codec": "libvpx-vp9", "format": "webm"},
        )
    ]
    whole, broken = 0, {}
    for i in range(60):
        data = mutated(seeds[i % len(seeds)], random.Random(i))
        try:
            with open_video(data, backend, name=f"{i}.mp4", max_pixels=1 << 22) as reader:
                frames = reader.get_frames(np.linspace(0, len(reader) - 1, 16).astype(int))
                assert frames.shape == (16, *reader.size[::-1], 3)
                whole += 1
        except UnreadableVideo as error:
            assert str(error).startswith(f"{i}.mp4 cannot be read as a video: {error.reason}")
            broken[error.reason] = broken.get(error.reason, 0) + 1
    assert whole + sum(broken.values()) == 60
    assert whole > 5 and len(broken) > 2
    with open_video(seeds[0], backend) as reader:  # and a sound one is read as ever
        assert numbers(reader.get_frames([3, 12])) == [3, 12]


def test_packing_leaves_broken_videos_out(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    for kind, (data, _) in BROKEN.items():
        (source / f"bad {kind}.mp4").write_bytes(data)
        (source / f"bad {kind}.txt").write_text("broken")
    for i in range(3):
        (source / f"good{i}.mp4").write_bytes(video(start=i))
    (source / "good0.txt").write_text("a caption in a file of its own")
    (source / "good1.json").write_text('{"caption": "one in JSON", "group": "waves"}')
    report = pack(source, tmp_path / "out", progress=False)
    assert report.written == 2
    assert report.skipped.pop("no caption") == 1
    assert sum(report.skipped.values()) == len(BROKEN)
    table = tmp_path / "table.csv"
    table.write_text("video,caption\nvideos/good2.mp4,from the table\nvideos/bad text.mp4,broken\n")
    report = pack(table, tmp_path / "of-table", progress=False)
    assert (report.written, report.skipped) == (1, {"not a video file": 1})


@pytest.fixture
def shards(tmp_path):
    """14 sound videos among 10 broken ones, the first among them."""
    kinds = [
        kind
        for kind in BROKEN
        if kind not in ("text", "zeros", "a playlist", "another container", "empty", "huge frames")
    ]
    with ShardWriter(tmp_path / "shards", kind="videos", max_samples=8) as writer:
        for i in range(24):
            data = BROKEN[kinds[i // 2]][0] if i % 2 == 0 and i < 20 else video(8, start=i, height=32, width=64)
            writer.write(f"v{i:02d}", {"mp4": data, "txt": f"video {i}"})
    return tmp_path / "shards", kinds[:10]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on(shards, workers, caplog):
    folder, kinds = shards
    data = ShardsDataModule(
        train=str(folder), batch_size=4, image_size=16, frames=4, fps=15, num_workers=workers, max_bad_fraction=0.6,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    config = Emu3Config(
        channels=32, channel_mult=(1, 2), num_res_blocks=1,
        quantizer={"type": "vq", "codebook_size": 64, "update": "ema"},
    )  # fmt: skip
    model = AutoencoderModule(Emu3(config), Schedule(12), AutoencoderLoss(perceptual="none", disc_weight=0.0))
    before = [p.detach().clone() for p in model.tokenizer.parameters()]
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "tokgen"):
        trainer.fit(model, datamodule=data)
    assert trainer.global_step == 12  # two epochs of 24 / 4, as if nothing were broken
    assert any(not torch.equal(p, q) for p, q in zip(before, model.tokenizer.parameters()))
    stats = data.loaders["train"].stats
    assert stats.read == 28 and stats.bad == 20 and stats.missing == 0
    for kind in kinds:
        if (reason := BROKEN[kind][1]) is not None:
            assert stats.skipped[reason] >= 2, (kind, stats)
    assert "Skipped a sample: unreadable video (v" in caplog.text


def test_too_many_broken_videos_end_the_run_in_words(shards):
    data = ShardsDataModule(train=str(shards[0]), batch_size=4, image_size=16, frames=4, max_bad_fraction=0.2)
    data.setup("fit")
    with pytest.raises(DataError, match=r"bad samples in this epoch's 24 .* max_bad_fraction=0.2 allows"):
        list(data.train_dataloader())
