"""The segmenter: shapes, positions, files, and long videos in pieces."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tokgen.errors import CheckpointError, ConfigError, InputError
from tokgen.trajectories.base import Trajectories, build_source
from tokgen.trajectories.matching import agreement, continued, filled, iou_matrix, one_to_one
from tokgen.trajectories.pyramid import build_pyramid
from tokgen.trajectories.segmenter import SegmenterConfig, SegmenterSource, TrajectorySegmenter, fourier_queries


@pytest.fixture(scope="module")
def segmenter() -> TrajectorySegmenter:
    torch.manual_seed(0)
    return TrajectorySegmenter(TrajectorySegmenter.example_config()).eval()


@pytest.fixture(scope="module")
def folder(segmenter, tmp_path_factory):
    return segmenter.save_pretrained(tmp_path_factory.mktemp("segmenter"))


def moving(frames: int, seed: int = 0) -> np.ndarray:
    """A bright disk on a dark ground, uint8 (T, 48, 64, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64]
    disks = [np.hypot(y - 24, x - 16 - 2 * t) < 12 for t in range(frames)]
    return np.where(np.stack(disks)[..., None], 200, 40).astype(np.uint8) + rng.integers(0, 30, (frames, 48, 64, 3)).astype(np.uint8)  # fmt: skip


# -- the network --------------------------------------------------------------------------------------------------------


def test_logits_are_cosines_times_the_scale_in_fp32(segmenter):
    pixels = torch.rand(2, 3, 3, 64, 64)
    logits = segmenter(pixels)
    assert logits.shape == (2, 3, 16, 16, 16) and logits.dtype == torch.float32
    assert segmenter.scale.item() == pytest.approx(np.log(17) + 1, abs=1e-5)
    assert float(logits.detach().abs().max()) <= segmenter.scale.item() + 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert segmenter(pixels).dtype == torch.float32
    torch.testing.assert_close(segmenter((pixels * 255).round().byte()), logits, atol=0.1, rtol=0)
    alone = segmenter(pixels[1:])
    torch.testing.assert_close(alone, logits[1:], atol=1e-4, rtol=1e-4)  # whatever else is in the batch


def test_the_scale_is_bounded():
    model = TrajectorySegmenter(TrajectorySegmenter.example_config())
    with torch.no_grad():
        model.log_scale.fill_(100.0)
    assert float(model.scale) == 20


def test_queries_know_where_and_when_a_place_is(segmenter):
    features = torch.randn(1, 2, 4, 4, 64, generator=torch.Generator().manual_seed(0))
    read = segmenter.read(features)
    for axis in (1, 2, 3):  # without positions, a set of places would be read the same in any order
        assert not torch.allclose(segmenter.read(features.flip(axis)), read, atol=1e-4)


@pytest.mark.parametrize("stop", [True, False])
def test_the_reading_does_not_train_the_features_as_published(stop):
    config = dataclasses.replace(TrajectorySegmenter.example_config(), stop_gradient=stop)
    model = TrajectorySegmenter(config)
    features = torch.randn(1, 2, 4, 4, 64, requires_grad=True)
    queries = model.read(features)
    assert queries.requires_grad
    (grad,) = torch.autograd.grad(queries.square().sum(), features, allow_unused=True)
    assert (grad is None) == stop
    (grad,) = torch.autograd.grad(model.assign(features, model.read(features)).square().sum(), features)
    assert float(grad.abs().max()) > 0  # the places' own side does train them


def test_queries_start_small_and_different():
    torch.manual_seed(0)
    queries = fourier_queries(128, 512)
    assert queries.shape == (128, 512)
    norms = queries.norm(dim=-1)
    assert float(norms.min()) > 0.019 and float(norms.max()) < 0.022
    apart = torch.cdist(queries, queries) + torch.eye(128)
    assert float(apart.min()) > 1e-4
    assert fourier_queries(6, 8).shape == (6, 8)  # fewer channels than waves


def test_the_defaults_are_the_published_sizes():
    timm = pytest.importorskip("timm")
    config = SegmenterConfig()
    assert (config.queries, config.grid, config.dim, config.depth, config.frames) == (128, 56, 512, 2, 8)
    with torch.device("meta"):
        model = TrajectorySegmenter(config)
    assert "convnext_small.dinov3_lvd1689m" in timm.list_models(pretrained=True)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    assert backbone == 49_453_152 and model.backbone.channels == (96, 192, 384, 768)
    assert 58e6 < sum(p.numel() for p in model.parameters()) < 60e6  # "59 M"


def test_wrong_sizes_and_clips_are_named(segmenter):
    with pytest.raises(ConfigError, match="heads=3"):
        SegmenterConfig(heads=3).check()
    with pytest.raises(ConfigError, match="pretrained: timm:NAME"):
        build_pyramid({"type": "vgg"})
    with pytest.raises(ConfigError, match="expected 4"):
        build_pyramid({"type": "conv", "channels": [32, 32]})
    with pytest.raises(InputError, match="expected"):
        segmenter(torch.rand(2, 3, 64, 64))


def test_a_backbone_of_transformers_keeps_its_kind_but_not_its_path(tmp_path):
    auto = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64}
    auto.DINOv3ConvNextModel(auto.DINOv3ConvNextConfig(**sizes)).save_pretrained(tmp_path / "eye")
    spec = {"pretrained": f"transformers:{tmp_path / 'eye'}"}
    model = TrajectorySegmenter(dataclasses.replace(TrajectorySegmenter.example_config(), backbone=spec)).eval()
    assert model.config.backbone["type"] == "transformers" and str(tmp_path) not in str(model.config)
    pixels = torch.rand(1, 2, 3, 64, 64)
    assert [m.shape[1] for m in model.backbone(pixels[0])] == [8, 16, 24, 32]
    again = TrajectorySegmenter.from_pretrained(model.save_pretrained(tmp_path / "segmenter"))
    assert torch.equal(again(pixels), model(pixels))
    with pytest.raises(CheckpointError, match="no backbone"):
        build_pyramid({"pretrained": f"transformers:{tmp_path / 'nothing'}"})


# -- as a source --------------------------------------------------------------------------------------------------------


def test_files_and_the_source_give_the_same_as_the_network(segmenter, folder):
    video = moving(4)
    source = build_source({"type": "segmenter", "model": str(folder)})
    found = source(video)
    direct = segmenter.segment(torch.from_numpy(video).permute(0, 3, 1, 2)[None])[0]
    assert np.array_equal(found.labels, Trajectories(direct.numpy()).compact().labels)
    assert found.panoptic and found.shape == (4, 16, 16)
    assert build_source({"type": "segmenter", **source.settings()})(video).labels.tolist() == found.labels.tolist()
    with pytest.raises(CheckpointError):
        SegmenterSource(folder / "nothing")
    with pytest.raises(ConfigError, match="min_iou"):
        SegmenterSource(folder, min_iou=0)


def test_a_long_video_is_cut_into_pieces_that_share_a_frame(folder, monkeypatch):
    """A segmenter that names segments anew in every piece: the source joins them again."""
    source = SegmenterSource(folder)  # four frames a piece: 0-3, 3-6, 6-9
    truth = np.zeros((10, 16, 16), np.int64)
    for t in range(10):
        truth[t, 4:8, t : t + 5] = 1
    truth[5:, 12:, :] = 2  # comes later
    pieces = []

    def segment(clip: torch.Tensor) -> torch.Tensor:
        start = 3 * len(pieces)
        pieces.append(clip.shape[1])
        return torch.from_numpy((truth[start : start + 4] + 5 * len(pieces)) % 16)[None]  # other numbers each time

    monkeypatch.setattr(source.segmenter, "segment", segment)
    found = source(moving(10))
    assert pieces == [4, 4, 4]
    assert np.array_equal(found.labels, truth)


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 9])
def test_videos_of_any_length(folder, frames):
    source = SegmenterSource(folder)
    found = source(moving(frames))
    assert found.shape == (frames, 16, 16) and found.panoptic
    assert np.array_equal(found.labels, source(moving(frames)).labels)
    assert np.array_equal(np.unique(found.labels), np.arange(found.count))


# -- matching -----------------------------------------------------------------------------------------------------------


def test_overlaps_and_matching_are_one_to_one():
    a = np.array([[0, 0, 1, 1], [0, 0, -1, 1]])
    b = np.array([[0, 0, 0, 2], [1, 1, 2, 2]])
    expected = [[2 / 5, 2 / 4, 0], [1 / 5, 0, 2 / 4]]
    np.testing.assert_allclose(iou_matrix(a, b), expected)
    assert one_to_one(iou_matrix(a, b), 0.5) == [(0, 1), (1, 2)]
    # two segments like one trajectory: one continues it, the other is new, whatever it overlaps
    before = np.repeat([0, 1], [8, 2])[None]
    after = np.repeat([0, 1, 2], [5, 3, 2])[None]
    assert continued(before, after, 7, 0.3).tolist() == [0, 7, 1]
    assert continued(None, after, 7, 0.5).tolist() == [7, 8, 9]
    with pytest.raises(InputError, match="cannot be compared"):
        iou_matrix(a, b[:1])


def test_empty_pixels_take_the_nearest_label():
    plane = np.full((5, 9), -1)
    plane[2, 1], plane[2, 7] = 4, 2
    assert filled(plane)[2].tolist() == [4, 4, 4, 4, filled(plane)[2, 4], 2, 2, 2, 2]
    nothing = np.full((2, 2), -1)
    assert (filled(nothing) == -1).all()


def test_agreement_counts_whole_trajectories():
    target = np.zeros((4, 10, 10), np.int64)
    target[:, 5:] = 1
    target[:, :, 9] = -1  # unknown
    assert agreement((1 - target) % 7, target) == {"iou": 1.0, "veq": 1.0, "stq": 1.0}
    found = target.copy()
    found[:2, 5:] = 3  # the second changes its name half way: each half overlaps it by 1/2
    figures = agreement(found, target)
    assert figures["iou"] == pytest.approx(0.75)
    assert figures["veq"] == pytest.approx(1.5 / 2.5)
    assert figures["stq"] == pytest.approx(np.sqrt(0.75 * (180 + 90) / (180 + 180)))
    assert agreement(np.full_like(target, -1), target) == {"iou": 0.0, "veq": 0.0, "stq": 0.0}
