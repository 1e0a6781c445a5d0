"""Starting a generator from a text-only language model: the same text predictions, and one clear error where blocks differ."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig as HFLlama
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tokgen.errors import CheckpointError, ConfigError
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.importers.causal_lm import causal_lm_config, interleaved, start_from_causal_lm

SIZES = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MODELS = {
    "llama": lambda **o: LlamaForCausalLM(HFLlama(**{**SIZES, "tie_word_embeddings": True, **o})),
    "llama, grouped queries, another base": lambda **o: LlamaForCausalLM(
        HFLlama(
            **{**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-4, **o},
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ),
    "mistral": lambda **o: MistralForCausalLM(
        MistralConfig(**{**SIZES, "head_dim": 12, "sliding_window": None, "tie_word_embeddings": True, **o})
    ),
    "qwen2": lambda **o: Qwen2ForCausalLM(
        Qwen2Config(**{**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, **o})
    ),
    "qwen3": lambda **o: Qwen3ForCausalLM(
        Qwen3Config(**{**SIZES, "head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True, **o})
    ),
}
MISTRAL_KV = {"num_key_value_heads": 4}


def language_model(kind: str, folder, **options):
    """A random model whose norms are not all ones, saved to `folder`."""
    torch.manual_seed(3)
    if kind == "mistral":
        options = {**MISTRAL_KV, **options}
    shard = options.pop("max_shard_size", "5GB")
    model = MODELS[kind](**options).eval()
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def generator(folder, **options) -> LlamaGenerator:
    sizes = {**causal_lm_config(folder), **options}
    return LlamaGenerator(LlamaConfig({"kind": "Grid", "h": 2, "w": 3}, (7,), max_text=20, **sizes)).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_text_is_predicted_as_by_the_language_model(tmp_path, kind):
    theirs = language_model(kind, tmp_path)
    ours = generator(tmp_path)
    report = start_from_causal_lm(ours, tmp_path)
    assert set(report.mapped) | set(report.ignored) >= set(dict(theirs.named_parameters()))
    ids = torch.randint(90, (3, 11))
    expected = theirs(ids).logits
    out = ours(ids, torch.ones_like(ids, dtype=torch.bool), torch.randint(7, (3, 6)), text_loss=1.0)
    assert expected.std() > 0.5
    assert (out.text_logits - expected).abs().max() < 1e-4


def test_code_rows_are_as_wide_as_text_rows_and_the_code_head_stays(tmp_path):
    theirs = language_model("llama", tmp_path)
    ours = generator(tmp_path, text_vocab=600, window=1)
    head, boi = ours.output.weight.clone(), ours.condition.boi.clone()
    start_from_causal_lm(ours, tmp_path)
    wide = theirs.model.embed_tokens.weight.std().item()
    text = ours.condition.embeddings.weight
    assert torch.equal(text[:90], theirs.model.embed_tokens.weight)
    assert text[90:].std().item() == pytest.approx(wide, rel=0.1)
    assert ours.tok_embeddings.weight.std().item() == pytest.approx(wide, rel=0.2)
    assert ours.condition.boi.std().item() == pytest.approx(wide, rel=0.4) and not torch.equal(ours.condition.boi, boi)
    assert torch.equal(ours.output.weight, head)


def test_shards_and_an_untied_head(tmp_path):
    theirs = language_model("llama", tmp_path, tie_word_embeddings=False, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = generator(tmp_path)
    report = start_from_causal_lm(ours, tmp_path)
    assert "left out" in report.ignored["lm_head.weight"]
    own = ours.state_dict()
    for i, layer in enumerate(theirs.model.layers):
        q, k, v = own[f"layers.{i}.attention.wqkv.weight"].split(48)
        assert torch.equal(q, interleaved(layer.self_attn.q_proj.weight, 12))
        assert torch.equal(k, interleaved(layer.self_attn.k_proj.weight, 12))
        assert torch.equal(v, layer.self_attn.v_proj.weight)
        assert torch.equal(own[f"layers.{i}.feed_forward.w3.weight"], layer.mlp.up_proj.weight)
    next(tmp_path.glob("model-00002*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002"):
        start_from_causal_lm(ours, tmp_path)


def test_pairs_are_interleaved_within_each_head():
    rows = torch.arange(12)[:, None]  # 2 heads of 6
    assert interleaved(rows, 6).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert interleaved(torch.arange(4.0), 4).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"head_dim": 16}, "head_dim=16"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='linear'"),
        ("mistral", {"sliding_window": 16}, "sliding_window=16"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer_types="),
    ],
)
def test_what_our_blocks_cannot_do_is_named(tmp_path, kind, options, named):
    language_model(kind, tmp_path, **options)
    with pytest.raises(ConfigError, match=named):
        causal_lm_config(tmp_path)


def test_another_family_or_other_sizes_are_named(tmp_path):
    language_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="n_layers=1 instead of 2"):
        start_from_causal_lm(generator(tmp_path, n_layers=1), tmp_path)
    with pytest.raises(ConfigError, match="text_vocab=80 is below 90"):
        start_from_causal_lm(generator(tmp_path, text_vocab=80), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    with pytest.raises(ConfigError, match="model_type='gemma'"):
        causal_lm_config(tmp_path)
    with pytest.raises(CheckpointError, match="no model folder at 'nowhere'"):
        causal_lm_config("nowhere")


def test_files_that_do_not_hold_what_the_configuration_says_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    language_model("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    weights, ours = load_file(path), generator(tmp_path)
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, path)
    with pytest.raises(CheckpointError, match=r"without a place: layers\.0\.attention\.wqkv\.bias#q"):
        start_from_causal_lm(ours, tmp_path)
    save_file({k: v for k, v in weights.items() if "1.mlp.up_proj" not in k}, path)
    with pytest.raises(CheckpointError, match=r"missing: layers\.1\.feed_forward\.w3\.weight"):
        start_from_causal_lm(ours, tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        start_from_causal_lm(ours, tmp_path)
