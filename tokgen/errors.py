"""The package's own errors: one sentence each that names the input, what was expected, and the way out.

The command line prints that sentence and ends with code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

from collections.abc import Iterator


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those it came from, each once: an error that is raised again may come from itself."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and not any(link is other for other in seen):
        seen.append(link)
        yield link
        link = link.__cause__ or link.__context__


class TokgenError(Exception):
    """Base of every error that a user can mend."""


class ConfigError(TokgenError, ValueError):
    """A configuration value that cannot work: unknown name, wrong type, sizes that do not fit together."""


class InputError(TokgenError, ValueError):
    """An input of the wrong shape, dtype, size or range."""


class CheckpointError(TokgenError):
    """A checkpoint folder or file that is missing, incomplete, or of another model."""


class TokenizerMismatch(TokgenError):
    """Tokens that were made by another tokenizer than the one asked to decode them."""


class DataError(TokgenError):
    """Shards or samples that are missing, damaged, or of the wrong kind."""


class MissingDependency(TokgenError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""
