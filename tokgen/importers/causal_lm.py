"""Text-only language models of the LLaMA type as the start of a `LlamaGenerator`.

ARRA (Xie et al. 2025, arXiv 2503.07334) starts from a language model that writes text only and teaches it to
draw. Blocks, final norm and text embedding are taken from a Hugging Face checkpoint; the embeddings and the head of the
codes, and begin-of-image, are new.

Two layouts differ. Rotary pairs are channels (i, i + head_dim / 2) there and (2i, 2i + 1) here, so the rows of each
query and key head are permuted, and so are the scales of their norms. Queries, keys and values are one matrix here.
"""

from __future__ import annotations

import os
from collections.abc import Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokgen.errors import CheckpointError, ConfigError, MissingDependency
from tokgen.importers.base import ImportReport, rename
from tokgen.importers.sharded import INDEX, shapes_in, tensors_in, weight_files
from tokgen.pretrained import CONFIG, resolve

if TYPE_CHECKING:
    from tokgen.generators.llama import LlamaGenerator
    from tokgen.generators.tokenflow import TokenFlowGenerator

# on the right, "#q", "#k" and "#v" are the parts of a matrix, and "#pairs" asks for the order of rotary pairs
LM_KEYS = [
    (r"model\.embed_tokens\.weight", r"condition.embeddings.weight"),
    (r"model\.norm\.weight", r"norm.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", r"layers.\1.attention.wqkv.\3#\2"),
    (r"model\.layers\.(\d+)\.self_attn\.([qk])_norm\.weight", r"layers.\1.attention.\2_norm.weight#pairs"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight", r"layers.\1.attention.wo.weight"),
    (r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight", r"layers.\1.feed_forward.w1.weight"),
    (r"model\.layers\.(\d+)\.mlp\.up_proj\.weight", r"layers.\1.feed_forward.w3.weight"),
    (r"model\.layers\.(\d+)\.mlp\.down_proj\.weight", r"layers.\1.feed_forward.w2.weight"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"layers.\1.attention_norm.weight"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"layers.\1.ffn_norm.weight"),
]
LM_IGNORED = [(r"(model\.layers\.\d+\.self_attn\.|model\.)rotary_emb\.inv_freq", "rotary positions are computed here")]
TIED = (r"lm_head\.weight", "the same as the text embedding")
UNTIED = (r"lm_head\.weight", "text is predicted with the text embedding here; this head of its own is left out")

# model types whose blocks are ours, and whether they normalise queries and keys
MODEL_TYPES = {"llama": False, "mistral": False, "qwen2": False, "qwen3": True}


def causal_lm_config(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Fields of `LlamaConfig` that a generator needs to take the weights of a language model.

    Args:
        name: Hub name, or a local folder that transformers' `save_pretrained` wrote.

    Returns:
        condition, dim, n_layers, n_heads, n_kv_heads, hidden, rope, rope_prefix, rope_base, norm_eps, qk_norm, qkv_bias, and
        text_vocab, the rows of its embedding (a tokenizer may have fewer or more ids).

    Raises:
        ConfigError: a model whose blocks are not ours; names the option that differs.
        CheckpointError: no such model. MissingDependency: transformers is not installed.
    """
    config = _read_config(name)
    _check(config, str(name))
    return {
        "condition": "text",
        "text_vocab": config.vocab_size,
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "hidden": config.intermediate_size,
        "rope": "1d",
        "rope_prefix": "positions",
        "rope_base": float(_rope(config)["rope_theta"]),
        "norm_eps": config.rms_norm_eps,
        "qk_norm": MODEL_TYPES[config.model_type],
        "qkv_bias": config.model_type == "qwen2",
    }


@torch.no_grad()
def start_from_causal_lm(generator: LlamaGenerator | TokenFlowGenerator, name: str | os.PathLike[str]) -> ImportReport:
    """Give `generator` the weights of a language model; its shards are read one tensor at a time.

    New here: code embeddings, begin-of-image and REP are drawn from N(0, std of the text embedding), as are text rows
    that the model does not have; the code head and modules of windows stay as they are. The text head is the text
    embedding; a model's own (untied) `lm_head` is left out, and the report says so. TokenFlow's generator has its norms behind
    the branches and not before, and takes their weights nevertheless, as its release does; its query and key norms stay as
    they are if the model has none, as do levels and positions.

    Args:
        generator: of the sizes that `causal_lm_config` gives, as far as its configuration has them; its text vocabulary may be
            larger.
        name: Hub name, or a local folder.

    Returns:
        what was mapped and ignored.

    Raises:
        ConfigError: the generator has other sizes, or see `causal_lm_config`.
        CheckpointError: weights are missing, misshapen, unknown, or not safetensors.
    """
    sizes = causal_lm_config(name)
    _check_sizes(generator, sizes, str(name))
    tied = _read_config(name).tie_word_embeddings
    files = weight_files(resolve(name, files=(CONFIG, "model*.safetensors", INDEX)))
    places, report = rename(shapes_in(files), LM_KEYS, [*LM_IGNORED, TIED if tied else UNTIED], str(name))
    own = dict(generator.named_parameters())
    expected = {k for k in own if k.startswith(("condition.embeddings.", "layers.", "norm."))}
    if not sizes["qk_norm"]:
        expected -= {k for k in expected if k.endswith(("attention.q_norm.weight", "attention.k_norm.weight"))}
    parts = {"wqkv": ("#q", "#k", "#v"), "q_norm": ("#pairs",), "k_norm": ("#pairs",)}
    expected = {k + p for k in expected for p in parts.get(k.split(".")[-2], ("",))}
    for label, wrong in (("missing", expected - places.keys()), ("without a place", places.keys() - expected)):
        if wrong:
            raise CheckpointError(f"{name} is no {len(generator.layers)}-layer model: {label}: {_some(wrong)}")
    attention = generator.layers[0].attention
    for key, value in tensors_in(files):
        if key not in report.mapped:
            continue
        target, _, part = report.mapped[key].partition("#")
        destination = own[target]
        if part in ("q", "k", "v"):
            q, kv = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
            destination = destination.split([q, kv, kv])["qkv".index(part)]
        if target == "condition.embeddings.weight":
            text_std = value.float().std().item()
            nn.init.normal_(destination[len(value) :], std=text_std)
            destination = destination[: len(value)]
        if destination.shape != value.shape:
            raise CheckpointError(f"{name}: {key} is {tuple(value.shape)}, expected {tuple(destination.shape)}")
        destination.copy_(interleaved(value, attention.head_dim) if part in ("q", "k", "pairs") else value)
    codes = getattr(generator, "tok_embeddings", None)  # none where codes are read by their vectors
    for new in (None if codes is None else codes.weight, generator.condition.boi, getattr(generator, "rep", None)):
        if new is not None:
            nn.init.normal_(new, std=text_std)
    return report


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (heads x head_dim, …) from rotary pairs (i, i + head_dim / 2) to pairs (2i, 2i + 1), each head by itself."""
    return weight.view(-1, 2, head_dim // 2, weight[0].numel()).transpose(1, 2).reshape(weight.shape)


def _some(keys: Set[str]) -> str:
    return ", ".join(sorted(keys)[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


# -- the model's configuration ------------------------------------------------------------------------------------------


def _read_config(name: str | os.PathLike[str]) -> Any:
    """transformers' configuration object, which knows the defaults of each model type."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise MissingDependency(
            f"starting from {str(name)!r} needs transformers; install it with pip install 'tokgen[transformers]'"
        ) from None
    folder = resolve(name, files=(CONFIG,))
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name} has no model configuration that transformers knows: {error}") from None


def _rope(config: Any) -> dict[str, Any]:
    """Rotary parameters; transformers before 5 kept base and scaling apart."""
    parameters = getattr(config, "rope_parameters", None)
    return parameters or {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}


def _check(config: Any, name: str) -> None:
    """Raise ConfigError, naming the option, unless the blocks compute what ours do."""
    if config.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{name}: model_type={config.model_type!r} has other blocks than ours; expected one of {', '.join(MODEL_TYPES)}"
        )
    rope = _rope(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Qwen3 writes a sliding_window that its layers may not use; they say so themselves
    window = None if "layer_types" in config.to_dict() else getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    for option, value, fits in (
        ("attention_bias", getattr(config, "attention_bias", False), lambda v: not v),
        ("mlp_bias", getattr(config, "mlp_bias", False), lambda v: not v),
        ("hidden_act", config.hidden_act, lambda v: v in ("silu", "swish")),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), lambda v: v == "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), lambda v: v == 1),
        ("sliding_window", window, lambda v: v is None),
        ("layer_types", kinds, lambda v: not v),
        ("head_dim", head_dim, lambda v: v * config.num_attention_heads == config.hidden_size),
    ):
        if not fits(value):
            raise ConfigError(
                f"{name}: {option}={value!r} cannot be carried over; a start must be a LLaMA-type model without biases "
                "(but Qwen2's), rope scaling or sliding windows, with silu, and heads that add up to its width"
            )


def _check_sizes(generator: LlamaGenerator | TokenFlowGenerator, sizes: dict[str, Any], name: str) -> None:
    c = generator.config
    hidden = generator.layers[0].feed_forward.w1.out_features
    own = {**vars(c), "n_kv_heads": c.n_kv_heads or c.n_heads, "hidden": hidden}
    differ = [f"{k}={own[k]!r} instead of {v!r}" for k, v in sizes.items() if k != "text_vocab" and own.get(k, v) != v]
    if c.text_vocab < sizes["text_vocab"]:
        differ.append(f"text_vocab={c.text_vocab} is below {sizes['text_vocab']}")
    if differ:
        raise ConfigError(f"a generator that starts from {name} needs its sizes: {', '.join(differ)}")
