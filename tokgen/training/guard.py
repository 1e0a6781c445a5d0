"""Going back to a checkpoint when a training explodes, and on from there."""

from __future__ import annotations

import logging
import math
import uuid
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from tokgen.errors import CheckpointError, ConfigError
from tokgen.training.base import TrainingDiverged, TrainingModule
from tokgen.training.checkpoint import LAST, PREVIOUS, Checkpoint, read_checkpoint
from tokgen.training.ema import EMA

log = logging.getLogger(__name__)
ENOUGH, MEMORY = 5, 10  # windows: before a loss is judged, and of its history
AGAIN = 100  # windows within which roll-backs count together
OF_START = 0.1  # a loss below this part of what it began with has not exploded, whatever it was in between
MAIN, DISCRIMINATOR = 0, 1  # optimizers by their index


@dataclass
class Track:
    """The course of one loss.

    Attributes:
        start: its median in the first window of the stage.
        history: its medians in the last healthy windows, oldest first.
        recent: (step, value) of the last healthy window and of all that came after it.
        fresh: steps since the last window.
    """

    start: float = 0.0
    history: list[float] = field(default_factory=list)
    recent: list[tuple[int, float]] = field(default_factory=list)
    fresh: int = 0

    def add(self, step: int, value: float, window: int, factor: float) -> int | None:
        """Take the value of a step. Returns the step at which an explosion began, if a window that is now full shows one."""
        self.recent.append((step, value))
        self.fresh += 1
        if self.fresh < window:
            return None
        self.fresh = 0
        now = median(value for _, value in self.recent[-window:])
        if len(self.history) >= ENOUGH:
            limit = max(factor * median(self.history), OF_START * self.start)
            suspect = limit / math.sqrt(factor)
            if now > limit:
                return next(step for step, value in self.recent if value > suspect)
            if now > suspect:  # how it will turn out is not clear: neither healthy nor exploded
                if len(self.recent) <= ENOUGH * window:
                    return None
                self.history = [now] * ENOUGH  # so this is how it is now
        self.start = self.start or now
        self.history = [*self.history, now][-MEMORY:]
        self.recent = self.recent[-window:]
        return None


class Guard(Callback):
    """Goes back to a healthy checkpoint when a loss explodes, lowers a learning rate, and lets the run go on.

    Watched are the losses that a module names in `signals`: distances of the reconstruction, the loss of a generator, loss
    and logits of a discriminator. Every `window` steps the median of a loss over these steps is compared with the median
    over up to 10 healthy windows before. More than `factor` times that is an explosion; more than its square root is a
    suspicion, and no part of the history until it has lasted for five windows. A median over a window is deaf to single
    bad batches. Five windows must have passed before, in the same stage of a staged run, so that the first steps of a
    network are never judged; and a loss that is still below a tenth of what it began with has not exploded, however small
    it was before. Losses of a discriminator are in units of what is usual, and less counts as 1 (see
    `discriminator_signals`). `max_bad_steps` steps in a row that were skipped for a NaN are an explosion too.

    Gradient norms that are finite are not judged: clipping takes their size away, and a discriminator's falls by orders
    of magnitude while it is right and comes back in health. If they do harm, a loss shows it. What a ratio cannot see: a
    cross-entropy that falls back to guessing rises by less than `factor`; for language models take one nearer to 1.5.

    On an explosion all ranks restore weights, buffers, EMA and optimizer states from `last.ckpt`, or from `previous.ckpt`
    if the newer one was written after the trouble began, holds a discriminator that was wild already, or has lately been
    gone back to for nothing. Steps, schedule, position in the data and random numbers go on: other batches follow. The
    learning rate of the optimizer at fault is lowered for the rest of the run. At fault is the one whose loss rose first,
    the main one if both did at the same step (a discriminator shown nonsense has wild logits too). If the reconstruction
    exploded alone, it is the discriminator's where that has just begun or was wild before; if losses are not finite, where
    the reconstruction is as usual.

    What a roll-back does follows from checkpoints and steps alone, and the guard's own state is in the checkpoints: a run
    that was killed and resumed goes back where the uninterrupted one does. A checkpoint written in between for another
    reason (a signal, `every_n_minutes`) may be a nearer one to go back to.

    Args:
        factor: above 1.
        window: steps, at least 2. The explosion is seen half a window to one and a half after it began; two checkpoints should not
            both be written within that time.
        max_rollbacks: more of them within 100 windows end the run with `TrainingDiverged`; 0 turns the guard off.
        lr_factor: in (0, 1], of the learning rate at fault, for each roll-back.
    """

    def __init__(self, factor: float = 5.0, window: int = 20, max_rollbacks: int = 3, lr_factor: float = 0.5) -> None:
        super().__init__()
        if not factor > 1 or window < 2 or max_rollbacks < 0 or not 0 < lr_factor <= 1:
            raise ConfigError(
                f"guard: factor {factor} must be above 1, window {window} at least 2, max_rollbacks {max_rollbacks} at "
                f"least 0 and lr_factor {lr_factor} in (0, 1]"
            )
        self.factor, self.window, self.max_rollbacks, self.lr_factor = factor, window, max_rollbacks, lr_factor
        self.run = ""  # marks the checkpoints of this run among those that an earlier one left in the folder
        self.stage = 0
        self.tracks: dict[str, Track] = {}  # by "index/name"
        self.rollbacks: list[tuple[int, int]] = []  # (step at which, step of the checkpoint)
        self.lr_scales: dict[int, float] = {}  # the module's own
        self.bad_in_a_row: dict[int, int] = {}  # the module's own
        self._seen = 0

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return "Guard"

    def state_dict(self) -> dict[str, Any]:
        tracks = {name: asdict(track) for name, track in self.tracks.items()}
        state = {"run": self.run, "stage": self.stage, "tracks": tracks, "rollbacks": list(self.rollbacks)}
        return {**state, "lr_scales": dict(self.lr_scales), "bad_in_a_row": dict(self.bad_in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.run, self.stage, self.rollbacks = state["run"], state["stage"], list(state["rollbacks"])
        self.tracks = {name: Track(**track) for name, track in state["tracks"].items()}
        self.lr_scales, self.bad_in_a_row = dict(state["lr_scales"]), dict(state["bad_in_a_row"])

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: TrainingModule) -> None:
        self._seen = pl_module.step
        if self.max_rollbacks:
            self.run = trainer.strategy.broadcast(self.run or uuid.uuid4().hex)
            pl_module.lr_scales, pl_module.bad_in_a_row = self.lr_scales, self.bad_in_a_row

    def on_train_batch_end(self, trainer: Any, pl_module: TrainingModule, *args: Any) -> None:
        if not self.max_rollbacks or not pl_module.between_steps:
            return
        bad = [i for i, count in pl_module.bad_in_a_row.items() if count >= pl_module.max_bad_steps]
        if bad:
            what = f"{pl_module.max_bad_steps} steps in a row had a loss or gradient that is not finite"
            self.roll_back(trainer, pl_module, what, pl_module.step + 1, self._source(pl_module, bad[0]))
        if pl_module.step == self._seen:  # a skipped step
            return
        self._seen = pl_module.step
        stage = pl_module.stage_at(pl_module.step - 1)
        if stage != self.stage:
            self.stage, self.tracks = stage, {}
        exploded = []
        for index, losses in pl_module.signals.items():
            for name, value in losses.items():
                track = self.tracks.setdefault(f"{index}/{name}", Track())
                began = track.add(pl_module.step, value, self.window, self.factor)
                if began is not None:
                    exploded.append((began, index, name, value / median(track.history)))
        if exploded:
            began, index, name, times = min(exploded)
            what = f"{name} is {times:.3g} times what it was"
            self.roll_back(trainer, pl_module, what, began, self._source(pl_module, index))

    def _source(self, pl_module: TrainingModule, index: int) -> int:
        """The optimizer at fault where losses of the `index`-th exploded."""
        others = [track for name, track in self.tracks.items() if name.startswith(f"{DISCRIMINATOR}/")]
        if index != MAIN or not others:
            return index
        if max(pl_module.bad_in_a_row.values(), default=0) >= pl_module.max_bad_steps:
            usual = {name: self.tracks.get(f"{MAIN}/{name}", Track()).history for name in pl_module.signals[MAIN]}
            wild = all(
                value < self.factor * median(usual[name] or [math.inf])  # so the adversarial term is not finite
                for name, value in pl_module.signals[MAIN].items()
            )
        else:  # it was always so, or has just begun to be
            wild = any(len(track.history) < ENOUGH or median(track.history) > self.factor for track in others)
        return DISCRIMINATOR if wild else index

    # -- the way back -------------------------------------------------------------------------------------------------

    def roll_back(self, trainer: Any, pl_module: TrainingModule, what: str, began: int, index: int) -> None:
        """Restore the state before step `began` and lower the learning rate of the `index`-th optimizer; on all ranks.

        Raises:
            TrainingDiverged: too many roll-backs in a short time, or no checkpoint to go back to.
        """
        step, owner = pl_module.step, "discriminator's" if index == DISCRIMINATOR else "main"
        what = f"step {step}: {what} (since step {began})"
        mend = "lower the learning rate, " + ("disc_weight, " if index == DISCRIMINATOR else "") + "or look at the data"
        lately = [target for at, target in self.rollbacks if step - at < AGAIN * self.window]
        if len(lately) >= self.max_rollbacks:
            raise TrainingDiverged(
                f"{what}, after {len(lately)} roll-backs within {AGAIN * self.window} steps that lowered the {owner} "
                f"learning rate to {self.lr_scales.get(index, 1.0):.3g} of its setting; {mend}. Checkpoints are as they were"
            )
        path = trainer.strategy.broadcast(self._find(trainer, began, set(lately)))
        if path is None:
            raise TrainingDiverged(
                f"{what}, and this run has no checkpoint from before it to go back to (checkpoint.every_n_steps, best at "
                f"least {2 * self.window}); {mend}"
            )
        target = self._restore(trainer, pl_module, path)
        self.rollbacks.append((step, target))
        self.lr_scales[index] = self.lr_scales.get(index, 1.0) * self.lr_factor
        if trainer.is_global_zero:
            log.warning(
                "%s; went back to the weights of step %d (%s) and on with other batches, the %s learning rate at %.3g of "
                "its setting",
                what, target, path, owner, self.lr_scales[index],
            )  # fmt: skip
        scales = {"guard/lr_scale": self.lr_scales.get(MAIN, 1.0)}
        if len(trainer.optimizers) > 1:
            scales["guard/disc_lr_scale"] = self.lr_scales.get(DISCRIMINATOR, 1.0)
        pl_module.record({"guard/rollbacks": len(self.rollbacks), **scales})

    def _find(self, trainer: Any, began: int, tried: set[int]) -> str | None:
        """The newest checkpoint of this run whose next step was healthy.

        One with a wild discriminator is taken only if there is no other, and so is one that was gone back to lately.
        """
        saver = next((c for c in trainer.callbacks if isinstance(c, Checkpoint)), None)
        if saver is None or not trainer.is_global_zero:  # rank zero chooses
            return None
        found = []
        for name in (LAST, PREVIOUS):
            try:
                checkpoint = read_checkpoint(saver.folder / name, mmap=True)
            except CheckpointError:
                continue
            step, own = int(checkpoint["global_step"]), checkpoint.get("callbacks", {}).get(self.state_key)
            if own is not None and own["run"] == self.run and step + 1 < began:
                found.append((self._tame(own["tracks"]), step not in tried, step, str(saver.folder / name)))
        return max(found)[-1] if found else None

    def _tame(self, tracks: dict[str, dict[str, Any]]) -> bool:
        """Whether the discriminator was well when the tracks were saved, if there was one."""
        recent = [t["recent"] for name, t in tracks.items() if name.startswith(f"{DISCRIMINATOR}/") and t["recent"]]
        usual = (median(value for _, value in values[-self.window :]) for values in recent)
        return all(value < math.sqrt(self.factor) for value in usual)

    def _restore(self, trainer: Any, pl_module: TrainingModule, path: str) -> int:
        """Weights, buffers, EMA, optimizer states and the history of the losses, from a checkpoint. Returns its step."""
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        checkpoint = read_checkpoint(path, mmap=sharded)  # all of a large model is not read by every rank
        target, step, skipped = int(checkpoint["global_step"]), pl_module.step, pl_module.skipped
        if sharded:  # loads what is sharded from the file itself
            trainer.strategy.load_checkpoint(path, weights_only=True)
        else:
            trainer.strategy.load_model_state_dict(checkpoint, strict=True)
            trainer.strategy.load_optimizer_state_dict(checkpoint)
        pl_module.set_counters(step, skipped)
        pl_module.restore_settings()
        if pl_module.stage_at(target - 1) != pl_module.stage_at(step - 1):
            for optimizer in trainer.optimizers:
                optimizer.state.clear()  # of the stage before
        for callback in trainer.callbacks:
            if isinstance(callback, EMA) and callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
                callback.attach(pl_module)
        before = checkpoint["callbacks"][self.state_key]
        for name, track in self.tracks.items():
            track.recent, track.fresh = [], 0
            old = before["tracks"].get(name)
            if old is not None and before["stage"] == self.stage and len(old["history"]) >= ENOUGH:
                track.history = list(old["history"])  # older weights may have a higher loss
        self.bad_in_a_row.clear()
        return target
