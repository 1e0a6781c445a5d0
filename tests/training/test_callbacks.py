"""Callbacks say what happened."""

from __future__ import annotations

import io
import logging
import random
import tarfile

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tokgen.data.shards import ShardWriter
from tokgen.training.callbacks import CodebookMonitor, DataStats, ImageGrid, PlainProgress, StepSeed
from tokgen.training.checkpoint import Checkpoint
from tokgen.training.ema import EMA


def test_the_grid_shows_pictures_above_reconstructions_by_the_averaged_weights(tmp_path, image_shards):
    module, ema = tiny.autoencoder(disc_weight=0.0), EMA(0.5)
    data = tiny.shards(image_shards, batch_size=5)
    trainer = tiny.trainer(tmp_path, ema, ImageGrid(count=3, columns=2), max_steps=2, val_check_interval=2)
    trainer.fit(module, datamodule=data)
    grid = np.asarray(Image.open(tmp_path / "images" / "reconstruction-0000002.png"))
    side = tiny.SIZE + 2
    assert grid.shape == (4 * side + 2, 2 * side + 2, 3)  # two pictures, their reconstructions, one picture, its own
    cell = lambda row, column: grid[2 + row * side : row * side + side, 2 + column * side : column * side + side]  # noqa: E731
    first = next(iter(data.val_dataloader()))["pixels"]
    for picture, row, column in ((0, 0, 0), (1, 0, 1), (2, 2, 0)):
        assert np.array_equal(cell(row, column), first[picture].permute(1, 2, 0).numpy())
    module.eval()
    with ema.applied(module), torch.no_grad():
        after = module.tokenizer(first[:3].float() / 255).reconstruction
    assert np.abs(cell(1, 0) / 255 - after[0].permute(1, 2, 0).numpy()).max() < 0.01
    assert (cell(2, 1) == 255).all()


def test_a_dying_codebook_is_reported(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "tokgen")
    record, module = tiny.Record(), tiny.autoencoder(disc_weight=0.0)
    with torch.no_grad():  # all codes but one are out of reach
        module.tokenizer.quantizer.codebook.weight.add_(1e3)
        module.tokenizer.quantizer.codebook.weight[0] = 0
    tiny.trainer(tmp_path, record, CodebookMonitor(every_n_steps=3), max_steps=6).fit(module, tiny.pixels())
    assert record.column("codebook/usage") == pytest.approx([1 / tiny.CODES] * 2)
    assert record.column("codebook/perplexity") == pytest.approx([1.0] * 2)
    assert caplog.text.count("collapsing") == 2


def test_a_healthy_codebook_is_not(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "tokgen")
    record = tiny.Record()
    module = tiny.autoencoder(disc_weight=0.0, tokenizer=tiny.tokenizer(tiny.EMA_VQ))
    tiny.trainer(tmp_path, record, CodebookMonitor(every_n_steps=3), max_steps=6).fit(module, tiny.pixels())
    assert min(record.column("codebook/usage")) > 0.5 and "collapsing" not in caplog.text


def test_a_resumed_run_knows_what_was_counted(tmp_path, image_shards):
    def usage(folder, seed=0, **options):
        record = tiny.Record()
        trainer = tiny.trainer(folder, record, CodebookMonitor(every_n_steps=4), Checkpoint(), **options)
        start = folder / "checkpoints" / "last.ckpt"
        trainer.fit(
            tiny.autoencoder(disc_weight=0.0, seed=seed), datamodule=tiny.shards(image_shards),
            ckpt_path=start if start.is_file() else None,
        )  # fmt: skip
        return [record.column(f"codebook/{name}") for name in ("usage", "perplexity")]

    whole = usage(tmp_path / "a", max_steps=8)
    first, rest = usage(tmp_path / "b", max_steps=6), usage(tmp_path / "b", seed=7, max_steps=8)
    assert [a + b for a, b in zip(first, rest)] == whole and len(whole[0]) == 2 and whole[0][0] != whole[0][1]


def test_skipped_samples_are_in_the_log(tmp_path):
    folder = tiny.write_images(tmp_path / "images" / "train", 24, 0)
    with ShardWriter(tmp_path / "bad", kind="images") as writer:
        buffer = io.BytesIO()
        Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save(buffer, "PNG")
        writer.write("good", {"png": buffer.getvalue(), "txt": "black"})
        writer.write("garbage", {"png": b"no picture", "txt": "a"})
        writer.write("silent", {"png": buffer.getvalue(), "txt": ""})
    record = tiny.Record()
    data = tiny.ShardsDataModule(train=[str(folder), str(tmp_path / "bad")], batch_size=4, image_size=tiny.SIZE)
    trainer = tiny.trainer(tmp_path, record, DataStats(), max_epochs=2)
    trainer.fit(tiny.autoencoder(disc_weight=0.0), datamodule=data)
    assert trainer.train_dataloader.stats.bad >= 2
    assert record.column("data/skipped")[-1] == trainer.train_dataloader.stats.bad
    assert {"data/skipped/empty_caption"} <= {k for row in record.rows for k in row}


def test_plain_lines_come_every_n_steps(tmp_path, capsys, image_shards):
    trainer = tiny.trainer(tmp_path, PlainProgress(every_n_steps=4), max_steps=10, val_check_interval=10)
    trainer.fit(tiny.autoencoder(), datamodule=tiny.shards(image_shards))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "9/10", "10/10"]
    assert "reconstruction" in lines[0] and "val/psnr" in lines[-1] and "left" in lines[1]


def test_each_batch_has_its_own_seed_and_repeats_it(tmp_path):
    draws = []

    class Draw(tiny.L.Callback):
        def on_train_batch_end(self, *args):
            draws.append((torch.rand(()).item(), np.random.rand(), random.random()))

    for _ in range(2):
        tiny.trainer(tmp_path, Draw(), max_steps=4).fit(tiny.autoencoder(disc_weight=0.0), tiny.pixels())
        random.seed(len(draws))
        torch.manual_seed(len(draws))
    assert draws[:4] == draws[4:] and all(len({d[i] for d in draws[:4]}) == 4 for i in range(3))
    assert StepSeed().state_key == "StepSeed"


def test_a_truncated_shard_does_not_stop_training(tmp_path):
    folder = tiny.write_images(tmp_path / "images" / "train", 36, 0)
    shard = folder / "00001.tar"
    with tarfile.open(shard) as tar:
        cut = tar.getmembers()[10].offset
    shard.write_bytes(shard.read_bytes()[:cut])
    record = tiny.Record()
    data = tiny.ShardsDataModule(train=str(folder), batch_size=4, image_size=tiny.SIZE)
    trainer = tiny.trainer(tmp_path, record, DataStats(), max_epochs=1)
    trainer.fit(tiny.autoencoder(disc_weight=0.0), datamodule=data)
    assert trainer.global_step == 9 and record.column("data/missing")[-1] > 0
