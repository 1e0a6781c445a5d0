"""What a plan puts in the place of files that it does not read: weights, vocabularies, networks that are fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokgen.importers.sharded import shapes_in
from tokgen.text import TextTokenizer
from tokgen.training import segmenter


class Words(TextTokenizer):
    """In the place of a text vocabulary: every caption has the greatest length."""

    vocab_size, pad_id, bos_id = 0, 0, 1

    def __init__(self, vocab_size: int, width: int | None = None) -> None:
        self.vocab_size, self.width = vocab_size, width

    def encode(self, captions: Any, max_length: int, pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        shape = (len(captions), max_length)
        rows = torch.zeros(*shape, dtype=torch.int64) if self.width is None else torch.zeros(*shape, self.width)
        return rows, torch.ones(shape, dtype=torch.bool)


class VGG16Maps(nn.Module):
    """VGG16's five maps for LPIPS (see `tokgen.losses.perceptual`), without its weights."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16

        self.layers = vgg16(weights=None).features[:30]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, layer in enumerate(self.layers, 1):
            x = nn.functional.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            if i in (4, 9, 16, 23, 30):
                maps.append(x)
        return maps


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def without_files() -> Iterator[None]:
    """Weights of folders that are there are not read, and nothing is fetched."""
    import huggingface_hub.constants
    import safetensors.torch

    def shapes_only(path: Any, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {key: torch.empty(shape) for key, shape in shapes_in([Path(path)]).items()}

    with (
        replaced(safetensors.torch, "load_file", shapes_only),
        replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        replaced(segmenter, "segmentation_loss", _segmentation_loss(segmenter.segmentation_loss)),
    ):
        yield


def _segmentation_loss(real: Callable[..., Any]) -> Callable[..., Any]:
    """The loss with the prediction of each segment where SciPy would look for it: that works on values alone."""
    from tokgen.losses import segmentation

    def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        straight = torch.arange(logits.shape[-1]).expand(len(logits), -1)
        with replaced(segmentation, "match_segments", lambda *_: straight):
            return real(logits, *args, **kwargs)

    return loss
