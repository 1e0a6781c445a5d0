"""TokenFlow-t2i's folder as it is published: names, vocabulary, and the released order of computing and drawing."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import tokgen
from tokenizers import Tokenizer, models, pre_tokenizers
from tokgen.cli import main
from tokgen.errors import CheckpointError, ConfigError, MissingDependency
from tokgen.importers.tokenflow_t2i import SAMPLING, load_t2i
from tokgen.tokenizers.tokenflow import TokenFlow
from tokgen.tokenizers.vqgan import VQGAN

pytest.importorskip("transformers")
SCALES, N, CODES, CODE_DIM, DIM, HEADS, LAYERS = (1, 2, 4), 21, 64, 18, 32, 2, 2
WORDS = ["<unk>", "<s>", "</s>", "<", "img", ">", "a", "red", "heart", "blue", "fish", "blurry"]
PAD, START = len(WORDS), len(WORDS) + 1  # [PAD] and the codes were added to the vocabulary, in this order
TEXT = 128


@pytest.fixture(scope="module")
def visual(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = TokenFlow(TokenFlow.example_configs()["shared"]).eval()
    tokenizer.save_pretrained(tmp_path_factory.mktemp("visual") / "tokenizer")
    return tokenizer


def state_dict() -> dict[str, torch.Tensor]:
    """Random weights under the released names."""
    draw = lambda *shape: torch.randn(*shape) * 0.2  # noqa: E731
    norm = lambda n: 0.5 + torch.rand(n)  # noqa: E731
    state = {
        "model.embed_tokens.weight": draw(START + CODES, DIM),
        "model.mm_projector.0.weight": draw(DIM, CODE_DIM),
        "model.mm_projector.0.bias": draw(DIM),
        "model.mm_projector.2.weight": draw(DIM, DIM),
        "model.mm_projector.2.bias": draw(DIM),
        "model.lvl_embed.weight": draw(len(SCALES) + 1, DIM),
        "model.pos_1LC": draw(N, DIM),
        "model.norm.weight": norm(DIM),
        "lm_head.weight": draw(START + CODES, DIM),
        "image_token_start": torch.tensor(START),
        "image_token_end": torch.tensor(START + CODES - 1),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        state |= {f"{layer}self_attn.{n}_proj.weight": draw(DIM, DIM) for n in "qkvo"}
        state |= {f"{layer}self_attn.qknorm.{n}_norm.weight": norm(DIM // HEADS) for n in ("query", "key")}
        state |= {f"{layer}mlp.{n}_proj.weight": draw(48, DIM) for n in ("gate", "up")}
        state |= {f"{layer}mlp.down_proj.weight": draw(DIM, 48)}
        state |= {f"{layer}{n}_layernorm.weight": norm(DIM) for n in ("input", "post_attention")}
    return state


def write(folder, state, shards=2, **config):
    """A folder as the release has it: shards with an index, and a configuration of a model type of its own."""
    folder.mkdir(parents=True)
    keys, where = sorted(state), {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({k: state[k].contiguous() for k in keys[i::shards]}, folder / name)
        where |= dict.fromkeys(keys[i::shards], name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {"model_type": "llava_llama", "rms_norm_eps": 1e-5, "vq_codebook_size": CODES, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_words(folder, with_codes=False):
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if with_codes:
        fast.add_special_tokens({"pad_token": "[PAD]"})
        fast.add_tokens([f"<vq_token_{i}>" for i in range(CODES)], special_tokens=True)
    fast.save_pretrained(folder)
    return folder


# -- the released computation, written out under the released names -------------------------------------------------------


def running_maps(table, codes, current=None):
    """Features of all slots but the first; those of one scale with its own codes in, where `current` says."""
    out, running, start = [], 0.0, 0
    for i, side in enumerate(SCALES):
        running = running + table[codes[start : start + side * side]].T.reshape(1, -1, side, side)
        start += side * side
        if i and i == current:
            out[i - 1] = running.flatten(2)[0].T
        if i + 1 < len(SCALES):
            running = F.interpolate(running, size=(SCALES[i + 1],) * 2, mode="bicubic")
            out.append(running.flatten(2)[0].T)
    return torch.cat(out)


def released_logits(state, table, words, codes, current=None):
    """(N, vocabulary): words padded on the left to 128, "<img>", all codes; every position of one row, no cache."""
    own = lambda name: state[name]  # noqa: E731
    ids = torch.tensor([PAD] * (TEXT - len(words)) + words + [3, 4, 5])
    start = len(ids)
    features = F.gelu(
        running_maps(table, codes, current) @ own("model.mm_projector.0.weight").T + own("model.mm_projector.0.bias")
    )
    image = features @ own("model.mm_projector.2.weight").T + own("model.mm_projector.2.bias")
    x = torch.cat([own("model.embed_tokens.weight")[ids], image, torch.zeros(1, DIM)])
    length = len(x)
    level = torch.zeros(length, dtype=torch.int64)
    level[start:-1] = torch.cat([torch.full((s * s,), i + 1) for i, s in enumerate(SCALES)])[1:]
    x = x + own("model.lvl_embed.weight")[level]
    x[start - 1 : -1] += own("model.pos_1LC")
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[:, : TEXT - len(words)] = False
    sees |= torch.eye(length, dtype=torch.bool)
    scale = torch.cat([torch.full((s * s,), i) for i, s in enumerate(SCALES)])
    sees[start - 1 : -1, start - 1 : -1] = scale[:, None] >= scale
    width = DIM // HEADS
    angle = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = torch.cat([angle, angle], -1).cos()[:, None], torch.cat([angle, angle], -1).sin()[:, None]

    def norm(v, weight, eps=1e-5):
        return weight * (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps))

    def rotate(v):
        a, b = v.chunk(2, -1)
        return v * cos + torch.cat([-b, a], -1) * sin

    for i in range(LAYERS):
        layer = {k.removeprefix(f"model.layers.{i}."): v for k, v in state.items() if f".layers.{i}." in k}
        q, k, v = ((x @ layer[f"self_attn.{n}_proj.weight"].T).view(length, HEADS, width) for n in "qkv")
        q = rotate(norm(q, layer["self_attn.qknorm.query_norm.weight"], 1e-6))
        k = rotate(norm(k, layer["self_attn.qknorm.key_norm.weight"], 1e-6))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -1e30).softmax(-1), v).flatten(1)
        x = x + norm(mixed @ layer["self_attn.o_proj.weight"].T, layer["input_layernorm.weight"])
        inner = F.silu(x @ layer["mlp.gate_proj.weight"].T) * (x @ layer["mlp.up_proj.weight"].T)
        x = x + norm(inner @ layer["mlp.down_proj.weight"].T, layer["post_attention_layernorm.weight"])
    return (norm(x, own("model.norm.weight")) @ own("lm_head.weight").T)[start - 1 : -1]


def released_codes(state, table, words, other, cfg, passes):
    """Drawn greedily as released: cfg from 0 at the first scale to its value at the last, words at -inf."""
    codes, start = torch.ones(N, dtype=torch.int64), 0
    for i, side in enumerate(SCALES):
        part, t = slice(start, start + side * side), cfg * i / (len(SCALES) - 1)
        for number in range(1 + (passes if i else 0)):
            with_own = i if number else None
            given, away = (released_logits(state, table, w, codes, with_own)[part] for w in (words, other))
            logits = (1 + t) * given - t * away
            logits[:, :START] = -torch.inf
            codes[part] = logits.argmax(-1) - START
        start += side * side
    return codes


# -- reading it -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_pictures_are_those_of_the_release(tmp_path, visual):
    state, table = state_dict(), visual.codebook_table()
    generator, report = load_t2i(write(tmp_path / "t2i", state), visual, write_words(tmp_path / "words"))
    assert (len(report.mapped), set(report.ignored)) == (
        len(state) - 2,
        {
            "image_token_start",
            "image_token_end",
            "model.embed_tokens.weight, rows of codes",
            "lm_head.weight, rows of words",
        },
    )
    assert (generator.config.text_vocab, generator.config.image_begin, generator.max_text) == (START, (3, 4, 5), TEXT)
    prompts = {"a red heart": [1, 6, 7, 8], "blue fish": [1, 9, 10], "": [1]}
    codes = torch.randint(CODES, (len(prompts), N))
    ours = generator(*generator.encode_prompts(list(prompts)), codes).logits
    for row, (words, ids) in enumerate(zip(prompts.values(), codes)):
        expected = released_logits(state, table, words, ids)[:, START:]
        assert expected.std() > 0.3
        torch.testing.assert_close(ours[row], expected, atol=2e-4, rtol=1e-3)
    for passes in (0, 2):
        how = {"temperature": 0, "guidance_scale": 4.0, "negative_prompt": "blurry", "passes": [(1, 1.0)] * passes}
        drawn = generator.generate(["a red heart"], **how).ids[0]
        assert torch.equal(drawn, released_codes(state, table, [1, 6, 7, 8], [1, 11], 3.0, passes))


def test_converted_it_draws_with_its_tokenizer(tmp_path, visual, capsys):
    folder, tokenizer = write_words(write(tmp_path / "t2i", state_dict()), with_codes=True), tmp_path / "tokenizer"
    visual.save_pretrained(tokenizer)
    out = tmp_path / "models/t2i"
    options = ["--out", str(out), "--tokenizer", str(tokenizer), "--text", str(folder)]  # its own vocabulary
    assert main(["convert", "tokenflow-t2i", str(folder), *options]) == 0
    assert "31 tensors mapped" in capsys.readouterr().out
    generator = tokgen.load(out)
    assert (generator.tokenizer_fingerprint, generator.visual_tokenizer) == (visual.fingerprint, "../../tokenizer")
    assert generator.generation == SAMPLING
    assert torch.equal(generator.codes.codebook, visual.codebook_table())
    assert generator.text.vocab_size == START  # a caption cannot spell codes
    assert generator.encode_prompts(["<vq_token_3>"])[0].max() < len(WORDS)
    assert (
        main(["sample", "a red heart", "--model", str(out), "--out", str(tmp_path / "x.png"), "--device", "cpu"]) == 0
    )
    assert main(["convert", "tokenflow-t2i", str(folder), "--out", str(out), "--text", str(folder)]) == 2
    assert "also needs --tokenizer" in capsys.readouterr().err


def test_sizes_and_places_are_read_off(tmp_path, visual):
    words = write_words(tmp_path / "words")
    state = state_dict()
    grouped = {k: v[: DIM // 2] if re.search(r"self_attn\.[kv]_proj", k) else v for k, v in state.items()}
    folder = write(tmp_path / "grouped", grouped, shards=1, rope_theta=500.0, rms_norm_eps=1e-4)
    generator, _ = load_t2i(folder, visual, words, image_begin=[4])
    config = generator.config
    assert (config.n_heads, config.n_kv_heads, config.rope_base, config.norm_eps) == (HEADS, 1, 500.0, 1e-4)
    assert config.image_begin == (4,)
    # without the buffers the codes begin after Llama-2's words and [PAD]
    state = {k: v for k, v in state.items() if "image_token" not in k}
    pad = lambda v: F.pad(v, (0, 0, 32_001 - START, 0))  # noqa: E731
    state |= {k: pad(state[k]) for k in ("lm_head.weight", "model.embed_tokens.weight")}
    generator, _ = load_t2i(write(tmp_path / "bare", state), visual, words)
    assert (generator.config.text_vocab, generator.codebook_sizes) == (32_001, (CODES,))
    assert torch.equal(generator.output.weight, state["lm_head.weight"][-CODES:])


def test_what_is_missing_or_strange_is_named(tmp_path, visual):
    words, state, number = write_words(tmp_path / "words"), state_dict(), itertools.count()

    def load(state, tokenizer=visual, **config):
        return load_t2i(write(tmp_path / str(next(number)), state, **config), tokenizer, words)

    with pytest.raises(CheckpointError, match="does not know: surprise"):
        load({**state, "surprise": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"missing: layers\.1\.attention\.wo\.weight"):
        load({k: v for k, v in state.items() if "1.self_attn.o_proj" not in k})
    with pytest.raises(CheckpointError, match=r"'model\.pos_1LC' is missing"):
        load({k: v for k, v in state.items() if k != "model.pos_1LC"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is \(47, 32\)"):
        load({k: v[:47] if k == "model.layers.1.mlp.up_proj.weight" else v for k, v in state.items()})
    with pytest.raises(ConfigError, match="30 codes of 3 scales, the tokenizer has 21 of 3"):
        load({**state, "model.pos_1LC": torch.zeros(30, DIM)})
    with pytest.raises(tokgen.errors.TokenizerMismatch, match="codebooks"):
        load({**state, "image_token_end": torch.tensor(START + CODES - 2)})
    with pytest.raises(ConfigError, match="given a VQGAN"):
        load(state, VQGAN(VQGAN.example_configs()["cosine"]))
    with pytest.raises((CheckpointError, MissingDependency)):
        load_t2i(write(tmp_path / "whole", state), visual, tmp_path / "nowhere")
