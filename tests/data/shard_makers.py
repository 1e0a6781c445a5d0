"""Makes tiny real shard folders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tokgen.data.shards import ShardWriter


def image_bytes(value: int, size: tuple[int, int] = (20, 16), format: str = "PNG") -> bytes:
    """A picture with noise drawn from `value`, so that each is different; `size` is (width, height)."""
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def write_images(folder: Path, shard_sizes: list[int], start: int = 0, **members: object) -> Path:
    """One shard for each of `shard_sizes`, with samples k000, k001, …; `members` are added to each sample."""
    at = start
    with ShardWriter(folder, kind="images", max_samples=10**6) as writer:
        for size in shard_sizes:
            for _ in range(size):
                json = {"i": at, "group": "even" if at % 2 == 0 else "odd", "captions": [f"variant {at}"]}
                sample = {"png": image_bytes(at), "txt": f"thing {at}, flat style", "json": json, **members}
                writer.write(f"k{at:03d}", sample)
                at += 1
            writer._close_shard()
    return folder


def write_codes(
    folder: Path, lengths: list[int], codebooks: int | None = None, embeddings: list | None = None, **meta: object
) -> Path:
    """Samples c000, c001, …; `embeddings` are arrays for each, None where there is none."""
    rng = np.random.default_rng(0)
    facts = {"tokenizer": "abc", "codebook_sizes": [64] * (codebooks or 1), **meta}
    with ShardWriter(folder, kind="codes", meta=facts, max_samples=4) as writer:
        for i, n in enumerate(lengths):
            ids = rng.integers(0, 64, (n,) if codebooks is None else (n, codebooks)).astype(np.uint16)
            embedding = {"emb.npy": embeddings[i]} if embeddings is not None and embeddings[i] is not None else {}
            writer.write(f"c{i:03d}", {"npy": ids, "txt": f"code {i}", **embedding})
    return folder
