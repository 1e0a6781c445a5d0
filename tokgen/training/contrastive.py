"""Training an image-text contrastive model: a teacher and feature space of one's own (CLIP, arXiv 2103.00020); and a video-text
one, by which TrajViT learns (arXiv 2505.23617)."""

from __future__ import annotations

import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from tokgen.encoders.contrastive import ContrastiveEncoder, VideoContrastiveEncoder
from tokgen.errors import ConfigError
from tokgen.evaluation.retrieval import matching_rates
from tokgen.generators.conditions import dump_prompts, undump_prompts
from tokgen.losses.contrastive import contrastive_loss
from tokgen.pretrained import config_from_dict
from tokgen.quantizers.base import gather_over_ranks
from tokgen.text import TextTokenizer
from tokgen.training.base import OptimizerCallable, Schedule, TrainingModule, decay_groups
from tokgen.training.captions import Text, vocabulary_of


class ContrastiveModule(TrainingModule):
    """A picture tower, a text tower and their text vocabulary, trained on image shards with captions; or a tower of clips, on video
    shards with captions. Captions that are equal are no negatives of each other.

    Args:
        config: fields of `ContrastiveConfig`, or with a `tower` those of `VideoContrastiveConfig`; without `text_vocab`, which
            follows from `text`. Data for a tower are clips (`frames`), and for TrajViT with trajectories.
        text: the vocabulary, learned from the training captions or taken from a folder or Hub name.
        noise: standard deviation of Gaussian noise on training pixels in [0, 1], drawn up to this much for each picture or clip,
            so that the space does not hang on fine detail that a tokenizer loses.
        schedule, accumulate, clip, max_bad_steps: see `TrainingModule`. `accumulate` averages losses of small batches and
            does not make more negatives.
        optimizer: makes the optimizer from parameter groups; norms and other vectors are not decayed.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/image_to_text", "max")
    ema_modules: ClassVar[tuple[str, ...]] = ("encoder",)
    export_name: ClassVar[str] = "encoder"

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        text: Text = Text(),  # noqa: B008  (frozen)
        noise: float = 0.0,
        schedule: Schedule = Schedule(warmup_steps=1000),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=5e-4, betas=(0.9, 0.98), weight_decay=0.2, fused=True),
        accumulate: int = 1,
        clip: float | None = 1.0,
        max_bad_steps: int = 20,
    ) -> None:
        super().__init__(schedule, accumulate, clip, max_bad_steps)
        if "text_vocab" in (config or {}):
            raise ConfigError("config.text_vocab comes from text; leave it out")
        self.sizes, self.text, self.noise, self.make_optimizer = dict(config or {}), text, noise, optimizer
        self.encoder: ContrastiveEncoder | VideoContrastiveEncoder | None = None
        self._text: TextTokenizer | None = None
        self._embedded: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def of_clips(self) -> bool:
        """Whether clips are learned and not pictures."""
        return "tower" in self.sizes

    # -- building, once the data is known -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self.encoder is not None or self._text is not None:
            return
        data = self.trainer.datamodule
        if data.kind != ("videos" if self.of_clips else "images"):
            wanted = "video shards, as config.tower says," if self.of_clips else "image shards"
            raise ConfigError(f"ContrastiveModule trains on {wanted} with captions and was given {data.kind}")
        if self.text.path is not None or stage == "fit":
            self._text = vocabulary_of(self.trainer, self.text)

    def configure_model(self) -> None:
        if self.encoder is None:
            vocabulary = self.text.vocab_size if self.text.path is None else self._text.vocab_size
            cls = VideoContrastiveEncoder if self.of_clips else ContrastiveEncoder
            config = config_from_dict(cls.config_class, {**self.sizes, "text_vocab": vocabulary}, "config")
            self.encoder = cls(config, self._text)

    def configure_optimizers(self) -> list[Optimizer]:
        return self.adopt(self.make_optimizer(decay_groups(self.encoder)))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        config = None if self.encoder is None else asdict(self.encoder.config)
        return {**super().describe(), "encoder": config, "noise": self.noise}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["tokgen"]["text"] = dump_prompts(self.encoder.text)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's text vocabulary: one learned again from changed shards would mean other words."""
        self.encoder.text = undump_prompts(checkpoint["tokgen"]["text"])

    # -- training -----------------------------------------------------------------------------------------------------

    def embed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures or clips (B, D), captions (B, D), and a number (B,) for each caption, equal where captions are."""
        extras = self.extras(batch)
        pixels = batch["pixels"]
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        if self.training and self.noise:
            strength = self.noise * torch.rand(len(pixels), *[1] * (pixels.ndim - 1), device=pixels.device)
            pixels = (pixels + strength * torch.randn_like(pixels)).clamp(0, 1)
        groups = torch.tensor([zlib.crc32(c.encode()) for c in batch["caption"]], device=pixels.device)
        return self.encoder.embed(pixels, **extras), self.encoder.encode_text(batch["caption"]), groups

    def extras(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What a tower of clips takes beside pixels. Raises ConfigError if the batch does not have it, or no pixels."""
        names = self.encoder.extras if self.of_clips else ()
        if missing := [name for name in ("pixels", *names) if name not in batch]:
            raise ConfigError(
                f"{type(self.encoder).__name__} learns from batches with {' and '.join(missing)}, which these do not have; "
                "clips come with data.frames, trajectories with shards that `tokgen trajectories` made"
            )
        return {name: batch[name] for name in names}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        def compute() -> tuple[Tensor, dict[str, Any]]:
            images, texts, groups = self.embed(batch)
            return contrastive_loss(images, texts, self.encoder.scale, groups), {"scale": self.encoder.scale}

        self.single_step(self.encoder, compute, len(batch["caption"]))

    # -- validation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._embedded = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        rows = self.embed(batch)
        valid = batch.get("valid")
        keep = slice(None) if valid is None else valid.bool().to(rows[0].device)
        self._embedded.append(tuple(r[keep] for r in rows))

    def on_validation_epoch_end(self) -> None:
        """How often the nearest caption of a picture is its own, and the other way round, among all of the split."""
        embedded = [gather_over_ranks(torch.cat(parts)) for parts in zip(*self._embedded)]
        self._embedded = []
        rates = matching_rates(*embedded)
        self.report({f"val/{name}": value for name, value in rates.items()}, bar=["val/image_to_text"])

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def export(self, folder: Path, write: bool) -> None:
        if write:
            self.encoder.save_pretrained(folder)
