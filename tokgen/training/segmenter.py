"""Training a segmenter of trajectories (TrajTok, arXiv 2602.22779) on clips whose trajectories are known."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from tokgen.errors import ConfigError
from tokgen.losses.segmentation import segmentation_loss
from tokgen.pretrained import config_from_dict
from tokgen.quantizers.base import gather_over_ranks
from tokgen.training.base import OptimizerCallable, Schedule, TrainingModule, decay_groups
from tokgen.trajectories.matching import agreement
from tokgen.trajectories.segmenter import SegmenterConfig, TrajectorySegmenter


class SegmenterModule(TrainingModule):
    """A segmenter and its loss. Batches hold "pixels" (B, T, 3, H, W) and "trajectories", int (B, T, h, w), -1 for none.

    Args:
        config: fields of `SegmenterConfig`.
        dice_weight, focal_weight, gamma: see `segmentation_loss`.
        schedule, accumulate, clip, max_bad_steps: see `TrainingModule`.
        optimizer: makes the optimizer from parameter groups; norms and other vectors are not decayed.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/iou", "max")
    ema_modules: ClassVar[tuple[str, ...]] = ("segmenter",)
    export_name: ClassVar[str] = "segmenter"

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        dice_weight: float = 2.0,
        focal_weight: float = 1.0,
        gamma: float = 2.0,
        schedule: Schedule = Schedule(final=0.01),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.02, fused=True),
        accumulate: int = 1,
        clip: float | None = 10.0,
        max_bad_steps: int = 20,
    ) -> None:
        super().__init__(schedule, accumulate, clip, max_bad_steps)
        self.config = config_from_dict(SegmenterConfig, config or {}, "config")
        self.config.check()
        self.weights = {"dice_weight": dice_weight, "focal_weight": focal_weight, "gamma": gamma}
        self.make_optimizer = optimizer
        self.segmenter: TrajectorySegmenter | None = None
        self._figures: list[Tensor] = []

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and data.kind != "videos":
            raise ConfigError(f"SegmenterModule trains on video shards with trajectories and was given {data.kind}")

    def configure_model(self) -> None:
        if self.segmenter is None:
            self.segmenter = TrajectorySegmenter(self.config)

    def configure_optimizers(self) -> list[Optimizer]:
        return self.adopt(self.make_optimizer(decay_groups(self.segmenter)))

    def describe(self) -> dict[str, Any]:
        config = asdict(self.config if self.segmenter is None else self.segmenter.config)
        return {**super().describe(), "segmenter": config, **self.weights}

    # -- training -----------------------------------------------------------------------------------------------------

    def targets(self, batch: dict[str, Any]) -> Tensor:
        """The trajectory of each place of the segmenter's grid, int64 (B, T, g, g): the one at the centre of the cell."""
        if "pixels" not in batch or "trajectories" not in batch:
            raise ConfigError(
                f"SegmenterModule needs batches with pixels and trajectories and was given {', '.join(batch)}; give the data "
                "module frames, and video shards that hold trajectories (KEY.traj.npy)"
            )
        labels, grid = batch["trajectories"], self.config.grid
        rows, columns = (
            ((torch.arange(grid, device=labels.device) + 0.5) * side / grid).long() for side in labels.shape[-2:]
        )
        return labels[:, :, rows[:, None], columns].long()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        targets = self.targets(batch)

        def compute() -> tuple[Tensor, dict[str, Any]]:
            logits = self.segmenter(batch["pixels"])  # (B, T, g, g, K)
            terms = segmentation_loss(logits.flatten(1, 3), targets.flatten(1), **self.weights)
            return terms["loss"], {**terms, "scale": self.segmenter.scale}

        self.single_step(self.segmenter, compute, len(targets))

    # -- validation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._figures = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss, and the figures of `agreement` for each clip, on the segmenter's grid."""
        targets = self.targets(batch)
        valid = batch.get("valid", torch.ones(len(targets), dtype=torch.bool))
        logits = self.segmenter(batch["pixels"])
        found, wanted = logits.argmax(-1).cpu().numpy(), targets.cpu().numpy()
        for i in valid.nonzero()[:, 0].tolist():
            loss = segmentation_loss(logits[i].flatten(0, 2)[None], targets[i].flatten()[None], **self.weights)["loss"]
            figures = agreement(found[i], wanted[i])
            self._figures.append(torch.tensor([float(loss), *figures.values()], device=self.device))

    def on_validation_epoch_end(self) -> None:
        rows = torch.stack(self._figures) if self._figures else torch.zeros(0, 4, device=self.device)
        means = gather_over_ranks(rows).mean(0)
        self._figures = []
        names = ("loss", "iou", "veq", "stq")
        self.report({f"val/{name}": value for name, value in zip(names, means)}, bar=["val/iou"])

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def export(self, folder: Path, write: bool) -> None:
        if write:
            self.segmenter.save_pretrained(folder)
