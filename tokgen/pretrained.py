"""Published checkpoints: a folder with `config.json` and `model.safetensors`, written whole or not at all.

`Pretrained` gives tokenizers and generators their `save_pretrained` / `from_pretrained`; `Registry` maps the `type` in
a `config.json` to a class. Nothing here unpickles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from tokgen.errors import CheckpointError, ConfigError
from tokgen.files import replacing, write_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
T = TypeVar("T")


# -- weights ----------------------------------------------------------------------------------------------------------


def write_safetensors(tensors: dict[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    # .clone() parts tensors that share memory (tied weights), which the format refuses
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file makes it private to its owner
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)


# -- registry ---------------------------------------------------------------------------------------------------------


class Registry(Generic[T]):
    """Names to classes, each imported when first asked for.

    Args:
        kind: what it holds, for messages ("tokenizer").
        homes: {name: "module:Class"} of the classes that ship with the package.
    """

    def __init__(self, kind: str, homes: dict[str, str]) -> None:
        self.kind, self.homes = kind, dict(homes)
        self.classes: dict[str, type[T]] = {}

    def register(self, name: str, cls: type[T]) -> type[T]:
        """Add a class of your own; the conformance suite covers it from then on."""
        self.classes[name] = cls
        return cls

    def names(self) -> list[str]:
        return sorted({*self.homes, *self.classes})

    def __contains__(self, name: object) -> bool:
        return name in self.homes or name in self.classes

    def __getitem__(self, name: str) -> type[T]:
        if name not in self.classes:
            if name not in self.homes:
                raise ConfigError(f"unknown {self.kind} {name!r}; expected one of {', '.join(self.names())}")
            module, _, attribute = self.homes[name].partition(":")
            self.classes[name] = getattr(importlib.import_module(module), attribute)
        return self.classes[name]


# -- configuration ----------------------------------------------------------------------------------------------------


def config_from_dict(cls: type[T], data: dict[str, Any], where: str) -> T:
    """A (nested) configuration dataclass from plain data. Raises ConfigError that names an unknown or missing key."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: a {type(data).__name__} in the place of settings; expected {', '.join(fields)}")
    for key in data:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r} for {cls.__name__}; expected {', '.join(fields)}")
    values = {}
    for key, value in data.items():
        default = fields[key].default
        values[key] = (
            tuple(value)
            if isinstance(value, list) and (isinstance(default, tuple) or default is dataclasses.MISSING)
            else value
        )
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {cls.__name__} {error}") from None


def resolve(
    path_or_repo: str | os.PathLike[str],
    revision: str | None = None,
    files: Sequence[str] = ("*.json", "*.safetensors", "*.txt"),
) -> Path:
    """A local folder as it is, or these files of a Hugging Face Hub repository. Raises CheckpointError if neither."""
    path = Path(path_or_repo)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path} has no {CONFIG}; expected a folder that `save_pretrained` wrote")
        return path
    name = str(path_or_repo)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no model folder at {name!r}; expected a folder with {CONFIG} and {WEIGHTS}, or a Hub name 'owner/name'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (RepositoryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is neither a local folder nor a reachable Hub repository ({type(error).__name__}); check the path or the connection"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{folder / CONFIG} holds a {type(data).__name__}; expected an object with type and config"
        )
    return data


def read_weights(folder: Path, module: nn.Module, without: Sequence[str] = ()) -> None:
    """Load `model.safetensors` into `module`, strictly. Raises CheckpointError that names the keys that do not fit.

    Args:
        without: names of submodules that stay as they are, whatever the file has of them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}; expected a folder that `save_pretrained` wrote")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy it again") from None
    left_out = tuple(f"{name}." for name in without)
    if left_out:
        state = {key: value for key, value in state.items() if not key.startswith(left_out)}
        state |= {key: value for key, value in module.state_dict().items() if key.startswith(left_out)}
    load_strictly(module, state, str(path))


def load_strictly(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """`load_state_dict` with one readable line for missing, unexpected or misshapen keys (CheckpointError)."""
    own = module.state_dict()
    shown = lambda keys: ", ".join(sorted(keys)[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")  # noqa: E731
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own.keys() & state.keys()
        if own[k].shape != state[k].shape
    ]
    problems = [
        f"{label}: {shown(keys)}"
        for label, keys in (("missing", missing), ("unexpected", extra), ("wrong shape", shapes))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(state)


class Pretrained(nn.Module):
    """A module with a configuration dataclass that is saved as `config.json` + `model.safetensors`.

    Subclasses set `type_name` (the name in their registry) and `config_class`, and take the configuration as their only
    required argument.
    """

    type_name: ClassVar[str]
    config_class: ClassVar[type]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def extra_config(self) -> dict[str, Any]:
        """Plain data saved in `config.json` beside `type` and `config`."""
        return {}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the folder; weights first, so that a folder with `config.json` is complete. Returns it."""
        import tokgen

        folder = Path(folder)
        write_safetensors(self.state_dict(), folder / WEIGHTS, {"format": "pt", "type": self.type_name})
        config = {
            "type": self.type_name,
            "tokgen_version": tokgen.__version__,
            "config": dataclasses.asdict(self.config),
        }
        write_json({**config, **self.extra_config()}, folder / CONFIG)
        return folder

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], revision: str | None = None, **kwargs: Any) -> Any:
        """Load from a folder or a Hub repository, in eval mode, on the CPU.

        Raises:
            CheckpointError: not there, of another type, damaged, or with weights that do not fit the configuration.
        """
        folder = resolve(path_or_repo, revision)
        data = read_config(folder)
        if data.get("type") != cls.type_name:
            raise CheckpointError(
                f"{folder} holds a {data.get('type')!r}, not a {cls.type_name!r}; use tokgen.load({str(folder)!r})"
            )
        config = config_from_dict(cls.config_class, data.get("config", {}), str(folder / CONFIG))
        module = cls.build(config, folder, data, **kwargs)
        read_weights(folder, module)
        return module.eval()

    @classmethod
    def build(cls, config: Any, folder: Path, data: dict[str, Any], **kwargs: Any) -> Any:
        """Construct the module before its weights are read; subclasses with companion files override this."""
        return cls(config, **kwargs)

    @property
    def fingerprint(self) -> str:
        """sha256 (16 hex digits) of configuration and weights; computed once and again only after a weight changed."""
        return fingerprint(self, [self.type_name, dataclasses.asdict(self.config)])


def fingerprint(module: nn.Module, about: Any) -> str:
    """sha256 (16 hex digits) of plain data and the module's weights; kept with the module until a weight changes."""
    state = module.state_dict(keep_vars=True)
    version = tuple((t.data_ptr(), t._version) for t in state.values())
    cached = module.__dict__.get("_fingerprint")
    if cached is None or cached[0] != version:
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for key in sorted(state):
            value = state[key].detach().cpu().contiguous()
            digest.update(key.encode() + str(tuple(value.shape)).encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        cached = (version, digest.hexdigest()[:16])
        module.__dict__["_fingerprint"] = cached
    return cached[1]
