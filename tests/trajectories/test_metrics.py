"""Measures of trajectories, against cases small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tokgen.errors import InputError
from tokgen.trajectories.base import Trajectories
from tokgen.trajectories.metrics import score_trajectories


def volume(*rows: list[int]) -> Trajectories:
    """One row of pixels a frame."""
    return Trajectories(np.array(rows, np.int32)[:, None])


TRUTH = volume([-1, 0, 0, 1], [-1, -1, 0, 0])


def test_the_truth_scores_one():
    labels = TRUTH.labels + 1
    scores = score_trajectories(Trajectories(labels), TRUTH)
    assert (scores.tube_iou, scores.frame_iou, scores.mbo, scores.asa) == (1, 1, 1, 1)
    assert scores.count == 3 and scores.life == pytest.approx((2 + 2 + 1) / 3)


def test_parts_of_an_object_cost_only_best_overlap():
    scores = score_trajectories(volume([0, 1, 2, 3], [0, 0, 1, 2]), TRUTH)
    assert (scores.tube_iou, scores.asa) == (1, 1)
    assert scores.mbo == pytest.approx((2 / 4 + 1) / 2)


def test_a_trajectory_that_straddles_space():
    # 1 holds object 0's three pixels and the only pixel of object 1: object 1 is lost, object 0 gains a wrong one
    scores = score_trajectories(volume([0, 1, 1, 1], [0, 0, 1, 1]), TRUTH)
    assert scores.tube_iou == pytest.approx((4 / 5 + 0) / 2)
    assert scores.asa == pytest.approx(7 / 8)
    assert scores.frame_iou == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_a_trajectory_that_changes_objects_is_right_in_every_frame_and_wrong_over_time():
    truth = volume([0, 0, 1, 1], [0, 0, 1, 1])
    scores = score_trajectories(volume([0, 0, 1, 1], [1, 1, 0, 0]), truth)
    assert scores.frame_iou == 1
    assert scores.tube_iou == pytest.approx((4 / 8 + 0) / 2)  # both tie, and go to the first


def test_pixels_without_a_trajectory_are_background():
    scores = score_trajectories(volume([-1, 0, -1, -1], [-1, -1, 0, 0]), TRUTH)
    assert scores.tube_iou == pytest.approx((3 / 4 + 0) / 2)
    assert scores.asa == pytest.approx(6 / 8)
    assert (scores.count, scores.life) == (1, 2)
    nothing = score_trajectories(Trajectories(np.full((2, 1, 4), -1)), TRUTH)
    assert (nothing.tube_iou, nothing.mbo, nothing.count, nothing.life) == (0, 0, 0, 0)
    assert nothing.asa == pytest.approx(3 / 8)


def test_numbers_that_do_not_occur_count_nowhere():
    spread = Trajectories(np.where(TRUTH.labels >= 0, TRUTH.labels * 3 + 2, -1))
    assert score_trajectories(spread, spread) == score_trajectories(TRUTH, TRUTH)


def test_errors():
    with pytest.raises(InputError, match="same grid"):
        score_trajectories(TRUTH, volume([0, 0, 0, 0]))
    with pytest.raises(InputError, match="no object"):
        score_trajectories(TRUTH, Trajectories(np.full((2, 1, 4), -1)))
