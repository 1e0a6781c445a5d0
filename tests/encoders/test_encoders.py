"""Encoders by name, and the package's own contrastive one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokgen
from tokgen.encoders.base import build_encoder, load_encoder, load_teacher
from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.errors import CheckpointError, ConfigError, InputError, TokgenError
from tokgen.text import TextTokenizer

CAPTIONS = ["red heart, 3d style", "cat", "a much longer caption of a blue fish, flat style", ""]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    text = TextTokenizer.train(CAPTIONS, 280)
    config = ContrastiveConfig(16, 4, 32, 2, 32, 2, 2, 24, text_vocab=280, max_text=60)
    encoder = ContrastiveEncoder(config, text)
    for p in encoder.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return encoder.eval()


@torch.no_grad()
def test_embeddings_do_not_depend_on_the_batch_or_the_dtype_of_pixels(encoder):
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    together = encoder.embed(pixels)
    assert together.shape == (4, encoder.dim) and together.std(0).min() > 1e-3
    assert torch.allclose(encoder.embed(pixels[2:3]), together[2:3], atol=1e-5)
    assert torch.allclose(encoder.embed(pixels.float() / 255), together, atol=1e-5)
    texts = encoder.encode_text(CAPTIONS)
    assert torch.allclose(encoder.encode_text(CAPTIONS[1:2]), texts[1:2], atol=1e-5)  # padding changes nothing
    assert not torch.allclose(texts[0], texts[1], atol=1e-2)


@torch.no_grad()
def test_places_are_told_apart(encoder):
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., :4, :4] = 1
    assert encoder.features(pixels).shape == (1, 16, 32)
    assert not torch.allclose(encoder.embed(pixels), encoder.embed(pixels.flip(-1)), atol=1e-3)


@torch.no_grad()
def test_published_encoder_embeds_the_same(encoder, tmp_path):
    pixels = torch.rand(2, 3, 20, 12)  # resized by the encoder
    encoder.save_pretrained(tmp_path / "teacher")
    for again in (load_encoder(tmp_path / "teacher"), tokgen.load(tmp_path / "teacher")):
        assert torch.equal(again.embed(pixels), encoder.embed(pixels))
        assert torch.equal(again.encode_text(CAPTIONS), encoder.encode_text(CAPTIONS))
    assert again.name == "contrastive encoder teacher"
    assert not any(p.requires_grad for p in load_encoder(tmp_path / "teacher").parameters())


def test_bad_input_is_named(encoder, tmp_path):
    with pytest.raises(InputError, match=r"\(2, 16, 16\)"):
        encoder.embed(torch.rand(2, 16, 16))
    with pytest.raises(InputError, match="int64"):
        encoder.embed(torch.zeros(1, 3, 16, 16, dtype=torch.int64))
    with pytest.raises(ConfigError, match="no text vocabulary"):
        ContrastiveEncoder(encoder.config).encode_text(["cat"])
    with pytest.raises(ConfigError, match="patch=5"):
        ContrastiveEncoder(ContrastiveConfig(image_size=16, patch=5))
    with pytest.raises(TokgenError, match="nowhere"):
        load_encoder(tmp_path / "nowhere")


def test_a_tokenizer_is_no_encoder(tmp_path):
    from tokgen.tokenizers.vqgan import VQGAN, VQGANConfig

    VQGAN(VQGANConfig(32, (1,), 1, 32, 4, patch=4)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="expected an image encoder"):
        load_encoder(tmp_path)


# -- other projects' models, small and random, in their own layout -------------------------------------------------------


def clip_folder(tmp_path, projected=False):
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 20}  # fmt: skip
    torch.manual_seed(0)
    if projected:
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
    else:
        text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 20}  # fmt: skip
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
        )
    model.save_pretrained(tmp_path)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("projected", [False, True])
def test_clip_embeds_after_the_visual_projection(tmp_path, projected):
    model = clip_folder(tmp_path, projected)
    encoder = load_encoder(tmp_path)
    assert encoder.dim == 20
    pixels = torch.rand(2, 3, 16, 16)
    x = (pixels - encoder.mean) / encoder.std
    hidden = model.vision_model(pixel_values=x)
    assert torch.allclose(encoder.embed(pixels), model.visual_projection(hidden.pooler_output), atol=1e-5)
    assert torch.allclose(encoder.features(pixels), hidden.last_hidden_state[:, 1:], atol=1e-5)
    assert torch.equal(load_encoder(f"transformers:{tmp_path}").embed(pixels), encoder.embed(pixels))


@torch.no_grad()
def test_dinov2_embeds_by_its_class_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)  # fmt: skip
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    pixels = torch.rand(2, 3, 16, 16)
    hidden = model((pixels - encoder.mean) / encoder.std).last_hidden_state
    assert torch.allclose(encoder.embed(pixels), hidden[:, 0], atol=1e-5)
    assert encoder.features(pixels).shape == (2, 16, 32)


@torch.no_grad()
def test_timm_by_name():
    pytest.importorskip("timm")
    from tokgen.encoders.published import TimmEncoder

    encoder = TimmEncoder("vit_tiny_patch16_224", pretrained=False).eval()
    pixels = torch.rand(1, 3, 64, 64)
    assert encoder.embed(pixels).shape == (1, encoder.dim) == (1, 192)
    assert encoder.features(pixels).shape == (1, 196, 192)
    with pytest.raises(CheckpointError, match="timm:no_such_model"):
        load_encoder("timm:no_such_model")


# -- inside tokenizers ---------------------------------------------------------------------------------------------------


def vit_folder(folder, half=False):
    """A ViT of transformers with an image processor of its own; in half precision if wanted."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)  # fmt: skip
    model = transformers.ViTModel(config)
    (model.half() if half else model).save_pretrained(folder)
    mean = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, **mean).save_pretrained(folder)


def timm_folder(folder):
    timm = pytest.importorskip("timm")
    args = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=3, **args)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "input_size": (3, 32, 32)}
    timm.models.save_for_hf(model, folder, model_args=args, safe_serialization=True)


def tokenizer_with(encoder):
    from tokgen.tokenizers.seed import SEED

    small = dataclasses.asdict(SEED.example_configs()["mlp"])
    return SEED(SEED.config_class(**{**small, "encoder": encoder, "image_size": 28})).eval()


READ = """
import sys, torch, tokgen
tokenizer = tokgen.load(sys.argv[1])
pixels = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    features, embedding = tokenizer.encoder.features(pixels), tokenizer.encoder.embed(pixels)
about = {"fingerprint": tokenizer.encoder.fingerprint, "tokenizer": tokenizer.fingerprint, "name": tokenizer.encoder.name}
torch.save({"features": features, "embedding": embedding, "ids": tokenizer.encode(pixels).ids, **about}, sys.argv[3])
"""


@pytest.mark.parametrize("kind", ["timm", "timm folder", "clip", "clip projected", "vit", "vit half"])
def test_a_tokenizer_keeps_its_encoder_without_the_folder_it_came_from(tmp_path, kind):
    """Saved, its origin deleted, and loaded by another process: the same features to the bit."""
    origin, moved = tmp_path / "origin" / "encoder", tmp_path / "elsewhere" / "other_name"
    origin.mkdir(parents=True)
    if kind == "timm":
        pytest.importorskip("timm")
        spec = {"type": "timm", "name": "vit_tiny_patch16_224", "args": {"depth": 1, "img_size": 32}}
    elif kind == "timm folder":
        timm_folder(origin)
        spec = {"pretrained": f"timm:local-dir:{origin}"}
    else:
        make = {"clip": clip_folder, "clip projected": lambda f: clip_folder(f, True), "vit": vit_folder}
        make.get(kind, lambda f: vit_folder(f, half=True))(origin)
        spec = {"pretrained": f"transformers:{origin}"}
    tokenizer = tokenizer_with(spec)
    encoder = tokenizer.encoder
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training
    assert str(tmp_path) not in json.dumps(encoder.spec())  # nothing of this machine
    pixels = torch.rand(2, 3, 28, 28)
    assert tuple(encoder.features(pixels).shape[1:]) == tuple(encoder.feature_shape)
    if kind == "timm folder":
        assert (encoder.feature_shape, list(encoder.pixel_mean)) == ((4, 48), [0.1, 0.2, 0.3])
    if kind.startswith("vit"):
        assert encoder.pixel_std == [0.26862954, 0.26130258, 0.27577711]
        assert all(p.dtype == torch.float32 for p in encoder.parameters())
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    if "pretrained" in spec:
        moved.parent.mkdir()
        origin.rename(moved)  # what it came from is gone
        again = load_encoder(spec["pretrained"].replace(str(origin), str(moved)))
        assert again.fingerprint == encoder.fingerprint  # and is known again by its weights
    torch.save(pixels, tmp_path / "pixels.pt")
    (tmp_path / "read.py").write_text(READ)
    words = [tmp_path / "read.py", tmp_path / "tokenizer", tmp_path / "pixels.pt", tmp_path / "out.pt"]
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(found["features"], encoder.features(pixels))
        assert torch.equal(found["embedding"], encoder.embed(pixels))
    assert torch.equal(found["ids"], tokenizer.encode(pixels).ids)
    assert (found["fingerprint"], found["tokenizer"]) == (encoder.fingerprint, tokenizer.fingerprint)
    assert found["name"] == encoder.name


def test_the_fingerprint_is_that_of_the_weights(tmp_path):
    clip_folder(tmp_path / "clip")
    one = load_encoder(tmp_path / "clip")
    before = one.fingerprint
    with torch.no_grad():
        next(one.model.vision_model.parameters()).view(-1)[0].add_(1)
    assert one.fingerprint != before
    other = build_encoder({**one.spec(), "mean": [0.0, 0.0, 0.0]})
    other.load_state_dict(one.state_dict())
    assert other.fingerprint != one.fingerprint  # the same weights on other pixels are another encoder


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"type": "timm"}, "'name' is missing"),
        ({"type": "timm", "name": "no_such_model"}, "no_such_model"),
        ({"type": "timm", "name": "vit_tiny_patch16_224", "size": 3}, "unknown key 'size'"),
        ({"type": "transformers", "name": "some/model"}, "pretrained: transformers:NAME"),
        ({"type": "resnet"}, "of type 'resnet'"),
        ({"pretrained": "mobilenet", "type": "timm"}, "stands alone"),
    ],
)
def test_a_wrong_configuration_of_an_encoder_is_one_line(spec, message):
    with pytest.raises(TokgenError, match=message) as error:
        build_encoder(spec)
    assert "\n" not in str(error.value)


def test_a_configuration_runs_no_code_but_models(tmp_path):
    clip_folder(tmp_path / "clip")
    spec = load_encoder(tmp_path / "clip").spec()
    for name in ("CLIPTokenizer", "pipeline", "no such"):
        with pytest.raises(ConfigError, match=f"no model '{name}'"):
            build_encoder({**spec, "class": name})
    with pytest.raises(ConfigError, match="no_such_type"):
        build_encoder({**spec, "model_type": "no_such_type"})


# -- teachers ------------------------------------------------------------------------------------------------------------


def clip_text_folder(folder, half=False):
    """A CLIP text model of 12 places with its byte-pair vocabulary."""
    transformers = pytest.importorskip("transformers")
    words = ["a</w>", "ca", "cat</w>", *"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "bcdefghijklmnopqrstuvwxyz")]  # fmt: skip
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>")])
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": len(words), "eos_token_id": len(words) + 1, "pad_token_id": len(words) + 1}
    config = transformers.CLIPTextConfig(vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12, **ids)  # fmt: skip
    model = transformers.CLIPTextModel(config).eval()
    (model.half() if half else model).save_pretrained(folder)
    return model, tokenizer


@torch.no_grad()
def test_clip_text_states_are_those_that_diffusion_models_read(tmp_path):
    """All 12 places, the padding included and not masked."""
    model, tokenizer = clip_text_folder(tmp_path / "text")
    teacher = load_teacher(f"clip-text:{tmp_path / 'text'}")
    captions = ["a red cat", "", "a cat a cat a cat a cat a cat a cat a cat a cat"]
    states = teacher({"caption": captions})
    assert states.shape == (3, 12, 16)
    for caption, state in zip(captions, states):
        ids = tokenizer(caption).input_ids
        ids = (ids if len(ids) <= 12 else [*ids[:11], tokenizer.eos_token_id]) + [tokenizer.eos_token_id] * 12
        assert ids[0] == tokenizer.bos_token_id
        expected = model(input_ids=torch.tensor([ids[:12]])).last_hidden_state[0]
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(states[0], states[1], atol=1e-2)
    assert not any(p.requires_grad for p in teacher.parameters())
    clip_text_folder(tmp_path / "half", half=True)
    assert load_teacher(f"clip-text:{tmp_path / 'half'}")({"caption": ["a"]}).dtype == torch.float32


def test_what_is_no_teacher_is_said(tmp_path):
    clip_folder(tmp_path / "clip")
    for name in (tmp_path / "clip", tmp_path / "nowhere"):  # a CLIP without vocabulary, and nothing
        with pytest.raises(CheckpointError, match="no CLIP text model with its vocabulary at") as error:
            load_teacher(f"clip-text:{name}")
        assert "\n" not in str(error.value)
    teacher, encoder = load_teacher(str(tmp_path / "clip")), load_encoder(tmp_path / "clip")
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(teacher({"pixels": pixels, "caption": ["", ""]}), encoder.embed(pixels))
