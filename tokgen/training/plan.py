"""What a run will take, before it is paid for: `tokgen plan` runs steps of a recipe on tensors without memory.

The module of the recipe is built and takes real training steps, its own `training_step` included, on tensors that know
their shape and nothing else (`torch._subclasses.FakeTensorMode`). Every operation passes a meter, which counts the bytes
that are alive and the arithmetic (`tokgen.training.step_cost`). So no formula has to follow the models. What depends on values is taken at a steady
state: codebooks have started, every place of a clip or a batch is real, captions have their greatest length.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tokgen.data.batches import MotionSamples
from tokgen.data.shards import Manifest
from tokgen.errors import ConfigError, TokgenError
from tokgen.generators.conditions import ClassNames
from tokgen.losses.perceptual import FeatureDistance
from tokgen.pretrained import CONFIG
from tokgen.tokens import Layout
from tokgen.training import staged
from tokgen.training.base import TrainingModule
from tokgen.training.contrastive import ContrastiveModule
from tokgen.training.ema import EMA
from tokgen.training.end_to_end import EndToEndModule
from tokgen.training.generator import GeneratorModule
from tokgen.training.lightning_cli import TokgenLightningCLI, _plainly
from tokgen.training.meter import Meter
from tokgen.training.segmenter import SegmenterModule
from tokgen.training.sharding import FullyShardedStrategy
from tokgen.training.staged import StagedModule
from tokgen.training.stand_ins import VGG16Maps, Words, replaced, without_files

# ---------------------------------------------------------------------------------------------- what stands in for files


@dataclass
class Given:
    """What a recipe takes from files, for files that are not there yet; and how the run is laid out.

    Attributes:
        batch_size: in place of the recipe's.
        layout: of the codes that a generator draws, as `Layout.from_dict` takes it.
        codebook_sizes: of these codes.
        text_size: ids of a text vocabulary; of a class-conditional generator the classes; the width of text features.
        ranks: processes; None takes those that the trainer's settings name, and 8 where these say "auto".
    """

    batch_size: int | None = None
    layout: dict[str, Any] | None = None
    codebook_sizes: tuple[int, ...] | None = None
    text_size: int | None = None
    ranks: int | None = None


class _Parsed(TokgenLightningCLI):
    """The settings of a run, without the run."""

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def _is_there(name: str | None) -> bool:
    return name is not None and Path(name).is_dir() and (Path(name) / CONFIG).is_file()


class Recipe:
    """The module of a recipe on tensors without memory, and batches for it; a context, within which it can take steps.

    Args:
        files: the recipe, then files of the machine and others, as `tokgen fit -c` takes them.
        overrides: further arguments of `tokgen fit`.

    Raises:
        ConfigError: a setting that is wrong, or something that no file and no field of `given` says.
        CheckpointError: a folder without which the model's shape is unknown.
    """

    def __init__(self, files: list[str], given: Given, overrides: Iterable[str] = ()) -> None:
        self.given, self.notes = given, []
        for name in files:
            if not Path(name).is_file():
                raise ConfigError(
                    f"no configuration file at {name}; recipes are in tokenizers/, generators/ and train/"
                )
        self.cli = self._plain(
            lambda: _Parsed(["fit", "--seed_everything=false", *(w for f in files for w in ("-c", f)), *overrides])
        )
        self.settings = self.cli.config.fit
        self.data, self.arguments = self.settings.data, self.settings.model.init_args
        self.batch_size = given.batch_size or self.data.batch_size
        self.manifest = self._manifest()
        trainer = self.settings.trainer
        precision = str(trainer.precision or "32-true")
        self.half = precision.startswith("bf16")
        self._set_ranks(trainer)
        self._stack = contextlib.ExitStack()

    def _plain(self, build: Callable[[], Any]) -> Any:
        try:
            return build()
        except Exception as error:
            plain = _plainly(error)
            raise plain from None if isinstance(plain, TokgenError) else error

    def _set_ranks(self, trainer: Any) -> None:
        strategy = trainer.strategy
        name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", type(strategy).__name__)
        self.sharded = name.rpartition(".")[2] == FullyShardedStrategy.__name__
        self.copies = not self.sharded and name.startswith("ddp")
        devices = trainer.devices if isinstance(trainer.devices, int) else None
        self.ranks = self.given.ranks or 1
        if (self.sharded or self.copies) and self.given.ranks is None:
            self.ranks = (devices or 8) * trainer.num_nodes
            if devices is None:
                self.notes.append(f"{self.ranks} ranks are assumed; --ranks says how many there are")
        elif self.ranks > 1:
            self.copies = not self.sharded

    def _manifest(self) -> Manifest | None:
        folder = self.data.train if not isinstance(self.data.train, list) else self.data.train[0]
        path = Path(str(folder)) / "manifest.json"
        if path.is_file():
            return Manifest.from_json(path.read_text(encoding="utf-8"), str(path))
        self.notes.append(f"{folder} is not there: samples as the recipe describes them")
        return None

    def __enter__(self) -> Recipe:
        self._stack.enter_context(without_files())
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        try:
            with Meter():  # a new module reads its counters
                self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    # -- building -----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        absent = self._leave_out_files()
        with replaced(staged, "load_teacher", self._teacher):
            objects = self._plain(lambda: self.cli.parser.instantiate_classes(self.cli.config)).fit
        self.module: TrainingModule = objects.model
        self.ema: EMA = objects.ema
        module = self.module
        self.kind = self._kind()
        module._trainer = SimpleNamespace(
            world_size=1, optimizers=[], callbacks=[], loggers=[], is_global_zero=True, log_every_n_steps=10**9,
            sanity_checking=False, strategy=SimpleNamespace(backward=lambda loss, *_, **__: loss.backward(), root_device="cpu"),
            datamodule=SimpleNamespace(
                kind=self.kind, meta={}, sets={}, image_size=self.data.image_size, frames=self.data.frames
            ),
        )  # fmt: skip
        if absent.get("perceptual"):
            module.__dict__["perceptual"] = FeatureDistance(
                VGG16Maps(), [torch.ones(c) for c in (64, 128, 256, 512, 512)]
            )
        if absent.get("teacher"):
            module.__dict__["teacher"] = SimpleNamespace()  # the batch brings its features
        for prepare in (self._prepare_generator, self._prepare_text):
            prepare()
        module.configure_model()
        module.train()
        self.beside = {
            name: part
            for name in ("perceptual", "teacher", "teachers", "visual_tokenizer", "encoder")
            if (part := module.__dict__.get(name)) is not None and name not in module._modules
        }
        if self.kind == "codes":  # it draws pictures for the log, in the memory of the host
            self.beside.pop("visual_tokenizer", None)
        self._make_steps()

    def _leave_out_files(self) -> dict[str, bool]:
        """Take out of the settings what no file here can give, and note it."""
        arguments, absent = self.arguments, {}
        for name in ("channels_last", "compile"):  # the order of numbers in memory changes no figure
            if name in arguments:
                arguments[name] = False
        loss = arguments.get("loss")
        for owner in (loss, arguments):
            if owner is not None and owner.get("perceptual") == "lpips":
                owner["perceptual"], absent["perceptual"] = "none", True  # VGG16 has one shape
        for name in ("init_from", "discriminator_from", "projector_from", "projector"):
            source = arguments.get(name)
            if source is None or (name == "init_from" and not arguments.get("config") and "generator" in arguments):
                continue  # a generator without a configuration is the one it starts from
            arguments[name] = None  # weights change no figure
            if name == "init_from" and "generator" in arguments and not _is_there(source):
                self.notes.append(f"{source} is not there: its text vocabulary is --text_size")
        if arguments.get("teacher") is not None and not self._can_load(arguments["teacher"]):
            self.notes.append(
                f"teacher {arguments['teacher']} is not there: as if `tokgen features` had stored what it says"
            )
            arguments["teacher"], absent["teacher"] = None, True
        visual = arguments.get("visual_tokenizer")
        if visual is not None and not _is_there(visual):
            self.notes.append(f"visual_tokenizer {visual} is not there: it is not looked at")
            arguments["visual_tokenizer"] = None
        for owner, config in self._configurations():
            for name, spec in dict(config).items():
                if isinstance(spec, dict) and isinstance(spec.get("pretrained"), str):
                    self._without_weights(owner, config, name, spec["pretrained"])
        return absent

    def _configurations(self) -> Iterator[tuple[str, Any]]:
        """Configurations that may name a pretrained part."""
        tokenizer = self.arguments.get("tokenizer")
        if tokenizer is not None:
            yield "tokenizer", tokenizer.init_args.config
        if isinstance(self.arguments.get("config"), dict):
            yield "config", self.arguments["config"]

    def _without_weights(self, owner: str, config: Any, name: str, source: str) -> None:
        kind, _, rest = source.partition(":")
        if kind == "timm":
            config[name] = {"type": "timm", "name": rest}
        elif not _is_there(source):
            del config[name]  # the default is the published network
            self.notes.append(f"{source} is not there: {owner}.{name} has the published network's shape")

    def _can_load(self, source: str) -> bool:
        return _is_there(source) or source == "mobilenet"

    def _teacher(self, source: str) -> Any:
        if self._can_load(source):
            return _LOAD_TEACHER(source)
        self.notes.append(f"teacher {source} is not there: its memory and arithmetic are not counted")
        config = self.arguments["tokenizer"].init_args.config
        shape = (
            (77, config.get("target_dim", 768))
            if source.startswith("clip-text:")
            else (config.get("target_dim", 1024),)
        )
        return lambda batch: torch.zeros(len(batch["pixels"]), *shape)

    def _kind(self) -> str:
        if self.manifest is not None:
            return self.manifest.kind
        if isinstance(self.module, GeneratorModule):
            return "codes"
        tokenizer = getattr(self.module, "tokenizer", None)
        if getattr(tokenizer, "modality", "pixels") == "motion":
            return "motion"
        return "videos" if self.data.frames else "images"

    def _prepare_generator(self) -> None:
        module = self.module
        if not isinstance(module, GeneratorModule):
            return
        meta = {} if self.manifest is None else self.manifest.meta
        tokenizer = module.visual_tokenizer
        if tokenizer is not None:
            tokenizer.stamp = lambda: ""  # tensors without values have no fingerprint
        if self.kind in ("images", "videos"):
            facts = self._facts_of_pixels()
        else:
            layout = meta.get("layout") or self.given.layout
            sizes = meta.get("codebook_sizes") or self.given.codebook_sizes
            sizes = sizes or (None if tokenizer is None else tokenizer.codebook_sizes)
            if layout is None or sizes is None:
                raise ConfigError(
                    f"{self.data.train} is not there, so the codes are unknown; tokenize first, or give --layout (16x16) "
                    "and --codebook_sizes (16384)"
                )
            facts = {"layout": layout, "codebook_sizes": tuple(sizes)}
        module._facts = {**facts, "tokenizer_fingerprint": ""}
        if tokenizer is None:
            sizes = facts["codebook_sizes"]
            dim = module.sizes.get("code_dim", 8)
            module.__dict__["visual_tokenizer"] = SimpleNamespace(
                code_dim=dim, codebook_table=lambda: torch.zeros(sum(sizes), dim)
            )
        if module.alignment is not None and module.alignment.source == "shard":
            dim = (meta.get("embedding") or {}).get("dim", 768)
            module._embeddings = {"encoder": module.alignment.encoder, "name": "", "dim": dim}
        elif module.alignment is not None:
            module._embeddings = {"encoder": "", "name": "", "dim": module.encoder.dim}
        self._prepare_prompts()

    def _facts_of_pixels(self) -> dict[str, Any]:
        tokenizer, size, frames = self.module.visual_tokenizer, self.data.image_size, self.data.frames
        clip = torch.zeros(1, 3, size, size) if frames is None else torch.zeros(1, frames, 3, size, size)
        extras = {name: torch.zeros(1, frames or 1, 1, 1, dtype=torch.int32) for name in tokenizer.extras}
        layout = tokenizer.encode(clip, **extras).layout.to_dict()
        return {"layout": layout, "codebook_sizes": tuple(tokenizer.codebook_sizes)}

    def _prepare_prompts(self) -> None:
        module = self.module
        if module.init_from is not None:  # as it is: with its own prompts
            module._text = module._make_text("fit")
            return
        condition = module.sizes.get("condition", "text")
        named, size = module.text.path, self.given.text_size
        if condition == "class":
            size = size or self._missing("the classes are the captions of shards", "1000")
            module._text, module._prompt_sizes = (
                ClassNames([str(i) for i in range(size)]),
                lambda _: {"num_classes": size},
            )
        elif condition == "features":
            size = size or self._missing(f"{named} is a text encoder", "2048")
            module._text, module._prompt_sizes = Words(0, size), lambda _: {"feature_dim": size}
            self.notes.append(f"text encoder {named}: its memory and arithmetic are not counted")
        else:
            size = size or module._lm_vocabulary or (module.text.vocab_size if named is None else None)
            size = size or self._missing(f"the vocabulary {named} is not read here", "128256")
            module._text, module._prompt_sizes = Words(size), lambda _: {"text_vocab": size}

    def _missing(self, what: str, example: str) -> int:
        raise ConfigError(f"{what}: say its size, such as --text_size {example}")

    def _prepare_text(self) -> None:
        module = self.module
        if (tokenizer := getattr(module, "tokenizer", None)) is not None:
            tokenizer.stamp = lambda: ""
        if isinstance(module, ContrastiveModule):
            size = self.given.text_size or (module.text.vocab_size if module.text.path is None else None)
            module._text = Words(size or self._missing(f"the vocabulary {module.text.path} is not read here", "30522"))
        elif isinstance(module, StagedModule):
            module.tokenizer.text = Words(getattr(module.tokenizer.config, "text_vocab", 0))
        elif isinstance(module, EndToEndModule) and isinstance(module.language_model, dict):
            module._layout = module._layout_of(self.data.image_size)
            module._vocabulary = Words(module.text_settings.vocab_size)
            module.text_settings = SimpleNamespace(path=None, vocab_size=module.text_settings.vocab_size)

    # -- batches ------------------------------------------------------------------------------------------------------

    def batch(self, size: int) -> dict[str, Any]:
        """A batch as the data module gives it."""
        module, data = self.module, self.data
        captions = {"caption": ["0"] * size, "key": [""] * size}  # a class too
        if self.kind == "codes":
            layout, sizes = Layout.from_dict(module._facts["layout"]), module._facts["codebook_sizes"]
            shape = (size, layout.length) if len(sizes) == 1 else (size, layout.length, len(sizes))
            batch = {"ids": torch.zeros(shape, dtype=torch.int64), "mask": torch.ones(shape[:2], dtype=torch.bool)}
            if module.alignment is not None:
                batch["embedding"] = torch.zeros(size, module._embeddings["dim"])
            return {**batch, **captions}
        if self.kind == "motion":
            shape = (
                MotionSamples.shape if self.manifest is None else self.manifest.meta.get("shape", MotionSamples.shape)
            )
            return {"motion": torch.zeros(size, *shape), **captions}
        tokenizer = getattr(module, "tokenizer", None)
        side = data.image_size or (getattr(tokenizer, "image_size", None) or (None,))[0]
        if side is None:
            raise ConfigError("data.image_size is not given, so the size of the pictures is unknown; give it")
        if self.kind == "images":
            batch = {"pixels": torch.zeros(size, 3, side, side, dtype=torch.uint8)}
        else:
            batch = {"pixels": torch.zeros(size, data.frames, 3, side, side, dtype=torch.uint8)}
            made = (self.manifest.meta.get("trajectories") if self.manifest is not None else None) or {}
            grid = made.get("grid") or (max(side // 4, 1),) * 2
            batch["trajectories"] = torch.zeros(size, data.frames, *grid, dtype=torch.int32)
        if "teacher" in module.__dict__ and isinstance(module.teacher, SimpleNamespace):
            batch["features"] = torch.zeros(size, *self._target_shape(), dtype=torch.float16)
        return {**batch, **captions}

    def _target_shape(self) -> tuple[int, int]:
        places = self.module.tokenizer.semantic_encoder.feature_shape[0]
        return places, self.module.tokenizer.config.target_dim

    @property
    def integer(self) -> int:
        """What a number read from a tensor is taken to be: the greatest count of trajectories or kept places, less one."""
        module = self.module
        config = getattr(getattr(module, "tokenizer", None), "config", None)
        if isinstance(module, SegmenterModule):
            return module.config.queries - 1
        if hasattr(config, "keep_ratio"):
            return max(round(config.keep_ratio * module.tokenizer.side**2), 1)
        source = ((self.manifest.meta.get("trajectories") if self.manifest else None) or {}).get("source", {})
        if self.kind == "videos":
            return getattr(config, "trajectories", source.get("budget", 128)) - 1
        return 1

    # -- steps --------------------------------------------------------------------------------------------------------

    def _make_steps(self) -> None:
        """Optimizers and the average, as a trainer has them; `update` without its look at values."""
        module = self.module
        self.optimizers = module.configure_optimizers()
        module._trainer.optimizers = self.optimizers
        wrapped = [_Wrapped(o, module) for o in self.optimizers]
        module.optimizers = lambda: wrapped if len(wrapped) > 1 else wrapped[0]

        def update(optimizer: Any, *_: Any) -> tuple[bool, Tensor]:
            optimizer.zero_grad()  # a step works in place, and on less than a backward pass takes
            return True, torch.zeros(())

        module.update = update
        module.finish = lambda stepped: setattr(module, "_busy", False)
        self.ema.attach(module)

    def stages(self) -> list[tuple[str, int, int]]:
        """(name, first step, steps) of the parts of the schedule that do different work."""
        module, total = self.module, self.module.schedule.total_steps
        if hasattr(module, "stages"):
            firsts = [sum(s.steps for s in module.stages[:i]) for i in range(len(module.stages))]
            return [(stage.name, first, stage.steps) for stage, first in zip(module.stages, firsts)]
        if getattr(module, "discriminator", None) is not None:
            edges = [0, min(module.terms.disc_train_from, total), min(module.terms.disc_start, total), total]
            names = ("without the discriminator", "the discriminator warms up", "with the discriminator")
            return [(n, a, b - a) for n, a, b in zip(names, edges, edges[1:]) if b > a]
        return [("training", 0, total)]

    # -- what is known without a step ----------------------------------------------------------------------------------

    def parameters(self) -> list[tuple[str, int, int]]:
        """(name, parameters, those that are trained) of each part of each network; shared ones count where they come first."""
        seen: set[int] = set()
        rows = []
        for name, network in self.module.named_children():
            parts = list(network.named_children()) or [("", network)]
            parts.append(("", network))  # what is its own
            for part, child in parts:
                fresh = [p for p in child.parameters() if id(p) not in seen]
                seen |= {id(p) for p in fresh}
                if fresh:
                    trained = sum(p.numel() for p in fresh if p.requires_grad)
                    rows.append((f"{name}.{part}".rstrip("."), sum(p.numel() for p in fresh), trained))
        return rows

    def parameters_beside(self) -> list[tuple[str, int]]:
        """(name, parameters) of the frozen networks that are no part of what is trained."""
        counts = [
            (name, sum(t.numel() for t in tensors_of(part) if isinstance(t, nn.Parameter)))
            for name, part in self.beside.items()
        ]
        return [(name, count) for name, count in counts if count]

    def tokens(self) -> tuple[Layout, tuple[int, ...], float] | None:
        """Layout, codebook sizes and greatest number of bits of one sample's tokens; None where there are none."""
        module = self.module
        if isinstance(module, GeneratorModule):
            layout, sizes, side = Layout.from_dict(module._facts["layout"]), tuple(module._facts["codebook_sizes"]), 0.0
        elif (tokenizer := getattr(module, "tokenizer", None)) is not None:
            batch = self.batch(1)
            tokenizer.eval()
            with Meter(self.integer):
                extras = {name: batch[name] for name in tokenizer.extras if name in batch}
                tokens = tokenizer.encode(batch[tokenizer.modality], **extras)
            tokenizer.train()
            layout, sizes = tokens.layout, tuple(tokenizer.codebook_sizes)
            side = sum(v[0].numel() * math.log2(tokens.side_sizes[k]) for k, v in tokens.side.items())
        else:
            return None
        return layout, sizes, layout.length * sum(math.log2(k) for k in sizes) + side


class _Wrapped:
    """An optimizer as a training step sees it."""

    _on_before_step = _on_after_step = None

    def __init__(self, optimizer: Any, module: TrainingModule) -> None:
        self.optimizer, self.module, self.param_groups = optimizer, module, optimizer.param_groups
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad

    @contextlib.contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        self.module.toggle_optimizer(self.optimizer)
        try:
            yield
        finally:
            self.module.untoggle_optimizer(self.optimizer)


def tensors_of(parts: Any) -> list[Tensor]:
    """Parameters and buffers of networks, which may be in dicts and objects."""
    if isinstance(parts, dict):
        return [t for part in parts.values() for t in tensors_of(part)]
    return [*parts.parameters(), *parts.buffers()] if isinstance(parts, nn.Module) else []


_LOAD_TEACHER = staged.load_teacher
