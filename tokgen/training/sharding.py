"""One model split among all processes (FSDP2), for generators that one GPU cannot hold."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy


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
