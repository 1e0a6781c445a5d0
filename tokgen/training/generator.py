"""Training a generator: the next id, given the caption and the ids before it; on code shards, or on pictures and clips that
are tokenized on the fly. Beside it, if asked for, ARRA's global alignment (Xie et al. 2025, arXiv 2503.07334)."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tokgen.encoders.base import load_encoder
from tokgen.errors import CheckpointError, ConfigError, TokenizerMismatch
from tokgen.generators.base import GENERATORS, Generator, GeneratorOutput
from tokgen.generators.conditions import ClassNames, Prompts, T5Features, dump_prompts, load_prompts, undump_prompts
from tokgen.generators.image_reader import VisualInput
from tokgen.importers.causal_lm import causal_lm_config, start_from_causal_lm
from tokgen.losses.alignment import AlignmentProjector
from tokgen.pretrained import config_from_dict, load_strictly, resolve
from tokgen.quantizers.base import sum_over_ranks
from tokgen.text import TextTokenizer
from tokgen.tokenizers.base import VisualTokenizer
from tokgen.tokens import Tokens
from tokgen.training.alignment import Alignment, check_projector
from tokgen.training.base import OptimizerCallable, Schedule, TrainingModule, decay_groups
from tokgen.training.captions import Text, learned_vocabulary, made_once, named_vocabulary, training_captions
from tokgen.training.sharding import built_on_rank_zero, fill_from_rank_zero, gathered

log = logging.getLogger(__name__)
BY_VECTORS = "reads codes by their vectors"
# fields of a generator's configuration that the shards and the text encoder decide
FROM_DATA = ("layout", "codebook_sizes", "text_vocab", "num_classes", "feature_dim")


class GeneratorModule(TrainingModule):
    """A generator, what reads its prompts, and the loss. Layout, codebook sizes and the tokenizer's fingerprint come from
    the shards or, for image and video shards, from `visual_tokenizer` and the data's `image_size` and `frames`.

    Args:
        generator: a name registered in `tokgen.generators` ("llama", "tokenflow-t2i").
        config: fields of its configuration, without those that the shards decide (layout, codebook sizes, text
            vocabulary, classes).
        text: how captions are read.
        visual_tokenizer: folder or Hub name of the tokenizer that made the codes. It is checked against the shards,
            decodes the sample grid, and goes into the published folder. None: no grid, and the folder names none. Generators
            that read codes by their vectors need it.
            Given image or video shards, it makes the codes of every batch, frozen and in float32: slower than code shards,
            but with the data's augmentations.
        generation: default sampling settings of the published generator (fields of `SamplingSettings`); the sample grid
            uses them.
        schedule, accumulate, clip, max_bad_steps: see `TrainingModule`.
        optimizer: makes the optimizer from parameter groups; norms and other vectors are not decayed.
        label_smoothing: of the code cross-entropy, in training.
        z_loss: weight of mean(log^2 sum exp logits).
        text_loss: weight of predicting the caption too.
        init_from: published generator to start from, with its text vocabulary. With an empty `config` it is trained on as
            it is; else a generator of that configuration takes all its weights, on another grid or window if need be
            (see `LlamaGenerator.start_from`).
        init_from_lm: text-only language model to start from, ARRA's start: Hub name or folder of a LLaMA-type model (see
            `tokgen.importers.causal_lm`). Its sizes and text vocabulary are taken; `config` may add to them.
        projector: folder `projector` of an `EndToEndModule` run, whose weights embed the codes at the start; for
            config.code_embedding "codebook". (A `lm` of such a run that is a generator has them: see init_from.)
        alignment: ARRA's global alignment as a further term; its projector is trained along, kept in checkpoints, and
            neither averaged nor published.
        compile: compile the blocks in place.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")
    ema_modules: ClassVar[tuple[str, ...]] = ("generator",)
    export_name: ClassVar[str] = "generator"

    def __init__(
        self,
        generator: str = "llama",
        config: dict[str, Any] | None = None,
        text: Text = Text(),  # noqa: B008  (frozen)
        visual_tokenizer: str | None = None,
        generation: dict[str, Any] | None = None,
        schedule: Schedule = Schedule(warmup_steps=1000),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True),
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        text_loss: float = 0.0,
        accumulate: int = 1,
        clip: float | None = 1.0,
        max_bad_steps: int = 20,
        init_from: str | None = None,
        init_from_lm: str | None = None,
        projector: str | None = None,
        alignment: Alignment | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(schedule, accumulate, clip, max_bad_steps)
        if not 0 <= label_smoothing < 1 or z_loss < 0 or text_loss < 0:
            raise ConfigError(
                f"label_smoothing {label_smoothing} must be in [0, 1), z_loss {z_loss} and text_loss {text_loss} at least 0"
            )
        self.kind, self.sizes, self.text, self.generation = generator, dict(config or {}), text, dict(generation or {})
        self.cls = GENERATORS[generator]
        self._check_sizes()
        self.init_from_lm, self._lm_vocabulary = init_from_lm, 0
        if init_from_lm is not None:
            self._take_sizes_of_lm(init_from is not None)
        self.make_optimizer = optimizer
        self.weights = {"label_smoothing": label_smoothing, "z_loss": z_loss, "text_loss": text_loss}
        self.init_from, self.compile_blocks, self.code_projector = init_from, compile, projector
        self.generator: Generator | None = None
        # decodes pictures for the log; not a submodule, so that neither checkpoints, EMA nor the strategy carry it
        self.__dict__["visual_tokenizer"] = None
        if visual_tokenizer is not None:
            import tokgen

            loaded = tokgen.load(visual_tokenizer)
            if not isinstance(loaded, VisualTokenizer):
                raise ConfigError(f"visual_tokenizer {visual_tokenizer!r} holds a {type(loaded).__name__}")
            self.__dict__["visual_tokenizer"] = loaded
        self.alignment, self.projector = alignment, None
        self.__dict__["encoder"] = None  # frozen, and like the tokenizer no submodule
        if alignment is not None and alignment.source == "online":
            with torch.random.fork_rng(devices=[]):  # so that the generator starts as it would without
                self.__dict__["encoder"] = load_encoder(alignment.encoder)
        self._embeddings: dict[str, Any] = {}  # the targets' encoder, its name in full, and their width "dim"
        self._facts: dict[str, Any] = {}
        self._sums: dict[str, Tensor] = {}

    def _check_sizes(self) -> None:
        fields = [f.name for f in dataclasses.fields(self.cls.config_class) if f.name not in FROM_DATA]
        for name in self.sizes:
            if name in FROM_DATA:
                raise ConfigError(f"config.{name} comes from the shards and the text encoder; leave it out")
            if name not in fields:
                raise ConfigError(f"config has no {name!r} for generator {self.kind!r}; expected {', '.join(fields)}")

    def _take_sizes_of_lm(self, other_start: bool) -> None:
        if other_start or self.text.path is not None:
            other = "init_from" if other_start else "text.path"
            raise ConfigError(f"init_from_lm brings weights and text vocabulary; leave out {other}")
        sizes = causal_lm_config(self.init_from_lm)
        self._lm_vocabulary = sizes.pop("text_vocab")
        fields = {f.name for f in dataclasses.fields(self.cls.config_class)}
        sizes = {k: v for k, v in sizes.items() if k in fields}  # of others this generator has one kind only
        for name, value in sizes.items():
            if self.sizes.get(name, value) != value:
                raise ConfigError(
                    f"config.{name}={self.sizes[name]!r} but {self.init_from_lm} has {value!r}; leave it out"
                )
        self.sizes |= sizes

    # -- building, once the data is known -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read the shards' facts and make the text vocabulary. Raises TokenizerMismatch, DataError, ConfigError."""
        if self._facts:
            return
        data = self.trainer.datamodule
        kind = getattr(data, "kind", "no shards")
        if kind == "codes":
            meta = data.meta
            self._facts = {
                "layout": meta["layout"],
                "codebook_sizes": tuple(meta["codebook_sizes"]),
                "tokenizer_fingerprint": meta.get("tokenizer", ""),
            }
            if self.visual_tokenizer is not None:
                self._check_tokenizer(self.visual_tokenizer)
        elif kind in ("images", "videos") and self.visual_tokenizer is not None:
            self._facts = self._facts_of_pixels(data.image_size, data.frames if kind == "videos" else None)
        else:
            raise ConfigError(
                f"GeneratorModule trains on code shards and was given {kind}; make them with `tokgen tokenize`, or give "
                "visual_tokenizer to tokenize images or clips in training"
            )
        if self.alignment is not None:
            self._embeddings = self.alignment.targets(data, self.encoder)
        self._text = self._make_text(stage)

    def _facts_of_pixels(self, size: int | None, frames: int | None) -> dict[str, Any]:
        tokenizer = self.visual_tokenizer
        if size is None or size % tokenizer.factor or (self.trainer.datamodule.kind == "videos" and frames is None):
            raise ConfigError(
                f"data.image_size is {size}; tokenizing in training needs a multiple of {tokenizer.factor}, and data.frames "
                "for clips"
            )
        clip = torch.zeros(1, 3, size, size) if frames is None else torch.zeros(1, frames, 3, size, size)
        extras = {name: torch.zeros(1, frames or 1, 1, 1, dtype=torch.int32) for name in tokenizer.extras}
        for frozen in (tokenizer, self.encoder):
            if frozen is not None:
                frozen.to(self.trainer.strategy.root_device)
        return {
            "layout": tokenizer.encode(clip, **extras).layout.to_dict(),
            "codebook_sizes": tuple(tokenizer.codebook_sizes),
            "tokenizer_fingerprint": tokenizer.fingerprint,
        }

    def _check_tokenizer(self, tokenizer: VisualTokenizer) -> None:
        sizes, fingerprint = self._facts["codebook_sizes"], self._facts["tokenizer_fingerprint"]
        if tuple(tokenizer.codebook_sizes) != sizes:
            raise TokenizerMismatch(
                f"the shards hold codes of codebooks {sizes}, visual_tokenizer has {tuple(tokenizer.codebook_sizes)}; "
                "use the tokenizer that made the shards"
            )
        if fingerprint and tokenizer.fingerprint != fingerprint:
            raise TokenizerMismatch(
                f"the shards were made by tokenizer {fingerprint}, visual_tokenizer is {tokenizer.fingerprint}; use that "
                "one, or tokenize anew"
            )

    def _make_text(self, stage: str) -> Prompts | None:
        condition = self.sizes.get("condition", "text")
        if self.init_from is not None:
            return load_prompts(resolve(self.init_from))
        if self.init_from_lm is not None:
            return TextTokenizer.from_name(self.init_from_lm, lowercase=self.text.lowercase)
        if condition == "features":
            if self.text.path is None:
                raise ConfigError("condition 'features' needs text.path, the Hub name or folder of a T5 encoder")
            return T5Features(self.text.path, self.sizes.get("max_text", 120), self.text.lowercase)
        if condition == "text" and self.text.path is not None:
            return named_vocabulary(self.text)
        if stage != "fit":
            return None  # comes with the checkpoint
        return made_once(self.trainer, self._learn_classes if condition == "class" else self._learn_vocabulary)

    def _learn_classes(self) -> ClassNames:
        names = set(training_captions(self.trainer.datamodule, self.text.max_captions, variants=False))
        # names that are numbers keep their order: "0" … "999" get the labels 0 … 999
        names = sorted(names, key=lambda name: (name.zfill(12) if name.isdecimal() else name, name))
        log.info("%d classes, the different captions of the training shards", len(names))
        return ClassNames(names)

    def _learn_vocabulary(self) -> TextTokenizer:
        return learned_vocabulary(self.trainer.datamodule, self.text)

    def _prompt_sizes(self, text: Prompts | None) -> dict[str, int]:
        """The configuration fields that follow from what reads the prompts."""
        if isinstance(text, ClassNames):
            return {"num_classes": len(text.names)}
        if isinstance(text, T5Features):
            return {"feature_dim": text.dim}
        if self.init_from_lm is not None:
            return {"text_vocab": max(self._lm_vocabulary, text.vocab_size)}
        if isinstance(text, TextTokenizer) and (self.text.path is not None or self.init_from is not None):
            return {"text_vocab": text.vocab_size}
        return {"text_vocab": self.text.vocab_size}

    def configure_model(self) -> None:
        """Build the generator, and the alignment's projector. Split among ranks, the first alone ever holds them whole."""
        if self.generator is not None:
            return
        if self.device_mesh is None:
            self.generator, self.projector = self._build()
            self._compile(self.generator)
        else:
            self._build_split()

    def _build(self) -> tuple[Generator, AlignmentProjector | None]:
        """Generator and projector with the weights that training starts from."""
        text, facts = self._text, dict(self._facts)
        fingerprint = facts.pop("tokenizer_fingerprint")
        source = None if self.init_from is None else self.cls.from_pretrained(self.init_from, text=text)
        if source is not None and not self.sizes:
            generator = source
            if (generator.layout.to_dict(), generator.codebook_sizes) != (facts["layout"], facts["codebook_sizes"]):
                raise ConfigError(
                    f"init_from {self.init_from} draws {generator.layout} of {generator.codebook_sizes}, the shards hold "
                    f"{facts['layout']} of {facts['codebook_sizes']}; give `config` to start another size from it"
                )
            generator.train()
        else:
            read = self._prompt_sizes(text) if source is None else {
                k: v for k, v in vars(source.config).items() if k in ("text_vocab", "num_classes", "feature_dim")
            }  # fmt: skip
            if "codebook" in (self.sizes.get("code_embedding"), self.sizes.get("code_head")):
                facts["code_dim"] = self.sizes.get("code_dim", self._visual_tokenizer_for(BY_VECTORS).code_dim)
            config = config_from_dict(self.cls.config_class, {**self.sizes, **facts, **read}, "config")
            generator = self.cls(config, text)
            if source is not None:
                fresh = generator.start_from(source)
                log.info("started from %s; new here: %s", self.init_from, ", ".join(fresh) or "nothing")
            if self.init_from_lm is not None:
                report = start_from_causal_lm(generator, self.init_from_lm)
                log.info("started from %s: %s", self.init_from_lm, report)
        known = source is not None and source.tokenizer_fingerprint == fingerprint  # then it came with the source
        if generator.needs_codebook and not known:
            generator.take_codebook(self._visual_tokenizer_for(BY_VECTORS).codebook_table())
        if self.code_projector is not None:
            self._start_projector(generator)
        generator.tokenizer_fingerprint, generator.generation = fingerprint, self.generation or generator.generation
        aligned = None if self.alignment is None else self.alignment.projector(generator, self._embeddings["dim"])
        return generator, aligned

    def _build_split(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh["tensor_parallel"].size() > 1:
            raise ConfigError(
                "generators have no tensor-parallel plan; use trainer.strategy "
                "tokgen.training.sharding.FullyShardedStrategy, or tensor_parallel_size 1"
            )
        whole, about = built_on_rank_zero(self.trainer, self._build, lambda parts: parts[0].constructed_with())
        with torch.device("meta"):
            self.generator = self.cls(**about, text=self._text)
            if self.alignment is not None:
                self.projector = self.alignment.projector(self.generator, self._embeddings["dim"])
        self._compile(self.generator)
        mesh = self.device_mesh["data_parallel"]
        for block in getattr(self.generator, "layers", ()):
            fully_shard(block, mesh=mesh)
        # else the embeddings stay gathered after validation, and EMA and export would find them so
        fully_shard(self.generator, mesh=mesh, reshard_after_forward=True)
        if self.projector is not None:
            fully_shard(self.projector, mesh=mesh)
        for part, source in zip((self.generator, self.projector), whole or (None, None)):
            if part is not None:
                fill_from_rank_zero(part, source, self.trainer.strategy.root_device)

    def _compile(self, generator: Generator) -> None:
        for block in getattr(generator, "layers", ()) if self.compile_blocks else ():
            block.compile()

    def _visual_tokenizer_for(self, need: str) -> VisualTokenizer:
        if self.visual_tokenizer is None:
            raise ConfigError(
                f"this generator {need}: give model.init_args.visual_tokenizer, the one that made the codes"
            )
        return self.visual_tokenizer

    def _start_projector(self, generator: Generator) -> None:
        codes = getattr(generator, "codes", None)
        if codes is None or codes.projector is None:
            raise ConfigError(
                "projector embeds codes by their vectors; set config.code_embedding: codebook, or leave it out"
            )
        saved = VisualInput.from_pretrained(self.code_projector)
        if saved.projector is None:
            raise ConfigError(f"projector {self.code_projector} embeds ids by a table of its own; it has no projector")
        load_strictly(codes.projector, saved.projector.state_dict(), f"the projector in {self.code_projector}")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        config = None if self.generator is None else dataclasses.asdict(self.generator.config)
        return {
            **super().describe(),
            "generator": {"type": self.kind, "config": config},
            "tokenizer": self._facts.get("tokenizer_fingerprint", ""),
            "alignment": None if self.alignment is None else {**dataclasses.asdict(self.alignment), **self._embeddings},
            **self.weights,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.generator.text is not None:
            checkpoint["tokgen"]["text"] = dump_prompts(self.generator.text)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's text vocabulary: one learned again from changed shards would mean other words."""
        about = checkpoint.get("tokgen", {})
        if "text" in about:
            self.generator.text = undump_prompts(about["text"])
        made_by, now = about.get("config", {}).get("tokenizer", ""), self._facts["tokenizer_fingerprint"]
        if made_by and now and made_by != now:
            raise TokenizerMismatch(
                f"the checkpoint was trained on codes of tokenizer {made_by}, the shards hold codes of {now}; use the "
                "shards it was trained on, or start without ckpt_path"
            )
        # a sharding strategy has already loaded the weights, and complained for itself
        shape = checkpoint.get("state_dict", {}).get("generator.condition.embeddings.weight")
        own = getattr(self.generator.condition, "embeddings", None)
        if shape is not None and own is not None and shape.shape != own.weight.shape:
            raise CheckpointError(
                f"the checkpoint has a text embedding of {tuple(shape.shape)}, the configuration one of "
                f"{tuple(own.weight.shape)}; use the settings it was trained with"
            )
        if "state_dict" in checkpoint:
            made_for = about.get("config", {}).get("alignment") or {}
            check_projector(self.projector, self._embeddings, checkpoint["state_dict"], made_for)

    def configure_optimizers(self) -> list[Optimizer]:
        trained = nn.ModuleList(m for m in (self.generator, self.projector) if m is not None)
        heads = [m for m in (getattr(self.generator, "output", None),) if m is not None]
        return self.adopt(self.make_optimizer(decay_groups(trained, heads)))

    # -- training -----------------------------------------------------------------------------------------------------

    def with_codes(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of image or video shards as one of code shards, of the same pixels; others as they are.

        Without autocast, so that the codes are those that `tokgen tokenize` writes.
        """
        if "pixels" not in batch:
            return batch
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            extras = {name: batch[name] for name in self.visual_tokenizer.extras if name in batch}
            tokens = self.visual_tokenizer.encode(batch["pixels"], **extras)
            made = {"ids": tokens.ids, "mask": tokens.mask}
            if self.encoder is not None:
                made["embedding"] = self.encoder.embed(batch["pixels"])
        return {**batch, **made}

    def loss(self, batch: dict[str, Any], **weights: float) -> GeneratorOutput:
        """The generator's loss on a batch of codes and, if there is alignment, that as one more term."""
        if self.alignment is None:
            return self.generator.loss(batch, **weights)
        output = self.generator.loss(batch, hidden_of=self.alignment.block, **weights)
        return self.alignment.add_to(output, batch, self.generator, self.projector)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        batch = self.with_codes(batch)

        def compute() -> tuple[Tensor, dict[str, Any]]:
            output = self.loss(batch, **self.weights)
            return output.loss, {
                **output.losses, **output.stats, "bits_per_code": output.losses["ce"].detach() / math.log(2)
            }  # fmt: skip

        bar = ("train/loss", "train/accuracy")
        self.single_step(self.generator, compute, batch["ids"].numel(), "tokens", bar)

    # -- validation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        names = ["codes", "loss", "accuracy", *(["items", "alignment_cosine"] if self.alignment is not None else [])]
        self._sums = {k: torch.zeros((), dtype=torch.float64, device=self.device) for k in names}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Cross-entropy per code without smoothing, on captions as they are; beside it the alignment per picture."""
        batch = self.with_codes(batch)
        mask = batch["mask"]
        if batch.get("valid") is not None:
            mask = mask & batch["valid"].bool()[:, None]
        codes = self.generator.counted(mask).double()
        output = self.loss({**batch, "mask": mask})
        sums = {"codes": codes, "loss": codes * output.losses["ce"], "accuracy": codes * output.stats["accuracy"]}
        if self.alignment is not None:
            items = mask.any(1).sum().double()
            sums |= {"items": items, "alignment_cosine": items * output.stats["alignment_cosine"]}
        for name, value in sums.items():
            # a batch of repeats alone has no codes, and no mean either
            self._sums[name] += torch.nan_to_num(value.double()) if name != "codes" else value

    def on_validation_epoch_end(self) -> None:
        totals = dict(zip(self._sums, sum_over_ranks(torch.stack(list(self._sums.values())))))
        codes = totals.pop("codes").clamp(min=1)
        metrics = {f"val/{k}": totals[k] / codes for k in ("loss", "accuracy")}
        metrics["val/bits_per_code"] = metrics["val/loss"] / math.log(2)
        if self.alignment is not None:
            metrics["val/alignment_cosine"] = totals["alignment_cosine"] / totals["items"].clamp(min=1)
            metrics["val/alignment"] = self.alignment.weight * (1 - metrics["val/alignment_cosine"])
        self.report(metrics, bar=["val/loss"])

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tokens:
        """Tokens drawn for the batch's captions, with seeds that count up from batch to batch."""
        return self.generator.generate(batch["caption"], generator=batch_idx * len(batch["caption"]))

    # -- export -------------------------------------------------------------------------------------------------------

    def export(self, folder: Path, write: bool) -> None:
        generator = self.generator
        if self.device_mesh is not None:
            generator = gathered(generator)
        if write:
            generator.save_pretrained(folder, tokenizer=self.visual_tokenizer)
