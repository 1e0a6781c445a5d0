"""From too many trajectories to a budget: what flickers is absorbed, what looks and moves alike is joined."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOTION_WEIGHT = 64.0  # of a squared pixel of motion against a squared unit of 8-bit Lab


@dataclass
class Tracks:
    """The trajectories of one shot and what merging needs to know of them.

    Attributes:
        labels: int32 (T, H, W), 0 .. M-1.
        pixels: float64 (M, T), in each frame.
        colour: float64 (M, 3), sum over all pixels.
        motion: float64 (M, T, 2), sum over the pixels of each frame.
        pairs: int64 (E, 2), neighbours, the lower number first, each pair once.
        border: float64 (E,), edges of pixels that they share, over all frames.
    """

    labels: np.ndarray
    pixels: np.ndarray
    colour: np.ndarray
    motion: np.ndarray
    pairs: np.ndarray
    border: np.ndarray


class TrackGraph:
    """Trajectories as nodes, joined one pair at a time, the cheapest first.

    A pair costs (|difference of mean colours|^2 + MOTION_WEIGHT * |difference of mean motions|^2) * v_a v_b / (v_a + v_b) *
    (smaller perimeter / shared border): Ward's criterion over space-time, and what hangs on by a thread costs more than
    what is surrounded. Motions are compared in the frames where both are seen, frame by frame; a pair without such a
    frame is compared by the means over time. Ties go to the lower numbers.
    """

    def __init__(self, tracks: Tracks) -> None:
        self._labels = tracks.labels
        self._pixels, self._colour, self._motion = tracks.pixels.copy(), tracks.colour.copy(), tracks.motion.copy()
        count = len(tracks.pixels)
        self._volume = self._pixels.sum(1)  # (M,)
        self._parent = np.arange(count)
        self._version = [0] * count  # -1: joined to another
        self._neighbours: list[dict[int, float]] = [{} for _ in range(count)]
        for (a, b), border in zip(tracks.pairs.tolist(), tracks.border.tolist()):
            self._neighbours[a][b] = self._neighbours[b][a] = border
        self._perimeter = np.array([sum(n.values()) for n in self._neighbours])
        self.count = count

    @property
    def appearances(self) -> int:
        """Pairs of a trajectory and a frame that it is seen in."""
        return int((self._pixels[self._alive()] > 0).sum())

    def labels(self) -> np.ndarray:
        """int32 (T, H, W) of numbers 0 .. count-1, in the order of the numbers before."""
        root = self._parent
        while not np.array_equal(root, root[root]):
            root = root[root]
        number = np.zeros(len(root), np.int32)
        number[self._alive()] = np.arange(self.count, dtype=np.int32)
        return number[root][self._labels]

    def absorb(self, min_life: int, min_volume: float) -> None:
        """Join each trajectory that is seen in less than `min_life` frames, or has less than `min_volume` pixels, to its
        cheapest neighbour, the smallest first. One that is seen in the last frame may yet live on, and is kept."""
        min_life = min(min_life, self._pixels.shape[1])

        def flickers(a: int) -> bool:
            seen = self._pixels[a] > 0
            return self._volume[a] < min_volume or (not seen[-1] and int(seen.sum()) < min_life)

        for a in np.argsort(self._volume, kind="stable").tolist():
            if self._version[a] >= 0 and self._neighbours[a] and flickers(a):
                others = sorted(self._neighbours[a])
                self._join(a, others[int(np.argmin(self._costs(a, others)))])

    def reduce(self, budget: int, below: float = math.inf) -> None:
        """Join the cheapest pairs until at most `budget` trajectories are left, or none costs less than `below`."""
        if self.count <= budget:
            return
        heap: list[tuple[float, int, int, int, int]] = []
        for a in self._alive().tolist():
            self._push(heap, a, [b for b in self._neighbours[a] if b > a])
        heapq.heapify(heap)
        while self.count > budget and heap:
            cost, a, b, version_a, version_b = heapq.heappop(heap)
            if cost >= below:
                return
            if self._version[a] == version_a and self._version[b] == version_b:  # else a cost of before a join
                a = self._join(a, b)
                for entry in self._push([], a, list(self._neighbours[a])):
                    heapq.heappush(heap, entry)

    def _alive(self) -> np.ndarray:
        return np.flatnonzero(np.array(self._version) >= 0)

    def _push(self, entries: list, a: int, others: Sequence[int]) -> list:
        if others:
            for cost, b in zip(self._costs(a, others).tolist(), others):
                low, high = min(a, b), max(a, b)
                entries.append((cost, low, high, self._version[low], self._version[high]))
        return entries

    def _costs(self, a: int, others: Sequence[int]) -> np.ndarray:
        b = np.array(others)
        va, vb = self._volume[a], self._volume[b]
        colour = self._colour[a] / va - self._colour[b] / vb[:, None]  # (n, 3)
        pa, pb = self._pixels[a], self._pixels[b]  # (T,), (n, T)
        both = np.minimum(pa, pb)  # (n, T)
        shared = both.sum(1)
        motion = (
            self._motion[a] / np.maximum(pa, 1)[:, None] - self._motion[b] / np.maximum(pb, 1)[..., None]
        )  # (n, T, 2)
        moved = np.einsum("ntk,ntk,nt->n", motion, motion, both) / np.maximum(shared, 1)
        apart = np.flatnonzero(shared == 0)
        if len(apart):
            mean = self._motion[a].sum(0) / va - self._motion[b[apart]].sum(1) / vb[apart, None]
            moved[apart] = np.einsum("nk,nk->n", mean, mean)
        border = np.array([self._neighbours[a][i] for i in others])
        ward = (np.einsum("nk,nk->n", colour, colour) + MOTION_WEIGHT * moved) * va * vb / (va + vb)
        return ward * np.minimum(self._perimeter[a], self._perimeter[b]) / border

    def _join(self, a: int, b: int) -> int:
        """Join two neighbours; returns the one of them that goes on."""
        if len(self._neighbours[a]) < len(self._neighbours[b]):  # relink the fewer
            a, b = b, a
        self._perimeter[a] += self._perimeter[b] - 2 * self._neighbours[a].pop(b)
        for c, border in self._neighbours[b].items():
            if c != a:
                del self._neighbours[c][b]
                self._neighbours[a][c] = self._neighbours[c][a] = self._neighbours[a].get(c, 0) + border
        self._neighbours[b] = {}
        for sums in (self._pixels, self._colour, self._motion, self._volume):
            sums[a] += sums[b]
        self._parent[b] = a
        self._version[a] += 1
        self._version[b] = -1
        self.count -= 1
        return a


def share_budget(budget: int, needs: Sequence[int], counts: Sequence[int]) -> list[int]:
    """How many trajectories each shot may keep: at least 1 and at most as many as it has, in proportion to `needs` otherwise.

    Args:
        budget: of all shots together; at least as many as shots.
        needs: weight of each shot.
        counts: trajectories of each.

    Returns:
        numbers whose sum is at most `budget`; equal to it if the counts suffice.
    """
    shares = np.ones(len(needs), np.int64)
    needs_, counts_ = np.array(needs, np.float64), np.array(counts, np.int64)
    while (left := budget - int(shares.sum())) > 0 and (open_ := shares < counts_).any():
        # what is left goes to the open shots that are furthest below their share
        ideal = np.where(open_, needs_, 0) / needs_[open_].sum() * (left + shares[open_].sum())
        gain = np.clip(np.floor(ideal).astype(np.int64) - shares, 0, counts_ - shares) * open_
        if not gain.any():
            gain[np.argmax(np.where(open_, ideal - shares, -np.inf))] = 1
        while gain.sum() > left:
            gain[np.argmax(gain)] -= 1
        shares += gain
    return shares.tolist()
