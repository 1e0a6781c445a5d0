"""IBQ (SEED-Voken): quantizer in training with all gradients, and the whole tokenizer."""

from __future__ import annotations

import pytest
import reference
import torch

from tokgen.importers.ibq import ibq_from_state_dict
from tokgen.quantizers.ibq import IBQ
from tokgen.tokenizers.vqgan import VQGAN, VQGANConfig
from tokgen.tokens import Grid, Tokens

CASES = r"ibq_(quantizer_train|small).*"
FACTS = {"id_margin", "ids_safe", "sharp_id_margin", "sharp_ids_safe"}  # about the case


def test_numbers_are_the_published_ones(parity_case, close):
    case, expected = parity_case
    checked = set()

    def check(name, got):
        checked.add(name)
        close(case, expected, name, got.reshape(expected[name].shape) if got.ndim == 0 else got)

    (quantizer_case if "IndexPropagationQuantize" in case["config"] else tokenizer_case)(case, expected, check)
    assert checked == set(expected) - FACTS


def quantizer_case(case, expected, check):
    config = case["config"]["IndexPropagationQuantize"]
    quantizer = IBQ(
        config["e_dim"],
        config["n_e"],
        codebook_weight=config["beta"],  # where the published code puts it
        entropy_weight=1.0,
        entropy_temperature=config["entropy_temperature"],
        sample_weight=config["sample_minimization_weight"],
        batch_weight=config["batch_maximization_weight"],
    ).train()
    quantizer.load_state_dict({"codebook.weight": reference.state_dict(case)["quantize.embedding.weight"]})
    weight = quantizer.codebook.weight
    inputs = reference.inputs(case)
    for prefix, scale in (("", 1.0), ("sharp_", case["config"]["sharp_scale"])):
        z = (scale * inputs["z"]).requires_grad_()  # (B, C, h, w)
        out = quantizer(z.movedim(1, -1))
        codes = out.codes.movedim(-1, 1)
        entropy = out.losses.pop("entropy")
        quant_loss = sum(out.losses.values())
        safe = expected[f"{prefix}ids_safe"]
        check(f"{prefix}ids", torch.where(safe, out.ids, expected[f"{prefix}ids"]))
        check(f"{prefix}quantized", codes)
        check(f"{prefix}quant_loss", quant_loss)
        terms = {"": (codes * inputs["grad_output"]).sum(), "quant_loss_": quant_loss}
        if not prefix:
            check("entropy_loss", entropy)
            for name, which in (("sample_entropy", (1.0, 0.0)), ("avg_entropy", (0.0, -1.0))):
                quantizer.sample_weight, quantizer.batch_weight = which
                check(name, quantizer(z.movedim(1, -1)).losses["entropy"])
            quantizer.sample_weight = config["sample_minimization_weight"]
            quantizer.batch_weight = config["batch_maximization_weight"]
            terms["entropy_"] = entropy
        for name, value in terms.items():
            grad_z, grad_codebook = torch.autograd.grad(value, (z, weight), retain_graph=True)
            check(f"{prefix}{name}grad_z", grad_z)
            check(f"{prefix}{name}grad_codebook", grad_codebook)


@torch.no_grad()
def tokenizer_case(case, expected, check):
    tokenizer, report = ibq_from_state_dict(reference.state_dict(case))
    assert set(report.mapped) == set(case["keys"]) and not report.ignored
    config, sizes = case["config"]["IBQ"], case["config"]["IBQ"]["ddconfig"]
    assert tokenizer.config.channel_mult == tuple(sizes["ch_mult"])
    assert tokenizer.config.num_res_blocks == sizes["num_res_blocks"]
    assert (tokenizer.config.z_channels, tokenizer.config.code_dim) == (sizes["z_channels"], config["embed_dim"])
    assert tokenizer.codebook_sizes == (config["n_embed"],)

    inputs = reference.inputs(case)
    latent = tokenizer.encode_features((inputs["image"] + 1) / 2)  # (B, h, w, d)
    check("latent", latent.permute(0, 3, 1, 2))
    quantized = tokenizer.quantizer(latent)
    check("ids", torch.where(expected["ids_safe"], quantized.ids, expected["ids"]))
    check("quantized", quantized.codes.permute(0, 3, 1, 2))
    check("reconstruction", tokenizer.decode_features(quantized.codes) * 2 - 1)
    losses = tokenizer.quantizer.train()(latent).losses
    tokenizer.eval()
    check("quant_loss", sum(value for name, value in losses.items() if name != "entropy"))
    ids = inputs["code_ids"]
    tokens = Tokens(ids.flatten(1), Grid(*ids.shape[1:]), tokenizer.codebook_sizes)
    check("decode_ids", tokenizer.detokenize(tokens) * 2 - 1)


@pytest.mark.parametrize(
    "config, millions",
    [(VQGANConfig.ibq(), "140.34"), (VQGANConfig.ibq(channels=256), "455.34"), (VQGANConfig.ibq(16384), "110.98")],
    ids=["ETT", "Emu3.5", "IBQ 16384"],
)
def test_paper_size_has_the_published_parameter_count(config, millions):
    with torch.device("meta"):
        tokenizer = VQGAN(config)
    assert f"{sum(p.numel() for p in tokenizer.parameters()) / 1e6:.2f}" == millions
