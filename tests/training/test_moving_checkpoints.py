"""A run that goes on elsewhere: on one process, on two copies (DDP), on two halves (FSDP2), and back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import moving_shapes
import pytest
import ranks
import test_contrastive_training as contrast
import tiny
import torch

from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.errors import ConfigError
from tokgen.precompute import tokenize_shards
from tokgen.training.alignment import Alignment
from tokgen.training.checkpoint import Checkpoint, read_checkpoint
from tokgen.training.ema import EMA
from tokgen.training.sharding import FullyShardedStrategy

ROUTE = ("one", "ddp", "fsdp", "ddp", "one", "fsdp", "one")  # two steps on each


class SteadyBatches(ranks.FixedBatches):
    """As `FixedBatches`, with a place in the epoch that is saved and found again."""

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        samples = super().train_dataloader().dataset
        return moving_shapes.Loader(samples, 8 // self.processes)


def leg(world: int, folder: Path, run: str, kind: str, steps: int) -> None:
    """Train to step `steps`, from the checkpoint of the run if it has one."""
    module = tiny.generator(
        config={"token_dropout": 0.0, "caption_dropout": 0.0}, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3)
    )
    strategy = {"one": "auto", "ddp": "ddp"}.get(kind) or FullyShardedStrategy()
    record, last = tiny.Record(), folder / run / "checkpoints" / "last.ckpt"
    trainer = tiny.trainer(
        folder / run, EMA(0.5), Checkpoint(), record, devices=world, strategy=strategy, max_steps=steps
    )
    trainer.fit(module, datamodule=SteadyBatches(folder / "codes", world), ckpt_path=last if last.exists() else None)
    if trainer.is_global_zero:
        torch.save(record.column("train/loss"), folder / run / f"losses-{steps}.pt")


def write_codes(folder: Path) -> None:
    for split, count in (("train", 48), ("val", 10)):
        tiny.write_codes(folder / "codes" / split, count, 0)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_number_of_ranks_and_another_strategy(tmp_path):
    """Losses, weights, Adam's moments and EMA are those of the run that stayed on one process, across an epoch's end."""
    write_codes(tmp_path)
    total = 2 * len(ROUTE)
    ranks.on_ranks(leg, 1, tmp_path, "stayed", "one", total)
    losses: list[float] = []
    for i, kind in enumerate(ROUTE, 1):
        ranks.on_ranks(leg, 1 if kind == "one" else 2, tmp_path, "moved", kind, 2 * i)
        losses += torch.load(tmp_path / "moved" / f"losses-{2 * i}.pt")
    expected = torch.load(tmp_path / "stayed" / f"losses-{total}.pt")
    assert len(losses) == total and losses == pytest.approx(expected, rel=1e-4)
    one, other = (read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("stayed", "moved"))
    assert one["global_step"] == other["global_step"] == total
    for part in (
        lambda c: c["state_dict"],
        lambda c: c["callbacks"]["EMA"]["average"],
        lambda c: {(n, k): v for n, s in c["optimizer_states"][0]["state"].items() for k, v in s.items()},
    ):
        assert part(one).keys() == part(other).keys() and part(one)
        for name, value in part(one).items():
            torch.testing.assert_close(
                part(other)[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Keys(tiny.L.Callback):
    """Which samples this rank trained on, and in which of the trainer's epochs."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        self.rows += [(trainer.current_epoch, key) for key in batch["key"]]


def stream(world: int, folder: Path, run: str, steps: int) -> None:
    """Train on shards as a user does, validating at the end of each epoch; what was seen, validated and said goes to files."""
    said, record, keys = Lines(), tiny.Record(), Keys()
    logger = logging.getLogger("tokgen.data")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    last = folder / run / "checkpoints" / "last.ckpt"
    trainer = tiny.trainer(
        folder / run, Checkpoint(), record, keys, devices=world, strategy="auto" if world == 1 else "ddp", max_steps=steps,
        check_val_every_n_epoch=1, val_check_interval=1.0,
    )  # fmt: skip
    data = tiny.shards(folder / "codes", 4)
    trainer.fit(tiny.generator(), datamodule=data, ckpt_path=last if last.exists() else None)
    validated = [row["step"] for row in record.rows if "val/loss" in row]
    trained = [row["step"] for row in record.rows if "train/loss" in row]
    found = {"keys": keys.rows, "lines": said.lines, "trained": trained, "validated": validated}
    torch.save(found, folder / run / f"{steps}-{trainer.global_rank}.pt")


@pytest.mark.slow
def test_an_epoch_goes_on_with_other_ranks_and_every_sample_comes_once(tmp_path):
    """12 batches an epoch in one process, 6 in two: from batch 8 of 12 to two ranks, into the next epoch, and back."""
    write_codes(tmp_path)
    seen, validated = [], []
    for world, steps in ((1, 8), (2, 15), (1, 30)):
        ranks.on_ranks(stream, world, tmp_path, "run", steps)
        found = [torch.load(tmp_path / "run" / f"{steps}-{rank}.pt") for rank in range(world)]
        first = found[0]["trained"][0]
        assert found[0]["trained"] == list(range(first, steps + 1))
        seen += [row for each in found for row in each["keys"]]
        validated += found[0]["validated"]
        for each in found:
            (line,) = each["lines"] or [""]
            assert not line if steps == 8 else f"shared anew: world was {3 - world}, is {world}" in line
    whole = sorted({key for _, key in seen})
    assert len(whole) == 48
    for epoch in range(3):
        assert sorted(key for e, key in seen if e == epoch) == whole, f"epoch {epoch}"
    assert [e for e, _ in seen].count(3) == 4, "the fourth has begun"
    assert validated == [10, 17, 29], "at the ends of the epochs, which are those of the data"


def built(world: int, folder: Path) -> None:
    """Who builds what, and with which weights the training starts."""
    module = tiny.generator(config={"rope": "2d"}, alignment=Alignment(weight=0.5))
    build, calls = module._build, []
    module._build = lambda: calls.append(1) or build()
    strategy = "auto" if world == 1 else FullyShardedStrategy()
    trainer = tiny.trainer(folder / str(world), Checkpoint(), devices=world, strategy=strategy, max_steps=1)
    trainer.fit(module, datamodule=tiny.shards(folder / "codes"))
    assert calls == [1] * (trainer.global_rank == 0)
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))
    tables = {name: table.clone() for name, table in module.generator.named_buffers()}
    torch.save(tables, folder / f"tables-{world}-{trainer.global_rank}.pt")


def cannot_be_built(world: int, folder: Path) -> None:
    module = tiny.generator(config={"dim": 33})  # over two heads
    trainer = tiny.trainer(folder / "none", devices=world, strategy=FullyShardedStrategy(), max_steps=1)
    with pytest.raises(ConfigError) as caught:
        trainer.fit(module, datamodule=tiny.shards(folder / "codes"))
    assert ("rank 0 could not build the model: ConfigError: " in str(caught.value)) == (trainer.global_rank == 1)
    assert "33" in str(caught.value)


@pytest.mark.slow
def test_rank_zero_alone_builds_a_model_that_is_split(tmp_path):
    """The others get their shares, and the tables that no checkpoint holds; none waits for one that cannot build it."""
    visual, teacher = tiny.tokenizer(), ContrastiveEncoder(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 12, 8, 4))
    for split, count in (("train", 12), ("val", 4)):
        source = tiny.write_images(tmp_path / "images" / split, count, count)
        tokenize_shards(visual, source, tmp_path / "codes" / split, encoder=teacher, progress=False)
    for world in (1, 2):
        ranks.on_ranks(built, world, tmp_path)
    expected = torch.load(tmp_path / "tables-1-0.pt")
    assert expected.keys() >= {"order", "places"}
    for rank in range(2):
        found = torch.load(tmp_path / f"tables-2-{rank}.pt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    ranks.on_ranks(cannot_be_built, 2, tmp_path)


def refused(world: int, folder: Path) -> None:
    for module, words in (
        (tiny.autoencoder(), "AutoencoderModule is not sharded; use trainer.strategy ddp"),
        (contrast.module(), "ContrastiveModule is not sharded; use trainer.strategy ddp"),
    ):
        trainer = tiny.trainer(folder, devices=world, strategy=FullyShardedStrategy(), max_steps=1)
        with pytest.raises(ConfigError, match=words):
            trainer.fit(module, datamodule=tiny.shards(folder / "images"))


@pytest.mark.slow
def test_modules_that_cannot_be_split_are_refused(tmp_path):
    for split in ("train", "val"):
        tiny.write_images(tmp_path / "images" / split, 12, 0)
    ranks.on_ranks(refused, 1, tmp_path)
