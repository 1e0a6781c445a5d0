"""The shipped demo models: within their size, of one family, and as good as the documents say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tokgen
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
