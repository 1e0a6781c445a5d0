"""Frechet distance between two sets of pictures, in a stated feature space (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

With Inception features it is the FID; with any other space it is a distance of the same form that must be quoted with that
space. It falls with the number of pictures (the estimate is biased upwards), so only figures over equally many compare.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokgen.errors import InputError
from tokgen.evaluation.retrieval import embed_pictures


def frechet_from_statistics(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), in double precision.

    The trace of the root is the sum of the singular values of C_a^1/2 C_b^1/2, which exist for singular covariances too and
    need no matrix root of an asymmetric product.
    """
    mean_a, cov_a, mean_b, cov_b = (t.double() for t in (mean_a, cov_a, mean_b, cov_b))
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet_from_features(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to features (N, D) and (M, D). Raises InputError for fewer than two rows."""
    if len(a) < 2 or len(b) < 2 or a.shape[1:] != b.shape[1:]:
        raise InputError(
            f"features are {tuple(a.shape)} and {tuple(b.shape)}; expected at least 2 rows each, of one width"
        )
    return frechet_from_statistics(a.double().mean(0), a.double().T.cov(), b.double().mean(0), b.double().T.cov())


def frechet_distance(
    a: Tensor, b: Tensor, space: tuple[str, Callable[[Tensor], Tensor]], batch_size: int = 128
) -> float:
    """Between two sets of pictures, uint8 or float in [0, 1], (N, 3, H, W) and (M, 3, H, W).

    Args:
        space: from `tokgen.evaluation.retrieval.feature_space`; its features are taken at unit length.
    """
    return frechet_from_features(embed_pictures(a, space, batch_size), embed_pictures(b, space, batch_size))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root; rounding below 0 counts as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
