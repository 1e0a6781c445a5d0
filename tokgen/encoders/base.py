"""The image encoder's contract: pixels to one embedding, and to features of places; and that of encoders of clips.

Encoders teach (ARRA's alignment, distillation), measure (retrieval, Frechet distance), and see for semantic tokenizers.
They are loaded by name, stay frozen, and own resizing and normalisation, so that every user hands them the same pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokgen.errors import CheckpointError, ConfigError, InputError
from tokgen.pretrained import CONFIG, Pretrained, Registry, config_from_dict, fingerprint, read_config

ENCODERS: Registry[ImageEncoder] = Registry(
    "encoder",
    {
        "clip": "tokgen.encoders.clip:ClipViT",
        "contrastive": "tokgen.encoders.contrastive:ContrastiveEncoder",
        "eva": "tokgen.encoders.eva:EvaViT",
    },
)
VIDEO_ENCODERS: Registry[VideoEncoder] = Registry(
    "video encoder",
    {
        "trajvit": "tokgen.encoders.trajvit:TrajViT",
        "video-contrastive": "tokgen.encoders.contrastive:VideoContrastiveEncoder",
        "video-vit": "tokgen.encoders.video_vit:VideoViT",
    },
)


class ImageEncoder(nn.Module):
    """Base of all encoders. Pixels are float (B, 3, H, W) in [0, 1] or uint8, of any size.

    Attributes:
        name: how it must be quoted with figures.
        dim: width of `embed`.
        feature_shape: (N, C) of `features`; an encoder without features of places has none.
    """

    name: str
    dim: int
    feature_shape: tuple[int, int]

    def embed(self, pixels: Tensor) -> Tensor:
        """One embedding per picture, (B, dim), as the network's own retrieval uses it, not normalised.

        Raises:
            InputError: other pixels than described above.
        """
        raise NotImplementedError

    def features(self, pixels: Tensor) -> Tensor:
        """Features of the places of a picture in raster order, (B, N, C); an encoder may put a class token before them.

        Raises InputError if it has none.
        """
        raise InputError(f"{self.name} gives no features of places")

    def spec(self) -> dict[str, Any]:
        """Plain data from which `build_encoder` makes this network again, without its weights.

        Raises:
            InputError: it cannot be built without files of its own.
        """
        raise InputError(f"{self.name} cannot be kept inside a tokenizer; use one of timm, transformers or tokgen")

    @property
    def fingerprint(self) -> str:
        """sha256 (16 hex digits) of what it is and its weights; equal for equal networks, wherever they came from."""
        return fingerprint(self, self.spec())


@dataclass(frozen=True)
class EncodedClip:
    """What an encoder makes of clips.

    Attributes:
        pooled: one vector per clip, (B, D).
        tokens: (B, N, D), zero where there is none.
        mask: bool (B, N), True where a token is real.
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor


class ClipEncoder(nn.Module):
    """Base of encoders of clips. Pixels are float (B, T, 3, H, W) in [0, 1] or uint8, of any size.

    Attributes:
        name: how it must be quoted with figures.
        dim: width of `embed`.
        extras: further entries of a batch of data that it takes, in this order or by these names.
    """

    name: str
    dim: int
    extras: tuple[str, ...] = ()

    def forward(self, pixels: Tensor, *extras: Tensor, **named: Tensor) -> EncodedClip:
        """Pooled vector and tokens of clips.

        Raises:
            InputError: other pixels or extras than described.
        """
        raise NotImplementedError

    def embed(self, pixels: Tensor, *extras: Tensor, **named: Tensor) -> Tensor:
        """One embedding per clip, (B, dim), of unit length."""
        return nn.functional.normalize(self(pixels, *extras, **named).pooled.float(), dim=-1)

    def features(self, pixels: Tensor, *extras: Tensor, **named: Tensor) -> tuple[Tensor, Tensor]:
        """The clips' tokens (B, N, C), and bool (B, N) of the real ones; the others are zero."""
        encoded = self(pixels, *extras, **named)
        return encoded.tokens, encoded.mask


class VideoEncoder(ClipEncoder, Pretrained):
    """Base of those of this package."""


def clip_frames(pixels: Tensor, side: Any) -> Tensor:
    """Float clips (B, T, 3, side, side) in [0, 1] of what a video encoder accepts. Raises InputError."""
    known = pixels.is_floating_point() or pixels.dtype == torch.uint8
    if pixels.ndim != 5 or pixels.shape[2] != 3 or 0 in pixels.shape or not known:
        raise InputError(
            f"clips are {tuple(pixels.shape)} {pixels.dtype}; expected (B, T, 3, H, W), float in [0, 1] or uint8"
        )
    return resized(as_float(pixels.flatten(0, 1)), side).unflatten(0, pixels.shape[:2])


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


def load_clip_encoder(name: str | os.PathLike[str]) -> ClipEncoder:
    """A frozen encoder of clips in eval mode.

    Args:
        name: "transformers:NAME_OR_FOLDER" or a folder in Hugging Face's layout (VideoMAE, ViViT, TimeSformer), or a folder or Hub
            name that tokgen published.

    Raises:
        CheckpointError: nothing there, or not an encoder of clips. MissingDependency: transformers is missing.
    """
    text = os.fspath(name)
    kind, _, rest = text.partition(":")
    if kind == "transformers" or (
        Path(text).is_dir() and (Path(text) / CONFIG).is_file() and "model_type" in read_config(Path(text))
    ):
        from tokgen.encoders.published import TransformersClipEncoder

        encoder: Any = TransformersClipEncoder(rest if kind == "transformers" else text)
    else:
        import tokgen

        encoder = tokgen.load(text)
        if not isinstance(encoder, ClipEncoder):
            raise CheckpointError(f"{text} holds a {type(encoder).__name__}; expected an encoder of clips")
    return encoder.eval().requires_grad_(False)


def build_encoder(spec: dict[str, Any]) -> ImageEncoder:
    """The frozen encoder of a configuration, in eval mode.

    Args:
        spec: {"pretrained": what `load_encoder` takes}, or what `ImageEncoder.spec` gave, whose weights are random until
            they are loaded: {"type": "eva", "config": {...}}, {"type": "timm", "name": ...}, {"type": "transformers", ...}.

    Raises:
        ConfigError: no such type or option. CheckpointError, MissingDependency: as `load_encoder`.
    """
    spec = dict(spec)
    if "pretrained" in spec:
        if len(spec) > 1:
            raise ConfigError(f"encoder {spec}: 'pretrained' stands alone; its configuration comes with the weights")
        return load_encoder(spec["pretrained"])
    kind = spec.pop("type", None)
    if kind in ("timm", "transformers"):
        from tokgen.encoders import published

        encoder = {"timm": published.TimmEncoder, "transformers": published.TransformersEncoder}[kind].from_spec(spec)
    elif kind in ENCODERS:
        cls = ENCODERS[kind]
        encoder = cls(config_from_dict(cls.config_class, spec.get("config", {}), f"encoder {kind!r}"))
    else:
        raise ConfigError(
            f"encoder {spec} is of type {kind!r}; expected 'pretrained', or type timm, transformers, "
            f"{', '.join(ENCODERS.names())}"
        )
    return encoder.eval().requires_grad_(False)


def load_teacher(name: str) -> Callable[[dict[str, Any]], Tensor]:
    """What a stage of training learns from: a function of a batch with "pixels" (B, 3, H, W) and "caption".

    Args:
        name: what `load_encoder` takes, for the embeddings (B, D) of the pictures; "clip-text:NAME_OR_FOLDER" for the last
            states (B, 77, C) of a CLIP text model of transformers on the captions.
    """
    if name.startswith("clip-text:"):
        from tokgen.encoders.published import ClipTextStates

        return ClipTextStates(name.removeprefix("clip-text:"))
    return PictureEmbeddings(load_encoder(name))


class PictureEmbeddings(nn.Module):
    """An encoder's embeddings of a batch's pictures."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @torch.no_grad()
    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.encoder.embed(batch["pixels"])


def config_spec(encoder: Pretrained) -> dict[str, Any]:
    """`spec` of an encoder of this package."""
    import dataclasses

    return {"type": encoder.type_name, "config": dataclasses.asdict(encoder.config)}


def resized(pixels: Tensor, side: Any, mode: str = "bicubic") -> Tensor:
    """Pixels with sides of `side` (an int or a pair), antialiased; as they are if they have that size."""
    size = (side, side) if isinstance(side, int) else tuple(side)
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return nn.functional.interpolate(pixels, size=size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
