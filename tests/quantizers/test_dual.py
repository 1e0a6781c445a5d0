"""What is particular to the dual codebook: pairs, weights, streams that are left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokgen.errors import ConfigError
from tokgen.quantizers.base import build_quantizer
from tokgen.quantizers.dual import DualVQ
from tokgen.quantizers.vq import VQ

K, S, P = 60, 5, 3


def unit(x, dims=(S, P)):
    return torch.cat([F.normalize(part, dim=-1) for part in x.split(dims, -1)], -1)


def distances(z, weight, pixel_weight=1.0):
    """Both squared distances of all pairs, written out: (n, K) each."""
    u, e = unit(z.double()), unit(weight.double())
    both = [(a[:, None] - b[None]).square().sum(-1) for a, b in zip(u.split((S, P), -1), e.split((S, P), -1))]
    return both[0], pixel_weight * both[1]


@pytest.mark.parametrize("pixel_weight", [1.0, 0.2, 7.0])
def test_the_index_is_the_pair_of_the_smallest_weighted_sum(pixel_weight):
    quantizer = DualVQ(S + P, K, S, pixel_weight=pixel_weight).eval()
    z = 3 * torch.randn(500, S + P)
    semantic, pixel = distances(z, quantizer.codebooks[0].weight, pixel_weight)
    assert torch.equal(quantizer(z).ids, (semantic + pixel).argmin(1))
    assert not torch.equal(semantic.argmin(1), (semantic + pixel).argmin(1))  # the pixels do have a say


def test_separate_indices_are_the_nearest_of_each_stream():
    quantizer = DualVQ(S + P, K, S, index="separate").eval()
    z = torch.randn(500, S + P)
    weight = torch.cat([book.weight for book in quantizer.codebooks], 1)
    out = quantizer(z)
    assert quantizer.codebook_sizes == (K, K) and out.ids.shape == (500, 2)
    assert torch.equal(out.ids, torch.stack([d.argmin(1) for d in distances(z, weight)], -1))
    both = [unit(weight)[out.ids[:, 0], :S], unit(weight)[out.ids[:, 1], S:]]
    torch.testing.assert_close(out.codes, torch.cat(both, 1))


def test_separate_indices_are_never_farther_than_a_shared_one():
    shared, separate = DualVQ(S + P, K, S).eval(), DualVQ(S + P, K, S, index="separate").eval()
    with torch.no_grad():
        for book, part in zip(separate.codebooks, shared.codebooks[0].weight.split((S, P), 1)):
            book.weight.copy_(part)
    z = torch.randn(300, S + P)
    error = [(unit(z) - q(z).codes).square().sum(1) for q in (shared, separate)]
    assert (error[1] <= error[0] + 1e-6).all() and error[1].mean() < 0.8 * error[0].mean()


def test_lengths_count_neither_in_vectors_nor_in_rows():
    quantizer = DualVQ(S + P, K, S).eval()
    z = torch.randn(200, S + P)
    before = quantizer(z)
    with torch.no_grad():
        quantizer.codebooks[0].weight.mul_(torch.rand(K, 1) + 0.5)
    after = quantizer(torch.cat([z[:, :S] * 5, z[:, S:] * 0.1], 1))
    assert torch.equal(before.ids, after.ids)
    torch.testing.assert_close(before.codes, after.codes)
    for part in after.codes.split((S, P), 1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(200))


def test_loss_and_gradients_are_those_of_the_written_out_formula():
    quantizer = DualVQ(S + P, K, S, pixel_weight=0.5, beta=0.3, entropy_weight=0.2, entropy_temperature=0.1).train()
    weight = quantizer.codebooks[0].weight
    z, weights = torch.randn(80, S + P, requires_grad=True), torch.randn(80, S + P)
    out = quantizer(z)
    (sum(out.losses.values()) + (out.codes * weights).sum()).backward()
    got = z.grad.clone(), weight.grad.clone()
    z.grad = weight.grad = None

    u, e = unit(z), unit(weight)
    code = e[out.ids]
    d = (u[:, None, :S] - e[None, :, :S]).square().sum(-1) + 0.5 * (u[:, None, S:] - e[None, :, S:]).square().sum(-1)
    p = (-d / 0.1).softmax(1)
    mean = p.mean(0)
    entropy = -(p * p.log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    losses = {
        "codebook": (code - u.detach()).square().mean(),
        "commitment": 0.3 * (u - code.detach()).square().mean(),
        "entropy": 0.2 * entropy,
    }
    assert out.losses.keys() == losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(out.losses[name], value)
    (sum(losses.values()) + ((u + (code - u).detach()) * weights).sum()).backward()
    torch.testing.assert_close(got[0], z.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("semantic_dim", [0, 8])
@pytest.mark.parametrize("index", ["shared", "separate"])
def test_one_stream_alone_is_an_ordinary_codebook_of_unit_vectors(semantic_dim, index):
    one = DualVQ(8, K, semantic_dim, index=index).train()
    vq = VQ(8, K, metric="cosine").train()
    vq.load_state_dict({"codebook.weight": one.codebooks[0].weight.detach()})
    z = torch.randn(100, 8)
    a, b = one(z), vq(z)
    assert one.codebook_sizes == (K,) and torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.codes, b.codes)
    for name in b.losses:
        torch.testing.assert_close(a.losses[name], b.losses[name])


@pytest.mark.parametrize("option", [{"revive_below": 5.0}, {"kmeans_init": True}])
def test_pairs_start_and_move_as_wholes(option):
    quantizer = DualVQ(S + P, K, S, **option).train()
    z = torch.randn(K, S + P)  # as many vectors as codes: k-means puts each code on one of them, as revival does
    quantizer(z)
    if "revive_below" in option:
        quantizer.codebooks[0].ema_count.zero_()
        quantizer(z)
    rows = quantizer.codebooks[0].weight.detach()
    farthest = (rows[:, None] - unit(z)[None]).abs().amax(-1)
    assert (farthest.min(1).values < 1e-5).sum() >= 0.9 * K
    for part in rows.split((S, P), 1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(K))


def test_codes_start_on_the_spheres():
    for part in DualVQ(40, 256).codebooks[0].weight.split((32, 8), 1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(256))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"semantic_dim": 9}, "0 to dim 8"),
        ({"semantic_dim": -1}, "0 to dim 8"),
        ({"index": "both"}, "'shared' or 'separate'"),
        ({"pixel_weight": 0.0}, "above 0"),
        ({"entropy_temperature": 0.0}, "above 0"),
    ],
)
def test_settings_that_cannot_work_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_quantizer({"type": "dual-vq", "codebook_size": 8, "semantic_dim": 4, **options}, 8)
