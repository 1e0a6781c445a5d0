"""The contrastive module: it learns, it resumes exactly, and what it publishes loads."""

from __future__ import annotations

import pytest
import tiny
import torch

from tokgen.encoders.base import load_encoder
from tokgen.errors import ConfigError
from tokgen.training.base import Schedule
from tokgen.training.captions import Text
from tokgen.training.checkpoint import Checkpoint
from tokgen.training.contrastive import ContrastiveModule

SIZES = {
    "image_size": 16, "patch": 4, "dim": 32, "n_heads": 2, "hidden": 32, "image_layers": 1, "text_layers": 1, "embed_dim": 16, "max_text": 24,
}  # fmt: skip


def module(seed: int = 0, **settings) -> ContrastiveModule:
    torch.manual_seed(seed)
    settings.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=5e-3, fused=True))
    schedule = Schedule(100, kind="constant")
    return ContrastiveModule(config=SIZES, text=Text(vocab_size=300), schedule=schedule, **settings)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    tiny.write_images(folder / "train", 28, 0)
    tiny.write_images(folder / "val", 9, 0)  # the first nine of them
    return folder


def data(images, **options):
    return tiny.ShardsDataModule(
        train=str(images / "train"), val=str(images / "val"), batch_size=7, image_size=16, **options
    )


def test_it_learns_which_caption_belongs_to_which_picture(images, tmp_path):
    record, contrastive = tiny.Record(), module(noise=0.05)
    tiny.trainer(tmp_path, record, max_steps=240, val_check_interval=240).fit(contrastive, datamodule=data(images))
    loss = record.column("train/loss")
    assert sum(loss[-5:]) < 0.4 * sum(loss[:5])
    assert record.column("val/image_to_text")[-1] > 0.6  # of nine captions, two of which come twice
    contrastive.export(tmp_path / "encoder", write=True)
    again = load_encoder(tmp_path / "encoder")
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.embed(pixels), contrastive.encoder.eval().embed(pixels))
    assert (
        again.text.encode(["square 3"], 8)[0].tolist() == contrastive.encoder.text.encode(["square 3"], 8)[0].tolist()
    )


def test_resume_is_bitwise(images, tmp_path):
    whole, first, rest = (tiny.Record() for _ in range(3))
    options = {"random_shift": 1, "caption_word_dropout": 0.2}
    tiny.trainer(tmp_path / "a", whole, max_steps=9).fit(module(), datamodule=data(images, **options))
    tiny.trainer(tmp_path / "b", first, Checkpoint(), max_steps=5).fit(module(), datamodule=data(images, **options))
    last = tmp_path / "b/checkpoints/last.ckpt"
    tiny.trainer(tmp_path / "b", rest, Checkpoint(), max_steps=9).fit(module(1), datamodule=data(images, **options), ckpt_path=last)  # fmt: skip
    assert first.column("train/loss") + rest.column("train/loss") == whole.column("train/loss")


def test_code_shards_and_a_set_vocabulary_are_refused(tmp_path):
    tiny.write_codes(tmp_path / "train", 12, 0)
    tiny.write_codes(tmp_path / "val", 4, 0)
    with pytest.raises(ConfigError, match="was given codes"):
        tiny.trainer(tmp_path, max_steps=1).fit(module(), datamodule=tiny.shards(tmp_path))
    with pytest.raises(ConfigError, match=r"config\.text_vocab"):
        ContrastiveModule(config={"text_vocab": 3})
