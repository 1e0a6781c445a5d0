"""Generators by class and by text features learn; starts from a language model, and from a smaller grid or window."""

from __future__ import annotations

import io

import lightning as L
import numpy as np
import pytest
import tiny
import torch

from tokgen.errors import ConfigError
from tokgen.generators.conditions import ClassNames
from tokgen.generators.llama import LlamaGenerator
from tokgen.tokens import Grid
from tokgen.training.captions import Text
from tokgen.training.checkpoint import Checkpoint

PUBLISHED = {"rope": "2d", "rope_prefix": "zero", "zero_head": True, "dim": 48, "n_heads": 3}  # LlamaGen's form


def fit(module, run, shards, steps: int, *callbacks: L.Callback) -> list[float]:
    """Train; the cross-entropy of each step."""
    record = tiny.Record()
    data = tiny.shards(shards, batch_size=8)
    tiny.trainer(run, record, Checkpoint(), *callbacks, max_steps=steps).fit(module, datamodule=data)
    return record.column("train/ce")


def test_a_class_conditional_generator_learns_and_draws_by_name(tmp_path, code_shards):
    module = tiny.generator(config={**PUBLISHED, "condition": "class", "caption_dropout": 0.1})
    loss = fit(module, tmp_path, code_shards, 60)
    assert loss[0] == pytest.approx(np.log(tiny.CODES), abs=1e-3)  # the head starts at zero
    assert np.mean(loss[-5:]) < 0.5 * loss[0]
    published = LlamaGenerator.from_pretrained(tmp_path / "generator")
    names = [f"count from {i}" for i in range(4)]
    assert isinstance(published.text, ClassNames) and published.text.names == names
    assert published.config.num_classes == 4
    by_name, by_number = (published.generate(p, temperature=0).ids for p in (names, [0, 1, 2, 3]))
    assert torch.equal(by_name, by_number) and by_name.shape == (4, 16)


def test_classes_that_are_numbers_keep_their_order(tmp_path):
    ids = io.BytesIO()
    np.save(ids, np.zeros(16, np.int64))
    meta = {"tokenizer": "", "layout": tiny.LAYOUT.to_dict(), "codebook_sizes": [tiny.CODES]}
    for split in ("train", "val"):
        with tiny.ShardWriter(tmp_path / "codes" / split, kind="codes", meta=meta) as writer:
            for name in ("0", "1", "10", "2"):
                writer.write(name, {"npy": ids.getvalue(), "txt": name})
    module = tiny.generator(config={"condition": "class"})
    tiny.trainer(tmp_path, max_steps=1).fit(module, datamodule=tiny.shards(tmp_path / "codes", batch_size=2))
    assert module.generator.text.names == ["0", "1", "2", "10"]


def test_a_feature_conditional_generator_learns_what_its_encoder_says(tmp_path, code_shards, t5_folder):
    config = {**PUBLISHED, "condition": "features", "max_text": 6, "caption_dropout": 0.1}
    module = tiny.generator(config=config, text=Text(path=str(t5_folder)))
    loss = fit(module, tmp_path, code_shards, 60)
    assert np.mean(loss[-5:]) < 0.5 * loss[0]
    published = LlamaGenerator.from_pretrained(tmp_path / "generator")
    assert published.config.feature_dim == 16
    assert torch.equal(published.condition.unconditional, module.generator.condition.unconditional)
    own = published.generate(["count from 3"], temperature=0).ids
    assert torch.equal(own, module.generator.eval().generate(["count from 3"], temperature=0).ids)
    with pytest.raises(ConfigError, match=r"text\.path"):
        fit(tiny.generator(config=config), tmp_path / "b", code_shards, 1)


# -- from a language model ----------------------------------------------------------------------------------------------


@pytest.fixture
def language_model(tmp_path):
    """A random LlamaForCausalLM with a tokenizer, as transformers saves them."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path / "lm"
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(["count from"], trainers.BpeTrainer(special_tokens=["<s>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def start(language_model, **settings):
    """Without the sizes that `tiny.generator` sets."""
    from tokgen.training.generator import GeneratorModule

    settings.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True))
    settings.setdefault("schedule", tiny.Schedule(100, kind="constant"))
    return GeneratorModule(init_from_lm=str(language_model), **settings)


def test_a_language_model_learns_to_draw(tmp_path, code_shards, language_model):
    from transformers import AutoTokenizer, LlamaForCausalLM

    module = start(language_model, config={"max_text": 12, "caption_dropout": 0.0}, text_loss=0.1)
    untouched = start(language_model, config={"max_text": 12}, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    loss = fit(module, tmp_path / "a", code_shards, 40)
    assert np.mean(loss[-5:]) < 0.7 * loss[0]
    published = LlamaGenerator.from_pretrained(tmp_path / "a/generator")
    assert (published.config.text_vocab, published.config.n_kv_heads, published.config.hidden) == (320, 2, 48)

    fit(untouched, tmp_path / "b", code_shards, 1)
    generator = untouched.generator.eval()
    ids, mask = generator.encode_prompts(["count from 3"])
    words = AutoTokenizer.from_pretrained(language_model)
    assert ids[0].tolist() == [words.bos_token_id, *words("count from 3", add_special_tokens=False).input_ids]
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(language_model)(ids).logits
        ours = generator(ids, mask, torch.zeros(1, 16, dtype=torch.int64), text_loss=1.0).text_logits
    assert (ours - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"config": {"dim": 64}}, "config.dim=64 but .* has 32; leave it out"),
        ({"config": {"rope": "2d"}}, "config.rope='2d' but .* has '1d'"),
        ({"config": {"condition": "class"}}, "config.condition='class'"),
        ({"init_from": "elsewhere"}, "leave out init_from"),
        ({"text": Text(path="elsewhere")}, "leave out text.path"),
    ],
)
def test_what_the_language_model_decides_cannot_be_set(language_model, settings, named):
    with pytest.raises(ConfigError, match=named):
        start(language_model, **settings)


# -- Token-Shuffle's stages ---------------------------------------------------------------------------------------------

STAGES = {
    "no window": (Grid(4, 4), {"window": 1}, {}),
    "windows of 2 x 2": (Grid(8, 8), {"window": 2}, {}),
    "larger, not square, z-loss": (Grid(8, 12), {"window": 2}, {"z_loss": 1e-5}),
}


class AtStart(L.Callback):
    """The generator's weights before the first step."""

    def on_train_start(self, trainer, pl_module):
        self.weights = {k: v.clone() for k, v in pl_module.generator.state_dict().items()}


def test_three_stages_of_token_shuffle_hand_their_weights_on(tmp_path):
    before, last, made = None, {}, []
    for i, (grid, config, settings) in enumerate(STAGES.values()):
        shards, run = tmp_path / f"codes-{i}", tmp_path / f"run-{i}"
        for split in ("train", "val"):
            tiny.write_codes(shards / split, 16, i, layout=grid)
        module, start = tiny.generator(config=config, init_from=before, **settings), AtStart()
        fit(module, run, shards, 2, start)
        assert all(torch.equal(start.weights[k], v) for k, v in last.items())
        made.append({k.split(".")[0] for k in start.weights.keys() - last.keys()})
        last, before = module.generator.state_dict(), str(run / "generator")
        assert any(not torch.equal(start.weights[k], v) for k, v in last.items())
    assert made[1:] == [{"shuffle", "unshuffle"}, set()]
    published = LlamaGenerator.from_pretrained(before)
    assert published.steps == 24
    assert published.generate(["count from 1"], generator=0).ids.shape == (1, 96)
