"""Measuring that is broken off and taken up again, in one process; with lost ranks see tests/faults/test_lost_evaluate.py."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tokgen.data.shards import ShardWriter
from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.evaluation.card import evaluate_generator, evaluate_tokenizer
from tokgen.evaluation.extractors import EncoderExtractor
from tokgen.evaluation.progress import clear
from tokgen.evaluation.samples import EvaluationSet
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.tokenizers.vqgan import VQGAN


class Lost(Exception):
    pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("progress") / "shards"
    rng = np.random.default_rng(0)
    with ShardWriter(folder, max_samples=9) as writer:
        for i in range(23):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
            writer.write(
                f"k{i:02d}", {"png": file.getvalue(), "txt": "red heart, 3d style", "cls": str(i % 2).encode()}
            )
    return folder


def tokenizer(seed: int = 0) -> VQGAN:
    torch.manual_seed(seed)
    return VQGAN(next(iter(VQGAN.example_configs().values()))).eval()


def encoder(text=None) -> ContrastiveEncoder:
    torch.manual_seed(1)
    vocabulary = 16 if text is None else text.vocab_size
    return ContrastiveEncoder(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 6, vocabulary, 16), text).eval()


def card(shards, partial=None, seed: int = 0, stop: int | None = None, **options):
    """The report, and the keys that were encoded for it; `stop` loses the process at that batch."""
    model, seen = tokenizer(seed), []
    data = EvaluationSet(shards, label="cls", resize="none", batch_size=3, **options)
    inner = data.batches

    def batches(numbers=None):
        for turn, batch in enumerate(inner(numbers)):
            if turn == stop:
                raise Lost
            seen.extend(batch["key"])
            yield batch

    data.batches = batches
    arguments = {"extractor": EncoderExtractor(encoder()), "learnability": "none", "partial": partial, "save_every": 0}
    return evaluate_tokenizer(model, data, **arguments), seen


def alike(found, expected):
    for group, figures in expected.figures.items():
        if group == "speed":
            assert found.figures[group].keys() == figures.keys()
            continue
        assert found.protocols[group] == expected.protocols[group]
        assert found.figures[group].keys() == figures.keys()
        for name, value in figures.items():
            assert found.figures[group][name] == pytest.approx(value, rel=1e-9), name


def test_only_what_is_not_covered_is_measured_and_the_report_is_the_same(shards, tmp_path):
    (whole, picture), _ = card(shards)
    for stop in (3, 2):  # lost twice
        with pytest.raises(Lost):
            card(shards, tmp_path, stop=stop)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    (report, again), seen = card(shards, tmp_path)
    assert seen == [f"k{i:02d}" for i in range(15, 23)], "five of the eight batches were there"
    alike(report, whole)
    assert torch.equal(again, picture), "the pictures are those of the first batches, whoever measured them"
    (repeated, _), seen = card(shards, tmp_path)
    assert seen == [], "a run that is lost after measuring, as while learning the codes, measures nothing twice"
    alike(repeated, whole)
    clear(tmp_path)
    assert not tmp_path.exists()


def test_files_of_another_model_or_protocol_or_damaged_ones_are_not_taken_up(shards, tmp_path, caplog):
    with pytest.raises(Lost):
        card(shards, tmp_path, stop=3)
    (file,) = tmp_path.glob("*.safetensors")
    for options, what in (({"seed": 1}, "model"), ({"samples": 22}, "data")):
        folder = tmp_path / what
        folder.mkdir()
        (folder / file.name).write_bytes(file.read_bytes())
        _, seen = card(shards, folder, **options)
        assert len(seen) == options.get("samples", 23)
        assert f"it is of another {what}" in caplog.text
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "half.safetensors").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (folder / "twice.safetensors").write_bytes(file.read_bytes())
    (folder / "once.safetensors").write_bytes(file.read_bytes())
    (report, _), seen = card(shards, folder)
    assert len(seen) == 14 and report.protocols["pixels"].samples == 23
    assert "half.safetensors cannot be read" in caplog.text and "another file has measured too" in caplog.text


def test_drawing_goes_on_too(shards, tmp_path, text):
    model = tokenizer()
    layout = model.encode(torch.zeros(1, 3, 16, 16)).layout
    sizes = {"text_vocab": text.vocab_size, "max_text": 16, "dim": 16, "n_layers": 1, "n_heads": 2}
    generator = LlamaGenerator(LlamaConfig(layout.to_dict(), model.codebook_sizes, **sizes), text=text)
    drawn = []

    class Pipeline(TextToImagePipeline):
        def __call__(self, prompt, **arguments):
            if len(drawn) == stop:
                raise Lost
            drawn.append(len(prompt))
            return super().__call__(prompt, **arguments)

    def measure(partial=None):
        data = EvaluationSet(shards, image_size=16, batch_size=8)
        return evaluate_generator(
            Pipeline(generator, model), data, extractor=EncoderExtractor(encoder()), text_encoder=encoder(text),
            partial=partial, save_every=0,
        )  # fmt: skip

    stop = None
    whole, picture = measure()
    drawn, stop = [], 2
    with pytest.raises(Lost):
        measure(tmp_path)
    drawn, stop = [], None
    report, again = measure(tmp_path)
    assert drawn == [7]
    alike(report, whole)
    assert torch.equal(again, picture) and report.captions == whole.captions
