"""`VQ`: what its training does to the codebook."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peak_memory import peak_of
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to as library_rotate_to

from tokgen.quantizers.vq import VQ, assignment_entropies, kmeans, rotate_to


def error(quantizer, z):
    """Mean squared error of the codes, in eval mode."""
    training = quantizer.training
    codes = quantizer.eval()(z).codes
    quantizer.train(training)
    return (codes - z).square().mean().item()


def clusters(n, k=20, d=6, spread=0.05):
    centers = 3 * torch.randn(k, d)
    return centers[torch.randint(k, (n,))] + spread * torch.randn(n, d)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_ema_is_the_textbook_update(metric):
    """arXiv 1711.00937, appendix A.1, with one-hot matrices in float64 and smoothed counts."""
    k, d, decay, eps = 24, 5, 0.9, 1e-3
    vq = VQ(d, k, metric=metric, update="ema", decay=decay, eps=eps).train()
    weight = vq.codebook.weight.double()
    count, total = torch.ones(k).double(), weight.clone()
    for _ in range(5):
        z = torch.randn(3, 40, d)
        y = z.reshape(-1, d).double()
        codes = weight
        if metric == "cosine":
            y, codes = F.normalize(y, dim=-1), F.normalize(weight, dim=-1)
        ids = torch.cdist(y, codes).argmin(1)
        out = vq(z)
        assert torch.equal(out.ids.reshape(-1), ids)
        torch.testing.assert_close(
            out.losses["commitment"].double(), 0.25 * (y - codes[ids]).square().mean(), rtol=1e-5, atol=1e-7
        )
        onehot = F.one_hot(ids, k).double()
        count = decay * count + (1 - decay) * onehot.sum(0)
        total = decay * total + (1 - decay) * onehot.T @ y
        smoothed = (count + eps) / (count.sum() + k * eps) * count.sum()
        weight = torch.where(onehot.sum(0)[:, None] > 0, total / smoothed[:, None], weight)
        torch.testing.assert_close(vq.codebook.ema_count.double(), count, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vq.codebook.ema_sum.double(), total, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vq.codebook.weight.double(), weight, rtol=1e-5, atol=1e-5)
    assert "codebook" not in out.losses


def test_the_codebook_term_has_a_weight_of_its_own():
    z = torch.randn(40, 4)
    losses = {}
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        losses[weight] = VQ(4, 16, beta=1.0, codebook_weight=weight).train()(z).losses
    assert losses[0.25]["codebook"] == 0.25 * losses[1.0]["codebook"]
    assert losses[0.25]["commitment"] == losses[1.0]["commitment"] == losses[1.0]["codebook"]


def test_unused_codes_stay_where_they_are():
    vq = VQ(3, 8, update="ema", decay=0.5).train()
    vq.codebook.weight[4:] = 100.0
    for _ in range(200):  # their counts underflow to 0
        vq(torch.randn(20, 3))
    assert vq.codebook.ema_count[4:].max() < 1e-30
    assert vq.codebook.weight[4:].eq(100).all()
    out = vq(torch.full((5, 3), 99.0))
    assert out.ids.eq(4).all()
    torch.testing.assert_close(vq.codebook.weight[4], torch.full((3,), 99.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_training_lowers_the_error(update):
    vq = VQ(6, 40, update=update, decay=0.9).train()
    z = clusters(1000)
    before = error(vq, z)
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.05) if update == "gradient" else None
    for _ in range(60):
        losses = vq(z[torch.randint(1000, (200,))]).losses
        if optimizer:
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    assert error(vq, z) < 0.7 * before


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_revival_resets_statistics_and_raises_usage(update, metric):
    options = {"metric": metric, "update": update, "decay": 0.9}
    alive = VQ(6, 64, revive_below=0.2, **options).train()
    dead = VQ(6, 64, **options).train()
    lonely = F.normalize(torch.randn(6), dim=0)
    with torch.no_grad():  # all but one code lie where no vector is
        for vq in (alive, dead):
            vq.codebook.weight.copy_(-50 * lonely + 0.001 * torch.randn(64, 6))
            vq.codebook.weight[0] = lonely
            if update == "ema":
                vq.codebook.ema_sum.copy_(vq.codebook.weight)
    data = 2 * lonely + 0.5 * torch.randn(4000, 6)
    batch = lambda: data[torch.randint(4000, (256,))]  # noqa: E731
    for _ in range(30):
        last = dead(batch()).stats
        before = alive.codebook.weight.detach().clone()
        counts = alive.codebook.ema_count.clone()
        z = batch()
        stats = alive(z).stats
        fell = counts < 0.2
        if fell.any():
            # at the start of the step; then one update of the averages
            now = alive.codebook.ema_count[fell]
            assert (now >= 0.9 * alive.codebook.start_count - 1e-6).all()
            assert not torch.equal(alive.codebook.weight[fell], before[fell])
            if update == "gradient":  # nothing moves a code after its revival
                y = F.normalize(z, dim=-1) if metric == "cosine" else z
                moved = alive.codebook.weight.detach()[fell]
                assert (moved[:, None] == y).all(-1).any(1).all()
                assert len(moved.unique(dim=0)) == len(moved)
            else:
                total = alive.codebook.ema_sum[fell] / now[:, None]
                torch.testing.assert_close(total, alive.codebook.weight[fell], rtol=1e-3, atol=1e-3)
    assert last["usage"] < 0.05
    assert stats["usage"] > 0.5 and stats["perplexity"] > 10 * last["perplexity"]


def test_no_more_codes_are_revived_than_there_are_vectors():
    vq = VQ(4, 50, update="ema", revive_below=1.0).train()
    vq.codebook.ema_count.zero_()
    before = vq.codebook.weight.clone()
    vq(torch.randn(8, 4))
    # 8 codes move to the 8 vectors, each of which then chooses it
    assert (vq.codebook.weight != before).any(1).sum() == 8
    assert (vq.codebook.ema_count > 0).sum() == 8


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_kmeans_start_beats_the_random_start(metric):
    z = clusters(2000)
    options = {"metric": metric, "update": "ema"}
    started = VQ(6, 32, kmeans_init=True, **options).train()
    random = VQ(6, 32, **options).train()
    started(z), random(z)
    space = F.normalize(z, dim=-1) if metric == "cosine" else z
    assert bool(started.codebook.started) and int(started.codebook.step) == 1
    assert error(started, space) < 0.25 * error(random, space)
    weight = started.codebook.weight.clone()
    started.eval()(z)
    started.train()(z)
    assert (started.codebook.weight - weight).norm() < 0.2 * weight.norm()  # it does not start again


def test_kmeans_finds_separate_clusters_and_copes_with_few_vectors():
    generator = torch.Generator().manual_seed(0)
    z = clusters(3000, k=16, spread=0.01)
    sampled = z[torch.randperm(3000)[:64]]
    centers = kmeans(z, 64, generator)
    assert torch.cdist(z, centers).min(1).values.max() < 0.1
    assert torch.cdist(z, centers).argmin(1).unique().numel() == 64
    assert (
        torch.cdist(z, centers).min(1).values.square().mean()
        < 0.9 * torch.cdist(z, sampled).min(1).values.square().mean()
    )
    loose = torch.cat([torch.zeros(500, 6), 5 * torch.eye(6)])  # a start of 7 equal vectors leaves 6 centers empty
    assert torch.cdist(loose, kmeans(loose, 7, generator)).min(1).values.max() < 1e-3
    few = kmeans(z[:5], 12, generator)
    assert few.shape == (12, 6) and few.isfinite().all() and len(few.unique(dim=0)) == 12
    unit = kmeans(F.normalize(z, dim=1), 24, generator, "cosine")
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(24))


def test_resume_in_the_midst_repeats_start_and_revival():
    options = {"dim": 4, "codebook_size": 40, "update": "ema", "decay": 0.8, "kmeans_init": True, "revive_below": 0.3}
    batches = [torch.randn(50, 4) + i for i in range(12)]
    whole = VQ(**options).train()
    states = []
    for z in batches:
        states.append(copy.deepcopy(whole.state_dict()))
        whole(z)
    for stop in (0, 1, 5, 11):
        torch.manual_seed(99)
        resumed = VQ(**options).train()
        resumed.load_state_dict(states[stop])
        torch.rand(7)  # the global generator is elsewhere
        for z in batches[stop:]:
            resumed(z)
        assert all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())
    assert int(whole.codebook.step) == 12


def test_cosine_ignores_lengths_and_keeps_weights_unnormalised():
    vq = VQ(5, 30, metric="cosine").train()
    with torch.no_grad():
        vq.codebook.weight.mul_(torch.rand(30, 1) * 9 + 1)
    z = torch.randn(50, 5)
    out, longer = vq(z), vq(3 * z)
    assert torch.equal(out.ids, longer.ids)
    torch.testing.assert_close(out.codes.norm(dim=-1), torch.ones(50))
    assert vq.codebook.weight.norm(dim=1).max() > 1.5


def test_plain_state_dict_is_the_codebook_alone():
    assert list(VQ(4, 8).state_dict()) == ["codebook.weight"]
    assert [name for name, _ in VQ(4, 8).named_parameters()] == ["codebook.weight"]
    ema = VQ(4, 8, update="ema")
    assert not list(ema.parameters())
    assert set(ema.state_dict()) == {"codebook.weight", "codebook.ema_sum", "codebook.ema_count"}


def test_commitment_and_codebook_terms_pull_the_right_side():
    vq = VQ(4, 16, beta=0.5).train()
    z = torch.randn(30, 4, requires_grad=True)
    out = vq(z)
    commitment = torch.autograd.grad(out.losses["commitment"], [z, vq.codebook.weight], allow_unused=True)
    codebook = torch.autograd.grad(out.losses["codebook"], [z, vq.codebook.weight], allow_unused=True)
    codes = vq.codebook.weight[out.ids]
    torch.testing.assert_close(commitment[0], 0.5 * 2 * (z - codes).detach() / z.numel())
    assert commitment[1] is None and codebook[0] is None
    expected = torch.zeros(16, 4).index_add_(0, out.ids, 2 * (codes - z).detach() / z.numel())
    torch.testing.assert_close(codebook[1], expected)


def test_entropies_equal_the_definition_and_chunks_do_not_matter(monkeypatch):
    y, codes = torch.randn(70, 4, requires_grad=True), torch.randn(33, 4, requires_grad=True)
    whole = assignment_entropies(y, codes, 0.5)
    p = torch.softmax(-torch.cdist(y.double(), codes.double()).square() / 0.5, -1)
    mean = p.mean(0)
    expected = (-(p * p.log()).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum())
    gradients = torch.autograd.grad(whole[0] - whole[1], [y, codes])
    exact = torch.autograd.grad(expected[0] - expected[1], [y, codes])
    monkeypatch.setattr("tokgen.quantizers.vq.ENTROPY_CHUNK", 33 * 8)
    chunked = assignment_entropies(y, codes, 0.5)
    in_chunks = torch.autograd.grad(chunked[0] - chunked[1], [y, codes])
    for i in range(2):
        for value in (whole[i], chunked[i]):
            torch.testing.assert_close(value.double(), expected[i], rtol=1e-5, atol=1e-6)
        for gradient in (gradients[i], in_chunks[i]):
            torch.testing.assert_close(gradient, exact[i].float(), rtol=1e-4, atol=1e-6)


def test_rotation_trick_is_the_published_rotation():
    """Value: the codes, exactly. Gradient: of the library's rotation; it keeps angles, unlike straight-through."""
    z, codes = torch.randn(40, 5, requires_grad=True), torch.randn(40, 5)
    out = rotate_to(z, codes)
    torch.testing.assert_close(out, codes, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(40, 5)
    gradient = torch.autograd.grad((out * upstream).sum(), z)[0]
    expected = torch.autograd.grad((library_rotate_to(z, codes) * upstream).sum(), z)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    angle = F.cosine_similarity(upstream, codes, dim=1)
    torch.testing.assert_close(F.cosine_similarity(gradient, z, dim=1), angle, rtol=1e-4, atol=1e-4)
    zero = torch.zeros(1, 5, requires_grad=True)
    assert torch.autograd.grad(rotate_to(zero, codes[:1]).sum(), zero)[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("update, entropy", [("ema", 0.0), ("gradient", 0.1)])
def test_memory_of_a_training_step_is_bounded(update, entropy):
    """N x K in fp32 is 256 MiB."""
    setup = f"""
from tokgen.quantizers.vq import VQ
vq = VQ(8, 32768, update={update!r}, entropy_weight={entropy}).train()
def step(n):
    z = torch.randn(n, 8, requires_grad=True)
    out = vq(z)
    (out.codes.sum() + sum(out.losses.values())).backward()
step(64)
"""
    assert peak_of(setup, "step(2048)") < 128 << 20
