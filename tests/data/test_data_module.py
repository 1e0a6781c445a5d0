"""ShardsDataModule: the checks before training, and Lightning's trainer on top of it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from shard_makers import write_codes, write_images

from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.shards import ShardWriter
from tokgen.errors import ConfigError, DataError


def module(**options) -> ShardsDataModule:
    return ShardsDataModule(**{"batch_size": 4, "image_size": 12, "shuffle_buffer": 8, **options})


def keys(loader) -> list[str]:
    return [key for batch in loader for key in batch["key"]]


def test_importing_the_data_package_stays_light():
    code = "import sys, tokgen.data, tokgen.data.shards; print([m for m in ('torch', 'lightning', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------ pre-flight


def test_missing_shards_are_named_before_reading(images):
    (images / "00001.tar").unlink()
    (images / "00003.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 4 shards .* missing: .*00001\.tar"):
        module(train=str(images)).setup("fit")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such shard folder: .*nowhere"):
        module(train=str(tmp_path / "nowhere")).setup("fit")


def test_changed_sizes_are_said_and_training_goes_on(images, caplog):
    os.truncate(images / "00002.tar", 6000)
    data = module(train=str(images))
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert "1 of 4 shards do not have the size" in caplog.text
    loader = data.train_dataloader()
    assert len(list(loader)) == 12 and loader.stats.missing > 0


def test_kinds_cannot_be_mixed(images, tmp_path):
    write_codes(tmp_path / "codes", [3] * 8)
    with pytest.raises(DataError, match="train holds images and val holds codes"):
        module(train=str(images), val=str(tmp_path / "codes")).setup("fit")
    with pytest.raises(DataError, match="cannot be mixed"):
        module(train=[str(images), str(tmp_path / "codes")]).setup("fit")
    write_codes(tmp_path / "other", [3] * 8, tokenizer="xyz")
    with pytest.raises(DataError, match="different tokenizers"):
        module(train=str(tmp_path / "codes"), val=str(tmp_path / "other")).setup("fit")


def test_batch_larger_than_the_data_is_said(images):
    with pytest.raises(DataError, match="48 samples do not fill one batch of 64; use batch_size 48 or less"):
        module(train=str(images), batch_size=64).setup("fit")


def test_options_that_do_not_fit_are_said(images):
    with pytest.raises(ConfigError, match="image_size"):
        module(train=str(images), image_size=None).setup("fit")
    with pytest.raises(ConfigError, match="resize 'fit'"):
        module(train=str(images), resize="fit").setup("fit")
    with pytest.raises(ConfigError, match="at least one of train, val, test"):
        module()
    with pytest.raises(ConfigError, match="no test split"):
        module(train=str(images)).test_dataloader()
    with pytest.raises(DataError, match=r'resize is "none"'):
        module(train=str(images), resize="none").setup("fit")


def test_enlarging_images_is_said(images, caplog):
    module(train=str(images), image_size=64).setup("fit")
    assert "Images are enlarged" in caplog.text and "20x16" in caplog.text


# -------------------------------------------------------------------------------------------------------------- batches


def test_kind_follows_the_manifest(images, tmp_path):
    write_codes(tmp_path / "codes", [3, 5, 4, 4], codebooks=2)
    data = module(train=str(tmp_path / "codes"))
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert (data.kind, data.meta["tokenizer"]) == ("codes", "abc")
    assert batch["ids"].shape == (4, 5, 2) and batch["mask"].shape == (4, 5)
    data = module(train=str(images), val=str(images))
    data.setup("fit")
    assert data.kind == "images"
    assert next(iter(data.train_dataloader()))["pixels"].shape == (4, 3, 12, 12)
    assert "valid" in next(iter(data.val_dataloader()))
    with ShardWriter(tmp_path / "videos", kind="videos") as writer:
        for i in range(4):
            writer.write(f"v{i}", {"mp4": bytes([i]), "txt": "x"})
    (batch,) = module(train=str(tmp_path / "videos")).train_dataloader()
    assert sorted(batch["video"]) == [bytes([i]) for i in range(4)]


EMBEDDING = {"encoder": "clip", "name": "CLIP", "dim": 3}


def test_embeddings_come_with_their_codes(tmp_path):
    vectors = [np.array([i, -i, 0.5], np.float16) for i in range(8)]
    write_codes(tmp_path / "codes", [3] * 8, embeddings=vectors, embedding=EMBEDDING)
    data = module(train=str(tmp_path / "codes"), val=str(tmp_path / "codes"), num_workers=1)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert (batch["embedding"].dtype, batch["embedding"].shape) == (torch.float32, (4, 3))
            for key, vector in zip(batch["key"], batch["embedding"]):
                assert torch.equal(vector, torch.tensor([float(key[1:]), -float(key[1:]), 0.5]))
    data.teardown()


def test_samples_without_a_good_embedding_are_bad_where_the_manifest_promises_one(tmp_path):
    vectors = [np.zeros(3, np.float16)] * 4 + [None, np.zeros(4), np.array([1, 2, np.nan]), np.array([1, 2, 3])]
    write_codes(tmp_path / "codes", [3] * 8, embeddings=vectors, embedding=EMBEDDING)
    loader = module(train=str(tmp_path / "codes"), max_bad_fraction=0.5).train_dataloader()
    list(loader)
    assert loader.stats.skipped == {"no embedding": 1, "bad embedding": 3}
    write_codes(tmp_path / "plain", [3] * 8)
    assert all("embedding" not in batch for batch in module(train=str(tmp_path / "plain")).train_dataloader())


def test_folders_whose_embeddings_differ_give_none(tmp_path):
    for name, meta in (
        ("a", {"embedding": EMBEDDING}),
        ("b", {"embedding": {**EMBEDDING, "encoder": "dino"}}),
        ("c", {}),
    ):
        vectors = [np.zeros(3, np.float16) if meta else None] * 4
        write_codes(tmp_path / name, [3] * 4, embeddings=vectors, **meta)
    for other in "bc":
        data = module(train=[str(tmp_path / "a"), str(tmp_path / other)])
        assert all("embedding" not in batch for batch in data.train_dataloader()) and "embedding" not in data.meta
    data = module(train=[str(tmp_path / "a"), str(tmp_path / "a")])
    assert all("embedding" in batch for batch in data.train_dataloader()) and data.meta["embedding"] == EMBEDDING


def test_resize_none_keeps_pictures(images):
    data = module(train=str(images), resize="none", image_size=None)
    assert next(iter(data.train_dataloader()))["pixels"].shape == (4, 3, 16, 20)


def test_validation_is_not_augmented(images):
    options = {"random_flip": True, "random_shift": 3, "resize": "random_crop", "caption_variants": 1.0}
    a, b = (list(module(val=str(images), seed=seed, **options).val_dataloader()) for seed in (0, 1))
    assert all(torch.equal(x["pixels"], y["pixels"]) and x["caption"] == y["caption"] for x, y in zip(a, b))
    assert a[0]["caption"][0] == "thing 0, flat style"
    assert set(module(train=str(images), **options).train_dataloader().__iter__().__next__()["caption"][0].split()) & {
        "variant"
    }


def test_captions_may_be_absent_where_the_manifest_says_so(tmp_path):
    with ShardWriter(tmp_path / "s", meta={"captions": False}) as writer:
        from shard_makers import image_bytes

        for i in range(4):
            writer.write(f"{i}", {"png": image_bytes(i)})
    (batch,) = module(train=str(tmp_path / "s")).train_dataloader()
    assert batch["caption"] == [""] * 4


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 2)])
def test_filter_selects_on_metadata_and_sets_the_length(images, world, workers):
    data = module(train=str(images), val=str(images), filter={"group": ["even"]})
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == 6
    assert sorted(keys(loader)) == [f"k{i:03d}" for i in range(0, 48, 2)]
    assert keys(data.val_dataloader()) == [f"k{i:03d}" for i in range(0, 48, 2)]
    several = module(train=str(images), filter={"group": "odd", "i": [1, 2, 3, "5", 7, 9]}, batch_size=5)
    assert sorted(keys(several.train_dataloader())) == ["k001", "k003", "k005", "k007", "k009"]
    with pytest.raises(DataError, match="matches the filter"):
        module(train=str(images), filter={"group": ["neither"]}).setup("fit")


def test_filter_counts_what_a_damaged_shard_lost(images):
    (images / "00001.tar").write_bytes(b"")
    data = module(train=str(images), filter={"group": ["even"]})
    loader = data.train_dataloader()
    list(loader)
    assert loader.stats.missing == 12 and loader.stats.read == 16


# ------------------------------------------------------------------------------------------------------------ Lightning


class Model(L.LightningModule):
    def __init__(self, seen: list):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), seen

    def training_step(self, batch, index):
        self.seen.append((tuple(batch["key"]), int(batch["pixels"].sum())))
        return self.layer(batch["pixels"].float().mean().view(1)).sum()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


class Stop(Callback):
    def __init__(self, at: int):
        self.at = at

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.at:
            raise KeyboardInterrupt


def trainer_for(folder, *callbacks, **options) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder, accelerator="cpu", max_steps=24, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip


@pytest.mark.parametrize("every", [5, 8])  # in the middle of an epoch; 8 batches are one
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_trainer_resumes_on_the_next_batch(tmp_path, workers, every):
    write_images(tmp_path / "s", [20, 12])
    options = {"train": str(tmp_path / "s"), "val": str(tmp_path / "s"), "num_workers": workers, "random_flip": True}
    whole: list = []
    trainer_for(tmp_path, enable_checkpointing=False).fit(Model(whole), module(**options))
    assert len(whole) == 24 and len({batch for batch, _ in whole}) == 24
    cut: list = []
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=every, save_last=True)
    with pytest.raises(BaseException):  # noqa: B017  Lightning turns it into SystemExit or passes it on
        trainer_for(tmp_path, keep, Stop(every + 2)).fit(Model(cut), module(**options))
    rest: list = []
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=every, save_last=True)
    trainer_for(tmp_path, keep).fit(Model(rest), module(**options), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert cut[:every] + rest == whole


def test_limit_train_batches_does_not_repeat_the_same_samples(images):
    seen: list = []
    trainer_for(images, enable_checkpointing=False, limit_train_batches=4).fit(Model(seen), module(train=str(images)))
    assert len(seen) == 24
    epochs = [[key for batch, _ in seen[e * 12 : e * 12 + 12] for key in batch] for e in range(2)]
    assert all(sorted(epoch) == [f"k{i:03d}" for i in range(48)] for epoch in epochs)
