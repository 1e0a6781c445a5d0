"""CLIP's and SigLIP's vision towers: the network is transformers' own, number for number, in every layout they come in."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import tokgen
from tokgen.encoders.clip import ClipViT, ClipViTConfig
from tokgen.errors import CheckpointError, ConfigError
from tokgen.importers.clip import clip_from_state_dict, load_clip

SIZES = {"hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}


def clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    vision = {**SIZES, "num_attention_heads": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**{**SIZES, "hidden_size": 144}, num_attention_heads=2)).eval()


@torch.no_grad()
def test_clip_is_that_of_transformers(tmp_path):
    model, x = clip(), torch.rand(2, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    tower, report = load_clip(tmp_path / "model.safetensors", "clip")
    assert tower.config == ClipViTConfig(32, 8, 128, 2, 200, 3, embed_dim=24)
    assert set(report.mapped) | set(report.ignored) == set(model.state_dict())
    assert {key.partition(".")[0] for key in report.ignored} <= {"text_model", "text_projection", "logit_scale"} | {
        "vision_model"  # position_ids
    }
    normal = tower.normalised(x)
    hidden = model.vision_model(pixel_values=normal)
    patches = model.visual_projection(model.vision_model.post_layernorm(hidden.last_hidden_state[:, 1:]))
    torch.testing.assert_close(tower.features(x), patches, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower.embed(x), model.visual_projection(hidden.pooler_output), rtol=1e-5, atol=1e-5)
    assert tower.feature_shape == (16, 24) == tuple(tower.features(x).shape[1:])


@torch.no_grad()
@pytest.mark.parametrize("level", ["", "vision_model."])
def test_siglip_gives_the_states_before_the_last_block(level):
    model, x = siglip(), torch.rand(2, 3, 32, 32)
    state = {level + key.removeprefix("vision_model."): value for key, value in model.state_dict().items()}
    tower, report = clip_from_state_dict(state, "siglip")
    assert set(report.mapped) | set(report.ignored) == set(state) and tower.config.depth == 2
    why = {key.removeprefix(level).split(".")[0]: reason for key, reason in report.ignored.items()}
    assert set(why) == {"encoder", "post_layernorm", "head"}
    hidden = model(pixel_values=x * 2 - 1, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tower.features(x), hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower.embed(x), hidden.mean(1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_student_sees_pixels_between_minus_one_and_one():
    state, x = clip().state_dict(), torch.rand(1, 3, 32, 32)
    teacher, student = (clip_from_state_dict(state, form)[0] for form in ("clip", "tokenflow"))
    assert student.config.embed_dim is None and student.feature_shape == (16, 128)
    torch.testing.assert_close(student.normalised(x), x * 2 - 1)
    torch.testing.assert_close(student(x)[:, 1:] @ teacher.projection.weight.T, teacher(x)[:, 1:])


def openai(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names turned into OpenAI's, by hand."""
    out = {}
    for key, value in state.items():
        if not key.startswith("vision_model."):
            continue
        key = key.removeprefix("vision_model.")
        if ".self_attn." in key and ".out_proj." not in key:
            continue
        key = key.replace("embeddings.class_embedding", "class_embedding").replace(
            "embeddings.patch_embedding", "conv1"
        )
        key = key.replace("embeddings.position_embedding.weight", "positional_embedding").replace(
            "pre_layrnorm", "ln_pre"
        )
        key = key.replace("post_layernorm", "ln_post").replace("encoder.layers", "transformer.resblocks")
        key = (
            key.replace("layer_norm", "ln_")
            .replace("self_attn", "attn")
            .replace("fc1", "c_fc")
            .replace("fc2", "c_proj")
        )
        if not key.endswith("position_ids"):
            out[f"visual.{key}"] = value
    for i in range(SIZES["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [state[f"vision_model.encoder.layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"visual.transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(parts)
    out["visual.proj"] = state["visual_projection.weight"].T
    return out | {"text_projection": torch.zeros(2, 2), "token_embedding.weight": torch.zeros(2, 2)}


@torch.no_grad()
def test_openai_names_are_the_same_network(tmp_path):
    state, x = clip().state_dict(), torch.rand(2, 3, 32, 32)
    torch.save(openai(state), tmp_path / "clip.pt")
    tower, _ = load_clip(tmp_path / "clip.pt", "clip")
    assert torch.equal(tower.features(x), clip_from_state_dict(state, "clip")[0].features(x))


def test_what_is_no_tower_is_refused():
    state = clip().state_dict()
    with pytest.raises(CheckpointError, match="no CLIP or SigLIP vision tower"):
        clip_from_state_dict({"a": torch.zeros(1)}, "clip")
    with pytest.raises(CheckpointError, match="does not know: something"):
        clip_from_state_dict({**state, "something": torch.zeros(1)}, "clip")
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"missing: blocks.1.attn.qkv.bias"):
        clip_from_state_dict(state, "clip")


def test_a_tower_is_published_and_loads_again(tmp_path):
    tower, _ = clip_from_state_dict(clip().state_dict(), "tokenflow")
    again = tokgen.load(tower.save_pretrained(tmp_path))
    x = torch.rand(1, 3, 40, 32)
    assert isinstance(again, ClipViT) and torch.equal(again.features(x), tower.features(x))
    with pytest.raises(ConfigError, match="quick_gelu"):
        ClipViTConfig(activation="relu")
    with pytest.raises(ConfigError, match="multiple of heads"):
        ClipViTConfig(dim=100)
