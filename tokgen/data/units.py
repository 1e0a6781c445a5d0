"""A shard folder made from another one by any number of processes, which share the work and never wait for an answer.

The samples of the source, in its manifest's order, are cut into units of `max_samples`; how many processes there are does not
enter. A process takes a unit that is neither done nor held by another, writes it as a shard folder of its own and renames that
into place. Whoever finds all units done puts their shards together and writes the manifest.

    OUT/.units/run.json            what is being made: the same for all who take part
    OUT/.units/00003.lock          locked by the process that works at unit 3; the lock ends with the process, however it ends
    OUT/.units/00003.tmp-…/        unit 3, being written
    OUT/.units/00003/              unit 3, done: its shards, and a manifest whose meta counts what was skipped
    OUT/00000.tar, …               the shards of all units, moved here at the end
    OUT/manifest.json              written last; `.units` is then removed

Processes may start and end at any time, under torchrun or not, on machines that share the file system. A folder is never
renamed onto one that is done, so a unit made twice does no harm.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tokgen.data.decode import MAX_MEMBER_BYTES
from tokgen.data.shards import MANIFEST, PARTIAL, UNITS, Manifest, ShardEntry, ShardWriter
from tokgen.data.tar import RawSample, join, read_samples
from tokgen.errors import DataError
from tokgen.files import replacing, why_unwritten, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

_RUN, _ASSEMBLY = "run.json", "assembly"
_POLL = 0.5  # seconds from one look at what others do to the next
_PATIENCE = 60.0  # seconds of waiting after which it is said for whom
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

Work = Callable[[Iterator[RawSample], ShardWriter, Counter], None]


@dataclass(frozen=True)
class Unit:
    """A run of consecutive samples: of each shard it touches, the first one and the one after the last (None: to its end)."""

    number: int
    parts: tuple[tuple[str, int, int | None], ...]

    @property
    def name(self) -> str:
        return f"{self.number:05d}"

    def samples(self, source: str | os.PathLike[str], extensions: Collection[str]) -> Iterator[RawSample]:
        """Its samples, in order. Samples before them are passed over without being read."""
        for name, first, end in self.parts:
            inside = range(first, 1 << 62 if end is None else end)
            for index, raw in read_samples(
                join(os.fspath(source), name), extensions=extensions, max_member_bytes=MAX_MEMBER_BYTES, wanted=inside.__contains__
            ):  # fmt: skip
                if index >= inside.stop:
                    break
                if index >= first:
                    yield raw


def units_of(manifest: Manifest, max_samples: int) -> list[Unit]:
    """All samples of a shard folder in units of `max_samples`; the last may have fewer."""
    units: list[Unit] = []
    parts: list[tuple[str, int, int | None]] = []
    room = max_samples
    for shard in manifest.shards:
        first = 0
        while first < shard.samples:
            end = min(shard.samples, first + room)
            parts.append((shard.name, first, None if end == shard.samples else end))
            room -= end - first
            first = end
            if not room:
                units.append(Unit(len(units), tuple(parts)))
                parts, room = [], max_samples
    return [*units, Unit(len(units), tuple(parts))] if parts else units


@dataclass
class UnitsReport:
    """Samples written by this process, by others meanwhile, and before it began; those skipped, by reason.

    `skipped` counts the whole set when `whole`, which one process reports; else what this process skipped.
    """

    done: str
    written: int = 0
    others: int = 0
    kept: int = 0
    skipped: Counter = field(default_factory=Counter)
    whole: bool = False

    def __str__(self) -> str:
        text = f"{self.written} samples {self.done}"
        if self.others:
            text += f", {self.others} by other processes"
        if self.kept:
            text += f", {self.kept} kept from an earlier run"
        if self.skipped:
            text += ", skipped: " if self.whole else ", skipped by this process: "
            text += ", ".join(f"{n} ({reason})" for reason, n in sorted(self.skipped.items()))
        return text


def begun_meta(out: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Meta of what a folder holds or of the run that was begun in it; None of a folder that holds neither."""
    # in this order: the first is removed after the second is written
    for path in (Path(out, UNITS, _RUN), Path(out, MANIFEST)):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            return Manifest.from_json(text, str(path)).meta if path.name == MANIFEST else json.loads(text)["meta"]
    return None


def share_units(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    work: Work,
    *,
    kind: str,
    meta: Mapping[str, Any],
    extensions: Collection[str],
    max_samples: int,
    done: str,
    progress: str | None = None,
) -> UnitsReport:
    """Take part in making the shard folder `out` from `source`, until it is complete.

    Args:
        source: a shard folder with a manifest.
        out: folder to make; one that is complete is left as it is, one that was begun is continued.
        work: called with the samples of a unit, the writer of its shards, and a counter of what it skips, by reason. What it
            writes must follow from the samples alone.
        kind, meta: of `out`, see `ShardWriter`.
        extensions: of the members that `work` needs.
        max_samples: samples in a unit, which becomes a shard, or several if it is larger than shards are.
        done: what the report says that samples were.
        progress: what the progress bar says, shown by the first rank; None shows none.

    Raises:
        DataError: `out` holds or was begun with something else, has lost shards, or no sample of the source can be used.
    """
    if max_samples < 1:
        raise ValueError(f"max_samples must be positive, got {max_samples}.")
    sharing = _Sharing(Path(out), source, work, kind, dict(meta), extensions, max_samples, UnitsReport(done))
    sharing.begin()
    sharing.take_part(progress)
    return sharing.end()


@dataclass
class _Sharing:
    """One process's part."""

    out: Path
    source: str | os.PathLike[str]
    work: Work
    kind: str
    meta: dict[str, Any]
    extensions: Collection[str]
    max_samples: int
    report: UnitsReport

    def __post_init__(self) -> None:
        self.meta = json.loads(json.dumps(self.meta))  # as it will be read again
        self.folder, self.manifest = self.out / UNITS, self.out / MANIFEST
        source = Manifest.load(self.source)
        self.samples, self.units = source.samples, units_of(source, self.max_samples)
        shards = json.dumps([asdict(shard) for shard in source.shards])
        self.plan = {
            "kind": self.kind,
            "meta": self.meta,
            "max_samples": self.max_samples,
            "source": hashlib.sha256(shards.encode()).hexdigest(),
        }
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.locks = fcntl is not None

    # -- the folder

    def begin(self) -> None:
        """Find out what `out` is, and begin it if it is nothing yet."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.folder.is_dir() and not self.manifest.is_file():  # in this order, see `end`
            others = sorted(path.name for path in self.out.glob("*.tar")) + [PARTIAL] * (self.out / PARTIAL).exists()
            if others:
                raise DataError(
                    f"{self.out} holds {others[0]} and no {MANIFEST}: another command wrote there, or an older tokgen was "
                    "interrupted; give another folder or remove this one"
                )
            new = self._unique(UNITS)
            write_json(self.plan, new / _RUN)
            self._rename(new, self.folder)
        try:
            begun = json.loads((self.folder / _RUN).read_text(encoding="utf-8"))
        except FileNotFoundError:  # complete
            begun = {**self.plan, **self._check_complete()}
        for fact, value in self.plan.items():
            if begun.get(fact) != value:
                what = {
                    "max_samples": f"max_samples {begun.get(fact)} and not {value}",
                    "source": "other source shards",
                }.get(fact, f"another {fact} than asked for now")
                raise DataError(
                    f"{self.out} was begun with {what}, so it cannot be continued; give another folder or remove this one."
                )

    def _check_complete(self) -> dict[str, Any]:
        whole = Manifest.load(self.out)
        for shard in whole.shards:
            if not _is_whole(self.out / shard.name, shard):
                raise DataError(
                    f"{self.out} is damaged: {shard.name} is missing or not as long as its manifest says; remove the folder "
                    "and make it again"
                )
        self.report.kept = whole.samples
        if whole.samples < self.samples and self.rank == 0:
            log.warning(
                "%s is complete with %d samples, and %s has %d: the others were skipped when it was made, or are new. "
                "It is left as it is.", self.out, whole.samples, self.source, self.samples,
            )  # fmt: skip
        return {"kind": whole.kind, "meta": whole.meta}

    def end(self) -> UnitsReport:
        """Remove what only a folder in the making needs. The manifest is there already."""
        if self.folder.is_dir():
            self._rename(self.folder, self._unique(UNITS))  # at once: nobody finds one that is half gone
        for path in self.out.glob(f"{UNITS}.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)
        self.report.others = Manifest.load(self.out).samples - self.report.kept - self.report.written
        return self.report

    def _unique(self, name: str) -> Path:
        return self.out / f"{name}.tmp-{uuid.uuid4().hex[:12]}"

    @staticmethod
    def _rename(folder: Path, to: Path) -> bool:
        """Whether `to` is now this folder; not if it was there before, or another process has renamed this one."""
        try:
            os.rename(folder, to)
            return True
        except OSError:
            if folder.is_dir() and not to.is_dir():
                raise
            shutil.rmtree(folder, ignore_errors=True)
            return False

    # -- the work

    def take_part(self, progress: str | None) -> None:
        """Make units until the folder is complete."""
        from rich.progress import Progress

        if self.rank == 0 and self.world > len(self.units):
            log.warning(
                "%d processes, and %d samples are %d units of max_samples=%d: give fewer samples to a unit to keep all busy",
                self.world, self.samples, len(self.units), self.max_samples,
            )  # fmt: skip
        began, told = time.monotonic(), False
        with Progress(disable=progress is None or self.rank != 0) as bar:
            task = bar.add_task(progress or "", total=self.samples)
            try:
                if not self.manifest.is_file():
                    self.report.kept = sum(self._made(self.units[number]).samples for number in self._done())
                while not self.manifest.is_file():
                    done = self._done()
                    bar.update(task, completed=min(self.samples, len(done) * self.max_samples))
                    if self._one(done, lambda: bar.advance(task)):
                        began, told = time.monotonic(), False
                    else:
                        if not told and time.monotonic() - began > _PATIENCE:
                            told = True
                            log.warning("Waiting for %s.", "; ".join(self._holders(done)))
                        time.sleep(_POLL)
            except FileNotFoundError:
                if not self.manifest.is_file():  # else another process has just completed the folder
                    raise
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                raise DataError(
                    f"{self.out} cannot be written: {why_unwritten(error)}; whole shards are kept, repeat the command to go on"
                ) from error
            bar.update(task, completed=self.samples)

    def _done(self) -> set[int]:
        return {int(name) for name in os.listdir(self.folder) if name.isdigit()}

    def _one(self, done: set[int], advance: Callable[[], None]) -> bool:
        """Do one thing that is to be done and that no other process does; False if there is none."""
        first = self.rank * len(self.units) // self.world  # ranks begin apart, and take what is left wherever it is
        for unit in self.units[first:] + self.units[:first]:
            if unit.number not in done:
                with self._held(unit.name) as held:
                    if held:
                        self._make(unit, advance)
                        return True
        if len(done) == len(self.units):
            with self._held(_ASSEMBLY) as held:
                if held:
                    self._assemble()
                    return True
        return False

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[bool]:
        """Whether it is this process that holds the lock of that name, until the block ends."""
        with open(self.folder / f"{name}.lock", "a+", encoding="utf-8") as file:
            try:
                if self.locks:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self.locks = False
                log.warning(
                    "The file system of %s has no locks (flock): processes may make the same shards, of which one is kept.",
                    self.out,
                )
            file.truncate(0)
            file.write(f"{socket.gethostname()}, process {os.getpid()}")
            file.flush()
            yield True

    def _holders(self, done: set[int]) -> list[str]:
        names = [unit.name for unit in self.units if unit.number not in done] or [_ASSEMBLY]
        return [f"{name} ({(self.folder / f'{name}.lock').read_text(encoding='utf-8')})" for name in names[:3]]

    def _make(self, unit: Unit, advance: Callable[[], None]) -> None:
        target = self.folder / unit.name
        if target.is_dir():  # since the folder was listed
            return
        if self.locks:  # so whoever began these has ended
            for left in self.folder.glob(f"{unit.name}.tmp-*"):
                shutil.rmtree(left, ignore_errors=True)
        temporary = self._unique(f"{UNITS}/{unit.name}")
        skipped: Counter = Counter()

        def samples() -> Iterator[RawSample]:
            for raw in unit.samples(self.source, self.extensions):
                yield raw
                advance()

        try:
            with ShardWriter(temporary, kind=self.kind, max_samples=self.max_samples) as writer:
                self.work(samples(), writer, skipped)
                writer.meta = {"skipped": dict(skipped)}
            if self._rename(temporary, target):
                self.report.written += writer.samples
                self.report.skipped += skipped
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _made(self, unit: Unit) -> Manifest:
        path = self.folder / unit.name / MANIFEST
        return Manifest.from_json(path.read_text(encoding="utf-8"), str(path))

    def _assemble(self) -> None:
        """Move the shards of all units to their places and write the manifest; goes on where one that was killed ended."""
        if self.manifest.is_file():
            return
        entries: list[ShardEntry] = []
        skipped: Counter = Counter()
        for unit in self.units:
            made = self._made(unit)
            for shard in made.shards:
                path = self.out / f"{len(entries):05d}.tar"
                with contextlib.suppress(FileNotFoundError):  # moved already
                    os.replace(self.folder / unit.name / shard.name, path)
                if not _is_whole(path, shard):
                    log.warning("Unit %s has lost what was written of it, and is made again.", unit.name)
                    os.rename(self.folder / unit.name, self._unique(f"{UNITS}/{unit.name}"))
                    return
                entries.append(replace(shard, name=path.name))
            skipped.update(made.meta["skipped"])
        if not entries:
            reasons = ", ".join(f"{n} ({reason})" for reason, n in sorted(skipped.items()))
            raise DataError(f"no sample of {self.source} can be used: {reasons or 'there is none'}")
        with replacing(self.manifest) as temporary:
            temporary.write_text(Manifest(self.kind, tuple(entries), self.meta).to_json(), encoding="utf-8")
        self.report.skipped, self.report.whole = skipped, True


def _is_whole(path: Path, entry: ShardEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes
