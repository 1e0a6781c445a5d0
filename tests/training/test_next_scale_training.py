"""Training TokenFlow's next-scale generator: codes and code vectors from its tokenizer, alignment, a language model's start."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from tokgen.data.datamodule import ShardsDataModule
from tokgen.errors import ConfigError
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.generators.tokenflow import TokenFlowGenerator
from tokgen.precompute import tokenize_shards
from tokgen.tokenizers.tokenflow import TokenFlow
from tokgen.training.alignment import Alignment
from tokgen.training.callbacks import SampleGrid
from tokgen.training.captions import Text
from tokgen.training.checkpoint import Checkpoint
from tokgen.training.ema import EMA
from tokgen.training.generator import GeneratorModule

SIDE, SIZES = 32, {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden": 48, "max_text": 8, "code_dim": 18}


@pytest.fixture(scope="module")
def visual(tmp_path_factory):
    """Folder of a TokenFlow of random weights: 32 px, scales 1, 2 and 4, 64 codes of 18 channels."""
    torch.manual_seed(0)
    return TokenFlow(TokenFlow.example_configs()["shared"]).eval().save_pretrained(tmp_path_factory.mktemp("visual"))


@pytest.fixture(scope="module")
def codes(tmp_path_factory, image_shards, visual):
    """Folder with train and val: the code shards of `image_shards`."""
    folder, tokenizer = tmp_path_factory.mktemp("codes"), TokenFlow.from_pretrained(visual)
    for split in ("train", "val"):
        tokenize_shards(tokenizer, image_shards / split, folder / split, size=SIDE)
    return folder


def module(visual, config=None, **settings) -> GeneratorModule:
    settings.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True))
    settings.setdefault("schedule", tiny.Schedule(100, kind="constant"))
    settings.setdefault("text", Text(vocab_size=300))
    settings.setdefault("visual_tokenizer", None if visual is None else str(visual))
    return GeneratorModule("tokenflow-t2i", {**SIZES, **(config or {})} if config != {} else {}, **settings)


def data(folder, batch_size=8, **options) -> ShardsDataModule:
    return ShardsDataModule(train=str(folder / "train"), val=str(folder / "val"), batch_size=batch_size, **options)


def test_it_learns_publishes_and_draws(tmp_path, visual, codes):
    record, ema = tiny.Record(), EMA(0.8)
    generation = {"guidance_scale": 3.0, "schedule": "linear", "top_k": 12, "top_p": 0.8, "passes": [[1, 1.0]]}
    learner = module(visual, z_loss=1e-4, text_loss=0.1, label_smoothing=0.05, generation=generation)
    grid = SampleGrid(prompts=["square 1, flat style", "square 2, flat style"], columns=2)
    trainer = tiny.trainer(tmp_path, record, ema, grid, Checkpoint(), max_steps=30, val_check_interval=15)
    trainer.fit(learner, datamodule=data(codes))
    loss = record.column("val/loss")
    assert len(loss) == 2 and loss[1] < loss[0] < math.log(64) + 0.1
    assert {"train/ce", "train/z_loss", "train/text", "train/accuracy"} <= {k for row in record.rows for k in row}
    assert len(list((tmp_path / "images").iterdir())) == 2
    pipeline = TextToImagePipeline.from_pretrained(tmp_path / "generator")
    published = pipeline.generator
    assert isinstance(published, TokenFlowGenerator)
    tokenizer = TokenFlow.from_pretrained(visual)
    assert torch.equal(published.codes.codebook, tokenizer.codebook_table())
    assert (published.tokenizer_fingerprint, published.visual_tokenizer) == (tokenizer.fingerprint, "tokenizer")
    drawn = pipeline(["square 1, flat style"] * 2, generator=0, output_type="pt")
    assert drawn.images.shape == (2, 3, SIDE, SIDE)
    assert drawn.settings["passes"] == ((1, 1.0),)
    assert drawn.report.calls == 5
    # scale by scale, for a look at how a picture grows
    assert torch.equal(pipeline.tokenizer.progressive(drawn.tokens)[-1], drawn.images)


def test_pictures_are_tokenized_in_training_and_states_are_aligned(tmp_path, visual, image_shards):
    record = tiny.Record()
    alignment = Alignment(encoder=str(tiny.eyes(tmp_path / "eyes")), source="online")
    learner = module(visual, alignment=alignment, compile=True)
    compiled = []
    with pytest.MonkeyPatch.context() as patch:  # each block is asked for; compiling itself is left to the benchmarks
        patch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(type(self).__name__))
        trainer = tiny.trainer(tmp_path, record, max_steps=20, val_check_interval=10)
        trainer.fit(learner, datamodule=data(image_shards, image_size=SIDE))
    assert compiled == ["PostNormBlock"] * 2
    cosine = record.column("val/alignment_cosine")
    assert len(cosine) == 2 and cosine[1] > cosine[0]
    assert torch.equal(learner.generator.codes.codebook, TokenFlow.from_pretrained(visual).codebook_table())
    wrong = module(visual, alignment=Alignment(encoder=alignment.encoder, source="online", target="rep"))
    with pytest.raises(ConfigError, match="rep_token"):
        tiny.trainer(tmp_path, max_steps=1).fit(wrong, datamodule=data(image_shards, image_size=SIDE))


def test_it_needs_the_tokenizer_and_its_width(tmp_path, visual, codes):
    with pytest.raises(ConfigError, match=r"model\.init_args\.visual_tokenizer"):
        tiny.trainer(tmp_path, max_steps=1).fit(module(None), datamodule=data(codes))
    with pytest.raises(ConfigError, match=r"config\.code_dim"):
        tiny.trainer(tmp_path, max_steps=1).fit(module(visual, {"code_dim": 40}), datamodule=data(codes))
    with pytest.raises(ConfigError, match="'window'"):
        module(visual, {"window": 2})


def test_start_from_a_published_generator(tmp_path, visual, codes):
    first = module(visual)
    tiny.trainer(tmp_path, Checkpoint(), max_steps=2).fit(first, datamodule=data(codes))
    still = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    for config in ({}, {"caption_dropout": 0.2}):  # as it is, and in a configuration of its own
        second = module(visual, config, init_from=str(tmp_path / "generator"), optimizer=still)
        tiny.trainer(tmp_path / "b", max_steps=1).fit(second, datamodule=data(codes))
        assert second.generator.config.caption_dropout == config.get("caption_dropout", 0.1)
        for name, value in first.generator.state_dict().items():
            assert torch.equal(value, second.generator.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_start_from_a_language_model(tmp_path, visual, codes, kind):
    """Blocks, text embedding and last norm are its own, whatever place the norms have here."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    cls, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}[kind]
    extra = {"head_dim": 16, "num_key_value_heads": 1} if kind == "qwen3" else {}
    theirs = cls(config(**sizes, **extra, rms_norm_eps=1e-5, tie_word_embeddings=False))
    for p in theirs.parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    theirs.save_pretrained(tmp_path / "lm")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "<unk>", "square", ",", "flat", "style", *map(str, range(9))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "lm")
    learner = GeneratorModule(
        "tokenflow-t2i", {"max_text": 8, "code_dim": 18}, Text(lowercase=False), str(visual), init_from_lm=str(tmp_path / "lm"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0), schedule=tiny.Schedule(100, kind="constant"),
    )  # fmt: skip
    tiny.trainer(tmp_path, max_steps=1).fit(learner, datamodule=data(codes))
    ours, own = learner.generator, theirs.state_dict()
    assert (ours.config.dim, ours.config.n_kv_heads, ours.config.text_vocab) == (32, 2 - len(extra) // 2, 90)
    assert torch.equal(ours.condition.embeddings.weight, own["model.embed_tokens.weight"])
    assert torch.equal(ours.layers[1].attention_norm.weight, own["model.layers.1.input_layernorm.weight"])
    assert torch.equal(ours.layers[1].ffn_norm.weight, own["model.layers.1.post_attention_layernorm.weight"])
    assert torch.equal(ours.layers[0].feed_forward.w2.weight, own["model.layers.0.mlp.down_proj.weight"])
    v = ours.layers[0].attention.wqkv.weight[-len(own["model.layers.0.self_attn.v_proj.weight"]) :]
    assert torch.equal(v, own["model.layers.0.self_attn.v_proj.weight"])
    norm = ours.layers[0].attention.q_norm.weight
    if kind == "qwen3":  # pairs (i, i + 8) there, (2i, 2i + 1) here
        assert torch.equal(norm, own["model.layers.0.self_attn.q_norm.weight"].view(2, 8).T.flatten())
    else:
        assert torch.equal(norm, torch.ones(16))  # new, as in the release
    assert ours.generate(["square 3"], generator=0).ids.shape == (1, 21)
