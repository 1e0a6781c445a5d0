"""What is particular to Emu3's tokenizer: pictures beside clips, causality in time, codes as condition, training, memory."""

from __future__ import annotations

import io

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tokgen
from tokgen.cli import main
from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.shards import ShardWriter
from tokgen.errors import ConfigError, InputError
from tokgen.images import image_grid
from tokgen.tokenizers import emu3 as module
from tokgen.tokenizers.emu3 import Emu3, Emu3Config
from tokgen.training.autoencoder import AutoencoderLoss, AutoencoderModule
from tokgen.training.base import Schedule, decay_groups


def tiny(**changes):
    options = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    quantizer = {"type": "vq", "codebook_size": 64, "kmeans_init": True, "update": "ema"}
    torch.manual_seed(0)
    tokenizer = Emu3(Emu3Config(**{**options, "quantizer": quantizer, **changes}))
    tokenizer(tokenizer.example_pixels(8, ndim=5))  # codes where vectors are, and statistics that are not 0 and 1
    return tokenizer.eval()


def test_paper_size_has_the_published_parameter_count():
    with torch.device("meta"):
        tokenizer = Emu3(Emu3Config())
    assert sum(p.numel() for p in tokenizer.parameters()) == 270_740_287  # 1.08 GB of float32, as published
    assert (tokenizer.factor, tokenizer.codebook_sizes, tokenizer.code_dim) == (8, (32768,), 4)


@pytest.mark.parametrize("mult, patch, factor, temporal", [((1, 2), 1, 2, 4), ((1,), 4, 4, 2), ((1, 1, 2), 2, 8, 1)])
def test_grids_of_pictures_and_clips(mult, patch, factor, temporal):
    tokenizer = tiny(channel_mult=mult, patch=patch, temporal_factor=temporal)
    assert tokenizer.factor == factor
    picture, clip = torch.rand(2, 3, 2 * factor, 3 * factor), torch.rand(2, 3 * temporal, 3, 3 * factor, 2 * factor)
    for pixels, grid in ((picture, tokgen.Grid(2, 3)), (clip, tokgen.Grid(3, 3, 2))):
        tokens = tokenizer.encode(pixels)
        assert tokens.layout == grid and tokens.ids.shape == (2, grid.length)
        assert tokenizer.decode(tokens).shape == pixels.shape


def test_a_picture_is_a_clip_that_stands_still():
    tokenizer = tiny()
    picture = tokenizer.example_pixels(3)
    clip = picture[:, None].expand(-1, 8, -1, -1, -1)
    tokens, of_clip = tokenizer.encode(picture), tokenizer.encode(clip)
    assert tokens.ids.unique().numel() > 8
    assert torch.equal(of_clip.ids.unflatten(1, (2, -1))[:, 0], tokens.ids)
    alone = tokgen.Tokens(tokens.ids, tokgen.Grid(1, *tokens.layout.shape), tokens.codebook_sizes)
    assert torch.allclose(tokenizer.decode(alone)[:, 0], tokenizer.decode(tokens), atol=1e-6)


def test_nothing_depends_on_later_frames():
    tokenizer = tiny()
    clip = tokenizer.example_pixels(1, ndim=5)
    changed = clip.clone()
    changed[:, 4:] = 1 - clip[:, 4:]
    first, last = (tokenizer.encode_features(changed) - tokenizer.encode_features(clip)).abs().amax((0, 2, 3, 4))
    assert first == 0 and last > 1e-3
    tokens = tokenizer.encode(clip)
    codes = tokenizer.quantizer.lookup(tokens.ids).unflatten(1, tokens.layout.shape)
    other = torch.cat([codes[:, :1], codes[:, 1:] + 1], 1)
    difference = (
        (tokenizer.decode_features(other, False) - tokenizer.decode_features(codes, False)).abs().amax((0, 2, 3, 4))
    )
    assert (difference[:4] == 0).all() and (difference[4:] > 1e-3).all()
    # but it does on those before, across the border of four
    changed = clip.clone()
    changed[:, 3] = 1 - clip[:, 3]
    assert (
        (tokenizer.encode_features(changed) - tokenizer.encode_features(clip)).abs().amax((0, 2, 3, 4)) > 1e-3
    ).all()


def test_codes_condition_every_norm_of_the_decoder():
    tokenizer = tiny()
    norms = [m for m in tokenizer.decoder.modules() if isinstance(m, module.SpatialNorm)]
    assert len(norms) == sum(isinstance(m, nn.GroupNorm) for m in tokenizer.decoder.modules()) == 16
    z = torch.randn(1, 4, 3, 3)
    a, b = (tokenizer.decoder(z, condition) for condition in (torch.zeros_like(z), torch.ones_like(z)))
    assert (a - b).abs().max() > 1e-2
    norm = norms[0]
    x, codes = torch.randn(2, 64, 6, 6), torch.randn(2, 4, 1, 1)
    scale, shift = norm.scale(codes), norm.shift(codes)
    assert torch.allclose(norm(x, codes), norm.norm(x) * scale + shift, atol=1e-6)
    fine = torch.randn(2, 4, 3, 3)  # each code for 2 x 2 places
    assert torch.allclose(norm(x, fine), norm(x, fine.repeat_interleave(2, 2).repeat_interleave(2, 3)), atol=1e-6)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.rand(3, 8, 8), r"add a dimension with x\[None\]"),
        (torch.rand(1, 6, 3, 8, 8), "clips of 6 frames do not fit this tokenizer: expected a multiple of 4"),
        (torch.rand(1, 0, 3, 8, 8), "clips of 0 frames"),
        (torch.rand(1, 3, 4, 8, 8), r"expected \(B, 3, H, W\) or \(B, T, 3, H, W\)"),
        (torch.rand(1, 4, 3, 9, 8), "multiples of 2"),
        (torch.rand(1, 4, 3, 8, 8) * 255, r"expected \[0, 1\]"),
    ],
)
def test_bad_pixels_get_one_clear_error(pixels, message):
    with pytest.raises(InputError, match=message) as error:
        tiny().encode(pixels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temporal_factor": 3}, "temporal_factor is 3; expected a power of 2"),
        ({"channels": 30}, "multiple of 32"),
        ({"channel_mult": ()}, "channel_mult is empty"),
        ({"code_dim": 0}, "code_dim is 0"),
    ],
)
def test_bad_configurations_get_one_clear_error(change, message):
    with pytest.raises(ConfigError, match=message):
        Emu3(Emu3Config(**change))


def test_half_a_grid_is_refused():
    tokenizer = tiny()
    tokens = tokenizer.encode(tokenizer.example_pixels(1))
    half = tokgen.Tokens(tokens.ids[:, :5], tokens.layout, tokens.codebook_sizes)
    with pytest.raises(ConfigError, match="full grid of a picture or a clip; got 5 tokens"):
        tokenizer.decode(half)


def test_published_folder_loads_again(tmp_path):
    tokenizer = tiny()
    again = tokgen.load(tokenizer.save_pretrained(tmp_path))
    assert again.config == tokenizer.config and again.fingerprint == tokenizer.fingerprint
    clip = tokenizer.example_pixels(1, ndim=5)
    assert torch.equal(again.decode(again.encode(clip)), tokenizer.decode(tokenizer.encode(clip)))


@pytest.mark.parametrize("ndim", [4, 5])
def test_embeddings_are_the_codes_in_raster_order(ndim):
    tokenizer = tiny()
    pixels = tokenizer.example_pixels(2, wide=True, ndim=ndim)
    output = tokenizer(pixels)
    embeddings = tokenizer.embeddings(output.tokens)
    assert embeddings.shape == (*output.tokens.ids.shape, tokenizer.code_dim) and embeddings.dtype == torch.float32
    assert torch.equal(output.codes, embeddings)
    assert torch.equal(tokenizer.codebook_table()[output.tokens.ids], embeddings)
    assert tokenizer.train()(pixels).codes.requires_grad


def test_the_command_line_decodes_a_clip_to_its_frames(tmp_path):
    tokenizer = tiny()
    tokens = tokenizer.encode(tokenizer.example_pixels(1, ndim=5))
    tokens.save(tmp_path / "clip.safetensors")
    tokenizer.save_pretrained(tmp_path / "emu3")
    words = ["decode", tmp_path / "clip.safetensors", "--model", tmp_path / "emu3", "--out", tmp_path / "frames.png"]
    assert main([str(word) for word in [*words, "--device", "cpu", "--columns", 8]]) == 0
    frames = torch.from_numpy(np.array(Image.open(tmp_path / "frames.png"))).permute(2, 0, 1)
    assert torch.equal(frames, image_grid(tokenizer.decode(tokens)[0], 8))


@pytest.mark.parametrize("ndim", [4, 5])
def test_outside_of_training_frames_are_taken_in_parts(ndim, monkeypatch):
    tokenizer = tiny()
    pixels = tokenizer.example_pixels(5, ndim=ndim)  # 8 x 8 pixels a frame
    whole = tokenizer.encode(pixels)
    seen: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for name, sizes in seen.items():
        getattr(tokenizer, name).register_forward_pre_hook(lambda _, maps, sizes=sizes: sizes.append(len(maps[0])))
    decoded = tokenizer.decode(whole)
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 3 * 8 * 8)
    assert torch.equal(tokenizer.encode(pixels).ids, whole.ids)
    assert torch.allclose(
        tokenizer.decode(whole), decoded, atol=1e-5
    )  # convolutions of other sizes sum in another order
    frames = 5 if ndim == 4 else 40
    parts = [3] * (frames // 3) + [frames % 3]
    assert seen == {"encoder": parts, "decoder": [frames, *parts]}
    tokenizer.train()(pixels)
    assert seen["encoder"][-1] == seen["decoder"][-1] == frames


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [4, 5])
def test_gradients_reach_every_parameter(ndim):
    tokenizer = Emu3(Emu3Config(32, (1, 2), 1, quantizer={"type": "vq", "codebook_size": 64}))
    pixels = tokenizer.example_pixels(2, ndim=ndim)
    output = tokenizer.train()(pixels)
    ((output.reconstruction - pixels).square().mean() + sum(output.losses.values())).backward()
    assert output.reconstruction.shape == pixels.shape and set(output.losses) == {"commitment", "codebook"}
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("ndim", [4, 5])
def test_it_learns_pictures_and_what_moves(ndim):
    quantizer = {
        "type": "vq",
        "codebook_size": 64,
        "update": "ema",
        "decay": 0.9,
        "kmeans_init": True,
        "revive_below": 0.3,
    }
    torch.manual_seed(0)
    tokenizer = Emu3(Emu3Config(32, (1, 2), 1, quantizer=quantizer))
    pixels = tokenizer.example_pixels(4)
    if ndim == 5:  # a pan of one pixel in two frames
        pixels = torch.stack([pixels.roll(t // 2, -1) for t in range(8)], 1)
    optimizer = torch.optim.AdamW(decay_groups(tokenizer), lr=2e-3)
    errors = []
    for _ in range(60):
        output = tokenizer.train()(pixels)
        loss = (output.reconstruction - pixels).square().mean()
        (loss + sum(output.losses.values())).backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        errors.append(loss.item())
    assert errors[-1] < 0.5 * pixels.var().item() < errors[0]
    # statistics gathered in training serve in evaluation
    assert (tokenizer.eval()(pixels).reconstruction - pixels).square().mean() < 0.7 * pixels.var()


@pytest.mark.parametrize("ndim", [4, 5])
def test_bf16_autocast_is_finite_and_quantizes_in_fp32(ndim):
    tokenizer = tiny()
    pixels = tokenizer.example_pixels(2, ndim=ndim)
    for training in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            output = tokenizer.train(training)(pixels)
            loss = (output.reconstruction.float() - pixels).square().mean() + sum(
                output.losses.values(), torch.zeros(())
            )
        assert output.codes.dtype == torch.float32 and torch.isfinite(output.reconstruction).all()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in tokenizer.parameters() if p.grad is not None)
    assert all(torch.isfinite(b).all() for b in tokenizer.buffers() if b.is_floating_point())


def test_it_trains_on_pictures_with_all_losses_in_channels_last(tmp_path):
    for split in ("train", "val"):
        with ShardWriter(tmp_path / split) as writer:
            for i in range(6):
                file = io.BytesIO()
                noise = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(noise).save(file, "PNG")
                writer.write(f"{i:03d}", {"png": file.getvalue(), "txt": "noise"})
    data = ShardsDataModule(train=str(tmp_path / "train"), val=str(tmp_path / "val"), batch_size=3, image_size=16)
    loss = AutoencoderLoss(
        perceptual="none", disc_weight=0.1, disc_start=1, disc_channels=8, disc_layers=2, adaptive=True
    )
    tokenizer = tiny(patch=2)
    training = AutoencoderModule(tokenizer.train(), loss=loss, schedule=Schedule(3, kind="constant"))
    kernel = tokenizer.encoder.levels[0].blocks[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    before = tokenizer.temporal_decoder.blocks[0].conv1.weight.clone()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=str(tmp_path / "run"), logger=False, max_steps=3,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, val_check_interval=1,
    )  # fmt: skip
    trainer.fit(training, datamodule=data)
    assert training.step == 3 and float(trainer.callback_metrics["val/psnr"]) > 0
    assert not torch.equal(tokenizer.temporal_decoder.blocks[0].conv1.weight, before)
