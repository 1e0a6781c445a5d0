"""From the bytes of a shard member to values, through a whitelist.

Only the extensions in `EXTENSIONS` are ever looked at. Nothing is unpickled or decompressed by file name; sizes are
checked before memory is taken: bytes of a member, pixels of an image (from its header), size and depth of JSON.
"""

from __future__ import annotations

import ast
import io
import json
import struct
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mov", "mkv")
EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, "txt", "json", "npy", "cls"))

MAX_MEMBER_BYTES = 64 << 20
MAX_PIXELS = 1 << 26  # 67 million: above any camera's picture that is worth training on, 200 MB decoded
MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 32


class BadSample(ValueError):
    """A member that cannot be used. `reason` is a short fixed phrase, to count by."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


# --------------------------------------------------------------------------------------------------------------- images


def _header(data: bytes, max_pixels: int) -> tuple[str, bool, bool]:
    """(format, has transparency, 16 bits per channel) from an image's header; checks its size."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                width, height = image.size
                transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
                kind = image.format
        except Image.DecompressionBombError as error:
            raise BadSample("too many pixels", str(error)) from error
        except Exception as error:  # PIL raises many types for broken headers
            raise BadSample("unreadable image", str(error)) from error
    if width * height > max_pixels:
        raise BadSample("too many pixels", f"{width}x{height}, at most {max_pixels} allowed")
    if width < 1 or height < 1:
        raise BadSample("unreadable image", f"{width}x{height}")
    deep = kind == "PNG" and data[24:25] == b"\x10"  # IHDR bit depth; PIL hides it for colour images
    return kind, transparent, deep


def _on_white(x: Tensor, scale: int) -> Tensor:
    """(4, H, W) integers in [0, scale] with alpha last -> (3, H, W), composited on white."""
    x = x.to(torch.int64 if scale > 255 else torch.int32)
    color, alpha = x[:3], x[3:]
    return (color * alpha + scale * (scale - alpha) + scale // 2) // scale


def _pil_rgb(data: bytes) -> Tensor:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            image.alpha_composite(rgba)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # (3, H, W)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """JPEG, PNG or WebP bytes -> uint8 (3, H, W) in [0, 255].

    Gray, palette, CMYK and 16-bit images become 8-bit RGB; transparency is composited on white; EXIF orientation is
    ignored; of an animation, the first frame.

    Raises:
        BadSample: "unreadable image" or "too many pixels" (found in the header, before anything is decoded).
    """
    import torchvision.io as tvio

    kind, transparent, deep = _header(data, max_pixels)
    mode = tvio.ImageReadMode.RGB_ALPHA if transparent else tvio.ImageReadMode.RGB
    try:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if kind == "JPEG":
            return tvio.decode_jpeg(buffer, mode=tvio.ImageReadMode.RGB)
        x = tvio.decode_png(buffer, mode=mode) if kind == "PNG" else tvio.decode_webp(buffer, mode=mode)
    except (RuntimeError, AttributeError):  # a torchvision without this format, or a file only PIL can read
        try:
            return _pil_rgb(data)
        except Exception as error:
            raise BadSample("unreadable image", str(error)) from error
    if deep and x.dtype == torch.uint16:
        x = x.to(torch.int64)  # (C, H, W), C = 3 or 4
        x = _on_white(x, 65535) if len(x) == 4 else x
        return ((x * 255 + 32767) // 65535).to(torch.uint8)
    return _on_white(x, 255).to(torch.uint8) if len(x) == 4 else x


# ------------------------------------------------------------------------------------------------- text, JSON and arrays


def decode_text(data: bytes) -> str:
    """UTF-8 (with or without byte order mark), stripped. Raises BadSample("text is not UTF-8")."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("text is not UTF-8", str(error)) from error


def decode_json(data: bytes) -> dict[str, Any]:
    """A JSON object of at most 1 MiB and 32 levels. Raises BadSample("bad JSON")."""
    if len(data) > MAX_JSON_BYTES:
        raise BadSample("bad JSON", f"{len(data)} bytes, at most {MAX_JSON_BYTES}")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSample("bad JSON", str(error)) from error
    level, depth = [value], 0
    while level:
        if depth > MAX_JSON_DEPTH:
            raise BadSample("bad JSON", f"more than {MAX_JSON_DEPTH} levels deep")
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level, depth = [v for values in inner for v in values], depth + 1
    if not isinstance(value, dict):
        raise BadSample("bad JSON", f"an object was expected, not {type(value).__name__}")
    return value


def decode_npy(data: bytes) -> np.ndarray:
    """A NumPy array of plain numbers, read-only. Its header must account for exactly the bytes there are.

    `numpy.load` would first allocate whatever shape the header claims. Raises BadSample("bad array").
    """
    try:
        if data[:6] != b"\x93NUMPY" or data[6] not in (1, 2, 3):
            raise ValueError("not a .npy file")
        wide = data[6] > 1
        (length,) = struct.unpack_from("<I" if wide else "<H", data, 8)
        start = (12 if wide else 10) + length
        if length > 10_000 or start > len(data):
            raise ValueError("header too long")
        header = ast.literal_eval(data[12 if wide else 10 : start].decode("latin1").strip())
        dtype, shape = np.dtype(header["descr"]), tuple(header["shape"])
        if dtype.hasobject or dtype.fields is not None:
            raise ValueError(f"dtype {dtype} is not a plain number")
        count = 1
        for n in shape:
            if not isinstance(n, int) or n < 0:
                raise ValueError(f"shape {shape}")
            count *= n
        if count * dtype.itemsize != len(data) - start:
            raise ValueError(f"{len(data) - start} bytes for shape {shape} of {dtype}")
        order = "F" if header["fortran_order"] else "C"
        return np.frombuffer(data, dtype=dtype, count=count, offset=start).reshape(shape, order=order)
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        SyntaxError,
        MemoryError,
        RecursionError,
        struct.error,
    ) as error:
        raise BadSample("bad array", str(error)) from error


def decode_class(data: bytes) -> int:
    """A decimal class number. Raises BadSample("bad class")."""
    try:
        return int(data[:32])
    except ValueError as error:
        raise BadSample("bad class", repr(data[:32])) from error


def decode_member(extension: str, data: bytes, max_pixels: int = MAX_PIXELS) -> Any:
    """Decode one member by its extension (one of `EXTENSIONS`; videos stay bytes).

    Raises:
        KeyError: the extension is not on the whitelist.
        BadSample: the bytes are not what the extension says, or too much.
    """
    if extension in IMAGE_EXTENSIONS:
        return decode_image(data, max_pixels)
    if extension in VIDEO_EXTENSIONS:
        return data
    return {"txt": decode_text, "json": decode_json, "npy": decode_npy, "cls": decode_class}[extension](data)
