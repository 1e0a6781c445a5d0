"""Exponential moving averages of weights, for validation and for what is published."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from tokgen.errors import CheckpointError, ConfigError
from tokgen.training.base import TrainingModule


class EMA(Callback):
    """Averages the floating-point parameters of the module's `ema_modules`, once per step.

    Buffers are not averaged but the current ones are used: a codebook that is itself an average must not be averaged
    twice, and counters are integers. Parameters that no optimizer moves are treated like buffers. The average lives
    beside the weights (also sharded ones: the update is elementwise), is in checkpoints under this callback's own key,
    and takes their place during validation and export.

    Args:
        decay: of the average per step; 0 turns it off. In the first steps min(decay, (1 + n) / (10 + n)) is used, so
            that the average forgets the start quickly.
        start: no averaging before this step; the average is then a copy of the weights.
    """

    def __init__(self, decay: float = 0.999, start: int = 0) -> None:
        super().__init__()
        if not 0 <= decay < 1 or start < 0:
            raise ConfigError(f"ema: decay {decay} must be in [0, 1) and start {start} at least 0")
        self.decay, self.start = decay, start
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._seen = 0
        self._attached = self._swapped = False

    @property
    def state_key(self) -> str:
        return "EMA"

    # -- state --------------------------------------------------------------------------------------------------------

    @staticmethod
    def followed(module: TrainingModule) -> dict[str, nn.Parameter]:
        """The parameters that are averaged, by their name in the training module."""
        return {
            f"{name}.{key}": p
            for name in module.ema_modules
            for key, p in module.get_submodule(name).named_parameters()
            if p.requires_grad and p.is_floating_point()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": {k: _whole(v) for k, v in self.average.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.average, self._attached = state["updates"], dict(state["average"]), False

    def attach(self, module: TrainingModule) -> None:
        """Start from the weights, or put what a checkpoint held beside them: same device, same sharding."""
        if self._attached or not self.decay:
            return
        parameters = self.followed(module)
        if self.average and self.average.keys() != parameters.keys():
            raise CheckpointError(
                "the checkpoint's EMA weights are of another model than the configured one; start without ckpt_path"
            )
        restored, self.average = self.average, {k: p.detach().clone() for k, p in parameters.items()}
        for key, value in restored.items():
            _assign(self.average[key], value)
        self._attached, self._seen = True, module.step

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: TrainingModule) -> None:
        self.attach(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: TrainingModule, *args: Any) -> None:
        # nothing to follow, or a batch that completed no step, or a skipped one
        if not self.decay or not self.average or pl_module.step == self._seen:
            return
        self._seen = pl_module.step
        parameters = [_local(p) for p in self.followed(pl_module).values()]
        self.updates += 1
        decay = 0.0 if pl_module.step <= self.start else min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_([_local(a) for a in self.average.values()], parameters, 1 - decay)

    @contextlib.contextmanager
    def applied(self, module: TrainingModule) -> Iterator[None]:
        """The average in place of the weights, within the block."""
        if not self.average or self._swapped:
            yield
            return
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    def on_validation_start(self, trainer: Any, pl_module: TrainingModule) -> None:
        if self.average or trainer.state.fn == "fit":
            self.attach(pl_module)
            self._swap(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: TrainingModule) -> None:
        if self._swapped:
            self._swap(pl_module)

    on_test_start, on_test_end = on_validation_start, on_validation_end
    on_predict_start, on_predict_end = on_validation_start, on_validation_end

    def on_exception(self, trainer: Any, pl_module: TrainingModule, exception: BaseException) -> None:
        if self._swapped:
            self._swap(pl_module)

    def _swap(self, module: TrainingModule) -> None:
        parameters = [_local(p) for p in self.followed(module).values()]
        averages = [_local(a) for a in self.average.values()]
        if not averages:
            return
        copies = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, averages)
        torch._foreach_copy_(averages, copies)
        self._swapped = not self._swapped


def _local(tensor: Tensor) -> Tensor:
    """What is done elementwise to a sharded tensor is done to this rank's part."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _assign(target: Tensor, value: Tensor) -> None:
    """target <- value, which is the whole tensor also where target is sharded."""
    if value.shape != target.shape:
        raise CheckpointError(
            f"the checkpoint's EMA weights have shape {tuple(value.shape)} where the model has {tuple(target.shape)}"
        )
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
