"""Nearest-code search that never holds the N x K distance matrix.

Codes run along rows and vectors along columns of one tile that fits the cache. Three things make it fast and exact:

- |c|^2 / 2 - z.c is one matrix product of (|c|^2 / 2, c) with (1, -z); |z|^2 does not change the order and is left out.
- The minimum is found in two steps: a vectorised `amin` over groups of codes, then an `argmin` over groups and inside
  the winning group only. (`argmin` keeps track of indices one by one and costs more than the product at small d.)
- Every product has the same tile shape, whatever N is: the last tile of vectors is padded. BLAS picks other kernels,
  with another order of summation, for thin matrices; with fixed shapes the distance of a vector to a code does not
  depend, bit for bit, on what else is in the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tokgen.errors import InputError

METRICS = ("l2", "cosine", "dot")
GROUP = 64  # codes per group of the two-step argmin
ROW = 64  # vectors per tile are a multiple of this
CPU_TILE, GPU_TILE = 2 << 20, 64 << 20  # bytes of one block of distances
CPU_CODES, GPU_CODES = 4 << 20, 32 << 20  # bytes of one block of codes


def nearest(z: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """Index of the code nearest to each vector.

    fp32 throughout, under any autocast or matmul precision setting; no gradients. Of codes at equal distance the lowest
    index wins. Memory beside the result is one tile of distances (2 MiB on CPU, 64 MiB elsewhere), one tile of codes and
    the vectors in fp32. The result of a vector does not depend on the other vectors. A vector with NaN gets index 0.

    Args:
        z: (N, d), any floating dtype, any strides.
        codebook: (K, d), K >= 1.
        metric: "l2" (smallest Euclidean distance), "cosine" (largest cosine) or "dot" (largest inner product).

    Returns:
        int64 (N,), values in 0..K-1.

    Raises:
        InputError: shapes that do not fit, or an unknown metric.
    """
    if metric not in METRICS:
        raise InputError(f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}")
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1] or not len(codebook):
        raise InputError(
            f"nearest() takes z (N, d) and codebook (K, d) with K >= 1; got {tuple(z.shape)} and {tuple(codebook.shape)}"
        )
    return _nearest(z.detach(), codebook.detach(), metric)


# An operator of its own, so that torch.compile neither breaks the graph here nor unrolls the loops.
@torch.library.custom_op("tokgen::nearest", mutates_args=())
def _nearest(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    with torch.no_grad(), full_precision(z.device.type):
        return _search(z, codebook, metric)


@_nearest.register_fake
def _(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return z.new_empty((z.shape[0],), dtype=torch.int64)


def _search(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    n, d = z.shape
    rows, codes = tile_shape(len(codebook), d, z.device.type)
    padded = -(-n // rows) * rows
    best = z.new_full((padded,), torch.inf, dtype=torch.float32)
    ids = torch.zeros(padded, dtype=torch.int64, device=z.device)

    # (tiles, d+1, rows): one contiguous block (1, -z) per tile
    columns = z.new_zeros((padded // rows, d + 1, rows), dtype=torch.float32)
    columns[:, 0] = 1
    whole = n // rows
    columns[:whole, 1:] = z[: whole * rows].reshape(whole, rows, d).transpose(1, 2)
    if whole < len(columns):
        columns[whole, 1:, : n - whole * rows] = z[whole * rows :].T
    columns[:, 1:].neg_()

    distance = z.new_empty((codes, rows), dtype=torch.float32)
    for start in range(0, len(codebook), codes):
        block = code_block(codebook[start : start + codes], metric)  # (k, d+1), k a multiple of GROUP
        for tile, column in enumerate(columns):
            here = slice(tile * rows, (tile + 1) * rows)
            groups = torch.mm(block, column, out=distance[: len(block)]).view(-1, GROUP, rows)
            value, group = groups.amin(1).min(0)  # (rows,): first group that holds the minimum
            inside = groups.gather(0, group.expand(1, GROUP, rows))[0].argmin(0)  # first in that group
            closer = value < best[here]  # strict: an earlier block keeps a tie; False for NaN
            best[here] = torch.where(closer, value, best[here])
            ids[here] = torch.where(closer, group * GROUP + inside + start, ids[here])
    return ids[:n].clone() if padded > n else ids


def code_block(codes: Tensor, metric: str) -> Tensor:
    """(k', d+1) rows (|c|^2 / 2, c), k' rounded up to a multiple of GROUP with codes at infinite distance."""
    codes = codes.float()
    if metric == "cosine":
        codes = F.normalize(codes, dim=-1)
    # unit codes need no |c|^2: it is 1 up to rounding, which must not decide between them
    bias = codes.square().sum(1, keepdim=True) / 2 if metric == "l2" else codes.new_zeros(len(codes), 1)
    block = torch.cat([bias, codes], 1)
    missing = -len(block) % GROUP
    if missing:
        padding = block.new_zeros(missing, block.shape[1])
        padding[:, 0] = torch.inf
        block = torch.cat([block, padding])
    return block


def tile_shape(k: int, d: int, device: str) -> tuple[int, int]:
    """(vectors, codes) of a tile; depends on K, d and the kind of device only, never on the number of vectors."""
    tile, block = (CPU_TILE, CPU_CODES) if device == "cpu" else (GPU_TILE, GPU_CODES)
    codes = min(max(block // (4 * (d + 1)), GROUP), 8192, k + -k % GROUP) // GROUP * GROUP
    return min(max(tile // (4 * codes), ROW), 2048) // ROW * ROW, codes


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Plain fp32 arithmetic: no autocast, no TF32 or bf16 inside fp32 matrix products."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
