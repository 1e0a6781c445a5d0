"""Clips with text: both towers learn what moves where, trajectories reach the tower that takes them, and what is published loads."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tiny
import torch

import tokgen
from tokgen.data.shards import ShardWriter
from tokgen.encoders.contrastive import VideoContrastiveEncoder
from tokgen.errors import ConfigError, DataError
from tokgen.training.base import Schedule
from tokgen.training.captions import Text
from tokgen.training.checkpoint import Checkpoint
from tokgen.training.contrastive import ContrastiveModule
from tokgen.trajectories.picture import mp4_bytes

FRAMES, SIZE = 6, 32
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 230)}
WAYS = {"left": (0, -3), "right": (0, 3), "up": (-3, 0), "down": (3, 0)}
TRAJVIT = {"type": "trajvit", "config": {
    "image_size": SIZE, "mask_stride": 2, "widths": [8, 16, 24], "layers": [1, 1, 1], "dim": 32, "heads": 2, "hidden": 64,
    "depth": 2, "appearance_depth": 1, "position_depth": 1,
}}  # fmt: skip
PATCHES = {"type": "video-vit", "config": {
    "image_size": SIZE, "frames": FRAMES, "patch": 8, "tubelet": 2, "dim": 32, "heads": 2, "hidden": 64, "depth": 2,
}}  # fmt: skip
TEXT = {"dim": 32, "n_heads": 2, "hidden": 32, "text_layers": 1, "embed_dim": 16, "max_text": 24}


def write_clips(folder, count: int, seed: int, trajectories: bool = True):
    """One square on a grey floor: 12 captions that say its colour and its way."""
    rng = np.random.default_rng(seed)
    grid = SIZE // 2
    made = {"source": {"type": "truth"}, "size": SIZE, "resize": "crop", "grid": [grid, grid], "fps": None}
    meta = {"trajectories": made} if trajectories else {}
    with ShardWriter(folder, kind="videos", max_samples=16, meta=meta) as writer:
        for i in range(count):
            colour, way = list(COLOURS)[i % 3], list(WAYS)[i // 3 % 4]
            video = np.full((FRAMES, SIZE, SIZE, 3), 128, np.uint8)
            labels = np.ones((FRAMES, SIZE, SIZE), np.uint8)
            y, x = rng.integers(8, 17, 2) - 2 * np.array(WAYS[way])
            for t in range(FRAMES):
                part = (t, slice(max(y, 0), y + 8), slice(max(x, 0), x + 8))
                video[part], labels[part] = COLOURS[colour], 2
                y, x = y + WAYS[way][0], x + WAYS[way][1]
            members = {"mp4": mp4_bytes(video, crf=10), "txt": f"{colour} square moves {way}"}
            if trajectories:
                buffer = io.BytesIO()
                np.save(buffer, labels[:, ::2, ::2])
                members["traj.npy"] = buffer.getvalue()
            writer.write(f"{i:05d}", members)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder / "train", 96, 0)
    write_clips(folder / "val", 24, 1)
    write_clips(folder / "bare", 24, 1, trajectories=False)
    return folder


def module(tower: dict, seed: int = 0, **settings) -> ContrastiveModule:
    torch.manual_seed(seed)
    settings.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=2e-3, fused=True))
    config = {"tower": tower, **TEXT, **settings.pop("config", {})}
    return ContrastiveModule(
        config=config, text=Text(vocab_size=300), schedule=Schedule(300, warmup_steps=10), **settings
    )


def data(clips, train: str = "train", val: str = "val", **options):
    options = {"batch_size": 12, "image_size": SIZE, "frames": FRAMES, **options}
    return tiny.ShardsDataModule(train=str(clips / train), val=str(clips / val), **options)


@pytest.mark.parametrize("tower", [TRAJVIT, PATCHES], ids=lambda t: t["type"])
def test_it_learns_what_moves_where(clips, tmp_path, tower):
    record, contrastive = tiny.Record(), module(tower, noise=0.02)
    tiny.trainer(tmp_path, record, max_steps=300, val_check_interval=300).fit(contrastive, datamodule=data(clips))
    loss = record.column("train/loss")
    assert sum(loss[-5:]) < 0.6 * sum(loss[:5])
    # of 12 captions on new clips: one in 12 by chance, one in 4 by colour alone, one in 3 by the way alone
    found = [record.column(f"val/{way}")[-1] for way in ("image_to_text", "text_to_image")]
    assert sum(found) / 2 > 0.5, found

    contrastive.export(tmp_path / "encoder", write=True)
    again, encoder = tokgen.load(tmp_path / "encoder"), contrastive.encoder.eval()
    assert isinstance(again, VideoContrastiveEncoder) and again.extras == encoder.tower.extras
    batch = next(iter(contrastive.trainer.datamodule.val_dataloader()))
    extras = contrastive.extras(batch)
    assert list(extras) == list(encoder.extras)
    assert torch.equal(again.embed(batch["pixels"], **extras), encoder.embed(batch["pixels"], **extras))
    assert torch.equal(again.encode_text(batch["caption"]), encoder.encode_text(batch["caption"]))


def test_resume_is_bitwise(clips, tmp_path):
    whole, first, rest = (tiny.Record() for _ in range(3))
    tiny.trainer(tmp_path / "a", whole, max_steps=7).fit(module(TRAJVIT, noise=0.1), datamodule=data(clips))
    tiny.trainer(tmp_path / "b", first, Checkpoint(), max_steps=5).fit(
        module(TRAJVIT, noise=0.1), datamodule=data(clips)
    )
    last = tmp_path / "b/checkpoints/last.ckpt"
    tiny.trainer(tmp_path / "b", rest, Checkpoint(), max_steps=7).fit(module(TRAJVIT, 1, noise=0.1), datamodule=data(clips), ckpt_path=last)  # fmt: skip
    assert first.column("train/loss") + rest.column("train/loss") == whole.column("train/loss")


def test_clips_without_trajectories_are_for_patches_only(clips, tmp_path):
    bare = {"train": "bare", "val": "bare"}
    with pytest.raises(ConfigError, match=r"batches with trajectories, which these do not have.*tokgen trajectories"):
        tiny.trainer(tmp_path, max_steps=1).fit(module(TRAJVIT), datamodule=data(clips, **bare))
    record = tiny.Record()
    tiny.trainer(tmp_path, record, max_steps=1).fit(module(PATCHES), datamodule=data(clips, **bare))
    assert len(record.column("train/loss")) == 1
    with pytest.raises((ConfigError, DataError), match="tokgen trajectories"):
        tiny.trainer(tmp_path, max_steps=1).fit(module(TRAJVIT), datamodule=data(clips, **bare, trajectories=True))


def test_what_does_not_belong_together_is_refused(clips, tmp_path, image_shards):
    with pytest.raises(ConfigError, match=r"trains on video shards, as config.tower says.* was given images"):
        tiny.trainer(tmp_path, max_steps=1).fit(module(TRAJVIT), datamodule=tiny.shards(image_shards))
    pictures = ContrastiveModule(config={"image_size": SIZE, "patch": 8}, text=Text(vocab_size=300))
    with pytest.raises(ConfigError, match="trains on image shards with captions and was given videos"):
        tiny.trainer(tmp_path, max_steps=1).fit(pictures, datamodule=data(clips))
    with pytest.raises(ConfigError, match=r"batches with pixels and trajectories.*data.frames"):
        tiny.trainer(tmp_path, max_steps=1).fit(module(TRAJVIT), datamodule=data(clips, frames=None, image_size=None))
    with pytest.raises(ConfigError, match="config: unknown key 'image_layers' for VideoContrastiveConfig"):
        tiny.trainer(tmp_path, max_steps=1).fit(module(TRAJVIT, config={"image_layers": 3}), datamodule=data(clips))
