"""What every training module does alike: steps, schedules, accumulation, clipping, the guard against NaN, and the log.

Lightning's own machinery is not used for these, because it goes wrong with more than one optimizer: it counts every
optimizer's step in `global_step`, so that `max_steps` halves and step-based callbacks do not fire. Here a step is one
update by the main optimizer; `trainer.global_step` and the buffer `train_step` both count exactly these.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from tokgen.errors import ConfigError, TokgenError
from tokgen.files import why_unwritten
from tokgen.quantizers.base import Quantizer, sum_over_ranks

log = logging.getLogger(__name__)
OptimizerCallable = Callable[[Iterable], Optimizer]


class TrainingDiverged(TokgenError):
    """Too many steps in a row with a loss or gradient that is not finite, or a loss that exploded, and no way back."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a run, as a factor of each optimizer's own `lr`.

    Attributes:
        total_steps: steps of the whole run; also the trainer's `max_steps` unless that is given.
        warmup_steps: linear from 0; the first step uses 1 / warmup_steps.
        kind: "cosine" falls to `final` at total_steps, "linear" likewise, "constant" stays at 1.
        final: factor at the end.
    """

    total_steps: int = 100_000
    warmup_steps: int = 0
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = 0.1

    def __post_init__(self) -> None:
        if self.total_steps < 1 or not 0 <= self.warmup_steps <= self.total_steps:
            raise ConfigError(
                f"schedule: total_steps {self.total_steps} must be at least 1 and warmup_steps {self.warmup_steps} "
                "between 0 and total_steps"
            )

    def factor(self, step: int) -> float:
        """Factor of the learning rate for the update number `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        span = max(self.total_steps - self.warmup_steps, 1)
        done = min((step - self.warmup_steps) / span, 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.final + (1 - self.final) * fall


def count_only(others: Iterable[LightningOptimizer]) -> None:
    """Make `trainer.global_step` count the steps of the main optimizer alone, not those of `others`.

    Called inside `training_step`: Lightning's manual loop hooks its counter to each optimizer just before. The hooks are
    private; `tests/training/test_steps.py` fails when they change.
    """
    for optimizer in others:
        if not (hasattr(optimizer, "_on_before_step") and hasattr(optimizer, "_on_after_step")):
            raise RuntimeError("this version of lightning counts optimizer steps in another way; pin lightning<2.7")
        optimizer._on_before_step = optimizer._on_after_step = _nothing


def _nothing() -> None:
    return None


class TrainingModule(L.LightningModule):
    """Base of the training modules; manual optimization.

    Subclasses implement `configure_optimizers` through `adopt`, and `training_step` through `accumulating`, `backward`
    parts of their own and `update`.

    Args:
        schedule: of the learning rate.
        accumulate: batches per step; the gradient is that of one batch `accumulate` times as large.
        clip: gradients are scaled down to this global norm, each optimizer by itself; None leaves them.
        max_bad_steps: a step whose loss or gradient norm is not finite is skipped (weights, buffers and optimizer stay
            as they were) and counted; after this many in a row the callback `Guard` goes back to a checkpoint, and a run
            without it ends with `TrainingDiverged`.

    Attributes:
        signals: of the step done last, by the optimizer's index: the losses that should not jump, means over the ranks.
        lr_scales: further factor of an optimizer's learning rates, by its index; 1 where there is none.
        bad_in_a_row: steps skipped since the last good one, by the optimizer's index.
    """

    monitor: ClassVar[tuple[str, str]]  # the validation metric that says which checkpoint is best, and "min" or "max"
    ema_modules: ClassVar[tuple[str, ...]] = ()  # submodules that the EMA callback follows
    export_name: ClassVar[str]  # folder in the run directory that the published model goes to
    export_beside: ClassVar[tuple[str, ...]] = ()  # folders of further parts, beside that one

    def __init__(
        self, schedule: Schedule, accumulate: int = 1, clip: float | None = 1.0, max_bad_steps: int = 20
    ) -> None:
        super().__init__()
        if accumulate < 1 or max_bad_steps < 1:
            raise ConfigError(f"accumulate {accumulate} and max_bad_steps {max_bad_steps} must be at least 1")
        self.automatic_optimization = False
        self.schedule, self.accumulate, self.clip, self.max_bad_steps = schedule, accumulate, clip, max_bad_steps
        self.register_buffer("train_step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(lambda module, _: module._read_counters())
        self._read_counters()
        self.signals: dict[int, dict[str, float]] = {}
        self.lr_scales: dict[int, float] = {}
        self.bad_in_a_row: dict[int, int] = {}
        self._micro = 0  # batches of the current step already seen
        self._busy = False  # within a batch
        self._groups: list[list[dict[str, Any]]] = []
        self._kept: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self._unwritten: set[str] = set()
        self._clock: tuple[float, int] | None = None
        self._items = 0

    # -- counters -----------------------------------------------------------------------------------------------------

    def _read_counters(self) -> None:
        self._step, self._skipped = int(self.train_step), int(self.skipped_steps)

    def set_counters(self, step: int, skipped: int) -> None:
        """Say how many steps were done and skipped, after weights of another time were loaded."""
        self.train_step.fill_(step)
        self.skipped_steps.fill_(skipped)
        self._read_counters()

    @property
    def skipped(self) -> int:
        """Steps skipped; equal to the buffer `skipped_steps`, without reading the device."""
        return self._skipped

    @property
    def step(self) -> int:
        """Steps done; equal to the buffer `train_step`, without reading the device."""
        return self._step

    @property
    def between_steps(self) -> bool:
        """Whether no gradient is pending and no update half done, so that a checkpoint loses nothing."""
        return self._micro == 0 and not self._busy

    # -- configuration ------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Plain data that goes into every checkpoint for the reader; files and flags, not this, rule a resumed run."""
        return {"schedule": asdict(self.schedule), "accumulate": self.accumulate, "clip": self.clip}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        import tokgen

        config = json.loads(json.dumps(self.describe(), default=str))
        checkpoint["tokgen"] = {"version": tokgen.__version__, "module": type(self).__name__, "config": config}

    def adopt(self, *optimizers: Optimizer) -> list[Optimizer]:
        """Remember the optimizers' settings as configured, main one first; to be returned by `configure_optimizers`.

        A checkpoint restores settings of its own (lr, weight decay, betas); the configured ones are put back when
        training starts, so that a resumed run obeys its files and flags.
        """
        self._groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
        return list(optimizers)

    def on_fit_start(self) -> None:
        precision = str(self.trainer.precision)
        if precision.startswith("16"):
            raise ConfigError(
                f"trainer.precision {precision} needs loss scaling, which {type(self).__name__} does not support; use "
                "bf16-mixed or 32-true"
            )
        if getattr(self.trainer, "gradient_clip_val", None):
            raise ConfigError(f"trainer.gradient_clip_val has no effect here; set {type(self).__name__}'s clip")

    def restore_settings(self) -> None:
        """Put the optimizers' settings back to what was configured, after their states were loaded."""
        for optimizer, groups in zip(self.trainer.optimizers, self._groups):
            for group, configured in zip(optimizer.param_groups, groups):
                group.update(configured)

    def on_train_start(self) -> None:
        self.restore_settings()
        self._read_counters()
        self._micro, self._busy, self._clock, self._items = 0, False, None, 0

    # -- one step -----------------------------------------------------------------------------------------------------

    def begin(self, modules: Iterable[nn.Module], others: Iterable[LightningOptimizer] = ()) -> bool:
        """Start of a batch. Returns whether the batch completes a step.

        Args:
            modules: those whose buffers the forward pass changes; kept at the first batch of a step, to be put back
                if the step turns out bad.
            others: the optimizers beside the main one.
        """
        count_only(others)
        self._busy = True
        if self._micro == 0:
            self.signals.clear()
            for module in modules:
                state, kept = mutable(module), self._kept.get(module)
                if kept is not None and [id(t) for t in state] == [id(t) for t, _ in kept]:
                    for tensor, copy in kept:
                        copy.copy_(tensor)
                else:
                    self._kept[module] = [(t, t.detach().clone()) for t in state]
        self._micro = (self._micro + 1) % self.accumulate
        return self._micro == 0

    def update(
        self,
        optimizer: LightningOptimizer,
        index: int,
        losses: Iterable[Tensor],
        modules: Iterable[nn.Module],
        watched: dict[str, Tensor] | None = None,
    ) -> tuple[bool, Tensor]:
        """Clip, look at the gradients, step, and zero them. Returns (whether it stepped, gradient norm before clipping).

        Args:
            optimizer: the one to step; its settings were the `index`-th given to `adopt`.
            losses: detached scalars that must be finite too.
            modules: those given to `begin` whose buffers are put back if the step is bad.
            watched: scalars at least 0 that tell how well it goes, for `signals`; None takes the sum of the losses.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip if self.clip is not None else math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded parameters
        losses = [x.detach().float() for x in losses]
        watched = {"loss": sum(losses)} if watched is None else watched
        seen = torch.stack([*(x.detach().float() for x in watched.values()), norm.detach().float(), *losses])
        if self.trainer.world_size > 1:  # one rank's NaN is everyone's: all take the same branch
            torch.distributed.all_reduce(seen)
        seen = seen.tolist()  # the only point of a step where the device is waited for
        good = all(map(math.isfinite, seen))
        self.signals[index] = {name: value / self.trainer.world_size for name, value in zip(watched, seen)}
        if good:
            scale = self.lr_scales.get(index, 1.0)
            for group, configured in zip(optimizer.param_groups, self._groups[index]):
                group["lr"] = configured["lr"] * self.lr_factor(configured) * scale
            optimizer.step()
        optimizer.zero_grad()
        if good:
            self.bad_in_a_row[index] = 0
            return True, norm.detach()

        with torch.no_grad():
            for module in modules:
                for tensor, copy in self._kept[module]:
                    tensor.copy_(copy)
        self._skipped += 1
        self.skipped_steps += 1
        self.bad_in_a_row[index] = self.bad_in_a_row.get(index, 0) + 1
        return False, norm.detach()

    def finish(self, stepped: bool) -> None:
        """End of a batch; `stepped` says whether the main optimizer did."""
        self._busy = False
        if stepped:
            self._step += 1
            self.train_step += 1

    def single_step(
        self,
        model: nn.Module,
        compute: Callable[[], tuple[Tensor, dict[str, Any]]],
        items: int,
        unit: str = "samples",
        bar: Iterable[str] = ("train/loss",),
    ) -> None:
        """The whole training step of a module with one optimizer.

        Args:
            model: whose buffers the forward pass changes.
            compute: gives the batch's loss and what goes to the log beside it.
            items, unit: how many of what the batch holds, for the rate in the log.
            bar: names for the progress bar.
        """
        optimizer = self.optimizers()
        completes = self.begin([model])
        logs = completes and self.should_log
        with optimizer.toggle_model(sync_grad=completes):
            loss, terms = compute()
            self.manual_backward(loss / self.accumulate)
        rate = self.rate(items)
        if not completes:
            self.finish(False)
            return
        good, norm = self.update(optimizer, 0, [loss], [model])
        metrics = {"loss": loss, **terms, "grad_norm": norm, "lr": self.learning_rate(), "skipped_steps": self._skipped}
        if rate is not None:
            metrics[f"{unit}_per_second"] = rate
        self.finish(good)
        if logs:
            self.record_training(metrics, bar)

    def on_train_batch_end(self, *args: Any) -> None:
        """Ends a run of bad steps that no callback has taken care of, with TrainingDiverged."""
        bad = max(self.bad_in_a_row.values(), default=0)
        if bad >= self.max_bad_steps:
            raise TrainingDiverged(
                f"{bad} steps in a row had a loss or gradient that is not finite, the last at step {self._step}; the "
                "weights are as they were before. Lower the learning rate or clip, or look at the data"
            )

    # -- log ----------------------------------------------------------------------------------------------------------

    @property
    def should_log(self) -> bool:
        """Whether the step that this batch completes goes to the log."""
        return (self._step + 1) % self.trainer.log_every_n_steps == 0 or self._step == 0

    def record(self, metrics: dict[str, Any], bar: Iterable[str] = ()) -> None:
        """Send scalars to every logger at x = step, and those named in `bar` to the progress bar.

        Lightning's own `self.log` puts batches, not steps, on the x axis, and costs per name and batch.
        """
        values = {k: float(v) for k, v in metrics.items()}
        for name in bar:
            if name in values:
                self.log(name, values[name], prog_bar=True, logger=False)
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                with self.unless_disk_full(type(logger).__name__):
                    logger.log_metrics(values, step=self._step)
        for callback in self.trainer.callbacks:
            receive = getattr(callback, "on_record", None)
            if receive is not None:
                receive(self.trainer, self, values)

    @contextlib.contextmanager
    def unless_disk_full(self, what: str) -> Iterator[None]:
        """Within the block, a failure to write `what` is said once and not raised: what tells of a training does not end it."""
        try:
            yield
        except Exception as error:  # libraries wrap the system's
            reason = why_unwritten(error)
            if reason is None:
                raise
            if what not in self._unwritten:
                log.error("%s: not written (%s). Training goes on, and this is said once", what, reason)
            self._unwritten.add(what)

    def record_training(self, metrics: dict[str, Any], bar: Iterable[str] = ()) -> None:
        """`record` for a training step, as `train/...`: means over the ranks."""
        values = [v.detach().float() if isinstance(v, Tensor) else torch.tensor(float(v)) for v in metrics.values()]
        means = sum_over_ranks(torch.stack([v.to(self.device) for v in values])) / self.trainer.world_size
        self.record({f"train/{k}": v for k, v in zip(metrics, means.tolist())}, bar)

    def report(self, metrics: dict[str, Any], bar: Iterable[str] = ()) -> None:
        """`record` for results of a validation: also where checkpoint callbacks and `trainer.validate` look for them."""
        values = {k: float(v) for k, v in metrics.items()}
        for name, value in values.items():
            self.log(name, value, prog_bar=name in set(bar), logger=False)
        if not self.trainer.sanity_checking:
            self.record(values)

    def rate(self, items: int) -> float | None:
        """Items (samples, tokens) per second over all ranks since the last call at a logged step."""
        self._items += items * self.trainer.world_size
        if not self.should_log or self._micro:
            return None
        now = time.perf_counter()
        last, self._clock = self._clock, (now, self._items)
        done, self._items = self._items, 0
        return None if last is None else done / max(now - last[0], 1e-9)

    def lr_factor(self, group: dict[str, Any]) -> float:
        """Factor of a parameter group's learning rate in the current step; `group` holds its settings as configured."""
        return self.schedule.factor(self._step)

    def learning_rate(self, index: int = 0) -> float:
        first = self._groups[index][0]
        return first["lr"] * self.lr_factor(first) * self.lr_scales.get(index, 1.0)

    def stage_at(self, step: int) -> int:
        """The stage that update number `step` belongs to: where a stage begins, losses change their meaning."""
        return 0

    # -- export -------------------------------------------------------------------------------------------------------

    def export(self, folder: Path, write: bool) -> None:
        """Write what this module trains in its published form.

        Called on all ranks, since gathering sharded weights takes all of them; `write` is True on the one that writes.
        The parts named in `export_beside` go to folders beside `folder`, with its suffix.
        """
        raise NotImplementedError


def decay_groups(module: nn.Module, heads: Iterable[nn.Module] = ()) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices and kernels are decayed as it says, vectors and codebooks are not.

    The matrices of linear layers inside are a group of their own, marked `hidden`, for optimizers that treat them apart.

    Args:
        heads: linear layers that give logits, which are not hidden.
    """
    codebooks = {id(p) for m in module.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    outside = {id(p) for head in heads for p in head.parameters()}
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)} - codebooks - outside
    parameters = [p for p in module.parameters() if p.requires_grad]
    hidden = [p for p in parameters if id(p) in linear]
    decayed = [p for p in parameters if p.ndim > 1 and id(p) not in codebooks | linear]
    others = [p for p in parameters if p.ndim <= 1 or id(p) in codebooks]
    groups = ({"params": hidden, "hidden": True}, {"params": decayed}, {"params": others, "weight_decay": 0.0})
    return [g for g in groups if g["params"]]


def mutable(module: nn.Module) -> list[Tensor]:
    """What a forward pass may change in place: buffers, and the codebooks of quantizers (averages, k-means, revival)."""
    tensors = {id(b): b for b in module.buffers()}
    for part in module.modules():
        if isinstance(part, Quantizer):
            tensors |= {id(p): p for p in part.parameters()}
    return list(tensors.values())
