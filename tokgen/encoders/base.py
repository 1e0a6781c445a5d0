"""The image encoder's contract: pixels to one embedding, and to features of places.

Encoders teach (ARRA's alignment, distillation) and measure (retrieval, Frechet distance). They are loaded by name, stay
frozen, and own resizing and normalisation, so that every user hands them the same pixels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokgen.errors import CheckpointError, InputError
from tokgen.pretrained import CONFIG, Registry, read_config

ENCODERS: Registry[ImageEncoder] = Registry(
    "encoder", {"contrastive": "tokgen.encoders.contrastive:ContrastiveEncoder"}
)


class ImageEncoder(nn.Module):
    """Base of all encoders. Pixels are float (B, 3, H, W) in [0, 1] or uint8, of any size.

    Attributes:
        name: how it must be quoted with figures.
        dim: width of `embed`.
    """

    name: str
    dim: int

    def embed(self, pixels: Tensor) -> Tensor:
        """One embedding per picture, (B, dim), as the network's own retrieval uses it, not normalised.

        Raises:
            InputError: other pixels than described above.
        """
        raise NotImplementedError

    def features(self, pixels: Tensor) -> Tensor:
        """Features of the places of a picture in raster order, (B, N, C). Raises InputError if it has none."""
        raise InputError(f"{self.name} gives no features of places")


def as_float(pixels: Tensor) -> Tensor:
    """Float pixels in [0, 1] of what an encoder accepts. Raises InputError."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not (pixels.is_floating_point() or pixels.dtype == torch.uint8):
        raise InputError(
            f"pixels are {tuple(pixels.shape)} {pixels.dtype}; expected (B, 3, H, W), float in [0, 1] or uint8"
        )
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def load_encoder(name: str | os.PathLike[str]) -> ImageEncoder:
    """A frozen encoder in eval mode.

    Args:
        name: "timm:NAME" (a model of timm, with its pretrained weights), "transformers:NAME_OR_FOLDER" or a folder in
            Hugging Face's layout (CLIP, SigLIP, DINOv2, ViT and models with `get_image_features`), a folder or Hub name
            that tokgen published, or "mobilenet" (ImageNet MobileNetV2, see `tokgen.losses.mobilenet`).

    Raises:
        CheckpointError: nothing there, or not an image encoder. MissingDependency: timm or transformers is missing.
    """
    text = os.fspath(name)
    kind, _, rest = text.partition(":")
    if kind in ("timm", "transformers"):
        from tokgen.encoders import published

        encoder = {"timm": published.TimmEncoder, "transformers": published.TransformersEncoder}[kind](rest)
    elif text == "mobilenet":
        from tokgen.encoders.published import MobileNetEncoder

        encoder = MobileNetEncoder()
    elif Path(text).is_dir() and (Path(text) / CONFIG).is_file() and "model_type" in read_config(Path(text)):
        from tokgen.encoders.published import TransformersEncoder

        encoder = TransformersEncoder(text)
    else:
        import tokgen

        encoder = tokgen.load(text)
        if not isinstance(encoder, ImageEncoder):
            raise CheckpointError(f"{text} holds a {type(encoder).__name__}; expected an image encoder")
    return encoder.eval().requires_grad_(False)


def resized(pixels: Tensor, side: Any, mode: str = "bicubic") -> Tensor:
    """Pixels with sides of `side` (an int or a pair), antialiased; as they are if they have that size."""
    size = (side, side) if isinstance(side, int) else tuple(side)
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return nn.functional.interpolate(pixels, size=size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
