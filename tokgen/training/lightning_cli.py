"""`tokgen fit|validate|test|predict`: the Lightning CLI with recipes, a stable run directory, and exact resume.

A command names what and where: `-c tokenizers/vqgan-tiny.yaml -c train/cpu.yaml`, then flags. Files and flags are the
truth of a run; a checkpoint brings weights, optimizer states and positions, never settings.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tokgen.data.datamodule import ShardsDataModule
from tokgen.errors import CheckpointError, ConfigError, TokgenError, causes
from tokgen.files import replacing, why_unwritten
from tokgen.tokens import Tokens
from tokgen.training.autoencoder import AutoencoderModule  # noqa: F401  (recipes name it without its module)
from tokgen.training.base import TrainingModule
from tokgen.training.callbacks import (
    CodebookMonitor,
    DataStats,
    ImageGrid,
    PlainProgress,
    SampleGrid,
    SignalCheckpoint,
    StepSeed,
)
from tokgen.training.checkpoint import BEST, LAST, AtomicCheckpointIO, Checkpoint, find_last, read_checkpoint
from tokgen.training.ema import EMA
from tokgen.training.end_to_end import EndToEndModule  # noqa: F401
from tokgen.training.generator import GeneratorModule  # noqa: F401
from tokgen.training.guard import Guard
from tokgen.training.staged import StagedModule  # noqa: F401

log = logging.getLogger(__name__)
SUBCOMMANDS = ("fit", "validate", "test", "predict")


class JsonLinesLogger(Logger):
    """Metrics as one JSON object per line in `metrics.jsonl` of the run, `step` first.

    Args:
        folder: the run directory.
        resumed_step: lines after it are dropped at the first write, so that the file of a resumed run reads like that
            of an uninterrupted one; -1 starts anew. A run that fails before its first step leaves the file alone.
    """

    def __init__(self, folder: str | os.PathLike[str], resumed_step: int = -1) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.jsonl"
        self.resumed_step: int | None = resumed_step

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def log_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Settings are in `config.yaml` of the run."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.resumed_step is not None:
            self._rewind(self.resumed_step, metrics if step == self.resumed_step else {})
            self.resumed_step = None
        values = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}  # NaN is no JSON
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            size, line = file.tell(), (json.dumps({"step": step, **values}) + "\n").encode()
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)  # a full disk takes a part of the line
                raise

    def _rewind(self, step: int, metrics: dict[str, float]) -> None:
        """Drop the lines after `step`, those at it that `metrics`, of the same step, repeat (a validation that was due when the
        checkpoint was written), and a last line that a kill cut short."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
                row = json.loads(line)
                if (row["step"] or 0) + (not metrics.keys().isdisjoint(row)) <= step:
                    kept.append(line + "\n")
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


class TensorBoard(TensorBoardLogger):
    """A full disk ends the thread that writes, which then raises at whatever comes next. Some minutes later a new file is begun."""

    retry_seconds = 600.0
    failed_at = -math.inf

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.failed_at < self.retry_seconds:
            return
        try:
            super().log_metrics(*args, **kwargs)
        except Exception as error:  # lightning makes a ValueError of it
            if why_unwritten(error) is not None:
                self._experiment, self.failed_at = None, time.monotonic()
            raise

    def finalize(self, status: str) -> None:
        try:
            super().finalize(status)
        except OSError as error:  # what was logged is there but for the last
            log.error("TensorBoard's file in %s lacks its end (%s)", self.log_dir, why_unwritten(error))


class _SaveConfig(SaveConfigCallback):
    """The effective settings as `config.yaml` in the run directory."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit" or self.already_saved:
            return
        if trainer.is_global_zero:
            with replacing(Path(trainer.default_root_dir) / "config.yaml") as temporary:
                self.parser.save(self.config, str(temporary), skip_none=False, overwrite=True)
        self.already_saved = True


class TokgenLightningCLI(LightningCLI):
    """Models: subclasses of `TrainingModule`. Data: `ShardsDataModule`. Callbacks of every run have keys of their own
    (`checkpoint`, `ema`, `guard`, `images`, `codebook`, `progress`, ...), so that no list in a file replaces them."""

    def __init__(self, args: Sequence[str]) -> None:
        self.recipes = _config_files(args)
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            model_class=TrainingModule,
            datamodule_class=ShardsDataModule,
            subclass_mode_model=True,
            save_config_callback=_SaveConfig,
            trainer_defaults={
                "use_distributed_sampler": False,  # shards are split among ranks by the data module
                "num_sanity_val_steps": 1,
                "check_val_every_n_epoch": None,  # then val_check_interval counts batches across epochs
                "val_check_interval": 1000,
                "log_every_n_steps": 10,
                "enable_model_summary": sys.stdout.isatty(),
                "enable_progress_bar": sys.stdout.isatty(),
                "callbacks": [DataStats(), SignalCheckpoint()],
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs=dict.fromkeys(SUBCOMMANDS, strict) | strict,
            args=list(args),
        )

    # -- arguments ----------------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of this run: config.yaml, metrics.jsonl, TensorBoard files, checkpoints/, images/, and the "
            "model in its published form. Default: runs/NAME, where NAME is the first recipe's.",
        )
        for cls, key in (
            (Checkpoint, "checkpoint"),
            (EMA, "ema"),
            (Guard, "guard"),
            (ImageGrid, "images"),
            (SampleGrid, "samples"),
            (CodebookMonitor, "codebook"),
            (PlainProgress, "progress"),
            (StepSeed, "step_seed"),
        ):
            parser.add_lightning_class_args(cls, key)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}

    # -- from settings to a run ---------------------------------------------------------------------------------------

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint that `auto`, `last` or `best` mean. Settings inside a checkpoint are not read."""
        config = self.config[self.config.subcommand]
        if config.run_dir is None:
            config.run_dir = str(Path("runs") / (Path(self.recipes[0]).stem if self.recipes else "run"))
        folder = Path(config.run_dir) / "checkpoints"
        path = config.get("ckpt_path")
        if path in ("auto", "last"):
            found = find_last(folder)
            if found is None and path == "last":
                raise CheckpointError(f"no checkpoint in {folder}; start without --ckpt_path, or with auto")
            path = None if found is None else str(found)
        elif path == "best":
            path = str(folder / BEST)
            if not Path(path).is_file():
                raise CheckpointError(f"no {BEST} in {folder}; give a run that has validated, or a path")
        elif path is not None and "://" not in str(path) and not Path(path).is_file():
            raise CheckpointError(f"no checkpoint at {path}; expected a .ckpt file, 'auto', 'last' or 'best'")
        self.ckpt_path = path

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "ckpt_path": self.ckpt_path}

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self.config_init[self.subcommand]
        run_dir = Path(config.run_dir)
        trainer = config.trainer
        kwargs["default_root_dir"] = str(run_dir)
        plugins = trainer.get("plugins")
        plugins = [] if plugins is None else plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        logger = trainer.get("logger")
        if self.subcommand != "fit":
            kwargs["logger"] = False
        elif logger is not False:
            step = -1 if self.ckpt_path is None else int(read_checkpoint(self.ckpt_path, mmap=True)["global_step"])
            json_logger = JsonLinesLogger(run_dir, step)
            if logger in (None, True):
                purge = None if self.ckpt_path is None else step + 1
                logger = TensorBoard(str(run_dir), name="", version="", purge_step=purge)
            kwargs["logger"] = [json_logger, *(logger if isinstance(logger, list) else [logger])]
        if isinstance(self.model, TrainingModule):
            if (
                trainer.get("max_steps", -1) == -1
                and trainer.get("max_epochs") is None
                and trainer.get("max_time") is None
            ):
                kwargs["max_steps"] = self.model.schedule.total_steps
            elif trainer.get("max_steps", -1) == -1 and trainer.get("max_epochs") is None:
                kwargs["max_epochs"] = -1
        _check_trainer(trainer)
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        run_dir = Path(self.trainer.default_root_dir)
        if self.ckpt_path is None and self.trainer.is_global_zero and (run_dir / "checkpoints" / LAST).is_file():
            log.warning("%s holds a run; this one replaces it. `--ckpt_path auto` would go on with it", run_dir)

    def predict(self, **kwargs: Any) -> None:
        """Tokens of the test split as `predictions.safetensors` in the run directory, one file per rank."""
        tokens = Tokens.cat(self.trainer.predict(**kwargs))
        rank = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = Path(self.trainer.default_root_dir) / f"predictions{rank}.safetensors"
        tokens.save(path)
        log.info("%d predictions: %s", len(tokens), path)


def _check_trainer(trainer: Any) -> None:
    for name, idle, mend in (("gradient_clip_val", (None, 0), "clip"), ("accumulate_grad_batches", (1,), "accumulate")):
        if trainer.get(name) not in idle:
            raise ConfigError(
                f"trainer.{name} does not work with modules that step by themselves; set model.init_args.{mend}"
            )


def _config_files(args: Sequence[str]) -> list[str]:
    """The values of -c and --config, in order."""
    files = []
    for i, arg in enumerate(args):
        if arg in ("-c", "--config") and i + 1 < len(args):
            files.append(args[i + 1])
        elif arg.startswith("--config="):
            files.append(arg.removeprefix("--config="))
    return files


def _plainly(error: Exception) -> Exception:
    """What a user should read: our own error behind a parser's, or the parser's in one line; else the error itself."""
    from jsonargparse import ArgumentError

    for cause in causes(error):
        if isinstance(cause, TokgenError):
            return cause
    if isinstance(error, ArgumentError):
        return ConfigError(_one_line(str(error)))
    if isinstance(error, MisconfigurationException):
        return ConfigError(" ".join(str(error).split()))
    return error


def _one_line(message: str) -> str:
    """jsonargparse's nested report as `model.tokenizer.config.channels: Expected a <class 'int'>. Got value: x`.

    Of a union's attempts only the first that is not about None says something.
    """
    flat = " ".join(message.split())
    first, _, tries = flat.partition(" Errors: - ")
    attempts = [a for a in re.split(r" - (?=Problem with|Expected a|Parser key)", tries) if "NoneType" not in a]
    text = f"{first} {attempts[0]}" if tries and attempts else flat
    text = re.sub(
        r" Given value type: .*|Does not validate against any of the Union subtypes Subtypes: \[.*?\] ", "", text
    )
    keys = re.findall(r'Parser key "([^"]+)"', text)
    given = re.findall(r"Problem with given class_path '([^']+)'", text)
    text = re.split(r"Parser key \"[^\"]+\": |Problem with given class_path '[^']+': ", text)[-1].strip()
    where = ".".join(keys) + (f" ({given[-1].rpartition('.')[2]})" if given else "")
    return f"{where}: {text}" if where else text


class _NoTips(logging.Filter):
    """Lightning advertises its other products in the log, and repeats a default at each save."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in ("💡", "Tip:", "litlogger", "`weights_only` was not set"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    filtered, tips = logging.getLogger("lightning.pytorch").handlers, _NoTips()
    for handler in filtered:
        handler.addFilter(tips)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*isinstance\\(treespec, LeafSpec\\).*",
            ".*in eval mode at the start of training.*",  # frozen encoders
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for handler in filtered:
                handler.removeFilter(tips)


def run(subcommand: str, args: Sequence[str]) -> TokgenLightningCLI:
    """Run `fit`, `validate`, `test` or `predict` with command-line arguments.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, a missing file; one line that names it.
        TokgenError, FileNotFoundError: whatever model or data have to say.
        SystemExit: 0 after --help or --print_config; 143 after a signal.
    """
    if subcommand not in SUBCOMMANDS:
        raise ConfigError(f"unknown command {subcommand!r}; expected one of {', '.join(SUBCOMMANDS)}")
    for name in _config_files(args):
        if not Path(name).is_file():
            raise ConfigError(f"no configuration file at {name}; recipes are in tokenizers/, generators/ and train/")
    logging.getLogger("tokgen").setLevel(logging.INFO)
    with _quiet():
        try:
            return TokgenLightningCLI([subcommand, *args])
        except Exception as error:
            plain = _plainly(error)
            if plain is error:
                raise
            raise plain from None if plain.__traceback__ else error
