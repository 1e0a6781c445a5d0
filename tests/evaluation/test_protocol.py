"""Protocols, the samples that they speak of, and the networks that they name."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json

import pytest
import torch
from PIL import Image

from tokgen.data.shards import ShardWriter
from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.errors import CheckpointError, ConfigError, DataError
from tokgen.evaluation import extractors
from tokgen.evaluation.extractors import InceptionExtractor, load_extractor
from tokgen.evaluation.protocol import Protocol, reference_hash
from tokgen.evaluation.samples import EvaluationSet


def protocol(**changed) -> Protocol:
    made = Protocol("pixels", 1, "abc", 10, "every one of 10", "8 x 8", "crop", details={"budget": "short"})
    return dataclasses.replace(made, **changed)


def shards(folder, count: int, level: int = 0, max_samples: int = 10_000) -> str:
    with ShardWriter(folder, max_samples=max_samples) as writer:
        for i in range(count):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (level + i, 0, 0)).save(file, "PNG")
            writer.write(f"k{i:03d}", {"png": file.getvalue(), "txt": f"red {i}"})
    return str(folder)


def test_the_hash_sees_every_field_and_files_keep_it():
    first = protocol()
    assert Protocol.from_dict(first.to_dict()) == first
    changes = {f.name: "other" for f in dataclasses.fields(Protocol)} | {
        "version": 2,
        "samples": 11,
        "details": {"budget": "x"},
    }
    for name, value in changes.items():
        other = protocol(**{name: value})
        assert other.hash != first.hash, name
        (differing,) = first.differences(other)
        assert differing.startswith(name)
    assert first.differences(protocol()) == {}
    assert first.differences(protocol(details={"budget": "long"})) == {"details.budget": ("short", "long")}


def test_a_protocol_that_was_changed_by_hand_is_refused():
    with pytest.raises(DataError, match="changed by hand"):
        Protocol.from_dict({**protocol().to_dict(), "samples": 50_000}, "report.json")
    with pytest.raises(DataError, match=r"report\.json is not a protocol"):
        Protocol.from_dict({"name": "pixels"}, "report.json")


def test_the_reference_is_that_of_the_pictures(tmp_path):
    a, b, c = shards(tmp_path / "a", 4), shards(tmp_path / "b", 4), shards(tmp_path / "c", 4, level=1)
    assert reference_hash(a) == reference_hash(b) != reference_hash(c)


def test_samples_are_evenly_spaced_over_all_shards(tmp_path):
    folder = shards(tmp_path / "a", 10, max_samples=3)
    data = EvaluationSet(folder, 4, batch_size=3, resize="none")
    keys = [key for batch in data.batches() for key in batch["key"]]
    assert sorted(keys) == ["k000", "k002", "k005", "k007"] and data.selection == "evenly spaced among 10"
    assert data.protocol("pixels", 1, 4, "8 x 8").filter == "none"
    assert (
        len([k for batch in EvaluationSet(folder, batch_size=4, resize="none").batches() for k in batch["key"]]) == 10
    )
    with pytest.raises(DataError, match=r"11 samples were asked for, and .* holds 10"):
        EvaluationSet(folder, 11, resize="none")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_the_same_samples_whoever_reads_it(tmp_path, workers):
    data = EvaluationSet(
        shards(tmp_path / "a", 23, max_samples=5), 20, batch_size=3, resize="none", num_workers=workers
    )
    assert data.count == 7
    expected = {n: [f"k{i * 23 // 20:03d}" for i in range(3 * n, min(3 * n + 3, 20))] for n in range(7)}
    for numbers in ([0, 2, 3, 6], [1, 4, 5]) if workers else (range(7), [0, 2, 3, 6], [5], [6]):
        assert {batch["number"]: batch["key"] for batch in data.batches(numbers)} == {n: expected[n] for n in numbers}


def test_a_label_is_a_field_of_the_json(tmp_path):
    with ShardWriter(tmp_path / "a") as writer:
        for i in range(3):
            file = io.BytesIO()
            Image.new("RGB", (8, 8)).save(file, "PNG")
            about = {"caption": "x", "group": f"g{i % 2}", "number": i, "tags": ["a"]}
            writer.write(
                f"k{i}", {"png": file.getvalue(), "json": json.dumps(about).encode(), "cls": str(7 + i).encode()}
            )
    found = {}
    for name in ("group", "number", "cls"):
        (batch,) = EvaluationSet(tmp_path / "a", label=name, resize="none").batches()
        found[name] = batch["label"]
    assert found == {"group": ["g0", "g1", "g0"], "number": ["0", "1", "2"], "cls": ["7", "8", "9"]}
    for name in ("kind", "tags"):
        with pytest.raises(DataError, match=f"no field '{name}' .* are caption, cls, group, number$"):
            EvaluationSet(tmp_path / "a", label=name, resize="none")


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file with random weights of the FID's network."""
    their = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(their.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        blank = io.BytesIO()
        torch.save({}, blank)
        blank.seek(0)
        torch.save(their.FeatureExtractorInceptionV3("x", ["2048"], blank).state_dict(), file)
    return file


def test_only_the_known_weights_make_an_fid(inception, monkeypatch):
    extractor = load_extractor(f"inception:{inception}")
    assert not extractor.standard and "other weights" in extractor.name
    digest = hashlib.sha256(inception.read_bytes()).hexdigest()
    assert extractor.weights == digest[:16]
    monkeypatch.setattr(extractors, "STANDARD", digest)
    assert InceptionExtractor(inception).standard


def test_inception_features_are_torch_fidelitys(inception):
    their = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    pixels = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    found = InceptionExtractor(inception)(pixels)
    reference = their.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], inception)
    pool, logits = reference(pixels)
    assert torch.equal(found["pool"], pool) and torch.equal(found["logits"], logits)
    seen = []
    reference.Mixed_6d.branch1x1.conv.register_forward_hook(lambda m, i, o: seen.append(o))
    reference(pixels)
    assert found["spatial"].shape == (2, 7 * 17 * 17)
    assert torch.equal(found["spatial"], seen[0][:, :7].reshape(2, -1))


def test_weights_are_read_without_unpickling_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    pytest.importorskip("torch_fidelity")
    torch.save({"x": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_extractor(f"inception:{tmp_path / 'weights.pth'}")
    assert not (tmp_path / "ran").exists()
    torch.save({"x": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        load_extractor(f"inception:{tmp_path / 'weights.pth'}")


def test_extractors_are_told_apart_by_their_weights(tmp_path, monkeypatch):
    config = ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 6, 8, 4)
    ContrastiveEncoder(config).save_pretrained(tmp_path / "a")
    ContrastiveEncoder(config).save_pretrained(tmp_path / "b")
    a, b = load_extractor(str(tmp_path / "a")), load_extractor(str(tmp_path / "b"))
    assert a.weights != b.weights and a.weights == load_extractor(str(tmp_path / "a")).weights
    assert a(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))["pool"].shape == (2, 6)
    assert load_extractor("none") is None
    with pytest.raises(ConfigError, match="lacks the path"):
        load_extractor("inception:")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("TOKGEN_MOBILENET", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="no Inception weights at"):
        load_extractor("inception")
    assert load_extractor("auto") is None
