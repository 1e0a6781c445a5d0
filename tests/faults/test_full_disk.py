"""A full disk: training goes on, what was saved before stays whole, and what could not be saved at the end is an error.

A write fails for real: the temporary name that a file is written under is made a link to /dev/full, on which each write gives
ENOSPC, or the whole run directory is a file system of a few megabytes in a namespace of its own.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tokgen
from tests.faults.children import exit_codes, fork, run_ranks
from tests.training import tiny
from tests.training.test_resume import RECIPE
from tokgen.cli import main
from tokgen.errors import CheckpointError
from tokgen.training.callbacks import ImageGrid, SignalCheckpoint
from tokgen.training.checkpoint import Checkpoint, read_checkpoint
from tokgen.training.ema import EMA
from tokgen.training.lightning_cli import JsonLinesLogger, TensorBoard
from tokgen.training.sharding import FullyShardedStrategy

torch.set_num_threads(1)  # the tensors are tiny: threads would wait for each other


class Full(tiny.L.Callback):
    """For one write of each name, the disk is full after these steps; a `folder` in the run is in the way of a name for good."""

    def __init__(self, *steps: int, name: str = "last.ckpt", folder: str | None = None) -> None:
        self.steps, self.name, self.folder = steps, name, folder
        self.seen: list[dict[str, int]] = []  # what was in the checkpoints after each batch

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if pl_module.step in self.steps and trainer.is_global_zero:
            self.steps = tuple(step for step in self.steps if step != pl_module.step)
            run = Path(trainer.default_root_dir)
            (run / "checkpoints" / f"{self.name}.tmp-{os.getpid()}").symlink_to("/dev/full")
            if self.folder is not None:
                (run / f"{self.folder}.tmp-{os.getpid()}").touch()

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        self.seen.append(saved(Path(trainer.default_root_dir)))


def saved(run: Path) -> dict[str, int]:
    """The step of each checkpoint."""
    return {p.name: read_checkpoint(p, mmap=True)["global_step"] for p in sorted((run / "checkpoints").glob("*.ckpt"))}


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([v.detach().double().flatten() for v in module.state_dict().values()])


@pytest.fixture
def errors(caplog):
    """The lines of the log that are errors."""
    caplog.set_level(logging.ERROR, "tokgen")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "images"
    tiny.write_images(folder / "train", 24, 0)
    tiny.write_images(folder / "val", 6, 1)
    return folder


def test_training_goes_on_and_the_next_save_works(tmp_path, errors):
    modules = [tiny.autoencoder(disc_weight=0.0) for _ in range(2)]
    tiny.trainer(tmp_path / "a", Checkpoint(every_n_steps=2), max_steps=8).fit(modules[0], tiny.pixels())
    full, run = Full(4), tmp_path / "b"
    tiny.trainer(run, full, Checkpoint(every_n_steps=2), max_steps=8).fit(modules[1], tiny.pixels())
    assert full.seen == [
        {}, {}, {"last.ckpt": 2}, {"last.ckpt": 2}, {"last.ckpt": 2}, {"last.ckpt": 2},  # 4 is not saved
        *[{"last.ckpt": 6, "previous.ckpt": 2}] * 2,
    ]  # fmt: skip
    assert saved(run) == {"last.ckpt": 8, "previous.ckpt": 6}
    assert torch.equal(*map(weights, modules))
    (line,) = errors()
    assert f"{run}/checkpoints/last.ckpt was not written: the disk is full (about " in line
    assert "are needed" in line and "untouched" in line and "Training goes on" in line and "\n" not in line
    assert not list(run.rglob("*.tmp-*"))


def test_after_a_failure_no_batch_of_the_same_step_tries_again(tmp_path, errors):
    """By the clock a save is due at once; a skipped batch leaves the step as it was."""
    full = Full(1)
    module = tiny.autoencoder(disc_weight=0.0)
    tiny.trainer(tmp_path, full, Checkpoint(every_n_steps=1, export="none"), max_steps=3).fit(
        module, tiny.pixels(2, bad=(2, 4))
    )
    assert int(module.skipped_steps) == 2 and full.seen == [{}, {}, {}, {}, {"last.ckpt": 2}] and len(errors()) == 1


def test_at_the_end_it_is_an_error_and_the_model_is_published_all_the_same(tmp_path):
    module = tiny.autoencoder(disc_weight=0.0)
    with pytest.raises(CheckpointError, match=r"last\.ckpt was not written: the disk is full"):
        tiny.trainer(tmp_path, Full(5), Checkpoint(every_n_steps=2), max_steps=5).fit(module, tiny.pixels())
    assert saved(tmp_path) == {"last.ckpt": 4, "previous.ckpt": 2}
    assert tokgen.load(tmp_path / "tokenizer").fingerprint == module.tokenizer.fingerprint


def test_what_cannot_be_published_leaves_the_older_folder_whole(tmp_path, images, errors):
    module, published = tiny.autoencoder(disc_weight=0.0), []

    class Look(tiny.L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args) -> None:
            if (tmp_path / "tokenizer").exists():
                published.append(tokgen.load(tmp_path / "tokenizer").fingerprint)

    in_the_way = Full(4, 6, name="best.ckpt", folder="tokenizer")
    trainer = tiny.trainer(tmp_path, in_the_way, Look(), Checkpoint(every_n_steps=2, save_best=True), max_steps=6, val_check_interval=2)  # fmt: skip
    checkpoint = trainer.checkpoint_callback
    checkpoint.improved = lambda t: setattr(checkpoint, "best_score", t.global_step) or True  # at each validation
    with pytest.raises(
        CheckpointError, match=r"tokenizer was not written: .*tokenizer\.tmp-\d+ is in the way"
    ) as caught:
        trainer.fit(module, datamodule=tiny.shards(images))
    assert saved(tmp_path) == {"best.ckpt": 2, "last.ckpt": 6, "previous.ckpt": 4}
    assert checkpoint.best_score == 2  # which is what best.ckpt holds, so that the next better one replaces it
    assert len(set(published)) == 1 and tokgen.load(tmp_path / "tokenizer").fingerprint == published[0]
    assert len(errors()) == 2 and all("best.ckpt was not written" in line for line in errors())
    assert "\n" not in str(caught.value)


def test_what_could_not_be_published_at_the_end_is_when_the_run_is_resumed(tmp_path):
    """There is no step left to do; what is published are the averages of the checkpoint."""

    def fit(run: Path, *callbacks, seed: int = 0) -> None:
        last = run / "checkpoints" / "last.ckpt"
        trainer = tiny.trainer(run, *callbacks, EMA(0.5), Checkpoint(every_n_steps=2), max_steps=5)
        module = tiny.autoencoder(disc_weight=0.0, seed=seed)
        trainer.fit(module, tiny.pixels(), ckpt_path=last if last.is_file() else None)

    fit(tmp_path / "a")
    run, lost = tmp_path / "b", r"tokenizer was not written: .* is in the way"
    with pytest.raises(CheckpointError, match=lost):
        fit(run, Full(5, name="nothing", folder="tokenizer"))
    assert saved(run) == {"last.ckpt": 5, "previous.ckpt": 4} and not (run / "tokenizer").exists()
    with pytest.raises(CheckpointError, match=lost):  # it is still in the way
        fit(run, seed=7)
    (run / f"tokenizer.tmp-{os.getpid()}").unlink()
    fit(run, seed=7)
    assert tokgen.load(run / "tokenizer").fingerprint == tokgen.load(tmp_path / "a" / "tokenizer").fingerprint


def test_an_exception_is_raised_itself_and_the_save_that_failed_is_said(tmp_path, errors):
    class Fail(tiny.L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args) -> None:
            if pl_module.step == 3:
                raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        tiny.trainer(tmp_path, Full(3), Fail(), Checkpoint(every_n_steps=2), max_steps=9).fit(
            tiny.autoencoder(disc_weight=0.0), tiny.pixels()
        )
    assert saved(tmp_path) == {"last.ckpt": 2}
    assert len(errors()) == 1 and "disk is full" in errors()[0]


class Signal(tiny.L.Callback):
    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if pl_module.step == self.step:
            os.kill(os.getpid(), self.number)


def test_a_signal_that_cannot_save_does_not_end_as_if_it_had(tmp_path, monkeypatch):
    """Neither with the code that has the job queued again, nor by queueing it itself."""
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {asked}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for run, full in (("a", Full(3)), ("b", Full())):
        fails = bool(full.steps)
        with pytest.raises(CheckpointError if fails else SystemExit):
            tiny.trainer(
                tmp_path / run, full, Signal(3, signal.SIGUSR1), SignalCheckpoint(), Checkpoint(every_n_steps=2), max_steps=9
            ).fit(tiny.autoencoder(disc_weight=0.0), tiny.pixels())  # fmt: skip
        assert saved(tmp_path / run)["last.ckpt"] == (2 if fails else 3)
        assert asked.exists() is not fails


def test_logs_and_pictures_that_cannot_be_written_are_reported_once(tmp_path, images, errors):
    """The folder of pictures is a file, the file of figures a folder."""
    (tmp_path / "images").touch()
    (tmp_path / "metrics.jsonl").mkdir()
    record = tiny.Record()
    logger = JsonLinesLogger(tmp_path, 10**9)
    logger.resumed_step = None
    trainer = tiny.trainer(tmp_path, record, ImageGrid(count=2), logger=logger, max_steps=4, val_check_interval=2)
    trainer.fit(tiny.autoencoder(disc_weight=0.0), datamodule=tiny.shards(images))
    assert trainer.global_step == 4 and len(record.column("train/reconstruction")) == 4
    lines = sorted(errors())
    assert len(lines) == 2 and "images: not written" in lines[0] and "JsonLinesLogger: not written (Is a directory)" in lines[1]  # fmt: skip


# -- several ranks ------------------------------------------------------------------------------------------------------


def rank(number: int, out: Path, codes: Path) -> None:
    """Rank zero's disk is full after step 4, and at the end the published folder cannot be written either."""
    for kind in ("ddp", "fsdp"):
        module = tiny.generator(config={"token_dropout": 0.0})
        full, strategy = Full(4, 5, folder="generator"), FullyShardedStrategy() if kind == "fsdp" else kind
        data = tiny.ShardsDataModule(train=str(codes), batch_size=4)
        trainer = tiny.trainer(out / kind, full, Checkpoint(every_n_steps=2), devices=2, strategy=strategy, max_steps=5)
        with pytest.raises(CheckpointError) as caught:
            trainer.fit(module, datamodule=data)
        result = {"step": module.step, "error": str(caught.value), "seen": full.seen}
        (out / kind / f"rank-{number}.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_all_ranks_decide_alike_and_none_hangs(tmp_path):
    """Copies (DDP) and parts (FSDP2) of a model in two processes."""
    tiny.write_codes(tmp_path / "codes", 48, 0)
    codes, output = run_ranks(rank, tmp_path, tmp_path / "codes")
    assert codes == [0, 0], "\n".join(output)[-4000:]
    for kind in ("ddp", "fsdp"):
        results = [json.loads((tmp_path / kind / f"rank-{n}.json").read_text()) for n in range(2)]
        for result in results:
            assert result["step"] == 5 and result["seen"][-1] == {"last.ckpt": 2}
            assert "last.ckpt was not written: the disk is full" in result["error"]
            assert "generator was not written" in result["error"]
        assert saved(tmp_path / kind) == {"last.ckpt": 2}
    assert output[0].count("Training goes on") == 2 and "Training goes on" not in output[1]


# -- a small file system --------------------------------------------------------------------------------------------------


class Ballast(tiny.L.Callback):
    """Fills the run's disk after step 5 to the last byte, and frees it after step 13."""

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        ballast = Path(trainer.default_root_dir) / "ballast"
        if pl_module.step == 5:
            with open(ballast, "wb", buffering=0) as file:
                for size in (1 << 16, 1 << 9, 1):
                    try:
                        while True:
                            file.write(bytes(size))
                    except OSError:
                        pass
        if pl_module.step == 13:
            ballast.unlink()


def mount_here(disk: Path) -> int:
    """A file system of 20 MB that this process alone sees; 0 if that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    own_mounts, own_users = 0x00020000, 0x10000000
    if libc.unshare(own_mounts | (own_users if os.geteuid() else 0)):
        return ctypes.get_errno()
    private = 1 << 18 | 1 << 14
    if libc.mount(None, b"/", None, private, None) or libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=20m"):
        return ctypes.get_errno()
    return 0


def run_in_small_disk(recipe: Path, disk: Path, copy: Path) -> int:
    if number := mount_here(disk):
        print(f"no disk: {os.strerror(number)}")
        return 77
    TensorBoard.retry_seconds = 0.0
    code = main(["fit", "-c", str(recipe), "--run_dir", str(disk / "run")])
    shutil.copytree(disk / "run", copy)
    return code


@pytest.mark.slow
def test_a_run_whose_disk_is_full_for_a_while(tmp_path, images):
    """Checkpoints, figures, TensorBoard, pictures and the published folder, through the command line."""
    recipe, disk, log, run = (tmp_path / name for name in ("recipe.yaml", "disk", "log", "run"))
    disk.mkdir()
    text = RECIPE.format(shards=images, steps=20).replace("every_n_steps: 5", "every_n_steps: 4")
    recipe.write_text(text.replace("trainer: {", f"trainer: {{callbacks: [{__name__}.Ballast], "))
    (code,) = exit_codes([fork(run_in_small_disk, log, recipe, disk, run)])
    output = log.read_text()
    if code == 77:
        pytest.skip(f"this machine lets no process mount a file system for itself: {output}")
    assert code == 0, output
    assert output.count("last.ckpt was not written: the disk is full") == 2  # steps 8 and 12
    assert output.count("best.ckpt was not written: the disk is full") == 1  # step 10
    for name in ("JsonLinesLogger", "TensorBoard", "images"):
        assert output.count(f"{name}: not written (the disk is full)") == 1, output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]  # each line is whole
    steps = {row["step"] for row in rows if "train/reconstruction" in row}
    assert steps >= {*range(1, 6), *range(14, 21)} and steps != set(range(1, 21))
    assert saved(run) == {"best.ckpt": 20, "last.ckpt": 20, "previous.ckpt": 16}
    assert {p.name for p in (run / "images").iterdir()} == {"reconstruction-0000020.png"}
    newest = max(run.glob("events.out.*"), key=lambda path: path.stat().st_mtime)  # begun when there was room again
    events = EventAccumulator(str(newest)).Reload()
    assert [event.step for event in events.Scalars("train/reconstruction")] == list(range(14, 21))
    tokgen.load(run / "tokenizer")
    assert not list(run.rglob("*.tmp-*"))


@pytest.mark.parametrize("place", ["run", "run/checkpoints"])
def test_a_file_in_the_place_of_a_folder_is_one_clear_line(tmp_path, images, place, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(shards=images, steps=4))
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    assert main(["fit", "-c", str(recipe), "--run_dir", str(tmp_path / "run")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if str(tmp_path / place) in line]
    assert len(lines) == 1 and "Traceback" not in lines[0]
