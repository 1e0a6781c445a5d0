"""LlamaGen's tokenizers (VQ-16, VQ-8): latents, ids and pixels of the published code."""

from __future__ import annotations

import pytest
import reference
import torch

from tokgen.importers.llamagen import vq_from_state_dict
from tokgen.tokenizers.vqgan import VQGAN, VQGANConfig
from tokgen.tokens import Grid, Tokens

CASES = r"llamagen_vq\d+.*"


@torch.no_grad()
def test_numbers_are_the_published_ones(parity_case, close):
    case, expected = parity_case
    tokenizer, report = vq_from_state_dict(reference.state_dict(case))
    assert set(report.mapped) | set(report.ignored) == set(case["keys"])
    config = case["config"]["VQModel"]
    assert tokenizer.config.channel_mult == tuple(config["encoder_ch_mult"])
    assert tokenizer.codebook_sizes == (config["codebook_size"],)

    inputs = reference.inputs(case)
    pixels = (inputs["image"] + 1) / 2
    latent = tokenizer.encode_features(pixels)  # (B, h, w, d)
    close(case, expected, "latent", latent.permute(0, 3, 1, 2))
    quantized = tokenizer.quantizer(latent)
    safe = expected["ids_safe"]
    assert torch.equal(quantized.ids[safe], expected["ids"][safe])
    close(case, expected, "quantized", quantized.codes.permute(0, 3, 1, 2))
    close(case, expected, "reconstruction", tokenizer.decode_features(quantized.codes) * 2 - 1)

    ids = inputs["code_ids"]
    tokens = Tokens(ids.flatten(1), Grid(*ids.shape[1:]), tokenizer.codebook_sizes)
    close(case, expected, "decode_ids", tokenizer.detokenize(tokens) * 2 - 1)


@pytest.mark.parametrize(
    "config, parameters", [(VQGANConfig(), 71_883_403), (VQGANConfig.vq8(), 70_109_835)], ids=["VQ-16", "VQ-8"]
)
def test_paper_size_has_the_published_parameter_count(config, parameters):

    with torch.device("meta"):
        tokenizer = VQGAN(config)
    assert sum(p.numel() for p in tokenizer.parameters()) == parameters
