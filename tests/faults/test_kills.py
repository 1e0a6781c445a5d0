"""Training survives SIGKILL: a short soak, and the two moments at which a run could lose its published model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import tiny
from tokgen.training.callbacks import SignalCheckpoint
from tokgen.training.checkpoint import (
    AtomicCheckpointIO,
    Checkpoint,
    find_last,
    read_checkpoint,
    recover_folder,
    replace_folder,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_runs_lose_nothing(tmp_path):
    """In a process of its own, since it forks before any thread runs."""
    command = [sys.executable, "-m", "tests.faults.soak", "--kills", "14", "--seed", "1", "--lanes", "1"]
    command += ["--variants", "worker", "--json", str(tmp_path / "soak.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "soak.json").read_text())
    assert sum(result["kills"].values()) == 14 and min(result["kills"].values()) >= 1 and len(result["kills"]) >= 5
    assert result["runs"] >= 1 and result["violations"] == []


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(content)
    return path


@pytest.mark.parametrize("killed_after", range(5))
def test_a_published_folder_is_whole_after_a_kill_at_any_step_of_its_replacement(tmp_path, monkeypatch, killed_after):
    """The steps: old aside, new in place, old out of the way, old removed."""
    left = killed_after

    def counted(real):
        def call(*args, **options):
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return real(*args, **options)

        return call

    published, new = folder(tmp_path / "tokenizer", "old"), folder(tmp_path / f"tokenizer.tmp-{os.getpid()}", "new")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", counted(os.replace))
        patch.setattr("shutil.rmtree", counted(shutil.rmtree))
        try:
            replace_folder(new, published)
        except KeyboardInterrupt:
            assert killed_after < 4
    recover_folder(published)
    assert (published / "config.json").read_text() == ("old" if killed_after < 2 else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


class Stop(tiny.L.Callback):
    """Breaks off where the last validation is over and the model would be published."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_validation_end(self, trainer, module):
        if module.step == self.at:
            raise RuntimeError("the machine is gone")


def test_no_checkpoint_of_the_last_step_before_its_validation_and_publishing(tmp_path):
    """A run that is resumed from its last step does nothing more, so that step is saved when all else is done."""

    def fit(*callbacks, start=None):
        saving = Checkpoint(every_n_steps=2, every_n_minutes=None)
        options = {"max_steps": 4, "val_check_interval": 2}
        trainer = tiny.trainer(tmp_path, saving, *callbacks, **options)
        trainer.fit(tiny.autoencoder(), tiny.pixels(), tiny.pixels(count=4), ckpt_path=start)

    with pytest.raises(RuntimeError, match="the machine is gone"):
        fit(Stop(4))
    last = find_last(tmp_path / "checkpoints")
    assert read_checkpoint(last)["global_step"] == 2
    fit(start=last)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert (tmp_path / "tokenizer" / "model.safetensors").is_file()


class Signal(tiny.L.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, module, *args):
        if module.step == self.at:
            os.kill(os.getpid(), 15)


def test_a_signal_at_the_last_step_lets_the_run_end(tmp_path):
    callbacks = Signal(2), SignalCheckpoint(), Checkpoint(every_n_steps=None, every_n_minutes=None)
    tiny.trainer(tmp_path, *callbacks, max_steps=2).fit(tiny.autoencoder(), tiny.pixels())
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert (tmp_path / "tokenizer" / "model.safetensors").is_file()


def test_a_kill_between_keeping_the_old_checkpoint_and_renaming_the_new_one_leaves_no_stray(tmp_path):
    """Both names are then one file, and renaming one link of a file to another does nothing."""
    io, last = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"n": 0}, last)
    os.link(last, tmp_path / "previous.ckpt")
    io.save_checkpoint({"n": 1}, last)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert [read_checkpoint(tmp_path / name)["n"] for name in ("last.ckpt", "previous.ckpt")] == [1, 0]
