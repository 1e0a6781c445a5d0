"""Measures on pictures where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from tokgen.errors import CheckpointError, InputError
from tokgen.evaluation.frechet import frechet_distance, frechet_from_features, frechet_from_statistics
from tokgen.evaluation.reconstruction import evaluate_reconstruction, read_pictures
from tokgen.evaluation.retrieval import evaluate_retrieval, feature_space
from tokgen.tokens import Grid, Tokens


class Grays:
    """Keeps the mean gray of each 4 x 4 block, in 256 levels."""

    def encode(self, pixels):
        ids = torch.nn.functional.avg_pool2d(pixels.float(), 4).mean(1).round().long()  # (B, h, w)
        return Tokens(ids.flatten(1), Grid(*ids.shape[1:]), (256,))

    def decode(self, tokens):
        gray = tokens.ids.unflatten(1, tokens.layout.shape).float()[:, None] / 255
        return gray.repeat_interleave(4, -1).repeat_interleave(4, -2).expand(-1, 3, -1, -1)


def test_psnr_usage_and_bits_of_known_pictures():
    flat = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    noisy = flat.clone()
    noisy[1, :, ::2] += 10  # block means of 105: every pixel is 5 levels off
    report = evaluate_reconstruction(Grays(), noisy, batch_size=1)
    exact, off = -10 * math.log10((0.5 / 255) ** 2), -10 * math.log10((5 / 255) ** 2)
    assert report.psnr == pytest.approx((exact + off) / 2, abs=1e-3)
    assert report.l1 == pytest.approx(2.5 / 255, abs=1e-6)
    assert report.usage == 2 / 256 and report.perplexity == pytest.approx(2, abs=1e-4)
    assert (report.tokens, report.bits, report.images) == (4, 32, 2)


def test_reading_keeps_what_is_asked_for(tmp_path):
    import io

    from PIL import Image

    from tokgen.data.shards import ShardWriter

    with ShardWriter(tmp_path / "shards") as writer:
        for i in range(4):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(file, "PNG")
            writer.write(f"k{i}", {"png": file.getvalue(), "txt": f"red {i}", "json": {"group": "ab"[i % 2]}})
    pixels, captions, about = read_pictures(tmp_path / "shards", where={"group": ["b"]})
    assert captions == ["red 1", "red 3"] and [a["group"] for a in about] == ["b", "b"]
    assert pixels[:, 0, 0, 0].tolist() == [60, 180]


def test_retrieval_finds_noisy_copies_and_not_noise():
    references = torch.rand(40, 3, 16, 16)
    space = feature_space("pixels")
    targets = torch.arange(10)
    found = evaluate_retrieval(references[:10] + 0.05 * torch.randn(10, 3, 16, 16), references, targets, space)
    assert found.top1 == found.top5 == 1 and found.chance == 1 / 40
    assert torch.equal(found.nearest, targets)
    wrong = evaluate_retrieval(references[10:20], references, targets, space)
    assert wrong.top1 == 0


def test_an_exact_copy_of_the_target_counts_as_the_target():
    references = torch.rand(6, 3, 16, 16)
    references[5] = references[2]
    report = evaluate_retrieval(references[[2]], references, torch.tensor([5]), feature_space("pixels"))
    assert report.top1 == 1


def test_unknown_space_is_refused():
    with pytest.raises(CheckpointError, match="no model folder at 'clip'"):
        feature_space("clip")


def test_frechet_distance_of_gaussians_is_the_closed_form():
    # commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2 over their common directions
    a, b = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 2.25, 0.0])  # two of them are singular
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    covs = [turn @ torch.diag(x.double()) @ turn.T for x in (a, b)]
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0])
    expected = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    got = frechet_from_statistics(torch.zeros(4), covs[0], shift, covs[1])
    assert got == pytest.approx(expected.item(), abs=1e-6)


def test_frechet_distance_of_general_gaussians_is_the_trace_of_the_root():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(50, 5, generator=generator, dtype=torch.float64) @ torch.randn(5, 5, generator=generator).double()
        for _ in range(2)
    )
    got = frechet_from_features(a, b)
    # eigenvalues of the product are those of the symmetrised one
    root = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * root
    assert got == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_from_features(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(InputError, match="at least 2 rows"):
        frechet_from_features(a[:1], b)


def test_frechet_distance_of_pictures_grows_with_noise():
    space, pictures = feature_space("pixels"), torch.rand(64, 3, 16, 16)
    noisy = [frechet_distance(pictures + s * torch.randn_like(pictures), pictures, space) for s in (0.01, 0.3, 3.0)]
    assert 0 <= noisy[0] < noisy[1] < noisy[2]
