"""Trajectory tokens: what particular laws they keep, beside those of every tokenizer."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import tokgen
from tokgen import TokgenError, Trajectories
from tokgen.errors import ConfigError, InputError
from tokgen.nn.ellipses import measure
from tokgen.tokenizers.trajectory import TrajectoryConfig, TrajectoryTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> TrajectoryTokenizer:
    torch.manual_seed(0)
    return TrajectoryTokenizer(TrajectoryTokenizer.example_configs()["plain"]).eval()


def clip(batch: int = 2, frames: int = 8, h: int = 32, w: int = 24, step: int = 1):
    """Clips in which two squares move over a background, and their trajectories (B, T, h / 2, w / 2)."""
    torch.manual_seed(1)
    pixels = torch.rand(batch, 1, 3, 1, 1).expand(-1, frames, -1, h, w).clone()
    labels = torch.zeros(batch, frames, h // 2, w // 2, dtype=torch.int64)
    for t in range(frames):
        for k, (y, x) in enumerate(((4, 4 + step * t), (20, 12 - step * t))):
            color = torch.rand(batch, 3, 1, 1) if t == 0 else pixels[:, 0, :, (4, 20)[k], (4, 12)[k], None, None]
            pixels[:, t, :, y : y + 8, x : x + 8] = color
            labels[:, t, y // 2 : y // 2 + 4, x // 2 : x // 2 + 4] = k + 1
    return pixels, labels


def test_ids_are_one_row_for_each_trajectory(tokenizer):
    pixels, labels = clip()
    tokens = tokenizer.encode(pixels, trajectories=labels)
    sizes = (8, 8, *(32, 32, 16, 16, 8, 4) * 3, 80, 80, 80)
    assert tokens.codebook_sizes == sizes and tokens.ids.shape == (2, 3, len(sizes))
    assert tokens.layout == Trajectories(8, 8, 6, 12) and tokens.lengths.tolist() == [3, 3]
    assert torch.allclose(tokens.bits, torch.full((2,), 3 * sum(math.log2(n) for n in sizes), dtype=torch.float64))
    volume = torch.stack([torch.bincount(x.flatten()) for x in tokenizer.labels(pixels, labels)[0]])
    assert (volume.diff(dim=1) <= 0).all()  # largest first


def test_numbers_and_grid_of_the_trajectories_do_not_matter(tokenizer):
    pixels, labels = clip()
    tokens = tokenizer.encode(pixels, trajectories=labels)
    renamed = torch.tensor([40, 7, 11])[labels]
    assert torch.equal(tokenizer.encode(pixels, trajectories=renamed).ids, tokens.ids)
    finer = labels.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert torch.equal(tokenizer.encode(pixels, trajectories=finer).ids, tokens.ids)
    assert torch.equal(tokenizer.encode(pixels, trajectories=labels.to(torch.int32)).ids, tokens.ids)


def test_the_number_of_tokens_does_not_follow_the_duration(tokenizer):
    pixels, labels = clip()
    for t in (1, 3, 8):
        tokens = tokenizer.encode(pixels[:, :t], trajectories=labels[:, :t])
        assert tokens.lengths.tolist() == [3, 3] and tokenizer.decode(tokens).shape == pixels[:, :t].shape


def test_order_of_tokens_does_not_matter_to_decoding(tokenizer):
    pixels, labels = clip()
    tokens = tokenizer.encode(pixels, trajectories=labels)
    order = torch.tensor([2, 0, 1])
    mixed = dataclasses.replace(tokens, ids=tokens.ids[:, order], mask=tokens.mask[:, order])
    assert (tokenizer.decode(mixed) - tokenizer.decode(tokens)).abs().max() < 1e-5


def test_prefixes_and_fewer_appearance_codes_decode_to_less(tokenizer):
    pixels, labels = clip()
    tokens = tokenizer.encode(pixels, trajectories=labels)
    whole = tokenizer.decode(tokens)
    assert not torch.equal(tokenizer.decode(tokens.prefix(1)), whole)
    assert not torch.equal(tokenizer.decode_coarse(tokens, 1), whole)
    assert torch.equal(tokenizer.decode_coarse(tokens, 2), whole)
    with pytest.raises(InputError, match="appearance=3"):
        tokenizer.decode_coarse(tokens, 3)


def test_geometry_comes_back_as_labels(tokenizer):
    pixels, labels = clip()
    tokens = tokenizer.encode(pixels, trajectories=labels)
    ranks, _ = tokenizer.labels(pixels, labels)
    assert (tokenizer.decode_labels(tokens) == ranks).float().mean() > 0.7  # without training: ellipses alone


def test_canvas_holds_the_things_own_colours(tokenizer):
    pixels, labels = clip(step=0)
    ranks, numbers = tokenizer.labels(pixels, labels)
    mask = torch.arange(12) < numbers[:, None]
    ellipses = tokenizer.codec.decode(tokenizer.codec.encode(measure(ranks, 12)), 8, mask)
    occupancy, inside, colors = tokenizer.canvas(pixels, ranks, ellipses)
    assert occupancy.shape == (2, 12, 8, 8) and colors.shape == (2, 12, 3, 8, 8)
    assert ((occupancy >= 0) & (occupancy <= 1)).all() and not occupancy[:, 3:].any() and not inside[:, 3:].any()
    assert (occupancy[:, 1, 3:5, 3:5] > 0.9).all()  # the middle of a square is the square's
    inner = colors[:, 1:3, :, 3:5, 3:5].flatten(3)
    squares = torch.stack([pixels[:, 0, :, 8, 8], pixels[:, 0, :, 24, 16]], 1)  # the upper one comes first
    assert torch.allclose(inner, squares[..., None].expand_as(inner), atol=1e-6)


def test_trajectories_beyond_the_most_are_left_out():
    torch.manual_seed(0)
    tokenizer = TrajectoryTokenizer(
        dataclasses.replace(TrajectoryTokenizer.example_configs()["plain"], trajectories=2)
    ).eval()
    pixels, labels = clip()
    tokens = tokenizer.encode(pixels, trajectories=labels)
    assert tokens.lengths.tolist() == [2, 2] and tokens.layout.n == 2


def test_a_clip_in_which_nothing_was_found(tokenizer):
    pixels, _ = clip()
    tokens = tokenizer.encode(pixels, trajectories=torch.full((2, 8, 4, 4), -1))
    assert tokens.lengths.tolist() == [0, 0]
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == pixels.shape and decoded.isfinite().all()


def test_grid_ids_are_side_information_and_counted():
    torch.manual_seed(0)
    tokenizer = TrajectoryTokenizer(TrajectoryTokenizer.example_configs()["grid"]).eval()
    pixels, labels = clip()
    tokens = tokenizer.encode(pixels, trajectories=labels)
    assert tokens.side["grid"].shape == (2, 3, 4, 3)  # 8 frames in threes, 32 x 24 pixels in eights
    without = float(tokens.bits[0]) - 36 * math.log2(80)
    assert without == pytest.approx(3 * sum(math.log2(n) for n in tokens.codebook_sizes))
    with pytest.raises(InputError, match="grid stream"):
        tokenizer.decode(dataclasses.replace(tokens, side={}, side_sizes={}))


def test_training_drops_trajectories_and_learns():
    torch.manual_seed(0)
    config = dataclasses.replace(TrajectoryTokenizer.example_configs()["plain"], prefix_dropout=0.5)
    tokenizer = TrajectoryTokenizer(config).train()
    pixels, labels = clip(batch=4)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 3e-3)
    errors, layouts = [], []
    for _ in range(80):
        out = tokenizer(pixels, labels)
        error = (out.reconstruction - pixels).abs().mean()
        (error + sum(out.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
        layouts.append(out.losses["layout"].item())
    start, end = (torch.tensor(x).view(8, 10).mean(1)[[0, -1]].tolist() for x in (errors, layouts))
    assert start[1] < 0.6 * start[0] and end[1] < 0.5 * end[0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in tokenizer.parameters())


def test_bad_input(tokenizer):
    pixels, labels = clip()
    with pytest.raises(InputError, match="takes 1 to 8"):
        tokenizer.encode(torch.rand(1, 9, 3, 16, 16))
    with pytest.raises(InputError, match="expected integers"):
        tokenizer.encode(pixels, trajectories=labels.float())
    with pytest.raises(InputError, match="expected integers"):
        tokenizer.encode(pixels, trajectories=labels[:, :4])
    with pytest.raises(InputError, match="-3"):
        tokenizer.encode(pixels, trajectories=labels - 3)
    tokens = tokenizer.encode(pixels, trajectories=labels)
    with pytest.raises(ConfigError, match="up to 12"):
        tokenizer.decode(dataclasses.replace(tokens, layout=Trajectories(8, 8, 6, 13)))
    with pytest.raises(TokgenError, match="paint_channels"):
        TrajectoryConfig(paint_channels=2)


def test_tokens_survive_a_file_and_a_publication(tokenizer, tmp_path):
    pixels, labels = clip()
    tokens = tokenizer.encode(pixels, trajectories=labels)
    tokens.save(tmp_path / "tokens.safetensors")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = tokgen.load(tmp_path / "tokenizer")
    assert again.config == tokenizer.config
    assert torch.equal(again.decode(tokgen.Tokens.load(tmp_path / "tokens.safetensors")), tokenizer.decode(tokens))
