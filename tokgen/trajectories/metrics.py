"""How well trajectories follow the objects of a clip whose truth is known.

Every trajectory belongs to the object that it shares most pixels with. That vote is the only use made of the truth, so a
measure falls when a trajectory straddles two objects, in space or in time; it does not fall when an object has many
trajectories, which `count` and `life` say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokgen.errors import InputError
from tokgen.trajectories.base import Trajectories


@dataclass(frozen=True)
class TrajectoryScores:
    """Measures of one clip, shares from 0 to 1 unless said.

    Attributes:
        tube_iou: mean over objects of the IoU, over all frames, between the object and all trajectories that belong to it.
        frame_iou: the same within each frame, where each trajectory's pixels of that frame vote anew: what is lost against
            it is identity. Mean over all pairs of a frame and an object seen in it.
        mbo: mean over objects of the best IoU, over all frames, of a single trajectory (mean best overlap).
        asa: pixels whose trajectory belongs to their object, background included (achievable segmentation accuracy).
        life: frames that a trajectory is seen in, on the mean; a number of frames.
        count: trajectories.
    """

    tube_iou: float
    frame_iou: float
    mbo: float
    asa: float
    life: float
    count: int


def score_trajectories(found: Trajectories, truth: Trajectories) -> TrajectoryScores:
    """Measure a clip's trajectories.

    Args:
        found: of any source; pixels without one (-1) are right nowhere but where they lie on background.
        truth: the objects, -1 for background, on the same grid (`Trajectories.resized` makes it so).

    Raises:
        InputError: the grids differ, or the truth holds no object.
    """
    if found.shape != truth.shape:
        raise InputError(f"trajectories are {found.shape} and the truth {truth.shape}; expected the same grid")
    if truth.count == 0:
        raise InputError("the truth holds no object; expected at least one number from 0 up")
    m, k = found.count + 1, truth.count + 1  # 0 of both: none
    key = (found.labels.astype(np.int64) + 1) * k + truth.labels + 1
    joint = np.stack([np.bincount(plane.ravel(), minlength=m * k).reshape(m, k) for plane in key])  # (T, M+1, K+1)

    whole = joint.sum(0)
    union = whole.sum(1, keepdims=True) + whole.sum(0) - whole
    objects = np.flatnonzero(whole.sum(0)[1:]) + 1  # numbers of the truth that occur
    best = (whole[1:] / np.maximum(union[1:], 1)).max(0, initial=0)[objects]
    return TrajectoryScores(
        tube_iou=float(np.mean(_object_ious(whole)[objects])),
        frame_iou=float(np.mean(np.concatenate([_object_ious(j)[np.flatnonzero(j.sum(0)[1:]) + 1] for j in joint]))),
        mbo=float(best.mean()),
        asa=float(_votes(whole).diagonal().sum() / whole.sum()),
        life=float((joint[:, 1:].sum(2) > 0).sum(0)[whole[1:].sum(1) > 0].mean()) if found.count else 0.0,
        count=int((whole[1:].sum(1) > 0).sum()),
    )


def _votes(joint: np.ndarray) -> np.ndarray:
    """Pixels (K+1, K+1) of each object by the object that their trajectory belongs to, of counts (M+1, K+1); ties go to the
    lower number, and pixels without a trajectory to the background."""
    owner = joint.argmax(1)
    owner[0] = 0
    votes = np.zeros((joint.shape[1],) * 2, np.int64)
    np.add.at(votes, owner, joint)
    return votes


def _object_ious(joint: np.ndarray) -> np.ndarray:
    """IoU of each object with the trajectories that belong to it, (K+1,), of counts (M+1, K+1)."""
    votes = _votes(joint)
    both = votes.diagonal()
    return both / np.maximum(votes.sum(0) + votes.sum(1) - both, 1)
