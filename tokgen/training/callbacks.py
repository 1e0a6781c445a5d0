"""Callbacks of every run: seeds, pictures, the codebook's health, plain progress lines, signals."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from torch import Tensor

from tokgen.images import image_grid, write_png
from tokgen.quantizers.base import sum_over_ranks, usage_stats
from tokgen.training.base import TrainingModule

log = logging.getLogger(__name__)


class StepSeed(Callback):
    """Seeds every generator before each training batch from (seed, batch number, rank).

    Random numbers then depend on where a run is and not on how often it was interrupted, so that a resumed run repeats
    the uninterrupted one bit for bit, and no generator's state need be saved.

    Args:
        seed: None takes the run's `seed_everything`.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.batches = 0

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        seed = self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        # SeedSequence mixes the three well; neighbours give unrelated streams
        word = int(np.random.SeedSequence([seed, self.batches, trainer.global_rank]).generate_state(1, np.uint64)[0])
        torch.manual_seed(word % 2**63)
        np.random.seed(word % 2**32)
        random.seed(word)
        self.batches += 1


def show(trainer: Any, name: str, grid: Tensor, pl_module: TrainingModule) -> None:
    """Send a picture uint8 (3, H, W) to the loggers that take one."""
    for logger in trainer.loggers:
        with pl_module.unless_disk_full(type(logger).__name__):
            if hasattr(logger, "log_image"):  # Weights & Biases
                logger.log_image(key=name, images=[grid.permute(1, 2, 0).numpy()], step=pl_module.step)
            elif hasattr(getattr(logger, "experiment", None), "add_image"):  # TensorBoard
                logger.experiment.add_image(name, grid, global_step=pl_module.step)


class ImageGrid(Callback):
    """At each validation, the first validation pictures above their reconstructions, in `images/` of the run.

    Args:
        count: pictures; 0 turns it off.
        columns: in a row.
    """

    def __init__(self, count: int = 16, columns: int = 8) -> None:
        super().__init__()
        self.count, self.columns = count, columns

    def on_validation_batch_end(
        self, trainer: Any, pl_module: TrainingModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        wanted = batch_idx == 0 and self.count and trainer.is_global_zero and not trainer.sanity_checking
        if not wanted or not isinstance(outputs, dict) or "reconstruction" not in outputs:
            return
        tokenizer = pl_module.tokenizer
        pictures = batch[tokenizer.modality][: self.count]
        pictures = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
        after = outputs["reconstruction"][: self.count].float()
        pictures, after = tokenizer.pictures(pictures), tokenizer.pictures(after)  # (B, 3, H, W)
        rows = []
        for start in range(0, len(pictures), self.columns):
            for part in (pictures, after):
                row = part[start : start + self.columns].cpu()
                missing = min(self.columns, len(pictures)) - len(row)
                rows.append(torch.cat([row, row.new_ones(missing, *row.shape[1:])]))
        path = Path(trainer.default_root_dir) / "images" / f"reconstruction-{pl_module.step:07d}.png"
        grid = image_grid(torch.cat(rows), min(self.columns, len(pictures)))
        with pl_module.unless_disk_full(str(path.parent)):
            write_png(grid, path)
        show(trainer, "reconstruction", grid, pl_module)


class SampleGrid(Callback):
    """At each validation, pictures drawn for fixed prompts with fixed seeds, in `images/` of the run.

    Needs the module's `visual_tokenizer`; does nothing without it.

    Args:
        prompts: None takes the captions of the first validation batch.
        count: pictures; 0 turns it off.
        columns: in a row.
        seed: of the first picture, counted up from there.
    """

    def __init__(self, prompts: list[str] | None = None, count: int = 16, columns: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.prompts, self.count, self.columns, self.seed = prompts, count, columns, seed

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        tokenizer = getattr(pl_module, "visual_tokenizer", None)
        if batch_idx or not self.count or tokenizer is None or trainer.sanity_checking:
            return
        if getattr(pl_module, "device_mesh", None) is None and not trainer.is_global_zero:
            return  # sharded weights are gathered by all ranks at every layer, so there all must draw
        prompts = (self.prompts or list(batch["caption"]))[: self.count]
        generator = pl_module.generator
        sharded = hasattr(generator, "unshard")
        if sharded:  # drawing calls the parts by themselves, not the whole that would gather its embeddings
            generator.unshard()
        tokens = generator.generate(prompts, generator=self.seed)
        if sharded:
            generator.reshard()
        if not trainer.is_global_zero:
            return
        tokenizer.to(tokens.device)
        pictures = tokenizer.pictures(tokenizer.decode(dataclasses.replace(tokens, tokenizer="")))
        path = Path(trainer.default_root_dir) / "images" / f"samples-{pl_module.step:07d}.png"
        grid = image_grid(pictures, min(self.columns, len(pictures)))
        with pl_module.unless_disk_full(str(path.parent)):
            write_png(grid, path, {"prompts": prompts, "seed": self.seed, "step": pl_module.step})
        show(trainer, "samples", grid, pl_module)


class CodebookMonitor(Callback):
    """Counts the codes of the training batches and says when the codebook dies.

    Every `every_n_steps` steps it logs `codebook/usage` (share of the codes seen since the last time), and
    `codebook/perplexity`, and sends the histogram of counts to TensorBoard; below `warn_below` it warns. What has been counted
    is in the checkpoints, so that a resumed run logs what an unbroken one does.

    Args:
        every_n_steps: 0 turns it off.
        warn_below: usage that is worth a warning.
    """

    def __init__(self, every_n_steps: int = 500, warn_below: float = 0.1) -> None:
        super().__init__()
        self.every_n_steps, self.warn_below = every_n_steps, warn_below
        self.counts: list[Tensor] = []
        self._seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"counts": [sum_over_ranks(c).cpu() for c in self.counts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = list(state["counts"])

    def setup(self, trainer: Any, pl_module: TrainingModule, stage: str) -> None:
        self.counts = []  # unless a checkpoint, which is read later, holds some

    def on_train_start(self, trainer: Any, pl_module: TrainingModule) -> None:
        mine = 1 if trainer.is_global_zero else 0  # what all ranks had counted is kept by one
        self.counts = [mine * counts.to(pl_module.device) for counts in self.counts]
        self._seen = pl_module.step

    def on_train_batch_end(self, trainer: Any, pl_module: TrainingModule, outputs: Any, *args: Any) -> None:
        if not self.every_n_steps or not isinstance(outputs, dict) or "tokens" not in outputs:
            return
        tokens = outputs["tokens"]
        if not self.counts:
            self.counts = [torch.zeros(k, dtype=torch.int64, device=tokens.device) for k in tokens.codebook_sizes]
        ids = tokens.ids[tokens.mask].reshape(-1, len(self.counts))
        for c, counts in enumerate(self.counts):
            counts += torch.bincount(ids[:, c], minlength=len(counts))
        if pl_module.step == self._seen or pl_module.step % self.every_n_steps:
            return
        self._seen = pl_module.step
        totals = [sum_over_ranks(c) for c in self.counts]
        stats = [usage_stats(t) for t in totals]
        usage = min(float(s["usage"]) for s in stats)
        seen = int(totals[0].sum())
        pl_module.record({"codebook/usage": usage, "codebook/perplexity": min(float(s["perplexity"]) for s in stats)})
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                with pl_module.unless_disk_full(type(logger).__name__):
                    if hasattr(getattr(logger, "experiment", None), "add_histogram"):
                        logger.experiment.add_histogram("codebook/counts", totals[0].cpu(), global_step=pl_module.step)
        # a codebook larger than what was drawn from it cannot all be seen
        if usage < self.warn_below * min(1.0, seen / len(totals[0])):
            log.warning(
                "step %d: only %.1f %% of the codes were used in the last %d steps; the codebook is collapsing. Try a "
                "lower learning rate, revival of unused codes, fewer channels per code, or another quantizer",
                pl_module.step, 100 * usage, self.every_n_steps,
            )  # fmt: skip
        for counts in self.counts:
            counts.zero_()


class DataStats(Callback):
    """Logs what the training data skipped, by reason, as `data/...`, whenever it changed. Counts are rank zero's."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: TrainingModule, *args: Any) -> None:
        if not pl_module.between_steps or pl_module.step % trainer.log_every_n_steps:
            return
        self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: TrainingModule) -> None:
        self._log(trainer, pl_module)

    def _log(self, trainer: Any, pl_module: TrainingModule) -> None:
        stats = getattr(trainer.train_dataloader, "stats", None)
        if stats is None:  # not one of `tokgen.data`
            return
        counts = {k: v for k, v in stats.as_dict().items() if k != "read"}
        if counts != self._last:
            pl_module.record({f"data/{k}": v for k, v in counts.items()})
            self._last = counts


class PlainProgress(Callback):
    """One line per `every_n_steps` logged steps, for logs that are files and not terminals.

    Args:
        every_n_steps: 0 turns it off; lines come at most this often, and only where metrics were logged.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self._start: tuple[float, int] | None = None

    def on_train_start(self, trainer: Any, pl_module: TrainingModule) -> None:
        self._start = (time.monotonic(), pl_module.step)
        self._printed = -math.inf

    def on_record(self, trainer: Any, pl_module: TrainingModule, values: dict[str, float]) -> None:
        training = any(k.startswith("train/") for k in values)
        validation = any(k.startswith("val/") for k in values)
        wanted = self.every_n_steps and (training or validation)
        if not wanted or not trainer.is_global_zero or self._start is None:
            return
        step = pl_module.step
        if training and step - self._printed < self.every_n_steps and self._printed >= 0:
            return
        if training:
            self._printed = step
        started, first = self._start
        seconds = time.monotonic() - started
        total = trainer.max_steps
        left = "" if total < 1 or step <= first else f" left {_clock(seconds / (step - first) * (total - step))}"
        shown = " ".join(f"{k.split('/', 1)[-1] if training else k} {v:.4g}" for k, v in values.items())
        with pl_module.unless_disk_full("progress lines"):
            print(f"step {step}{f'/{total}' if total > 0 else ''} {_clock(seconds)}{left} {shown}", flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class SignalCheckpoint(LightningCheckpoint):
    """On SIGTERM or SIGUSR1: finish the step, save `last.ckpt`, leave with exit code 143 (128 + SIGTERM).

    The handler only sets a flag; it is looked at after each training batch, on all ranks together, so that a signal to one
    rank stops all. In a SLURM batch job (`#SBATCH --requeue`) rank zero then puts the job back into the queue.
    When the checkpoint cannot be saved, CheckpointError ends the run instead (exit code 2) and no job is put back: it would
    go on from an older checkpoint and meet the same full disk.

    Lightning's own handlers are left out: on SIGTERM they broadcast from within the handler and end the run with code 0;
    under SLURM they save `hpc_ckpt_N.ckpt` on SIGUSR1 and requeue the job a second time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flag = 0
        self._before: dict[int, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        trainer._signal_connector.register_signal_handlers = _nothing  # private to Lightning
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for number in (signal.SIGTERM, getattr(signal, "SIGUSR1", None)):
            if number is not None:
                self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._flag = number

    def on_train_batch_end(self, trainer: Any, pl_module: TrainingModule, *args: Any) -> None:
        flag = self._flag
        if trainer.world_size > 1:
            shared = torch.tensor(flag, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            flag = int(shared)
        from tokgen.training.checkpoint import Checkpoint, over

        if not flag or not pl_module.between_steps or over(trainer):  # what is over ends by itself
            return
        savers = [c for c in trainer.callbacks if isinstance(c, Checkpoint)]
        if savers:
            path = savers[0].save(trainer, pl_module)
            log.warning("signal %d: saved %s at step %d, stopping", flag, path, pl_module.step)
        else:
            log.warning("signal %d: no checkpoint callback, stopping without saving", flag)
        if trainer.is_global_zero:
            requeue()
        trainer.strategy.barrier()  # `srun --kill-on-bad-exit` ends all ranks as soon as one has left
        raise SystemExit(143)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._restore()


def _nothing() -> None:
    return None


def requeue() -> None:
    """Put the SLURM batch job that this process belongs to back into the queue; outside of one, do nothing.

    With "incomplete" SLURM leaves a job alone that was cancelled, or that it has put back itself (preemption).
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        command = ["scontrol", "requeue", "incomplete", job]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        problem = f"{done.stdout} {done.stderr}".strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        log.warning("job %s is not back in the queue (%s); submit it again, it goes on from last.ckpt", job, problem)
