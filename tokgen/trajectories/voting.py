"""Trajectories without a network, on a CPU: each frame's regions vote for the trajectories that optical flow carries to them.

A frame falls into regions of one colour (`regions.py`). Each region moves as its pixels do on the mean, and so finds the
trajectories of the frame before that it came from (`flow.py`); of those, it joins the one that it shares most pixels and
colour with, or starts a new one if it came from nowhere. Tracks that flicker are absorbed, and those that look and move
alike are joined until they fit a budget (`merging.py`). A cut starts afresh: no trajectory crosses it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from tokgen.errors import ConfigError
from tokgen.trajectories.base import Trajectories, TrajectorySource
from tokgen.trajectories.flow import FlowEstimator, carried, cut_scores, one_thread
from tokgen.trajectories.merging import TrackGraph, Tracks, share_budget
from tokgen.trajectories.regions import regions

# Areas are in pixels of a picture of 256 x 256, and scaled to the one at hand; colours are 8-bit Lab: L of 0 to 255.
REFERENCE = 256 * 256
MIN_REGION = 30  # pixels of a region
MIN_NEW = 24  # pixels of a region that may start a trajectory where it could join one
MIN_VOLUME = 200  # pixels of a trajectory, over all frames
COLOUR_SIGMA = 12.0  # deviation of a region's colour from its trajectory's, in a vote
LEAST_SCORE = 0.05  # of a vote; below, a region starts a trajectory
COLOUR_MEMORY = 0.85  # share of a trajectory's colour that is kept from frame to frame
NOISY = 4.0  # standard deviation of noise, in levels of grey, from which frames are smoothed before they are segmented


class VotingTracker(TrajectorySource):
    """Panoptic trajectories of any clip, with numbers compact in order of first appearance.

    Args:
        size: the grid of the labels: frames are shrunk, their aspect kept, until they have at most size * size pixels; None
            works at the frames' own size.
        budget: trajectories of a clip at most; its shots share it in proportion to their length times the number of
            trajectories that they would have without it. None: as many as there are.
        merge: trajectories are joined, whatever the budget, while a join adds less than this to the mean over all pixels of the
            squared error of a clip that has one colour (8-bit Lab) and one motion for each. So their number follows the scene
            and not the duration. None joins for the budget alone.
        scale: of regions; see `tokgen.trajectories.regions.regions`. More gives fewer and larger ones.
        cut: a frame starts a shot where its score (`tokgen.trajectories.flow.cut_scores`) exceeds this; 1 finds no cut. More
            cuts than the budget allows for count by their scores.
        max_shot: frames of a shot at most; a longer one is cut, which bounds memory. None: no bound.
        min_life: frames that a trajectory is seen in at least; shorter ones are absorbed, unless their shot ends first.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "voting"

    def __init__(
        self,
        size: int | None = 256,
        budget: int | None = 128,
        merge: float | None = None,
        scale: float = 400.0,
        cut: float = 0.5,
        max_shot: int | None = 256,
        min_life: int = 3,
    ) -> None:
        for what, value in (("size", size), ("budget", budget), ("max_shot", max_shot)):
            if value is not None and value < 1:
                raise ConfigError(f"VotingTracker {what} is {value}; expected at least 1")
        if min_life < 1:
            raise ConfigError(f"VotingTracker min_life is {min_life}; expected at least 1")
        if scale <= 0 or not 0 <= cut <= 1:
            raise ConfigError(f"VotingTracker scale is {scale} and cut {cut}; expected above 0, and 0 to 1")
        if merge is not None and merge < 0:
            raise ConfigError(f"VotingTracker merge is {merge}; expected 0 or more")
        self.size, self.budget, self.merge = size, budget, merge
        self.scale, self.cut = float(scale), float(cut)
        self.max_shot, self.min_life = max_shot, min_life

    def settings(self) -> dict[str, Any]:
        names = ("size", "budget", "merge", "scale", "cut", "max_shot", "min_life")
        return {name: getattr(self, name) for name in names}

    def track(self, video: np.ndarray) -> Trajectories:
        """Labels (T, h, w) of frames uint8 (T, H, W, 3): h = H and w = W, or smaller as `size` says.

        Raises:
            MissingDependency: neither OpenCV nor scikit-image is installed.
        """
        with one_thread():
            video = shrink(video, self.size)
            area = video.shape[1] * video.shape[2] / REFERENCE
            graphs = []
            for shot in self._shots(video):
                graph = TrackGraph(self._follow(shot, area))
                graph.absorb(self.min_life, MIN_VOLUME * area)
                if self.merge is not None:
                    graph.reduce(1, below=self.merge * shot[..., 0].size)
                graphs.append(graph)
        if self.budget is not None:
            shares = share_budget(self.budget, [g.appearances for g in graphs], [g.count for g in graphs])
            for graph, share in zip(graphs, shares):
                graph.reduce(share)
        first = np.cumsum([0, *(g.count for g in graphs)])
        return Trajectories(np.concatenate([g.labels() + n for g, n in zip(graphs, first)])).compact()

    def _shots(self, video: np.ndarray) -> Iterator[np.ndarray]:
        scores = cut_scores(video)
        starts = {0, *np.flatnonzero(scores > self.cut).tolist()}
        since = 0
        for t in range(len(video)):
            since = t if t in starts else since
            if t - since == self.max_shot:
                starts.add(t)
                since = t
        if self.budget is not None and len(starts) > self.budget:  # a trajectory each, at least
            starts = {0, *sorted(starts - {0}, key=lambda t: (-scores[t], t))[: self.budget - 1]}
        bounds = [*sorted(starts), len(video)]
        for begin, end in itertools.pairwise(bounds):
            yield video[begin:end]

    def _follow(self, video: np.ndarray, area: float) -> Tracks:
        """Trajectories of one shot: every region of every frame has one."""
        t, h, w = video.shape[:3]
        # Up to about 360 x 360 the estimate ends at the picture itself. The flow back only checks it, to a pixel: half the
        # resolution is enough, and a quarter of the cost.
        finest = max(0, round(np.log2(area) / 2))
        backward, forward = FlowEstimator(finest), FlowEstimator(finest + 1)
        smooth = noise_level(video) > NOISY
        history = _History((t, h, w))
        colour = np.zeros((0, 3))  # of each trajectory so far, as remembered
        grey_before = ids_before = None
        for frame in video:
            grey, lab = (frame @ GREY).astype(np.uint8), lab_colours(frame)
            region, n = regions(_smoothed(lab) if smooth else lab, self.scale, max(round(MIN_REGION * area), 1))
            flat = region.ravel()
            pixels = np.bincount(flat, minlength=n)
            mean = _sums(flat, lab, n) / pixels[:, None]  # (n, 3)
            if grey_before is None:
                ids, motion = np.arange(n), np.zeros((n, 2))
            else:
                motion = _region_motion(flat, backward(grey, grey_before), pixels)  # (n, 2)
                place, believed = carried(motion.astype(np.float32)[region], forward(grey_before, grey))
                came_from = np.where(believed, ids_before[place], -1).ravel()  # (H*W,)
                ids = _vote(flat, came_from, pixels, mean, colour, MIN_NEW * area)
            colour = _remembered(colour, ids, pixels, mean)
            history.add(region, ids, pixels, mean, motion)
            grey_before, ids_before = grey, ids[flat]
        return history.tracks()


def _vote(
    region: np.ndarray, came_from: np.ndarray, pixels: np.ndarray, mean: np.ndarray, colour: np.ndarray, min_new: float
) -> np.ndarray:
    """The trajectory of each region: the one of best score, share of the region's pixels that came from it * exp(-|difference
    of colours|^2 / (2 sigma^2)); a new one where most pixels came from nowhere, or no score reaches `LEAST_SCORE`.

    Args:
        region: int64 (P,), each pixel's region.
        came_from: int64 (P,), the trajectory that each pixel was in, -1 for none.
        pixels, mean: (n,) and (n, 3) of the regions.
        colour: (M, 3) of the trajectories.
        min_new: a region with fewer pixels starts no trajectory if any of them came from one.

    Returns:
        int64 (n,); numbers from M on are new.
    """
    n = len(pixels)
    alive = np.flatnonzero(
        np.bincount(came_from + 1, minlength=len(colour) + 1)[1:]
    )  # (a,) trajectories that can be joined
    local = np.zeros(len(colour) + 1, np.int64)  # the last entry is read by -1
    local[alive] = np.arange(1, len(alive) + 1)
    votes = np.bincount(region * (len(alive) + 1) + local[came_from], minlength=n * (len(alive) + 1))
    voted = np.flatnonzero(votes)
    of, candidate = np.divmod(voted, len(alive) + 1)  # in order of region, then candidate; candidate 0: from nowhere
    share = votes[voted] / pixels[of]
    lost = np.bincount(of[candidate == 0], share[candidate == 0], n)  # (n,)

    of, candidate, share = (x[candidate > 0] for x in (of, candidate, share))
    candidate = alive[candidate - 1]
    distance = np.square(mean[of] - colour[candidate]).sum(1)
    score = share * np.exp(-distance / (2 * COLOUR_SIGMA**2))
    order = np.lexsort((-candidate, score, of))  # the last of each region: best score, then lowest number
    of, candidate, score = of[order], candidate[order], score[order]
    last = np.flatnonzero(np.diff(of, append=-1))
    ids, best = np.full(n, -1), np.zeros(n)
    ids[of[last]], best[of[last]] = candidate[last], score[last]

    new = (ids < 0) | (((lost > 0.5) | (best < LEAST_SCORE)) & (pixels >= min_new))
    ids[new] = len(colour) + np.arange(int(new.sum()))
    return ids


def _remembered(colour: np.ndarray, ids: np.ndarray, pixels: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Colours of all trajectories (M, 3) after a frame whose regions have these ids, sizes and mean colours."""
    count = max(len(colour), int(ids.max()) + 1)
    size = np.bincount(ids, pixels, count)
    seen = np.flatnonzero(size)
    now = _sums(ids, mean * pixels[:, None], count)[seen] / size[seen, None]
    old = seen < len(colour)
    after = np.concatenate([colour, np.zeros((count - len(colour), 3))])
    after[seen] = np.where(old[:, None], COLOUR_MEMORY * after[seen] + (1 - COLOUR_MEMORY) * now, now)
    return after


def _region_motion(region: np.ndarray, flow: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Each region's motion, (n, 2): the mean over its pixels, then the mean once more with weights 1 / (1 + squared distance to
    the first), because flow at a region's border is its neighbour's as often as not."""
    n = len(pixels)
    flat = flow.reshape(-1, 2)
    mean = _sums(region, flat, n) / pixels[:, None]
    weight = 1 / (1 + np.square(flat - mean.astype(np.float32)[region]).sum(1))
    return _sums(region, flat * weight[:, None], n) / np.bincount(region, weight, n)[:, None]


def _sums(groups: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Sums of values (..., C) over groups 0 .. count-1 (as many as values have rows): float64 (count, C)."""
    values = values.reshape(-1, values.shape[-1])
    return np.stack([np.bincount(groups, column, count) for column in values.T], 1)


class _History:
    """What merging will need of each frame, kept by trajectory."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._labels = np.empty(shape, np.int32)
        self._frames: list[
            tuple[np.ndarray, ...]
        ] = []  # ids, pixels, colour sums and motion sums of the trajectories seen
        self._pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # a < b, and the border that they share

    def add(
        self, region: np.ndarray, ids: np.ndarray, pixels: np.ndarray, mean: np.ndarray, motion: np.ndarray
    ) -> None:
        labels = self._labels[len(self._frames)]
        labels[:] = ids[region]
        seen, local = np.unique(ids, return_inverse=True)
        size = np.bincount(local, pixels)
        colour = _sums(local, mean * pixels[:, None], len(seen))
        moved = _sums(local, motion * pixels[:, None], len(seen))
        if self._frames and not np.isin(seen, self._frames[-1][0]).any():
            # nothing was recognised: neighbours in time keep the graph in one piece
            self._note(self._labels[len(self._frames) - 1], labels)
        self._frames.append((seen, size, colour, moved))
        self._note(labels[:, 1:], labels[:, :-1])
        self._note(labels[1:], labels[:-1])

    def _note(self, a: np.ndarray, b: np.ndarray) -> None:
        differ = a != b
        a, b = a[differ].astype(np.int64), b[differ].astype(np.int64)
        key, border = np.unique(np.minimum(a, b) << 32 | np.maximum(a, b), return_counts=True)
        self._pairs.append((key, border))

    def tracks(self) -> Tracks:
        count = int(self._labels.max()) + 1
        pixels, motion = np.zeros((count, len(self._frames))), np.zeros((count, len(self._frames), 2))
        colour = np.zeros((count, 3))
        for t, (seen, size, sums, moved) in enumerate(self._frames):
            pixels[seen, t], motion[seen, t] = size, moved
            colour[seen] += sums
        if len(self._frames) > 1:  # the first frame's motion is not known: as in the second
            motion[:, 0] = motion[:, 1] * (pixels[:, 0] / np.maximum(pixels[:, 1], 1))[:, None]
        keys, borders = (np.concatenate(x) for x in zip(*self._pairs))
        key, which = np.unique(keys, return_inverse=True)
        pairs = np.stack([key >> 32, key & 0xFFFFFFFF], 1)
        return Tracks(self._labels, pixels, colour, motion, pairs, np.bincount(which, borders, len(key)))


# -------------------------------------------------------------------------------------------------------------- pictures

GREY = np.float32([0.299, 0.587, 0.114])
# sRGB (IEC 61966-2-1) to XYZ relative to white D65
_XYZ = np.float32([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_TO_XYZ = (_XYZ / _XYZ.sum(1, keepdims=True)).T
_LEVELS = np.arange(256) / 255
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4).astype(np.float32)
_STEPS = np.arange(4097) / 4096
_ROOT = np.where(_STEPS > 0.008856, np.cbrt(_STEPS), 7.787 * _STEPS + 16 / 116).astype(np.float32)
# cube roots of X, Y, Z to L of 0 to 255, a and b
_TO_LAB = np.float32([[0, 116 * 2.55, 0], [500, -500, 0], [0, 200, -200]]).T


def lab_colours(frame: np.ndarray) -> np.ndarray:
    """CIE Lab of a frame uint8 (H, W, 3): float32 (H, W, 3), L times 2.55, which is how OpenCV's 8 bits hold it."""
    xyz = _LINEAR[frame] @ _TO_XYZ
    return _ROOT[(xyz * 4096 + 0.5).astype(np.int32)] @ _TO_LAB - np.float32([16 * 2.55, 0, 0])


def noise_level(video: np.ndarray) -> float:
    """Standard deviation of the noise of frames uint8 (T, H, W, 3), in levels of grey: the median over up to five frames of
    Immerkaer's mask (1996; a difference of two Laplacians, blind to edges and slopes), by its median absolute value, which
    texture hardly moves. 0 below 3 x 3."""
    if min(video.shape[1:3]) < 3:
        return 0.0
    levels = []
    for t in np.unique(np.linspace(0, len(video) - 1, 5).round().astype(int)):
        grey = video[t] @ GREY
        rows = grey[:-2] - 2 * grey[1:-1] + grey[2:]
        mask = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]  # noise of deviation s has 6 s here
        levels.append(np.median(np.abs(mask)) / 0.6745 / 6)
    return float(np.median(levels))


def _smoothed(lab: np.ndarray) -> np.ndarray:
    """By a Gaussian of 0.8 pixels, five wide."""
    kernel = np.exp(-np.square(np.arange(-2, 3) / 0.8) / 2).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(lab, [(2, 2) if a == axis else (0, 0) for a in range(3)], "edge")
        n = lab.shape[axis]
        lab = sum(k * padded.take(range(i, i + n), axis) for i, k in enumerate(kernel))
    return lab


def shrink(video: np.ndarray, size: int | None) -> np.ndarray:
    """Frames uint8 (T, H, W, 3) with at most size * size pixels each, their aspect kept; smaller ones stay as they are."""
    _, h, w, _ = video.shape
    if size is None or h * w <= size * size:
        return video
    import torch
    import torch.nn.functional as F

    ratio = size / (h * w) ** 0.5
    shape = max(1, int(h * ratio + 1e-6)), max(1, int(w * ratio + 1e-6))
    small = np.empty((len(video), *shape, 3), np.uint8)
    for t, frame in enumerate(video):
        x = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
        x = F.interpolate(x, size=shape, mode="bilinear", antialias=True)[0]
        small[t] = x.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return small
