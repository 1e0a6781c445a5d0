"""`pack`: a folder, csv or parquet of captioned pictures or videos becomes a folder of shards.

Files keep their bytes unless `size` or `format` asks for re-encoding. Every picture is decoded once on the way, of every
video its packets are read and its first, middle and last frame decoded; so a corrupt one is found here and not in training.
What is left out is counted by reason in the report.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokgen.data.decode import (
    IMAGE_EXTENSIONS,
    MAX_MEMBER_BYTES,
    MAX_PIXELS,
    VIDEO_EXTENSIONS,
    BadSample,
    decode_image,
    decode_json,
    decode_text,
    image_header,
)
from tokgen.data.shards import Manifest, ShardWriter, safe_key
from tokgen.errors import ConfigError, DataError

PATH_COLUMNS = ("path", "image", "file", "filename", "file_name", "filepath", "video")
CAPTION_COLUMNS = ("caption", "text")
FORMATS = ("webp", "png", "jpg")
_EXAMPLES = 5


@dataclass
class PackReport:
    """What `pack` did.

    Attributes:
        folder: the shard folder.
        written: samples in it, those of an earlier interrupted run included.
        skipped: reason -> how many were left out for it.
        examples: reason -> the first few of them.
        manifest: the folder's manifest.
    """

    folder: str
    written: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    manifest: Manifest | None = None

    def skip(self, reason: str, name: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if len(self.examples.setdefault(reason, [])) < _EXAMPLES:
            self.examples[reason].append(name)

    def __str__(self) -> str:
        shards, size = (len(self.manifest.shards), self.manifest.bytes) if self.manifest else (0, 0)
        lines = [f"{self.written} samples in {shards} shards ({size / 1e6:.1f} MB) in {self.folder}"]
        for reason, count in sorted(self.skipped.items()):
            names, more = self.examples[reason], count - len(self.examples[reason])
            lines.append(f"{count} left out, {reason}: {', '.join(names)}{f' and {more} more' if more > 0 else ''}")
        return "\n".join(lines)


@dataclass
class _Entry:
    """One source sample, not yet read. `data` is set when the table itself holds the bytes."""

    name: str  # as the user knows it: relative path, or table row
    path: Path | None
    data: bytes | None = None
    caption: str | None = None
    metadata: dict[str, Any] | None = None


# ------------------------------------------------------------------------------------------------------------- sources


@dataclass
class _Source:
    """What there is to pack. `entries(rng)` yields it, shuffled when `rng` is given."""

    kind: str
    count: int
    entries: Callable[[random.Random | None], Iterator[_Entry]]


def _listed(kind: str, entries: list[_Entry]) -> _Source:
    def shuffled(rng: random.Random | None) -> Iterator[_Entry]:
        order = list(entries)
        if rng is not None:
            rng.shuffle(order)
        return iter(order)

    return _Source(kind, len(entries), shuffled)


def _from_folder(source: Path, kind: str | None) -> _Source:
    """Media files below a folder, sorted by name."""
    images: list[Path] = []
    videos: list[Path] = []

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}).") from error

    for folder, inner, names in os.walk(source, onerror=refuse):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            extension = name.rpartition(".")[2].lower()
            if name.startswith("."):
                continue
            if extension in IMAGE_EXTENSIONS:
                images.append(Path(folder) / name)
            elif extension in VIDEO_EXTENSIONS:
                videos.append(Path(folder) / name)
    if kind is None:
        if images and videos:
            raise ConfigError(
                f"{source} holds {len(images)} images and {len(videos)} videos: say which to pack (kind images or videos)."
            )
        kind = "videos" if videos else "images"
    paths = videos if kind == "videos" else images
    if not paths:
        extensions = VIDEO_EXTENSIONS if kind == "videos" else IMAGE_EXTENSIONS
        raise DataError(f"{source} holds no {kind} (files ending in {', '.join(extensions)}).")
    return _listed(kind, [_Entry(str(path.relative_to(source)), path) for path in paths])


def _column(names: list[str], wanted: str | None, usual: tuple[str, ...], source: Path) -> str | None:
    if wanted is not None:
        if wanted not in names:
            raise ConfigError(f"{source} has no column {wanted!r}; its columns are {', '.join(names)}.")
        return wanted
    lower = {name.strip().lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)


def _from_table(
    source: Path, kind: str | None, root: Path, path_column: str | None, caption_column: str | None, captions: bool
) -> _Source:
    """Rows of a csv, tsv or parquet file: a path (or the picture's bytes), a caption, metadata in the other columns."""
    parquet = source.suffix.lower() == ".parquet"
    names, groups = _open_parquet(source) if parquet else _read_csv(source)
    path_name = _column(names, path_column, PATH_COLUMNS, source)
    caption_name = _column(names, caption_column, CAPTION_COLUMNS, source)
    if path_name is None:
        raise ConfigError(
            f"{source} has no column named {', '.join(PATH_COLUMNS)}; its columns are {', '.join(names) or 'none'}. "
            f"Name the one with the paths (path_column)."
        )
    if captions and caption_name is None:
        raise ConfigError(
            f"{source} has no column named {' or '.join(CAPTION_COLUMNS)}; its columns are {', '.join(names)}. "
            f"Name the one with the captions (caption_column), or make captions optional with captions=False."
        )

    def entry(row: dict[str, Any], number: int) -> _Entry:
        value, caption = row.get(path_name), row.get(caption_name) if caption_name else None
        value = value if isinstance(value, dict) else {"bytes": value} if isinstance(value, bytes) else {"path": value}
        data, text = value.get("bytes"), str(value.get("path") or "").strip()
        metadata = {
            name: v
            for name, v in row.items()
            if name not in (path_name, caption_name, None) and isinstance(v, (str, int, float, bool, list)) and v != ""
        }
        return _Entry(
            name=text or f"row {number + 1}",
            path=root / text if data is None and text else None,
            data=data,
            caption=None if caption_name is None else "" if caption is None else str(caption),
            metadata=metadata,
        )

    counts = [group.count for group in groups]
    if not sum(counts):
        raise DataError(f"{source} has no rows.")

    def rows(rng: random.Random | None) -> Iterator[_Entry]:
        # One row group in memory at a time: parquet files with pictures inside are larger than memory.
        starts = [sum(counts[:i]) for i in range(len(counts))]
        order = list(range(len(groups)))
        if rng is not None:
            rng.shuffle(order)
        for i in order:
            entries = [entry(row, starts[i] + n) for n, row in enumerate(groups[i].read())]
            if rng is not None:
                rng.shuffle(entries)
            yield from entries

    if kind is None:
        name = next(rows(None)).name
        kind = "videos" if name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS else "images"
    return _Source(kind, sum(counts), rows)


@dataclass
class _RowGroup:
    count: int
    read: Callable[[], list[dict[str, Any]]]


def _open_parquet(source: Path) -> tuple[list[str], list[_RowGroup]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source} cannot be read as parquet ({error}).") from error

    def group(i: int) -> _RowGroup:
        return _RowGroup(file.metadata.row_group(i).num_rows, lambda: file.read_row_group(i).to_pylist())

    return file.schema_arrow.names, [group(i) for i in range(file.num_row_groups)]


def _read_csv(source: Path) -> tuple[list[str], list[_RowGroup]]:
    text = source.read_bytes().decode("utf-8-sig", "replace")
    try:
        dialect = "excel-tab" if source.suffix.lower() == ".tsv" else "excel"
        reader = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect)
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{source} cannot be read as csv ({error}).") from error
    return list(reader.fieldnames or []), [_RowGroup(len(rows), lambda: rows)]


# ------------------------------------------------------------------------------------------------------------ one sample


def _bounded(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise BadSample("file too large", f"{size} bytes")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadSample("file not found") from error
    except OSError as error:
        raise BadSample("file cannot be read", str(error)) from error


def _sidecar(path: Path) -> tuple[str | None, dict[str, Any] | None]:
    """(caption, metadata) from the .txt and .json beside a media file; a .txt has the last word on the caption."""
    caption, metadata = None, None
    if (side := path.with_suffix(".json")).is_file():
        metadata = decode_json(_bounded(side))
        main = metadata.pop("caption", None) or metadata.pop("text", None)
        variants = metadata.get("captions")
        if not main and isinstance(variants, list) and variants:
            main = variants[0]
        caption = main.strip() if isinstance(main, str) else None
    if (side := path.with_suffix(".txt")).is_file():
        caption = decode_text(_bounded(side))
    return caption, metadata or None


def _image_bytes(data: bytes, size: int | None, format: str | None, quality: int) -> tuple[str, bytes]:
    """(extension, bytes) of a picture that decodes; the same bytes unless `size` or `format` is given.

    With `size`, the short side becomes `size` (never enlarged) and the aspect ratio is kept.
    """
    import torch
    import torch.nn.functional as F
    from PIL import Image

    x = decode_image(data, MAX_PIXELS)  # (3, H, W); raises for corrupt pictures
    original = image_header(data)[0]
    height, width = x.shape[-2:]
    small = size is not None and min(height, width) > size
    if not small and format in (None, original):
        return original, data
    if small:
        scale = size / min(height, width)
        shape = (max(size, round(height * scale)), max(size, round(width * scale)))
        x = F.interpolate(x[None], size=shape, mode="bicubic", antialias=True)[0]
    format = format or original
    options: Mapping[str, Any] = {
        "png": {"optimize": True},
        "jpg": {"quality": quality, "subsampling": 0 if quality >= 90 else 2},
        "webp": {"lossless": True} if quality >= 100 else {"quality": quality, "method": 4},
    }[format]
    file = io.BytesIO()
    Image.fromarray(x.permute(1, 2, 0).to(torch.uint8).numpy()).save(
        file, "JPEG" if format == "jpg" else format, **options
    )
    return format, file.getvalue()


def _video_bytes(data: bytes, name: str) -> tuple[str, bytes]:
    """(extension, bytes) of a video of which beginning, middle and end decode."""
    from tokgen.data.video import UnreadableVideo, open_video

    extension = name.rpartition(".")[2].lower()
    extension = extension if extension in VIDEO_EXTENSIONS else "mp4"
    try:
        with open_video(data, name=name) as video:
            for _ in video.frames(sorted({0, len(video) // 2, len(video) - 1})):
                pass
    except UnreadableVideo as error:
        raise BadSample(error.reason, str(error)) from None
    return extension, data


def _members(
    entry: _Entry, kind: str, captions: bool, size: int | None, format: str | None, quality: int
) -> dict[str, Any]:
    """Shard members of one entry. Raises BadSample."""
    caption, metadata = entry.caption, entry.metadata
    if entry.path is not None and metadata is None:  # no table
        caption, metadata = _sidecar(entry.path)
    caption = None if caption is None else caption.strip()
    if captions and not caption:
        raise BadSample("no caption" if caption is None else "empty caption")
    if entry.data is None and entry.path is None:
        raise BadSample("no path")
    data = entry.data if entry.data is not None else _bounded(entry.path)
    if not data:
        raise BadSample("empty file")
    extension, data = _video_bytes(data, entry.name) if kind == "videos" else _image_bytes(data, size, format, quality)
    members: dict[str, Any] = {extension: data}
    if caption:
        members["txt"] = caption
    if metadata:
        members["json"] = json.dumps(metadata, ensure_ascii=False, default=str)
    return members


# ----------------------------------------------------------------------------------------------------------------- pack


def pack(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    kind: str | None = None,
    captions: bool = True,
    root: str | os.PathLike | None = None,
    path_column: str | None = None,
    caption_column: str | None = None,
    size: int | None = None,
    format: str | None = None,
    quality: int = 90,
    seed: int | None = 0,
    max_samples: int = 10_000,
    max_bytes: int = 256 << 20,
    resume: bool = False,
    progress: bool = True,
    meta: Mapping[str, Any] | None = None,
) -> PackReport:
    """Pack captioned pictures or videos into a shard folder.

    Args:
        source: a folder (searched in depth) of images or videos, each with its caption in a .txt or .json of the same
            name beside it (JSON: "caption" or "text", and "captions" for variants; the rest is kept as metadata); or a
            .csv, .tsv or .parquet with one row per sample: a path (or, in parquet, the picture's bytes), a caption, and
            metadata in the other columns.
        out: the shard folder to write.
        kind: "images" or "videos"; None: what the source holds.
        captions: leave out samples without caption. With False captions are optional, and the manifest says so.
        root: folder that a table's relative paths start from; None: the table's own folder.
        path_column, caption_column: a table's columns; None: the first that is named path, image, file, filename,
            file_name, filepath or video; caption or text.
        size: shrink pictures (not videos) so that their short side has this many pixels; smaller ones stay as they are.
        format: re-encode pictures (not videos) as "webp", "png" or "jpg"; None: keep each one's format, and its bytes if `size` does
            not change it.
        quality: of re-encoded jpg and webp, 1 … 100 (100 is lossless for webp).
        seed: samples are packed in an order drawn from it, so that neighbours in a shard are not neighbours in the source;
            None keeps the source's order.
        max_samples, max_bytes: limits of one shard.
        resume: continue an interrupted run of the same command.
        progress: show a progress bar.
        meta: more facts for the manifest.

    Returns:
        PackReport: how many samples were written and, by reason, left out.

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: `out` already holds shards and `resume` is False.
        DataError: nothing to pack, or nothing that could be packed.
        ConfigError: an option that does not fit the source.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise FileNotFoundError(f"No such file or folder: {source}.")
    if kind not in (None, "images", "videos"):
        raise ConfigError(f"kind {kind!r} is not one of images, videos.")
    format = {"jpeg": "jpg"}.get(format, format)
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format {format!r} is not one of {', '.join(FORMATS)}.")
    if size is not None and size < 1:
        raise ConfigError(f"size is a number of pixels, at least 1, not {size}.")
    if not 1 <= quality <= 100:
        raise ConfigError(f"quality is between 1 and 100, not {quality}.")
    if source.is_dir():
        found = _from_folder(source, kind)
    elif source.suffix.lower() in (".csv", ".tsv", ".parquet"):
        found = _from_table(source, kind, Path(root) if root else source.parent, path_column, caption_column, captions)
    else:
        raise ConfigError(f"{source} is neither a folder nor a .csv, .tsv or .parquet file.")
    if found.kind == "videos" and (size is not None or format is not None):
        raise ConfigError(f"{source} holds videos, which keep their bytes; leave size and format out.")
    facts = dict(meta or {})
    if not captions:
        facts["captions"] = False
    report = PackReport(str(out))
    taken: set[str] = set()
    with (
        ShardWriter(
            out, kind=found.kind, meta=facts, max_samples=max_samples, max_bytes=max_bytes, resume=resume
        ) as writer,
        _Progress(found.count, progress) as bar,
    ):
        done = set(writer.keys)
        for entry in found.entries(None if seed is None else random.Random(seed)):
            # Numbered here, and not by the writer, so that a continued run gives each entry the key it had.
            base = key = safe_key(os.path.splitext(entry.name)[0], limit=70)
            number = 1
            while key in taken:
                key, number = f"{base}-{number}", number + 1
            taken.add(key)
            if key not in done:
                try:
                    members = _members(entry, found.kind, captions, size, format, quality)
                except BadSample as error:
                    report.skip(error.reason, entry.name)
                else:
                    writer.write(key, members)
            bar.advance()
        if not writer.samples:
            hint = " Captions become optional with captions=False." if "no caption" in report.skipped else ""
            raise DataError(f"Nothing of {source} could be packed: {_reasons(report)}.{hint}")
    report.manifest, report.written = writer.manifest, writer.samples
    return report


def _reasons(report: PackReport) -> str:
    return ", ".join(f"{count} {reason} ({report.examples[reason][0]})" for reason, count in report.skipped.items())


class _Progress:
    """A Rich progress bar on standard error, or nothing."""

    def __init__(self, total: int, show: bool):
        self._bar = None
        if show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("Packing"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("pack", total=total)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
