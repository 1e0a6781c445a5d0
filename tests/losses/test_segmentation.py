"""Segmentation losses against plain loops, and what they must not care about."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokgen.errors import InputError
from tokgen.losses.segmentation import dice_loss, first_appearance, focal_loss, match_segments, segmentation_loss


def one_hot(labels: torch.Tensor, k: int, strength: float = 20.0) -> torch.Tensor:
    return strength * torch.nn.functional.one_hot(labels.clamp(min=0), k).float()


def test_labels_are_numbered_as_they_first_appear():
    labels = torch.tensor([[7, 7, -1, 2, 7, 0], [-1, 0, 0, 5, 5, 2], [-1, -1, -1, -1, -1, -1]])
    assert first_appearance(labels).tolist() == [[0, 0, -1, 1, 0, 2], [-1, 0, 0, 1, 1, 2], [-1] * 6]
    assert first_appearance(labels[2:].int()).dtype == torch.int64


def test_matching_is_the_best_of_all_permutations():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, 5, generator=generator)
    targets = torch.randint(-1, 4, (3, 40), generator=generator)
    predicted = logits.argmax(-1)
    found = match_segments(logits, targets)
    for row in range(3):
        known = targets[row] >= 0

        def overlap(order: tuple[int, ...], row: int = row, known: torch.Tensor = known) -> float:
            total = 0.0
            for target, prediction in enumerate(order):
                a, b = (targets[row] == target) & known, (predicted[row] == prediction) & known
                total += float((a & b).sum() / max(int((a | b).sum()), 1))
            return total

        best = max(overlap(order) for order in itertools.permutations(range(5)))
        assert overlap(tuple(found[row].tolist())) == pytest.approx(best, abs=1e-6)
        assert sorted(found[row].tolist()) == list(range(5))


def test_dice_and_focal_are_their_formulas():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 30, 4, generator=generator)
    wanted = torch.randint(0, 3, (2, 30), generator=generator)
    known = torch.rand(2, 30, generator=generator) < 0.8
    p = logits.softmax(-1)
    rows, logs = [], []
    for b in range(2):
        dice = []
        for k in range(4):
            t = (wanted[b] == k) & known[b]
            if t.any():
                q = p[b, :, k][known[b]]
                dice.append(1 - (2 * q[t[known[b]]].sum() + 1e-6) / (q.sum() + t.sum() + 1e-6))
        rows.append(torch.stack(dice).mean())
        right = p[b].gather(1, wanted[b][:, None])[:, 0][known[b]]
        logs.append((-((1 - right) ** 2) * right.log()).mean())
    torch.testing.assert_close(dice_loss(p, wanted, known), torch.stack(rows).mean())
    torch.testing.assert_close(focal_loss(logits.log_softmax(-1), wanted, known), torch.stack(logs).mean())


def test_the_loss_does_not_care_which_number_a_segment_has_nor_what_is_unknown():
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, 5, (2, 60), generator=generator)
    logits = one_hot(targets, 8, 3.0) + torch.randn(2, 60, 8, generator=generator)
    targets[:, :7] = -1
    loss = segmentation_loss(logits, targets)
    table = torch.tensor([3, 40, 0, 1, 9])
    renamed = torch.where(targets >= 0, table[targets.clamp(min=0)], -1)
    columns = torch.randperm(8, generator=generator)
    other = logits[:, :, columns].clone()
    other[:, :7] = torch.randn(2, 7, 8, generator=generator)  # what is said where nothing is known
    torch.testing.assert_close(segmentation_loss(other, renamed)["loss"], loss["loss"])
    torch.testing.assert_close(loss["loss"], 2 * loss["dice"] + loss["focal"])
    logits[1, :30], targets[1, :30] = 0.0, -1  # of one sample more is known than of the other
    loss, parts = segmentation_loss(logits, targets), [(logits[i : i + 1], targets[i : i + 1]) for i in range(2)]
    for name in ("dice", "focal"):  # samples do not mix, so that a batch may be cut into parts
        one = [segmentation_loss(*part)[name] for part in parts]
        torch.testing.assert_close(loss[name], torch.stack(one).mean())


def test_a_perfect_answer_costs_nothing_and_gradients_lead_there():
    targets = torch.arange(4).repeat_interleave(6)[None]
    assert float(segmentation_loss(one_hot((targets + 2) % 4, 6), targets)["loss"]) < 1e-4
    logits = torch.nn.Parameter(0.1 * torch.randn(1, 24, 6, generator=torch.Generator().manual_seed(3)))
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        segmentation_loss(logits, targets)["loss"].backward()
        optimizer.step()
    found = logits.argmax(-1)[0].view(4, 6)
    assert (found == found[:, :1]).all() and len(found[:, 0].unique()) == 4


def test_segments_beyond_the_last_query_are_left_out():
    targets = torch.arange(6).repeat_interleave(4)[None]  # six segments, three queries
    logits = one_hot(targets.clamp(max=2), 3)
    known = segmentation_loss(logits[:, :12], targets[:, :12])
    torch.testing.assert_close(segmentation_loss(logits, targets)["loss"], known["loss"])
    nothing = segmentation_loss(logits, torch.full_like(targets, -1))
    assert float(nothing["loss"]) == 0


def test_bf16_logits_and_wrong_targets():
    logits = torch.randn(1, 10, 4).bfloat16()
    assert segmentation_loss(logits, torch.zeros(1, 10))["loss"].dtype == torch.float32
    with pytest.raises(InputError, match="reach 4"):
        match_segments(logits, torch.full((1, 10), 4))
