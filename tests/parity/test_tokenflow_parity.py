"""TokenFlow: multi-scale dual quantizer with its gradients, encoders, codes, features and pixels of the published code."""

from __future__ import annotations

import pytest
import reference
import torch

from tokgen.importers.tokenflow import tokenflow_from_state_dict
from tokgen.quantizers.dual import DualVQ
from tokgen.quantizers.multiscale import MultiScale
from tokgen.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from tokgen.tokens import Scales, Tokens

CASES = r"tokenflow_(quantizer|b_).*"


def test_numbers_are_the_published_ones(parity_case, close):
    case, expected = parity_case
    checked = set()

    def check(name, got):
        checked.add(name)
        close(case, expected, name, got)

    (quantizer_case if case["name"].startswith("tokenflow_quantizer") else tokenizer_case)(case, expected, check)
    assert checked == set(expected) - {"id_margin", "ids_safe"}


def quantizer_case(case, expected, check):
    config, scales = case["config"]["ModelArgs"], tuple(case["config"]["scale_rq_layers"])
    dims = config["semantic_code_dim"], config["codebook_embed_dim"]
    ratio = config["entropy_loss_ratio"]
    options = {"semantic_dim": dims[0], "beta": config["commit_loss_beta"], "entropy_weight": ratio}
    quantizer = MultiScale(DualVQ(sum(dims), config["codebook_size"], **options), scales)
    state = reference.state_dict(case)
    table = torch.cat([state[f"quantize.embedding_{name}.weight"] for name in ("vqkd", "vqgan")], 1)
    quantizer.quantizer.load_state_dict({"codebooks.0.weight": table})
    inputs = reference.inputs(case)
    z = inputs["features"].permute(0, 2, 3, 1).requires_grad_()  # (B, h, w, d)

    with torch.no_grad():
        out = quantizer.eval()(z)
        safe = expected["ids_safe"]
        assert torch.equal(out.ids[safe], expected["ids"][safe])
        check("ids", torch.where(safe, out.ids, expected["ids"]))
        check("f", out.codes.permute(0, 3, 1, 2))
        check("f_decode", quantizer.lookup(out.ids).permute(0, 3, 1, 2))
        first = sum(s * s for s in scales[:4])
        check("f_prefix", quantizer.lookup(out.ids[:, :first]).permute(0, 3, 1, 2))

    out = quantizer.train()(z)
    check("vq_loss", out.losses["codebook"].reshape(1))
    check("commit_loss", out.losses["commitment"].reshape(1))
    check("entropy_loss", out.losses["entropy"].reshape(1))
    weight = quantizer.quantizer.codebooks[0].weight

    def gradients(value):
        of_z, of_weight = torch.autograd.grad(value, [z, weight], retain_graph=True, allow_unused=True)
        return of_z.permute(0, 3, 1, 2), of_weight

    check("grad_features", gradients((out.codes * inputs["grad_output"].permute(0, 2, 3, 1)).sum())[0])
    for prefix, value in (
        ("loss_grad", out.losses["codebook"] + out.losses["commitment"]),
        ("entropy_grad", out.losses["entropy"]),
    ):
        of_z, of_weight = gradients(value)
        check(f"{prefix}_features", of_z)
        check(f"{prefix}_codebook_semantic", of_weight[:, : dims[0]])
        check(f"{prefix}_codebook_pixel", of_weight[:, dims[0] :])


@torch.no_grad()
def tokenizer_case(case, expected, check):
    state = reference.state_dict(case)
    resolution = case["inputs"]["image"]["shape"][-1]
    tokenizer, report = tokenflow_from_state_dict(state, resolution if resolution != 224 else None)
    assert set(report.mapped) | set(report.ignored) == set(state)
    assert set(report.ignored) == {"quantize.codebook_used"}
    config = tokenizer.config
    assert config.scales == tuple(case["config"]["scale_rq_layers"])
    assert config.num_res_blocks == case["config"]["encoder"]["num_res_blocks"]

    pixels = (reference.inputs(case)["image"] + 1) / 2
    features = tokenizer.encode_features(pixels)  # (B, h, w, d)
    check("features", features.permute(0, 3, 1, 2))
    out = tokenizer.quantizer(features)
    safe = expected["ids_safe"]
    assert torch.equal(out.ids[safe], expected["ids"][safe])
    check("ids", torch.where(safe, out.ids, expected["ids"]))
    check("f", out.codes.permute(0, 3, 1, 2))
    tokens = Tokens(out.ids, Scales(config.scales), tokenizer.codebook_sizes)
    check("semantic", tokenizer.decode_features(tokens))
    check("image_reconstruction", tokenizer.detokenize(tokens) * 2 - 1)


# all in millions, counted on the published modules; XL's without the parts that its features do not see
@pytest.mark.parametrize(
    "config, millions",
    [
        (TokenFlowConfig.clipb(), 181.9),
        (TokenFlowConfig.clipb(256, enhanced=True), 376.6),
        (TokenFlowConfig.vitamin(), 560.0),
        (TokenFlowConfig.siglip(), 523.5),
    ],
    ids=["B", "B enhanced", "L", "XL"],
)
def test_paper_size_has_the_published_parameter_count(config, millions):
    with torch.device("meta"):
        tokenizer = TokenFlow(config)
    assert sum(p.numel() for p in tokenizer.parameters() if p.requires_grad) / 1e6 == pytest.approx(millions, abs=0.06)
    assert all(p.requires_grad for p in tokenizer.parameters())
