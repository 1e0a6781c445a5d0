"""Two processes on one batch are one process on it: clips, motion, segments, contrast over ranks, codes of many scales; and
shards that do not divide."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import test_contrastive_clips as contrast
import test_segmenter_training as segments
import test_tokenflow_training as tokenflow
import tiny
import torch

from tokgen.data.shards import ShardWriter
from tokgen.tokenizers.emu3 import Emu3, Emu3Config
from tokgen.tokenizers.trajectory import TrajectoryTokenizer
from tokgen.tokenizers.video_lavit_motion import MotionConfig, MotionTokenizer
from tokgen.training.base import Schedule
from tokgen.training.checkpoint import Checkpoint
from tokgen.training.segmenter import SegmenterModule

CLIPS = {"image_size": contrast.SIZE, "frames": contrast.FRAMES}
KINDS = ("trajectory", "motion", "emu3", "segmenter", "trajvit", "patches", "tokenflow")


class StillNorms(tiny.L.Callback):
    """BatchNorm with the statistics that it has: those of a part of a batch are not those of the whole, and
    `sync_batchnorm`, which makes them so, takes GPUs."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = [p.detach().clone() for p in pl_module.parameters()]
        for part in pl_module.modules():
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                part.eval()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        moved = [not torch.equal(old, new) for old, new in zip(self.before, pl_module.parameters())]
        assert sum(moved) > len(moved) / 2, "little was trained"


def sgd(parameters: Any, lr: float = 0.005) -> torch.optim.Optimizer:
    """So that differences stay differences, and small enough that they do not move a code or a match."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def module(kind: str, folder: Path) -> Any:
    """What is random in training draws apart on each rank, and is left out here."""
    torch.manual_seed(0)
    codes = {"type": "vq", "codebook_size": 32, "update": "ema", "decay": 0.9}
    plain: dict[str, Any] = {"optimizer": sgd, "disc_optimizer": sgd, "disc_norm": "group"}
    if kind == "trajectory":
        config = TrajectoryTokenizer.example_configs()["plain"]
        appearance = {**config.appearance_quantizer, "dropout": 0.0}
        tokenizer = TrajectoryTokenizer(
            dataclasses.replace(config, appearance_quantizer=appearance, prefix_dropout=0.0)
        )
        return tiny.autoencoder(tokenizer=tokenizer, disc_weight=0.1, **plain)
    if kind == "motion":
        sizes = {"dim": 32, "heads": 2, "hidden": 64, "depth": 4, "frames": 8, "height": 8, "width": 12, "code_dim": 8}
        quantizer = {**MotionConfig().quantizer, "codebook_size": 32, "kmeans_init": False, "revive_below": 0.0}
        return tiny.autoencoder(tokenizer=MotionTokenizer(MotionConfig(**sizes, quantizer=quantizer)), disc_weight=0.0, **plain)  # fmt: skip
    if kind == "emu3":
        tokenizer = Emu3(Emu3Config(32, (1, 2), 1, quantizer=codes))
        return tiny.autoencoder(tokenizer=tokenizer, disc_weight=0.1, adaptive=True, **plain)
    if kind == "tokenflow":
        quantizer = {"type": "dual-vq", "codebook_size": 32, "revive_below": 0.0, "decay": 0.9}
        return tokenflow.module(tokenflow.flow(quantizer=quantizer), folder / "eye", disc_weight=0.1, **plain)
    if kind == "segmenter":
        sizes = {**segments.CONFIG, "image_size": contrast.SIZE, "grid": 8, "frames": contrast.FRAMES}
        return SegmenterModule(sizes, schedule=Schedule(3, kind="constant"), optimizer=partial(sgd, lr=5e-4))
    tower = {"trajvit": contrast.TRAJVIT, "patches": contrast.PATCHES}[kind]
    return contrast.module(tower, optimizer=sgd)


def fit_all(world: int, folder: Path) -> None:
    for kind in KINDS:
        where, options = {
            "motion": (folder / "motion", {}),
            "emu3": (folder / "clips", {**CLIPS, "frames": 4}),
            "tokenflow": (folder / "images", {"image_size": tiny.SIZE}),
        }.get(kind, (folder / "clips", CLIPS))
        record = tiny.Record()
        trainer = tiny.trainer(
            folder / f"{kind}{world}", record, StillNorms(), devices=world, strategy="auto" if world == 1 else "ddp",
            max_steps=3, val_check_interval=3,
        )  # fmt: skip
        trainer.fit(module(kind, folder), datamodule=ranks.FixedSamples(where, world, **options))
        ranks.outcome(trainer, record, folder / f"{kind}{world}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny.eyes(folder / "eye", 16)
    torch.manual_seed(0)
    for split, count in (("train", 24), ("val", 5)):
        contrast.write_clips(folder / "clips" / split, count, count)
        tiny.write_images(folder / "images" / split, count, count)
        with ShardWriter(folder / "motion" / split, kind="motion", meta={"shape": [8, 2, 8, 12]}) as writer:
            for i in range(count):
                writer.write(
                    f"{i:03d}", {"npy": np.random.default_rng(i).normal(0, 1, (8, 2, 8, 12)).astype(np.float16)}
                )
    for world in (1, 2):
        ranks.on_ranks(fit_all, world, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_process_does(trained, kind):
    """Weights, codebooks, losses of the whole batch, and figures of a validation of 5 samples."""
    one, two = (torch.load(trained / f"{kind}{n}.pt", weights_only=True) for n in (1, 2))
    assert [row.keys() for row in one["rows"]] == [row.keys() for row in two["rows"]] and len(one["rows"]) >= 4
    for i, (first, second) in enumerate(zip(one["rows"], two["rows"])):
        for name in first:
            # later steps grow the rounding of the first; gradients of a segmenter on plain colours grow it fastest
            loose = 1e-5 if i == 0 else 1e-2 if name.endswith("grad_norm") else 1e-3
            assert second[name] == pytest.approx(first[name], rel=loose, abs=loose / 10), (name, first["step"])
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# -- shards that do not divide ----------------------------------------------------------------------------------------


class Seen(tiny.L.Callback):
    def __init__(self) -> None:
        self.keys: list[list[str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        self.keys.append(list(batch["key"]))


def uneven(world: int, folder: Path) -> None:
    """Two epochs and a half, a validation at each third step, and the tokens of 11 pictures."""
    seen, record = Seen(), tiny.Record()
    parts = [str(folder / "uneven" / str(n)) for n in (7, 1, 20)]
    data = tiny.ShardsDataModule(
        train=parts, val=str(folder / "uneven" / "val"), test=str(folder / "uneven" / "val"), batch_size=3, image_size=tiny.SIZE,
    )  # fmt: skip
    trainer = tiny.trainer(
        folder / f"uneven{world}", seen, record, Checkpoint(), devices=world, strategy="auto" if world == 1 else "ddp",
        max_steps=10, val_check_interval=3,
    )  # fmt: skip
    training = tiny.autoencoder(disc_weight=0.0)
    trainer.fit(training, datamodule=data)
    torch.save([seen.keys, record.rows], folder / f"uneven{world}-{trainer.global_rank}.pt")
    # weights that one process and two have alike, to compare what they measure
    (figures,) = trainer.validate(tiny.autoencoder(disc_weight=0.0, seed=1), datamodule=data, verbose=False)
    tokens = trainer.predict(tiny.autoencoder(disc_weight=0.0, seed=1), datamodule=data)
    torch.save([figures, torch.cat([t.ids for t in tokens])], folder / f"figures{world}-{trainer.global_rank}.pt")


@pytest.mark.slow
def test_shards_of_7_1_and_20_train_validate_and_predict_on_two_ranks(tmp_path):
    for n in (7, 1, 20):
        tiny.write_images(tmp_path / "uneven" / str(n), n, n)
    tiny.write_images(tmp_path / "uneven" / "val", 11, 0)
    for world in (1, 2):
        ranks.on_ranks(uneven, world, tmp_path)
    (first, rows), (second, _) = (torch.load(tmp_path / f"uneven2-{r}.pt", weights_only=True) for r in (0, 1))
    assert [len(keys) for keys in first] == [len(keys) for keys in second] == [3] * 10
    assert [row["step"] for row in rows if "val/psnr" in row] == [3, 6, 9]
    (alone, ids), (figures, left), (others, right) = (
        torch.load(tmp_path / f"figures{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    assert figures == others and figures == pytest.approx(alone, rel=1e-6)
    assert len(ids) == 11 and torch.equal(torch.cat([left, right]), ids)
