"""What is particular to TokenFlow: two streams, prefixes, the teacher's features, baselines, the encoder that is trained."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

import tokgen
from tokgen.encoders.base import build_encoder
from tokgen.errors import ConfigError, InputError
from tokgen.tokenizers.tokenflow import SemanticDecoder, TokenFlow, TokenFlowConfig
from tokgen.tokens import Grid, Scales, Tokens

N = 1 + 4 + 16


def tiny(example: str = "shared", **changes) -> TokenFlow:
    torch.manual_seed(0)
    return TokenFlow(dataclasses.replace(TokenFlow.example_configs()[example], **changes))


def pixels(model: TokenFlow, batch: int = 3) -> torch.Tensor:
    return model.example_pixels(batch)


@pytest.mark.parametrize(
    "config, size, ids",
    [
        (TokenFlowConfig(), 224, 561),
        (TokenFlowConfig.clipb(256, enhanced=True), 256, 817),
        (TokenFlowConfig.vitamin(), 256, 817),
        (TokenFlowConfig.siglip(), 384, 2227),
    ],
    ids=["B", "B 256", "L", "XL"],
)
def test_paper_sizes(config, size, ids):
    assert config.image_size == size and Scales(config.scales).length == ids
    assert config.code_dim == 40 and config.quantizer["codebook_size"] == 32768


def test_ids_are_scales_and_every_prefix_decodes():
    model = tiny().eval()
    tokens = model.encode(pixels(model))
    assert tokens.layout == Scales((1, 2, 4)) and tokens.ids.shape == (3, N)
    pictures = model.progressive(tokens)
    assert pictures.shape == (3, 3, 3, 32, 32)
    for picture, n in zip(pictures, tokens.layout.prefixes()):
        assert torch.equal(picture, model.decode(tokens.prefix(n)))
    assert model.progressive(tokens.prefix(5)).shape[0] == 2
    assert model.decode_features(tokens.prefix(1)).shape == (3, 16, 24)


def test_tokens_of_another_layout_are_refused():
    model = tiny().eval()
    ids = torch.zeros(1, 16, dtype=torch.int64)
    with pytest.raises(ConfigError, match="Scales"):
        model.decode(Tokens(ids, Grid(4, 4), model.codebook_sizes))
    with pytest.raises(InputError, match="do not end with a scale"):
        model.decode(Tokens(ids[:, :3], Scales((1, 2, 4)), model.codebook_sizes))


def test_a_language_model_reads_the_sum_of_the_scales():
    model = tiny().eval()
    x = pixels(model)
    tokens = model.encode(x)
    with torch.no_grad():
        out = model(x)
    assert model.code_dim == 18 and out.codes.shape == (3, 16, 18)
    assert torch.equal(model.embeddings(tokens), out.codes)
    table = model.codebook_table()
    assert table.shape == (64, 18)
    for part in table.split((12, 6), 1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(64))
    first = table[tokens.ids[:, 0]]  # (B, 18): one vector everywhere
    torch.testing.assert_close(model.embeddings(tokens.prefix(1)), first[:, None].expand(3, 16, 18))


def test_separate_indices_are_two_and_have_no_table():
    model = tiny("separate").eval()
    tokens = model.encode(pixels(model))
    assert tokens.ids.shape == (3, N, 2) and model.codebook_sizes == (64, 64)
    assert float(tokens.bits[0]) == 2 * N * 6
    with pytest.raises(ConfigError, match="no table"):
        model.codebook_table()


@pytest.mark.parametrize("loss, scale", [("cosine", 1.0), ("l2", 2.0)])
def test_the_semantic_loss_is_that_of_the_mean_cosine(loss, scale):
    model = tiny(semantic_loss=loss, semantic_weight=0.5, scale_dropout=0.0).train()
    x, target = pixels(model), torch.randn(3, 16, 24)
    out = model(x, target=target)
    features = model.decode_semantics(out.codes.unflatten(1, (4, 4)))
    assert set(out.losses) == {"codebook", "commitment", "semantic"}
    if loss == "cosine":
        expected = 1 - torch.cosine_similarity(features, target, -1).mean()
    else:
        unit = torch.nn.functional.normalize
        expected = (unit(features, dim=-1) - unit(target, dim=-1)).square().sum(-1).mean()
    torch.testing.assert_close(out.losses["semantic"], 0.5 * expected)
    assert out.stats["semantic_cosine"].item() == pytest.approx(
        1 - float(out.losses["semantic"].detach()) / 0.5 / scale, abs=1e-5
    )


@torch.no_grad()
def test_eval_reports_one_cosine_a_picture():
    model = tiny().eval()
    x = pixels(model)
    target = torch.randn(3, 17, 24)  # with a class token, which is left out
    out = model(x, target=target)
    assert not out.losses and model.reports == ("semantic_cosine",)
    expected = torch.cosine_similarity(model.decode_features(model.encode(x)), target[:, 1:], -1).mean(1)
    torch.testing.assert_close(out.stats["semantic_cosine"], expected)
    assert "semantic_cosine" not in model(x).stats
    with pytest.raises(ConfigError, match=r"target_dim and the last of config.scales"):
        model(x, target=torch.randn(3, 16, 23))
    with pytest.raises(ConfigError, match=r"target_dim and the last of config.scales"):
        model(x, target=torch.randn(3, 24))


def gradients(model: TokenFlow, term: str) -> set[str]:
    """Top-level parts that a term of the loss trains."""
    x = pixels(model)
    model.zero_grad()
    out = model(x, target=torch.randn(3, 16, 24))
    loss = (out.reconstruction - x).square().mean() if term == "pixels" else out.losses[term]
    loss.backward()
    return {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


SEMANTIC, PIXEL = {"semantic_encoder", "encode_task"}, {"encoder", "pre_quant"}
TO_PIXELS, TO_FEATURES = {"post_quant", "decoder"}, {"semantic_decoder", "decode_task"}


def test_each_stream_learns_from_its_own_loss_and_the_codebook_from_both():
    model = tiny(scale_dropout=0.0).train()
    assert gradients(model, "pixels") == PIXEL | TO_PIXELS
    assert gradients(model, "semantic") == SEMANTIC | TO_FEATURES
    assert gradients(model, "codebook") == {"quantizer"}
    assert gradients(model, "commitment") == SEMANTIC | PIXEL


@pytest.mark.parametrize(
    "example, there, gone, probe, term",
    [
        ("pixel", PIXEL, SEMANTIC, TO_FEATURES, "semantic"),
        ("semantic", SEMANTIC, PIXEL, TO_PIXELS, "pixels"),
    ],
)
def test_without_a_stream_its_decoder_is_a_probe_of_the_other(example, there, gone, probe, term):
    model = tiny(example, scale_dropout=0.0).train()
    children = {name for name, child in model.named_children() if child is not None}
    assert there <= children and not gone & children
    assert gradients(model, term) == probe  # nothing reaches the codes
    assert gradients(model, "commitment") == there
    assert model.codebook_sizes == (64,)


def test_all_that_is_trained_gets_a_gradient_and_the_text_tower_is_left_alone():
    model = tiny(scale_dropout=0.0).train()
    x = pixels(model)
    out = model(x, target=torch.randn(3, 16, 24))
    ((out.reconstruction - x).square().mean() + sum(out.losses.values())).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    frozen = {name for name, p in model.semantic_encoder.named_parameters() if not p.requires_grad}
    assert frozen and all("text" in name or "projection" in name or name == "log_scale" for name in frozen)
    trained = {name.partition(".")[0] for name, p in model.semantic_encoder.named_parameters() if p.requires_grad}
    assert trained == {"patches", "image_layers", "image_norm"}


def test_a_dropped_scale_is_masked_in_the_tokens():
    model = tiny(scale_dropout=0.9).train()
    x = pixels(model)
    while (tokens := model(x).tokens).mask.all():
        pass
    assert tokens.lengths.unique().numel() == 1 and not tokens.ids[~tokens.mask].any()
    assert model.eval()(x).tokens.mask.all()


def test_it_starts_from_a_published_encoder_and_needs_it_no_more(tmp_path):
    torch.manual_seed(3)
    eye = build_encoder(TokenFlow.example_configs()["shared"].semantic_encoder)
    eye.save_pretrained(tmp_path / "eye")
    model = tiny(semantic_encoder={"pretrained": str(tmp_path / "eye")}).eval()
    for (name, p), q in zip(model.semantic_encoder.named_parameters(), eye.parameters()):
        assert torch.equal(p, q), name
    assert str(tmp_path) not in str(model.config)
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "eye")
    again = tokgen.load(tmp_path / "model")
    assert again.fingerprint == model.fingerprint
    x = pixels(model)
    assert torch.equal(again.decode(again.encode(x)), model.decode(model.encode(x)))


def test_an_encoder_of_timm_can_be_trained_inside():
    # as variant L has it: only what features need is trained, here without the final norm
    encoder = {"type": "timm", "name": "test_vit", "args": {"img_size": 64, "final_norm": False}}
    model = tiny(semantic_encoder=encoder, image_size=64, patch=8).train()
    out = model(pixels(model), target=torch.randn(3, 16, 24))
    sum(out.losses.values()).backward()
    inside = dict(model.semantic_encoder.named_parameters())
    assert all((p.grad is not None) == p.requires_grad for p in inside.values())
    assert sum(p.requires_grad for p in inside.values()) > 10


def test_interpolated_positions_are_those_of_the_published_call():
    from tokgen.nn.vit import resized_positions

    positions = torch.randn(1, 196, 8)
    got = resized_positions(positions, 16)
    grid = positions.reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
    by_scale = torch.nn.functional.interpolate(grid, scale_factor=(16.1 / 14, 16.1 / 14), mode="bicubic")
    by_size = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bicubic")
    assert torch.equal(got, by_scale.permute(0, 2, 3, 1).reshape(1, 256, 8))
    assert (by_scale - by_size).abs().max() > 0.01  # not a plain resize
    assert resized_positions(positions, 14) is positions


def test_the_semantic_decoder_starts_as_published():
    torch.manual_seed(0)
    decoder = SemanticDecoder(8, 4, 64, 4, 3, 4)
    for i, block in enumerate(decoder.blocks, 1):
        assert float(block.attn.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert float(weight.detach().std()) == pytest.approx(0.02 / (2 * i) ** 0.5, rel=0.1)
        assert not block.mlp.fc1.bias.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 48}, "needs 32 px"),
        ({"scales": (1, 2, 3)}, "needs 24 px"),
        ({"scales": (1, 2, 8), "patch": 2}, "features of 16 places, and the last scale has 8 x 8"),
        ({"semantic_dim": 0, "pixel_dim": 0}, "one of them at least 1"),
        ({"semantic_loss": "l1"}, "'cosine' or 'l2'"),
        ({"decoder_heads": 3}, "multiple of decoder_heads 3"),
        ({"scales": ()}, "name one number at least"),
        ({"quantizer": {"type": "dual-vq", "codebook_size": 64, "indeks": "shared"}}, "no option 'indeks'"),
    ],
)
def test_bad_configurations_get_one_clear_error(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("resolution", [128, 512])
def test_variant_b_has_two_sizes(resolution):
    with pytest.raises(ConfigError, match="224 or 256"):
        TokenFlowConfig.clipb(resolution)


def test_other_quantizers_fit_too():
    model = tiny(quantizer={"type": "fsq", "levels": [5, 5, 5]}).eval()
    x = pixels(model)
    with torch.no_grad():
        assert torch.equal(model.decode(model.encode(x)), model(x).reconstruction)
