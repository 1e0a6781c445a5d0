"""The segmenter's module: it learns to find shapes, it resumes exactly, and what it publishes loads."""

from __future__ import annotations

from typing import Any

import moving_shapes
import numpy as np
import pytest
import tiny
import torch

from tokgen.errors import ConfigError
from tokgen.training.base import Schedule
from tokgen.training.checkpoint import Checkpoint
from tokgen.training.segmenter import SegmenterModule
from tokgen.trajectories.base import build_source
from tokgen.trajectories.segmenter import TrajectorySegmenter

CONFIG = {
    "backbone": {"type": "conv", "channels": [32, 32, 64, 64]}, "image_size": 48, "grid": 12, "dim": 64, "heads": 4,
    "hidden": 128, "queries": 8, "frames": 3,
}  # fmt: skip
CLIPS = {"frames": 3, "size": 48, "shapes": 2}


def module(seed: int = 0, steps: int = 200, **settings: Any) -> SegmenterModule:
    torch.manual_seed(seed)
    settings.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True))
    schedule = Schedule(steps, warmup_steps=min(10, steps), final=0.05)
    return SegmenterModule(CONFIG, schedule=schedule, **settings)


def validated(trainer, segmenter, loader) -> dict[str, float]:
    trainer.validate(segmenter, loader, verbose=False)
    return {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items()}


def test_it_learns_to_find_shapes_it_has_not_seen(tmp_path):
    record, segmenter = tiny.Record(), module()
    unseen, judge = moving_shapes.loader(10_000, 16, **CLIPS), tiny.trainer(tmp_path)
    before = validated(judge, segmenter, unseen)
    train = moving_shapes.loader(0, 200 * 4, batch=4, **CLIPS)
    tiny.trainer(tmp_path, record, max_steps=200).fit(segmenter, train)
    loss = record.column("train/loss")
    assert sum(loss[-5:]) < 0.55 * sum(loss[:5])
    after = validated(judge, segmenter, unseen)
    assert after["loss"] < 0.5 * before["loss"]
    assert after["iou"] > before["iou"] + 0.2 and after["veq"] > before["veq"] + 0.3

    segmenter.export(tmp_path / "segmenter", write=True)
    again = TrajectorySegmenter.from_pretrained(tmp_path / "segmenter")
    video, _ = moving_shapes.clip(20_000, **CLIPS)
    pixels = torch.from_numpy(video).permute(0, 3, 1, 2)[None]
    assert torch.equal(again(pixels), segmenter.segmenter.eval()(pixels))
    found = build_source({"type": "segmenter", "model": str(tmp_path / "segmenter")})(video)
    assert found.panoptic and found.shape == (3, 12, 12)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_bitwise(tmp_path, accumulate):
    def data():  # four steps an epoch
        return moving_shapes.loader(0, 4 * 2 * accumulate, batch=2, **CLIPS)

    whole, first, rest = (tiny.Record() for _ in range(3))
    settings = {"steps": 6, "accumulate": accumulate}
    tiny.trainer(tmp_path / "a", whole, max_steps=6).fit(module(**settings), data())
    tiny.trainer(tmp_path / "b", first, Checkpoint(), max_steps=3).fit(module(**settings), data())
    last = tmp_path / "b/checkpoints/last.ckpt"
    tiny.trainer(tmp_path / "b", rest, Checkpoint(), max_steps=6).fit(module(1, **settings), data(), ckpt_path=last)
    assert len(whole.column("train/loss")) == 6
    assert first.column("train/loss") + rest.column("train/loss") == whole.column("train/loss")


def test_half_precision_trains_on_other_grids_and_gaps(tmp_path):
    record, segmenter = tiny.Record(), module(steps=3)

    def coarse(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = torch.utils.data.default_collate(items)
        batch["trajectories"] = batch["trajectories"][:, :, ::2, 3::4].clone()  # (B, T, 24, 12)
        batch["trajectories"][:, :, 5:9] = -1
        return batch

    loader = torch.utils.data.DataLoader(moving_shapes.Clips(0, 6, **CLIPS), 2, collate_fn=coarse)
    tiny.trainer(tmp_path, record, max_steps=3, precision="bf16-mixed").fit(segmenter, loader)
    assert np.isfinite(record.column("train/loss")).all() and record.column("train/skipped_steps")[-1] == 0
    targets = segmenter.targets(next(iter(loader)))
    assert targets.shape == (2, 3, 12, 12) and (targets[:, :, 3:4] == -1).all() and (targets[:, :, 0] >= 0).all()


def test_data_without_trajectories_is_refused(tmp_path):
    without = torch.utils.data.DataLoader([{"pixels": torch.zeros(3, 3, 48, 48, dtype=torch.uint8)}] * 2, 1)
    with pytest.raises(ConfigError, match=r"was given pixels.*traj\.npy"):
        tiny.trainer(tmp_path, max_steps=1).fit(module(), without)
    with pytest.raises(ConfigError, match="unknown key 'sides'"):
        SegmenterModule({"sides": 3})


def test_other_shards_are_refused(image_shards, tmp_path):
    with pytest.raises(ConfigError, match="was given images"):
        tiny.trainer(tmp_path, max_steps=1).fit(module(), datamodule=tiny.shards(image_shards))
