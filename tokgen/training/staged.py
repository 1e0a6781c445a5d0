"""Training a semantic tokenizer in stages, one after the other in one run.

A stage trains some parts of the tokenizer and leaves all others as they are: SEED learns its queries by contrast with
captions, then the codebook, then pixels. A stage begins with a fresh optimizer state and has a learning rate of its own.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tokgen.encoders.base import load_teacher
from tokgen.errors import ConfigError
from tokgen.evaluation.retrieval import matching_rates
from tokgen.generators.conditions import dump_prompts, undump_prompts
from tokgen.losses.perceptual import build_perceptual
from tokgen.losses.reconstruction import reconstruction_loss
from tokgen.pretrained import read_weights, resolve
from tokgen.quantizers.base import gather_over_ranks, sum_over_ranks, usage_stats
from tokgen.text import SETTINGS, TextTokenizer
from tokgen.tokenizers.semantic import PIXELS, SemanticTokenizer, StageOutput, parameters_of
from tokgen.tokens import Tokens
from tokgen.training.base import OptimizerCallable, Schedule, TrainingModule, decay_groups, mutable
from tokgen.training.captions import Text, vocabulary_of


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: one of the tokenizer's `stages`; a name may come again.
        steps: how long.
        lr: factor of the optimizer's learning rates.
        warmup_steps, kind, final: see `Schedule`; they start anew in each stage.
        freeze: names of modules of the tokenizer that the stage would train but shall not; their moving averages stay too.
    """

    name: str
    steps: int
    lr: float = 1.0
    warmup_steps: int = 0
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = 0.1
    freeze: tuple[str, ...] = ()

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.steps, self.warmup_steps, self.kind, self.final)


class StagedSchedule:
    """The schedules of stages, one after the other, as one."""

    def __init__(self, stages: list[Stage]) -> None:
        if not stages:
            raise ConfigError("stages is empty; give at least one, such as {name: pixels, steps: 1000}")
        for stage in stages:
            if stage.steps < 1 or not 0 <= stage.warmup_steps <= stage.steps:
                raise ConfigError(
                    f"stage {stage.name}: steps {stage.steps} must be at least 1 and warmup_steps {stage.warmup_steps} between 0 "
                    "and steps"
                )
        self.stages = stages
        self.parts = [stage.schedule for stage in stages]
        self.total_steps = sum(stage.steps for stage in stages)

    def at(self, step: int) -> tuple[int, int]:
        """(index of the stage that update number `step` belongs to, steps of that stage before it)."""
        for i, stage in enumerate(self.stages):
            if step < stage.steps:
                return i, step
            step -= stage.steps
        return len(self.stages) - 1, self.stages[-1].steps

    def factor(self, step: int) -> float:
        i, within = self.at(step)
        return self.stages[i].lr * self.parts[i].factor(within)


class StagedModule(TrainingModule):
    """A semantic tokenizer and its stages.

    Args:
        tokenizer: what is trained.
        stages: in their order.
        teachers: networks whose outputs a stage learns from, by the name that the stage gives them (see the tokenizer);
            each as `load_encoder` takes it, or "clip-text:NAME" for the states of a CLIP text model on the captions. They
            are no part of the tokenizer.
        text: how captions are read, for tokenizers with a text side that have no vocabulary yet.
        reconstruction: "l1", "l2" or "smooth_l1", of pixels in the stage "pixels".
        perceptual, perceptual_weight, perceptual_path: added there; see `tokgen.losses.perceptual`.
        optimizer: makes the optimizer from parameter groups; norms, biases and codebooks are not decayed.
        init_from: folder or Hub name of a tokenizer of the same configuration to start from.
        accumulate, clip, max_bad_steps: see `TrainingModule`.

    Validation reports the losses of the current stage as `val/...`, and `val/score`, by which the best checkpoint is known:
    the number of stages done before, plus 1 / (1 + loss), so that the best of a later stage always wins.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/score", "max")
    ema_modules: ClassVar[tuple[str, ...]] = ()  # a stage must build on the very weights that the one before has left
    export_name: ClassVar[str] = "tokenizer"

    def __init__(
        self,
        tokenizer: SemanticTokenizer,
        stages: list[Stage],
        teachers: dict[str, str] | None = None,
        text: Text | None = None,
        reconstruction: Literal["l1", "l2", "smooth_l1"] = "l2",
        perceptual: Literal["lpips", "mobilenet", "none"] = "none",
        perceptual_weight: float = 1.0,
        perceptual_path: str | None = None,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
        init_from: str | None = None,
        accumulate: int = 1,
        clip: float | None = 1.0,
        max_bad_steps: int = 20,
    ) -> None:
        super().__init__(StagedSchedule(stages), accumulate, clip, max_bad_steps)
        self.tokenizer, self.stages, self.text_settings = tokenizer, stages, text
        self.reconstruction, self.perceptual_weight = reconstruction, perceptual_weight
        self.make_optimizer, self.init_from = optimizer, init_from
        if init_from is not None:
            folder = resolve(init_from)
            read_weights(folder, tokenizer)
            if tokenizer.text is None and (folder / SETTINGS).is_file():
                tokenizer.text = TextTokenizer.load(folder)  # a vocabulary learned anew would mean other words
        self.trained = [self._trained(stage) for stage in stages]  # parameters of each stage
        everything = {id(p) for part in self.trained for p in part}
        for p in tokenizer.parameters():
            p.requires_grad_(id(p) in everything)
        needed = {name for stage in stages for name in tokenizer.stage_needs(stage.name)} - {"caption"}
        for name in sorted(needed - set(teachers or {})):
            raise ConfigError(
                f"{tokenizer.type_name} learns from {name!r}, and teachers names none; give model.init_args.teachers.{name}, "
                "such as a folder, timm:NAME or transformers:NAME"
            )
        for name in sorted(set(teachers or {}) - needed):
            raise ConfigError(f"no stage of {tokenizer.type_name} learns from a teacher {name!r}; leave it out")
        # yardsticks: not submodules, so that neither checkpoints nor DDP carry them
        self.__dict__["teachers"] = {name: load_teacher(source) for name, source in sorted((teachers or {}).items())}
        self.__dict__["perceptual"] = build_perceptual(perceptual, perceptual_path)
        self.teacher_names = dict(teachers or {})
        self._sums: dict[str, Tensor] = {}
        self._counts: list[Tensor] = []
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def _trained(self, stage: Stage) -> list[nn.Parameter]:
        for name in stage.freeze:
            if not any(name == own for own, _ in self.tokenizer.named_children()):
                children = ", ".join(own for own, _ in self.tokenizer.named_children())
                raise ConfigError(f"stage {stage.name}: freeze names {name!r}, which is none of {children}")
        frozen = {id(p) for name in stage.freeze for p in self.tokenizer.get_submodule(name).parameters()}
        parameters = [p for p in parameters_of(self.tokenizer.stage_modules(stage.name)) if id(p) not in frozen]
        if not parameters:
            raise ConfigError(f"stage {stage.name} trains nothing; let freeze leave something")
        return parameters

    @property
    def stage_index(self) -> int:
        """The stage that the next step belongs to."""
        return self.schedule.at(self._step)[0]

    def stage_at(self, step: int) -> int:
        return self.schedule.at(step)[0]

    # -- set-up -------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        tokenizer = {"type": self.tokenizer.type_name, "config": asdict(self.tokenizer.config)}
        settings = {"stages": [asdict(s) for s in self.stages], "teachers": self.teacher_names, "clip": self.clip}
        return {"tokenizer": tokenizer, **settings, "accumulate": self.accumulate, "init_from": self.init_from}

    def setup(self, stage: str) -> None:
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy._ddp_kwargs["find_unused_parameters"] = True  # those of other stages
        data = self.trainer.datamodule
        if data.kind != "images":
            raise ConfigError(f"StagedModule trains on image shards and was given {data.kind}")
        size = self.tokenizer.image_size
        if data.image_size is not None and (data.image_size, data.image_size) != size:
            raise ConfigError(
                f"data.image_size is {data.image_size}, and the tokenizer takes pictures of {size[0]} x {size[1]}; make "
                "data.image_size and config.image_size equal"
            )
        self._check_features(data)
        if self.text_settings is not None and self.tokenizer.text is None and stage == "fit":
            self.tokenizer.text = vocabulary_of(self.trainer, self.text_settings)
        vocabulary = getattr(self.tokenizer.config, "text_vocab", 0)
        if vocabulary and self.tokenizer.text is not None and self.tokenizer.text.vocab_size > vocabulary:
            raise ConfigError(
                f"text has {self.tokenizer.text.vocab_size} ids and config.text_vocab is {vocabulary}; make them equal"
            )

    def _check_features(self, data: Any) -> None:
        made = data.meta.get("features")
        if made is None:
            return
        encoder = self.tokenizer.encoder
        if made["fingerprint"] != encoder.fingerprint:
            raise ConfigError(
                f"the features in these shards are those of {made['name']} ({made['fingerprint']}), and the tokenizer's "
                f"encoder is {encoder.name} ({encoder.fingerprint}); make them again with `tokgen features`, or give "
                "config.encoder the one that made them"
            )

    def configure_optimizers(self) -> list[Optimizer]:
        return self.adopt(self.make_optimizer(decay_groups(self.tokenizer)))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if str(self.trainer.precision) not in ("32-true", "bf16-mixed"):
            raise ConfigError(f"trainer.precision {self.trainer.precision} is not supported; use 32-true or bf16-mixed")
        self._place()

    def on_validation_start(self) -> None:
        self._place()

    on_test_start = on_validation_start

    def _place(self) -> None:
        for network in (*self.teachers.values(), self.perceptual):
            if isinstance(network, nn.Module):
                network.to(self.device)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.tokenizer.text is not None:
            checkpoint["tokgen"]["text"] = dump_prompts(self.tokenizer.text)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's text vocabulary: one learned again from changed shards would mean other words."""
        if "text" in checkpoint["tokgen"]:
            self.tokenizer.text = undump_prompts(checkpoint["tokgen"]["text"])

    # -- training -----------------------------------------------------------------------------------------------------

    def prepared(self, batch: dict[str, Any], stage: Stage) -> dict[str, Any]:
        """The batch with float pixels and with what the stage needs."""
        pixels = batch["pixels"]
        batch = {**batch, "pixels": pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels}
        for name in self.tokenizer.stage_needs(stage.name):
            if name != "caption":
                with torch.no_grad():
                    batch[name] = self.teachers[name](batch)
        return batch

    def terms(self, stage: Stage, batch: dict[str, Any]) -> tuple[StageOutput, dict[str, Tensor]]:
        """A stage's output and the weighted terms of its loss, by name."""
        output = self.tokenizer.stage_step(stage.name, batch)
        terms = dict(output.losses)
        if stage.name == PIXELS:
            reconstruction = output.reconstruction.float()
            terms["reconstruction"] = reconstruction_loss(reconstruction, batch["pixels"], self.reconstruction)
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual_weight * self.perceptual(reconstruction, batch["pixels"])
        return output, terms

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        optimizer = self.optimizers()
        index, within = self.schedule.at(self._step)
        stage = self.stages[index]
        if within == 0 and self.between_steps:
            optimizer.optimizer.state.clear()  # of the stage before; again after a skipped first step, which changes nothing
        completes = self.begin([self.tokenizer])
        logs = completes and self.should_log
        batch = self.prepared(batch, stage)
        frozen = unchanged([self.tokenizer.get_submodule(name) for name in stage.freeze])
        with frozen, only(self.tokenizer, self.trained[index]), optimizer.toggle_model(sync_grad=completes):
            output, terms = self.terms(stage, batch)
            self.manual_backward(sum(terms.values()) / self.accumulate)
        rate = self.rate(len(batch["pixels"]))
        if completes:
            good, norm = self.update(optimizer, 0, terms.values(), [self.tokenizer])
            metrics = {**terms, **output.stats, "stage": index, "grad_norm": norm, "lr": self.learning_rate()}
            metrics["skipped_steps"] = self._skipped
            if rate is not None:
                metrics["samples_per_second"] = rate
            self.finish(good)
            if logs:
                self.record_training(metrics, bar=[f"train/{name}" for name in (*terms, "usage")])
        else:
            self.finish(False)
        return {} if output.tokens is None else {"tokens": output.tokens}

    # -- validation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._sums = {}
        self._counts = [torch.zeros(k, dtype=torch.int64, device=self.device) for k in self.tokenizer.codebook_sizes]
        self._pairs = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        valid = batch.get("valid")
        if valid is not None and not bool(valid.all()):
            keep = valid.bool()
            if not bool(keep.any()):  # a rank with nothing of its own takes part in all sums, with a weight of zero
                return self._weigh(batch, 0)
            batch = {k: v[keep.to(v.device)] if isinstance(v, Tensor) else [x for x, y in zip(v, keep.tolist()) if y] for k, v in batch.items()}  # fmt: skip
        return self._weigh(batch, len(batch["pixels"]))

    def _weigh(self, batch: dict[str, Any], count: int) -> dict[str, Any]:
        """Add the batch to the sums of the validation, as `count` pictures: all or none of it."""
        stage = self.stages[self._validated_stage()]
        batch = self.prepared(batch, stage)
        output, terms = self.terms(stage, batch)
        sums = {**terms, "loss": sum(terms.values()), **output.stats}
        result: dict[str, Any] = {}
        if output.reconstruction is not None:
            pixels = self.tokenizer.finish(output.reconstruction)
            error = (pixels - batch["pixels"]).flatten(1).square().mean(1)
            sums["psnr"] = (-10 * error.clamp(min=1e-10).log10()).mean()
            result["reconstruction"] = pixels
        for name, value in {**sums, "images": torch.ones(())}.items():
            value = value.detach().double().to(self.device)
            self._sums[name] = self._sums.get(name, 0) + (value * count if count else torch.zeros_like(value))
        if output.tokens is not None and count:
            ids = output.tokens.ids[output.tokens.mask].reshape(-1, len(self._counts))
            for c, counts in enumerate(self._counts):
                counts += torch.bincount(ids[:, c], minlength=len(counts))
            result["tokens"] = output.tokens
        if output.pair is not None:
            groups = torch.tensor([zlib.crc32(c.encode()) for c in batch["caption"]], device=self.device)
            self._pairs.append(tuple(x[:count] for x in (*output.pair, groups)))
        return result if count else {}

    def _validated_stage(self) -> int:
        """The stage whose step was last done: validation at a boundary looks back."""
        return self.schedule.at(max(self._step - 1, 0))[0]

    def on_validation_epoch_end(self) -> None:
        names = sorted(self._sums)
        totals = dict(zip(names, sum_over_ranks(torch.stack([self._sums[name] for name in names]))))
        images = totals.pop("images")
        metrics = {f"val/{name}": value / images for name, value in totals.items()}
        if any(int(sum_over_ranks(c.sum())) for c in self._counts):
            stats = [usage_stats(sum_over_ranks(c)) for c in self._counts]  # over the whole set
            for name in stats[0]:
                metrics[f"val/{name}"] = torch.stack([s[name] for s in stats]).mean()
        if self._pairs:
            metrics |= {f"val/{k}": v for k, v in matching_rates(*(gather_over_ranks(torch.cat(p)) for p in zip(*self._pairs))).items()}  # fmt: skip
        index = self._validated_stage()
        metrics |= {"val/stage": index, "val/score": index + 1 / (1 + metrics["val/loss"])}
        self.report(metrics, bar=["val/loss", "val/usage", "val/psnr"])

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.validation_step(batch, batch_idx)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tokens:
        """Tokens of the batch's valid pictures."""
        tokens = self.tokenizer.encode(batch["pixels"])
        return tokens if batch.get("valid") is None else tokens[batch["valid"].bool()]

    def export(self, folder: Path, write: bool) -> None:
        if write:
            self.tokenizer.save_pretrained(folder)


class unchanged:
    """After the block, what a forward pass changes in these modules is as it was before."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def __enter__(self) -> None:
        self.kept = [(tensor, tensor.detach().clone()) for module in self.modules for tensor in mutable(module)]

    @torch.no_grad()
    def __exit__(self, *error: Any) -> None:
        for tensor, copy in self.kept:
            tensor.copy_(copy)


class only:
    """Within the block, no parameters of `module` but these get gradients."""

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        wanted = {id(p) for p in parameters}
        self.others = [p for p in module.parameters() if p.requires_grad and id(p) not in wanted]

    def __enter__(self) -> None:
        for p in self.others:
            p.requires_grad_(False)

    def __exit__(self, *error: Any) -> None:
        for p in self.others:
            p.requires_grad_(True)
