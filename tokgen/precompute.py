"""What is computed once for a whole data set: code shards (ids, and embeddings of the pictures if wanted) for generators to
train on, and features of a frozen encoder for semantic tokenizers to train on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokgen.data.batches import resize_image
from tokgen.data.decode import EMBEDDING, FEATURES, IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, BadSample, decode_image
from tokgen.data.shards import MANIFEST, PARTIAL, Manifest, ShardWriter
from tokgen.data.tar import RawSample, iter_samples, join, open_bytes
from tokgen.errors import DataError, InputError
from tokgen.tokenizers.base import VisualTokenizer

if TYPE_CHECKING:
    from tokgen.encoders.base import ImageEncoder


@dataclass
class PrecomputeReport:
    """Samples written by this call and already there before it, and those skipped, by reason."""

    done: str = "tokenized"
    written: int = 0
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.written} samples {self.done}"
        if self.kept:
            text += f", {self.kept} kept from an earlier run"
        if self.skipped:
            text += ", skipped: " + ", ".join(f"{n} ({reason})" for reason, n in sorted(self.skipped.items()))
        return text


# -- codes ------------------------------------------------------------------------------------------------------------


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
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PrecomputeReport:
    """Encode every image of a shard folder and write ids, captions and metadata as code shards.

    A run that was interrupted continues where its last whole shard ended; a complete folder is left as it is.

    Args:
        source: a folder of image shards with a manifest.
        out: folder of the code shards; its manifest names the tokenizer's fingerprint, layout and codebook sizes.
        encoder: also embeds each picture, from the pixels that the tokenizer sees; float16 `KEY.emb.npy` of shape (D,).
            The manifest's meta then has "embedding": {"encoder": `encoder_from`, "name": its name, "dim": D}.
        encoder_from: what `load_encoder` made it from, as recipes write it; None takes its name.
        size: side of the square images; None takes the side that the tokenizer is made for, or else the images as they are
            (all of one size).
        resize: "crop" or "squash", see `tokgen.data.batches.resize_image`.
        max_samples: samples in a shard, and so the most that an interruption costs.
        options: given to `tokenizer.encode`, such as {"keep": 0.5} of LaVIT; kept in the manifest's meta if there are any.

    Raises:
        DataError: the source is no folder of image shards, holds sizes that do not fit, an embedding is beyond float16,
            or `out` was made with another tokenizer or encoder.
        InputError: a tokenizer of something else than pictures, or a size that it does not take.
    """
    if tokenizer.modality != "pixels" or 4 not in tokenizer.ndims:
        raise InputError(f"{tokenizer.type_name} tokenizes no pictures, and code shards are made of pictures")
    manifest = _image_manifest(source, "tokenizing")
    tokenizer = tokenizer.eval()
    size = tokenizer.image_size[0] if size is None and tokenizer.image_size is not None else size
    report = PrecomputeReport("tokenized")
    options = dict(options or {})
    first = _first_picture(source, manifest, size, resize)
    layout = tokenizer.encode(first[None], **options).layout
    meta = {
        "tokenizer": tokenizer.fingerprint,
        "layout": layout.to_dict(),
        "codebook_sizes": list(tokenizer.codebook_sizes),
        "source": {"folder": Path(source).name, "size": size, "resize": resize, **options},
    }
    if encoder is not None:
        encoder = encoder.eval()
        meta["embedding"] = {"encoder": encoder_from or encoder.name, "name": encoder.name, "dim": encoder.dim}
    small = max(tokenizer.codebook_sizes) <= 2**15
    with ShardWriter(out, kind="codes", meta=meta, max_samples=max_samples, resume=True) as writer:
        report.kept = writer.samples
        pictures = _pictures(source, manifest, size, resize, writer, report, progress)
        for samples, pixels in _batches(source, pictures, batch_size, tokenizer.factor):
            tokens = tokenizer.encode(pixels, **options)
            if tokens.layout != layout:
                raise DataError(f"images of different sizes in one set ({tokens.layout} and {layout}); give size=")
            embeddings = [None] * len(samples)
            if encoder is not None:
                embeddings = _half(encoder, "embeddings", encoder.embed, pixels, "use one that normalises them")
            for raw, item, embedding in zip(samples, tokens.cpu(), embeddings):
                ids = item.ids[0, : int(item.lengths[0])].numpy()
                members = {"npy": ids.astype(np.int16 if small else np.int32)}
                if embedding is not None:
                    members[EMBEDDING] = embedding
                writer.write(raw.key, {**members, **_members(raw, ("txt", "json"))})
                report.written += 1
    return report


# -- features ---------------------------------------------------------------------------------------------------------


def feature_shards(
    encoder: ImageEncoder,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    encoder_from: str | None = None,
    size: int | None = None,
    resize: str = "squash",
    batch_size: int = 32,
    max_samples: int = 10_000,
    progress: bool = True,
) -> PrecomputeReport:
    """Image shards again, with the features of each picture beside it: `KEY.feat.npy`, float16 (N, C).

    A frozen encoder gives the same features in every epoch, so that they need to be computed only once: they are those of
    the picture as a data module with this `size` and `resize` reads it, without augmentation. A run that was interrupted
    continues where its last whole shard ended; a complete folder is left as it is.

    Args:
        encoder: whose `features` are taken.
        source: a folder of image shards with a manifest.
        out: folder to write. Its manifest's meta has "features": {"encoder": `encoder_from`, "name" and "fingerprint" of the
            encoder, "shape": [N, C], "size", "resize"} beside what the source's meta says.
        encoder_from: what `load_encoder` made it from, as recipes write it; None takes its name.
        size: side of the square images; None: all images are squares of one size and are taken as they are.
        resize: "squash" (as the published semantic tokenizers) or "crop", see `tokgen.data.batches.resize_image`.
        max_samples: samples in a shard, and so the most that an interruption costs.

    Raises:
        DataError: the source is no folder of image shards, its pictures do not fit, features are not finite or beyond
            float16, or `out` was begun with another encoder or other pictures.
        InputError: an encoder without features of places, or one that no tokenizer can hold.
    """
    manifest = _image_manifest(source, "precomputing features")
    encoder = encoder.eval()
    first = _first_picture(source, manifest, size, resize)
    if size is None:
        size, resize = first.shape[-1], "none"
    features = _half(encoder, "features", encoder.features, first[None])
    made = {
        "encoder": encoder_from or encoder.name,
        "name": encoder.name,
        "fingerprint": encoder.fingerprint,
        "shape": list(features.shape[1:]),
        "size": size,
        "resize": resize,
    }
    made = _as_begun(out, made)
    report = PrecomputeReport("given features")
    meta = {**manifest.meta, "features": made}
    with ShardWriter(out, kind="images", meta=meta, max_samples=max_samples, resume=True) as writer:
        report.kept = writer.samples
        pictures = _pictures(
            source, manifest, None if resize == "none" else size, resize, writer, report, progress, "computing features"
        )
        for samples, pixels in _batches(source, pictures, batch_size):
            if tuple(pixels.shape[-2:]) != (size, size):
                raise DataError(
                    f"sample {samples[0].key} of {source} is {tuple(pixels.shape[-2:])}, and without size= all images "
                    f"must be squares of one size ({size} x {size}, as the first would be); give size="
                )
            for raw, row in zip(samples, _half(encoder, "features", encoder.features, pixels)):
                writer.write(raw.key, {**_members(raw, (*IMAGE_EXTENSIONS, "txt", "json")), FEATURES: row})
                report.written += 1
    return report


def _as_begun(out: str | os.PathLike[str], made: dict[str, Any]) -> dict[str, Any]:
    """`made` under the names by which `out` was begun. Raises DataError that says how what `out` holds differs from it."""
    for name in (MANIFEST, PARTIAL):
        path = Path(out) / name
        if not path.is_file():
            continue
        before = Manifest.from_json(path.read_text(encoding="utf-8"), str(path)).meta.get("features")
        for fact in ("fingerprint", "shape", "size", "resize") if before else ():
            if before.get(fact) != made[fact]:
                raise DataError(
                    f"{out} holds features of {before.get('name')} ({before.get('fingerprint')}; size {before.get('size')}, "
                    f"resize {before.get('resize')}), and those asked for now are of {made['name']} ({made['fingerprint']}; "
                    f"size {made['size']}, resize {made['resize']}): their {fact} differs; give another folder or remove this one"
                )
        if before:  # the same weights may have moved to another folder
            return {**made, **{fact: before[fact] for fact in ("encoder", "name") if fact in before}}
    return made


# -- pictures in ------------------------------------------------------------------------------------------------------


def _image_manifest(source: str | os.PathLike[str], doing: str) -> Manifest:
    manifest = Manifest.load(source)
    if manifest.kind != "images":
        raise DataError(f"{source} holds {manifest.kind}; {doing} needs image shards, as `tokgen pack` writes them")
    return manifest


def _first_picture(source, manifest: Manifest, size: int | None, resize: str) -> Tensor:
    # the first readable picture says what the whole set is like
    for _, pixels in _pictures(source, manifest, size, resize, (), PrecomputeReport(), False):
        return pixels
    raise DataError(f"{source} holds no readable image")


def _pictures(
    source, manifest: Manifest, size, resize, done, report: PrecomputeReport, progress: bool, doing: str = "tokenizing"
) -> Iterator[tuple[RawSample, Tensor]]:
    from rich.progress import track

    shards = track(manifest.shards, f"{doing}, by shards") if progress else manifest.shards
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


def _batches(
    source, pictures: Iterator[tuple[RawSample, Tensor]], batch_size: int, factor: int = 1
) -> Iterator[tuple[list[RawSample], Tensor]]:
    """Samples, and their pictures as uint8 (B, 3, H, W)."""
    while batch := list(islice(pictures, batch_size)):
        for raw, pixels in batch:
            if pixels.shape[-1] % factor or pixels.shape[-2] % factor:
                raise DataError(
                    f"sample {raw.key} of {source} is {tuple(pixels.shape[1:])}, not a multiple of {factor}; give size="
                )
        sizes = {tuple(pixels.shape) for _, pixels in batch}
        if len(sizes) > 1:
            raise DataError(
                f"images of different sizes {sorted(sizes)[:3]} in one set; give size= to bring them to one"
            )
        yield [raw for raw, _ in batch], torch.stack([pixels for _, pixels in batch])


def _members(raw: RawSample, extensions: Iterable[str]) -> dict[str, bytes]:
    return {e: raw.members[e] for e in extensions if e in raw.members}


@torch.no_grad()
def _half(
    encoder: ImageEncoder, what: str, compute: Callable[[Tensor], Tensor], pictures: Tensor, mend: str = ""
) -> Any:
    """What the encoder computes of pictures, as a float16 array. Raises DataError if it cannot be written so."""
    device = next((t.device for t in (*encoder.parameters(), *encoder.buffers())), torch.device("cpu"))
    exact = compute(pictures.to(device)).float()  # (B, ...)
    values = exact.to("cpu", torch.float16).numpy()
    if not np.isfinite(values).all():
        if bool(exact.isfinite().all()):
            reason, mend = (
                f"that float16 cannot hold (up to {float(exact.abs().max()):.3g})",
                mend or "train on pixels instead",
            )
        else:
            reason, mend = "that are not finite", "its weights are damaged, or a picture is"
        raise DataError(f"encoder {encoder.name} gives {what} {reason}; {mend}")
    return values
