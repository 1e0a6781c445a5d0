"""SEED: Q-Former, contrastive stage, quantizer, codes and generation embeddings of the published code."""

from __future__ import annotations

import reference
import torch

from tokgen.importers.base import rename
from tokgen.importers.seed import SEED_KEYS, TEXT_SIDE, seed_from_state_dict
from tokgen.nn.qformer import QFormer
from tokgen.pretrained import load_strictly
from tokgen.quantizers.vq import VQ
from tokgen.tokenizers.seed import SEED, SeedConfig
from tokgen.tokens import Sequence, Tokens

CASES = r"seed.*"


def test_numbers_are_the_published_ones(parity_case, close):
    case, expected = parity_case
    checked = set()

    def check(name, got):
        checked.add(name)
        close(case, expected, name, got)

    kind = case["name"].partition("@")[0]
    if kind.startswith("seed2_tokenizer"):
        tokenizer_case(case, expected, check)
    elif kind.startswith("seed2_quantizer_train"):
        quantizer_case(case, expected, check)
    elif kind.startswith("seed_itc"):
        contrastive_case(case, expected, check)
    else:
        qformer_case(case, expected, check)
    assert checked == set(expected) - {"ids_margin", "ids_safe"}


@torch.no_grad()
def tokenizer_case(case, expected, check):
    state = reference.state_dict(case)
    seed, report = seed_from_state_dict(state, vit_heads=case["config"]["vit"]["num_heads"])
    assert set(report.mapped) | set(report.ignored) == set(state)
    assert {key.rpartition(".")[2] for key in report.ignored} == {"position_ids"}
    reverse = case["config"]["model"]["use_qformer_image"]
    assert seed.config.detok_head == ("reverse_qformer" if reverse else "mlp")

    inputs = reference.inputs(case)
    features = seed.encoder(inputs["image"])  # already normalised
    sequence = seed.query_features(features)
    z = seed.encode_task(sequence)
    check("pre_quant", z)
    tokens = seed.tokenize_features(features)
    safe = expected["ids_safe"]
    assert torch.equal(tokens.ids[safe], expected["ids"][safe])
    check("ids", torch.where(safe, tokens.ids, expected["ids"]))
    losses = seed.quantizer.train()(z).losses
    seed.eval()
    check("quant_loss", sum(losses.values()).reshape(1))
    check("query_output_up", seed.decode_task(seed.quantizer.lookup(tokens.ids)))
    check("gen_embed_from_ids", seed.generation_embedding(tokens))
    codes = Tokens(inputs["codes"], Sequence(seed.config.queries), seed.codebook_sizes)
    check("gen_embed_from_codes", seed.generation_embedding(codes))
    if not reverse:
        check("vit_tokens", features)
        norm = seed.ln_vision
        check("image_embeds", norm(features))
        check("query_hidden", sequence)
        check("recon_causal", seed.reconstruct_queries(tokens))


def quantizer_case(case, expected, check):
    config = case["config"]["VectorQuantizer2"]
    assert config["legacy"]
    quantizer = VQ(config["e_dim"], config["n_e"], beta=1.0, codebook_weight=config["beta"])
    quantizer.load_state_dict({"codebook.weight": reference.state_dict(case)["quantize.embedding.weight"]})
    weight = quantizer.codebook.weight
    inputs = reference.inputs(case)
    z = inputs["z"].requires_grad_()
    out = quantizer.train()(z)
    safe = expected["ids_safe"]
    assert torch.equal(out.ids[safe], expected["ids"][safe])
    check("ids", torch.where(safe, out.ids, expected["ids"]))
    check("quantized", out.codes)
    loss = sum(out.losses.values())
    check("quant_loss", loss.reshape(1))
    grad_z, grad_codebook = torch.autograd.grad(loss, (z, weight), retain_graph=True)
    check("quant_loss_grad_z", grad_z)
    check("quant_loss_grad_codebook", grad_codebook)
    total = (out.codes * inputs["grad_output"]).sum()
    grad_z, grad_codebook = torch.autograd.grad(total, (z, weight), allow_unused=True)
    check("grad_z", grad_z)
    assert grad_codebook is None


def qformer(case, table, **options) -> tuple[QFormer, dict[str, torch.Tensor]]:
    """The case's Q-Former, and its other tensors under our names."""
    sizes = case["config"]["qformer"]
    module = QFormer(
        sizes["query_length"],
        sizes["encoder_width"],
        causal=True,
        dim=sizes["hidden_size"],
        heads=sizes["num_attention_heads"],
        hidden=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        cross_attention_freq=sizes["cross_attention_freq"],
        max_positions=sizes["max_position_embeddings"],
        eps=sizes["layer_norm_eps"],
        **options,
    )
    state, _ = rename(reference.state_dict(case), table, [(r".*\.position_ids", "")], case["name"])
    own = {k.removeprefix("qformer."): v for k, v in state.items() if k.startswith("qformer.")}
    load_strictly(module, own, case["name"])
    return module.eval(), {k: v for k, v in state.items() if not k.startswith("qformer.")}


@torch.no_grad()
def qformer_case(case, expected, check):
    module, _ = qformer(case, SEED_KEYS)
    features = reference.inputs(case)["features"]
    check("embedding_output", module.norm(module.queries))
    check("query_hidden", module(features))
    x = module.norm(module.queries).expand(len(features), -1, -1)
    check("hidden_layer_1", module.layers[0](x, x.shape[1], features, None, None, True))
    module.causal = False
    check("query_hidden_first_16", module(features, module.queries[:, :16]))


@torch.no_grad()
def contrastive_case(case, expected, check):
    vocabulary, embed_dim = case["config"]["qformer"]["vocab_size"], case["config"]["embed_dim"]
    module, rest = qformer(case, TEXT_SIDE + SEED_KEYS, text_vocab=vocabulary)
    inputs = reference.inputs(case)
    width, dim = case["config"]["qformer"]["encoder_width"], case["config"]["qformer"]["hidden_size"]
    # a tokenizer with this text side; what it sees with is not part of the case
    seed = SEED(
        SeedConfig(
            image_size=28,
            encoder={"type": "eva", "config": {"image_size": 28, "dim": width, "heads": 2, "hidden": 8, "depth": 1}},
            dim=dim, layers=4, hidden=384, text_vocab=vocabulary, embed_dim=embed_dim, decoder_depth=1,
        )
    ).eval()  # fmt: skip
    seed.qformer.load_state_dict(module.state_dict())
    assert set(rest) == {
        f"{n}.{p}" for n in ("ln_vision", "vision_projection", "text_projection") for p in ("weight", "bias")
    }
    seed.load_state_dict(rest, strict=False)

    lengths = torch.tensor(case["config"]["text_lengths"])
    ids = inputs["input_ids"]
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    sequence = seed.query_features(inputs["features"])
    check("query_hidden", sequence)
    check("image_feats", seed._image_embedding(sequence))
    check("text_hidden", seed.qformer.read(ids, mask))
    check("text_feat", seed.text_embedding(ids, mask))
    check("multimodal_hidden", seed.qformer.join(seed.ln_vision(inputs["features"]), ids, mask))

    seed.text_ids = lambda captions: (ids, mask)
    seed.temperature.fill_(case["config"]["temp"])
    assert seed.config.label_smoothing == case["config"]["label_smoothing"]
    batch = {"features": inputs["features"], "caption": ["a", "b", "c", "d"]}
    check("loss_itc", seed.stage_step("contrastive", batch).losses["contrastive"].reshape(1))


def test_paper_size_has_the_published_key_counts():
    with torch.device("meta"):
        seed = SEED(SeedConfig())
        reverse = SEED(SeedConfig(detok_head="reverse_qformer"))
        first = SEED(SeedConfig.v1())
    tower = [k for k in seed.state_dict() if k.startswith("encoder.")]
    assert len(tower) == 511
    # the published 370 count BERT's buffer position_ids, which has no effect
    assert len(seed.state_dict()) - len(tower) == 370 - 1
    assert sum(p.numel() for p in seed.qformer.parameters()) - seed.qformer.queries.numel() == 105_137_664
    assert sum(p.numel() for p in first.head.qformer.parameters()) - first.head.qformer.queries.numel() == 33_080_832
    assert reverse.head.project.weight.shape == (1024, 768)
    assert seed.head.project.weight.shape == (1024, 1024)
    assert seed.codebook_sizes == (8192,)
