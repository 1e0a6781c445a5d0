"""One model split among all processes (FSDP2), for generators that one GPU cannot hold."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import ModelParallelStrategy

if TYPE_CHECKING:
    from tokgen.generators.base import Generator


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with all processes in the data-parallel dimension and one checkpoint file.

    Lightning's own defaults put the processes of a machine into the tensor-parallel dimension, where a model without a
    tensor-parallel plan trains on unsynchronised copies, and write a folder per checkpoint, which cannot be replaced
    whole or not at all. The module shards its blocks in `configure_model`.

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


def gathered(generator: Generator) -> Generator:
    """An unsharded copy on the CPU of a sharded generator; collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(generator, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = type(generator)(copy.deepcopy(generator.config), generator.text)
    if state:  # rank zero alone receives it
        whole.load_state_dict(state)
    for name in ("tokenizer_fingerprint", "visual_tokenizer", "generation"):
        setattr(whole, name, getattr(generator, name))
    return whole
