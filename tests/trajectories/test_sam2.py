"""SAM 2 as a source: a tiny SAM 2 of random weights through the same files and calls as a published one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokgen.errors import CheckpointError, ConfigError  # noqa: E402
from tokgen.trajectories.base import build_source  # noqa: E402
from tokgen.trajectories.keyframes import distinct, layered, regions_between, shots  # noqa: E402
from tokgen.trajectories.sam2 import SAM2Source, strongest  # noqa: E402

SIZE, GRID = 64, 16


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A SAM 2 of one block or two per stage, with its processor."""
    folder = tmp_path_factory.mktemp("sam2")
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1, "image_size": [SIZE, SIZE],
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1] * 4,
        "window_size_per_stage": [4, 2, 2, 2], "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [4, 4],
    }  # fmt: skip
    vision = {
        "model_type": "sam2_vision_model", "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 128,
    }  # fmt: skip
    config = transformers.Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 128, "image_size": SIZE, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        image_size=SIZE, memory_attention_hidden_size=128, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=128, mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=32, memory_fuser_num_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Sam2VideoModel(config).save_pretrained(folder)
    images = transformers.Sam2ImageProcessor(size=square(SIZE), mask_size=square(GRID))
    videos = transformers.Sam2VideoVideoProcessor(size=square(SIZE))
    transformers.Sam2VideoProcessor(images, videos).save_pretrained(folder)
    return folder


def boundary_model(folder: Path, labels: int = 1) -> Path:
    config = transformers.SegformerConfig(
        num_labels=labels, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8,
        mlp_ratios=[1] * 4,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    transformers.SegformerImageProcessor(size=square(64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def boundaries(tmp_path_factory) -> Path:
    return boundary_model(tmp_path_factory.mktemp("boundaries"))


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    """Noise that does not move, uint8 (6, 48, 60, 3)."""
    return np.repeat(np.random.default_rng(0).integers(0, 256, (1, 48, 60, 3)).astype(np.uint8), 6, 0)


def source(checkpoint: Path, keyframes: object = "automatic", **settings: object) -> SAM2Source:
    settings = {"points": 3, "min_score": 0.0, "min_stability": 0.0, "every": 3, **settings}
    return SAM2Source(str(checkpoint), str(keyframes), **settings)


# -- whole runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyframes", ["automatic", "boundaries"])
def test_a_checkpoint_gives_panoptic_trajectories_and_the_same_again(checkpoint, boundaries, video, keyframes):
    keyframes = boundaries if keyframes == "boundaries" else keyframes
    tracker = source(checkpoint, keyframes, threshold=0.5)
    found = tracker(video)
    assert found.shape == (6, GRID, GRID) and found.panoptic
    assert np.array_equal(np.unique(found.labels), np.arange(found.count))
    assert np.array_equal(tracker(video).labels, found.labels)
    again = build_source({"type": "sam2", **tracker.settings()})
    assert np.array_equal(again(video).labels, found.labels)
    assert source(checkpoint, keyframes, threshold=0.5)(video[:1]).shape == (1, GRID, GRID)


def test_other_sizes_than_the_checkpoints(checkpoint, video):
    assert source(checkpoint, size=96)(video[:2]).shape == (2, 24, 24)
    for size in (50, 16):
        with pytest.raises(ConfigError, match="multiple of 32"):
            source(checkpoint, size=size)


def test_half_precision(checkpoint, boundaries, video):
    found = source(checkpoint, boundaries, dtype="bfloat16", threshold=0.5)(video[:2])
    assert found.shape == (2, GRID, GRID) and found.panoptic


# -- what is done with masks --------------------------------------------------------------------------------------------


def bars(count: int = 5) -> np.ndarray:
    """Logits of bars of three columns, two apart, strongest in their middle: neighbours overlap in one column."""
    logits = np.full((count, 4, 2 * count + 1), -5.0)
    for i in range(count):
        logits[i, :, 2 * i : 2 * i + 3] = [1.0 + i, 9.0, 2.0 + i]
    return logits


def test_overlaps_belong_to_the_strongest_mask_and_numbers_are_never_added():
    found = strongest(bars())
    # column 2 is claimed by bars 0 (2.0) and 1 (2.0): the first; column 4 by 1 (3.0) and 2 (3.0); ...
    assert found[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    stronger = bars()
    stronger[1, :, 2] = 2.5
    assert strongest(stronger)[0].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert strongest(bars() - 10.0).max() == -1  # no mask above 0


class Objects:
    """Crafted mask logits in the place of the network's: a list of (S, g, g) for each call after the first frame."""

    def __init__(self, tracker: SAM2Source, planes: list[np.ndarray], segments: list[np.ndarray]) -> None:
        self.planes, self.segments, self.keys = list(planes), list(segments), []
        tracker.segment = self.segment

    def segment(self, frame: np.ndarray) -> np.ndarray:
        return self.segments[len(self.keys) - 1] if self.keys.append(int(frame[0, 0, 0])) is None else None

    def __call__(self, inference_session, frame_idx):
        count = len(inference_session.obj_ids)
        plane = np.full((count, GRID, GRID), -1.0)
        if frame_idx:
            plane = self.planes.pop(0)
            assert len(plane) == count
        return type("Output", (), {"pred_masks": torch.from_numpy(plane)[:, None].float()})


def halves(split: int, gap: int = 0) -> np.ndarray:
    """Logits of a left and a right mask, with a gap of pixels that neither claims."""
    logits = np.full((2, GRID, GRID), -3.0)
    logits[0, :, :split], logits[1, :, split + gap :] = 3.0, 3.0
    return logits


def numbered(frames: int) -> np.ndarray:
    """Frames that say their own number, and look alike to the shot detection."""
    return np.repeat(np.arange(frames, dtype=np.uint8)[:, None, None, None], 3, -1) + np.zeros((1, 8, 8, 1), np.uint8)


def tracked(checkpoint: Path, boundaries: Path, monkeypatch, frames, planes, segments, **settings):
    tracker = source(checkpoint, boundaries, **settings)
    objects = Objects(tracker, planes, segments)
    monkeypatch.setattr(type(tracker.model), "forward", lambda self, **inputs: objects(**inputs))
    found = tracker(numbered(frames))
    assert not objects.planes  # every frame was asked for
    return found, objects.keys


def test_trajectories_continue_over_key_frames_one_to_one(checkpoint, boundaries, monkeypatch):
    left_right = (np.arange(GRID) >= 8).astype(np.int32)[None].repeat(GRID, 0)
    thirds = np.digitize(np.arange(GRID), [10, 13]).astype(np.int32)[None].repeat(GRID, 0)
    planes = [halves(8), halves(9), halves(10)]  # frames 1, 2, and 3, which is a key frame
    planes += [np.stack([*halves(10), np.full((GRID, GRID), -9.0)])] * 2  # frames 4, 5: the third is lost
    found, keys = tracked(checkpoint, boundaries, monkeypatch, 6, planes, [left_right, thirds], every=3)
    assert keys == [0, 3]
    rows = found.labels[:, 0]
    assert rows[0].tolist() == [0] * 8 + [1] * 8
    assert rows[2].tolist() == [0] * 9 + [1] * 7
    # frame 3: what was 1 (6 columns) is now two segments of 3; each overlaps it by 1/2, and one of them goes on as 1
    assert rows[3].tolist() in ([0] * 10 + [1] * 3 + [2] * 3, [0] * 10 + [2] * 3 + [1] * 3)
    lost = rows[3][15]
    assert (found.volumes()[lost] > 0).tolist()[4:] == [False, False]  # absent, not present without pixels
    assert found.panoptic


def test_pixels_without_a_mask_belong_to_the_nearest(checkpoint, boundaries, monkeypatch):
    left_right = (np.arange(GRID) >= 8).astype(np.int32)[None].repeat(GRID, 0)
    found, _ = tracked(checkpoint, boundaries, monkeypatch, 2, [halves(4, gap=6)], [left_right], every=4)
    assert found.labels[1, 0].tolist() == [0] * 7 + [1] * 9


def test_when_all_is_lost_the_frame_becomes_a_key_frame(checkpoint, boundaries, monkeypatch):
    left_right = (np.arange(GRID) >= 8).astype(np.int32)[None].repeat(GRID, 0)
    planes = [halves(8), halves(8) - 9.0, halves(6)]
    found, keys = tracked(checkpoint, boundaries, monkeypatch, 4, planes, [left_right, left_right], every=9)
    assert keys == [0, 2]
    assert found.labels[:, 0, 0].tolist() == [0, 0, 2, 2] and found.labels[:, 0, 15].tolist() == [1, 1, 3, 3]


def test_nothing_is_followed_across_a_cut(checkpoint, boundaries):
    dark, light = np.full((3, 16, 16, 3), 20, np.uint8), np.full((2, 16, 16, 3), 220, np.uint8)
    video = np.concatenate([dark, light])
    assert shots(video, 0.5) == [(0, 3), (3, 5)]
    assert shots(video, 1.0) == [(0, 5)] and shots(video[:1], 0.5) == [(0, 1)]
    found = source(checkpoint, boundaries, every=9)(video)
    assert not set(np.unique(found.labels[:3])) & set(np.unique(found.labels[3:]))


# -- segments of key frames ---------------------------------------------------------------------------------------------


def test_regions_grow_until_they_meet():
    boundary = np.full((12, 20), 0.05)
    boundary[:, 9:12] = [[0.6, 0.9, 0.6]]  # a wide boundary, highest in the middle
    boundary[5, 3] = 0.05
    boundary[2:5, 2:5] = 0.9
    boundary[3, 3] = 0.01  # a speck within a ring
    found = regions_between(boundary, 0.2, 2 / 240, 128)
    assert set(np.unique(found)) == {0, 1}  # the speck is too small to be a seed, and no pixel is left
    assert (found[:, :9] == found[0, 0]).all() and (found[:, 12:] == found[0, 19]).all()
    assert set(np.unique(regions_between(boundary, 0.2, 0.0, 128))) == {0, 1, 2}
    assert set(np.unique(regions_between(boundary, 0.2, 0.0, 1))) == {0}
    assert (regions_between(np.ones((4, 4)), 0.2, 0.0, 8) == 0).all()  # nothing but boundary: one segment


def test_automatic_masks_parts_over_wholes_gaps_and_doubles():
    masks = torch.zeros(4, 20, 20, dtype=torch.bool)
    masks[0, :, :10] = True  # a whole
    masks[1, :, :10] = True
    masks[1, 0, 0] = False  # nearly the same, better
    masks[2, 5:10, 2:6] = True  # a part of it
    masks[3, 15:, 15:] = True
    kept = distinct(masks, torch.tensor([0.8, 0.9, 0.7, 0.95]), 0.7)
    assert kept.flatten(1).sum(1).tolist() == [25, 199, 20]
    found = layered(kept.numpy(), 0.0, 128)
    assert len(np.unique(found)) == 4  # the whole, its part, the corner, and the large gap
    assert (found[5:10, 2:6] == found[5, 2]).all() and found[5, 2] != found[0, 5]
    assert found[0, 0] in (found[0, 1], found[1, 0])  # a small gap belongs to the nearest
    assert found[0, 19] == found[10, 12] != found[19, 19]
    assert np.array_equal(np.argsort(-np.bincount(found.ravel())), np.arange(4))  # largest first
    assert (layered(np.zeros((0, 4, 4), bool), 0.0, 8) == 0).all()
    assert len(np.unique(layered(kept.numpy(), 0.0, 2))) == 2


# -- errors -------------------------------------------------------------------------------------------------------------


def test_missing_and_foreign_checkpoints_are_named(checkpoint, boundaries, tmp_path):
    with pytest.raises(CheckpointError, match=r"no SAM 2 checkpoint at .*nothing"):
        SAM2Source(str(tmp_path / "nothing"), "automatic")
    with pytest.raises(CheckpointError, match=r"no boundary model at .*nothing"):
        source(checkpoint, tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="does not follow objects"):
        source(boundaries)
    with pytest.raises(CheckpointError, match="3 logits per pixel"):
        source(checkpoint, boundary_model(tmp_path / "classes", labels=3))
    with pytest.raises(ConfigError, match="dtype"):
        source(checkpoint, dtype="int8")
    with pytest.raises(ConfigError, match="every"):
        source(checkpoint, every=0)
    with pytest.raises(ConfigError, match=r"sam2.*unexpected"):
        build_source({"type": "sam2", "colour": 3})
