"""Regions of one picture: neighbouring pixels joined by Ward's criterion, all at once, round by round.

The hierarchy of Wei, Yang, Gong, Ahuja and Yang ("Superpixel Hierarchy", IEEE TIP 2018), which grows a minimum spanning tree
as Boruvka does: in each round every region picks the neighbour that it costs least to join, and all picks are joined. A round
is a few operations on arrays, and leaves less than half of the regions; a picture takes about ten.
"""

from __future__ import annotations

import itertools

import numpy as np

_EDGE_BITS = 28  # of a sorting key: the edge's number, below; its cost stands above
_NONE = np.iinfo(np.int64).max


def regions(colours: np.ndarray, scale: float, min_size: int) -> tuple[np.ndarray, int]:
    """Regions of a picture.

    Two neighbours a, b (over an edge of a pixel) of m_a, m_b pixels and mean colours c_a, c_b cost |c_a - c_b|^2 *
    m_a m_b / (m_a + m_b) to join, which is how much the squared error of painting regions in their mean colours grows.

    Args:
        colours: float (H, W, C).
        scale: regions are joined as long as it costs less than this.
        min_size: pixels; a smaller region joins the neighbour that costs least, whatever it costs.

    Returns:
        int64 (H, W), numbers 0 .. n-1 in raster order of the regions' first pixels' representatives, and n. Deterministic:
        ties go to the edge of the lower number.
    """
    h, w, channels = colours.shape
    colours = np.ascontiguousarray(colours, dtype=np.float32)
    labels, count = _first_round(colours, scale)
    index = np.arange(h * w).reshape(h, w)
    a = labels[np.concatenate([index[:, :-1].ravel(), index[:-1].ravel()])]  # (E,) the two ends of each edge
    b = labels[np.concatenate([index[:, 1:].ravel(), index[1:].ravel()])]
    flat = colours.reshape(h * w, channels)
    size = np.bincount(labels, minlength=count).astype(np.float32)
    total = np.stack([np.bincount(labels, flat[:, c], count) for c in range(channels)], 1).astype(np.float32)  # (n, C)

    small = False  # whether what is below `scale` is done, and only small regions are left to join
    for turn in itertools.count():
        a, b = _between(a, b, count, once=turn > 0)  # at first, sorting them costs more than having some twice
        if not len(a):
            break
        mean = total / size[:, None]
        difference = mean[a] - mean[b]
        cost = np.einsum("ij,ij->i", difference, difference) * (size[a] * size[b] / (size[a] + size[b]))
        allowed = cost < scale
        small = small or not allowed.any()
        if small:
            allowed = (size[a] < min_size) | (size[b] < min_size)
            if not allowed.any():
                break
        edges = np.flatnonzero(allowed)
        key = _keys(cost[edges], edges)
        best = np.full(count, _NONE)
        np.minimum.at(best, a[edges], key)
        np.minimum.at(best, b[edges], key)
        if small:
            best[size >= min_size] = _NONE
        picking = np.flatnonzero(best < _NONE)
        edge = best[picking] & ((1 << _EDGE_BITS) - 1)
        parent = np.arange(count)
        parent[picking] = a[edge] + b[edge] - picking  # the other end
        joined, count = _components(parent)
        size = np.bincount(joined, size, count).astype(np.float32)
        total = np.stack([np.bincount(joined, total[:, c], count) for c in range(channels)], 1).astype(np.float32)
        labels, a, b = joined[labels], joined[a], joined[b]
    return labels.reshape(h, w), count


def _first_round(colours: np.ndarray, scale: float) -> tuple[np.ndarray, int]:
    """Each pixel picks among its four neighbours: a round of `regions` on the grid. Returns int64 (H*W,) and n.

    Of equal costs the first of up, left, right, down wins. That is the order of the edges' numbers, if the edge from pixel p
    to the right is 2 p and the one down 2 p + 1; so all pixels agree on the order, and picks form no cycle.
    """
    h, w, _ = colours.shape
    cost = np.full((4, h, w), np.inf, np.float32)
    for difference, before, after in (
        (colours[1:] - colours[:-1], cost[0, 1:], cost[3, :-1]),
        (colours[:, 1:] - colours[:, :-1], cost[1, :, 1:], cost[2, :, :-1]),
    ):
        before[:] = after[:] = np.einsum("ijk,ijk->ij", difference, difference) / 2
    least, step = np.full((h, w), scale, np.float32), np.zeros((h, w), np.int64)
    for direction, offset in zip(cost, (-w, -1, 1, w)):
        better = direction < least
        least = np.where(better, direction, least)
        step[better] = offset
    return _components(np.arange(h * w) + step.ravel())


def _keys(cost: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """int64 that sort by cost, then by the edge's number: no two are equal, so picks form no cycle longer than two."""
    return (np.minimum(cost * 64, 2.0**34).astype(np.int64) << _EDGE_BITS) + edge


def _components(parent: np.ndarray) -> tuple[np.ndarray, int]:
    """Components of picks, each node's neighbour or itself: int64 (n,) of numbers from 0 in order of their roots, and how many."""
    nodes = np.arange(len(parent))
    root = np.where(
        (parent[parent] == nodes) & (nodes < parent), nodes, parent
    )  # two that picked each other: the lower
    while True:
        above = root[root]
        if np.array_equal(above, root):
            break
        root = above
    is_root = root == nodes
    return (np.cumsum(is_root) - 1)[root], int(is_root.sum())


def _between(a: np.ndarray, b: np.ndarray, count: int, once: bool) -> tuple[np.ndarray, np.ndarray]:
    """Edges between different regions; each once if so asked."""
    outer = a != b
    a, b = a[outer], b[outer]
    if not once:
        return a, b
    key = np.sort(np.minimum(a, b) * count + np.maximum(a, b))
    return np.divmod(key[np.diff(key, prepend=-1) > 0], count)
