"""`IBQ`: the gradients of index backpropagation against the formula written out, and what they cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peak_memory import peak_of

from tests.ranks import run_on_ranks
from tokgen.errors import ConfigError
from tokgen.quantizers.ibq import IBQ, index_backpropagation


def written_out(y, codebook):
    """(codes, rows, ids) with one N x K matrix and autograd, as arXiv 2412.02692 writes it (sec. 3.2)."""
    p = (y @ codebook.T).softmax(-1)
    ids = p.argmax(-1)
    hard = F.one_hot(ids, len(codebook)).to(y)
    return (hard - p.detach() + p) @ codebook, hard @ codebook, ids


@pytest.mark.parametrize("scale", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("chunk", [None, 3 * 50])
def test_gradients_are_those_of_the_formula(monkeypatch, scale, chunk):
    if chunk:
        monkeypatch.setattr("tokgen.quantizers.vq.ENTROPY_CHUNK", chunk)
    y, codebook = scale * torch.randn(70, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    upstream = torch.randn(70, 6, dtype=torch.float64)
    y.requires_grad_(), codebook.requires_grad_()
    expected, _, ids = written_out(y, codebook)
    got, *entropies = index_backpropagation(y, codebook, ids)
    assert entropies == [0, 0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    exact = torch.autograd.grad((expected * upstream).sum(), [y, codebook])
    for gradient, want in zip(torch.autograd.grad((got * upstream).sum(), [y, codebook]), exact):
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-12)
    assert (exact[1].abs().sum(1) > 0).all()  # every row


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_a_step_is_that_of_the_formula(metric):
    """All losses and their gradients together, in double precision."""
    quantizer = IBQ(6, 40, metric=metric, entropy_temperature=0.3, sample_weight=0.7, batch_weight=1.3).train()
    weight = quantizer.codebook.weight
    if metric == "cosine":
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(40))
        with torch.no_grad():
            weight.mul_(torch.rand(40, 1) * 3 + 0.5)  # lengths say nothing
    z, upstream = torch.randn(3, 20, 6, requires_grad=True), torch.randn(3, 20, 6)
    out = quantizer(z)
    ((out.codes * upstream).sum() + sum(out.losses.values())).backward()

    y, codebook = z.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    normal = (lambda x: F.normalize(x, dim=-1)) if metric == "cosine" else (lambda x: x)
    flat, rows = normal(y.reshape(-1, 6)), normal(codebook)
    codes, hard, ids = written_out(flat, rows)
    p = (flat @ rows.T / 0.3).softmax(-1)
    mean = p.mean(0)
    losses = {
        "quantization": (codes - flat).square().mean(),
        "commitment": (hard.detach() - flat).square().mean(),
        "codebook": 0.25 * (hard - flat.detach()).square().mean(),
        "entropy": 0.05 * (-0.7 * (p * p.log()).sum(1).mean() + 1.3 * (mean * (mean + 1e-5).log()).sum()),
    }
    ((codes * upstream.reshape(-1, 6)).sum() + sum(losses.values())).backward()
    assert torch.equal(out.ids.reshape(-1), ids) and out.losses.keys() == losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(out.losses[name].double(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad.double(), y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), codebook.grad, rtol=1e-4, atol=1e-5)


def test_nothing_goes_straight_through():
    """Where the softmax is saturated the encoder gets nothing of the picture's loss."""
    quantizer = IBQ(6, 40, entropy_weight=0.0).train()
    z = (1000 * torch.randn(30, 6)).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(z).codes.sum(), z)
    assert gradient.abs().max() < 1e-6


def test_the_code_is_the_largest_product_and_not_the_nearest():
    quantizer = IBQ(8, 200).eval()
    z = torch.randn(100, 8)
    weight = quantizer.codebook.weight.detach()
    out = quantizer(z)
    assert torch.equal(out.ids, (z @ weight.T).argmax(1))
    assert (out.ids != torch.cdist(z, weight).argmin(1)).float().mean() > 0.3
    assert torch.equal(out.codes, weight[out.ids])  # raw rows, bit for bit


def test_the_published_weights_and_the_papers():
    z = torch.randn(40, 4)
    losses = []
    for options in ({}, {"beta": 0.25, "codebook_weight": 1.0}):
        torch.manual_seed(0)
        losses.append(IBQ(4, 16, **options).train()(z).losses)
    code, paper = losses
    assert code["codebook"] == 0.25 * code["commitment"] == 0.25 * code["quantization"]
    assert paper["commitment"] == 0.25 * paper["codebook"] and paper["codebook"] == code["commitment"]
    assert code["entropy"] == paper["entropy"]


@pytest.mark.parametrize("chunk", [1 << 21, 33 * 8])
@pytest.mark.parametrize("masked", [False, True])
def test_entropies_share_the_products_and_equal_the_definition(monkeypatch, chunk, masked):
    monkeypatch.setattr("tokgen.quantizers.vq.ENTROPY_CHUNK", chunk)
    y, codes = torch.randn(70, 4, dtype=torch.float64), torch.randn(33, 4, dtype=torch.float64)
    upstream, keep = torch.randn(70, 4, dtype=torch.float64), torch.arange(70) % 3 > 0 if masked else None
    y.requires_grad_(), codes.requires_grad_()
    rows, _, ids = written_out(y, codes)
    p = torch.softmax((y if keep is None else y[keep]) @ codes.T / 0.5, -1)
    mean = p.mean(0)
    expected = (rows, -(p * p.log()).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum())
    got = index_backpropagation(y, codes, ids, keep, 0.5)
    total = lambda out: (out[0] * upstream).sum() + out[1] - 2 * out[2]  # noqa: E731
    exact = torch.autograd.grad(total(expected), [y, codes])
    for value, want in zip(got, expected):
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-12)
    for gradient, want in zip(torch.autograd.grad(total(got), [y, codes]), exact):
        torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-11)


def test_backward_under_autocast_is_fp32():
    """Manual optimization calls backward inside the trainer's autocast."""
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        quantizer = IBQ(8, 64, entropy_temperature=0.2).train()
        z = torch.randn(50, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = quantizer(z)
            ((out.codes * torch.randn(50, 8)).sum() + out.losses["entropy"]).backward()
        gradients.append((z.grad, quantizer.codebook.weight.grad))
    for one, two in zip(*gradients):
        assert torch.equal(one, two)


def test_training_uses_the_whole_codebook():
    """Three steps of Adam move every row, and a small problem is learned: the error falls and the codes spread."""
    torch.manual_seed(1)
    quantizer = IBQ(6, 64).train()
    data = 3 * torch.randn(16, 6)[torch.randint(16, (2000,))] + 0.3 * torch.randn(2000, 6)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    before = quantizer.codebook.weight.detach().clone()
    errors = []
    for step in range(200):
        batch = data[torch.randint(2000, (256,))]
        out = quantizer(batch)
        optimizer.zero_grad()
        sum(out.losses.values()).backward()
        optimizer.step()
        errors.append((out.codes - batch).square().mean().item())
        if step == 2:
            assert (quantizer.codebook.weight != before).all(1).all()
    assert sum(errors[-10:]) < 0.2 * sum(errors[:10])
    assert quantizer.eval()(data).stats["usage"] >= 16 / 64


@pytest.mark.parametrize(
    "options, message", [({"metric": "l2"}, "'dot' or 'cosine'"), ({"entropy_temperature": 0.0}, "above 0")]
)
def test_settings_that_cannot_work_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        IBQ(8, 16, **options)


def work(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    quantizer = torch.nn.parallel.DistributedDataParallel(IBQ(4, 48, entropy_weight=0.0).train())
    stats = _step(quantizer, torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(7))[rank])
    torch.save((dict(quantizer.module.named_parameters()), stats), f"{folder}/{rank}.pt")


def _step(quantizer, z) -> dict:
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    out = quantizer(z)
    (out.codes.square().mean() + sum(out.losses.values())).backward()
    optimizer.step()
    return out.stats


@pytest.mark.slow
def test_two_ranks_equal_one_process_with_the_joint_batch(tmp_path):
    run_on_ranks(work, tmp_path)
    (one, stats), (two, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one["codebook.weight"], two["codebook.weight"]) and stats == other
    torch.manual_seed(0)
    joint = IBQ(4, 48, entropy_weight=0.0).train()
    before = joint.codebook.weight.detach().clone()
    expected = _step(joint, torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(7)))
    assert stats == expected
    torch.testing.assert_close(one["codebook.weight"], joint.codebook.weight, rtol=1e-5, atol=1e-6)
    assert (joint.codebook.weight - before).abs().max() > 1e-3


@pytest.mark.slow
def test_memory_of_a_training_step_is_bounded():
    """N x K in fp32 is 256 MiB, and written out it exists six times over."""
    setup = """
from tokgen.quantizers.ibq import IBQ
ibq = IBQ(8, 32768).train()
def step(n):
    z = torch.randn(n, 8, requires_grad=True)
    out = ibq(z)
    (out.codes.sum() + sum(out.losses.values())).backward()
step(64)
"""
    assert peak_of(setup, "step(2048)") < 128 << 20
