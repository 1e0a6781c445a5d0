"""The quantizer's contract: continuous vectors in, codes and ids out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.pretrained import Registry


@dataclass
class Quantized:
    """What a quantizer gives back.

    Attributes:
        codes: (..., d), what the decoder receives. In training a straight-through (or other) estimator ties it to z; in
            eval mode it is `lookup(ids)` bit for bit.
        ids: int64 (...) for one codebook, (..., C) for several.
        losses: weighted scalar terms, to be added to the training loss (empty in eval mode).
        stats: detached scalars of this step over all ranks: "usage" (share of the codes seen in this batch) and
            "perplexity" (exp of the entropy of the batch's code histogram), and what else a quantizer reports.
    """

    codes: Tensor
    ids: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """Maps vectors of `dim` channels (last axis) to discrete codes.

    Laws: ids are int64 and in range; distances are fp32 under any autocast; memory is bounded (never N x K at once);
    eval mode is deterministic; codebook state is equal on all ranks.

    Attributes:
        dim: channels d of z and of the codes.
        codebook_sizes: number of codes of each codebook; its length is C.
    """

    dim: int
    codebook_sizes: tuple[int, ...]

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize z (..., d) -> Quantized. `mask` bool (...) leaves positions out of losses and statistics."""
        raise NotImplementedError

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes (..., d) of ids (...) or (..., C)."""
        raise NotImplementedError


QUANTIZERS: Registry[Quantizer] = Registry(
    "quantizer",
    {
        "vq": "tokgen.quantizers.vq:VQ",
        "simvq": "tokgen.quantizers.simvq:SimVQ",
        "fsq": "tokgen.quantizers.fsq:FSQ",
        "lfq": "tokgen.quantizers.lfq:LFQ",
        "bsq": "tokgen.quantizers.lfq:BSQ",
        "residual-vq": "tokgen.quantizers.residual:ResidualVQ",
    },
)


def build_quantizer(spec: dict[str, Any], dim: int) -> Quantizer:
    """The quantizer of a configuration such as {"type": "vq", "codebook_size": 16384}, for `dim` channels.

    Raises:
        ConfigError: unknown type, unknown option (the known ones are named), or a size that cannot work.
    """
    import inspect

    options = dict(spec)
    name = options.pop("type", None)
    if name is None:
        raise ConfigError(f"quantizer {spec} names no type; expected one of {', '.join(QUANTIZERS.names())}")
    cls = QUANTIZERS[name]
    known = [p for p in inspect.signature(cls).parameters if p != "dim"]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError(f"quantizer {name!r} has no option {unknown[0]!r}; expected {', '.join(known)}")
    return cls(dim=dim, **options)


def usage_stats(counts: Tensor) -> dict[str, Tensor]:
    """ "usage" and "perplexity" of a histogram of codes (K,), int64 or float."""
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-12).log()).sum()
    return {"usage": (counts > 0).double().mean().float(), "perplexity": entropy.exp().float()}


def sum_over_ranks(x: Tensor) -> Tensor:
    """x summed over all ranks of the default process group, or x itself when there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        x = x.clone()
        torch.distributed.all_reduce(x)
    return x
