"""LaVIT's published files as they are found: four parts, two mergers, names, and what is refused."""

from __future__ import annotations

import pytest
import torch

import tokgen
from tokgen.errors import CheckpointError
from tokgen.importers.lavit import lavit_from_state_dicts, load_lavit

DIM, HIDDEN, WIDTH, HEADS, DEPTH, PLACES, CODES, CODE_DIM = 32, 48, 16, 4, 2, 16, 24, 8


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def cross_block(name: str, dim: int, hidden: int, own: str, cross: str) -> dict[str, tuple[int, ...]]:
    keys = {k: v for i in range(3) for k, v in norm(f"{name}.norm{i}", dim).items()}
    keys |= linear(f"{name}.{own}.qkv", 3 * dim, dim) | linear(f"{name}.{own}.proj", dim, dim)
    for part in ("query", "key", "value", "proj"):
        keys |= linear(f"{name}.{cross}.{part}", dim, dim)
    return keys | linear(f"{name}.mlp.fc1", hidden, dim) | linear(f"{name}.mlp.fc2", dim, hidden)


def merger() -> dict[str, tuple[int, ...]]:
    keys = norm("causal_encoder.ln_vision", DIM) | norm("causal_encoder.norm", DIM)
    for i in range(DEPTH):
        keys |= cross_block(f"causal_encoder.blocks.{i}", DIM, HIDDEN, "token_causal_attn", "token_cross_attn")
    return keys


def decoder(highres: bool) -> dict[str, tuple[int, ...]]:
    keys = {"pos_embed": (1, PLACES, WIDTH), "query_embed": (1, PLACES, WIDTH)}
    keys |= linear("in_proj", WIDTH, CODE_DIM) | norm("norm", WIDTH)
    for i in range(DEPTH):
        keys |= cross_block(f"blocks.{i}", WIDTH, HIDDEN, "self_attn", "cross_attn")
    keys |= linear("decode_task_layer.0", WIDTH, WIDTH) | linear("decode_task_layer.2", DIM, WIDTH)
    if not highres:
        return keys | linear("unet_proj", 12, DIM)
    keys |= linear("unet_proj_1", 12, DIM) | linear("unet_proj_2", 20, DIM)
    keys["unet_attnpool.positional_embedding"] = (1 + PLACES, DIM)
    for part, out in (("q_proj", DIM), ("k_proj", DIM), ("v_proj", DIM), ("c_proj", 20)):
        keys |= linear(f"unet_attnpool.{part}", out, DIM)
    return keys


def encoder() -> dict[str, tuple[int, ...]]:
    keys = {"cls_token": (1, 1, DIM), "pos_embed": (1, 1 + PLACES, DIM), "patch_embed.proj.bias": (DIM,)}
    keys |= {"patch_embed.proj.weight": (DIM, 3, 4, 4), **norm("norm", DIM), **linear("head", 10, DIM)}
    for i in range(3):
        name = f"blocks.{i}"
        keys |= norm(f"{name}.norm1", DIM) | norm(f"{name}.norm2", DIM) | linear(f"{name}.attn.proj", DIM, DIM)
        keys |= {f"{name}.attn.{k}": (DIM,) for k in ("q_bias", "v_bias")} | {f"{name}.attn.qkv.weight": (3 * DIM, DIM)}
        keys |= linear(f"{name}.mlp.fc1", HIDDEN, DIM) | linear(f"{name}.mlp.fc2", DIM, HIDDEN)
    return keys


def published(highres: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """The four files, by the names of the loader's arguments, in bf16 as they are published."""
    selector = norm("token_predictor.in_conv.0", DIM) | linear("token_predictor.in_conv.1", DIM, DIM)
    for i, (out, into) in enumerate(((DIM // 2, DIM), (DIM // 4, DIM // 2), (2, DIM // 4))):
        selector |= linear(f"token_predictor.out_conv.{2 * i}", out, into)
    tokenizer = {**selector, **merger(), "quantize.embedding.weight": (CODES, CODE_DIM)}
    tokenizer |= linear("encode_task_layer.0", DIM, DIM) | linear("encode_task_layer.2", CODE_DIM, DIM)
    visual = merger() | linear("vit_proj", 40, DIM)
    files = {"encoder": encoder(), "tokenizer": tokenizer, "decoder": decoder(highres), "visual_weight": visual}
    torch.manual_seed(0)
    return {
        part: {key: 0.2 * torch.randn(shape, dtype=torch.bfloat16) for key, shape in keys.items()}
        for part, keys in files.items()
    }


@pytest.fixture
def files(tmp_path):
    paths = {}
    for part, state in published().items():
        paths[part] = tmp_path / f"{part}.bin"
        torch.save(state, paths[part])
    return paths


def test_the_four_files_are_one_tokenizer(files, tmp_path):
    module, report = load_lavit(**files, heads=HEADS)
    state = published()
    assert not report.ignored
    assert set(report.mapped) == {f"{part}/{key}" for part, keys in state.items() for key in keys}
    own = module.state_dict()
    for name, key in report.mapped.items():
        part, _, source = name.partition("/")
        assert torch.equal(own[key], state[part][source].float()), name
    # nothing is left as it was made, but the statistics, which say that the codebook has started
    rest = {key.removeprefix("quantizer.codebook.") for key in own.keys() - set(report.mapped.values())}
    assert rest == {"ema_count", "ema_sum", "step", "started"} and bool(own["quantizer.codebook.started"])
    assert torch.equal(own["quantizer.codebook.ema_sum"], own["quantizer.codebook.weight"])

    config = module.config
    assert (config.condition, config.condition_dims[0], config.understanding_dim) == ("lowres", 12, 40)
    assert (config.image_size, config.code_dim, module.codebook_sizes) == (16, CODE_DIM, (CODES,))
    pixels = module.example_pixels()
    tokens = module.encode(pixels)
    assert module.condition(tokens)["prompt_embeds"].shape == (3, PLACES, 12)
    assert module.features_for_llm(pixels)[0].shape[-1] == 40
    again = tokgen.load(module.save_pretrained(tmp_path / "lavit"))
    assert torch.equal(again.encode(pixels).ids, tokens.ids)


def test_codes_and_continuous_features_have_each_the_merger_of_their_file(files):
    module, _ = load_lavit(**files, heads=HEADS)
    state = published()
    key = "causal_encoder.blocks.1.token_cross_attn.value.weight"
    assert not torch.equal(state["tokenizer"][key], state["visual_weight"][key])
    mergers = module.merger, module.understanding["merger"]
    for merger, part in zip(mergers, ("tokenizer", "visual_weight")):
        assert torch.equal(merger.blocks[1].cross_attn.value.weight, state[part][key].float())
    del files["visual_weight"]
    assert load_lavit(**files, heads=HEADS)[0].understanding is None


def test_the_high_resolution_decoder_is_seen_in_its_keys():
    state = published(highres=True)
    del state["visual_weight"]
    module, report = lavit_from_state_dicts(**state, heads=HEADS)
    assert module.config.condition == "highres" and module.config.condition_dims == (12, 20)
    assert len([key for key in report.mapped if key.startswith("decoder/unet_")]) == 4 + 9
    condition = module.condition(module.encode(module.example_pixels()))
    assert {k: tuple(v.shape[1:]) for k, v in condition.items()} == {
        "prompt_embeds": (PLACES, 32),
        "pooled_prompt_embeds": (20,),
    }


def test_keys_of_another_part_are_ignored_with_a_word_and_unknown_ones_refused():
    state = published()
    state["tokenizer"]["vit_proj.weight"] = torch.zeros(40, DIM)
    state["visual_weight"] = {f"model.visual_tokenizer.{k}": v for k, v in state["visual_weight"].items()}
    state["visual_weight"]["model.visual_tokenizer.quantize.embedding.weight"] = torch.zeros(CODES, CODE_DIM)
    _, report = lavit_from_state_dicts(**state, heads=HEADS)
    assert report.ignored == {
        "tokenizer/vit_proj.weight": "the projection to the language model belongs to the merger of visual_weight.bin",
        "visual_weight/model.visual_tokenizer.quantize.embedding.weight": "codes are made by tokenizer_encoder.bin",
    }
    state["decoder"]["mask_token"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="keys that this importer does not know: mask_token"):
        lavit_from_state_dicts(**state, heads=HEADS)


@pytest.mark.parametrize(
    "part, other, message",
    [
        ("encoder", "decoder", "no EVA-CLIP vision tower"),
        ("tokenizer", "encoder", r"tokenizer: this is no such part of LaVIT: causal_encoder"),
        ("decoder", "tokenizer", r"decoder: this is no such part of LaVIT: in_proj\.weight is missing"),
        ("visual_weight", "decoder", r"visual_weight: this is no such part of LaVIT: vit_proj\.weight is missing"),
    ],
)
def test_the_wrong_file_is_refused_in_one_line(part, other, message):
    state = published()
    state[part] = state[other]
    with pytest.raises(CheckpointError, match=message) as error:
        lavit_from_state_dicts(**state, heads=HEADS)
    assert "\n" not in str(error.value)


def test_an_incomplete_file_is_refused():
    state = published()
    del state["decoder"]["blocks.1.norm0.bias"]
    with pytest.raises(CheckpointError, match=r"missing: decoder\.blocks\.1\.norm0\.bias"):
        lavit_from_state_dicts(**state, heads=HEADS)
