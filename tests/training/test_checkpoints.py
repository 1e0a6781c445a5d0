"""Checkpoints: written when asked, whole or not at all, found again, and never the master of the settings."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch

from tokgen.errors import CheckpointError
from tokgen.training.checkpoint import AtomicCheckpointIO, Checkpoint, find_last, read_checkpoint
from tokgen.training.ema import EMA


class Saves(tiny.L.Callback):
    """The step at each change of last.ckpt."""

    def __init__(self, folder):
        self.path, self.steps, self.seen = folder / "checkpoints" / "last.ckpt", [], None

    def on_train_batch_start(self, trainer, pl_module, *args):
        now = self.path.stat().st_ino if self.path.exists() else None
        if now != self.seen:
            self.seen = now
            self.steps.append(pl_module.step)


def test_saved_at_the_asked_steps_when_the_discriminator_starts_on_an_odd_one(tmp_path):
    saves = Saves(tmp_path)
    module = tiny.autoencoder(disc_start=3, disc_train_from=3)
    tiny.trainer(tmp_path, saves, Checkpoint(every_n_steps=4, every_n_minutes=None), max_epochs=1).fit(
        module, tiny.pixels()
    )
    assert saves.steps == [4, 8, 12]
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 16
    assert read_checkpoint(tmp_path / "checkpoints" / "previous.ckpt")["global_step"] == 12


def test_saved_by_the_clock_too(tmp_path):
    saves = Saves(tmp_path)
    checkpoint = Checkpoint(every_n_steps=None, every_n_minutes=0.0)
    tiny.trainer(tmp_path, saves, checkpoint, max_steps=4).fit(tiny.autoencoder(), tiny.pixels())
    assert saves.steps == [1, 2, 3]


def test_a_save_waits_for_accumulation(tmp_path):
    saves = Saves(tmp_path)
    checkpoint = Checkpoint(every_n_steps=2, every_n_minutes=0.0)
    module = tiny.autoencoder(accumulate=3)
    tiny.trainer(tmp_path, saves, checkpoint, max_steps=4).fit(module, tiny.pixels())
    assert saves.steps == [1, 2, 3]


def test_best_and_published_model(tmp_path, image_shards):
    module, ema = tiny.autoencoder(), EMA(0.5)
    checkpoint = Checkpoint(every_n_steps=None)
    trainer = tiny.trainer(tmp_path, ema, checkpoint, max_steps=24, val_check_interval=6)
    trainer.fit(module, datamodule=tiny.shards(image_shards))
    best = read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    assert best["callbacks"]["Checkpoint"]["best_score"] == checkpoint.best_score > 0
    published = tiny.VQGAN.from_pretrained(tmp_path / "tokenizer").state_dict()
    for name, value in published.items():
        own = ema.average.get(f"tokenizer.{name}", module.tokenizer.state_dict()[name])
        assert torch.equal(value, own), name
    assert not list(tmp_path.glob("*.tmp-*")) and not list(tmp_path.glob("*.old-*"))
    trainer.test(ckpt_path="best", dataloaders=tiny.pixels(), verbose=False)


def test_resume_uses_the_configured_learning_rate(tmp_path):
    checkpoint = lambda: Checkpoint(every_n_steps=None)  # noqa: E731
    tiny.trainer(tmp_path, checkpoint(), max_steps=2).fit(tiny.autoencoder(), tiny.pixels())
    record = tiny.Record()
    changed = tiny.autoencoder(optimizer=lambda p: torch.optim.AdamW(p, lr=7e-4, weight_decay=0.3, fused=True))
    trainer = tiny.trainer(tmp_path, record, checkpoint(), max_steps=4)
    trainer.fit(changed, tiny.pixels(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert record.column("train/lr") == pytest.approx([7e-4, 7e-4])
    group = trainer.optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == pytest.approx((7e-4, 0.3))
    assert trainer.optimizers[0].state  # the moments are the checkpoint's
    assert min(int(s["step"]) for s in trainer.optimizers[0].state.values()) == 4


def test_checkpoint_is_plain_data_and_describes_the_run(tmp_path):
    tiny.trainer(tmp_path, EMA(0.9), Checkpoint(), max_steps=1).fit(tiny.autoencoder(), tiny.pixels())
    data = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    about = data["tokgen"]["config"]
    assert about["tokenizer"]["config"]["z_channels"] == 32 and about["loss"]["disc_layers"] == 1
    assert set(data["callbacks"]) >= {"EMA", "StepSeed", "Checkpoint"}
    assert "hyper_parameters" not in data


# -- files ------------------------------------------------------------------------------------------------------------


def test_overwriting_keeps_the_previous_one(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    for n in range(3):
        io.save_checkpoint({"n": n}, path)
    assert [read_checkpoint(tmp_path / f)["n"] for f in ("last.ckpt", "previous.ckpt")] == [2, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_full_disk_keeps_the_checkpoint_and_says_so(tmp_path):
    """In a process of its own whose files may not exceed 1 MB."""
    script = """
        import resource, signal, sys, torch
        from tokgen.training.checkpoint import AtomicCheckpointIO, CheckpointError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        io = AtomicCheckpointIO()
        io.save_checkpoint({"n": 1}, sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            io.save_checkpoint({"n": 2, "x": torch.zeros(1 << 20)}, sys.argv[1])
        except CheckpointError as error:
            print(error)
    """
    path = tmp_path / "last.ckpt"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], capture_output=True, text=True, check=True
    )
    assert "was not written" in done.stdout and len(done.stdout.strip().splitlines()) == 1
    assert read_checkpoint(path)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]).returncode:
        pytest.skip("no permission to mount")
    try:
        io, path = AtomicCheckpointIO(), disk / "last.ckpt"
        io.save_checkpoint({"n": 1}, path)
        with pytest.raises(CheckpointError, match="disk is full"):
            io.save_checkpoint({"n": 2, "x": torch.zeros(1 << 20)}, path)
        assert read_checkpoint(path)["n"] == 1 and [p.name for p in disk.iterdir()] == ["last.ckpt"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_unwritable_folder_is_an_error(tmp_path):
    """Root may write anywhere, so the process becomes another user first; it has saved once and imports no more."""
    folder = tmp_path / "closed"
    folder.mkdir()
    script = """
        import os, sys
        from tokgen.training.checkpoint import AtomicCheckpointIO, CheckpointError
        AtomicCheckpointIO().save_checkpoint({"n": 0}, "../open.ckpt")
        os.chmod(".", 0o555)
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            AtomicCheckpointIO().save_checkpoint({"n": 1}, "last.ckpt")
        except CheckpointError as error:
            print(error)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not writable" in done.stdout and not list(folder.iterdir())


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"state_dict": {}, "x": Attack()}, tmp_path / "torch.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Attack()))
    for name in ("torch.ckpt", "plain.ckpt"):
        with pytest.raises(CheckpointError, match=name):
            AtomicCheckpointIO().load_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError):
        tiny.trainer(tmp_path, max_steps=1).fit(tiny.autoencoder(), tiny.pixels(), ckpt_path=tmp_path / "torch.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_last_falls_back_to_the_previous(tmp_path, caplog):
    io = AtomicCheckpointIO()
    assert find_last(tmp_path) is None
    for n in range(2):
        io.save_checkpoint({"n": n, "x": torch.zeros(1000)}, tmp_path / "last.ckpt")
    assert find_last(tmp_path).name == "last.ckpt"
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").unlink()  # it shares its bytes with nothing
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    assert find_last(tmp_path).name == "previous.ckpt"
    assert "damaged" in caplog.text
    (tmp_path / "previous.ckpt").unlink()
    with pytest.raises(CheckpointError, match="can be read"):
        find_last(tmp_path)


def test_what_a_killed_writer_left_is_swept_at_the_start(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt.tmp-123").write_bytes(b"half")
    (tmp_path / "tokenizer.tmp-123").mkdir()
    tiny.trainer(tmp_path, Checkpoint(), max_steps=1).fit(tiny.autoencoder(), tiny.pixels())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt"]
    assert not (tmp_path / "tokenizer.tmp-123").exists()


def test_an_exception_between_steps_saves_the_work(tmp_path):
    class Fail(tiny.L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            if pl_module.step == 3:
                raise OSError(errno.EIO, "the disk went away")

    with pytest.raises(OSError, match="went away"):
        tiny.trainer(tmp_path, Fail(), Checkpoint(every_n_steps=100), max_steps=9).fit(
            tiny.autoencoder(), tiny.pixels()
        )
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3
