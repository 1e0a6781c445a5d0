"""Ellipses of trajectories: measured exactly, coded without loss of codes, drawn back to the labels they came from."""

from __future__ import annotations

import math

import pytest
import torch

from tokgen.errors import ConfigError, InputError
from tokgen.nn.ellipses import EllipseCodec, canonical, from_canonical, measure, order_labels

LEVELS = (128, 128, 64, 64, 32, 8)


def disk(size: int, x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> torch.Tensor:
    yy, xx = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    dx, dy = xx - x, yy - y
    u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    return (u / rx) ** 2 + (v / ry) ** 2 < 1


def scene(frames: int = 8, size: int = 64) -> torch.Tensor:
    """A background (7) and a disk (3) that is born in frame 2 and moves right, int64 (1, T, size, size)."""
    labels = torch.full((1, frames, size, size), 7)
    for t in range(2, frames):
        labels[0, t][disk(size, 12 + 4 * t, 20, 6, 9)] = 3
    return labels


def test_order_is_by_size_and_not_by_number():
    labels = scene()
    ranks, numbers = order_labels(labels, 8)
    assert numbers.tolist() == [2]
    assert torch.equal(ranks, (labels == 3).long())
    renamed = torch.where(labels == 3, 90, 1)
    assert torch.equal(order_labels(renamed, 8)[0], ranks)


def test_equal_sizes_go_by_their_first_pixel():
    labels = torch.full((1, 1, 2, 4), -1)
    labels[0, 0, 1, 0], labels[0, 0, 0, 2], labels[0, 0, 0, 0] = 0, 1, 2
    ranks, numbers = order_labels(labels, 8)
    assert numbers.tolist() == [3] and ranks[0, 0].tolist() == [[0, -1, 1, -1], [2, -1, -1, -1]]


def test_those_beyond_the_count_are_none():
    ranks, numbers = order_labels(scene(), 1)
    assert numbers.tolist() == [1]
    assert torch.equal(ranks == -1, scene() == 3)


def test_a_clip_without_trajectories():
    ranks, numbers = order_labels(torch.full((2, 1, 2, 2), -1), 4)
    assert numbers.tolist() == [0, 0] and (ranks == -1).all()


@pytest.mark.parametrize("angle", [0.0, 0.6, -1.1])
def test_moments_are_those_of_the_ellipse(angle):
    labels = torch.full((1, 1, 256, 256), -1)
    labels[0, 0][disk(256, 100, 150, 60, 25, angle)] = 0
    e = measure(labels, 2)[0, 0, 0]
    c, s = math.cos(angle), math.sin(angle)
    varx, vary = (60 * c) ** 2 / 4 + (25 * s) ** 2 / 4, (60 * s) ** 2 / 4 + (25 * c) ** 2 / 4  # of a uniform ellipse
    cov = (60**2 - 25**2) * c * s / 4
    assert abs(float(e.x) * 256 - 100) < 0.1 and abs(float(e.y) * 256 - 150) < 0.1
    assert abs(float(e.sx) * 256 - varx**0.5) < 0.1 and abs(float(e.sy) * 256 - vary**0.5) < 0.1
    assert abs(float(e.rho) - cov / (varx * vary) ** 0.5) < 0.01
    assert abs(float(e.fill) - 1) < 0.01
    assert not measure(labels, 2).alive[0, 1].any()


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_any_codes_come_back(keys):
    """encode(decode(ids)) == ids, wherever a key is seen by some frame."""
    codec = EllipseCodec(16, keys, LEVELS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randint(0, n, (4, 50), generator=generator) for n in codec.codebook_sizes], -1)
    ids[..., 0], ids[..., 1] = 0, 15
    ids[..., 7::6] = ids[..., 7::6].clamp(min=1)  # a key at which nothing shows says nothing of the ellipse
    mask = torch.ones(4, 50, dtype=torch.bool)
    assert torch.equal(codec.encode(codec.decode(ids, 16, mask)), ids)


def test_decoded_values_lie_in_the_cell_that_was_coded():
    codec = EllipseCodec(8, 3, LEVELS)
    labels, _ = order_labels(scene(), 4)
    e = measure(labels, 4)
    ids = codec.encode(e)
    d = codec.decode(ids, 8, torch.tensor([[True, True, False, False]]))
    assert ids[0, 1, :2].tolist() == [2, 7] and not ids[0, 2:].any()
    assert torch.equal(d.alive, e.alive)
    seen = e.alive[0, 1]
    assert (d.x - e.x)[0, 1, seen].abs().max() < 1 / 128
    assert (d.sx.log() - e.sx.log())[0, 1, seen].abs().max() < math.log(0.6 / 0.004) / 64 + 0.05


def test_hidden_in_the_middle_of_its_life():
    labels = scene(frames=9)
    labels[:, 4:7][labels[:, 4:7] == 3] = 7
    labels, _ = order_labels(labels, 2)
    codec = EllipseCodec(9, 3, LEVELS)
    d = codec.decode(codec.encode(measure(labels, 2)), 9, torch.ones(1, 2, dtype=torch.bool))
    assert d.alive[0, 1].tolist() == [False, False, True, True, False, False, False, True, True]


def test_canonical_places_and_back():
    codec = EllipseCodec(8, 2, LEVELS)
    labels, _ = order_labels(scene(), 2)
    e = codec.decode(codec.encode(measure(labels, 2)), 8, torch.ones(1, 2, dtype=torch.bool))
    x, y = from_canonical(e, 5)
    u, v = canonical(e, 64, 64)
    # of the centre cell of a canonical map, the pixel at its place lies within a pixel's width of the ellipse's centre
    at = (y[0, 1, 4, 2, 2] * 64).long(), (x[0, 1, 4, 2, 2] * 64).long()
    assert abs(float(u[0, 1, 4][at])) < 0.4 and abs(float(v[0, 1, 4][at])) < 0.4
    corner_x, corner_y = x[0, 1, 4, 0, 0], y[0, 1, 4, 0, 0]
    e = e[0, 1, 4]
    du = (corner_x - e.x) / e.sx
    dv = ((corner_y - e.y) / e.sy - e.rho * du) / (1 - e.rho**2).sqrt()
    assert abs(float(du) + 2.4) < 1e-3 and abs(float(dv) + 2.4) < 1e-3  # centre of the first of five cells over -3 .. 3


def test_a_power_diagram_gives_the_labels_back():
    labels, _ = order_labels(scene(), 2)
    codec = EllipseCodec(8, 3, LEVELS)
    e = codec.decode(codec.encode(measure(labels, 2)), 8, torch.ones(1, 2, dtype=torch.bool))
    u, v = canonical(e, 64, 64)
    area = (e.sx * e.sy).log()[..., None, None]
    logits = torch.where(e.alive[..., None, None], e.fill.log()[..., None, None] - (u**2 + v**2) / 2 - area / 2, -1e4)
    assert (logits.argmax(1) == labels).float().mean() > 0.98


def test_bad_sizes():
    with pytest.raises(ConfigError, match="levels"):
        EllipseCodec(8, 3, (8, 8))
    with pytest.raises(InputError, match="9 frames"):
        EllipseCodec(8, 3, LEVELS).encode(measure(torch.zeros(1, 9, 4, 4, dtype=torch.int64), 1))
