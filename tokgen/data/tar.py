"""Reading shards: a tar scanner that loses nothing silently.

`tarfile`, and webdataset on top of it, end at the first damaged header without an error, accept compressed archives
(a small file can hold gigabytes), and read every byte even of samples that are not wanted. This scanner reads plain
tar only (POSIX.1-1988 ustar, GNU long names and base-256 sizes, POSIX.1-2001 `path` and `size` records), verifies each
header's checksum, finds the next good header after a damaged one, reads only the members that are asked for, and
says what was wrong.

Samples follow webdataset's naming: members `KEY.ext`, split at the first dot of the file name, members of one sample
adjacent.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import stat
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

from tokgen.errors import DataError, MissingDependency, TokgenError

log = logging.getLogger(__name__)
T = TypeVar("T")
BLOCK = 512
_LONG_NAME_LIMIT = 64 * 1024  # bytes of a name record: real ones have a few hundred
_SIZE_LIMIT = 1 << 60  # of a member: base-256 and records can claim what no file system can seek to
_ATTEMPTS, _FIRST_PAUSE = 6, 1.0  # of reads without progress; seconds, doubled each time: half a minute in all
_REMOTE = ("http", "https", "s3", "gs", "hf")
_EXTRA_FOR = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}


# ---------------------------------------------------------------------------------------------- where bytes come from


def scheme(path: str) -> str:
    """`"pipe"`, `"s3"`, … or `""` for a local path."""
    if path.startswith("pipe:"):
        return "pipe"
    head, separator, _ = path.partition("://")
    return head.lower() if separator else ""


def check_location(path: str, allow_shell_urls: bool = False) -> None:
    """Raise DataError unless `path` is local, one of http(s), s3, gs, hf, or an allowed `pipe:` command."""
    kind = scheme(path)
    if kind == "pipe":
        if not allow_shell_urls:
            raise DataError(
                f"{path!r} would run a shell command; pass allow_shell_urls=True if you wrote that command yourself."
            )
        if "{}" not in path:
            raise DataError(
                f"{path!r} must hold {{}} where the file name goes, such as 'pipe:ssh host cat /data/{{}}'."
            )
    elif kind and kind not in _REMOTE:
        raise DataError(f"{path!r}: scheme {kind!r} is not one of local path, {', '.join(_REMOTE)}, pipe.")


def join(folder: str, name: str) -> str:
    """Location of file `name` of a shard folder; a `pipe:` command gets the quoted name in place of `{}`."""
    if scheme(folder) == "pipe":
        return folder.replace("{}", shlex.quote(name))
    return folder.rstrip("/") + "/" + name if scheme(folder) else os.path.join(folder, name)


class _Pipe:
    """Standard output of a shell command, closed with the process."""

    def __init__(self, command: str):
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)

    def read(self, n: int = -1) -> bytes:
        return self._process.stdout.read(n)

    def seekable(self) -> bool:
        return False

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.stdout.close()  # a command still writing gets SIGPIPE
        self._process.wait()


def open_bytes(location: str, allow_shell_urls: bool = False) -> IO[bytes]:
    """Open a local path, a URL through fsspec, or (when allowed) a `pipe:` command, for reading bytes in order."""
    kind = scheme(location)
    if kind and kind not in _REMOTE and not (kind == "pipe" and allow_shell_urls):
        check_location(location)
    if not kind:
        if stat.S_ISFIFO(os.stat(location).st_mode):  # opening it would wait for a writer
            raise OSError(errno.EINVAL, "a pipe and not a file", location)
        return open(location, "rb", buffering=1 << 18)
    if kind == "pipe":
        return _Pipe(location[len("pipe:") :])
    import fsspec

    try:
        return fsspec.open(location, "rb").open()
    except ImportError as error:
        raise MissingDependency(
            f"{location!r} needs the package {_EXTRA_FOR[kind]}: pip install {_EXTRA_FOR[kind]}"
        ) from error


class Unreadable(DataError):
    """A location that cannot be read, now or after some waiting; the cause says why."""


def patiently(location: str, read: Callable[[], T], attempt: int = 0) -> T:
    """`read()`, tried again after a pause when it fails in a way that may pass: a server or a network disk that is away.

    Raises:
        Unreadable: it goes on failing, or in a way that does not pass (no such file, no permission).
    """
    while True:
        try:
            return read()
        except Exception as error:
            attempt = _pause(location, error, attempt)


def _pause(location: str, error: Exception, attempt: int) -> int:
    """Wait after a failure and return the number of failures, or raise Unreadable, or the error if it is none of reading."""
    system = isinstance(error, OSError)
    reading = system or bool(scheme(location))  # fsspec's file systems have errors of their own
    if isinstance(error, TokgenError) or not reading:
        raise error
    lasting = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError))
    if lasting or (system and error.errno == errno.EINVAL) or attempt + 1 >= _ATTEMPTS:
        why = error.strerror if system and error.strerror else f"{type(error).__name__}: {error}"
        raise Unreadable(f"{location} could not be read ({why}).") from error
    log.info("%s could not be read (%s: %s); trying again", location, type(error).__name__, error)
    time.sleep(_FIRST_PAUSE * 2**attempt)
    return attempt + 1


# ------------------------------------------------------------------------------------------------------ members of a tar


@dataclass
class Damage:
    """What a scan found wrong with one shard: plain words, in order. Empty for a sound shard."""

    notes: list[str] = field(default_factory=list)

    def add(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


class _Cursor:
    """Forward reading with a position, over files that can seek and streams that cannot."""

    def __init__(self, file: IO[bytes]):
        self.file, self.at, self.can_seek = file, 0, file.seekable()
        if self.can_seek:
            self.end = file.seek(0, 2)
            file.seek(0)

    def read(self, n: int) -> bytes:
        data = self.file.read(n)
        while len(data) < n:  # streams may return less than asked
            more = self.file.read(n - len(data))
            if not more:
                break
            data += more
        self.at += len(data)
        return data

    def skip(self, n: int) -> bool:
        """Go forward by n bytes; False when the file ends before."""
        if self.can_seek:
            self.file.seek(self.at + n)
            self.at += n
            return self.at <= self.end
        while n > 0 and (got := len(self.read(min(n, 1 << 20)))):
            n -= got
        return n == 0


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    type: bytes


def _number(raw: bytes) -> int:
    if raw[0] & 0x80:  # GNU base-256
        return int.from_bytes(raw[1:], "big")
    return int(raw.split(b"\0", 1)[0].strip() or b"0", 8)


def parse_header(block: bytes) -> _Header | None:
    """The header in a 512-byte block, or None when its checksum, numbers or name are wrong."""
    if len(block) < BLOCK:
        return None
    try:
        if sum(block) - sum(block[148:156]) + 8 * 32 != _number(block[148:156]):
            return None
        size = _number(block[124:136])
    except ValueError:
        return None
    if not 0 <= size < _SIZE_LIMIT:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _Header(name.decode("utf-8", "replace"), size, block[156:157]) if name else None


def _pax_records(data: bytes) -> dict[str, str]:
    """`"%d %s=%s\\n"` records of a POSIX extended header; broken ones end the list."""
    records: dict[str, str] = {}
    while data:
        length = data.partition(b" ")[0]
        if not length.isdigit() or int(length) <= len(length) + 1 or int(length) > len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        data = data[int(length) :]
    return records


def _next_good_header(cursor: _Cursor) -> bytes:
    """Skip blocks until one is a sound ustar header; b"" at the end of the file."""
    while len(block := cursor.read(BLOCK)) == BLOCK:
        if block[257:262] == b"ustar" and parse_header(block) is not None:
            return block
    return b""


def iter_members(file: IO[bytes], damage: Damage) -> Iterator[tuple[str, int, Callable[[], bytes | None]]]:
    """Yield (name, size, read) for each regular file of a tar, in order.

    `read()` returns the member's bytes, or None when the file ends inside them; it may be called once, before the next
    member is asked for; members that are not read are skipped without reading where the file can seek.
    Reading goes on after damaged or zeroed headers, to the end of the file; what was wrong is added to `damage`.
    """
    cursor = _Cursor(file)
    long_name: str | None = None
    long_size: int | None = None
    while True:
        block = cursor.read(BLOCK)
        if not block:
            return
        if block == bytes(BLOCK):  # end-of-archive padding, or a header overwritten with zeros: look on either way
            continue
        header = parse_header(block)
        if header is None:
            if cursor.at <= BLOCK:
                damage.add("does not start like a tar file")
            else:
                damage.add("a damaged header" if len(block) == BLOCK else "cut off inside a header")
            block = _next_good_header(cursor)
            header = parse_header(block)
            long_name = long_size = None
            if header is None:
                return
        size = header.size if long_size is None else long_size
        padded = -(-size // BLOCK) * BLOCK
        end = cursor.at + padded
        if header.type in (b"L", b"x", b"g", b"K"):
            if size > _LONG_NAME_LIMIT:
                damage.add("an oversized extended header")
                cursor.skip(padded)
                continue
            data = cursor.read(padded)[:size]
            if header.type == b"L":
                long_name = data.rstrip(b"\0").decode("utf-8", "replace")
            elif header.type == b"x":
                records = _pax_records(data)
                long_name = records.get("path", long_name)
                claimed = records.get("size", "")
                long_size = int(claimed) if claimed.isdecimal() and len(claimed) <= len(str(_SIZE_LIMIT)) else None
                if long_size is not None and long_size >= _SIZE_LIMIT:
                    long_size = None
            continue
        name, long_name, long_size = long_name or header.name, None, None
        if header.type in (b"0", b"\0", b"7"):

            def read(size: int = size) -> bytes | None:
                data = cursor.read(size)
                if len(data) == size:
                    return data
                damage.add("cut off inside a file")
                return None

            yield name, size, read
        if header.type not in (b"1", b"2", b"3", b"4", b"5", b"6"):  # links, devices and folders carry no data
            if not cursor.skip(end - cursor.at):
                damage.add("cut off inside a file")


# ------------------------------------------------------------------------------------------------------ samples of a shard


@dataclass
class RawSample:
    """Undecoded members of one sample. `problem` says why it cannot be used, as far as the tar shows."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None


def split_name(name: str) -> tuple[str, str]:
    """`"a/b.mask.NPY"` -> `("a/b", "mask.npy")`: webdataset's rule, the first dot of the file name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def iter_samples(
    file: IO[bytes],
    *,
    extensions: Collection[str],
    max_member_bytes: int,
    wanted: Callable[[int], bool] = lambda index: True,
    damage: Damage | None = None,
) -> Iterator[tuple[int, RawSample]]:
    """Yield (index in the shard, sample) in order.

    Only members with one of `extensions` are read, and only for samples whose index is `wanted`; all others come with
    no members. A member over `max_member_bytes` is not read and makes the sample a problem.
    """
    damage = Damage() if damage is None else damage
    index, sample, read_this = -1, None, False
    for name, size, read in iter_members(file, damage):
        key, extension = split_name(name)
        if sample is None or key != sample.key:
            if sample is not None:
                yield index, sample
            index, sample = index + 1, RawSample(key)
            read_this = wanted(index)
        if not read_this or extension not in extensions:
            continue
        if size > max_member_bytes:
            sample.problem = "file too large"
        elif extension in sample.members:
            sample.problem = "two files of the same kind"
        elif (data := read()) is None:
            sample.problem = "cut off"
        else:
            sample.members[extension] = data
    if sample is not None:
        yield index, sample


def read_samples(location: str, allow_shell_urls: bool = False, **options: Any) -> Iterator[tuple[int, RawSample]]:
    """`iter_samples(**options)` of a shard, wherever it lies. Reading that fails for a moment goes on where it was.

    Raises:
        Unreadable: it goes on failing; the samples before have been given.
    """
    given, attempt = -1, 0
    while True:
        try:
            with open_bytes(location, allow_shell_urls) as file:
                for index, sample in iter_samples(file, **options):
                    if index > given:
                        given, attempt = index, 0
                        yield index, sample
            return
        except Exception as error:
            attempt = _pause(location, error, attempt)
