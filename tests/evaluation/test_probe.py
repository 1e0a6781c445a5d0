"""The linear probe: what it finds where the answer is known, and its arithmetic written out."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tokgen.data.shards import ShardWriter
from tokgen.evaluation import probe
from tokgen.evaluation.card import evaluate_tokenizer
from tokgen.evaluation.probe import PENALTIES, accuracy, code_histogram, mean_vectors
from tokgen.evaluation.samples import EvaluationSet
from tokgen.tokenizers.lavit import LAVIT
from tokgen.tokenizers.vqgan import VQGAN
from tokgen.tokens import Sequence, Tokens


def clouds(n: int, d: int, classes: int, apart: float) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(classes, (n,))
    return torch.randn(n, d) + apart * torch.nn.functional.one_hot(labels, d), labels


def test_what_is_there_is_read_and_noise_is_not():
    x, labels = clouds(400, 12, 4, 20)
    assert accuracy(x, labels) == 1.0
    assert accuracy(1e-3 * x + 1e3, labels) > 0.99, "scale and offset are nothing to it"
    assert accuracy(torch.cat([x, torch.ones(400, 3)], 1), labels) == 1.0, "nor are features that never vary"
    assert accuracy(torch.randn(400, 12), labels) == pytest.approx(0.25, abs=0.09)


@pytest.mark.parametrize("width", [7, 90])
def test_the_accuracy_is_that_of_nested_cross_validation_written_out(width):
    x, labels = clouds(103, width, 3, 1.2)
    x = x * torch.logspace(-2, 2, width)
    target = torch.nn.functional.one_hot(labels).double()
    fold = torch.tensor([next(i for i in range(5) if row < (i + 1) * 103 // 5) for row in range(103)])

    def hits(training: torch.Tensor, read: torch.Tensor, penalty: float) -> int:
        mean, std = x[training].double().mean(0), x[training].double().std(0, correction=0)
        z, y = (x.double() - mean) / std, target - target[training].mean(0)
        a = torch.cat([z[training], (penalty * int(training.sum())) ** 0.5 * torch.eye(width).double()])
        b = torch.cat([y[training], torch.zeros(width, 3).double()])
        answer = z[read] @ torch.linalg.lstsq(a, b).solution + target[training].mean(0)
        return int((answer.argmax(1) == labels[read]).sum())

    right = 0
    for i in range(5):
        scores = [
            sum(hits((fold != i) & (fold != j), fold == j, penalty) for j in range(5) if j != i)
            for penalty in PENALTIES
        ]
        best = max(range(len(PENALTIES)), key=lambda k: (scores[k], k))
        right += hits(fold != i, fold == i, PENALTIES[best])
    assert accuracy(x, labels) == right / 103
    assert 0.4 < right / 103 < 0.95


def test_histograms_count_real_codes_and_hash_large_codebooks():
    ids = torch.tensor([[[0, 1], [1, 2], [3, 7]]])
    tokens = Tokens(ids, Sequence(3), (4, 8), torch.tensor([[True, True, False]]))
    expected = torch.zeros(12)
    expected[[0, 1, 4 + 1, 4 + 2]] = 0.5  # a quarter each, and its root
    assert torch.allclose(code_histogram(tokens)[0], expected)
    large = Tokens(torch.randint(1 << 18, (3, 64)), Sequence(64), (1 << 18,))
    found = code_histogram(large)
    assert found.shape == (3, probe.BINS) and torch.allclose(found.square().sum(1), torch.ones(3))
    assert int((found > 0).sum(1).min()) > 50, "few codes fall together"


def test_vectors_are_means_over_real_places():
    vqgan = VQGAN(next(iter(VQGAN.example_configs().values()))).eval()
    tokens = vqgan.encode(vqgan.example_pixels())
    assert torch.allclose(mean_vectors(vqgan, tokens), vqgan.quantizer.lookup(tokens.ids).mean(1))
    lavit = LAVIT(LAVIT.example_configs()["eva"]).eval()
    tokens = lavit.encode(lavit.example_pixels(4))
    assert len(tokens.lengths.unique()) > 1
    found = mean_vectors(lavit, tokens)
    for row, length in enumerate(tokens.lengths.tolist()):
        alone = lavit.quantizer.lookup(tokens.ids[row, :length]).mean(0)
        assert torch.allclose(found[row], alone, atol=1e-6)


def test_a_card_with_a_probe(tmp_path):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "shards") as writer:
        for i in range(60):
            file, light = io.BytesIO(), i % 3 == 0
            Image.fromarray(rng.integers(200 * light, 50 + 200 * light, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
            about = {"caption": "x", "tone": "light" if light else "dark", "number": i, "same": 1}
            writer.write(f"k{i}", {"png": file.getvalue(), "json": json.dumps(about).encode()})
    model = VQGAN(next(iter(VQGAN.example_configs().values())))

    def card(field: str, batch_size: int = 16):
        data = EvaluationSet(tmp_path / "shards", label=field, resize="none", batch_size=batch_size)
        return evaluate_tokenizer(model, data, learnability="none")[0]

    report = card("tone")
    figures = report.figures["probe"]
    assert figures["probe_of_pixels"] >= 0.5 and figures["largest_class"] == pytest.approx(2 / 3)
    assert figures["probe_of_codes"] > 0.9 and figures["probe_of_vectors"] > 0.9, "any tokenizer tells light from dark"
    details = report.protocols["probe"].details
    assert (details["field"], details["classes"]) == ("tone", 2)
    assert card("tone", 7).figures["probe"] == figures, "the order follows from the keys"
    for field, why in (("number", "60 classes among 60 samples"), ("same", "1 classes")):
        other = card(field)
        assert "probe" not in other.figures and any(why in note for note in other.notes)
