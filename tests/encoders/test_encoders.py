"""Encoders by name, and the package's own contrastive one."""

from __future__ import annotations

import pytest
import torch

import tokgen
from tokgen.encoders.base import load_encoder
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
