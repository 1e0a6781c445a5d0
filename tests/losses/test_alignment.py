"""Global alignment against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokgen.errors import InputError
from tokgen.losses.alignment import AlignmentProjector, alignment_loss


def test_it_is_one_minus_the_mean_cosine():
    projected, target = torch.randn(3, 5, 7), torch.randn(3, 7)
    cosines = [
        [float(p @ t / (p.norm() * t.norm())) for p in positions] for positions, t in zip(projected, target)
    ]  # by hand
    expected = 1 - sum(map(sum, cosines)) / 15
    assert float(alignment_loss(projected, target)) == pytest.approx(expected, abs=1e-6)
    assert float(alignment_loss(target[:, None] * 3, target)) == pytest.approx(0, abs=1e-6)
    assert float(alignment_loss(target[:, None] * -0.1, target)) == pytest.approx(2, abs=1e-6)
    torch.testing.assert_close(alignment_loss(projected * 1e4, target * 1e-4), alignment_loss(projected, target))


def test_masked_positions_and_empty_pictures_do_not_count():
    projected, target = torch.randn(3, 4, 6), torch.randn(3, 6)
    mask = torch.tensor([[True, False, True, False], [True, True, True, True], [False] * 4])
    first = alignment_loss(projected[:1, [0, 2]], target[:1])
    second = alignment_loss(projected[1:2], target[1:2])
    expected = (first + second) / 2  # a picture weighs the same whatever its length
    torch.testing.assert_close(alignment_loss(projected, target, mask), expected)
    changed = projected.masked_fill(~mask[..., None], 1e3)
    assert torch.equal(alignment_loss(changed, target, mask), alignment_loss(projected, target, mask))
    torch.testing.assert_close(alignment_loss(projected, target, mask | True), alignment_loss(projected, target))
    assert float(alignment_loss(projected, target, mask & False)) == 0


@pytest.mark.parametrize("where", ["projected", "target", "both"])
def test_a_vector_of_length_zero_is_safe(where):
    projected, target = torch.randn(2, 3, 4), torch.randn(2, 4)
    if where != "target":
        projected[0, 1] = 0
    if where != "projected":
        target[0] = 0
    projected.requires_grad_()
    loss = alignment_loss(projected, target)
    loss.backward()
    unit = F.normalize(projected.detach(), dim=-1) * F.normalize(target, dim=-1)[:, None]
    torch.testing.assert_close(loss.detach(), 1 - unit.sum(-1).mean())
    assert bool(projected.grad.isfinite().all()) and float(projected.grad[0, 1].abs().max()) == 0
    assert float(projected.grad[1].abs().min()) > 0


def test_it_is_float32_under_autocast():
    projected, target = torch.randn(2, 8, 64).bfloat16(), torch.randn(2, 64)
    expected = alignment_loss(projected.double().float(), target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_loss(projected, target)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_no_gradient_goes_to_the_encoder():
    projected, target = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    alignment_loss(projected, target).backward()
    assert target.grad is None and projected.grad is not None


def test_gradient_is_that_of_the_cosine():
    projected = torch.randn(2, 3, 4, dtype=torch.float64)
    target = torch.randn(2, 4)
    value = projected.float().requires_grad_()
    alignment_loss(value, target).backward()
    direct = projected.clone().requires_grad_()
    (1 - F.cosine_similarity(direct, target.double()[:, None], dim=-1).mean()).backward()
    torch.testing.assert_close(value.grad.double(), direct.grad, rtol=1e-4, atol=1e-6)


def test_projector_is_linear_gelu_linear():
    projector = AlignmentProjector(6, 4)
    assert {k: tuple(v.shape) for k, v in projector.state_dict().items()} == {
        "fc1.weight": (4, 6), "fc1.bias": (4,), "fc2.weight": (4, 4), "fc2.bias": (4,),
    }  # fmt: skip
    x = torch.randn(2, 3, 6)
    inner = x @ projector.fc1.weight.T + projector.fc1.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(projector(x), inner @ projector.fc2.weight.T + projector.fc2.bias)
    assert AlignmentProjector(6, 4, hidden=9).fc1.weight.shape == (9, 6)


def test_shapes_that_do_not_fit_are_named():
    projected = torch.randn(2, 3, 4)
    with pytest.raises(InputError, match=r"\(2, 5\); expected \(2, 4\)"):
        alignment_loss(projected, torch.randn(2, 5))
    with pytest.raises(InputError, match=r"\(2, 2\); expected \(2, 3\)"):
        alignment_loss(projected, torch.randn(2, 4), torch.ones(2, 2, dtype=torch.bool))
