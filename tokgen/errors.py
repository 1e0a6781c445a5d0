"""The package's own errors: one sentence each that names the input, what was expected, and the way out.

The command line prints that sentence and ends with code 2; `--debug` shows the traceback.
"""

from __future__ import annotations


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
