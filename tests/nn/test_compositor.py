"""Layers of a clip: what shows where, in no order."""

from __future__ import annotations

import torch

from tokgen.nn.compositor import Compositor, Refiner, TemporalMix
from tokgen.nn.ellipses import EllipseCodec, Ellipses, canonical, measure, order_labels


def random_scene(m: int = 5, t: int = 3) -> Ellipses:
    shape = (2, m, t)
    alive = torch.ones(shape, dtype=torch.bool)
    alive[0, 1, 1:] = False
    return Ellipses(
        *(0.2 + 0.6 * torch.rand(shape) for _ in range(2)),
        *(0.05 + 0.2 * torch.rand(shape) for _ in range(2)),
        torch.rand(shape) - 0.5,
        0.5 + 0.5 * torch.rand(shape),
        alive,
    )


def drawn_slowly(net: Compositor, e: Ellipses, shapes, textures, h: int, w: int):
    """All layers sampled everywhere by grid_sample, then the largest few of each pixel."""
    u, v = canonical(e, h, w)
    logits = net.logits(e, shapes, u, v)
    b, m, t = e.x.shape
    places = (torch.stack([u, v], -1) / 3).view(b * m, t * h, w, 2)
    maps = torch.nn.functional.grid_sample(textures.flatten(0, 1), places, padding_mode="border", align_corners=False)
    maps = maps.view(b, m, -1, t, h, w)
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(net.layers, 1).indices, True)
    alpha = torch.where(keep, logits, -torch.inf).softmax(1)
    return (alpha[:, :, None] * maps).sum(1).movedim(1, 2)


def test_the_sparse_lookup_equals_sampling_all_layers():
    torch.manual_seed(0)
    net, e = Compositor(3), random_scene()
    shapes, textures = torch.randn(2, 5, 6, 6), torch.randn(2, 5, 4, 8, 8)
    features, _ = net(e, shapes, textures, (10, 12))
    assert torch.allclose(features, drawn_slowly(net, e, shapes, textures, 10, 12), atol=1e-4)


def test_gradients_reach_textures_shapes_and_settings():
    torch.manual_seed(0)
    net, e = Compositor(2), random_scene()
    shapes, textures = torch.randn(2, 5, 6, 6, requires_grad=True), torch.randn(2, 5, 4, 8, 8, requires_grad=True)
    net(e, shapes, textures, (10, 12))[0].square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (shapes, textures, net.sharpness, net.smallness))


def test_order_of_trajectories_does_not_matter():
    torch.manual_seed(0)
    net, e = Compositor(3), random_scene()
    shapes, textures = torch.randn(2, 5, 6, 6), torch.randn(2, 5, 4, 8, 8)
    order = torch.tensor([3, 1, 4, 0, 2])
    a, logits = net(e, shapes, textures, (10, 12))
    b, other = net(e[:, order], shapes[:, order], textures[:, order], (10, 12))
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(logits[:, order], other)


def test_where_nothing_lives_nothing_is_painted():
    net, e = Compositor(3), random_scene()
    e = Ellipses(e.x, e.y, e.sx, e.sy, e.rho, e.fill, torch.zeros_like(e.alive))
    features, _ = net(e, torch.zeros(2, 5, 4, 4), torch.ones(2, 5, 3, 4, 4), (6, 6))
    assert not features.any()


def test_a_texture_of_one_cell_and_fewer_trajectories_than_layers():
    net, e = Compositor(8), random_scene(m=2)
    features, _ = net(e, torch.zeros(2, 2, 1, 1), torch.full((2, 2, 3, 1, 1), 0.25), (6, 6))
    alive = e.alive.any(1)[:, :, None, None, None]
    assert torch.allclose(features, 0.25 * alive.expand_as(features).float())


def test_textures_travel_with_their_ellipse():
    """A dot that moves three pixels a frame paints the same pattern three pixels further."""
    labels = torch.full((1, 4, 48, 48), -1)
    for t in range(4):
        labels[0, t, 10:20, 5 + 6 * t : 17 + 6 * t] = 0
    labels, _ = order_labels(labels, 1)
    codec = EllipseCodec(4, 2, (480, 480, 512, 512, 33, 8))
    e = codec.decode(codec.encode(measure(labels, 1)), 4, torch.ones(1, 1, dtype=torch.bool))
    torch.manual_seed(0)
    features, _ = Compositor(1)(e, torch.zeros(1, 1, 4, 4), torch.rand(1, 1, 3, 6, 6), (48, 48))
    first, last = features[0, 0, :, 10:20, 5:17], features[0, 3, :, 10:20, 23:35]
    assert (first - last).abs().max() < 0.05 * first.std() + 0.05


def test_refiner_starts_with_what_is_painted():
    net = Refiner(5, 32, 1, 2)
    features = torch.rand(2, 3, 5, 4, 6)
    out = net(features)
    base = torch.nn.functional.interpolate(features.flatten(0, 1)[:, :3], scale_factor=2, mode="bilinear").view_as(out)
    assert out.shape == (2, 3, 3, 8, 12) and torch.equal(out, base)


def test_temporal_mix_sees_both_neighbours():
    mix = TemporalMix(2)
    x = torch.randn(1, 4, 2, 3, 3)
    assert torch.equal(mix(x), x)
    with torch.no_grad():
        mix.weight[0], mix.weight[2] = 1.0, 2.0
    out = mix(x)
    assert torch.allclose(out[:, 1], x[:, 1] + x[:, 0] + 2 * x[:, 2])
    assert torch.allclose(out[:, 3], x[:, 3] + x[:, 2] + 2 * x[:, 3])
