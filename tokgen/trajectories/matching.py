"""Which labels of one map are those of another: overlaps, one-to-one matching, and how well two labellings agree.

All functions take integer labels from 0 up, -1 for none, of any shape: planes (H, W) or whole volumes (T, H, W).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokgen.errors import InputError, MissingDependency


def scipy_module(name: str) -> Any:
    """`scipy.NAME`. Raises MissingDependency that names the extra."""
    import importlib

    try:
        return importlib.import_module(f"scipy.{name}")
    except ImportError:
        raise MissingDependency(
            "matching and filling trajectories needs scipy; install it with pip install 'tokgen[trajectory]'"
        ) from None


def intersections(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of label i in `a` and label j in `b`, int64 (A, B), and the pixels of each label in `a` (A,) and in `b` (B,).

    Raises:
        InputError: maps of different shapes.
    """
    if a.shape != b.shape:
        raise InputError(f"label maps of shapes {a.shape} and {b.shape} cannot be compared; resize one of them first")
    rows, columns = int(a.max(initial=-1)) + 2, int(b.max(initial=-1)) + 2  # one more for "none", which comes first
    joint = (a.astype(np.int64) + 1) * columns + (b.astype(np.int64) + 1)
    table = np.bincount(joint.ravel(), minlength=rows * columns).reshape(rows, columns)
    return table[1:, 1:], table[1:].sum(1), table[:, 1:].sum(0)


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every label of `a` with every label of `b`, float64 (A, B); 0 where one does not occur."""
    shared, in_a, in_b = intersections(a, b)
    return shared / np.maximum(in_a[:, None] + in_b[None] - shared, 1)


def one_to_one(scores: np.ndarray, minimum: float) -> list[tuple[int, int]]:
    """The pairs (row, column) of largest total score, each row and column in one pair at most, whose score is at least
    `minimum` (Hungarian method); pairs below it are worth nothing, so that they do not keep better ones apart."""
    worth = np.where(scores >= minimum, scores, 0.0)
    rows, columns = scipy_module("optimize").linear_sum_assignment(worth, maximize=True)
    return [(int(r), int(c)) for r, c in zip(rows, columns) if scores[r, c] >= minimum and scores[r, c] > 0]


def continued(before: np.ndarray | None, after: np.ndarray, count: int, min_iou: float) -> np.ndarray:
    """The trajectory of each segment of `after`, int32 (S,).

    Args:
        before: trajectories (H, W) on the same frame, found from the past; None: there is no past.
        after: segments (H, W), 0 .. S-1.
        count: the first number that no trajectory has yet.
        min_iou: a segment continues the trajectory it is matched to from this overlap on; any other begins a new one.
    """
    segments = int(after.max()) + 1
    names = np.full(segments, -1, np.int32)
    if before is not None:
        for old, new in one_to_one(iou_matrix(before, after), min_iou):
            names[new] = old
    fresh = names < 0
    names[fresh] = np.arange(count, count + int(fresh.sum()), dtype=np.int32)
    return names


def filled(labels: np.ndarray) -> np.ndarray:
    """A plane (H, W) whose pixels without a label have that of the nearest pixel with one; as it is where there is none."""
    empty = labels < 0
    if not empty.any() or empty.all():
        return labels
    rows, columns = scipy_module("ndimage").distance_transform_edt(empty, return_distances=False, return_indices=True)
    return labels[rows, columns]


def agreement(labels: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """How well trajectories agree with given ones; each figure in [0, 1]. Pixels without a target are left out.

    - "iou": mean over the target's trajectories of the overlap with the one they are matched to, 0 for one without a match.
    - "veq": with the pairs that overlap by at least .5, their mean overlap times pairs / mean number of trajectories
      (panoptic quality, arXiv 1801.00868, over whole volumes, as TrajTok's VEQ counts it).
    - "stq": with those pairs, the geometric mean of their mean overlap and of all their intersections over all their
      unions (TrajTok's STQ-EN).

    Args:
        labels, target: int (T, H, W).
    """
    labels = np.where(target >= 0, labels, -1)
    shared, in_target, in_labels = intersections(target, labels)
    rows, columns = np.flatnonzero(in_target), np.flatnonzero(in_labels)  # numbers that occur
    shared, in_target, in_labels = shared[rows][:, columns], in_target[rows], in_labels[columns]
    if not shared.size:
        return {"iou": 0.0, "veq": 0.0, "stq": 0.0}
    unions = in_target[:, None] + in_labels[None] - shared
    overlap = shared / unions
    iou = sum(overlap[pair] for pair in one_to_one(overlap, 0.0)) / len(rows)
    pairs = one_to_one(overlap, 0.5)
    if not pairs:
        return {"iou": float(iou), "veq": 0.0, "stq": 0.0}
    matched = np.array([overlap[pair] for pair in pairs])
    whole = sum(shared[pair] for pair in pairs) / sum(unions[pair] for pair in pairs)
    veq = matched.sum() / ((len(rows) + len(columns)) / 2)
    return {"iou": float(iou), "veq": float(veq), "stq": float(np.sqrt(matched.mean() * whole))}
