"""Features of a frozen encoder, computed once: into shards, and out of them beside the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shard_makers import image_bytes, write_codes, write_images

from tokgen.data.batches import resize_image
from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.decode import decode_features, decode_image
from tokgen.data.shards import Manifest, ShardWriter
from tokgen.data.tar import iter_samples
from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.encoders.eva import EvaConfig, EvaViT
from tokgen.errors import ConfigError, DataError, InputError
from tokgen.precompute import feature_shards

SHAPE = (5, 16)  # of EvaViT below: a class token and 2 x 2 places


def eva(seed: int = 0, scale: float = 1.0) -> EvaViT:
    torch.manual_seed(seed)
    encoder = EvaViT(EvaConfig(12, 6, 16, 2, 24, 2)).eval()
    for p in encoder.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3 * scale)
    return encoder


def make(images, out, encoder=None, **options):
    return feature_shards(encoder or eva(), images, out, **{"size": 12, "batch_size": 4, "progress": False, **options})


def module(train, val=None, **options):
    options = {"batch_size": 4, "image_size": 12, "resize": "squash", **options}
    return ShardsDataModule(train=str(train), val=None if val is None else str(val), **options)


def raw_samples(folder):
    for shard in Manifest.load(folder).shards:
        with open(folder / shard.name, "rb") as file:
            yield from (
                raw
                for _, raw in iter_samples(
                    file, extensions=("png", "txt", "json", "feat.npy"), max_member_bytes=1 << 20
                )
            )


# --------------------------------------------------------------------------------------------------------------- making


def test_shards_hold_their_samples_unchanged_and_the_encoders_features(images, tmp_path):
    encoder = eva()
    report = make(images, tmp_path / "out", encoder, encoder_from="somewhere/eva", max_samples=12)
    assert (report.written, report.kept, report.skipped) == (48, 0, {})
    assert str(report) == "48 samples given features"
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.kind, manifest.samples, len(manifest.shards)) == ("images", 48, 4)
    assert manifest.meta["features"] == {
        "encoder": "somewhere/eva", "name": encoder.name, "fingerprint": encoder.fingerprint, "shape": list(SHAPE),
        "size": 12, "resize": "squash",
    }  # fmt: skip
    for before, after in zip(raw_samples(images), raw_samples(tmp_path / "out"), strict=True):
        features = after.members.pop("feat.npy")
        assert (after.key, after.members) == (before.key, before.members)
        pixels = resize_image(decode_image(before.members["png"]), 12, "squash")
        expected = encoder.features(pixels[None])[0].detach()
        stored = decode_features(features, SHAPE).float()
        torch.testing.assert_close(stored, expected, rtol=2e-3, atol=2e-3)  # half precision


def test_the_meta_of_the_source_stays(tmp_path):
    with ShardWriter(tmp_path / "images", meta={"captions": False, "licence": "CC0"}) as writer:
        writer.write("k", {"png": image_bytes(0)})
    make(tmp_path / "images", tmp_path / "out")
    meta = Manifest.load(tmp_path / "out").meta
    assert meta["captions"] is False and meta["licence"] == "CC0"
    data = module(tmp_path / "out", batch_size=1)
    (batch,) = data.train_dataloader()  # pictures without captions are good
    assert batch["caption"] == [""] and batch["features"].shape == (1, *SHAPE)


def test_an_interrupted_run_goes_on_after_its_last_whole_shard(images, tmp_path, monkeypatch):
    encoder, whole, cut = eva(), tmp_path / "whole", tmp_path / "cut"
    make(images, whole, encoder, max_samples=8)
    features, calls = EvaViT.features, []

    def dies(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 6:  # the first one asks for the shape
            raise KeyboardInterrupt
        return features(self, pixels)

    monkeypatch.setattr(EvaViT, "features", dies)
    with pytest.raises(KeyboardInterrupt):
        make(images, cut, encoder, max_samples=8)
    monkeypatch.setattr(EvaViT, "features", features)
    assert not (cut / "manifest.json").exists()
    report = make(images, cut, encoder, max_samples=8)
    assert (report.kept, report.written) == (16, 32)
    assert Manifest.load(cut) == Manifest.load(whole)
    report = make(images, cut, encoder, max_samples=8)  # complete: nothing to do
    assert (report.kept, report.written) == (48, 0) and Manifest.load(cut) == Manifest.load(whole)


def test_features_of_another_encoder_or_size_are_not_mixed_in(images, tmp_path):
    make(images, tmp_path / "out")
    before = Manifest.load(tmp_path / "out")
    with pytest.raises(DataError, match="their fingerprint differs"):
        make(images, tmp_path / "out", eva(seed=1))
    with pytest.raises(DataError, match=r"size 10, resize crop.*their size differs"):
        make(images, tmp_path / "out", size=10, resize="crop")
    assert Manifest.load(tmp_path / "out") == before
    make(images, tmp_path / "out", encoder_from="the same, moved")
    assert Manifest.load(tmp_path / "out") == before


def test_what_float16_cannot_hold_is_said(images, tmp_path):
    with pytest.raises(DataError, match="float16 cannot hold"):
        make(images, tmp_path / "large", eva(scale=300))
    broken = eva()
    broken.positions.data[0, 1, 3] = float("nan")
    with pytest.raises(DataError, match="features that are not finite"):
        make(images, tmp_path / "nan", broken)
    assert not (tmp_path / "large" / "manifest.json").exists() and not (tmp_path / "nan" / "manifest.json").exists()


def test_pictures_without_a_size_must_be_squares_of_one(images, tmp_path):
    with pytest.raises(DataError, match=r"\(16, 20\).*give size="):
        make(images, tmp_path / "out", size=None)
    with ShardWriter(tmp_path / "squares") as writer:
        for i in range(4):
            writer.write(f"k{i}", {"png": image_bytes(i, (12, 12)), "txt": "noise"})
    make(tmp_path / "squares", tmp_path / "plain", size=None)
    assert Manifest.load(tmp_path / "plain").meta["features"]["size"] == 12
    for resize in ("crop", "squash", "none"):  # all leave a square of that size as it is
        (batch,) = module(tmp_path / "plain", resize=resize).train_dataloader()
        assert batch["features"].shape == (4, *SHAPE)


def test_what_has_no_features_is_said(images, tmp_path):
    write_codes(tmp_path / "codes", [3, 3])
    with pytest.raises(DataError, match="holds codes; precomputing features needs image shards"):
        make(tmp_path / "codes", tmp_path / "out")

    class Blind(ContrastiveEncoder):
        def features(self, pixels):
            return super(ContrastiveEncoder, self).features(pixels)

    with pytest.raises(InputError, match="gives no features of places"):
        make(images, tmp_path / "out", Blind(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 6, 8, 4)))


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_the_features_of_their_pixels(images, tmp_path, workers):
    encoder = eva()
    make(images, tmp_path / "out", encoder)
    data = module(tmp_path / "out", tmp_path / "out", num_workers=workers)
    data.setup("fit")
    assert data.meta["features"]["fingerprint"] == encoder.fingerprint
    for loader in (data.train_dataloader(), data.val_dataloader()):
        count = 0
        for batch in loader:
            assert (batch["features"].dtype, batch["features"].shape) == (torch.float16, (4, *SHAPE))
            expected = encoder.features(batch["pixels"])
            assert expected.std(0).mean() > 0.05
            torch.testing.assert_close(batch["features"].float(), expected, rtol=2e-3, atol=2e-3)
            count += len(batch["key"])
        assert count == 48
    data.teardown()


def test_features_are_read_only_where_they_belong_to_the_pixels(images, tmp_path, caplog):
    make(images, tmp_path / "out")
    for options, reason in (
        ({"random_flip": True}, "random_flip changes it"),
        ({"random_shift": 1}, "random_shift changes it"),
        ({"resize": "random_crop"}, "resize=random_crop changes it"),
        ({"image_size": 10}, "made for image_size 12 and resize 'squash', and the data module has 10 and 'squash'"),
        ({"resize": "crop"}, "the data module has 12 and 'crop'"),
    ):
        caplog.clear()
        data = module(tmp_path / "out", tmp_path / "out", **options)
        data.setup("fit")
        assert "features" not in data.meta
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert "features" not in next(iter(loader))
        assert caplog.text.count("features are not read") == 1 and reason in caplog.text
        with pytest.raises(ConfigError, match="features is true, but") as error:
            module(tmp_path / "out", features=True, **options).setup("fit")
        assert reason in str(error.value) and "\n" not in str(error.value)
    caplog.clear()
    data = module(tmp_path / "out", features=False)
    assert "features" not in next(iter(data.train_dataloader())) and "features" not in data.meta
    data = module(images)
    assert "features" not in next(iter(data.train_dataloader())) and "not read" not in caplog.text


def test_all_folders_hold_features_of_one_encoder_or_none_are_read(images, tmp_path, caplog):
    make(images, tmp_path / "one")
    more = write_images(tmp_path / "more", [8], start=100)
    make(more, tmp_path / "same")
    make(more, tmp_path / "other", eva(seed=1))
    data = ShardsDataModule([str(tmp_path / "one"), str(tmp_path / "same")], batch_size=56, image_size=12, resize="squash", features=True)  # fmt: skip
    assert next(iter(data.train_dataloader()))["features"].shape == (56, *SHAPE)
    for train, val in (("one", "other"), ("one", images), (images, "one")):
        caplog.clear()
        train, val = tmp_path / train, tmp_path / val
        data = module(train, val)
        data.setup("fit")
        assert "features" not in data.meta and "features are not read" in caplog.text
        assert "features" not in next(iter(data.train_dataloader()))
        assert "features" not in next(iter(data.val_dataloader()))
        with pytest.raises(ConfigError, match="features is true"):
            module(train, val, features=True).setup("fit")
    both = [str(tmp_path / "one"), str(tmp_path / "other")]
    with pytest.raises(ConfigError, match="train does not hold features of one encoder in all its folders"):
        ShardsDataModule(both, batch_size=4, image_size=12, resize="squash", features=True).setup("fit")
    late = ShardsDataModule(str(tmp_path / "one"), test=str(images), batch_size=4, image_size=12, resize="squash")
    late.setup("fit")
    assert "features" not in next(iter(late.test_dataloader()))  # opened later, and never mixed up
    assert "features" in next(iter(late.train_dataloader()))


def test_a_bad_feature_file_makes_its_sample_bad(tmp_path):
    good = np.ones(SHAPE, np.float16)
    nan = good.copy()
    nan[0, 0] = np.nan
    files = [good, good[:4], good.astype(np.float32), nan, b"\x93NUMPY", None, *[good] * 9]
    meta = {"features": {"name": "x", "fingerprint": "f", "shape": SHAPE, "size": 12, "resize": "squash"}}
    with ShardWriter(tmp_path / "out", meta=meta) as writer:
        for i, value in enumerate(files):
            feature = {} if value is None else {"feat.npy": value}
            writer.write(f"k{i}", {"png": image_bytes(i), "txt": "x", **feature})
    data = module(tmp_path / "out", batch_size=15, max_bad_fraction=1.0)
    loader = data.train_dataloader()
    (batch,) = loader
    assert set(batch["key"]) == {"k0", *(f"k{i}" for i in range(6, 15))}  # some stand in for the bad ones
    assert loader.stats.skipped == {"bad features": 3, "bad array": 1, "no features": 1}
