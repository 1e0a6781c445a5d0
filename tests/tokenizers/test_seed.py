"""`SEED`: causality, what each stage trains, retrieval by code, and drawing with a diffusion pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import tokgen
from tokgen.errors import ConfigError, InputError, TokenizerMismatch
from tokgen.text import TextTokenizer
from tokgen.tokenizers.seed import SEED, SeedConfig
from tokgen.tokenizers.semantic import in_eval_mode, parameters_of
from tokgen.tokens import Sequence, Tokens

ROOT = Path(__file__).parent.parent.parent
CONFIGS = SEED.example_configs()
WORDS = ["red heart", "blue fish", "green cat", "dark sky"]


@pytest.fixture(scope="module")
def vocabulary():
    return TextTokenizer.train(WORDS, 280)


def build(name: str = "text", text: TextTokenizer | None = None, **changes) -> SEED:
    torch.manual_seed(0)
    return SEED(replace(CONFIGS[name], **changes), text)


def colours(batch: int = 4, side: int = 28) -> torch.Tensor:
    """Pictures of one colour each, with a little noise."""
    base = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9], [0.1, 0.8, 0.2], [0.1, 0.1, 0.1]])
    pixels = base.repeat(-(-batch // 4), 1)[:batch, :, None, None].expand(-1, -1, side, side)
    return (pixels + 0.05 * torch.rand(batch, 3, side, side)).clamp(0, 1)


def batch_for(seed: SEED, batch: int = 4) -> dict:
    target = torch.randn(batch, 5, 16) if seed.config.target == "text_states" else torch.randn(batch, 16)
    return {"pixels": colours(batch), "caption": WORDS[:batch], seed.config.target: target}


# -- the sequence -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_codes_are_causal():
    """A query reaches only the vectors after it, at 32 queries as at any other number."""
    for queries in (32, 21):
        seed = build("mlp", queries=queries).eval()
        features = seed.encoder.features(colours())
        z = seed.encode_task(seed.query_features(features))
        seed.qformer.queries[:, 20].normal_()
        after = seed.encode_task(seed.query_features(features))
        assert torch.equal(z[:, :20], after[:, :20]) and not torch.equal(z[:, 20], after[:, 20])
    seed = build("bidirectional").eval()  # 32 queries too
    z = seed.query_features(features)
    seed.qformer.queries[:, 20].normal_()
    assert not torch.equal(z[:, 0], seed.query_features(features)[:, 0])


def test_layout_and_widths():
    seed = build("mlp").eval()
    tokens = seed.encode(colours(3))
    assert tokens.layout == Sequence(8) and tokens.ids.shape == (3, 8) and tokens.codebook_sizes == (64,)
    assert seed.decode_features(tokens).shape == seed.reconstruct_queries(tokens).shape == (3, 8, 48)
    assert seed.generation_embedding(tokens).shape == (3, 16)
    assert build("v1").eval().generation_embedding(tokens).shape == (3, 5, 16)
    assert build("reverse").eval().generation_embedding(tokens).shape == (3, 16)


@torch.no_grad()
def test_an_item_does_not_depend_on_its_batch(vocabulary):
    seed = build(text=vocabulary).eval()
    pixels = colours()
    tokens = seed.encode(pixels)
    assert torch.equal(seed.encode(pixels[2:3]).ids, tokens.ids[2:3])
    for what in (seed.generation_embedding, seed.code_embedding, seed.reconstruct_queries):
        assert torch.allclose(what(tokens[2]), what(tokens)[2:3], atol=1e-5)
    assert torch.allclose(seed.encode_text(WORDS[2:3]), seed.encode_text([*WORDS, "long fish"])[2:3], atol=1e-5)


def test_mistakes_are_named_in_one_line(vocabulary):
    seed = build("mlp").eval()
    tokens = seed.encode(colours(2))
    short = Tokens(tokens.ids[:, :5], tokens.layout, tokens.codebook_sizes)
    cases = [
        (lambda: seed.encode(torch.rand(1, 3, 32, 32)), InputError, "takes 28 x 28; resize them first"),
        (lambda: seed.decode(short), InputError, "SEED decodes 8 tokens a picture; got 5"),
        (lambda: seed.generation_embedding(replace(short, mask=torch.rand(2, 5) > 2)), InputError, "got 0"),
        (lambda: seed.encode_text(["a"]), ConfigError, "no text side"),
        (lambda: seed.image_embedding(colours()), ConfigError, "no text side"),
        (lambda: seed.stage_modules("contrastive"), ConfigError, "config.text_vocab"),
        (
            lambda: seed.stage_modules("nothing"),
            ConfigError,
            "no stage 'nothing'; expected one of contrastive, codebook",
        ),
        (lambda: build().encode_text(["a"]), ConfigError, "no text vocabulary"),
        (lambda: SeedConfig(target="words"), ConfigError, "expected 'image_embedding' or 'text_states'"),
        (lambda: SeedConfig(detok_head="conv"), ConfigError, "expected 'mlp' or 'reverse_qformer'"),
        (lambda: SeedConfig.v1(detok_head="mlp"), ConfigError, "needs detok_head 'reverse_qformer'"),
        (lambda: SeedConfig(detok_head="reverse_qformer", reverse_queries=2), ConfigError, "needs reverse_queries 1"),
        (lambda: SeedConfig(decoder_heads=7), ConfigError, "decoder_heads 7"),
        (lambda: SeedConfig(queries=0), ConfigError, "SeedConfig.queries is 0"),
    ]
    for mistake, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            mistake()
        assert "\n" not in str(error.value)
    batch = {**batch_for(seed), "image_embedding": torch.randn(4, 7)}
    with pytest.raises(ConfigError, match=r"gives \(4, 7\) for a batch, and SEED \(4, 16\)"):
        seed.stage_step("codebook", batch)


def test_recipes_have_the_sizes_that_the_card_gives():
    recipes = {}
    for name in ("seed", "seed-tiny"):
        recipe = yaml.safe_load((ROOT / f"tokenizers/{name}.yaml").read_text())["model"]["init_args"]
        recipes[name] = recipe["tokenizer"]["init_args"]["config"]
        assert [stage["name"] for stage in recipe["stages"]] == list(SEED.stages)
        assert list(recipe["teachers"]) == ["image_embedding"]
    extra = {"encoder", "text_vocab", "max_text", "text_end", "embed_dim", "pixel_decoder"}
    assert SeedConfig(**{k: v for k, v in recipes["seed"].items() if k not in extra}) == SeedConfig()
    tiny = recipes["seed-tiny"]
    tiny["encoder"] = {"pretrained": str(ROOT / tiny["encoder"]["pretrained"])}
    seed = SEED(SeedConfig(**tiny)).eval()
    assert seed.qformer.layers[0].cross.key.in_features == 128
    tokens = seed.encode(colours(2, 64))
    assert tokens.bits.tolist() == [320.0, 320.0]
    assert seed.decode(tokens).shape == (2, 3, 64, 64) and seed.generation_embedding(tokens).shape == (2, 128)


def test_paper_and_first_version():
    assert SeedConfig().queries == 32 and SeedConfig().quantizer["codebook_size"] == 8192
    first = SeedConfig.v1(queries=16)
    assert (first.target, first.target_dim, first.reverse_queries, first.queries) == ("text_states", 768, 77, 16)


def test_captions_end_as_bert_wants_them(vocabulary):
    plain, ended = build(text=vocabulary), build(text=vocabulary, text_end=5)
    ids, mask = plain.text_ids(["red", "red heart"])
    with_end, with_mask = ended.text_ids(["red", "red heart"])
    for row in range(2):
        assert with_end[row][with_mask[row]].tolist() == [*ids[row][mask[row]].tolist(), 5]
    fresh = TextTokenizer.train(WORDS, 280)  # it warns once
    with pytest.warns(UserWarning, match="longer than"):
        long, _ = build(text=fresh, text_end=5).text_ids(["many words " * 20])
    assert long.shape == (1, 12) and long[0, -1] == 5


# -- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SEED.stages)
@pytest.mark.parametrize("name", ["text", "v1"])
def test_gradients_reach_what_the_stage_trains_and_nothing_else(name, stage, vocabulary):
    seed = build(name, vocabulary, text_vocab=280).train()
    assert not any(p.requires_grad for p in seed.encoder.parameters())
    output = seed.stage_step(stage, batch_for(seed))
    loss = sum(output.losses.values()) if stage != "pixels" else output.reconstruction.square().mean()
    loss.backward()
    reached = {n for n, p in seed.named_parameters() if p.grad is not None}
    trained = {id(p) for p in parameters_of(seed.stage_modules(stage))}
    assert reached == {n for n, p in seed.named_parameters() if id(p) in trained}
    assert not any(part.training for part in seed.encoder.modules())
    assert all(part.training for n, part in seed.named_modules() if not n.startswith("encoder"))


@pytest.mark.parametrize("stage", SEED.stages)
def test_stages_run_in_bf16_with_fp32_losses(stage, vocabulary):
    seed = build(text=vocabulary, dropout=0.0).train()
    batch = batch_for(seed)
    full = seed.stage_step(stage, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = seed.stage_step(stage, batch)
    assert half.losses.keys() == full.losses.keys()
    for name, loss in half.losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, full.losses[name], rtol=0.05, atol=0.02)


def test_stages_need_their_teachers():
    image, first = build("text"), build("v1")
    assert [image.stage_needs(s) for s in SEED.stages] == [("caption",), ("image_embedding",), ()]
    assert first.stage_needs("codebook") == ("caption", "text_states")


def test_no_dropout_in_what_a_stage_builds_on(vocabulary):
    seed = build("mlp", dropout=0.5).train()
    batch = batch_for(seed)
    first, second = seed.stage_step("codebook", batch), seed.stage_step("codebook", batch)
    assert torch.equal(first.tokens.ids, second.tokens.ids)
    assert {k: v.item() for k, v in first.losses.items()} == {k: v.item() for k, v in second.losses.items()}
    first, second = seed.stage_step("pixels", batch), seed.stage_step("pixels", batch)
    assert torch.equal(first.reconstruction, second.reconstruction)
    contrast = build(text=vocabulary, dropout=0.5).train()
    losses = [contrast.stage_step("contrastive", batch).losses["contrastive"] for _ in range(2)]
    assert losses[0] != losses[1]


def test_the_pixel_stage_leaves_moving_averages_alone():
    quantizer = {"type": "vq", "codebook_size": 64, "update": "ema", "revive_below": 0.1}
    seed = build("mlp", quantizer=quantizer).train()
    before = {k: v.clone() for k, v in seed.quantizer.state_dict().items()}
    seed.stage_step("pixels", batch_for(seed))
    assert all(torch.equal(v, before[k]) for k, v in seed.quantizer.state_dict().items())
    assert seed.quantizer.training


def test_eval_mode_is_given_back_as_it_was():
    seed = build("mlp").train()
    seed.reconstruction.eval()
    with pytest.raises(ValueError), in_eval_mode(*seed.children()):
        assert seed.training and not seed.qformer.layers[0].training
        raise ValueError
    assert seed.qformer.layers[0].training and not seed.reconstruction.training and not seed.encoder.training


@pytest.mark.parametrize("name", ["mlp", "reverse", "v1"])
def test_the_codebook_stage_lowers_its_losses(name):
    seed = build(name).train()
    batch = batch_for(seed)
    optimizer = torch.optim.AdamW(parameters_of(seed.stage_modules("codebook")), lr=3e-3)
    history = []
    for _ in range(40):
        output = seed.stage_step("codebook", batch)
        optimizer.zero_grad()
        sum(output.losses.values()).backward()
        optimizer.step()
        history.append({**output.losses, **output.stats})
    assert set(history[0]) == {
        "commitment", "codebook", "sequence", "target", "usage", "perplexity", "cosine_reconstruction", "cosine_target"
    }  # fmt: skip
    assert history[-1]["sequence"] < 0.7 * history[0]["sequence"]
    assert history[-1]["target"] < history[0]["target"]
    assert history[-1]["cosine_reconstruction"] > history[0]["cosine_reconstruction"]


def test_weights_of_the_terms_are_the_published_ones():
    """5 (1.0 commitment + 0.25 codebook) + 2 (1 - cos) + 0.5 MSE, each by its formula."""
    seed = build("mlp").eval()
    batch = batch_for(seed)
    with torch.no_grad():
        sequence = seed.query_features(seed.encoder.features(batch["pixels"]))
        z = seed.encode_task(sequence)
        codes = seed.quantizer(z).codes
        error = (z - codes).square().mean()
        tokens = seed.encode(batch["pixels"])
        cosine = F.cosine_similarity(seed.reconstruct_queries(tokens), sequence, dim=-1).mean()
        target = (seed.generation_embedding(tokens) - batch["image_embedding"]).square().mean()
        losses = seed.train().stage_step("codebook", batch).losses
    expected = {"commitment": 5 * error, "codebook": 1.25 * error, "sequence": 2 * (1 - cosine), "target": 0.5 * target}
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-4, atol=1e-6)


def test_the_contrastive_stage_learns_pairs(vocabulary):
    seed = build(text=vocabulary, dropout=0.0).train()
    batch = batch_for(seed)
    optimizer = torch.optim.AdamW(parameters_of(seed.stage_modules("contrastive")), lr=2e-3)
    losses = []
    for _ in range(60):
        output = seed.stage_step("contrastive", batch)
        optimizer.zero_grad()
        output.losses["contrastive"].backward()
        optimizer.step()
        losses.append(output.losses["contrastive"].item())
    assert losses[-1] < 0.6 < 1.2 < losses[0]
    seed.eval()
    images, texts = seed.image_embedding(batch["pixels"]), seed.encode_text(WORDS)
    assert torch.allclose(images.norm(dim=1), torch.ones(4)) and torch.allclose(texts.norm(dim=1), torch.ones(4))
    assert (images @ texts.T).argmax(1).tolist() == [0, 1, 2, 3]
    pair = seed.stage_step("contrastive", batch).pair
    assert torch.allclose(pair[0], images, atol=1e-6) and torch.allclose(pair[1], texts, atol=1e-6)
    assert seed.code_embedding(seed.encode(batch["pixels"])).shape == (4, 16)


def test_features_of_the_batch_replace_the_encoder():
    seed = build("mlp").eval()
    batch = batch_for(seed)
    features = seed.encoder.features(batch["pixels"])
    seen = seed.stage_step("codebook", batch)
    given = seed.stage_step("codebook", {**batch, "features": features.half(), "pixels": None})
    assert torch.equal(seen.tokens.ids, given.tokens.ids)


def test_a_saved_tokenizer_keeps_its_words(tmp_path, vocabulary):
    seed = build(text=vocabulary).eval()
    again = tokgen.load(seed.save_pretrained(tmp_path / "seed"))
    assert again.config == seed.config and again.fingerprint == seed.fingerprint
    assert torch.equal(again.encode_text(WORDS), seed.encode_text(WORDS))


# -- drawing ----------------------------------------------------------------------------------------------------------


def text_parts(folder, width: int):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(chr(c) for c in range(97, 123)),
        *(f"{chr(c)}</w>" for c in range(97, 123)),
    ]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=5)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=5, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return tokenizer, CLIPTextModel(config)


def unet(width: int, labels: int | None):
    from diffusers import UNet2DConditionModel

    conditions = (
        {} if labels is None else {"class_embed_type": "projection", "projection_class_embeddings_input_dim": labels}
    )
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=2, cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8, **conditions,
    )  # fmt: skip


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unclip(tmp_path_factory):
    """A folder with a random StableUnCLIPImg2ImgPipeline for embeddings of 16 channels, 16 x 16 px."""
    from diffusers import DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("unclip")
    torch.manual_seed(0)
    tokenizer, text_encoder = text_parts(folder, 24)
    vision = CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        intermediate_size=16,
    )  # fmt: skip
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=16)
    torch.nn.init.normal_(normalizer.mean)
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
        image_encoder=CLIPVisionModelWithProjection(vision),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet(24, 32),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
        vae=vae(),
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def pipeline(unclip):
    from diffusers import StableUnCLIPImg2ImgPipeline

    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(unclip)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def painter(name: str = "mlp", **changes) -> SEED:
    """A tokenizer whose codes lie far apart."""
    seed = build(name, **changes).eval()
    with torch.no_grad():
        for p in (seed.quantizer.codebook.weight, seed.generation.places, seed.head.project.weight):
            p.copy_(30 * p)
    return seed


def test_a_diffusion_model_draws_batches_with_a_seed_for_each_picture(pipeline):
    seed = painter()
    tokens = seed.encode(colours())
    drawn = seed.draw(tokens, pipeline, num_inference_steps=3, generator=5)
    assert drawn.shape == (4, 3, 16, 16) and drawn.min() >= 0 and drawn.max() <= 1
    again = seed.draw(tokens, pipeline, num_inference_steps=3, generator=[5, 6, 7, 8])
    assert torch.equal(drawn, again)
    alone = seed.draw(tokens[2], pipeline, num_inference_steps=3, generator=7)
    assert torch.allclose(alone, drawn[2:3], atol=1e-4)
    other = seed.draw(tokens[2], pipeline, num_inference_steps=3, generator=8)
    assert (other - alone).abs().max() > 1e-2
    tall = seed.draw(tokens[:1], pipeline, num_inference_steps=2, height=24, width=8)
    assert tall.shape == (1, 3, 24, 8)


def test_drawing_depends_on_codes_and_guidance(pipeline):
    seed = painter()
    tokens = seed.encode(colours(1))
    other = replace(tokens, ids=(tokens.ids + 7) % 64)
    options = {"num_inference_steps": 3, "generator": 1}
    drawn = seed.draw(tokens, pipeline, **options)
    assert (seed.draw(other, pipeline, **options) - drawn).abs().max() > 1e-3
    assert torch.equal(seed.draw(tokens, pipeline, guidance_scale=10.0, **options), drawn)
    assert not torch.equal(seed.draw(tokens, pipeline, guidance_scale=3.0, **options), drawn)
    assert not torch.equal(seed.draw(tokens, pipeline, guidance_scale=1.0, **options), drawn)


def test_negative_embeddings_take_the_place_of_zeros(pipeline):
    seed = painter()
    tokens = seed.encode(colours(2))
    options = {"num_inference_steps": 2, "generator": 1}
    negative = seed.generation_embedding(tokens.__class__(torch.full_like(tokens.ids, 3), tokens.layout, (64,)))
    drawn = seed.draw(tokens, pipeline, **options)
    away = seed.draw(tokens, pipeline, negative_image_embeds=negative[:1], **options)
    assert (away - drawn).abs().max() > 1e-3
    assert torch.equal(seed.draw(tokens, pipeline, negative_image_embeds=negative, **options), away)
    assert torch.equal(seed.draw(tokens, pipeline, **options), drawn)  # nothing is left behind
    # away from the picture's own embedding, guidance has no direction but that of the prompt, "" on both sides
    own = seed.generation_embedding(tokens)
    for scale in (5.0, 10.0):
        still = seed.draw(tokens, pipeline, guidance_scale=scale, negative_image_embeds=own, **options)
        plain = seed.draw(tokens, pipeline, guidance_scale=1.0, **options)
        assert torch.allclose(still, plain, atol=1e-3)
    # without guidance there is no unguided half
    one = seed.draw(tokens, pipeline, guidance_scale=1.0, negative_image_embeds=negative, **options)
    assert torch.equal(one, seed.draw(tokens, pipeline, guidance_scale=1.0, **options))


def test_the_first_version_draws_with_text_states(tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    tokenizer, text_encoder = text_parts(tmp_path, 24)
    pipeline = StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet(24, None),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    seed = painter("v1", target_dim=24)
    tokens = seed.encode(colours(3))
    drawn = seed.draw(tokens, pipeline, num_inference_steps=2, generator=4)
    assert drawn.shape == (3, 3, 16, 16)
    alone = seed.draw(tokens[1], pipeline, num_inference_steps=2, generator=5)
    assert torch.allclose(alone, drawn[1:2], atol=1e-4)
    negative = seed.generation_embedding(tokens[0])
    away = seed.draw(tokens, pipeline, num_inference_steps=2, generator=4, negative_image_embeds=negative)
    assert (away - drawn).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="takes 24 channels, and these tokens decode to 16"):
        build("v1").eval().draw(replace(tokens, tokenizer=""), pipeline)
    with pytest.raises(ConfigError, match="takes no image embeddings"):
        painter().draw(replace(tokens, tokenizer=""), pipeline)


def test_drawing_refuses_what_does_not_fit(pipeline, unclip, tmp_path):
    seed = painter()
    tokens = seed.encode(colours(2))
    with pytest.raises(ConfigError, match="takes 16 channels, and these tokens decode to 20"):
        build("mlp", target_dim=20).eval().draw(replace(tokens, tokenizer=""), pipeline)
    with pytest.raises(InputError, match="3 seeds for 2 pictures"):
        seed.draw(tokens, pipeline, generator=[1, 2, 3])
    with pytest.raises(InputError, match="negative_image_embeds are"):
        seed.draw(tokens, pipeline, negative_image_embeds=torch.zeros(2, 7))
    with pytest.raises(TokenizerMismatch, match="made by tokenizer"):
        seed.draw(replace(tokens, tokenizer="0" * 16), pipeline)
    with pytest.raises(tokgen.errors.CheckpointError, match="no diffusion pipeline at") as error:
        seed.draw(tokens, tmp_path / "nowhere")
    assert "\n" not in str(error.value)
    by_name = seed.draw(tokens, unclip, num_inference_steps=2, generator=3)
    assert torch.equal(by_name, seed.draw(tokens, pipeline, num_inference_steps=2, generator=3))


def test_the_command_line_draws(tmp_path, unclip, capsys):
    from tokgen.cli import main
    from tokgen.images import read_image, to_uint8

    seed = build("mlp").eval()
    model, file, out = seed.save_pretrained(tmp_path / "seed"), tmp_path / "tokens.safetensors", tmp_path / "drawn.png"
    tokens = seed.encode(colours(1))
    tokens.save(file)
    command = ["decode", str(file), "--model", str(model), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--pipeline", str(unclip), "--seed", "3", "--num_inference_steps", "2"]) == 0
    drawn = to_uint8(seed.draw(tokens, unclip, num_inference_steps=2, generator=3))
    assert torch.equal(read_image(out), drawn[0])
    assert main([*command, "--guidance_scale", "3"]) == 2
    assert "give --pipeline too" in capsys.readouterr().err


# -- grounding --------------------------------------------------------------------------------------------------------


def test_grounding_reads_the_encoders_features_off_the_queries(vocabulary):
    """Without the term all queries say the same; with it the features of every place come back, and queries differ."""

    def trained(weight: float) -> tuple[float, float]:
        seed = build("grounded", vocabulary, grounding_weight=weight, feature_places=True, dropout=0.0).train()
        batch = batch_for(seed, 16)
        batch = {
            "pixels": torch.rand(16, 3, 28, 28),
            "caption": [WORDS[i % 4] + " " + "abcd"[i // 4] for i in range(16)],
        }
        optimizer = torch.optim.AdamW(parameters_of(seed.stage_modules("contrastive")), lr=2e-3)
        for _ in range(80):
            output = seed.stage_step("contrastive", batch)
            optimizer.zero_grad()
            sum(output.losses.values()).backward()
            optimizer.step()
        with torch.no_grad():
            x = seed.eval().query_features(seed.encoder.features(batch["pixels"]))
        x = F.normalize(x - x.mean(0), dim=-1)
        n = x.shape[1]
        alike = ((x @ x.transpose(1, 2)).sum((1, 2)) - n).mean() / (n * (n - 1))
        return float(alike), float(output.stats.get("cosine_features", 0.0))

    (without, _), (alike, cosine) = trained(0.0), trained(20.0)
    assert cosine > 0.4
    assert alike < without - 0.1
