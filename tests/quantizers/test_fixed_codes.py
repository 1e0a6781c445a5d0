"""FSQ, LFQ, BSQ, SimVQ and residual VQ: their definitions, and the same ids and codes as vector-quantize-pytorch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as library
from peak_memory import peak_of

from tokgen.quantizers.base import code_usage, usage_stats
from tokgen.quantizers.fsq import FSQ
from tokgen.quantizers.lfq import BSQ, LFQ, bit_entropies, bit_groups
from tokgen.quantizers.residual import ResidualVQ
from tokgen.quantizers.simvq import SimVQ

# -- FSQ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [7, 4, 3], [8, 8, 8, 6, 5], [3]])
def test_fsq_gives_the_librarys_ids_and_codes(levels):
    z = 2 * torch.randn(4, 60, len(levels))
    ours, theirs = FSQ(len(levels), levels), library.FSQ(levels)
    out, (codes, ids) = ours(z), theirs(z)
    assert torch.equal(out.ids, ids.long())
    torch.testing.assert_close(out.codes, codes, rtol=0, atol=1e-6)
    weights = torch.randn_like(z)
    z.requires_grad_()
    gradient = torch.autograd.grad((ours(z).codes * weights).sum(), z)[0]
    expected = torch.autograd.grad((theirs(z)[0] * weights).sum(), z)[0]
    torch.testing.assert_close(gradient, expected)


def test_fsq_with_projections_gives_the_librarys_codes():
    ours, theirs = FSQ(12, [8, 5, 5]), library.FSQ([8, 5, 5], dim=12)
    theirs.load_state_dict(ours.state_dict())
    z = 2 * torch.randn(3, 20, 12)
    out, (codes, ids) = ours.eval()(z), theirs.eval()(z)
    assert torch.equal(out.ids, ids.long())
    torch.testing.assert_close(out.codes, codes)


@pytest.mark.parametrize("levels", [[3], [4, 3, 3], [5, 4, 3, 6], [8, 8]])
def test_fsq_reaches_every_code_and_ids_are_their_numbers(levels):
    fsq = FSQ(len(levels), levels).eval()
    size = math.prod(levels)
    codes = fsq.lookup(torch.arange(size))
    grid = [(torch.arange(level) - level // 2) / (level // 2) for level in levels]
    expected = torch.stack([torch.stack(c[::-1]) for c in itertools.product(*grid[::-1])])
    torch.testing.assert_close(codes, expected)
    z = 6 * torch.rand(200_000, len(levels)) - 3
    assert fsq(z).stats["usage"] == 1
    assert fsq(torch.tensor([[50.0] * len(levels)])).ids.item() == size - 1
    assert fsq(torch.tensor([[-50.0] * len(levels)])).ids.item() == 0


def test_fsq_ids_beyond_fp32_are_exact():
    """fp32 has no odd numbers above 2^24; ids of 8^20 codes do."""
    fsq = FSQ(20, [8] * 20).eval()
    ids = torch.randint(8**20, (500,))
    codes = fsq.lookup(ids)
    # a vector at the middle of the bin of its code
    half, offset = 7 * 1.001 / 2, 0.5
    z = ((codes * 4 + offset) / half).atanh() - math.atanh(offset / half)
    assert torch.equal(fsq(z).ids, ids)
    assert fsq(z).stats["perplexity"].item() == pytest.approx(500, rel=1e-4)  # counted without a histogram


# -- LFQ and BSQ ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spherical", [False, True])
def test_binary_codes_and_losses_are_the_librarys(spherical):
    bits = 8
    cls = BSQ if spherical else LFQ
    ours = cls(bits, bits, beta=0.3, entropy_weight=0.2, diversity=0.7, temperature=0.5).train()
    theirs = library.LFQ(
        dim=bits,
        codebook_size=2**bits,
        entropy_loss_weight=0.2,
        diversity_gamma=0.7,
        commitment_loss_weight=0.3,
        spherical=spherical,
    )
    z = torch.randn(3, 20, bits, requires_grad=True)
    out = ours(z)
    codes, ids, loss = theirs(z, inv_temperature=2.0)
    assert torch.equal(out.ids, ids.long())
    torch.testing.assert_close(out.codes, codes)
    # the library floors probabilities at 1e-5 inside the logarithm
    torch.testing.assert_close(sum(out.losses.values()), loss, rtol=2e-3, atol=2e-3)
    mine = torch.autograd.grad(sum(out.losses.values()), z)[0]
    other = torch.autograd.grad(loss, z)[0]
    assert F.cosine_similarity(mine.flatten(), other.flatten(), dim=0) > 0.999
    torch.testing.assert_close(ours.lookup(out.ids), theirs.indices_to_codes(ids))


def all_codes(bits):
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)), dtype=torch.float64)


@pytest.mark.parametrize("cls", [LFQ, BSQ])
@pytest.mark.parametrize("temperature", [0.3, 5.0])
def test_factorised_entropy_is_brute_force(cls, temperature):
    bits, n = 8, 50
    quantizer = cls(bits, bits, beta=0.0, entropy_weight=1.0, diversity=1.0, temperature=temperature).train()
    z = torch.randn(n, bits, requires_grad=True)
    y = quantizer.metric_space(z.double())
    p = torch.softmax(-torch.cdist(y, quantizer.size * all_codes(bits)).square() / temperature, -1)  # (n, 256)
    mean = p.mean(0)
    expected = -torch.special.xlogy(p, p).sum(1).mean() + torch.special.xlogy(mean, mean).sum()
    loss = quantizer(z).losses["entropy"]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0], rtol=1e-3, atol=1e-5
    )


def test_grouped_entropy_bounds_the_exact_one_and_chunks_do_not_matter(monkeypatch):
    logits = 3 * torch.randn(40, 8) @ torch.randn(8, 8)  # correlated bits
    exact = bit_entropies(logits, [8])
    for groups in ([4, 4], [3, 3, 2], [1] * 8):
        each, mean = bit_entropies(logits, groups)
        torch.testing.assert_close(each, exact[0])
        assert mean >= exact[1] - 1e-4
    independent = torch.tensor(list(itertools.product([-9.0, 9.0], repeat=6)))  # every pattern once
    torch.testing.assert_close(bit_entropies(independent, [3, 3])[1], bit_entropies(independent, [6])[1])
    torch.testing.assert_close(bit_entropies(independent, [6])[1].item(), 6 * math.log(2), rtol=1e-4, atol=0)
    logits.requires_grad_()
    whole = torch.autograd.grad(bit_entropies(logits, [8])[1], logits)[0]
    monkeypatch.setattr("tokgen.quantizers.lfq.CHUNK", 256 * 7)
    torch.testing.assert_close(torch.autograd.grad(bit_entropies(logits, [8])[1], logits)[0], whole)


def test_entropy_has_finite_gradients_at_certain_bits():
    logits = torch.tensor([[0.0, 1e4, -1e4, 50.0]], requires_grad=True)
    each, mean = bit_entropies(logits, [4])
    gradient = torch.autograd.grad(each - mean, logits)[0]
    assert gradient.isfinite().all()
    torch.testing.assert_close(each.item(), math.log(2), rtol=1e-5, atol=0)


def test_groups_are_even():
    assert bit_groups(12) == [12] and bit_groups(18) == [9, 9] and bit_groups(13) == [7, 6]
    assert bit_groups(18, 4) == [4, 4, 4, 3, 3] and bit_groups(36) == [9] * 4


@pytest.mark.slow
def test_lfq_of_18_bits_trains_in_200_megabytes():
    setup = """
from tokgen.quantizers.lfq import LFQ
lfq = LFQ(18, 18).train()
def step(n):
    z = torch.randn(n, 18, requires_grad=True)
    out = lfq(z)
    (out.codes.sum() + sum(out.losses.values())).backward()
    assert out.ids.max() < 2**18 and z.grad.abs().sum() > 0
step(16)
"""
    assert peak_of(setup, "step(4096)") < 200e6  # N x K would be 4.3 GB


# -- SimVQ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation_trick", [False, True])
def test_simvq_gives_the_librarys_ids_codes_and_gradients(rotation_trick):
    ours = SimVQ(6, 50, rotation_trick=rotation_trick).train()
    theirs = library.SimVQ(6, 50, rotation_trick=rotation_trick)
    with torch.no_grad():
        theirs.frozen_codebook.copy_(ours.codebook.weight)
        theirs.code_transform.weight.copy_(ours.transform.weight)
    z = torch.randn(3, 20, 6, requires_grad=True)
    out = ours(z)
    codes, ids, loss = theirs(z)
    assert torch.equal(out.ids, ids)
    torch.testing.assert_close(out.codes, codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(out.losses.values()), loss)
    weights = torch.randn_like(z)
    mine = torch.autograd.grad((out.codes * weights).sum() + sum(out.losses.values()), [z, ours.transform.weight])
    other = torch.autograd.grad((codes * weights).sum() + loss, [z, theirs.code_transform.weight], allow_unused=True)
    torch.testing.assert_close(mine[0], other[0], rtol=1e-3, atol=1e-5)
    if not rotation_trick:  # the library's rotation lets the task's gradient into the codebook as well
        torch.testing.assert_close(mine[1], other[1], rtol=1e-3, atol=1e-5)


def test_simvq_moves_unused_codes_and_keeps_the_frozen_ones():
    vq = SimVQ(6, 200).train()
    frozen = vq.codebook.weight.clone()
    before = vq.transformed(frozen).detach()
    optimizer = torch.optim.SGD(vq.parameters(), lr=1.0)
    out = vq(torch.randn(5, 6))
    sum(out.losses.values()).backward()
    optimizer.step()
    assert torch.equal(vq.codebook.weight, frozen)
    moved = (vq.transformed(frozen) - before).abs().sum(1) > 0
    assert moved.all() and len(out.ids.unique()) <= 5


# -- residual VQ ------------------------------------------------------------------------------------------------------


def test_residual_vq_gives_the_librarys_ids_and_codes():
    ours = ResidualVQ(6, 32, 3, kmeans_init=False).eval()
    theirs = library.ResidualVQ(dim=6, codebook_size=32, num_quantizers=3).eval()
    for stage, layer in zip(ours.stages, theirs.layers):
        stage.codebook.weight.copy_(torch.randn(32, 6))
        layer._codebook.embed.copy_(stage.codebook.weight[None])
    z = torch.randn(4, 25, 6)
    out, (codes, ids, _) = ours(z), theirs(z)
    assert torch.equal(out.ids, ids)
    torch.testing.assert_close(out.codes, codes)


def test_residual_vq_coarser_lookups_come_closer_step_by_step():
    vq = ResidualVQ(6, 16, 4).train()
    z = torch.randn(1000, 6)
    for _ in range(5):
        out = vq(z)
    out = vq.eval()(z)
    errors = [(vq.lookup(out.ids[:, :c]) - z).square().mean().item() for c in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3 * errors[0]
    assert torch.equal(vq.lookup(out.ids), out.codes)
    assert out.stats["usage"] == pytest.approx(sum(out.stats[f"usage_{c}"].item() for c in range(4)) / 4)


# -- statistics -------------------------------------------------------------------------------------------------------


def test_usage_and_perplexity_are_their_definitions():
    ids = torch.tensor([0, 0, 1, 3])
    expected = math.exp(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)))
    for size in (4, 1 << 40):  # by histogram, by distinct ids
        stats = code_usage(ids, size)
        assert stats["usage"].item() == pytest.approx(3 / size)
        assert stats["perplexity"].item() == pytest.approx(expected)
    assert usage_stats(torch.tensor([2, 1, 0, 1]))["perplexity"].item() == pytest.approx(expected)
    empty = code_usage(ids[:0], 4)
    assert empty["usage"] == 0 and empty["perplexity"].isfinite()
