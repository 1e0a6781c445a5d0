"""Protocols: everything that a figure depends on besides the model, as plain data with a hash.

One checkpoint is reported with an rFID of 0.92 in one place and of 2.70 in another, because crop, filter, reference set or
number of pictures differ. Here each figure belongs to a protocol, the report holds it, and `tokgen compare` refuses figures
whose protocols differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

from tokgen.data.shards import Manifest
from tokgen.errors import DataError

FILTER = "bicubic, antialiased, on 8-bit values (torch interpolate)"
RANGE = "8-bit values 0..255"
ROUNDING = "clamp to [0, 1], times 255, round half to even"


@dataclass(frozen=True)
class Protocol:
    """How a group of figures was measured.

    Args:
        name, version: the group; the version grows when a change of code changes figures.
        reference: the reference set, see `reference_hash`.
        samples: N, pictures or clips that entered the figures.
        selection: which of the set's samples they are.
        size: height and width in pixels, "any" for pictures kept as they were.
        crop: how pictures become square: "crop" (the centre), "squash", or "none".
        filter, value_range, rounding: of resizing, and of the pixels that are compared.
        extractor, extractor_hash: the network whose features are compared, and a hash of its weights; "" without one.
        seeds: what random numbers follow from; "" where there are none.
        details: further settings of the group, plain data.
    """

    name: str
    version: int
    reference: str
    samples: int
    selection: str
    size: str
    crop: str
    filter: str = FILTER
    value_range: str = RANGE
    rounding: str = ROUNDING
    extractor: str = ""
    extractor_hash: str = ""
    seeds: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back, with the hash."""
        return {**dataclasses.asdict(self), "hash": self.hash}

    @property
    def hash(self) -> str:
        """sha256 (16 hex digits) of all fields."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "protocol") -> Protocol:
        """Read what `to_dict` wrote. Raises DataError if fields are missing or unknown, or do not have the hash written with them."""
        data = dict(data)
        written = data.pop("hash", None)
        try:
            protocol = cls(**data)
        except TypeError as error:
            raise DataError(f"{where} is not a protocol of this version of tokgen ({error}); measure again") from None
        if protocol.hash != written:
            raise DataError(
                f"{where}: the protocol {protocol.name!r} has hash {protocol.hash} and {written} is written with it; the "
                f"report was changed by hand, measure again"
            )
        return protocol

    def differences(self, other: Protocol) -> dict[str, tuple[Any, Any]]:
        """The fields in which two protocols differ, with both values; details by their own names."""
        ours, theirs = (p._flat() for p in (self, other))
        names = dict.fromkeys((*ours, *theirs))
        return {n: (ours.get(n), theirs.get(n)) for n in names if ours.get(n) != theirs.get(n)}

    def _flat(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        details = fields.pop("details")
        return fields | {f"details.{name}": value for name, value in details.items()}


def reference_hash(folder: str | os.PathLike[str]) -> str:
    """sha256 (16 hex digits) of the kind of a shard folder and the sha256 of its shards, in their order.

    It is that of the files: the same pictures packed into other shards are another reference.
    """
    manifest = Manifest.load(folder)
    return hashlib.sha256("\n".join([manifest.kind, *(s.sha256 for s in manifest.shards)]).encode()).hexdigest()[:16]
