"""From the bytes of a shard member to values, through a whitelist.

Only the extensions in `EXTENSIONS` are ever looked at. Nothing is unpickled or decompressed by file name; sizes are
checked before memory is taken: bytes of a member, pixels of an image (from its header), size and depth of JSON.
"""

from __future__ import annotations

import ast
import io
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mov", "mkv")
EMBEDDING = "emb.npy"  # an image encoder's embedding of the whole picture, float (D,)
FEATURES = "feat.npy"  # its features of the picture's places, float16 (N, C)
TRAJECTORIES = "traj.npy"  # a video's trajectories, label + 1 (0: none), unsigned or int32 (T', h, w)
_ARRAYS = ("npy", EMBEDDING, FEATURES, TRAJECTORIES)
EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, "txt", "json", "cls", *_ARRAYS))

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


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the frame header (ITU-T T.81, B.2.2)."""
    at = 2
    while True:
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        if data[at] != 0xFF:
            raise ValueError("no marker where one must be")
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if marker in (0xD9, 0xDA):
            raise ValueError("no frame header")
        at += 2 if marker == 0x01 or 0xD0 <= marker <= 0xD8 else 2 + struct.unpack_from(">H", data, at + 2)[0]


def _png_header(data: bytes) -> tuple[int, int, bool, bool]:
    """(width, height, transparent, 16-bit) from IHDR, and tRNS when it comes before the picture (PNG, 11.2 and 11.3)."""
    if data[12:16] != b"IHDR":
        raise ValueError("no IHDR chunk")
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    transparent, at = color in (4, 6), 8
    while not transparent and at + 8 <= len(data) and (name := data[at + 4 : at + 8]) != b"IDAT":
        transparent = name == b"tRNS"
        at += 12 + struct.unpack_from(">I", data, at)[0]
    return width, height, transparent, depth == 16


def _webp_header(data: bytes) -> tuple[int, int, bool]:
    """(width, height, transparent) of lossy, lossless and extended files (RFC 9649, 2.5 to 2.7)."""
    kind = data[12:16]
    if kind == b"VP8X":
        return (
            1 + int.from_bytes(data[24:27], "little"),
            1 + int.from_bytes(data[27:30], "little"),
            bool(data[20] & 0x10),
        )
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bool(bits >> 28 & 1)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, False
    raise ValueError("no WebP frame header")


def image_header(data: bytes) -> tuple[str, int, int, bool, bool]:
    """(format, width, height, transparent, 16 bits per channel) from the first bytes of a JPEG, PNG or WebP.

    Raises:
        BadSample: "unreadable image".
    """
    try:
        if data[:2] == b"\xff\xd8":
            kind, (width, height), transparent, deep = "jpg", _jpeg_size(data), False, False
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            kind, (width, height, transparent, deep) = "png", _png_header(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            kind, (width, height, transparent), deep = "webp", _webp_header(data), False
        else:
            raise ValueError("neither JPEG, PNG nor WebP")
    except (ValueError, IndexError, struct.error) as error:
        raise BadSample("unreadable image", str(error) or "cut off in its header") from error
    if width < 1 or height < 1:
        raise BadSample("unreadable image", f"{width}x{height} pixels")
    return kind, width, height, transparent, deep


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


def _is_whole_png(data: bytes, width: int, height: int) -> bool:
    """Whether a 16-bit PNG is what libpng reads without an error: checksums, one stream of the right length, known filters.

    Interlaced ones are not looked at, and count as not whole.
    """
    at, body, name = 8, [], b""
    while name != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data) or zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        name = data[at + 4 : at + 8]
        if name == b"IDAT":
            body.append(data[at + 8 : end - 4])
        at = end
    channels = {0: 1, 2: 3, 4: 2, 6: 4}.get(data[25])
    if channels is None or data[28]:
        return False
    row = 1 + 2 * channels * width
    inflate = zlib.decompressobj()
    try:
        rows = inflate.decompress(b"".join(body), row * height + 1)
    except zlib.error:
        return False
    return inflate.eof and len(rows) == row * height and max(rows[::row]) <= 4


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """JPEG, PNG or WebP bytes -> uint8 (3, H, W) in [0, 255].

    Gray, palette, CMYK and 16-bit images become 8-bit RGB; transparency is composited on white; EXIF orientation is
    ignored; of an animation, the first frame.

    Raises:
        BadSample: "unreadable image" or "too many pixels" (found in the header, before anything is decoded).
    """
    kind, width, height, transparent, deep = image_header(data)
    if width * height > max_pixels:
        raise BadSample("too many pixels", f"{width}x{height}, at most {max_pixels} allowed")
    try:
        if kind == "png" and not (deep and _is_whole_png(data, width, height)):
            # torchvision's decoder ends the process with a segmentation fault where the stream of a PNG is damaged
            raise RuntimeError("left to PIL")
        import torchvision.io as tvio

        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        mode = tvio.ImageReadMode.RGB_ALPHA if transparent else tvio.ImageReadMode.RGB
        decode = {"jpg": tvio.decode_jpeg, "png": tvio.decode_png, "webp": tvio.decode_webp}[kind]
        x = decode(buffer, mode=mode)  # (C, H, W), C = 3 or 4
    except (
        RuntimeError,
        AttributeError,
        ImportError,
    ):  # a PNG, a torchvision without this decoder, or what only PIL reads
        try:
            return _pil_rgb(data)
        except Exception as error:
            raise BadSample("unreadable image", str(error)) from error
    if deep and x.dtype == torch.uint16:
        x = x.to(torch.int64)
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


def decode_caption(members: Mapping[str, bytes]) -> str | None:
    """The caption among a sample's members: "txt" or, where there is none, the "caption" of "json"; None without either.

    Captions in the JSON suit small pictures: every member costs about 1 KB of tar. Raises BadSample as the two above.
    """
    if "txt" in members:
        return decode_text(members["txt"])
    caption = decode_json(members["json"]).get("caption") if "json" in members else None
    return caption.strip() if isinstance(caption, str) else None


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


def decode_embedding(data: bytes, dim: int) -> Tensor:
    """An embedding of `dim` finite numbers as float32 (D,). Raises BadSample("bad array" or "bad embedding")."""
    array = decode_npy(data)
    if array.dtype.kind != "f" or array.shape != (dim,):
        raise BadSample("bad embedding", f"{array.dtype} {array.shape}: floats ({dim},) were expected")
    if not np.isfinite(array).all():
        raise BadSample("bad embedding", "not finite")
    return torch.from_numpy(array.astype(np.float32))


def decode_features(data: bytes, shape: tuple[int, int]) -> Tensor:
    """Finite features of that shape, float16 (N, C). Raises BadSample("bad array" or "bad features")."""
    array = decode_npy(data)
    if array.dtype != np.float16 or array.shape != tuple(shape):
        raise BadSample("bad features", f"{array.dtype} {array.shape}: float16 {tuple(shape)} were expected")
    if not np.isfinite(array).all():
        raise BadSample("bad features", "not finite")
    return torch.from_numpy(array.copy())


def decode_motion(data: bytes, shape: tuple[int, ...]) -> Tensor:
    """A finite motion map of that shape, float32 (T, 2, h, w). Raises BadSample("bad array" or "bad motion")."""
    array = decode_npy(data)
    if array.dtype.kind != "f" or array.shape != tuple(shape):
        raise BadSample("bad motion", f"{array.dtype} {array.shape}: floats {tuple(shape)} were expected")
    if not np.isfinite(array).all():
        raise BadSample("bad motion", "not finite")
    return torch.from_numpy(array.astype(np.float32))


def decode_trajectories(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """A video's trajectories, label + 1 (0 where there is none): uint8, uint16 or int32 (T', h, w), read-only.

    Args:
        shape: (T', h, w): positions of the video's timeline, and the grid.

    Raises:
        BadSample: "bad array" or "bad trajectories".
    """
    array = decode_npy(data)
    if array.dtype not in (np.uint8, np.uint16, np.int32) or array.shape != tuple(shape):
        raise BadSample(
            "bad trajectories", f"{array.dtype} {array.shape}: uint8, uint16 or int32 {tuple(shape)} were expected"
        )
    if array.size and array.min() < 0:
        raise BadSample("bad trajectories", f"number {array.min()}: 0 (none) or more was expected")
    return array


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
    arrays = dict.fromkeys(_ARRAYS, decode_npy)
    return {"txt": decode_text, "json": decode_json, "cls": decode_class, **arrays}[extension](data)
