"""The same weights in transformers' LlamaForCausalLM, to compare results and speed with."""

from __future__ import annotations

import torch


def to_transformers(model):
    """LlamaForCausalLM with the weights of a plain `LlamaGenerator` (1-D rotary positions, window 1, one codebook).

    Its vocabulary is [text, begin-of-image, codes]; logits of text ids and begin-of-image are 0. Rotary pairs are
    (2i, 2i + 1) here and (i, i + head_dim / 2) there, hence the permutation of query and key rows.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    head_dim = c.dim // c.n_heads
    kv = c.n_kv_heads or c.n_heads
    vocab = c.text_vocab + 1 + c.codebook_sizes[0]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=c.dim,
        intermediate_size=c.feed_forward,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=kv,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    peer = LlamaForCausalLM(config).eval()

    def halves(weight, heads):
        return weight.view(heads, head_dim // 2, 2, c.dim).transpose(1, 2).reshape(heads * head_dim, c.dim)

    own = model.state_dict()
    state = {
        "model.embed_tokens.weight": torch.cat(
            [own["condition.embeddings.weight"], own["condition.boi"][None], own["tok_embeddings.weight"]]
        ),
        "lm_head.weight": torch.cat([torch.zeros(c.text_vocab + 1, c.dim), own["output.weight"]]),
        "model.norm.weight": own["norm.weight"],
    }
    for i in range(c.n_layers):
        a, b = f"layers.{i}.", f"model.layers.{i}."
        q, k, v = own[a + "attention.wqkv.weight"].split([c.dim, kv * head_dim, kv * head_dim])
        state |= {
            b + "self_attn.q_proj.weight": halves(q, c.n_heads),
            b + "self_attn.k_proj.weight": halves(k, kv),
            b + "self_attn.v_proj.weight": v,
            b + "self_attn.o_proj.weight": own[a + "attention.wo.weight"],
            b + "mlp.gate_proj.weight": own[a + "feed_forward.w1.weight"],
            b + "mlp.up_proj.weight": own[a + "feed_forward.w3.weight"],
            b + "mlp.down_proj.weight": own[a + "feed_forward.w2.weight"],
            b + "input_layernorm.weight": own[a + "attention_norm.weight"],
            b + "post_attention_layernorm.weight": own[a + "ffn_norm.weight"],
        }
    peer.load_state_dict(state)
    return peer
