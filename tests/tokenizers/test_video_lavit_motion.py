"""What is particular to the motion tokenizer: its units, shapes, errors, training, and what its codes predict."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from PIL import Image

import tokgen
from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.motion import SCALE, STD, displacements, motion_map
from tokgen.data.shards import ShardWriter
from tokgen.errors import ConfigError, InputError
from tokgen.tokenizers.video_lavit_motion import FACTOR, MotionConfig, MotionTokenizer, motion_colors, warp
from tokgen.training.autoencoder import AutoencoderLoss, AutoencoderModule
from tokgen.training.base import Schedule, decay_groups
from tokgen.training.callbacks import ImageGrid
from tokgen.training.muon import MuonAdamW


def tiny(**changes):
    options = {"dim": 32, "heads": 2, "hidden": 64, "depth": 4, "frames": 16, "height": 8, "width": 12, "code_dim": 8}
    quantizer = {**MotionConfig().quantizer, "codebook_size": 32, "kmeans_init": False}
    torch.manual_seed(0)
    return MotionTokenizer(MotionConfig(**{**options, "quantizer": quantizer, **changes}))


def test_sizes_follow_the_strides():
    tokenizer = tiny().eval()
    motion = tokenizer.example_pixels(2)
    assert FACTOR == (8, 4, 4) and MotionConfig().grid == (3, 5, 9)
    assert motion.shape == (2, 16, 2, 8, 12)
    tokens = tokenizer.encode(motion)
    assert tokens.layout == tokgen.Grid(2, 2, 3) and tokens.ids.shape == (2, 12)
    assert tokenizer.decode(tokens).shape == motion.shape


def test_attention_reaches_every_place_and_every_frame():
    tokenizer = tiny().eval()
    motion = tokenizer.example_pixels(1)
    changed = motion.clone()
    changed[0, -1, 0, -1, -1] += 5
    difference = (tokenizer.encode_features(changed) - tokenizer.encode_features(motion)).abs().amax(-1)
    assert (difference > 0).all()  # (1, 2, 2, 3): one displacement at the end changes all vectors


def test_maps_are_not_clamped():
    tokenizer = tiny().eval()
    with torch.no_grad():
        tokenizer.head[-1].bias.fill_(-7.0)
    assert tokenizer.decode(tokenizer.encode(tokenizer.example_pixels(1))).max() < -1


@pytest.mark.parametrize(
    "motion, message",
    [
        (torch.zeros(16, 2, 8, 12), r"add a dimension with x\[None\]"),
        (torch.zeros(1, 2, 16, 8, 12), r"expected float \(B, 16, 2, 8, 12\): frames, then displacement"),
        (torch.zeros(1, 16, 3, 8, 12), r"expected float \(B, 16, 2, 8, 12\)"),
        (torch.zeros(1, 16, 2, 8, 12, dtype=torch.uint8), "motion is torch.uint8"),
        (torch.full((1, 16, 2, 8, 12), -math.inf), "not finite"),
        ("clip.mp4", "motion is str; expected float"),
    ],
)
def test_bad_motion_gets_one_clear_error(motion, message):
    with pytest.raises(InputError, match=message) as error:
        tiny().encode(motion)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth": 6}, "depth 6 of the 4 groups"),
        ({"heads": 3}, "multiple of heads 3"),
        ({"height": 10}, "16 frames of 10 x 12; expected multiples of 8, 4 and 4"),
        ({"scale_factor": 0.0}, "scale_factor is 0"),
        ({"dim": 0}, "dim is 0"),
    ],
)
def test_bad_configurations_get_one_clear_error(change, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**change)


def test_tokens_of_another_grid_are_refused():
    tokenizer = tiny().eval()
    tokens = tokgen.Tokens(torch.zeros(1, 12, dtype=torch.int64), tokgen.Grid(3, 4), tokenizer.codebook_sizes)
    with pytest.raises(ConfigError, match=r"the 12 tokens of Grid\(t=2, h=2, w=3\)"):
        tokenizer.decode(tokens)


def test_reconstruct_resizes_and_divides_by_the_scale():
    tokenizer = tiny(scale_factor=4.0).eval()
    tokens = tokenizer.encode(tokenizer.example_pixels(2))
    same = tokenizer.reconstruct(tokens, 8, 12)
    assert torch.allclose(same * 4, tokenizer.decode(tokens), atol=1e-5)
    assert tokenizer.reconstruct(tokens, 30, 54).shape == (2, 16, 2, 30, 54)


def test_published_folder_loads_again(tmp_path):
    tokenizer = tiny().eval()
    tokenizer.save_pretrained(tmp_path)
    again = tokgen.load(tmp_path)
    motion = tokenizer.example_pixels(1)
    assert again.config == tokenizer.config
    assert torch.equal(again.decode(again.encode(motion)), tokenizer.decode(tokenizer.encode(motion)))


def test_it_learns():
    quantizer = {**MotionConfig().quantizer, "codebook_size": 32, "decay": 0.9, "revive_below": 0.3}
    tokenizer = tiny(quantizer=quantizer)
    motion = tokenizer.example_pixels(8)
    optimizer = MuonAdamW(decay_groups(tokenizer), lr=0.003, muon_lr=0.02)
    errors = []
    for _ in range(120):
        output = tokenizer.train()(motion)
        loss = (output.reconstruction - motion).square().mean()
        (loss + sum(output.losses.values())).backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        errors.append(loss.item())
    assert set(output.losses) == {"commitment"} and {"usage", "perplexity"} <= set(output.stats)
    assert errors[-1] < 0.5 * motion.square().mean() < errors[0]


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [AutoencoderLoss(perceptual="none"), AutoencoderLoss(disc_weight=0.0)])
def test_losses_that_look_at_pictures_are_refused(loss):
    with pytest.raises(ConfigError, match=r"perceptual none and loss\.disc_weight 0"):
        AutoencoderModule(tiny(), loss=loss)


def test_module_reads_motion_and_reports_its_error():
    module = AutoencoderModule(tiny(), loss=AutoencoderLoss(perceptual="none", disc_weight=0.0))
    motion = module.tokenizer.example_pixels(3)
    batch = {"motion": motion, "caption": [""] * 3, "valid": torch.tensor([True, True, False])}
    reported = {}
    module.report = lambda metrics, bar=(): reported.update(metrics)
    module.eval()
    with torch.no_grad():
        module.on_validation_epoch_start()
        output = module.validation_step(batch, 0)
        module.on_validation_epoch_end()
        tokens = module.predict_step(batch, 0)
    mse = (output["reconstruction"] - motion)[:2].square().mean((1, 2, 3, 4))
    assert float(reported["val/mse"]) == pytest.approx(mse.mean().item(), rel=1e-5)
    assert float(reported["val/psnr"]) == pytest.approx((-10 * mse.log10()).mean().item(), rel=1e-5)
    assert tokens.ids.shape == (2, 12)


def test_it_trains_on_motion_shards_and_shows_them(tmp_path):
    torch.manual_seed(0)
    clips = tiny().example_pixels(8).half().numpy()
    for split in ("train", "val"):
        meta = {"shape": list(clips.shape[1:])}
        with ShardWriter(tmp_path / split, kind="motion", meta=meta) as writer:
            for i, clip in enumerate(clips):
                writer.write(f"{i:03d}", {"npy": clip})
    data = ShardsDataModule(train=str(tmp_path / "train"), val=str(tmp_path / "val"), batch_size=4, random_flip=True)
    module = AutoencoderModule(
        tiny(), loss=AutoencoderLoss(perceptual="none", disc_weight=0.0), schedule=Schedule(2, kind="constant")
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=str(tmp_path / "run"), logger=False, max_steps=2,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, val_check_interval=2, callbacks=[ImageGrid(count=3, columns=2)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert module.step == 2 and float(trainer.callback_metrics["val/mse"]) > 0
    grid = Image.open(tmp_path / "run/images/reconstruction-0000002.png")
    assert grid.size == (
        2 * (12 * 4 + 2) + 2,
        4 * (8 * 4 + 2) + 2,
    )  # maps of 8 x 12, four times enlarged, above their own


# -- seeing motion ----------------------------------------------------------------------------------------------------


def still(frames: int, right: float, down: float, height: int, width: int) -> torch.Tensor:
    """Maps (1, T, 2, 5, 9) of a picture that moves as a whole, pixels a frame; none in the first."""
    vectors = torch.tensor([float(right), float(down)]).view(1, 2, 1, 1).expand(frames, 2, 5, 9)
    return motion_map(vectors.contiguous(), height, width, (5, 9))[None]


def test_warp_moves_the_picture_where_motion_says():
    generator = torch.Generator().manual_seed(0)
    keyframe = torch.rand(1, 3, 40, 60, generator=generator)
    frames = warp(keyframe, still(6, 3, -2, 40, 60))
    assert torch.allclose(frames[:, 0], keyframe, atol=1e-5)
    for t in (1, 5):  # to the right by 3 t and up by 2 t
        assert torch.allclose(frames[0, t, :, : 40 - 2 * t, 3 * t :], keyframe[0, :, 2 * t :, : 60 - 3 * t], atol=1e-3)


def test_units_are_undone():
    motion = still(3, 3, -2, 40, 60)
    assert motion[0, 1, 0, 0, 0] == pytest.approx(3 / 60 / STD[0] * SCALE)
    pixels = displacements(motion, 40, 60)[0, 1]
    assert torch.allclose(pixels, torch.tensor([3.0, -2.0]).view(2, 1, 1).expand(2, 5, 9))


def test_warp_names_shapes_that_do_not_fit():
    with pytest.raises(InputError, match=r"keyframe \(B, 3, H, W\) and motion \(B, T, 2, h, w\)"):
        warp(torch.zeros(3, 8, 8), torch.zeros(1, 4, 2, 2, 2))


def test_colors_are_white_at_rest_and_opposite_in_opposite_directions():
    motion = torch.tensor([[0.0, 0.0], [9.0, 0.0], [-9.0, 0.0]]).view(3, 2, 1, 1)
    rest, right, left = motion_colors(motion, enlarge=2)
    assert rest.shape == (3, 2, 2) and (rest == 1).all()
    assert torch.equal(right[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(right + left, torch.ones(3, 2, 2), atol=1e-5)
    tokenizer = tiny()
    assert tokenizer.pictures(tokenizer.example_pixels(2)).shape == (2, 3, 32, 48)
