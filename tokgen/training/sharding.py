"""One model split among all processes (FSDP2), for generators that one GPU cannot hold."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tokgen.errors import ConfigError
from tokgen.training.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from tokgen.generators.base import Generator

T = TypeVar("T")


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with all processes in the data-parallel dimension and one checkpoint file.

    Lightning's own defaults put the processes of a machine into the tensor-parallel dimension, where a model without a
    tensor-parallel plan trains on unsynchronised copies, and write a folder per checkpoint, which cannot be replaced
    whole or not at all. The module shards its blocks in `configure_model`.

    In the file an optimizer's parameters are numbered as the optimizer numbers them, as one process and DDP do, so that each
    can go on from it. Lightning numbers them as the module does, which with groups of another order gives the moments of
    one parameter to another.

    Args:
        timeout_minutes: after which a collective that a lost process does not join ends the run.
    """

    def __init__(self, timeout_minutes: float = 30.0) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timedelta(minutes=timeout_minutes)
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Raises ConfigError for a module that does not shard itself: each rank would train a copy of its own."""
        module = self.lightning_module
        if not any(isinstance(p, DTensor) for p in module.parameters()):
            raise ConfigError(f"{type(module).__name__} is not sharded; use trainer.strategy ddp (train/ddp.yaml)")
        super().setup(trainer)

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """The whole state, on rank zero; empty elsewhere."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        if not state:
            return state
        names = [name for group in state["param_groups"] for name in group["params"]]
        return _renamed(state, {name: number for number, name in enumerate(names)})

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load weights and optimizer states, of whatever strategy, and return the rest. Nothing is unpickled."""
        checkpoint = read_checkpoint(self.broadcast(checkpoint_path), mmap=True)
        strict = self.lightning_module.strict_loading
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        of_parameters = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            names = {number: of_parameters[id(p)] for number, p in enumerate(parameters)}
            set_optimizer_state_dict(self.model, optimizer, _renamed(state, names), options=options)
        return checkpoint


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state whose parameters go by other names."""
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[p]: values for p, values in state["state"].items()}, "param_groups": groups}


def built_on_rank_zero(trainer: Any, build: Callable[[], T], describe: Callable[[T], Any]) -> tuple[T | None, Any]:
    """What `build` gives, on rank zero alone, and plain data about it on every rank; collective.

    Raises:
        ConfigError: on the other ranks, where `build` or `describe` raised an error on rank zero: none waits for it.
    """
    made, about, problem = None, None, ""
    if trainer.is_global_zero:
        try:
            made = build()
            about = describe(made)
        except Exception as error:
            trainer.strategy.broadcast((None, f"{type(error).__name__}: {error}"))
            raise
    about, problem = trainer.strategy.broadcast((about, problem))
    if problem:
        raise ConfigError(f"rank 0 could not build the model: {problem}")
    return made, about


def fill_from_rank_zero(split: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    """Give a split module without memory the weights and tables of the whole one, which rank zero alone has; collective.

    So the memory of a machine holds one whole copy at the most, and not one for each of its processes.
    """
    split.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(split, {} if whole is None else whole.state_dict(), options=options)
    saved = split.state_dict().keys()
    for name, table in split.named_buffers():
        if name not in saved:  # computed when a module is built
            if whole is not None:
                table.copy_(whole.get_buffer(name))
            torch.distributed.broadcast(table, 0)


def gathered(generator: Generator) -> Generator | None:
    """An unsharded copy on the CPU of a sharded generator, on rank zero, and None elsewhere; collective."""
    state = get_model_state_dict(generator, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:  # rank zero alone receives it
        return None
    whole = type(generator)(**copy.deepcopy(generator.constructed_with()), text=generator.text)
    whole.load_state_dict(state)
    return whole
