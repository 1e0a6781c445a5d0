"""A card for every kind of tokenizer and generator that there is, by the command that users call."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tokgen.cli import main
from tokgen.data.shards import ShardWriter
from tokgen.evaluation.likelihood import Likelihood
from tokgen.evaluation.report import Report
from tokgen.evaluation.samples import EvaluationSet
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.generators.tokenflow import TokenFlowGenerator, TokenFlowGeneratorConfig
from tokgen.tokenizers.base import TOKENIZERS
from tokgen.tokenizers.seed import SEED
from tokgen.trajectories.picture import write_video

SIDE = 32
WHAT = {  # tokenizer -> (example configuration, data, further options)
    "vqgan": ("ibq", "images", []),
    "seed": ("text", "images", []),
    "lavit": ("eva", "images", []),
    "tokenflow": (None, "images", []),
    "emu3": ("published", "images", []),
    "emu3 of clips": ("published", "videos", ["--frames", "8"]),
    "trajectory": ("plain", "videos", []),
    "video-lavit-motion": ("published", "motion", []),
}


def build(name: str):
    torch.manual_seed(0)
    cls = TOKENIZERS[name.partition(" ")[0]]
    configs = cls.example_configs()
    return cls(configs[WHAT[name][0] or next(iter(configs))]).eval()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of 12 pictures, 4 clips of 10 frames and 12 motion maps, each with a caption and a group."""
    folder, rng = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    about = [json.dumps({"caption": "red heart, 3d style", "group": "ab"[i % 2]}).encode() for i in range(24)]
    with ShardWriter(folder / "images") as writer:
        for i in range(24):
            small, file = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)), io.BytesIO()
            small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "PNG")
            writer.write(f"k{i}", {"png": file.getvalue(), "json": about[i]})
    with ShardWriter(folder / "videos", kind="videos") as writer:
        for i in range(4):
            frames = np.full((10, SIDE, SIDE, 3), 90, np.uint8)
            for t in range(10):
                frames[t, 10:20, 2 * t + i : 2 * t + i + 10] = (220, 40, 40)
            write_video(frames, folder / "clip.mp4", fps=8)
            writer.write(f"c{i}", {"mp4": (folder / "clip.mp4").read_bytes(), "json": about[i]})
    motion = build("video-lavit-motion").example_pixels(24)
    with ShardWriter(folder / "motion", kind="motion", meta={"shape": list(motion.shape[1:])}) as writer:
        for i, motion_map in enumerate(motion.numpy()):
            writer.write(f"m{i}", {"npy": motion_map, "json": about[i]})
    return folder


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words), "--device", "cpu", "--extractor", "none", "--batch_size", "5"])


@pytest.mark.parametrize("name", WHAT)
def test_every_tokenizer_has_a_card(shards, tmp_path, name):
    model, (_, kind, options) = build(name), WHAT[name]
    model.save_pretrained(tmp_path / "model")
    size = ["--size", SIDE] if model.image_size is None else []
    words = ["tokenizer", tmp_path / "model", "--data", shards / kind, "--out", tmp_path / "card", "--probe", "group"]
    assert evaluate(*words, *size, *options, "--learnability", "none") == 0
    card = Report.load(tmp_path / "card")
    samples = {"images": 24, "videos": 4, "motion": 24}[kind]
    assert card.protocols["codes"].samples == samples
    assert ("pixels" in card.figures) == (kind != "motion" and not any("not measured" in note for note in card.notes))
    assert len(card.figures["codes"]["entropy"]) == len(model.codebook_sizes)
    probed = card.figures.get("probe", {})
    if kind == "videos":
        assert any("No probe of group: 2 classes among 4 samples" in note for note in card.notes)
    else:
        wanted = {"probe_of_vectors", "probe_of_codes", "probe_of_pixels", "largest_class"}
        assert probed.keys() == (wanted if kind == "images" else wanted - {"probe_of_pixels"})
    assert "speed" in card.figures


def test_the_errors_of_motion_are_those_of_the_maps(shards, tmp_path):
    model = build("video-lavit-motion")
    model.save_pretrained(tmp_path / "model")
    words = ["tokenizer", tmp_path / "model", "--data", shards / "motion", "--out", tmp_path / "card"]
    assert evaluate(*words, "--learnability", "none") == 0
    card, truth = Report.load(tmp_path / "card"), model.example_pixels(24)
    made = model.decode(model.encode(truth))
    assert card.figures["motion"]["motion_error"] == pytest.approx(float((made - truth).square().mean()), rel=1e-5)
    assert card.figures["motion"]["motion_error_of_zero"] == pytest.approx(float(truth.square().mean()), rel=1e-6)
    assert "bits_per_pixel" not in card.figures["codes"] and card.protocols["motion"].filter == "none"
    assert (tmp_path / "card" / "pictures.png").is_file()


def test_codes_that_are_compared_with_captions(tmp_path, text):
    """Pictures of one colour each; a tokenizer that reads captions. Those without one are left out."""
    with ShardWriter(tmp_path / "images") as writer:
        for i in range(12):
            picture, file = Image.new("RGB", (SIDE, SIDE), (20 * i, 255 - 20 * i, 60)), io.BytesIO()
            picture.save(file, "PNG")
            caption = {} if i == 5 else {"txt": ["red heart", "blue fish, flat style", "cat"][i % 3]}
            writer.write(f"k{i}", {"png": file.getvalue(), **caption})
    torch.manual_seed(0)
    model = SEED(replace(SEED.example_configs()["text"], text_vocab=text.vocab_size), text).eval()
    model.save_pretrained(tmp_path / "model")
    words = ["tokenizer", tmp_path / "model", "--data", tmp_path / "images", "--out", tmp_path / "card"]
    assert evaluate(*words, "--learnability", "none") == 0
    card = Report.load(tmp_path / "card")
    side = model.image_size[0]
    (batch,) = EvaluationSet(tmp_path / "images", image_size=side, batch_size=12).batches()
    kept = [i for i, caption in enumerate(batch["caption"]) if caption]
    captions = [batch["caption"][i] for i in kept]
    cosines = model.code_embedding(model.encode(batch["pixels"]))[kept] @ model.encode_text(captions).T
    own = [captions[j] == captions[i] for i, j in enumerate(cosines.argmax(1))]
    assert card.figures["retrieval"]["image_to_text"] == pytest.approx(sum(own) / 11)
    assert card.protocols["retrieval"].details == {"nearest among": 11}


def test_data_of_another_kind_is_one_line(shards, tmp_path, capsys):
    for name, kind, message in (
        ("video-lavit-motion", "images", "takes motion, and .*images holds images"),
        ("vqgan", "motion", "takes pixels, and .*motion holds motion"),
        ("vqgan", "videos", "takes pictures and was given clips"),
    ):
        folder = tmp_path / name
        build(name).save_pretrained(folder)
        assert evaluate("tokenizer", folder, "--data", shards / kind, "--out", tmp_path / "card") == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and len(error.strip().splitlines()) == 1, error


# -- generators ---------------------------------------------------------------------------------------------------------------


def generator(kind: str, text):
    """A generator of that kind and the tokenizer of its codes."""
    shape = {"vqgan": (3, SIDE, SIDE), "tokenflow": None, "trajectory": (8, 3, SIDE, SIDE)}
    name = {"tokenflow-t2i": "tokenflow", "trajectory-t2v": "trajectory"}.get(kind, "vqgan")
    model = build(name)
    pixels = torch.zeros(1, *(shape[name] or (3, *(model.image_size or (SIDE, SIDE)))))
    layout = model.encode(pixels).layout
    sizes = {"text_vocab": text.vocab_size, "max_text": 16, "dim": 32, "n_layers": 1, "n_heads": 2}
    torch.manual_seed(0)
    if kind == "tokenflow-t2i":
        config = TokenFlowGeneratorConfig(
            layout=layout.to_dict(), codebook_sizes=model.codebook_sizes, hidden=32, code_dim=model.code_dim, **sizes
        )
        made = TokenFlowGenerator(config, text, tokenizer_fingerprint=model.fingerprint)
        made.take_codebook(model.codebook_table())
    else:
        more = {"token-shuffle": {"window": 2, "fusion_blocks": 1}, "arra": {"rep_token": True}}.get(kind, {})
        more = {"ends": True} if kind == "trajectory-t2v" else more
        config = LlamaConfig(layout.to_dict(), model.codebook_sizes, multiple_of=16, **sizes, **more)
        made = LlamaGenerator(config, text=text, tokenizer_fingerprint=model.fingerprint)
    return made.eval(), model


@pytest.mark.parametrize("kind", ["llama", "token-shuffle", "arra", "tokenflow-t2i", "trajectory-t2v"])
def test_every_generator_has_a_card(shards, tmp_path, text, kind):
    made, model = generator(kind, text)
    made.save_pretrained(tmp_path / "model", tokenizer=model)
    data = shards / ("videos" if kind == "trajectory-t2v" else "images")
    assert evaluate("generator", tmp_path / "model", "--data", data, "--out", tmp_path / "card", "--samples", 4) == 0
    card = Report.load(tmp_path / "card")
    assert card.figures.keys() == {"likelihood", "drawn", "speed"}
    uniform = sum(math.log2(k) for k in model.codebook_sizes) / len(model.codebook_sizes)
    assert card.figures["likelihood"]["bits_per_code"] == pytest.approx(uniform, rel=0.25), "nothing is learned yet"
    assert len(card.figures["drawn"]["drawn_entropy"]) == len(card.figures["drawn"]["reference_entropy"])
    if kind == "trajectory-t2v":
        assert card.protocols["likelihood"].details["frames"] == 8 and any(
            "No Frechet distance" in note for note in card.notes
        )
        assert Image.open(tmp_path / "card" / "pictures.png").size[0] == 8 * (SIDE + 2) + 2
        assert (
            main(
                [
                    "evaluate",
                    "generator",
                    str(tmp_path / "model"),
                    "--data",
                    str(shards / "images"),
                    "--out",
                    str(tmp_path / "x"),
                ]
            )
            == 2
        )


def test_the_likelihood_is_that_of_every_code(text):
    made, model = generator("llama", text)
    with torch.no_grad():
        made.output.weight.mul_(20)  # codes differ clearly
    pixels = model.example_pixels(5)
    pixels = torch.nn.functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear")
    captions = ["red heart, 3d style", "cat, 3d style", "blue fish, flat style", "cat, 3d style", "x"]
    pipeline, parts = TextToImagePipeline(made, model), [slice(0, 3), slice(3, 5)]
    sums = [Likelihood(pipeline) for _ in parts]
    for part, likelihood in zip(parts, sums):
        likelihood.update({"pixels": pixels[part], "caption": captions[part]})
    sums[0].merge(sums[1].state())
    ids = model.encode(pixels).ids

    def bits(captions: list[str]) -> float:
        nats = 0.0
        for row, caption in enumerate(captions):
            prompt, mask = made.encode_prompts([caption])
            logits = made(prompt, mask, ids[row : row + 1]).logits[0]
            nats -= float(logits.detach().log_softmax(-1).gather(1, ids[row][:, None]).sum())
        return nats / math.log(2)

    found, expected = sums[0].result(), bits(captions)
    assert found["bits_per_code"] == pytest.approx(expected / ids.numel(), rel=1e-5)
    assert found["bits_of_item"] == pytest.approx(expected / 5, rel=1e-5)
    assert found["caption_gain"] == pytest.approx((bits([""] * 5) - expected) / 5, rel=1e-3)
    assert abs(found["caption_gain"]) > 0.01, "captions tell something"
    made.config = replace(made.config, caption_dropout=0.0)
    always = Likelihood(pipeline)
    always.update({"pixels": pixels, "caption": captions})
    assert always.result() == pytest.approx({k: v for k, v in found.items() if k != "caption_gain"}, rel=1e-5)
    assert "never trained without them" in always.notes()[0]
    pipeline.precision = "int8"
    other = Likelihood(pipeline)
    other.update({"pixels": pixels, "caption": captions})
    assert other.result() == {} and "int8" in other.notes()[0]
