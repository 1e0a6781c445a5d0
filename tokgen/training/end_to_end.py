"""ETT: a visual tokenizer tuned by what a language model reads through it (Wang et al. 2025, arXiv 2505.10562).

The quantized vectors z_q of a picture, projected, stand before its caption in a causal language model. The cross-entropy of
the caption has a gradient into them, and so into the codebook and the encoder; the reconstruction loss keeps the
tokenizer one that can draw (sec. 3.2, eq. 3):

    L = L_caption + alpha * L_vq,    alpha = 0.25

L_vq is the loss of `AutoencoderModule`, discriminator included. Both losses are one backward pass. The run has stages, as
in the paper: first the projector learns what the frozen tokenizer says, then all are tuned.

Not published, and therefore options: depth of the projector, learning rate of the tokenizer, whether the discriminator
goes on from the tokenizer's own training, the prompt.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tokgen.errors import CheckpointError, ConfigError
from tokgen.generators.conditions import dump_prompts, undump_prompts
from tokgen.generators.image_reader import ImageReader, VisualInput
from tokgen.generators.language_model import LanguageModel, OwnLM, load_language_model
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.pretrained import config_from_dict, load_strictly
from tokgen.quantizers.base import sum_over_ranks
from tokgen.text import TextTokenizer
from tokgen.tokenizers.base import TokenizerOutput, VisualTokenizer
from tokgen.training.autoencoder import AutoencoderLoss, AutoencoderModule
from tokgen.training.base import OptimizerCallable, decay_groups
from tokgen.training.captions import Text, vocabulary_of
from tokgen.training.checkpoint import read_checkpoint
from tokgen.training.staged import Stage, StagedSchedule, only, unchanged

log = logging.getLogger(__name__)
PARTS = ("projector", "lm", "tokenizer")


@dataclass(frozen=True)
class TuningStage(Stage):
    """A part of the run. A stage begins with fresh optimizer states.

    Attributes:
        train: which of projector, lm and tokenizer are trained; all else stays as it is, buffers included. With
            "indices" the projector is the table of embeddings.
        tokenizer_lr: further factor of the tokenizer's learning rate.
        alpha: of the tokenizer's own loss, where the tokenizer is trained; 0 tunes it by captions alone.
        freeze: names of modules of the tokenizer that stay even so, such as [quantizer].
    """

    train: tuple[str, ...] = PARTS
    tokenizer_lr: float = 1.0
    alpha: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", tuple(self.train))
        wrong = [name for name in self.train if name not in PARTS]
        if wrong or not self.train:
            raise ConfigError(f"stage {self.name}: train {list(self.train)}; expected some of {', '.join(PARTS)}")
        if self.alpha < 0 or self.tokenizer_lr < 0:
            raise ConfigError(
                f"stage {self.name}: alpha {self.alpha} and tokenizer_lr {self.tokenizer_lr} must be at least 0"
            )

    @property
    def tunes(self) -> bool:
        """Whether the tokenizer is trained."""
        return "tokenizer" in self.train


class EndToEndModule(AutoencoderModule):
    """A tokenizer with code vectors, a causal language model that reads them, and the stages in which they are trained.

    Data are image shards with captions. Validation reports `val/caption_loss` (nats an id of the caption, its end
    included) and `val/caption_accuracy` beside the measures of the reconstruction. Published are the folders `tokenizer`,
    an ordinary tokenizer; `lm`, the language model in its own format; and `projector`.

    Args:
        tokenizer: what is tuned.
        stages: in their order.
        language_model: Hub name or folder of a causal language model of transformers, or of a `llama` generator of
            condition "text"; or fields of a `LlamaConfig`, without those that tokenizer and vocabulary decide, for a
            small one that starts from nothing. With code_embedding "codebook" that one can go on to draw: its published
            folder holds the projector and the tuned codebook.
        text: how captions are read by a language model that starts from nothing.
        prompt: text between picture and caption; nothing is learned from it.
        max_text: ids of a caption at most, its end included.
        visual: "embeddings", the code vectors through a projector; or "indices", an embedding of its own for each id, the
            baseline that no gradient passes.
        projector_layers: linear maps of the projector, with GELU between.
        projector_from: folder `projector` of another run, to start from.
        loss: L_vq; its discriminator takes part in stages that train the tokenizer with an alpha above 0, and its steps
            are those of the whole run.
        discriminator_from: training checkpoint (.ckpt) of the tokenizer, whose discriminator and LeCam averages go on; None
            starts them anew.
        optimizer: of the projector, the language model and the tokenizer. disc_optimizer: the discriminator's, see
            `AutoencoderModule`.
        init_from: folder or Hub name of a published tokenizer of the same configuration to start from.
        teacher, accumulate, clip, max_bad_steps, channels_last, compile: see `AutoencoderModule`.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/caption_loss", "min")
    ema_modules: ClassVar[tuple[str, ...]] = ()  # a stage must build on the very weights that the one before has left
    export_name: ClassVar[str] = "tokenizer"
    export_beside: ClassVar[tuple[str, ...]] = ("lm", "projector")
    watched: ClassVar[tuple[str, ...]] = (*AutoencoderModule.watched, "caption")

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        stages: list[TuningStage],
        language_model: str | dict[str, Any] = "Qwen/Qwen2.5-1.5B",
        text: Text = Text(),  # noqa: B008  (frozen)
        prompt: str = "",
        max_text: int = 128,
        visual: Literal["embeddings", "indices"] = "embeddings",
        projector_layers: int = 2,
        projector_from: str | None = None,
        loss: AutoencoderLoss = AutoencoderLoss(),  # noqa: B008  (frozen)
        discriminator_from: str | None = None,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=4e-5, betas=(0.9, 0.999), weight_decay=0.0, fused=True),
        disc_optimizer: OptimizerCallable | None = None,
        init_from: str | None = None,
        teacher: str | None = None,
        accumulate: int = 1,
        clip: float | None = 1.0,
        max_bad_steps: int = 20,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        schedule = StagedSchedule(stages)
        if visual == "embeddings":
            _ = tokenizer.code_dim  # complains now if there are no vectors
        elif any(stage.tunes for stage in stages):
            raise ConfigError(
                "visual 'indices' gives the tokenizer no gradient of the captions; leave tokenizer out of every stage's train"
            )
        if not any(stage.tunes and stage.alpha for stage in stages):
            loss = replace(loss, disc_weight=0.0)
        super().__init__(
            tokenizer, schedule, loss, optimizer, disc_optimizer, accumulate=accumulate, clip=clip,
            max_bad_steps=max_bad_steps, init_from=init_from, teacher=teacher, channels_last=channels_last, compile=compile,
        )  # fmt: skip
        self.stages, self.language_model, self.text_settings = stages, language_model, text
        self.prompt, self.max_text = prompt, max_text
        self.visual, self.projector_layers, self.projector_from = visual, projector_layers, projector_from
        self.reader: ImageReader | None = None
        self._vocabulary: TextTokenizer | None = None
        self._layout: dict[str, Any] = {}
        self._read: dict[str, Tensor] = {}
        for stage in stages:
            for name in stage.freeze:
                if name not in dict(tokenizer.named_children()):
                    children = ", ".join(own for own, _ in tokenizer.named_children())
                    raise ConfigError(f"stage {stage.name}: freeze names {name!r}, which is none of {children}")
        if discriminator_from is not None:
            self._take_discriminator(discriminator_from)

    def _take_discriminator(self, path: str) -> None:
        if self.discriminator is None:
            raise ConfigError("discriminator_from is given and no stage has a discriminator; leave it out")
        state = read_checkpoint(path, mmap=True)["state_dict"]
        for name, module in (("discriminator", self.discriminator), ("lecam", self.lecam)):
            part = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            if module is not None:
                load_strictly(module, part, f"the {name} in {path}")

    @property
    def stage(self) -> TuningStage:
        """The stage that the current step belongs to."""
        return self.stages[self.schedule.at(self._step)[0]]

    def stage_at(self, step: int) -> int:
        return self.schedule.at(step)[0]

    # -- building, once the data is known -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data.kind != "images":
            raise ConfigError(f"EndToEndModule trains on image shards with captions and was given {data.kind}")
        super().setup(stage)
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy._ddp_kwargs["find_unused_parameters"] = True  # parts of other stages, heads of codes
        if isinstance(self.language_model, dict) and not self._layout:
            self._layout = self._layout_of(data.image_size)
            if stage == "fit" or self.text_settings.path is not None:  # else it comes with the checkpoint
                self._vocabulary = vocabulary_of(self.trainer, self.text_settings)

    def _layout_of(self, size: int | None) -> dict[str, Any]:
        h, w = self.tokenizer.image_size or (size, size)
        if h is None or h % self.tokenizer.factor:
            raise ConfigError(f"data.image_size is {size}; the tokenizer needs a multiple of {self.tokenizer.factor}")
        training = self.tokenizer.training
        layout = self.tokenizer.eval().encode(torch.zeros(1, 3, h, w)).layout.to_dict()
        self.tokenizer.train(training)
        return layout

    def configure_model(self) -> None:
        if self.reader is not None:
            return
        if self.device_mesh is not None:
            raise ConfigError("EndToEndModule is not sharded; use trainer.strategy ddp (train/ddp.yaml)")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())  # the same start whatever was drawn before, say for a discriminator
            lm = self._make_lm()
            visual = VisualInput.of(self.tokenizer, lm.dim, self.visual, self.projector_layers)
        if self.projector_from is not None:
            saved = VisualInput.from_pretrained(self.projector_from)
            if saved.config != visual.config:
                raise ConfigError(
                    f"projector_from {self.projector_from} is {saved.config}, this run needs {visual.config}"
                )
            visual = saved.train()
        self.reader = ImageReader(lm, visual, self.prompt, self.max_text)
        parts = {
            "projector": list(visual.parameters()),
            "lm": lm.reading_parameters(),
            "tokenizer": [p for p in self.tokenizer.parameters() if p.requires_grad],
        }
        self.trained = [[p for name in stage.train for p in parts[name]] for stage in self.stages]
        for stage, parameters in zip(self.stages, self.trained):
            frozen = {id(p) for name in stage.freeze for p in self.tokenizer.get_submodule(name).parameters()}
            parameters[:] = [p for p in parameters if id(p) not in frozen]
            if not parameters:
                raise ConfigError(f"stage {stage.name} trains nothing; let freeze leave something")
        everything = {id(p) for parameters in self.trained for p in parameters}
        for module in (self.tokenizer, self.reader):
            for p in module.parameters():
                p.requires_grad_(id(p) in everything)

    def _make_lm(self) -> LanguageModel:
        if not isinstance(self.language_model, dict):
            return load_language_model(self.language_model)
        sizes = dict(self.language_model)
        for name in ("layout", "codebook_sizes", "text_vocab", "code_dim", "code_layers", "condition"):
            if name in sizes:
                raise ConfigError(
                    f"language_model.{name} follows from tokenizer, projector and vocabulary; leave it out"
                )
        vocabulary = self._vocabulary
        named = self.text_settings.path is not None
        facts = {
            "layout": self._layout,
            "codebook_sizes": tuple(self.tokenizer.codebook_sizes),
            "text_vocab": vocabulary.vocab_size if named else self.text_settings.vocab_size,
        }
        if "codebook" in (sizes.get("code_embedding"), sizes.get("code_head")):
            facts |= {"code_dim": self.tokenizer.code_dim, "code_layers": self.projector_layers}
        config = config_from_dict(LlamaConfig, {"max_text": self.max_text, **sizes, **facts}, "language_model")
        return OwnLM(LlamaGenerator(config, vocabulary))

    def configure_optimizers(self) -> list[Optimizer]:
        own = nn.ModuleList([self.reader.visual, self.reader.lm])
        groups = decay_groups(own, self.reader.lm.heads())
        groups += [{**group, "part": "tokenizer"} for group in decay_groups(self.tokenizer)]
        optimizers = [self.make_optimizer(groups)]
        if self.discriminator is not None:
            optimizers.append(self.make_disc_optimizer(decay_groups(self.discriminator)))
        return self.adopt(*optimizers)

    def lr_factor(self, group: dict[str, Any]) -> float:
        factor = super().lr_factor(group)
        return factor * self.stage.tokenizer_lr if group.get("part") == "tokenizer" else factor

    def describe(self) -> dict[str, Any]:
        about = {"type": self.tokenizer.type_name, "config": asdict(self.tokenizer.config)}
        settings = {"stages": [asdict(s) for s in self.stages], "loss": asdict(self.terms), "clip": self.clip}
        settings |= {"language_model": self.language_model, "visual": self.visual, "prompt": self.prompt}
        return {"tokenizer": about, **settings, "accumulate": self.accumulate, "init_from": self.init_from}

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.reader.lm, OwnLM) and self.reader.lm.text is not None:
            checkpoint["tokgen"]["text"] = dump_prompts(self.reader.lm.text)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's text vocabulary: one learned again from changed shards would mean other words."""
        about = checkpoint.get("tokgen", {})
        if isinstance(self.reader.lm, OwnLM) and "text" in about:
            self.reader.lm.generator.text = undump_prompts(about["text"])
        before = about.get("config", {}).get("visual", self.visual)
        if before != self.visual:
            raise CheckpointError(
                f"the checkpoint was trained with visual {before!r}, this run has {self.visual!r}; use the settings it was "
                "trained with"
            )

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        index, within = self.schedule.at(self._step)
        stage = self.stages[index]
        if within == 0 and self.between_steps:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.optimizer.state.clear()  # of the stage before; again after a skipped first step, which changes nothing
        for part, trains in ((self.tokenizer, stage.tunes), (self.reader.lm, "lm" in stage.train)):
            if part.training != trains:
                part.train(trains)  # frozen: no dropout, no statistics that move
        frozen = unchanged([self.tokenizer.get_submodule(name) for name in stage.freeze])
        both = nn.ModuleList([self.tokenizer, self.reader])
        with frozen, only(both, self.trained[index]):
            return super().training_step(batch, batch_idx)

    def disc_takes_part(self, start: int) -> bool:
        return super().disc_takes_part(start) and self.stage.tunes and self.stage.alpha > 0

    def generator_terms(
        self, pixels: Tensor, batch: dict[str, Any], disc_speaks: bool
    ) -> tuple[TokenizerOutput, dict[str, Tensor], Tensor]:
        """As `AutoencoderModule.generator_terms`, of the caption's cross-entropy plus alpha times the tokenizer's loss."""
        stage = self.stage
        terms: dict[str, Tensor] = {}
        surrogate: Tensor | float = 0.0
        if not stage.tunes:  # no gradient, and no decoder
            with torch.autocast(self.device.type, enabled=False):  # the codes that `tokgen tokenize` gives
                tokens = self.tokenizer.encode(pixels)
            output = TokenizerOutput(pixels, tokens, codes=self._codes(tokens))
        elif stage.alpha:
            output, terms, surrogate = super().generator_terms(pixels, batch, disc_speaks)
            surrogate = stage.alpha * surrogate
        else:
            output = self.reconstruct(pixels, batch)
        reading = self.reader(output.tokens, output.codes, batch["caption"])
        terms |= {"caption": reading.loss.detach(), "caption_accuracy": reading.correct / reading.count.clamp(min=1)}
        terms["stage"] = torch.tensor(float(self.schedule.at(self._step)[0]), device=self.device)
        return output, terms, reading.loss + surrogate

    @torch.no_grad()
    def _codes(self, tokens: Any) -> Tensor | None:
        return None if self.visual == "indices" else self.tokenizer.embeddings(tokens)

    # -- validation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._read = {k: torch.zeros((), dtype=torch.float64, device=self.device) for k in ("loss", "correct", "count")}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        result = super().validation_step(batch, batch_idx)
        valid = batch.get("valid")
        valid = None if valid is None else valid.bool().to(self.device)
        reading = self.reader(result["tokens"], self._codes(result["tokens"]), batch["caption"], valid)
        self._read["loss"] += reading.loss.double() * reading.count
        self._read["correct"] += reading.correct
        self._read["count"] += reading.count
        return result

    def validation_metrics(self) -> dict[str, Tensor]:
        loss, correct, count = sum_over_ranks(torch.stack(list(self._read.values())))
        count = count.clamp(min=1)
        return super().validation_metrics() | {
            "val/caption_loss": loss / count,
            "val/caption_accuracy": correct / count,
        }

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.validation_step(batch, batch_idx)

    on_test_epoch_start = on_validation_epoch_start

    # -- export -------------------------------------------------------------------------------------------------------

    def export(self, folder: Path, write: bool) -> None:
        if not write:
            return
        lm, visual = self.reader.lm, self.reader.visual
        self.tokenizer.save_pretrained(folder)
        if isinstance(lm, OwnLM):
            lm.generator.tokenizer_fingerprint = self.tokenizer.fingerprint
            lm.generator.visual_tokenizer = f"../{self.export_name}"
            if lm.generator.needs_codebook and visual.projector is not None:
                lm.take_eye(self.tokenizer.codebook_table(), visual.projector)
        lm.save(folder.with_name(f"lm{folder.suffix}"))
        visual.save_pretrained(folder.with_name(f"projector{folder.suffix}"))
