"""Clips by an encoder of clips: distances, precision and recall, and captions."""

from __future__ import annotations

import re

import pytest
import torch
from test_kinds_of_cards import SIDE, build, generator, shards  # noqa: F401  (a fixture)

from tokgen.cli import main
from tokgen.encoders.contrastive import VideoContrastiveConfig, VideoContrastiveEncoder
from tokgen.encoders.trajvit import TrajViT, TrajViTConfig
from tokgen.evaluation.frechet import frechet_from_features
from tokgen.evaluation.report import Report
from tokgen.evaluation.samples import EvaluationSet
from tokgen.images import to_uint8

TOWER = {
    "type": "video-vit",
    "config": {"image_size": 16, "frames": 8, "patch": 8, "dim": 16, "heads": 2, "hidden": 16, "depth": 1},
}
TEXT = {"dim": 16, "n_heads": 2, "hidden": 16, "text_layers": 1, "embed_dim": 6, "max_text": 12}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, text):
    torch.manual_seed(0)
    made = VideoContrastiveEncoder(VideoContrastiveConfig(TOWER, text_vocab=text.vocab_size, **TEXT), text).eval()
    for p in made.parameters():  # so that clips differ
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return made, made.save_pretrained(tmp_path_factory.mktemp("eye") / "clips")


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words), "--device", "cpu", "--batch_size", "3"])


def test_a_tokenizer_of_clips(shards, tmp_path, encoder):  # noqa: F811
    model = build("emu3 of clips")
    model.save_pretrained(tmp_path / "model")
    words = ["tokenizer", tmp_path / "model", "--data", shards / "videos", "--frames", 8, "--size", SIDE]
    words += ["--extractor", encoder[1], "--text_encoder", encoder[1], "--learnability", "none"]
    assert evaluate(*words, "--out", tmp_path / "card") == 0
    card, eye = Report.load(tmp_path / "card"), encoder[0]
    (batch,) = EvaluationSet(shards / "videos", image_size=SIDE, frames=8, batch_size=4).batches()
    made = to_uint8(model.decode(model.encode(batch["pixels"])))
    with torch.no_grad():
        seen, true = (eye(x).pooled.double() for x in (made, batch["pixels"]))
        texts = eye.encode_text(batch["caption"]).double()
    assert card.figures["distribution"] == {"frechet": pytest.approx(frechet_from_features(seen, true), rel=1e-4)}
    cosines = torch.nn.functional.cosine_similarity(seen, texts, dim=1)
    assert float(cosines.mean()) > 0.05
    assert card.figures["text"]["text_score"] == pytest.approx(float(100 * cosines.clamp(min=0).mean()), rel=1e-4)
    assert card.protocols["distribution"].details["frames"] == 8
    assert card.protocols["distribution"].extractor_hash == card.protocols["text"].extractor_hash
    assert any("it is no FVD" in note for note in card.notes) and not any("No Frechet" in note for note in card.notes)


def test_a_generator_of_clips(shards, tmp_path, encoder, text):  # noqa: F811
    made, model = generator("trajectory-t2v", text)
    made.save_pretrained(tmp_path / "model", tokenizer=model)
    words = ["generator", tmp_path / "model", "--data", shards / "videos", "--extractor", encoder[1]]
    assert evaluate(*words, "--text_encoder", encoder[1], "--out", tmp_path / "card") == 0
    card = Report.load(tmp_path / "card")
    assert card.figures["distribution"].keys() == {"frechet", "precision", "recall"}
    assert card.figures["distribution"]["frechet"] > 0 and "image_to_text" in card.figures["text"]


def test_networks_that_cannot_judge_clips_are_one_line(shards, tmp_path, encoder, capsys):  # noqa: F811
    clips, pictures = (tmp_path / name for name in ("emu3 of clips", "vqgan"))
    for folder in (clips, pictures):
        build(folder.name).save_pretrained(folder)
    torch.manual_seed(0)
    tower = TrajViT(TrajViTConfig(32, 2, (8, 12, 16, 24), (1, 1, 1, 1), 32, 4, 48, 2, 1, 1, octaves=4))
    tower.save_pretrained(tmp_path / "tracks")
    for folder, data, extractor, message in (
        (clips, "videos", "mobilenet", "extractor 'mobilenet' is of pictures, and these are clips"),
        (clips, "videos", tmp_path / "tracks", "reads trajectories beside the clips"),
        (pictures, "images", encoder[1], "holds a VideoContrastiveEncoder; expected an image encoder"),
    ):
        words = ["tokenizer", folder, "--data", shards / data, "--size", SIDE, "--learnability", "none"]
        words += ["--frames", 8] if data == "videos" else []
        assert evaluate(*words, "--extractor", extractor, "--out", tmp_path / "card") == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and len(error.strip().splitlines()) == 1, error
