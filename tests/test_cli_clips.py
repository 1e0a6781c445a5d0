"""Clips from the command line: a video to tokens and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import tokgen
from tokgen.cli import main
from tokgen.data.video import open_video
from tokgen.tokenizers.trajectory import TrajectoryTokenizer
from tokgen.tokenizers.vqgan import VQGAN
from tokgen.trajectories.picture import write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trajectory tokenizer, a picture tokenizer, and a video of 12 frames of 46 x 34 in which a square moves."""
    folder = tmp_path_factory.mktemp("clips")
    torch.manual_seed(0)
    TrajectoryTokenizer(TrajectoryTokenizer.example_configs()["plain"]).save_pretrained(folder / "tokenizer")
    VQGAN(next(iter(VQGAN.example_configs().values()))).save_pretrained(folder / "pictures")
    frames = np.full((12, 34, 46, 3), 90, np.uint8)
    for t in range(12):
        frames[t, 10:22, 4 + 2 * t : 16 + 2 * t] = (220, 40, 40)
    write_video(frames, folder / "clip.mp4", fps=8)
    return folder


def test_a_video_becomes_tokens_and_tokens_a_film(folder, capsys):
    tokens = str(folder / "tokens.safetensors")
    assert main(["encode", str(folder / "clip.mp4"), "--model", str(folder / "tokenizer"), "--out", tokens]) == 0
    assert "1 clip(s), Trajectories(t=8, h=8, w=11, n=12)" in capsys.readouterr().out
    tokenizer = tokgen.load(folder / "tokenizer")
    with open_video(folder / "clip.mp4") as video:
        clip = torch.from_numpy(video.get_frames(range(8))).permute(0, 3, 1, 2)[None, ..., 1:33, 1:45]  # multiples of 4
    assert torch.equal(tokgen.Tokens.load(tokens).ids, tokenizer.encode(clip).ids)

    for name in ("film.gif", "film.mp4", "film.png"):
        assert main(["decode", tokens, "--model", str(folder / "tokenizer"), "--out", str(folder / name)]) == 0
    with Image.open(folder / "film.gif") as film:
        assert film.n_frames == 8 and film.size == (44, 32)
    with open_video(folder / "film.mp4") as film:
        assert len(film) == 8 and film.size == (44, 32)
    with Image.open(folder / "film.png") as film:
        assert film.size == (8 * 46 + 2, 36)


def test_frames_rate_and_size(folder, capsys):
    where = ["--model", str(folder / "tokenizer"), "--out", str(folder / "other.safetensors")]
    assert main(["encode", str(folder / "clip.mp4"), *where, "--frames", "3", "--fps", "4", "--size", "32"]) == 0
    assert "Trajectories(t=3, h=8, w=8, n=12)" in capsys.readouterr().out
    tokenizer = tokgen.load(folder / "tokenizer")
    with open_video(folder / "clip.mp4") as video:
        clip = torch.from_numpy(video.get_frames([0, 2, 4])).permute(0, 3, 1, 2)
    from tokgen.data.batches import resize_image

    squares = torch.stack([resize_image(frame, 32) for frame in clip])[None]
    assert torch.equal(tokgen.Tokens.load(where[-1]).ids, tokenizer.encode(squares).ids)


def test_mistakes_are_one_line(folder, capsys):
    out = ["--out", str(folder / "bad.safetensors")]
    Image.new("RGB", (32, 32)).save(folder / "picture.png")
    (folder / "broken.mp4").write_bytes(b"not a video")
    cases = [
        (["encode", str(folder / "clip.mp4"), "--model", str(folder / "pictures"), *out], "takes pictures"),
        (["encode", str(folder / "picture.png"), "--model", str(folder / "tokenizer"), *out], "takes clips"),
        (["encode", str(folder / "broken.mp4"), "--model", str(folder / "tokenizer"), *out], "broken.mp4"),
        (
            ["encode", str(folder / "picture.png"), "--model", str(folder / "pictures"), "--frames", "4", *out],
            "--frames",
        ),
        (
            ["decode", str(folder / "tokens.safetensors"), "--model", str(folder / "tokenizer"), "--out", "film.jpg"],
            ".png, .gif or .mp4",
        ),
    ]
    tokgen.load(folder / "tokenizer").encode(torch.zeros(1, 8, 3, 16, 16)).save(folder / "tokens.safetensors")
    for command, message in cases:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (folder / "bad.safetensors").exists()
