"""The laws of the voting tracker, on photographs that are still, panned, cut, and on whatever else a clip can be."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from tokgen.errors import ConfigError, MissingDependency
from tokgen.trajectories.base import Trajectories, build_source
from tokgen.trajectories.flow import FlowEstimator, carried, cut_scores
from tokgen.trajectories.merging import TrackGraph, Tracks, share_budget
from tokgen.trajectories.metrics import score_trajectories
from tokgen.trajectories.regions import regions
from tokgen.trajectories.voting import VotingTracker, lab_colours, noise_level, shrink

SIDE = 64


def picture(seed: int, side: int = 2 * SIDE) -> np.ndarray:
    """Smooth random colours: many regions with soft and hard borders."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (side // 16, side // 16, 3)).astype(np.float32)
    up = np.kron(coarse, np.ones((16, 16, 1), np.float32))
    for axis in (0, 1):
        up = (np.roll(up, 2, axis) + up + np.roll(up, -2, axis)) / 3
    return (up + rng.normal(0, 2, up.shape)).clip(0, 255).astype(np.uint8)


def still(frames: int = 5, seed: int = 0) -> np.ndarray:
    return np.repeat(picture(seed)[None, :SIDE, :SIDE], frames, 0)


def panned(frames: int = 8, step: int = 2, seed: int = 0) -> np.ndarray:
    return np.stack([picture(seed)[t : t + SIDE, t * step : t * step + SIDE] for t in range(frames)])


@pytest.fixture(params=["opencv", "scikit-image"])
def backend(request, monkeypatch):
    hide(monkeypatch, *(["cv2"] if request.param == "scikit-image" else []))
    return request.param


def hide(monkeypatch, *packages):
    """As if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in packages else find(name, *a))


# ------------------------------------------------------------------------------------------------------------ the laws


def test_in_a_still_clip_every_trajectory_lives_throughout(backend):
    found = VotingTracker()(still())
    assert found.count > 8
    assert (found.volumes() > 0).all()
    assert (found.labels == found.labels[0]).all()


@pytest.mark.parametrize("budget", [None, 12])
def test_a_pan_carries_labels_along(backend, budget):
    """What is seen from the first frame to the last has the labels of the first, shifted: IoU of each trajectory >= 0.9 on the
    mean, over its pixels that stay in the picture."""
    frames, step = 8, 2
    labels = VotingTracker(budget=budget)(panned(frames, step)).labels
    gone = frames - 1
    truth = labels[0, gone:, step * gone :]
    ious, weights = [], []
    for t in range(1, frames):
        now = labels[t, gone - t : SIDE - t, step * (gone - t) : SIDE - step * t]
        for k in np.unique(truth):
            ious.append(((now == k) & (truth == k)).sum() / ((now == k) | (truth == k)).sum())
            weights.append((truth == k).sum())
    assert len(np.unique(truth)) > 5
    assert np.average(ious, weights=weights) >= 0.9


def test_no_trajectory_crosses_a_cut(backend):
    clip = np.concatenate([still(2, seed=0), 255 - still(3, seed=3)])
    labels = VotingTracker()(clip).labels
    assert not set(np.unique(labels[:2])) & set(np.unique(labels[2:]))
    joined = VotingTracker(cut=1.0, budget=1)(clip)
    assert joined.count == 1  # without cuts nothing keeps them apart


def test_the_longest_shot_is_cut():
    labels = VotingTracker(max_shot=4)(still(10)).labels
    parts = [set(np.unique(labels[a:b])) for a, b in ((0, 4), (4, 8), (8, 10))]
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]


def test_panoptic_compact_and_within_the_budget():
    clip = np.concatenate([panned(5, seed=1), panned(4, seed=2)[:, ::-1]])
    free = VotingTracker(budget=None)(clip)
    assert free.panoptic and free.count > 40
    for budget in (1, 2, 7, 40):
        found = VotingTracker(budget=budget)(clip)
        assert found.panoptic
        assert found.count == budget  # all of it is used: there are enough
        assert (found.compact().labels == found.labels).all()


def test_more_cuts_than_the_budget_allows():
    clip = np.concatenate([still(2, seed=s) // (1 + s % 3) for s in range(8)])
    assert (cut_scores(clip) > 0.3).sum() > 3
    found = VotingTracker(budget=3, cut=0.3)(clip)
    assert found.panoptic and found.count <= 3


def test_deterministic_and_independent_of_calls_before(backend):
    tracker, clip = VotingTracker(budget=20), panned(4)
    first = tracker(clip).labels
    tracker(still(2, seed=7))
    assert (tracker(clip).labels == first).all()
    assert (VotingTracker(budget=20)(clip.copy()).labels == first).all()


@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (1, 1, 1), (5, 1, 1), (3, 1, 40), (3, 2, 3), (4, 9, 7), (2, 33, 31)], ids=str
)
def test_any_size(backend, shape):
    clip = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    found = VotingTracker(budget=5)(clip)
    assert found.shape == shape and found.panoptic and 1 <= found.count <= 5


def test_one_colour_is_one_trajectory(backend):
    assert VotingTracker()(np.full((5, 40, 40, 3), 90, np.uint8)).count == 1


def test_opencv_threads_are_restored():
    cv2 = pytest.importorskip("cv2")
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(3)
        VotingTracker()(still(2))
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_without_opencv_and_scikit_image(monkeypatch):
    hide(monkeypatch, "cv2", "skimage")
    with pytest.raises(MissingDependency, match=r"tokgen\[trajectory\]"):
        VotingTracker()(still(2))


# ---------------------------------------------------------------------------------------------------- settings and sizes


def test_settings_rebuild_the_source():
    tracker = VotingTracker(size=48, budget=9, scale=300, cut=0.4, max_shot=5, min_life=2)
    again = build_source({"type": "voting", **tracker.settings()})
    assert again.settings() == tracker.settings()
    clip = panned()
    found = tracker(clip)
    assert found.shape == (8, 48, 48)
    assert (again(clip).labels == found.labels).all()
    for wrong in ({"size": 0}, {"budget": 0}, {"scale": 0}, {"cut": 1.5}, {"max_shot": 0}, {"min_life": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            VotingTracker(**wrong)
    with pytest.raises(ConfigError, match="voting"):
        build_source({"type": "voting", "sizes": 3})


def test_shrink_keeps_the_aspect():
    clip = np.zeros((2, 90, 160, 3), np.uint8)
    assert shrink(clip, 60).shape == (2, 45, 80, 3)
    assert shrink(clip, 120).shape == clip.shape
    assert shrink(clip, None).shape == clip.shape
    assert shrink(np.zeros((1, 1, 900, 3), np.uint8), 15).shape == (1, 1, 450, 3)  # no side below a pixel


def test_flicker_is_absorbed():
    """A square of its own colour that is seen in one frame of nine only is a trajectory with min_life 1, and none with 3."""
    clip = np.full((9, 64, 64, 3), 60, np.uint8)
    clip[4, 20:40, 20:40] = (230, 40, 40)
    assert VotingTracker(min_life=1)(clip).count == 2
    assert VotingTracker(min_life=3)(clip).count == 1
    clip[4:] = clip[4]  # it stays
    assert VotingTracker(min_life=3)(clip).count == 2
    assert VotingTracker(min_life=3)(clip[:5]).count == 2  # it may stay: the clip ends


# ------------------------------------------------------------------------------------------------------------- the parts


def test_regions_are_connected_large_enough_and_exact_on_flat_colours():
    ndimage = pytest.importorskip("scipy.ndimage")
    lab = lab_colours(picture(0))
    found, n = regions(lab, 400.0, 30)
    assert sorted(np.unique(found)) == list(range(n)) and n > 20
    for k in range(n):
        assert ndimage.label(found == k)[1] == 1
    assert np.bincount(found.ravel()).min() >= 30
    flat = np.zeros((20, 30, 3), np.float32)
    flat[5:15, 10:20] = 50
    found, n = regions(flat, 100.0, 10)
    assert n == 2 and ((found == found[5, 10]) == (flat[..., 0] > 0)).all()


def test_flow_and_what_it_carries(backend):
    clip = panned(2, step=3)
    flow = FlowEstimator()
    gray = [(f @ np.float32([0.3, 0.6, 0.1])).astype(np.uint8) for f in clip]
    back, forth = flow(gray[1], gray[0]), flow(gray[0], gray[1])
    assert np.abs(np.median(back, (0, 1)) - (3, 1)).max() < 0.3
    place, believed = carried(back, forth)
    inside = believed[8:-8, 8:-8]
    assert inside.mean() > 0.9
    wanted = (np.arange(SIDE)[:, None] + 1) * SIDE + np.arange(SIDE) + 3
    assert (place == wanted)[8:-8, 8:-8][inside].mean() > 0.9
    assert not carried(np.full((8, 8, 2), 9.0), np.full((8, 8, 2), -9.0))[1].any()  # all outside
    assert not carried(np.full((8, 8, 2), 1.0), np.full((8, 8, 2), 2.0))[1].any()  # they do not undo each other


def test_lab_colours_against_scikit_image():
    color = pytest.importorskip("skimage.color")
    frame = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    expected = color.rgb2lab(frame) * (2.55, 1, 1)
    assert np.abs(lab_colours(frame) - expected).max() < 0.8


def test_noise_level():
    rng = np.random.default_rng(0)
    slope = np.linspace(50, 200, 64)[None, :, None, None] + np.zeros((6, 64, 64, 3))
    for sigma in (0, 3, 8):
        grey = np.repeat(rng.normal(0, sigma, (6, 64, 64, 1)), 3, -1)
        assert noise_level((slope + grey).clip(0, 255).astype(np.uint8)) == pytest.approx(sigma, abs=0.6)


def test_merging_joins_by_colour_motion_and_border():
    """Four stripes in a ring: 0 and 1 differ by little colour, 1 and 2 by motion alone, 3 from all by much colour."""
    labels = np.repeat(np.arange(4, dtype=np.int32), 4)[None, None].repeat(2, 0).repeat(16, 1)
    pixels = np.full((4, 2), 64.0)
    colour = np.array([[50.0, 0, 0], [53, 0, 0], [53, 0, 0], [120, 0, 0]]) * 128
    motion = np.array([[0.0, 0], [0, 0], [2, 0], [2, 0]])[:, None] * pixels[..., None]
    pairs, border = np.array([[0, 1], [1, 2], [2, 3], [0, 3]]), np.full(4, 32.0)

    def reduced(budget, border=border):
        graph = TrackGraph(Tracks(labels, pixels, colour, motion, pairs, border))
        graph.reduce(budget)
        assert graph.count == budget
        return graph.labels()[0, 0, ::4].tolist()

    assert reduced(4) == [0, 1, 2, 3]
    assert reduced(3) == [0, 0, 1, 2]
    assert reduced(2) == [0, 0, 0, 1]
    assert reduced(3, np.array([0.01, 32, 32, 32])) == [0, 1, 1, 2]  # hanging on by a thread


def test_budgets_are_shared_in_proportion():
    assert share_budget(12, [10, 20, 30], [99, 99, 99]) == [2, 4, 6]
    assert share_budget(12, [10, 20, 30], [99, 99, 3]) == [3, 6, 3]
    assert share_budget(5, [1000, 1, 1], [99, 99, 99]) == [3, 1, 1]
    assert share_budget(100, [5, 5], [4, 7]) == [4, 7]
    assert share_budget(7, [1, 1, 1], [9, 9, 9]) == [3, 2, 2]
    assert share_budget(2, [1, 5], [9, 9]) == [1, 1]


def test_a_moving_square_keeps_its_number():
    """A square crosses a photograph: one vote of each trajectory finds it again, in every frame."""
    frames = 12
    clip, truth = still(frames), np.full((frames, SIDE, SIDE), -1, np.int32)
    for t in range(frames):
        x = 4 + 3 * t
        clip[t, 24:40, x : x + 16] = (250, 250, 20)
        truth[t, 24:40, x : x + 16] = 0
    scores = score_trajectories(VotingTracker(budget=24)(clip), Trajectories(truth))
    assert scores.tube_iou > 0.9
    assert scores.mbo > 0.9  # and it is one trajectory
