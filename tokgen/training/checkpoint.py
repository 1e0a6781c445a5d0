"""Training checkpoints: written whole or not at all, with the previous one kept, and found again.

Lightning's own writer can leave a truncated file in place of the last good one (a full disk, a kill while writing
across file systems) and says nothing when the folder is not writable.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from tokgen.errors import CheckpointError, ConfigError
from tokgen.training.base import TrainingModule
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
            reason = _reason(error)
            if reason is None:
                raise
            raise CheckpointError(
                f"checkpoint {path} was not written: {reason}; the one before is untouched"
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


def _reason(error: BaseException) -> str | None:
    """A sentence for a failure to write, None if the error is something else."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError):
            if chain.errno in (errno.ENOSPC, errno.EDQUOT):
                return "the disk is full"
            if chain.errno == errno.EFBIG:
                return "the file would exceed the size limit of this process"
            if chain.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return "the folder is not writable"
            return os.strerror(chain.errno) if chain.errno else str(chain)
        if isinstance(chain, RuntimeError) and ("enforce fail" in str(chain) or "PytorchStreamWriter" in str(chain)):
            return "the disk is full, or its writing failed"
        chain = chain.__cause__ or chain.__context__
    return None


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


def _point_at_next_batch(loop: dict[str, Any]) -> None:
    """Bring the saved counters of Lightning's fit loop into the one form that it goes on from rightly, at any batch.

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
    over = batches["is_last_batch"]
    batches["is_last_batch"] = False
    for span in ("total", "current"):
        batches[span] = dict.fromkeys(batches[span], 0 if over and span == "current" else batches[span]["ready"])
        begun = epochs[span]["ready"] + over
        epochs[span] = {"ready": begun, "started": begun, "processed": begun - 1, "completed": begun - 1}
        if not validated:  # as if stopped within its first batch
            begun = int(span == "total")
            none = {"ready": begun, "started": begun, "processed": 0, "completed": 0}
            loop["epoch_loop.val_loop.batch_progress"][span] = none
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = seen


def replace_folder(new: Path, folder: Path) -> None:
    """Put the folder `new` in the place of `folder`, and remove what was there."""
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


class Checkpoint(LightningCheckpoint):
    """Saves `last.ckpt` by steps and by minutes and at the end, and `best.ckpt` when validation improves.

    The model in its published form (EMA weights where there are some) is written to `tokenizer` or `generator` in the
    run directory at each improvement, and with the last weights when training ends.

    Steps are those of the training module (one per update of the main optimizer), so that a second optimizer changes
    nothing. With gradient accumulation a save waits for the step to be complete.

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
        self.saved_step = 0
        self._time = time.monotonic()

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_model_path": self.best_model_path}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_score, self.best_model_path = state["best_score"], state["best_model_path"]

    def on_load_checkpoint(self, trainer: Any, pl_module: TrainingModule, checkpoint: dict[str, Any]) -> None:
        _point_at_next_batch(checkpoint["loops"]["fit_loop"])

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: TrainingModule, stage: str) -> None:
        folder = Path(self.dirpath) if self.dirpath is not None else Path(trainer.default_root_dir) / "checkpoints"
        self.folder = Path(trainer.strategy.broadcast(str(folder)))
        if self.monitor is None:
            self.monitor, self.mode = pl_module.monitor
        if stage == "fit" and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stray in self.folder.glob("*.tmp-*"):  # of a run that was killed while it wrote
                stray.unlink(missing_ok=True)
            for name in (pl_module.export_name, *pl_module.export_beside):
                for state in ("tmp", "old"):
                    for stray in Path(trainer.default_root_dir).glob(f"{name}.{state}-*"):
                        shutil.rmtree(stray, ignore_errors=True)

    def on_train_start(self, trainer: Any, pl_module: TrainingModule) -> None:
        self._time, self.saved_step = time.monotonic(), pl_module.step

    def on_train_batch_end(self, trainer: Any, pl_module: TrainingModule, *args: Any) -> None:
        if not pl_module.between_steps or pl_module.step == self.saved_step:
            return
        due = self.every_n_steps is not None and pl_module.step % self.every_n_steps == 0
        alone = trainer.world_size == 1
        if self.every_n_minutes is not None and not due and (alone or pl_module.step % 10 == 0):
            late = time.monotonic() - self._time >= 60 * self.every_n_minutes
            due = late if alone else trainer.strategy.broadcast(late)  # clocks differ between ranks
        if due:
            self.save(trainer, pl_module)

    def save(self, trainer: Any, pl_module: TrainingModule) -> Path:
        """Write `last.ckpt` now; called on all ranks."""
        path = self.folder / LAST
        trainer.save_checkpoint(path)
        self._time, self.saved_step = time.monotonic(), pl_module.step
        return path

    def on_validation_end(self, trainer: Any, pl_module: TrainingModule) -> None:
        if not self.improved(trainer):
            return
        self.best_model_path = str(self.folder / BEST)
        trainer.save_checkpoint(self.best_model_path)
        if self.export != "none":
            self.publish(trainer, pl_module)

    def publish(self, trainer: Any, pl_module: TrainingModule) -> None:
        """Write the published form into the run directory; called on all ranks. A reader finds a whole folder."""
        averages = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)
        with averages.applied(pl_module) if averages is not None else contextlib.nullcontext():
            folder = Path(trainer.default_root_dir) / pl_module.export_name
            pl_module.export(folder.with_name(f"{folder.name}.tmp-{os.getpid()}"), trainer.is_global_zero)
        if trainer.is_global_zero:
            for name in (*pl_module.export_beside, pl_module.export_name):
                whole = folder.with_name(name)
                replace_folder(whole.with_name(f"{name}.tmp-{os.getpid()}"), whole)
        trainer.strategy.barrier()

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
        if pl_module.step != self.saved_step and pl_module.between_steps:
            self.save(trainer, pl_module)
        if self.export == "last" or (self.export == "best" and self.best_score is None):
            self.publish(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: TrainingModule, exception: BaseException) -> None:
        alone = trainer.world_size == 1  # other ranks may hang, and saving is collective
        if not (self.save_on_exception and alone and trainer.training and hasattr(self, "folder")):
            return
        if isinstance(exception, CheckpointError) or pl_module.step == self.saved_step or not pl_module.between_steps:
            return
        self.save(trainer, pl_module)
