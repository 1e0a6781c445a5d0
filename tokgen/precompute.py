"""Code shards: the ids of a whole data set, and embeddings of its pictures if wanted, computed once, for generators to
train on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tokgen.data.batches import resize_image
from tokgen.data.decode import EMBEDDING, IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, BadSample, decode_image
from tokgen.data.shards import Manifest, ShardWriter
from tokgen.data.tar import RawSample, iter_samples, join, open_bytes
from tokgen.errors import DataError
from tokgen.tokenizers.base import VisualTokenizer

if TYPE_CHECKING:
    from tokgen.encoders.base import ImageEncoder


@dataclass
class TokenizeReport:
    """Samples written by this call and already there before it, and those skipped, by reason."""

    written: int = 0
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.written} samples tokenized"
        if self.kept:
            text += f", {self.kept} kept from an earlier run"
        if self.skipped:
            text += ", skipped: " + ", ".join(f"{n} ({reason})" for reason, n in sorted(self.skipped.items()))
        return text


def tokenize_shards(
    tokenizer: VisualTokenizer,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    encoder: ImageEncoder | None = None,
    encoder_from: str | None = None,
    size: int | None = None,
    batch_size: int = 32,
    resize: str = "crop",
    max_samples: int = 10_000,
    progress: bool = True,
) -> TokenizeReport:
    """Encode every image of a shard folder and write ids, captions and metadata as code shards.

    A run that was interrupted continues where its last whole shard ended; a complete folder is left as it is.

    Args:
        source: a folder of image shards with a manifest.
        out: folder of the code shards; its manifest names the tokenizer's fingerprint, layout and codebook sizes.
        encoder: also embeds each picture, from the pixels that the tokenizer sees; float16 `KEY.emb.npy` of shape (D,).
            The manifest's meta then has "embedding": {"encoder": `encoder_from`, "name": its name, "dim": D}.
        encoder_from: what `load_encoder` made it from, as recipes write it; None takes its name.
        size: side of the square images; None takes the images as they are (all of one size).
        resize: "crop" or "squash", see `tokgen.data.batches.resize_image`.
        max_samples: samples in a shard, and so the most that an interruption costs.

    Raises:
        DataError: the source is no folder of image shards, holds sizes that do not fit, an embedding is beyond float16,
            or `out` was made with another tokenizer or encoder.
    """
    manifest = Manifest.load(source)
    if manifest.kind != "images":
        raise DataError(f"{source} holds {manifest.kind}; tokenizing needs image shards, as `tokgen pack` writes them")
    tokenizer = tokenizer.eval()
    report = TokenizeReport()
    layout = _layout(tokenizer, source, manifest, size, resize)
    meta = {
        "tokenizer": tokenizer.fingerprint,
        "layout": layout.to_dict(),
        "codebook_sizes": list(tokenizer.codebook_sizes),
        "source": {"folder": Path(source).name, "size": size, "resize": resize},
    }
    if encoder is not None:
        encoder = encoder.eval()
        meta["embedding"] = {"encoder": encoder_from or encoder.name, "name": encoder.name, "dim": encoder.dim}
    small = max(tokenizer.codebook_sizes) <= 2**15
    with ShardWriter(out, kind="codes", meta=meta, max_samples=max_samples, resume=True) as writer:
        report.kept = writer.samples
        batch: list[tuple[RawSample, Tensor]] = []
        for raw, pixels in _images(source, manifest, size, resize, writer, report, progress):
            if pixels.shape[-1] % tokenizer.factor or pixels.shape[-2] % tokenizer.factor:
                raise DataError(
                    f"sample {raw.key} of {source} is {tuple(pixels.shape[1:])}, not a multiple of {tokenizer.factor}; give size="
                )
            batch.append((raw, pixels))
            if len(batch) == batch_size:
                _write(writer, tokenizer, encoder, batch, small, layout, report)
                batch = []
        if batch:
            _write(writer, tokenizer, encoder, batch, small, layout, report)
    return report


def _layout(tokenizer: VisualTokenizer, source, manifest: Manifest, size: int | None, resize: str):
    # the first readable picture says which layout the whole set has
    for _, pixels in _images(source, manifest, size, resize, (), TokenizeReport(), False):
        return tokenizer.encode(pixels[None]).layout
    raise DataError(f"{source} holds no readable image")


def _images(
    source, manifest: Manifest, size, resize, done, report: TokenizeReport, progress: bool
) -> Iterator[tuple[RawSample, Tensor]]:
    from rich.progress import track

    shards = track(manifest.shards, "tokenizing shards") if progress else manifest.shards
    extensions = (*IMAGE_EXTENSIONS, "txt", "json")
    for shard in shards:
        with open_bytes(join(os.fspath(source), shard.name)) as file:
            for _, raw in iter_samples(file, extensions=extensions, max_member_bytes=MAX_MEMBER_BYTES):
                if raw.key in done:
                    continue
                data = next((raw.members[e] for e in IMAGE_EXTENSIONS if e in raw.members), None)
                try:
                    if raw.problem or data is None:
                        raise BadSample(raw.problem or "no image")
                    pixels = decode_image(data)
                except BadSample as bad:
                    report.skipped[bad.reason] = report.skipped.get(bad.reason, 0) + 1
                    continue
                yield raw, pixels if size is None else resize_image(pixels, size, resize)


def _write(
    writer: ShardWriter, tokenizer: VisualTokenizer, encoder, batch, small: bool, layout, report: TokenizeReport
) -> None:
    sizes = {tuple(pixels.shape) for _, pixels in batch}
    if len(sizes) > 1:
        raise DataError(f"images of different sizes {sorted(sizes)[:3]} in one set; give size= to bring them to one")
    pictures = torch.stack([pixels for _, pixels in batch])  # (B, 3, H, W)
    tokens = tokenizer.encode(pictures)
    if tokens.layout != layout:
        raise DataError(f"images of different sizes in one set ({tokens.layout} and {layout}); give size=")
    embeddings = [None] * len(batch) if encoder is None else _embed(encoder, pictures)
    for (raw, _), item, embedding in zip(batch, tokens.cpu(), embeddings):
        ids = item.ids[0, : int(item.lengths[0])].numpy()
        members = {"npy": ids.astype(np.int16 if small else np.int32)}
        if embedding is not None:
            members[EMBEDDING] = embedding
        writer.write(raw.key, {**members, **{e: raw.members[e] for e in ("txt", "json") if e in raw.members}})
        report.written += 1


@torch.no_grad()
def _embed(encoder: ImageEncoder, pictures: Tensor) -> np.ndarray:
    embeddings = encoder.embed(pictures).to("cpu", torch.float16).numpy()  # (B, D)
    if not np.isfinite(embeddings).all():
        raise DataError(
            f"encoder {encoder.name} gives embeddings that float16 cannot hold; use one that normalises them"
        )
    return embeddings
