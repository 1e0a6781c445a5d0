"""Losses against their formulas."""

from __future__ import annotations

import logging
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokgen.errors import CheckpointError, ConfigError, MissingDependency
from tokgen.losses.adversarial import LeCam, adaptive_weight, discriminator_loss, generator_loss
from tokgen.losses.perceptual import FeatureDistance, VGG16Features, build_perceptual, unit_channels
from tokgen.losses.reconstruction import reconstruction_loss
from tokgen.nn.discriminator import PatchGAN


def test_reconstruction():
    x, y = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([0.0, 0.0, 1.0])
    assert float(reconstruction_loss(x, y, "l1")) == pytest.approx(0.5)
    assert float(reconstruction_loss(x, y, "l2")) == pytest.approx(1.25 / 3)
    assert float(reconstruction_loss(x, y, "smooth_l1")) == pytest.approx((0.45 + 0.95) / 3)
    assert reconstruction_loss(x.bfloat16(), y, "l2").dtype == torch.float32
    with pytest.raises(ConfigError, match="huber"):
        reconstruction_loss(x, y, "huber")


def test_hinge():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(0.5 * (0.5 + 0.75))
    assert float(generator_loss(fake, "hinge")) == pytest.approx(0.75)


def test_non_saturating_is_cross_entropy_with_logits_first():
    real, fake = torch.randn(5), torch.randn(5)
    bce = F.binary_cross_entropy_with_logits
    expected = 0.5 * (bce(real, torch.ones(5)) + bce(fake, torch.zeros(5)))
    torch.testing.assert_close(discriminator_loss(real, fake, "non-saturating"), expected)
    torch.testing.assert_close(generator_loss(fake, "non-saturating"), bce(fake, torch.ones(5)))
    # a discriminator that is right pays less, a generator that deceives pays less
    assert discriminator_loss(real + 9, fake - 9, "non-saturating") < discriminator_loss(real, fake, "non-saturating")
    assert generator_loss(fake + 9, "non-saturating") < generator_loss(fake, "non-saturating")
    with pytest.raises(ConfigError, match="wgan"):
        generator_loss(fake, "wgan")


def test_lecam_follows_the_paper():
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -1.0])
    loss = lecam(real, fake)
    assert (float(lecam.real), float(lecam.fake)) == (pytest.approx(0.2), pytest.approx(-0.1))
    assert float(loss) == pytest.approx(((1.1**2 + 3.1**2) / 2) + 1.2**2)
    lecam.eval()
    lecam(real * 100, fake)
    assert float(lecam.real) == pytest.approx(0.2)
    assert set(lecam.state_dict()) == {"real", "fake"}


def test_adaptive_weight():
    assert float(adaptive_weight(torch.full((4,), 3.0), torch.full((4,), 1.0), 100.0)) == pytest.approx(3, rel=1e-3)
    assert float(adaptive_weight(torch.ones(4), torch.zeros(4), 10.0)) == 10.0
    assert float(adaptive_weight(torch.tensor([math.nan]), torch.ones(1), 10.0)) == 0.0
    assert float(adaptive_weight(torch.ones(1), torch.tensor([math.inf]), 10.0)) == 0.0


class Edges(nn.Module):
    """A real, small feature network: fixed differences of neighbouring pixels, and their pooled absolute values."""

    def forward(self, x):
        dx = F.pad(x[..., 1:] - x[..., :-1], (0, 1))
        return [dx, F.avg_pool2d(dx.abs(), 2)]


def test_feature_distance_is_the_lpips_formula():
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    distance = FeatureDistance(Edges(), [torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)])
    expected = 0
    for f, g, w in zip(Edges()(x), Edges()(y), ([1.0, 2.0, 3.0], [1.0] * 3)):
        for h in range(f.shape[2]):
            for v in range(f.shape[3]):
                a, b = f[:, :, h, v], g[:, :, h, v]
                a, b = a / (a.norm(dim=1, keepdim=True) + 1e-10), b / (b.norm(dim=1, keepdim=True) + 1e-10)
                expected = expected + ((a - b) ** 2 * torch.tensor(w)).sum(1) / (f.shape[2] * f.shape[3])
    torch.testing.assert_close(distance.per_image(x, y), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(distance(x, y), expected.mean(), rtol=1e-4, atol=1e-5)
    assert float(distance(x, x)) == 0
    assert not distance.train().training


def test_a_flat_picture_has_a_finite_gradient():
    x = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    FeatureDistance(Edges())(x, torch.rand(1, 3, 8, 8)).backward()
    assert bool(torch.isfinite(x.grad).all())
    assert unit_channels(torch.zeros(1, 3, 2, 2)).abs().max() == 0


def test_perceptual_by_name(monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO, "tokgen")
    assert build_perceptual("none") is None and "none" in caplog.text
    with pytest.raises(ConfigError, match="vgg"):
        build_perceptual("vgg")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingDependency, match="tokgen\\[lpips\\]"):
        build_perceptual("lpips")


def test_vgg_weights_are_named_when_missing_and_load_from_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"vgg16-397923af\.pth"):
        VGG16Features()
    from torchvision.models import vgg16

    features = vgg16(weights=None).features
    path = tmp_path / "vgg.pth"
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, path)
    net = VGG16Features(path)
    x = torch.rand(1, 3, 32, 32)
    maps = net(x)
    assert [m.shape[1] for m in maps] == [64, 128, 256, 512, 512]
    normalised = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(maps[-1], features[:30](normalised))
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="missing"):
        VGG16Features(path)
    path.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        VGG16Features(path)


# -- PatchGAN ---------------------------------------------------------------------------------------------------------


def test_patchgan_has_the_published_layout():
    """Keys and shapes of the discriminator of LlamaGen, VQGAN and pix2pix: ndf 64, 3 layers, kernel 4."""
    shapes = {k: tuple(v.shape) for k, v in PatchGAN().state_dict().items() if k.endswith("weight")}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.3.weight": (128,),
        "main.5.weight": (256, 128, 4, 4),
        "main.6.weight": (256,),
        "main.8.weight": (512, 256, 4, 4),
        "main.9.weight": (512,),
        "main.11.weight": (1, 512, 4, 4),
    }
    biased = [k for k in PatchGAN().state_dict() if k.endswith("bias")]
    assert biased == ["main.0.bias", "main.3.bias", "main.6.bias", "main.9.bias", "main.11.bias"]


def test_patchgan_sizes_and_start():
    disc = PatchGAN(16, 3)
    assert disc(torch.rand(2, 3, 256, 256)).shape == (2, 1, 30, 30)  # pix2pix's 30 x 30 patches
    assert disc(torch.rand(2, 3, 24, 24)).shape == (2, 1, 1, 1)
    with pytest.raises(ConfigError, match="fewer layers"):
        disc(torch.rand(1, 3, 23, 24))
    assert float(disc.main[8].weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(disc.main[9].weight.detach().mean()) == pytest.approx(1, abs=0.02)
    with pytest.raises(ConfigError, match="layernorm"):
        PatchGAN(norm="layernorm")


def test_group_norm_makes_pictures_independent():
    disc = PatchGAN(8, 2, norm="group")
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(disc(x)[:1], disc(x[:1]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(PatchGAN(8, 2)(x)[:1], PatchGAN(8, 2)(x[:1]))
