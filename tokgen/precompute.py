"""What is computed once for a whole data set: code shards (ids, and embeddings of the pictures if wanted) for generators to
train on, of pictures or clips, and features of a frozen encoder for semantic tokenizers to train on."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tokgen.data.batches import resize_image
from tokgen.data.decode import (
    EMBEDDING,
    FEATURES,
    IMAGE_EXTENSIONS,
    BadSample,
    decode_image,
    decode_json,
)
from tokgen.data.shards import Manifest, ShardWriter
from tokgen.data.tar import RawSample
from tokgen.data.units import UnitsReport, begun_meta, share_units, units_of
from tokgen.errors import DataError, InputError
from tokgen.tokenizers.base import VisualTokenizer
from tokgen.tokens import Tokens

if TYPE_CHECKING:
    from tokgen.encoders.base import ImageEncoder


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
    frames: int | None = None,
    fps: float | None = None,
    frame_stride: int = 1,
    progress: bool = True,
) -> UnitsReport:
    """Encode every image, a clip of every video, or every motion map of a shard folder, and write ids, captions and metadata as
    code shards.

    Items of different numbers of tokens are written as long as they are. Of a video it is the clip that a data module takes in
    validation, from its middle; where the shards hold its trajectories (`tokgen trajectories`) and the tokenizer takes them,
    it gets them. Processes that are given the same arguments share the work, and a run that was interrupted continues after the
    shards that were whole, whatever their number, see `tokgen.data.units`; a complete folder is left as it is.

    Args:
        source: a folder of image, video or motion shards with a manifest.
        out: folder of the code shards; its manifest names the tokenizer's fingerprint, layout and codebook sizes.
        encoder: of image shards; also embeds each picture, from the pixels that the tokenizer sees; float16 `KEY.emb.npy` of shape (D,).
            The manifest's meta then has "embedding": {"encoder": `encoder_from`, "name": its name, "dim": D}.
        encoder_from: what `load_encoder` made it from, as recipes write it; None takes its name.
        size: side of the square images; None takes the side that the tokenizer is made for, or else the images as they are
            (all of one size).
        resize: "crop" or "squash", see `tokgen.data.batches.resize_image`.
        max_samples: samples in a shard; what a process takes at a time, and so the most that its loss costs.
        options: given to `tokenizer.encode`, such as {"keep": 0.5} of LaVIT; kept in the manifest's meta if there are any.
        frames, fps, frame_stride: of video shards, as those of `ShardsDataModule`; frames must be given.

    Raises:
        DataError: the source is no folder of image, video or motion shards, holds sizes that do not fit, an embedding is beyond
            float16, or `out` was made with another tokenizer or encoder.
        ConfigError: frames, fps or resize that do not fit the videos or their trajectories.
        InputError: a tokenizer of something else, or that gives more than ids, or a size that it does not take; an encoder or
            no number of frames for videos, or one for pictures; a size for motion maps.
    """
    manifest = Manifest.load(source)
    what = {"images": "pictures", "videos": "clips", "motion": "motion"}.get(manifest.kind)
    if what is None:
        raise DataError(f"{source} holds {manifest.kind}; tokenizing needs shards of images, videos or motion")
    clips, moves = what == "clips", what == "motion"
    if moves != (tokenizer.modality == "motion") or (4 if what == "pictures" else 5) not in tokenizer.ndims:
        raise InputError(f"{tokenizer.type_name} tokenizes no {what}, and {source} holds {manifest.kind}")
    if what != "pictures" and encoder is not None:
        raise InputError(
            f"embeddings are of pictures, and there are none for the {what} of {source}; leave the encoder out"
        )
    if moves and size is not None:
        raise InputError(
            f"a size is of pictures, and motion maps have the size of their shards ({source}); leave it out"
        )
    if clips != (frames is not None):
        raise InputError(
            f"{source} holds {manifest.kind}; give frames, those of a clip, for video shards and only for them"
        )
    tokenizer = tokenizer.eval()
    size = tokenizer.image_size[0] if size is None and tokenizer.image_size is not None else size
    options = dict(options or {})
    read: _Reader = _Pictures(size, resize)
    about: dict[str, Any] = {"folder": Path(source).name, "size": size, "resize": resize, **options}
    if clips:
        timing = {"frames": frames, "fps": fps, "frame_stride": frame_stride}
        wanted = None if "trajectories" in tokenizer.extras else False  # where there are any
        resize = "none" if size is None else resize
        read = _Validated(source, image_size=size, resize=resize, trajectories=wanted, **timing)
        about |= timing | {name: read.meta[name] for name in tokenizer.extras if name in read.meta}
    elif moves:
        read, about = _Validated(source), {"folder": Path(source).name, "shape": manifest.meta.get("shape"), **options}

    def encoded(batch: dict[str, Tensor]) -> Tokens:
        extras = {name: batch[name] for name in tokenizer.extras if name in batch}
        return tokenizer.encode(batch[tokenizer.modality], **extras, **options)

    first = encoded({name: value[None] for name, value in _first(source, manifest, read).items()})
    if first.side:
        raise InputError(
            f"{tokenizer.type_name} gives {', '.join(first.side)} beside its ids, which code shards do not hold"
        )
    layout = first.layout
    meta = {
        "tokenizer": tokenizer.fingerprint,
        "layout": layout.to_dict(),
        "codebook_sizes": list(tokenizer.codebook_sizes),
        "source": about,
    }
    if encoder is not None:
        encoder = encoder.eval()
        meta["embedding"] = {"encoder": encoder_from or encoder.name, "name": encoder.name, "dim": encoder.dim}
    small = max(tokenizer.codebook_sizes) <= 2**15

    def write(samples: Iterator[RawSample], writer: ShardWriter, skipped: Counter) -> None:
        for raws, batch in _batches(source, _items(samples, read, skipped), batch_size, tokenizer.factor):
            tokens = encoded(batch)
            if tokens.layout != layout:
                raise DataError(f"{what} of different sizes in one set ({tokens.layout} and {layout}); give size=")
            embeddings = [None] * len(raws)
            if encoder is not None:
                embeddings = _half(
                    encoder, "embeddings", encoder.embed, batch["pixels"], "use one that normalises them"
                )
            for raw, item, embedding in zip(raws, tokens.cpu(), embeddings):
                ids = item.ids[0, : int(item.lengths[0])].numpy()
                members = {"npy": ids.astype(np.int16 if small else np.int32)}
                if embedding is not None:
                    members[EMBEDDING] = embedding
                writer.write(raw.key, {**members, **_about_codes(raw, len(ids))})

    return share_units(
        source, out, write, kind="codes", meta=meta, extensions=read.extensions, max_samples=max_samples, done="tokenized",
        progress="tokenizing" if progress else None,
    )  # fmt: skip


def _about_codes(raw: RawSample, length: int) -> dict[str, bytes]:
    """Caption and metadata; "length" is in code shards the number of ids, whatever it was in those that they are made of."""
    kept = _members(raw, ("txt", "json"))
    if b'"length"' in kept.get("json", b""):
        kept["json"] = json.dumps({**decode_json(kept["json"]), "length": length}).encode()
    return kept


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
) -> UnitsReport:
    """Image shards again, with the features of each picture beside it: `KEY.feat.npy`, float16 (N, C).

    A frozen encoder gives the same features in every epoch, so that they need to be computed only once: they are those of
    the picture as a data module with this `size` and `resize` reads it, without augmentation. Processes share the
    work, and a run that was interrupted continues, as with `tokenize_shards`; a complete folder is left as it is.

    Args:
        encoder: whose `features` are taken.
        source: a folder of image shards with a manifest.
        out: folder to write. Its manifest's meta has "features": {"encoder": `encoder_from`, "name" and "fingerprint" of the
            encoder, "shape": [N, C], "size", "resize"} beside what the source's meta says.
        encoder_from: what `load_encoder` made it from, as recipes write it; None takes its name.
        size: side of the square images; None: all images are squares of one size and are taken as they are.
        resize: "squash" (as the published semantic tokenizers) or "crop", see `tokgen.data.batches.resize_image`.
        max_samples: samples in a shard; what a process takes at a time, and so the most that its loss costs.

    Raises:
        DataError: the source is no folder of image shards, its pictures do not fit, features are not finite or beyond
            float16, or `out` was begun with another encoder or other pictures.
        InputError: an encoder without features of places, or one that no tokenizer can hold.
    """
    manifest = _image_manifest(source, "precomputing features")
    encoder = encoder.eval()
    first = _first(source, manifest, _Pictures(size, resize))["pixels"]
    read = _Pictures(size, resize)
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
    meta = {**manifest.meta, "features": _as_begun(out, made)}

    def write(samples: Iterator[RawSample], writer: ShardWriter, skipped: Counter) -> None:
        for raws, batch in _batches(source, _items(samples, read, skipped), batch_size):
            pixels = batch["pixels"]
            if tuple(pixels.shape[-2:]) != (size, size):
                raise DataError(
                    f"sample {raws[0].key} of {source} is {tuple(pixels.shape[-2:])}, and without size= all images "
                    f"must be squares of one size ({size} x {size}, as the first would be); give size="
                )
            for raw, row in zip(raws, _half(encoder, "features", encoder.features, pixels)):
                writer.write(raw.key, {**_members(raw, (*IMAGE_EXTENSIONS, "txt", "json")), FEATURES: row})

    return share_units(
        source, out, write, kind="images", meta=meta, extensions=read.extensions, max_samples=max_samples,
        done="given features", progress="computing features" if progress else None,
    )  # fmt: skip


def _as_begun(out: str | os.PathLike[str], made: dict[str, Any]) -> dict[str, Any]:
    """`made` under the names by which `out` was begun. Raises DataError that says how what `out` holds differs from it."""
    before = (begun_meta(out) or {}).get("features")
    if not before:
        return made
    for fact in ("fingerprint", "shape", "size", "resize"):
        if before.get(fact) != made[fact]:
            raise DataError(
                f"{out} holds features of {before.get('name')} ({before.get('fingerprint')}; size {before.get('size')}, "
                f"resize {before.get('resize')}), and those asked for now are of {made['name']} ({made['fingerprint']}; "
                f"size {made['size']}, resize {made['resize']}): their {fact} differs; give another folder or remove this one"
            )
    # the same weights may have moved to another folder
    return {**made, **{fact: before[fact] for fact in ("encoder", "name") if fact in before}}


# -- samples in --------------------------------------------------------------------------------------------------------


def _image_manifest(source: str | os.PathLike[str], doing: str) -> Manifest:
    manifest = Manifest.load(source)
    if manifest.kind != "images":
        raise DataError(f"{source} holds {manifest.kind}; {doing} needs image shards, as `tokgen pack` writes them")
    return manifest


class _Reader(Protocol):
    """From a sample to tensors by name, "pixels" or "motion" among them. Raises BadSample."""

    extensions: tuple[str, ...]

    def __call__(self, raw: RawSample) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class _Pictures:
    """{"pixels": uint8 (3, H, W)}, squares of that size or as they are."""

    size: int | None
    resize: str
    extensions: tuple[str, ...] = (*IMAGE_EXTENSIONS, "txt", "json")

    def __call__(self, raw: RawSample) -> dict[str, Tensor]:
        data = next((raw.members[e] for e in IMAGE_EXTENSIONS if e in raw.members), None)
        if data is None:
            raise BadSample("no image")
        pixels = decode_image(data)
        return {"pixels": pixels if self.size is None else resize_image(pixels, self.size, self.resize)}


class _Validated:
    """What a data module of these settings reads of a sample in validation: {"pixels": uint8 (T, 3, S, S)} of a video and, where
    the shards hold them, {"trajectories": int32 (T, h, w)}; {"motion": float32 (T, 2, h, w)} of a motion map."""

    def __init__(self, source: str | os.PathLike[str], **settings: Any) -> None:
        from tokgen.data.datamodule import ShardsDataModule

        data = ShardsDataModule(val=os.fspath(source), **settings)
        data.setup("validate")  # it knows what fits the videos and their trajectories
        self.meta = data.meta
        self.read = data._samples(data.sets["val"], train=False)
        self.extensions = tuple({*self.read.extensions, "txt", "json"})

    def __call__(self, raw: RawSample) -> dict[str, Tensor]:
        return {name: value for name, value in self.read(raw, random.Random(0)).items() if isinstance(value, Tensor)}


def _first(source: str | os.PathLike[str], manifest: Manifest, read: _Reader) -> dict[str, Tensor]:
    # the first readable one says what the whole set is like
    for unit in units_of(manifest, max_samples=max(1, manifest.samples)):
        for _, item in _items(unit.samples(source, read.extensions), read, Counter()):
            return item
    raise DataError(f"{source} holds no readable {manifest.kind.removesuffix('s')}")


def _items(
    samples: Iterator[RawSample], read: _Reader, skipped: Counter
) -> Iterator[tuple[RawSample, dict[str, Tensor]]]:
    for raw in samples:
        try:
            if raw.problem:
                raise BadSample(raw.problem)
            item = read(raw)
        except BadSample as bad:
            skipped[bad.reason] += 1
            continue
        yield raw, item


def _batches(
    source, items: Iterator[tuple[RawSample, dict[str, Tensor]]], batch_size: int, factor: int = 1
) -> Iterator[tuple[list[RawSample], dict[str, Tensor]]]:
    """Samples, and what was read of them: pixels as uint8 (B, 3, H, W) or (B, T, 3, H, W), motion as float (B, T, 2, h, w)."""
    while batch := list(islice(items, batch_size)):
        names = batch[0][1]
        for raw, item in batch if "pixels" in names else ():
            height, width = item["pixels"].shape[-2:]
            if height % factor or width % factor:
                raise DataError(
                    f"sample {raw.key} of {source} is {(height, width)}, not a multiple of {factor}; give size="
                )
        sizes = {tuple(item["pixels"].shape) for _, item in batch} if "pixels" in names else set()
        if len(sizes) > 1:
            raise DataError(
                f"images of different sizes {sorted(sizes)[:3]} in one set; give size= to bring them to one"
            )
        yield [raw for raw, _ in batch], {name: torch.stack([item[name] for _, item in batch]) for name in names}


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
