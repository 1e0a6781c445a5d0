"""Shard folders: writing them whole, reading and verifying their manifests.

    DIR/00000.tar, DIR/00001.tar, …      plain tar, webdataset naming (KEY.webp, KEY.txt, KEY.json; KEY.npy, …)
    DIR/manifest.json                    samples, bytes and sha256 of each shard, kind and meta of the set

The manifest is written last, so a folder with a manifest is complete. It lets readers plan an epoch without listing or
opening anything, and it is the only way to notice that a shard has lost samples.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokgen.data.tar import Damage, Unreadable, check_location, iter_samples, join, open_bytes, patiently, scheme
from tokgen.errors import DataError
from tokgen.files import replacing

FORMAT, VERSION = "tokgen-shards", 1
KINDS = ("images", "codes", "videos", "motion")
MANIFEST, PARTIAL = "manifest.json", "manifest.partial.json"
UNITS = ".units"  # folder inside one that several processes are making, see `tokgen.data.units`
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_KEY_LIMIT = 80  # characters; with any extension it stays inside ustar's 100-byte name field
_MANIFEST_LIMIT = 256 << 20


@dataclass(frozen=True)
class ShardEntry:
    """One shard as its manifest describes it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds. `kind` is one of `KINDS`; `meta` is free, JSON-able."""

    kind: str
    shards: tuple[ShardEntry, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> str:
        head = {"format": FORMAT, "version": VERSION, "kind": self.kind, "samples": self.samples, "bytes": self.bytes}
        return json.dumps({**head, "shards": [asdict(s) for s in self.shards], "meta": self.meta}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "manifest") -> Manifest:
        """Parse and check a manifest. Raises DataError that names `where` when it is not one."""
        try:
            data = json.loads(text)
            if data.get("format") != FORMAT:
                raise DataError(
                    f'{where} is not a shard manifest: its "format" is {data.get("format")!r}, not {FORMAT!r}.'
                )
            if data["version"] > VERSION:
                raise DataError(
                    f"{where} has version {data['version']}; this tokgen reads up to {VERSION}: update tokgen."
                )
            shards = tuple(
                ShardEntry(str(s["name"]), int(s["samples"]), int(s["bytes"]), str(s["sha256"])) for s in data["shards"]
            )
            manifest = cls(kind=data["kind"], shards=shards, meta=dict(data.get("meta") or {}))
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{where} cannot be read as a shard manifest ({type(error).__name__}: {error}).") from error
        if manifest.kind not in KINDS:
            raise DataError(f"{where}: kind {manifest.kind!r} is not one of {', '.join(KINDS)}.")
        for shard in shards:
            # names end up in paths, and in commands for pipe: locations
            if not _SHARD_NAME.fullmatch(shard.name):
                raise DataError(
                    f"{where} lists a shard named {shard.name!r}; names are letters, digits, '_', '-', '.'."
                )
            if shard.samples < 0 or shard.bytes < 0:
                raise DataError(f"{where}: shard {shard.name} has a negative count.")
        return manifest

    @classmethod
    def load(cls, folder: str | os.PathLike, allow_shell_urls: bool = False) -> Manifest:
        """Read `folder`'s manifest. `folder` is a path or an http(s), s3, gs, hf location.

        Raises:
            FileNotFoundError: no such folder, or it has no manifest.
            DataError: the manifest is not one, or the location is not allowed.
        """
        folder = os.fspath(folder)
        check_location(folder, allow_shell_urls)
        where = join(folder, MANIFEST)
        if not scheme(folder):
            _check_folder(folder)

        def read() -> bytes:
            with open_bytes(where, allow_shell_urls) as file:
                return file.read(_MANIFEST_LIMIT)

        try:
            text = patiently(where, read)
        except Unreadable as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise FileNotFoundError(f"{where} cannot be read: there is no such file.") from error
            raise
        return cls.from_json(text.decode("utf-8", "replace"), where)


def _check_folder(folder: str) -> None:
    """Say what is wrong with a local shard folder, before anything is read."""
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"No such shard folder: {folder}. Make one with `tokgen pack SOURCE --out {folder}`.")
    if not path.is_dir():
        raise DataError(f"{folder} is a file; a shard folder was expected (the folder that holds {MANIFEST}).")
    try:
        names = os.listdir(path)
    except PermissionError as error:
        raise DataError(f"{folder} cannot be read: permission denied.") from error
    if MANIFEST in names:
        return
    if PARTIAL in names or UNITS in names:
        raise FileNotFoundError(f"{folder} holds an interrupted run; repeat the command that wrote it to continue it.")
    if any(name.endswith(".tar") for name in names):
        raise FileNotFoundError(
            f"{folder} holds tar files but no {MANIFEST}; "
            f"make it with `python -c \"from tokgen.data import build_manifest; build_manifest('{folder}', 'images')\"`."
        )
    inner = sorted(name for name in names if (path / name / MANIFEST).is_file())
    if inner:
        raise FileNotFoundError(f"{folder} holds splits ({', '.join(inner)}), not shards; name one: {path / inner[0]}.")
    what = f"no {MANIFEST} and no shards" if names else "nothing"
    raise FileNotFoundError(f"{folder} holds {what}; make shards with `tokgen pack SOURCE --out {folder}`.")


# -------------------------------------------------------------------------------------------------------------- writing


class _HashingFile:
    """A file that hashes and counts what is written to it."""

    def __init__(self, path: Path):
        self._file, self.sha256, self.count = open(path, "wb"), hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        if self._file.closed:  # abandoned: tarfile still flushes when it is collected
            return len(data)
        self.sha256.update(data)
        self.count += len(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


def safe_key(name: str, limit: int = _KEY_LIMIT) -> str:
    """A key without dots, slashes or anything a path or a shell could mind; never empty, at most `limit` characters."""
    key = re.sub(r"[^A-Za-z0-9_\-]+", "_", name).strip("_-")
    if len(key) > limit:  # keep long names distinct
        key = key[: limit - 9] + "_" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return key or "sample"


def _encode(extension: str, value: Any) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode("utf-8")
    if extension.rpartition(".")[2] == "npy":  # npy, emb.npy
        file = io.BytesIO()
        np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
        return file.getvalue()
    if extension == "json":
        return json.dumps(value, ensure_ascii=False).encode("utf-8")
    if extension == "cls":
        return str(int(value)).encode("ascii")
    raise TypeError(f"Cannot write a {type(value).__name__} as .{extension}: give bytes.")


class ShardWriter:
    """Write samples into a shard folder.

    >>> with ShardWriter("shards/train", kind="images") as writer:
    ...     writer.write("cat", {"webp": image_bytes, "txt": "a cat", "json": {"group": "animals"}})

    Each shard gets a temporary name until it is whole; `manifest.partial.json` lists the whole shards so far, and
    `manifest.json` replaces it when the `with` block ends without an exception. An interrupted run is continued by
    `resume=True`: whole shards are kept, `writer.keys` and `writer.samples` say what they hold, and the caller writes
    the rest (samples of the shard that was being written are not among them).
    The same samples in the same order give the same bytes.

    Args:
        folder: where to write; created when missing.
        kind: "images", "codes", "videos" or "motion".
        meta: JSON-able facts about the set, kept in the manifest.
        max_samples, max_bytes: a shard is closed before it would exceed either (one sample may exceed max_bytes alone).
        resume: continue an interrupted run, or append to a complete one. On an empty folder it starts afresh.

    Raises:
        FileExistsError: the folder already holds shards and `resume` is False.
        DataError: `resume` with another kind or meta than the folder's.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        kind: str = "images",
        meta: Mapping[str, Any] | None = None,
        max_samples: int = 10_000,
        max_bytes: int = 256 << 20,
        resume: bool = False,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}.")
        if max_samples < 1 or max_bytes < 1:
            raise ValueError(f"max_samples and max_bytes must be positive, got {max_samples} and {max_bytes}.")
        self.folder = Path(folder)
        self.kind = kind
        self.meta = json.loads(json.dumps(dict(meta or {})))  # what JSON makes of it is what a reader will see
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.keys: set[str] = set()
        self.manifest: Manifest | None = None  # set when the folder is complete
        self._shards: list[ShardEntry] = []
        self._file: _HashingFile | None = None
        self._tar: tarfile.TarFile | None = None
        self._count = 0
        self._temporary: Path | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        present = [name for name in (MANIFEST, PARTIAL) if (self.folder / name).exists()]
        tars = sorted(self.folder.glob("*.tar"))
        if (present or tars) and not resume:
            state = "an interrupted run" if present == [PARTIAL] else "shards"
            raise FileExistsError(
                f"{self.folder} already holds {state}: give another folder, remove it, or pass resume=True to continue."
            )
        if resume and present:
            self._keep_whole_shards(self.folder / present[-1])
        for leftover in self.folder.glob(".*.tar.tmp-*"):
            leftover.unlink()

    def _keep_whole_shards(self, listing: Path) -> None:
        old = Manifest.from_json(listing.read_text(encoding="utf-8"), str(listing))
        if (old.kind, old.meta) != (self.kind, self.meta):
            raise DataError(
                f"{self.folder} was begun with another {'kind' if old.kind != self.kind else 'meta'} than asked for now, "
                f"so it cannot be continued; give another folder or remove this one."
            )
        for entry in old.shards:
            path = self.folder / entry.name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                break  # from here on everything is written again
            with open(path, "rb") as file:
                found = {sample.key for _, sample in iter_samples(file, extensions=(), max_member_bytes=0)}
            if len(found) != entry.samples:
                break
            self.keys |= found
            self._shards.append(entry)
        kept = {entry.name for entry in self._shards}
        for path in self.folder.glob("*.tar"):
            if path.name not in kept:
                path.unlink()
        self._list_whole_shards()
        (self.folder / MANIFEST).unlink(missing_ok=True)

    @property
    def samples(self) -> int:
        """Samples written so far, those kept by `resume` included."""
        return sum(entry.samples for entry in self._shards) + self._count

    def __contains__(self, key: str) -> bool:
        return safe_key(key) in self.keys

    def write(self, key: str, members: Mapping[str, Any]) -> str:
        """Add one sample and return the key it got.

        Args:
            key: any text; dots, slashes and the like become "_", and a number is added to a key already taken.
            members: extension -> bytes, or str (UTF-8), or an array for "npy" (and "emb.npy"), a JSON-able value for "json",
                an int for "cls".
        """
        if not members:
            raise ValueError(f"Sample {key!r} has no members.")
        for extension in members:
            if not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)?", extension):
                raise ValueError(
                    f"Sample {key!r}: extension {extension!r} must be lower-case letters and digits, with one dot at most."
                )
        encoded = {extension: _encode(extension, value) for extension, value in members.items()}
        base = unique = safe_key(key)
        number = 1
        while unique in self.keys:
            unique, number = f"{base}-{number}", number + 1
        size = sum(512 + -(-len(data) // 512) * 512 for data in encoded.values())
        if self._count:
            ended = (
                -(-(self._tar.offset + size + 1024) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
            )  # with tar's padding
            if self._count >= self.max_samples or ended > self.max_bytes:
                self._close_shard()
        if self._tar is None:
            self._open_shard()
        for extension, data in encoded.items():
            info = tarfile.TarInfo(f"{unique}.{extension}")
            info.size, info.mode = len(data), 0o644
            self._tar.addfile(info, io.BytesIO(data))
        self.keys.add(unique)
        self._count += 1
        return unique

    def _open_shard(self) -> None:
        name = f"{len(self._shards):05d}.tar"
        self._temporary = self.folder / f".{name}.tmp-{os.getpid()}"
        self._file = _HashingFile(self._temporary)
        self._tar = tarfile.open(fileobj=self._file, mode="w|", format=tarfile.USTAR_FORMAT, bufsize=10240)

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._file.close()
        name = f"{len(self._shards):05d}.tar"
        os.replace(self._temporary, self.folder / name)
        self._shards.append(ShardEntry(name, self._count, self._file.count, self._file.sha256.hexdigest()))
        self._tar = self._file = self._temporary = None
        self._count = 0
        self._list_whole_shards()

    def _list_whole_shards(self) -> None:
        with replacing(self.folder / PARTIAL) as temporary:
            temporary.write_text(Manifest(self.kind, tuple(self._shards), self.meta).to_json(), encoding="utf-8")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            if self._file is not None:
                self._file.abandon()
                self._temporary.unlink(missing_ok=True)
            return
        self.close()

    def close(self) -> Manifest:
        """Finish the last shard and write the manifest, which makes the folder complete."""
        if self.manifest is None:
            self._close_shard()
            manifest = Manifest(self.kind, tuple(self._shards), self.meta)
            with replacing(self.folder / MANIFEST) as temporary:
                temporary.write_text(manifest.to_json(), encoding="utf-8")
            (self.folder / PARTIAL).unlink(missing_ok=True)
            self.manifest = manifest
        return self.manifest


# ------------------------------------------------------------------------------------------------------------ verifying


def _hash_and_count(path: Path) -> tuple[str, int, Damage]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        file.seek(0)
        damage = Damage()
        samples = sum(1 for _ in iter_samples(file, extensions=(), max_member_bytes=0, damage=damage))
    return digest.hexdigest(), samples, damage


def verify(folder: str | os.PathLike, hashes: bool = True) -> list[str]:
    """Compare a local shard folder with its manifest.

    Args:
        folder: the shard folder.
        hashes: also read every shard, to compare its sha256 and count its samples; otherwise only names and sizes.

    Returns:
        One sentence for each thing that is wrong; an empty list when all is well.

    Raises:
        FileNotFoundError, DataError: as `Manifest.load`.
    """
    manifest, folder = Manifest.load(folder), Path(folder)
    problems = []
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            problems.append(f"{shard.name} is missing ({shard.samples} samples).")
            continue
        size = path.stat().st_size
        if not hashes:
            if size != shard.bytes:
                problems.append(f"{shard.name} has {size} bytes; the manifest says {shard.bytes}.")
            continue
        digest, samples, damage = _hash_and_count(path)
        if digest == shard.sha256 and samples == shard.samples:
            continue
        words = [f"{size} of {shard.bytes} bytes"] if size != shard.bytes else []
        words += damage.notes
        if samples != shard.samples:
            words.append(f"{samples} of {shard.samples} samples found")
        problems.append(f"{shard.name} differs from what was written: {', '.join(words) or 'changed content'}.")
    listed = {shard.name for shard in manifest.shards}
    extra = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    if extra:
        problems.append(f"{', '.join(extra[:5])}{' …' if len(extra) > 5 else ''}: not in the manifest, never read.")
    return problems


def build_manifest(folder: str | os.PathLike, kind: str, meta: Mapping[str, Any] | None = None) -> Manifest:
    """Write the manifest of a folder of webdataset tar files made by another tool, by reading each file once.

    Raises:
        FileNotFoundError: no such folder, or no tar files in it.
        DataError: a tar file is damaged or empty.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}.")
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no .tar files.")
    entries = []
    for path in paths:
        digest, samples, damage = _hash_and_count(path)
        if damage.notes or not samples:
            raise DataError(f"{path} cannot be listed: {', '.join(damage.notes) or 'no samples'}. Mend or remove it.")
        entries.append(ShardEntry(path.name, samples, path.stat().st_size, digest))
    meta = dict(meta or {})
    if kind != "codes" and "captions" not in meta:
        from tokgen.data.decode import decode_caption

        with open(paths[0], "rb") as file:
            _, first = next(iter_samples(file, extensions=("txt", "json"), max_member_bytes=1 << 20))
        meta["captions"] = decode_caption(first.members) is not None
    manifest = Manifest(kind, tuple(entries), meta)
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")
    return manifest
