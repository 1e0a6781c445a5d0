"""The shipped demo models: within their size, of one family, and as good as the documents say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.io import read_image

import tokgen
from tokgen.cli import main
from tokgen.encoders.base import load_encoder
from tokgen.evaluation.reconstruction import evaluate_reconstruction, read_pictures
from tokgen.evaluation.retrieval import evaluate_retrieval, feature_space
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.images import to_uint8

DEMO = Path(__file__).parents[1] / "assets" / "demo"


def size(*folders: str) -> int:
    return sum(f.stat().st_size for folder in folders for f in (DEMO / folder).rglob("*") if f.is_file())


@pytest.fixture(scope="module")
def pictures():
    return {split: read_pictures(DEMO / "shards" / split) for split in ("train", "val")}


def test_they_are_small():
    assert size("tokenizer", "generator") <= 25e6
    assert size("teacher") <= 5e6


def test_the_tokenizer_keeps_pictures_it_was_not_trained_on(pictures):
    report = evaluate_reconstruction(tokgen.load(DEMO / "tokenizer"), pictures["val"][0])
    assert report.psnr >= 24 and report.tokens <= 64


def test_the_teacher_knows_pictures_by_captions_it_was_not_trained_on(pictures):
    pixels, captions, _ = pictures["val"]
    teacher = load_encoder(str(DEMO / "teacher"))
    with torch.no_grad():
        similarity = F.normalize(teacher.embed(pixels)) @ F.normalize(teacher.encode_text(captions)).T
    own = torch.arange(len(captions))
    assert (similarity.argmax(1) == own).float().mean() >= 0.5
    assert (similarity.argmax(0) == own).float().mean() >= 0.5


def test_the_generator_draws_what_training_captions_ask_for(pictures):
    """Recall on 96 of the 4,546 captions; `assets/demo/measure.py` measures all."""
    pipeline = TextToImagePipeline.from_pretrained(DEMO / "generator")
    known, captions, _ = pictures["train"]
    chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(1))[:96]
    drawn = to_uint8(pipeline([captions[i] for i in chosen], output_type="pt", generator=0).images)
    references = torch.cat([known, pictures["val"][0]])
    assert evaluate_retrieval(drawn, references, chosen, feature_space("pixels")).top1 >= 0.85


def test_published_files_are_as_readable_as_any_other(tmp_path):
    """safetensors writes files that only their owner may read."""
    (tmp_path / "other").touch()
    folder = tokgen.load(DEMO / "tokenizer").save_pretrained(tmp_path / "tokenizer")
    modes = {os.stat(f).st_mode & 0o777 for f in [tmp_path / "other", *folder.iterdir()]}
    assert len(modes) == 1


def test_it_draws_from_the_command_line_the_same_picture_either_way(tmp_path, capsys):
    words = ["sample", "red heart, 3d style", "--model", str(DEMO / "generator"), "--device", "cpu", "--out"]
    assert main([*words, str(tmp_path / "plain.png")]) == 0
    assert main([*words, str(tmp_path / "guessed.png"), "--speculative", "4"]) == 0
    assert "steps a call" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "int8.png"), "--precision", "int8"]) == 0
    plain, guessed, int8 = (read_image(str(tmp_path / f"{name}.png")) for name in ("plain", "guessed", "int8"))
    assert plain.shape == int8.shape == (3, 64, 64) and torch.equal(plain, guessed)
    heart = plain[:, 24:40, 24:40].float().mean((1, 2))  # its middle is red
    assert heart[0] > 200 and heart[1:].max() < 150
