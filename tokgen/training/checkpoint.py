"""Training checkpoints: written whole or not at all, with the previous one kept, and found again.

Lightning's own writer can leave a truncated file in place of the last good one (a full disk, a kill while writing
across file systems) and says nothing when the folder is not writable.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from tokgen.data.datamodule import ShardsDataModule
from tokgen.errors import CheckpointError, ConfigError
from tokgen.files import why_unwritten
from tokgen.training.base import TrainingDiverged, TrainingModule
from tokgen.training.ema import EMA

log = logging.getLogger(__name__)
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, renames; reads with `weights_only=True`.

    Overwriting `last.ckpt` leaves the one before as `previous.ckpt`, by a hard link where the file system has them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Raises CheckpointError if the file cannot be written; what was there before is then untouched."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                _keep(path, path.with_name(PREVIOUS))
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException as error:
            temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None
            reason = why_unwritten(error)
            if reason is None:
                raise
            raise CheckpointError(
                f"checkpoint {path} was not written: {reason} ({_room(checkpoint, path.parent)}); what was there before "
                "is untouched"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: Any = None
    ) -> Any:
        """The checkpoint's dictionary. Raises CheckpointError if it is missing, damaged or holds more than data."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file without unpickling anything but tensors and plain data.

    With `mmap`, tensors stay on the disk until used: a quick look whether the file is whole.

    Raises:
        CheckpointError: no such file, damaged, or with objects in it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a .ckpt file of a run, or 'auto'")
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "WeightsUnpickler" in str(error):
            raise CheckpointError(
                f"{path} holds more than tensors and plain data and is not loaded; a checkpoint of this package never does"
            ) from None
        raise CheckpointError(f"{path} is damaged ({first}); resume from {PREVIOUS} beside it") from None


def _keep(path: Path, copy: Path) -> None:
    temporary = copy.with_name(f"{copy.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        os.replace(path, copy)
        return
    os.replace(temporary, copy)
    temporary.unlink(missing_ok=True)  # still there if both are one file, after a kill between this and what follows


def _room(checkpoint: Any, folder: Path) -> str:
    """How much a checkpoint needs and how much the disk has."""
    needed, free = _size(checkpoint) / 1e6, "an unknown number of"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(folder).free / 1e6:.0f}"
    return f"about {needed:.0f} MB are needed, {free} MB are free there"


def _size(data: Any) -> int:
    """Bytes of the tensors in nested plain data."""
    if isinstance(data, torch.Tensor):
        return data.nbytes
    values = data.values() if isinstance(data, dict) else data if isinstance(data, (list, tuple)) else ()
    return sum(map(_size, values))


def find_last(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a run that can be read: `last.ckpt`, else `previous.ckpt`; None if there is none.

    Raises:
        CheckpointError: there are some and none can be read.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            read_checkpoint(path, mmap=True)
            if problems:
                log.warning("%s; resuming from %s", problems[0], path)
            return path
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"no checkpoint in {folder} can be read: {problems[0]}")
    return None


def _point_at_next_batch(loop: dict[str, Any], data: Any) -> None:
    """Bring the saved counters of Lightning's fit loop into the one form that it goes on from rightly, at any batch.

    With other ranks than before, other numbers of batches are done and left of the epoch: the data module knows them.

    It counts a batch as completed after its hooks, and saves what it has counted. Read back, counters saved later, on
    validation or at the end of training, would give an epoch whose last batch is done one batch more, and take an epoch
    that `max_steps` cut for a whole one. Counters saved earlier, at the end of a batch, would leave out a validation that
    was due after it, so that the next one would be compared with an older best score.
    """
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    seen = batches["total"]["ready"]
    if not seen:
        return
    validated = batches["total"]["completed"] == seen  # or not due
    over, done = batches["is_last_batch"], batches["current"]["ready"]
    places = loop["state_dict"].get("combined_loader", [])
    if isinstance(data, ShardsDataModule) and places and "world" in places[0] and (place := data.place(places[0])):
        done, over = place[0], place[0] == place[1]
    batches["is_last_batch"] = False
    for span in ("total", "current"):
        batches[span] = dict.fromkeys(batches[span], seen if span == "total" else 0 if over else done)
        begun = epochs[span]["ready"] + over
        epochs[span] = {"ready": begun, "started": begun, "processed": begun - 1, "completed": begun - 1}
        if not validated:  # as if stopped within its first batch
            begun = int(span == "total")
            none = {"ready": begun, "started": begun, "processed": 0, "completed": 0}
            loop["epoch_loop.val_loop.batch_progress"][span] = none
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = seen


def replace_folder(new: Path, folder: Path) -> None:
    """Put the folder `new` in the place of `folder`, and remove what was there.

    A kill between the two renames leaves no `folder`, but what was there, whole, as `folder.old-PID`: `recover_folder`
    puts it back.
    """
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    if old.exists():
        os.replace(old, new)  # so that what is called .old- is never half removed
        shutil.rmtree(new, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Clear away what a killed `replace_folder`, or the writing before it, left beside `folder`."""
    for old in folder.parent.glob(f"{folder.name}.old-*"):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, folder)
    for new in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(new, ignore_errors=True)


class Checkpoint(LightningCheckpoint):
    """Saves `last.ckpt` by steps and by minutes and at the end, and `best.ckpt` when validation improves.

    The model in its published form (EMA weights where there are some) is written to `tokenizer` or `generator` in the
    run directory at each improvement, and with the last weights when training ends.

    Steps are those of the training module (one per update of the main optimizer), so that a second optimizer changes
    nothing. With gradient accumulation a save waits for the step to be complete.

    When a disk is full, an error says so, what was there before stays, and training goes on: the next save tries again.
    Where there is no next one (at the end of training, and after a signal), CheckpointError is raised. All ranks do
    alike, though one alone writes.

    Args:
        every_n_steps: steps between two saves of `last.ckpt`; None for none.
        every_n_minutes: wall-clock minutes between two saves; None for none. Several ranks look every 10 steps.
        save_best: keep `best.ckpt` by the module's own metric, or by `monitor`.
        monitor: name of a validation metric; None takes the module's.
        mode: "min" or "max" of `monitor`.
        export: "last" as said; "best" leaves the best one in place at the end; "none" writes no published form.
        save_on_exception: save `last.ckpt` when training breaks off between two steps (also for an interrupt).
        dirpath: folder; None is `checkpoints` in the trainer's `default_root_dir`.
    """

    def __init__(
        self,
        every_n_steps: int | None = 1000,
        every_n_minutes: float | None = 10.0,
        save_best: bool = True,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        export: Literal["last", "best", "none"] = "last",
        save_on_exception: bool = True,
        dirpath: str | None = None,
    ) -> None:
        super().__init__()
        if (every_n_steps is not None and every_n_steps < 1) or (monitor is None) != (mode is None):
            raise ConfigError("checkpoint: every_n_steps must be at least 1, and monitor comes together with mode")
        if mode not in (None, "min", "max") or export not in ("last", "best", "none"):
            raise ConfigError(f"checkpoint: mode {mode!r} must be min or max, and export {export!r} last, best or none")
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.save_best, self.monitor, self.mode = save_best, monitor, mode
        self.export, self.save_on_exception, self.dirpath = export, save_on_exception, dirpath
        self.best_score: float | None = None
        self.best_model_path = ""  # the name that `trainer.test(ckpt_path="best")` reads
        self.saved_step = 0  # of what is on the disk
        self._tried, self._time = 0, time.monotonic()  # step and moment of the last save, which may have failed
        self._stale = ""  # why the published form is an older one than it should be

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_model_path": self.best_model_path, "stale": self._stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_score, self.best_model_path = state["best_score"], state["best_model_path"]
        self._stale = state.get("stale", "")

    def on_load_checkpoint(self, trainer: Any, pl_module: TrainingModule, checkpoint: dict[str, Any]) -> None:
        _point_at_next_batch(checkpoint["loops"]["fit_loop"], trainer.datamodule)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: TrainingModule, stage: str) -> None:
        folder = Path(self.dirpath) if self.dirpath is not None else Path(trainer.default_root_dir) / "checkpoints"
        self.folder = Path(trainer.strategy.broadcast(str(folder)))
        if self.monitor is None:
            self.monitor, self.mode = pl_module.monitor
        self._stale = ""  # unless a checkpoint, which is read later, says otherwise
        if stage == "fit" and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            run = Path(trainer.default_root_dir)  # perhaps of a run that was killed while it wrote
            files = (run.glob(f"{name}.tmp-*") for name in ("metrics.jsonl", "config.yaml", "images/*.png"))
            for stray in (*self.folder.glob("*.tmp-*"), *itertools.chain.from_iterable(files)):
                stray.unlink(missing_ok=True)
            for name in (pl_module.export_name, *pl_module.export_beside):
                recover_folder(run / name)

    def on_train_start(self, trainer: Any, pl_module: TrainingModule) -> None:
        self._time, self.saved_step = time.monotonic(), pl_module.step
        self._tried = pl_module.step

    def on_train_batch_end(self, trainer: Any, pl_module: TrainingModule, *args: Any) -> None:
        if not pl_module.between_steps or pl_module.step == self._tried or over(trainer):
            return
        due = self.every_n_steps is not None and pl_module.step % self.every_n_steps == 0
        alone = trainer.world_size == 1
        if self.every_n_minutes is not None and not due and (alone or pl_module.step % 10 == 0):
            late = time.monotonic() - self._time >= 60 * self.every_n_minutes
            due = late if alone else trainer.strategy.broadcast(late)  # clocks differ between ranks
        if due:
            with self._again_later(trainer):
                self.save(trainer, pl_module)

    def save(self, trainer: Any, pl_module: TrainingModule) -> Path:
        """Write `last.ckpt` now; called on all ranks. Raises CheckpointError, on all of them, if it cannot be written."""
        path = self.folder / LAST
        self._tried, self._time = pl_module.step, time.monotonic()
        self._write(trainer, path)
        self.saved_step = pl_module.step
        return path

    def _write(self, trainer: Any, path: Path) -> None:
        error = None
        try:
            trainer.save_checkpoint(path)
        except CheckpointError as failure:  # on the rank that writes; the others are in the barrier behind the writing
            error = failure
            trainer.strategy.barrier()
        if problem := _settled(trainer, error):
            raise CheckpointError(problem) from error

    @contextlib.contextmanager
    def _again_later(self, trainer: Any) -> Iterator[None]:
        """Within the block, what cannot be written is said and does not end the training."""
        try:
            yield
        except CheckpointError as error:
            if trainer.is_global_zero:
                log.error("%s. Training goes on, and the next save tries again", error)

    def on_validation_end(self, trainer: Any, pl_module: TrainingModule) -> None:
        before = self.best_score, self.best_model_path
        if not self.improved(trainer):
            return
        self.best_model_path = str(self.folder / BEST)
        with self._again_later(trainer):
            try:
                self._write(trainer, self.folder / BEST)
            except CheckpointError:
                self.best_score, self.best_model_path = before  # what best.ckpt still holds
                raise
            if self.export != "none":
                self.publish(trainer, pl_module)

    def publish(self, trainer: Any, pl_module: TrainingModule) -> None:
        """Write the published form into the run directory; called on all ranks. A reader finds a whole folder.

        Raises CheckpointError, on all ranks, if it cannot be written; the folder of before is then as it was.
        """
        averages = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)
        folder = Path(trainer.default_root_dir) / pl_module.export_name
        names, new = (*pl_module.export_beside, pl_module.export_name), f".tmp-{os.getpid()}"
        error = None
        try:
            if averages is not None:
                averages.attach(pl_module)  # a resumed run without a step to do has not
            with averages.applied(pl_module) if averages is not None else contextlib.nullcontext():
                pl_module.export(folder.with_name(folder.name + new), trainer.is_global_zero)
            if trainer.is_global_zero:
                for name in names:
                    replace_folder(folder.with_name(name + new), folder.with_name(name))
        except Exception as failure:  # on the rank that writes; the others are waiting to hear of it
            reason = why_unwritten(failure) if trainer.is_global_zero else None
            if reason is None:
                raise
            error = CheckpointError(f"{folder} was not written: {reason}; what was there before is untouched")
            for name in names:
                shutil.rmtree(folder.with_name(name + new), ignore_errors=True)
        self._stale = _settled(trainer, error)
        if self._stale:
            raise CheckpointError(self._stale) from error

    def improved(self, trainer: Any) -> bool:
        """Whether the validation that just ended is the best so far; remembers it."""
        if not self.save_best or trainer.sanity_checking or trainer.state.fn != "fit":
            return False
        score = trainer.callback_metrics.get(self.monitor)
        if score is None or not bool(torch.isfinite(score)):
            return False
        score = float(score)
        if self.best_score is not None and not (
            score < self.best_score if self.mode == "min" else score > self.best_score
        ):
            return False
        self.best_score = score
        return True

    def on_train_end(self, trainer: Any, pl_module: TrainingModule) -> None:
        due = [self.publish] if self._publishes_last else []
        if pl_module.step != self.saved_step and pl_module.between_steps:
            due.append(self.save)  # last of all: a run that is resumed from it has nothing left to do
        problems = []
        for write in due:
            try:
                write(trainer, pl_module)
            except CheckpointError as error:
                problems.append(str(error))
        if self._stale and self.publish not in due:
            problems.append(self._stale)
        if problems:
            raise CheckpointError("; ".join(problems))

    def on_fit_end(self, trainer: Any, pl_module: TrainingModule) -> None:
        """Publish what a run could not at its end: resumed from there it has no step to do."""
        if self._stale and self._publishes_last:
            self.publish(trainer, pl_module)
        elif self._stale:
            raise CheckpointError(self._stale)

    @property
    def _publishes_last(self) -> bool:
        return self.export == "last" or (self.export == "best" and self.best_score is None)

    def on_exception(self, trainer: Any, pl_module: TrainingModule, exception: BaseException) -> None:
        alone = trainer.world_size == 1  # other ranks may hang, and saving is collective
        if not (self.save_on_exception and alone and trainer.training and hasattr(self, "folder")):
            return
        if isinstance(exception, (CheckpointError, TrainingDiverged)):  # what diverged must not push out what is whole
            return
        if pl_module.step == self.saved_step or not pl_module.between_steps or over(trainer):
            return
        try:
            self.save(trainer, pl_module)
        except CheckpointError as error:  # what broke the training off is what is raised
            log.error("%s", error)


def over(trainer: Any) -> bool:
    """Whether the training batch that just ended is the last of the run.

    Nothing is saved then until the validation and the publishing that are still due are done: a run that is resumed after
    its last batch does neither.
    """
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    return trainer.is_last_batch and 0 < (trainer.max_epochs or -1) <= trainer.current_epoch + 1


def _settled(trainer: Any, error: CheckpointError | None) -> str:
    """The text of rank zero's error, "" for none, on all ranks, so that none goes on by itself; called on all of them."""
    return trainer.strategy.broadcast("" if error is None else str(error))
