"""`Tokens` and `Layout`: what every tokenizer emits and every generator consumes.

`Tokens` is a batch of integer ids together with all that is needed to give them meaning: how they are laid out, how many
codes each codebook has, which ids are real (dynamic lengths), and the fingerprint of the tokenizer that made them.
Nothing continuous hides in tokens.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokgen.errors import CheckpointError, InputError, TokgenError


class Layout:
    """How N token positions are arranged, and which of their prefixes decode.

    A layout is a small immutable value: two layouts are equal when their dictionaries are.
    """

    kinds: ClassVar[dict[str, type[Layout]]] = {}

    def __init_subclass__(cls) -> None:
        Layout.kinds[cls.__name__] = cls

    @property
    def length(self) -> int:
        """Number of token positions N of a full item."""
        raise NotImplementedError

    def prefixes(self) -> tuple[int, ...]:
        """The prefix lengths, ascending, that decode; the full length is always the last."""
        return (self.length,)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, as plain data."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `Layout.from_dict` reads back; goes into files and shard manifests."""
        return {"kind": type(self).__name__, **self.arguments()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Layout:
        """The layout that `to_dict` described. Raises InputError for an unknown kind."""
        data = dict(data)
        kind = data.pop("kind", None)
        if kind not in Layout.kinds:
            raise InputError(f"unknown token layout {kind!r}; expected one of {', '.join(sorted(Layout.kinds))}")
        return Layout.kinds[kind](**data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.arguments().items())})"


class Grid(Layout):
    """`Grid(h, w)` for images, `Grid(t, h, w)` for video; raster order, time slowest. Only the full grid decodes."""

    def __init__(self, *shape: int, **named: int) -> None:
        if named:
            shape = tuple(named[axis] for axis in ("t", "h", "w") if named.get(axis) is not None)
        if len(shape) not in (2, 3) or any(int(n) < 1 for n in shape):
            raise InputError(f"Grid takes (h, w) or (t, h, w), all at least 1; got {shape}")
        self.shape = tuple(int(n) for n in shape)

    @property
    def t(self) -> int | None:
        return self.shape[0] if len(self.shape) == 3 else None

    @property
    def h(self) -> int:
        return self.shape[-2]

    @property
    def w(self) -> int:
        return self.shape[-1]

    @property
    def length(self) -> int:
        return math.prod(self.shape)

    def arguments(self) -> dict[str, Any]:
        return dict(zip(("t", "h", "w")[-len(self.shape) :], self.shape))


class Sequence(Layout):
    """`n` tokens in causal order (SEED, LaVIT). With `nested`, every prefix decodes (nested dropout)."""

    def __init__(self, n: int, nested: bool = False) -> None:
        if int(n) < 1:
            raise InputError(f"Sequence takes a length of at least 1; got {n}")
        self.n, self.nested = int(n), bool(nested)

    @property
    def length(self) -> int:
        return self.n

    def prefixes(self) -> tuple[int, ...]:
        return tuple(range(1, self.n + 1)) if self.nested else (self.n,)

    def arguments(self) -> dict[str, Any]:
        return {"n": self.n, "nested": self.nested}


class Scales(Layout):
    """Square maps of growing side, coarse to fine (VAR, TokenFlow): `Scales((1, 2, 4))` has 1 + 4 + 16 ids.

    Every prefix of whole scales decodes.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = tuple(int(s) for s in sizes)
        if not self.sizes or any(s < 1 for s in self.sizes) or list(self.sizes) != sorted(self.sizes):
            raise InputError(f"Scales takes ascending sides of at least 1; got {self.sizes}")

    @property
    def length(self) -> int:
        return sum(s * s for s in self.sizes)

    def prefixes(self) -> tuple[int, ...]:
        return tuple(sum(s * s for s in self.sizes[: k + 1]) for k in range(len(self.sizes)))

    def arguments(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes)}


class Trajectories(Layout):
    """Up to `n` trajectories of a clip of `t` frames on a grid of `h` x `w`, one token each; the count follows the scene.

    The largest come first, and every prefix decodes: to a clip of the first trajectories alone.
    """

    def __init__(self, t: int, h: int, w: int, n: int) -> None:
        self.t, self.h, self.w, self.n = int(t), int(h), int(w), int(n)
        if min(self.t, self.h, self.w, self.n) < 1:
            raise InputError(f"Trajectories takes t, h, w, n of at least 1; got {(t, h, w, n)}")

    @property
    def length(self) -> int:
        return self.n

    def prefixes(self) -> tuple[int, ...]:
        return tuple(range(1, self.n + 1))

    def arguments(self) -> dict[str, Any]:
        return {"t": self.t, "h": self.h, "w": self.w, "n": self.n}


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of discrete visual tokens.

    Args:
        ids: int64 (B, N), or (B, N, C) for C codebooks. Ids under a False mask are set to 0.
        layout: how the N positions are arranged. N may be a prefix of `layout.length`.
        codebook_sizes: number of codes of each of the C codebooks.
        mask: bool (B, N), True where a token is real; None means all are.
        tokenizer: fingerprint of the tokenizer that made them; "" when unknown.
        side: named int64 tensors (B, ...) that decoding needs beside the ids.
        side_sizes: alphabet size of each side tensor, so that `bits` counts them.

    Raises:
        InputError: a dtype or shape that does not fit the above.
    """

    ids: Tensor
    layout: Layout
    codebook_sizes: tuple[int, ...]
    mask: Tensor | None = None
    tokenizer: str = ""
    side: dict[str, Tensor] = field(default_factory=dict)
    side_sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen dataclass)
        if self.ids.dtype != torch.int64:
            raise InputError(f"Tokens.ids must be int64, got {self.ids.dtype}; cast with .long()")
        if self.ids.ndim not in (2, 3):
            raise InputError(f"Tokens.ids must be (B, N) or (B, N, C), got shape {tuple(self.ids.shape)}")
        set_("codebook_sizes", tuple(int(k) for k in self.codebook_sizes))
        if self.codebooks != len(self.codebook_sizes):
            raise InputError(f"ids hold {self.codebooks} codebook(s) but codebook_sizes is {self.codebook_sizes}")
        if self.ids.shape[1] > self.layout.length:
            raise InputError(f"{self.ids.shape[1]} tokens do not fit {self.layout} of length {self.layout.length}")
        if self.mask is None:
            set_("mask", torch.ones(self.ids.shape[:2], dtype=torch.bool, device=self.ids.device))
        elif self.mask.dtype != torch.bool or self.mask.shape != self.ids.shape[:2]:
            raise InputError(
                f"Tokens.mask must be bool {tuple(self.ids.shape[:2])}, got {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        else:
            keep = self.mask if self.ids.ndim == 2 else self.mask[..., None]
            set_("ids", self.ids.masked_fill(~keep, 0))
        if set(self.side) != set(self.side_sizes):
            raise InputError(
                f"side {sorted(self.side)} and side_sizes {sorted(self.side_sizes)} name different tensors"
            )
        for name, value in self.side.items():
            if value.dtype != torch.int64 or value.shape[0] != len(self):
                raise InputError(f"side[{name!r}] must be int64 with {len(self)} rows, got {value.dtype} {value.shape}")

    # -- size ---------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def codebooks(self) -> int:
        return 1 if self.ids.ndim == 2 else self.ids.shape[2]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def lengths(self) -> Tensor:
        """Number of real tokens of each item, int64 (B,)."""
        return self.mask.sum(1)

    @property
    def bits(self) -> Tensor:
        """Bits of each item at uniform code length, side information included, float64 (B,)."""
        per_token = sum(math.log2(k) for k in self.codebook_sizes)
        side = sum(math.log2(self.side_sizes[n]) * v[0].numel() for n, v in self.side.items()) if len(self) else 0.0
        return self.lengths.double() * per_token + side

    # -- batch --------------------------------------------------------------------------------------------------------

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Tokens:
        """Items of the batch; an integer keeps the batch dimension, as (1, N)."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        side = {name: value[index] for name, value in self.side.items()}
        return replace(self, ids=self.ids[index], mask=self.mask[index], side=side)

    def __iter__(self) -> Iterator[Tokens]:
        return (self[i] for i in range(len(self)))

    @staticmethod
    def cat(parts: Iterable[Tokens]) -> Tokens:
        """One batch of several; shorter ones are padded. Raises InputError if they are not of one kind."""
        parts = list(parts)
        if not parts:
            raise InputError("Tokens.cat needs at least one batch")
        first = parts[0]
        for p in parts[1:]:
            for name in ("layout", "codebook_sizes", "tokenizer", "side_sizes"):
                if getattr(p, name) != getattr(first, name):
                    raise InputError(f"Tokens.cat: {name} differs: {getattr(first, name)!r} and {getattr(p, name)!r}")
        n = max(p.ids.shape[1] for p in parts)

        def pad(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_zeros(x.shape[0], n - x.shape[1], *x.shape[2:])], 1)

        side = {name: torch.cat([p.side[name] for p in parts]) for name in first.side}
        ids, mask = torch.cat([pad(p.ids) for p in parts]), torch.cat([pad(p.mask) for p in parts])
        return replace(first, ids=ids, mask=mask, side=side)

    def to(self, device: torch.device | str) -> Tokens:
        side = {name: value.to(device) for name, value in self.side.items()}
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device), side=side)

    def cpu(self) -> Tokens:
        return self.to("cpu")

    def prefix(self, n: int) -> Tokens:
        """The first n positions. Raises InputError unless the layout lets that prefix decode."""
        if n not in self.layout.prefixes():
            allowed = self.layout.prefixes()
            shown = ", ".join(map(str, allowed[:8])) + (", …" if len(allowed) > 8 else "")
            raise InputError(f"a prefix of {n} tokens of {self.layout} does not decode; allowed: {shown}")
        return replace(self, ids=self.ids[:, :n], mask=self.mask[:, :n])

    def validate(self) -> Tokens:
        """Check that every id and side value is in range (reads the device). Raises InputError; returns self."""
        ids = self.ids if self.ids.ndim == 3 else self.ids[..., None]
        for c, size in enumerate(self.codebook_sizes):
            if ids.numel() and (int(ids[..., c].min()) < 0 or int(ids[..., c].max()) >= size):
                raise InputError(
                    f"ids of codebook {c} reach {int(ids[..., c].min())}..{int(ids[..., c].max())}; "
                    f"its {size} codes are 0..{size - 1}"
                )
        for name, value in self.side.items():
            if value.numel() and (int(value.min()) < 0 or int(value.max()) >= self.side_sizes[name]):
                raise InputError(f"side[{name!r}] leaves its range 0..{self.side_sizes[name] - 1}")
        return self

    # -- as a sequence for a language model ---------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        """Ids a language model needs for these codes: codebooks lie one after the other."""
        return sum(self.codebook_sizes)

    def to_sequence(self) -> tuple[Tensor, Tensor]:
        """(ids int64 (B, N*C), mask bool (B, N*C)); codebook c is offset by the sizes before it, positions stay together."""
        if self.ids.ndim == 2:
            return self.ids, self.mask
        start = torch.tensor(self.codebook_sizes, device=self.device).cumsum(0) - torch.tensor(
            self.codebook_sizes, device=self.device
        )
        return (self.ids + start).flatten(1), self.mask.repeat_interleave(self.codebooks, 1)

    def from_sequence(self, ids: Tensor, mask: Tensor | None = None) -> Tokens:
        """The inverse of `to_sequence` for new ids (B', N'*C) of the same layout, codebooks and tokenizer."""
        c = self.codebooks
        if c > 1:
            sizes = torch.tensor(self.codebook_sizes, device=ids.device)
            ids = ids.unflatten(1, (-1, c)) - (sizes.cumsum(0) - sizes)
            mask = None if mask is None else mask[:, ::c]
        return Tokens(ids, self.layout, self.codebook_sizes, mask, self.tokenizer)

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        from tokgen.pretrained import write_safetensors

        tensors = {"ids": self.ids, "mask": self.mask, **{f"side.{k}": v for k, v in self.side.items()}}
        about = {
            "layout": self.layout.to_dict(),
            "codebook_sizes": self.codebook_sizes,
            "tokenizer": self.tokenizer,
            "side_sizes": self.side_sizes,
        }
        write_safetensors(tensors, path, {"format": "tokgen-tokens", "tokens": json.dumps(about)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Tokens:
        """Read a file that `save` wrote. Raises CheckpointError if it is not one."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"no token file at {path}; `tokgen encode IMAGE --model DIR --out FILE` writes one")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["tokens"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            side = {k.removeprefix("side."): v for k, v in tensors.items() if k.startswith("side.")}
            if not isinstance(about["tokenizer"], str):
                raise ValueError(f"tokenizer {about['tokenizer']!r} is no fingerprint")
            return Tokens(
                tensors["ids"],
                Layout.from_dict(about["layout"]),
                about["codebook_sizes"],
                tensors["mask"],
                about["tokenizer"],
                side,
                {name: int(size) for name, size in about["side_sizes"].items()},
            ).validate()
        except TokgenError:
            raise
        except (
            SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError,
            RuntimeError,
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"{path} is not a tokgen token file ({error}); expected one from `tokgen encode`"
            ) from None
