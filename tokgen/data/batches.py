"""From raw samples to batches, one class for each kind of shard set.

An instance is called with a raw sample and the sample's own random generator and returns a decoded item; `collate`
makes a batch of items. Instances are plain data, so that worker processes can be spawned with them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokgen.data.decode import (
    EMBEDDING,
    FEATURES,
    IMAGE_EXTENSIONS,
    MAX_PIXELS,
    VIDEO_EXTENSIONS,
    BadSample,
    decode_caption,
    decode_embedding,
    decode_features,
    decode_image,
    decode_json,
    decode_motion,
    decode_npy,
)
from tokgen.data.tar import RawSample
from tokgen.errors import DataError

RESIZE_MODES = ("crop", "random_crop", "squash", "none")


# ------------------------------------------------------------------------------------------------------------- captions


@dataclass(frozen=True)
class Captions:
    """Read a sample's caption, and vary it.

    The caption is `KEY.txt` or, where there is none, `json["caption"]`.

    Args:
        required: a missing or empty caption makes the sample bad; otherwise it becomes "".
        variants: probability of taking one of `json["captions"]`, drawn evenly, in place of the main caption.
        word_dropout: probability of dropping each word, except in the last comma-separated part (the style phrase of
            "red heart, flat style") when there is more than one; one word of the rest always stays.
    """

    required: bool = True
    variants: float = 0.0
    word_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("variants", "word_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"caption {name} is a probability in [0, 1], got {getattr(self, name)}.")

    @property
    def extensions(self) -> tuple[str, ...]:
        return ("txt", "json")

    def __call__(self, raw: RawSample, rng: random.Random) -> str:
        found = decode_caption(raw.members)
        caption = found or ""
        if self.required and not caption:
            raise BadSample("no caption" if found is None else "empty caption")
        if self.variants and rng.random() < self.variants and "json" in raw.members:
            others = decode_json(raw.members["json"]).get("captions")
            others = [c.strip() for c in others if isinstance(c, str) and c.strip()] if isinstance(others, list) else []
            caption = rng.choice(others) if others else caption
        return self._drop_words(caption, rng) if self.word_dropout else caption

    def _drop_words(self, caption: str, rng: random.Random) -> str:
        parts = [part.split() for part in caption.split(",")]
        style = parts.pop() if len(parts) > 1 else None
        words = [(i, word) for i, part in enumerate(parts) for word in part]
        if not words:
            return caption
        kept = [word for word in words if rng.random() >= self.word_dropout] or [rng.choice(words)]
        texts = [" ".join(word for j, word in kept if j == i) for i in range(len(parts))]
        return ", ".join([text for text in texts if text] + ([" ".join(style)] if style else []))


# --------------------------------------------------------------------------------------------------------------- images


def resize_image(x: Tensor, size: int, mode: str = "crop", rng: random.Random | None = None) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size), bicubic with antialiasing.

    "crop": the central square, resized; "random_crop": a random square along the long side, resized (the central one
    when `rng` is None); "squash": the whole image, its aspect ratio lost.
    """
    height, width = x.shape[-2:]
    if mode in ("crop", "random_crop"):
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        if mode == "random_crop" and rng is not None:
            top, left = rng.randint(0, height - side), rng.randint(0, width - side)
        x = x[:, top : top + side, left : left + side]
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x[None], size=(size, size), mode="bicubic", antialias=True)[0]


@dataclass(frozen=True)
class ImageSamples:
    """`KEY.jpg|jpeg|png|webp` with `KEY.txt` -> {"pixels": uint8 (B, 3, S, S), "caption": list, "key": list}.

    Args:
        size: side of the square images, in pixels; None with resize="none".
        resize: "crop", "random_crop", "squash" (see `resize_image`) or "none" (all images must have one size).
        flip: mirror left and right with probability 1/2.
        shift: move by up to this many pixels each way, edges repeated.
        train: draw crops, flips and shifts; otherwise the crop is central and there is neither flip nor shift.
        features: (N, C) of the features that every sample must then have, `KEY.feat.npy`: the batch also holds
            {"features": float16 (B, N, C)}; None reads none. They are those of the picture without flip, shift or drawn crop.
    """

    captions: Captions = Captions()
    size: int | None = None
    resize: str = "crop"
    flip: bool = False
    shift: int = 0
    train: bool = True
    max_pixels: int = MAX_PIXELS
    features: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.resize not in RESIZE_MODES:
            raise ValueError(f"resize {self.resize!r} is not one of {', '.join(RESIZE_MODES)}.")
        if self.resize != "none" and (self.size is None or self.size < 1):
            raise ValueError(f"resize {self.resize!r} needs image_size, a positive number of pixels, not {self.size}.")
        if self.shift < 0:
            raise ValueError(f"random_shift is a number of pixels, 0 or more, not {self.shift}.")

    @property
    def extensions(self) -> tuple[str, ...]:
        features = () if self.features is None else (FEATURES,)
        return (*IMAGE_EXTENSIONS, *self.captions.extensions, *features)

    def __call__(self, raw: RawSample, rng: random.Random) -> dict[str, Any]:
        caption = self.captions(raw, rng)  # first: cheaper than the picture
        data = next((raw.members[e] for e in IMAGE_EXTENSIONS if e in raw.members), None)
        if data is None:
            raise BadSample("no image")
        item: dict[str, Any] = {"caption": caption, "key": raw.key}
        if self.features is not None:
            if FEATURES not in raw.members:
                raise BadSample("no features")
            item["features"] = decode_features(raw.members[FEATURES], self.features)
        x = decode_image(data, self.max_pixels)
        if self.resize != "none":
            x = resize_image(x, self.size, self.resize, rng if self.train else None)
        if self.train and self.flip and rng.random() < 0.5:
            x = x.flip(-1)
        if self.train and self.shift:
            dy, dx = rng.randint(-self.shift, self.shift), rng.randint(-self.shift, self.shift)
            rows = (torch.arange(x.shape[1]) + dy).clamp_(0, x.shape[1] - 1)
            columns = (torch.arange(x.shape[2]) + dx).clamp_(0, x.shape[2] - 1)
            x = x[:, rows][:, :, columns]
        return {"pixels": x, **item}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        sizes = {tuple(item["pixels"].shape[-2:]) for item in items}
        if len(sizes) > 1 or (self.size is not None and sizes != {(self.size, self.size)}):
            odd = next(i for i in items if tuple(i["pixels"].shape[-2:]) != (self.size or min(sizes)[0],) * 2)
            raise DataError(
                f'Sample {odd["key"]} is {tuple(odd["pixels"].shape[-2:])} and resize is "none", which needs images of '
                f'one size{f" ({self.size})" if self.size else ""}; choose "crop" or "squash" with image_size.'
            )
        batch = {
            "pixels": torch.stack([item["pixels"].contiguous() for item in items]),  # (B, 3, H, W)
            "caption": [item["caption"] for item in items],
            "key": [item["key"] for item in items],
        }
        if self.features is not None:
            batch["features"] = torch.stack([item["features"] for item in items])  # (B, N, C)
        return batch


# ------------------------------------------------------------------------------------------------------ codes and videos


@dataclass(frozen=True)
class CodeSamples:
    """`KEY.npy` with `KEY.txt` -> {"ids": int64 (B, N[, C]), "mask": bool (B, N), "caption": list, "key": list}.

    Ragged ids are padded with 0 to the longest of the batch, mask False there; `json["length"]`, when there is one,
    says how many of the stored ids are real. With `embedding_dim` also {"embedding": float32 (B, D)}, of `KEY.emb.npy`.

    Args:
        codebook_sizes: one size for each codebook (or one for all); ids outside make the sample bad.
        embedding_dim: D of the pictures' embeddings, which every sample must then have; None reads none.
    """

    captions: Captions = Captions()
    codebook_sizes: tuple[int, ...] = ()
    embedding_dim: int | None = None

    @property
    def extensions(self) -> tuple[str, ...]:
        return ("npy", "json", "txt") if self.embedding_dim is None else ("npy", "json", "txt", EMBEDDING)

    def __call__(self, raw: RawSample, rng: random.Random) -> dict[str, Any]:
        caption = self.captions(raw, rng)
        if "npy" not in raw.members:
            raise BadSample("no codes")
        ids = decode_npy(raw.members["npy"])
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not len(ids):
            raise BadSample("bad codes", f"{ids.dtype} {ids.shape}: integers (N,) or (N, C) were expected")
        ids = ids.astype(np.int64)  # (N,) or (N, C); native order, and a copy that torch may own
        sizes = np.asarray(self.codebook_sizes, dtype=np.int64)
        if ids.min() < 0 or (sizes.size and (ids >= (sizes if ids.ndim == 2 else sizes.max())).any()):
            raise BadSample("codes out of range", f"{ids.min()}..{ids.max()} for codebooks of {self.codebook_sizes}")
        length = len(ids)
        if "json" in raw.members:
            length = decode_json(raw.members["json"]).get("length", length)
            if not isinstance(length, int) or not 0 < length <= len(ids):
                raise BadSample("bad codes", f"length {length!r} of {len(ids)} ids")
        item = {"ids": torch.from_numpy(ids), "length": length, "caption": caption, "key": raw.key}
        if self.embedding_dim is not None:
            if EMBEDDING not in raw.members:
                raise BadSample("no embedding")
            item["embedding"] = decode_embedding(raw.members[EMBEDDING], self.embedding_dim)
        return item

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        longest = max(len(item["ids"]) for item in items)
        if len({item["ids"].shape[1:] for item in items}) > 1:
            raise DataError(
                "Samples of one batch have different numbers of codebooks; they cannot be trained together."
            )
        ids = items[0]["ids"].new_zeros((len(items), longest, *items[0]["ids"].shape[1:]))  # (B, N[, C])
        mask = torch.zeros((len(items), longest), dtype=torch.bool)
        for row, item in enumerate(items):
            ids[row, : item["length"]] = item["ids"][: item["length"]]
            mask[row, : item["length"]] = True
        batch = {"ids": ids, "mask": mask, "caption": [i["caption"] for i in items], "key": [i["key"] for i in items]}
        if self.embedding_dim is not None:
            batch["embedding"] = torch.stack([item["embedding"] for item in items])  # (B, D)
        return batch


@dataclass(frozen=True)
class VideoSamples:
    """`KEY.mp4|webm|mov|mkv` with `KEY.txt` -> {"video": list[bytes], "caption": list, "key": list}; not decoded here."""

    captions: Captions = Captions()

    @property
    def extensions(self) -> tuple[str, ...]:
        return (*VIDEO_EXTENSIONS, *self.captions.extensions)

    def __call__(self, raw: RawSample, rng: random.Random) -> dict[str, Any]:
        caption = self.captions(raw, rng)
        data = next((raw.members[e] for e in VIDEO_EXTENSIONS if e in raw.members), None)
        if not data:
            raise BadSample("no video")
        return {"video": data, "caption": caption, "key": raw.key}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: [item[name] for item in items] for name in ("video", "caption", "key")}


# --------------------------------------------------------------------------------------------------------------- motion


@dataclass(frozen=True)
class MotionSamples:
    """`KEY.npy` with `KEY.txt`, if there is one -> {"motion": float32 (B, T, 2, h, w), "caption": list, "key": list}.

    Args:
        shape: (T, 2, h, w) of every map; see `tokgen.data.motion`.
        flip: mirror left and right with probability 1/2, where `train` is set: the map, and the sign of motion to the right.
    """

    captions: Captions = Captions(required=False)
    shape: tuple[int, ...] = (24, 2, 20, 36)
    flip: bool = False
    train: bool = True

    @property
    def extensions(self) -> tuple[str, ...]:
        return ("npy", *self.captions.extensions)

    def __call__(self, raw: RawSample, rng: random.Random) -> dict[str, Any]:
        caption = self.captions(raw, rng)
        if "npy" not in raw.members:
            raise BadSample("no motion")
        motion = decode_motion(raw.members["npy"], self.shape)
        if self.train and self.flip and rng.random() < 0.5:
            motion = motion.flip(-1) * motion.new_tensor([-1, 1]).view(2, 1, 1)
        return {"motion": motion, "caption": caption, "key": raw.key}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "motion": torch.stack([item["motion"] for item in items]),  # (B, T, 2, h, w)
            "caption": [item["caption"] for item in items],
            "key": [item["key"] for item in items],
        }
