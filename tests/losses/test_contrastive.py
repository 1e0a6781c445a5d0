"""The contrastive loss against its formula, and over two ranks against one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_on_ranks
from tokgen.losses.contrastive import contrastive_loss

BATCH, DIM = 6, 5
SCALE = torch.tensor(7.0)
GROUPS = torch.tensor([0, 1, 2, 0, 3, 1])


def rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, DIM, generator=generator) for _ in range(2)]


def test_it_is_the_symmetric_cross_entropy():
    images, texts = rows()
    logits = 7 * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    own = torch.arange(BATCH)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert torch.allclose(contrastive_loss(images, texts, SCALE), expected, atol=1e-6)


def test_equal_captions_are_no_negatives():
    images, texts = rows()
    texts[3], texts[5] = texts[0], texts[1]
    images[3], images[5] = images[0], images[1]
    apart = torch.eye(DIM)[[0, 1, 2, 0, 3, 1]]
    # with pairs of twins told apart perfectly, what is left is choosing evenly between twins
    loss = contrastive_loss(apart, apart, torch.tensor(100.0), GROUPS)
    assert loss.item() == pytest.approx((4 * torch.tensor(2.0).log() / 6).item(), abs=1e-4)
    # and the gradient does not push twins apart
    x = apart.clone().requires_grad_()
    contrastive_loss(x, apart, torch.tensor(100.0), GROUPS).backward()
    assert x.grad.abs().max() < 1e-4


def test_embeddings_of_half_precision_are_compared_in_full():
    images, texts = rows()
    loss = contrastive_loss(images.bfloat16(), texts.bfloat16(), SCALE)
    assert loss.dtype == torch.float32


def test_label_smoothing_spreads_the_target():
    images, texts = rows()
    logits = 7 * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    own = torch.arange(BATCH)
    parts = [F.cross_entropy(x, own, label_smoothing=0.1) for x in (logits, logits.T)]
    assert torch.allclose(contrastive_loss(images, texts, SCALE, label_smoothing=0.1), sum(parts) / 2, atol=1e-6)


def work(rank: int, folder: str) -> None:
    results = {}
    for name, groups in (("plain", None), ("groups", GROUPS)):
        images, texts = (x[3 * rank : 3 * rank + 3].clone().requires_grad_() for x in rows())
        loss = contrastive_loss(images, texts, SCALE, None if groups is None else groups[3 * rank : 3 * rank + 3])
        loss.backward()
        results[name] = loss.detach(), images.grad, texts.grad
    for negatives in ("ranks-detached", "local"):
        images, texts = (x[3 * rank : 3 * rank + 3].clone().requires_grad_() for x in rows())
        loss = contrastive_loss(images, texts, SCALE, negatives=negatives)
        loss.backward()
        results[negatives] = loss.detach(), images.grad, texts.grad
    torch.save(results, f"{folder}/{rank}.pt")


def test_two_ranks_are_one_process_with_the_joint_batch(tmp_path):
    run_on_ranks(work, tmp_path)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for name, groups in (("plain", None), ("groups", GROUPS)):
        images, texts = (x.clone().requires_grad_() for x in rows())
        loss = contrastive_loss(images, texts, SCALE, groups)
        loss.backward()
        parts = [r[name] for r in ranks]
        assert torch.allclose((parts[0][0] + parts[1][0]) / 2, loss.detach(), atol=1e-6)
        # data-parallel training averages gradients of weights over ranks: half of each rank's sum
        for k, expected in ((1, images.grad), (2, texts.grad)):
            assert torch.allclose(torch.cat([p[k] for p in parts]) / 2, expected, atol=1e-6)

    for rank, parts in enumerate(ranks):
        mine = slice(3 * rank, 3 * rank + 3)
        others = [F.normalize(x, dim=1) for x in rows()]
        own = 3 * rank + torch.arange(3)
        # negatives of all ranks as constants: gradients only through the rows that ask
        images, texts = (x[mine].clone().requires_grad_() for x in rows())
        asked = (
            F.cross_entropy(7 * F.normalize(x, dim=1) @ y.T, own) for x, y in ((images, others[1]), (texts, others[0]))
        )
        loss = sum(asked) / 2
        loss.backward()
        for got, expected in zip(parts["ranks-detached"], (loss.detach(), images.grad, texts.grad)):
            assert torch.allclose(got, expected, atol=1e-6)
        # this rank's rows alone
        images, texts = (x[mine].clone().requires_grad_() for x in rows())
        loss = contrastive_loss(images, texts, SCALE)
        loss.backward()
        for got, expected in zip(parts["local"], (loss.detach(), images.grad, texts.grad)):
            assert torch.allclose(got, expected, atol=1e-6)
