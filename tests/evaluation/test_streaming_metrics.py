"""Streaming measures against closed forms and other packages, and over ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokgen.errors import InputError
from tokgen.evaluation.frechet import frechet_from_features
from tokgen.evaluation.metrics import (
    CodeHistogram,
    FeatureStatistics,
    InceptionScore,
    Means,
    Rows,
    pixel_errors,
    precision_recall,
)
from tokgen.tokens import Sequence, Tokens


def features(n: int = 200, d: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mix + 100 * torch.randn(d, generator=generator)


def counted(*parts: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(parts[0].shape[1])
    for part in parts:
        statistics.update(part)
    return statistics


def test_statistics_do_not_depend_on_how_features_come():
    x = features()
    for parts in ([x], x.split(7), [x[:1], x[1:1], x[1:]]):
        found = counted(*parts)
        assert found.n == 200
        assert torch.allclose(found.mean, x.double().mean(0), rtol=1e-12)
        assert torch.allclose(found.covariance, x.double().T.cov(), rtol=1e-9)
    merged = counted(x[:50])
    merged.merge(counted(x[50:]).state())
    assert torch.allclose(merged.covariance, x.double().T.cov(), rtol=1e-9)


def test_frechet_of_statistics_is_that_of_features_and_of_torch_fidelity():
    a, b = features(), features(150, seed=1)
    found = counted(*a.split(32)).frechet(counted(*b.split(32)))
    assert found == pytest.approx(frechet_from_features(a, b), rel=1e-9)
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    theirs = [fid.fid_features_to_statistics(x.double()) for x in (a, b)]
    expected = fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_frechet_of_known_gaussians():
    """Features whose sample mean and covariance are exactly those of two Gaussians."""
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double() * math.sqrt(
        3 / 4
    )  # mean 0, covariance the unit matrix
    found = counted(corners * torch.tensor([2.0, 1.0])).frechet(counted(corners * torch.tensor([1.0, 3.0]) + 2))
    assert found == pytest.approx(4 + 4 + (2 - 1) ** 2 + (1 - 3) ** 2, abs=1e-6)


def test_statistics_refuse_what_they_cannot_count():
    with pytest.raises(InputError, match=r"expected \(B, 6\)"):
        counted(features()).update(torch.zeros(2, 5))
    with pytest.raises(InputError, match="not finite"):
        counted(torch.full((2, 3), math.nan))
    with pytest.raises(InputError, match="at least two"):
        _ = counted(torch.zeros(1, 3)).covariance


def test_psnr_l1_and_ssim_are_those_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    truth = torch.randint(0, 256, (3, 3, 24, 17), dtype=torch.uint8)
    truth = torch.nn.functional.avg_pool2d(truth.float(), 3, 1, 1).byte()
    noise = torch.randint(-20, 21, truth.shape)
    made = (truth.int() + noise * torch.tensor([0, 1, 2]).view(3, 1, 1, 1)).clamp(0, 255).byte()
    errors = pixel_errors(made, truth)
    for i in range(3):
        a, b = (x[i].numpy() / 255 for x in (truth, made))
        expected = metrics.structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=0
        )
        assert float(errors["ssim"][i]) == pytest.approx(expected, abs=1e-9)
        assert float(errors["l1"][i]) == pytest.approx(np.abs(a - b).mean(), abs=1e-12)
        if i:
            assert float(errors["psnr"][i]) == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=1.0))
    assert float(errors["psnr"][0]) == pytest.approx(20 * math.log10(510)) and float(errors["ssim"][0]) == 1
    assert float(errors["ssim"][2]) < float(errors["ssim"][1]) < 1
    assert "ssim" not in pixel_errors(made[..., :10], truth[..., :10])
    with pytest.raises(InputError, match="expected uint8"):
        pixel_errors(made.float(), truth)


def test_code_figures_of_known_codes():
    histogram = CodeHistogram((4, 8))
    ids = torch.tensor([[[0, 1], [1, 2], [3, 7]], [[0, 3], [1, 4], [0, 0]]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    histogram.update(Tokens(ids, Sequence(3), (4, 8), mask))
    found = histogram.result()
    assert found["usage"] == pytest.approx([2 / 4, 4 / 8])
    assert found["perplexity"] == pytest.approx([2, 4], rel=1e-6)
    assert found["entropy"] == pytest.approx([1, 2], rel=1e-6)


def test_inception_score_of_known_classes_and_of_torch_fidelity():
    sure = InceptionScore(4)
    sure.update(torch.eye(4).repeat(3, 1) * 1000)  # each picture certain, classes even: 4
    assert sure.result() == pytest.approx(4, rel=1e-9)
    blank = InceptionScore(4)
    blank.update(torch.zeros(5, 4))
    assert blank.result() == pytest.approx(1, rel=1e-9)
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits, streamed = 3 * features(97, 5, 2), InceptionScore(5)
    logits = logits - logits.mean(0)
    for part in logits.split(10):
        streamed.update(part)
    assert streamed.result() == pytest.approx(isc.isc_features_to_metric(logits, splits=1)["inception_score_mean"])


def test_precision_and_recall_of_known_sets_and_of_torch_fidelity():
    grid = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij"), -1).reshape(-1, 2)
    assert precision_recall(grid, grid) == (1, 1)
    assert precision_recall(grid + 1000, grid) == (0, 0)
    corner = grid[(grid < 2).all(1)] + 0.01  # all of it among the true ones, and few of those among it
    precision, recall = precision_recall(corner, grid)
    assert precision == 1 and 4 / 25 <= recall <= 9 / 25
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    a, b = features(80, 4), features(60, 4) * 1.1
    assert precision_recall(a, b, rows=7) == pytest.approx(prc.calculate_precision_recall_full(a, b), abs=1e-6)
    with pytest.raises(InputError, match="more than k = 3"):
        precision_recall(grid[:3], grid)


def test_states_of_parts_add_up_to_the_whole():
    x, logits = features(201), features(201, 5, 3)
    tokens = Tokens(torch.arange(201)[:, None] % 7, Sequence(1), (9,))
    keys = [f"k{i}" for i in range(201)]

    def measured(part: slice) -> tuple:
        statistics, score, histogram, means, rows = (
            FeatureStatistics(6), InceptionScore(5), CodeHistogram((9,)), Means(), Rows()
        )  # fmt: skip
        statistics.update(x[part])
        score.update(logits[part])
        histogram.update(tokens[part])
        means.add({"psnr": x[part, 0]} if part.start else {"psnr": x[part, 0], "other": x[part, 1]})
        rows.add(keys[part], x=x[part])
        return statistics, score, histogram, means, rows

    whole = measured(slice(0, 201))
    merged = measured(slice(140, 201))  # unequal parts, the later one first
    for measure, other in zip(merged, measured(slice(0, 140))):
        measure.merge(other.state())
    assert merged[0].n == 201
    assert torch.allclose(merged[0].mean, whole[0].mean, rtol=1e-12)
    assert torch.allclose(merged[0].covariance, whole[0].covariance, rtol=1e-9)
    assert merged[1].result() == pytest.approx(whole[1].result(), rel=1e-9)
    assert merged[2].result() == whole[2].result()
    first, every = float(x[:140, 1].double().mean()), float(x[:, 0].double().mean())
    assert merged[3].result(("psnr", "ssim", "other")) == pytest.approx({"psnr": every, "other": first})
    assert torch.equal(merged[4].result()["x"], whole[4].result()["x"]), "the order follows from the keys alone"
    assert not torch.equal(whole[4].result()["x"], x)
    empty = Rows()
    empty.merge(Rows().state())
    assert empty.result() == {}
