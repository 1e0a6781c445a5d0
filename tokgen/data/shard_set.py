"""A data set: shards of one or several folders, what their manifests say, and which of their samples are used."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tokgen.data.decode import MAX_MEMBER_BYTES, BadSample, decode_json
from tokgen.data.shards import Manifest
from tokgen.data.tar import RawSample, Unreadable, join, read_samples, scheme
from tokgen.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One shard of a set. `selected` holds the indices of the samples to use, ascending; None means all."""

    folder: str
    name: str
    samples: int
    bytes: int
    selected: np.ndarray | None = None

    @property
    def location(self) -> str:
        return join(self.folder, self.name)

    @property
    def count(self) -> int:
        return self.samples if self.selected is None else len(self.selected)


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split: one or more shard folders of the same kind.

    `unreadable` counts samples a filter could not see because their shard is damaged.
    """

    kind: str
    meta: dict[str, Any]
    shards: tuple[Shard, ...]
    allow_shell_urls: bool = False
    unreadable: int = 0

    @property
    def samples(self) -> int:
        return sum(shard.count for shard in self.shards)

    @classmethod
    def open(cls, folders: str | os.PathLike | Sequence[str | os.PathLike], allow_shell_urls: bool = False) -> ShardSet:
        """Read the manifests of `folders` (local, http(s), s3, gs, hf; `pipe:` when allowed).

        Raises:
            FileNotFoundError: a folder or its manifest does not exist.
            DataError: a folder cannot be read, is empty, or the folders do not belong together.
        """
        names = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
        if not names:
            raise DataError("No shard folder was given.")
        names = [os.fspath(name) for name in names]
        manifests = [Manifest.load(name, allow_shell_urls) for name in names]
        first = manifests[0]
        for name, manifest in zip(names, manifests):
            if manifest.kind != first.kind:
                raise DataError(
                    f"{names[0]} holds {first.kind} and {name} holds {manifest.kind}: they cannot be mixed."
                )
            for fact in ("tokenizer", "layout", "codebook_sizes") if first.kind == "codes" else ():
                if manifest.meta.get(fact) != first.meta.get(fact):
                    raise DataError(
                        f"The codes in {names[0]} and {name} were made by different tokenizers (their {fact} differs); "
                        f"tokenize both with one."
                    )
        meta = dict(first.meta)
        if not all(manifest.meta.get("captions", True) for manifest in manifests):
            meta["captions"] = False
        if any(manifest.meta.get("embedding") != meta.get("embedding") for manifest in manifests):
            meta.pop("embedding", None)  # of some samples only, or not of one encoder: none that could be used
        if len({features_identity(manifest.meta) for manifest in manifests}) > 1:
            meta.pop("features", None)
        if any(manifest.meta.get("trajectories") != meta.get("trajectories") for manifest in manifests):
            meta.pop("trajectories", None)
        shards = tuple(
            Shard(name, shard.name, shard.samples, shard.bytes)
            for name, manifest in zip(names, manifests)
            for shard in manifest.shards
            if shard.samples
        )
        if not shards:
            raise DataError(f"{', '.join(names)}: the manifest lists no samples.")
        return cls(first.kind, meta, shards, allow_shell_urls)

    def check_files(self) -> None:
        """Warn of local shards that are missing, unreadable, or of another size than the manifest's.

        Raises:
            FileNotFoundError, DataError: half of the samples or more are out of reach; names the first few shards.
        """
        missing, closed, resized, total, lost = [], [], [], 0, 0
        for shard in self.shards:
            if scheme(shard.folder):
                continue
            total += 1
            try:
                found = os.stat(shard.location)
            except FileNotFoundError:
                missing.append(shard.location)
            except OSError:
                closed.append(shard.location)
            else:
                if stat.S_ISREG(found.st_mode) and os.access(shard.location, os.R_OK):
                    if found.st_size != shard.bytes:
                        resized.append(shard.location)
                    continue
                closed.append(shard.location)
            lost += shard.count
        for kind, named, what in (
            (FileNotFoundError, missing, "of the manifest are missing"),
            (DataError, closed, "cannot be read (no permission, or not a file)"),
        ):
            if named and 2 * lost >= self.samples:
                raise kind(
                    f"{len(named)} of {total} shards {what}: {some(named)}. Copy them again, or pack the data set anew."
                )
            if named:
                log.warning(
                    "%d of %d shards %s: %s. Others stand in for their samples, which will be counted as missing.",
                    len(named), total, what, some(named),
                )  # fmt: skip
        if resized:
            log.warning(
                "%d of %d shards do not have the size that the manifest gives: %s. Samples that are lost will be counted.",
                len(resized), total, some(resized),
            )  # fmt: skip

    def select(self, where: Mapping[str, Any]) -> ShardSet:
        """The samples whose JSON metadata has, for each field of `where`, one of the values given for it.

        Reads the JSON members of every shard once. A field that holds a list matches when any of its elements does.

        Raises:
            DataError: no sample matches.
        """
        allowed = {
            name: {str(v) for v in (values if isinstance(values, (list, tuple, set)) else [values])}
            for name, values in where.items()
        }

        def matches(raw: RawSample) -> bool:
            try:
                data = decode_json(raw.members["json"])
            except (KeyError, BadSample):
                return False
            for name, values in allowed.items():
                value = data.get(name)
                if not {str(v) for v in (value if isinstance(value, list) else [value])} & values:
                    return False
            return True

        shards, lost = [], 0
        for shard in self.shards:
            found, indices = 0, []
            options = {"extensions": ("json",), "max_member_bytes": MAX_MEMBER_BYTES}
            with contextlib.suppress(Unreadable):
                for index, raw in read_samples(shard.location, self.allow_shell_urls, **options):
                    found = index + 1
                    if index < shard.samples and matches(raw):
                        indices.append(index)
            lost += max(0, shard.samples - found)
            if indices:
                shards.append(replace(shard, selected=np.asarray(indices, dtype=np.int64)))
        if not shards:
            raise DataError(f"No sample of {some([s.location for s in self.shards])} matches the filter {dict(where)}.")
        if lost:
            log.warning("%d samples are missing from damaged shards and could not be filtered.", lost)
        return replace(self, shards=tuple(shards), unreadable=lost)


def features_identity(meta: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Which features a manifest's meta promises: of which encoder, their shape, and of which pictures; None without any."""
    made = meta.get("features")
    return made and (made["fingerprint"], tuple(made["shape"]), made["size"], made["resize"])


def some(names: Sequence[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
