"""The quantizer's contract: continuous vectors in, codes and ids out.

`Quantizer` is what tokenizers see. `CodeQuantizer` is the part all quantizers of this package share: projections to the
width of the codes, fp32 under autocast, masks, and statistics; a method adds three functions to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError, InputError
from tokgen.pretrained import Registry

HISTOGRAM_LIMIT = 1 << 22  # larger codebooks are counted by their distinct ids, not by a histogram


@dataclass
class Quantized:
    """What a quantizer gives back.

    Attributes:
        codes: (..., d) in the dtype of z, what the decoder receives. In training a straight-through (or other) estimator
            ties it to z; in eval mode it is `lookup(ids)` bit for bit.
        ids: int64 (...) for one codebook, (..., C) for several.
        losses: weighted scalar terms, to be added to the training loss (empty in eval mode).
        stats: detached scalars of this step: "usage" (share of the codes seen in this batch) and "perplexity" (exp of the
            entropy of the batch's code histogram), and what else a quantizer reports. With several codebooks these are
            means, and "usage_0", "perplexity_0", ... hold each. In training they cover the batch of all ranks; in eval
            mode this rank's batch only, so that one rank alone may encode.
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
        """Quantize z (..., d) -> Quantized. `mask` bool (...) leaves positions out of losses and statistics.

        In training every rank must call it in every step: statistics are summed over ranks.
        """
        raise NotImplementedError

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes (..., d) of ids (...) or (..., C)."""
        raise NotImplementedError

    @classmethod
    def example_options(cls) -> dict[str, dict[str, Any]]:
        """Small sets of options by name, without `dim`, that the conformance suite builds at dim 8 and checks."""
        raise NotImplementedError


class CodeQuantizer(Quantizer):
    """A quantizer of vectors of `code_dim` channels behind linear projections, which exist only where the widths differ.

    A method implements `assign` (the ids of vectors), `embed` (the codes of ids) and `train_step` (codes with gradients,
    ids and losses); all three see fp32 vectors (n, code_dim), with autocast off.
    """

    def __init__(self, dim: int, code_dim: int | None, codebook_sizes: tuple[int, ...]) -> None:
        super().__init__()
        code_dim = dim if code_dim is None else code_dim
        if dim < 1 or code_dim < 1:
            raise ConfigError(f"{type(self).__name__}: dim {dim} and code_dim {code_dim} must be at least 1")
        if not codebook_sizes or min(codebook_sizes) < 2:
            raise ConfigError(
                f"{type(self).__name__}: codebooks of {list(codebook_sizes)} codes; each needs at least 2"
            )
        self.dim, self.code_dim, self.codebook_sizes = dim, code_dim, tuple(codebook_sizes)
        self.project_in = nn.Linear(dim, code_dim) if code_dim != dim else None
        self.project_out = nn.Linear(code_dim, dim) if code_dim != dim else None
        # holds no values: it follows the module's device and dtype where a method has no weights
        self.register_buffer("like", torch.empty(0), persistent=False)

    # -- what a method implements -------------------------------------------------------------------------------------

    def assign(self, y: Tensor) -> Tensor:
        """ids int64 (n,) or (n, C) of y, fp32 (n, code_dim); no gradients."""
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        """Codes (n, code_dim) of ids (n,) or (n, C)."""
        raise NotImplementedError

    def train_step(self, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(codes (n, code_dim) with gradients, ids, losses) of y (n, code_dim); updates the state of the codebook.

        `keep` bool (n,) leaves vectors out of losses and state; None keeps all.
        """
        raise NotImplementedError

    # -- the contract -------------------------------------------------------------------------------------------------

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        if z.ndim < 2 or z.shape[-1] != self.dim or not z.is_floating_point():
            raise InputError(
                f"{type(self).__name__} takes float z (..., {self.dim}), channels last; got {z.dtype} {tuple(z.shape)}"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != z.shape[:-1]):
            raise InputError(f"mask must be bool {tuple(z.shape[:-1])}; got {mask.dtype} {tuple(mask.shape)}")
        keep = None if mask is None else mask.reshape(-1)
        with torch.autocast(z.device.type, enabled=False):
            y = _linear(self.project_in, z.reshape(-1, self.dim))  # (n, code_dim)
            if self.training:
                codes, ids, losses = self.train_step(y, keep)
                codes = _linear(self.project_out, codes).reshape(z.shape)
            else:
                ids, losses = self.assign(y), {}
        ids = ids.reshape(*z.shape[:-1], *ids.shape[1:])
        if not self.training:
            codes = self.lookup(ids)
        stats = self.usage(ids if mask is None else ids[mask])
        return Quantized(codes.to(z.dtype), ids, losses, stats)

    def lookup(self, ids: Tensor) -> Tensor:
        if ids.dtype != torch.int64:
            raise InputError(f"ids must be int64, got {ids.dtype}; cast with .long()")
        shape = ids.shape if len(self.codebook_sizes) == 1 else ids.shape[:-1]
        flat = ids.reshape(-1) if len(self.codebook_sizes) == 1 else ids.reshape(-1, ids.shape[-1])
        with torch.autocast(ids.device.type, enabled=False):
            codes = _linear(self.project_out, self.embed(flat))
        return codes.reshape(*shape, self.dim).to(self.like.dtype)

    @torch.no_grad()
    def usage(self, ids: Tensor) -> dict[str, Tensor]:
        """Usage and perplexity of ids (..., [C]); over all ranks in training."""
        if len(self.codebook_sizes) == 1:
            return code_usage(ids.reshape(-1), self.codebook_sizes[0], over_ranks=self.training)
        each = [
            code_usage(ids[..., c].reshape(-1), size, over_ranks=self.training)
            for c, size in enumerate(self.codebook_sizes)
        ]
        stats = {name: torch.stack([s[name] for s in each]).mean() for name in each[0]}
        return stats | {f"{name}_{c}": value for c, s in enumerate(each) for name, value in s.items()}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, code_dim={self.code_dim}, codebook_sizes={self.codebook_sizes}"


def _linear(layer: nn.Linear | None, x: Tensor) -> Tensor:
    """`layer` in fp32, whatever its own dtype; x itself in fp32 without one."""
    x = x.float()
    return x if layer is None else F.linear(x, layer.weight.float(), layer.bias.float())


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The value of codes with the gradient of z (Bengio et al. 2013, arXiv 1308.3432)."""
    return z + (codes - z).detach()


def masked_mean(x: Tensor, keep: Tensor | None) -> Tensor:
    """Mean of x (n, ...) over all elements of the rows that `keep` (n,) holds; 0 if there are none."""
    if keep is None:
        return x.mean()
    rows = keep.view(-1, *[1] * (x.ndim - 1))
    return torch.where(rows, x, 0).sum() / (keep.sum() * x.shape[1:].numel()).clamp(min=1)


QUANTIZERS: Registry[Quantizer] = Registry(
    "quantizer",
    {
        "vq": "tokgen.quantizers.vq:VQ",
        "simvq": "tokgen.quantizers.simvq:SimVQ",
        "ibq": "tokgen.quantizers.ibq:IBQ",
        "fsq": "tokgen.quantizers.fsq:FSQ",
        "lfq": "tokgen.quantizers.lfq:LFQ",
        "bsq": "tokgen.quantizers.lfq:BSQ",
        "residual-vq": "tokgen.quantizers.residual:ResidualVQ",
        "residual-fsq": "tokgen.quantizers.residual_fsq:ResidualFSQ",
        "dual-vq": "tokgen.quantizers.dual:DualVQ",
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


# -- statistics over ranks --------------------------------------------------------------------------------------------


def code_usage(ids: Tensor, size: int, over_ranks: bool = True) -> dict[str, Tensor]:
    """ "usage" and "perplexity" of ids (n,) of a codebook of `size` codes, over the batches of all ranks."""
    if size <= HISTOGRAM_LIMIT:
        counts = torch.bincount(ids, minlength=size)
        counts = sum_over_ranks(counts) if over_ranks else counts
    else:
        ids = gather_over_ranks(ids) if over_ranks else ids
        counts = ids.unique(return_counts=True)[1]
    return usage_stats(counts, size)


def usage_stats(counts: Tensor, size: int | None = None) -> dict[str, Tensor]:
    """ "usage" and "perplexity" of a histogram of codes, int64 or float; `size` counts the codes, listed or not."""
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-12).log()).sum()
    usage = (counts > 0).sum().double() / (len(counts) if size is None else size)
    return {"usage": usage.float(), "perplexity": entropy.exp().float()}


def world_size() -> int:
    """Ranks of the default process group; 1 when there is none."""
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if on else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """x summed over all ranks of the default process group, or x itself when there is none."""
    if world_size() > 1:
        x = x.clone()
        torch.distributed.all_reduce(x)
    return x


def gather_over_ranks(x: Tensor) -> Tensor:
    """x (n_r, ...) of all ranks, one after the other, in the order of ranks; n_r may differ."""
    if world_size() == 1:
        return x
    sizes = rank_sizes(len(x), x.device)
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes)])


def rank_sizes(n: int, device: torch.device) -> list[int]:
    """The n of every rank."""
    if world_size() == 1:
        return [n]
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    torch.distributed.all_gather(sizes, torch.tensor([n], device=device))
    return [int(size) for size in sizes]
