"""Models that commands are given by folder or name."""

from __future__ import annotations

import inspect
from typing import Any

from tokgen.errors import InputError


def best_device() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return str(accelerator) if accelerator is not None and torch.accelerator.is_available() else "cpu"


def load_model(model: str, device: str | None = None) -> Any:
    """Whatever a folder or Hub repository holds, on that device or the best there is."""
    from tokgen.hub import load

    return load(model, device=device or best_device())


def load_tokenizer(model: str, device: str | None = None) -> Any:
    """A tokenizer. Raises InputError for anything else."""
    from tokgen.tokenizers.base import VisualTokenizer

    module = load_model(model, device)
    if not isinstance(module, VisualTokenizer):
        raise InputError(f"{model} is {what_it_is(module)}; a tokenizer is needed here")
    return module


def what_it_is(module: Any) -> str:
    from tokgen.encoders.base import ImageEncoder

    return (
        f"an image encoder ({module.name})" if isinstance(module, ImageEncoder) else f"a generator ({module.type_name})"
    )


def need_pixels(tokenizer: Any, model: str, ndim: int) -> None:
    """Raises InputError unless the tokenizer takes pictures (`ndim` 4) or clips (5)."""
    if tokenizer.modality != "pixels":
        raise InputError(
            f"{model} is a {tokenizer.type_name}, whose tokens stand for {tokenizer.modality} and not for pictures; use it in "
            "Python, as its card shows"
        )
    if ndim not in tokenizer.ndims:
        takes, given = ("clips", "pictures") if ndim == 4 else ("pictures", "clips")
        raise InputError(f"{model} is a {tokenizer.type_name}, which takes {takes} and was given {given}")


def encode_options(tokenizer: Any, **given: Any) -> dict[str, Any]:
    """Those options of `encode` that were given. Raises InputError for one that the tokenizer does not take."""
    options = {name: value for name, value in given.items() if value is not None}
    takes = inspect.signature(getattr(tokenizer, "tokenize_features", tokenizer.tokenize)).parameters
    for name in options:
        if name not in takes:
            raise InputError(
                f"--{name} says nothing about a {tokenizer.type_name} tokenizer, which has no such choice; leave it out"
            )
    return options
