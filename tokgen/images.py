"""Pictures on disk: read for encoding, write reconstructions, samples and grids with their settings inside."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokgen.errors import InputError
from tokgen.files import replacing


def read_image(path: str | os.PathLike[str], size: int | None = None, multiple_of: int = 1) -> Tensor:
    """A JPEG, PNG or WebP file as uint8 (3, H, W).

    Args:
        size: short side after resizing, then centre crop to size x size; None keeps the size.
        multiple_of: without `size`, height and width are cropped (centred) to multiples of this.

    Raises:
        InputError: no such file, not an image, or smaller than `multiple_of`.
    """
    from torchvision.transforms.v2 import functional as TF

    from tokgen.data.decode import BadSample, decode_image

    path = Path(path)
    if not path.is_file():
        raise InputError(f"no image at {path}; expected a .jpg, .png or .webp file")
    try:
        image = decode_image(path.read_bytes())
    except BadSample as error:
        raise InputError(f"{path} cannot be read as an image ({error}); expected a .jpg, .png or .webp file") from None
    if size is not None:
        image = TF.center_crop(TF.resize(image, [size], antialias=True), [size, size])
    h, w = (n // multiple_of * multiple_of for n in image.shape[1:])
    if not h or not w:
        raise InputError(
            f"{path} is {image.shape[1]} x {image.shape[2]}; at least {multiple_of} x {multiple_of} is needed"
        )
    return TF.center_crop(image, [h, w])


def to_uint8(pixels: Tensor) -> Tensor:
    """Float pixels in [0, 1] rounded to uint8; uint8 passes through."""
    return pixels if pixels.dtype == torch.uint8 else (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)


def image_grid(pixels: Tensor | Sequence[Tensor], columns: int | None = None, gap: int = 2) -> Tensor:
    """Pictures (N, 3, H, W) side by side on white, uint8 (3, rows*(H+gap)+gap, columns*(W+gap)+gap)."""
    pixels = to_uint8(torch.stack(list(pixels)).cpu())
    n, _, h, w = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    grid = torch.full((3, math.ceil(n / columns) * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        grid[:, y : y + h, x : x + w] = picture
    return grid


def write_png(pixels: Tensor, path: str | os.PathLike[str], settings: dict[str, Any] | None = None) -> Path:
    """Write one picture (3, H, W) as PNG, whole or not at all; `settings` go into its text chunk "tokgen" as JSON."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"pictures are written as PNG; give a name that ends in .png instead of {path.name!r}")
    info = PngInfo()
    if settings is not None:
        info.add_itxt("tokgen", json.dumps(settings, ensure_ascii=False))
    with replacing(path) as temporary:
        Image.fromarray(to_uint8(pixels).permute(1, 2, 0).cpu().numpy()).save(temporary, format="PNG", pnginfo=info)
    return path


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that `write_png` stored in a PNG. Raises InputError if there are none."""
    from PIL import Image

    with Image.open(path) as image:
        text = getattr(image, "text", {}).get("tokgen")
    if text is None:
        raise InputError(f"{path} carries no tokgen settings; only pictures that `tokgen sample` wrote do")
    return json.loads(text)
