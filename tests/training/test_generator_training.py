"""Training a generator on code shards: facts from the shards, the text vocabulary, metrics, export, resume."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from tokgen.errors import ConfigError, TokenizerMismatch
from tokgen.generators.llama import LlamaGenerator
from tokgen.training.callbacks import SampleGrid
from tokgen.training.captions import Text, training_captions
from tokgen.training.checkpoint import Checkpoint
from tokgen.training.ema import EMA


def test_it_learns_and_publishes(tmp_path, code_shards):
    record, ema = tiny.Record(), EMA(0.8)
    module = tiny.generator(z_loss=1e-4, text_loss=0.1, label_smoothing=0.05, config={"window": 2})
    data = tiny.shards(code_shards, batch_size=8)
    trainer = tiny.trainer(tmp_path, record, ema, Checkpoint(), max_steps=30, val_check_interval=15)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == module.step == ema.updates == 30
    loss = record.column("val/loss")
    assert len(loss) == 2 and loss[1] < loss[0] < math.log(tiny.CODES) + 0.1
    assert record.column("val/bits_per_code")[-1] == pytest.approx(loss[-1] / math.log(2))
    assert {"train/ce", "train/z_loss", "train/text", "train/accuracy", "train/tokens_per_second"} <= {
        k for row in record.rows for k in row
    }
    published = LlamaGenerator.from_pretrained(tmp_path / "generator")
    assert (published.layout, published.codebook_sizes) == (tiny.LAYOUT, (tiny.CODES,))
    assert published.tokenizer_fingerprint == "f" * 16
    for name, value in published.state_dict().items():
        own = ema.average.get(f"generator.{name}", module.generator.state_dict()[name])
        assert torch.equal(value, own), name
    assert published.generate(["count from 1"], generator=0).ids.shape == (1, 16)


def test_the_vocabulary_is_learned_from_all_captions_the_same_each_time(tmp_path, code_shards):
    texts = []
    for _ in range(2):
        module, data = tiny.generator(), tiny.shards(code_shards)
        tiny.trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
        texts.append(module.generator.text.tokenizer.to_str())
        captions = list(training_captions(data, 10**6))
    assert texts[0] == texts[1]
    assert len(captions) == 96 and {"number 47", "count from 3"} <= set(captions)
    assert len(list(training_captions(data, 5))) == 5


def test_resume_keeps_the_vocabulary_of_the_checkpoint(tmp_path, code_shards):
    module = tiny.generator()
    tiny.trainer(tmp_path, Checkpoint(), max_steps=1).fit(module, datamodule=tiny.shards(code_shards))
    other = tmp_path / "codes"
    tiny.write_codes(other / "train", 12, 5)
    tiny.write_codes(other / "val", 4, 6)
    again = tiny.generator()
    tiny.trainer(tmp_path / "b", max_steps=2).fit(
        again, datamodule=tiny.shards(other), ckpt_path=tmp_path / "checkpoints" / "last.ckpt"
    )
    assert again.step == 2
    assert again.generator.text.tokenizer.to_str() == module.generator.text.tokenizer.to_str()


def test_codes_of_another_tokenizer_are_refused(tmp_path, code_shards, image_shards):
    module = tiny.generator()
    tiny.trainer(tmp_path, Checkpoint(), max_steps=1).fit(module, datamodule=tiny.shards(code_shards))
    other = tmp_path / "codes"
    tiny.write_codes(other / "train", 12, 5, fingerprint="0" * 16)
    with pytest.raises(TokenizerMismatch, match="0000"):
        tiny.trainer(tmp_path, max_steps=2).fit(
            tiny.generator(),
            datamodule=tiny.ShardsDataModule(train=str(other / "train"), batch_size=4),
            ckpt_path=tmp_path / "checkpoints" / "last.ckpt",
        )
    tiny.tokenizer().save_pretrained(tmp_path / "visual")
    with pytest.raises(TokenizerMismatch, match="ffff"):
        tiny.trainer(tmp_path, max_steps=1).fit(
            tiny.generator(visual_tokenizer=str(tmp_path / "visual")), datamodule=tiny.shards(code_shards)
        )
    with pytest.raises(ConfigError, match="tokgen tokenize"):
        tiny.trainer(tmp_path, max_steps=1).fit(tiny.generator(), datamodule=tiny.shards(image_shards))


def test_samples_are_drawn_and_the_tokenizer_goes_along(tmp_path):
    visual = tiny.tokenizer()
    visual.eval().save_pretrained(tmp_path / "visual")
    shards = tmp_path / "codes"
    for split in ("train", "val"):
        tiny.write_codes(shards / split, 12, 0, fingerprint=visual.fingerprint)
    module = tiny.generator(visual_tokenizer=str(tmp_path / "visual"), generation={"temperature": 0.7})
    grid = SampleGrid(prompts=["count from 1", "count from 2"], columns=2)
    trainer = tiny.trainer(tmp_path, EMA(0.9), grid, Checkpoint(), max_steps=2, val_check_interval=2)
    trainer.fit(module, datamodule=tiny.shards(shards))
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["samples-0000002.png"]
    published = LlamaGenerator.from_pretrained(tmp_path / "generator")
    published.check_tokenizer(tiny.VQGAN.from_pretrained(tmp_path / "generator" / "tokenizer"))
    assert (published.visual_tokenizer, published.generation) == ("tokenizer", {"temperature": 0.7})


def test_validation_is_the_mean_over_codes_and_leaves_repeats_out(tmp_path, code_shards):
    module = tiny.generator()
    data = tiny.shards(code_shards, batch_size=4)  # 10 items: 4 + 4 + 2
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data)
    batches = list(data.val_dataloader())
    assert [len(b["ids"]) for b in batches] == [4, 4, 2]
    batches[1]["valid"][:2] = False
    trainer.validate(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    whole = {
        "ids": torch.cat([b["ids"][b["valid"]] for b in batches]),
        "mask": torch.cat([b["mask"][b["valid"]] for b in batches]),
        "caption": [c for b in batches for c, v in zip(b["caption"], b["valid"]) if v],
    }
    module.eval()
    with torch.no_grad():
        expected = module.generator.loss(whole)
    assert len(whole["ids"]) == 8
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(expected.losses["ce"]), rel=1e-5)
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(float(expected.stats["accuracy"]))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"config": {"widht": 3}}, "widht"),
        ({"config": {"codebook_sizes": [4]}}, "come"),
        ({"generator": "gpt"}, "gpt"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"accumulate": 0}, "accumulate"),
    ],
)
def test_wrong_settings_are_named_before_any_data_is_read(settings, match):
    with pytest.raises(ConfigError, match=match):
        tiny.generator(**settings)


def test_start_from_a_published_generator(tmp_path, code_shards):
    first = tiny.generator(text=Text(vocab_size=280))
    tiny.trainer(tmp_path, Checkpoint(), max_steps=2).fit(first, datamodule=tiny.shards(code_shards))
    second = tiny.generator(init_from=str(tmp_path / "generator"), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    tiny.trainer(tmp_path / "b", max_steps=1).fit(second, datamodule=tiny.shards(code_shards))
    for name, value in first.generator.state_dict().items():
        assert torch.equal(value, second.generator.state_dict()[name])
    assert second.generator.training and second.generator.text.vocab_size == first.generator.text.vocab_size
