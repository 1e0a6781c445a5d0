"""LaVIT: selector, merger, codes, continuous features, decoders and their conditions of the published code."""

from __future__ import annotations

import pytest
import reference
import torch

from tokgen.importers.base import rename
from tokgen.importers.lavit import DECODER_KEYS, TOKENIZER_IGNORED, TOKENIZER_KEYS, VISUAL_IGNORED, VISUAL_KEYS
from tokgen.nn.feature_decoder import FeatureDecoder
from tokgen.nn.token_merger import dropped_mask, masked_softmax, merge_step, rows_at, select_places, visible_mask
from tokgen.pretrained import load_strictly
from tokgen.tokenizers.lavit import LAVIT, Conditioner, LavitConfig

CASES = r"lavit_.*"


@torch.no_grad()
def test_numbers_are_the_published_ones(parity_case, close):
    case, expected = parity_case
    checked = set()

    def check(name, got):
        checked.add(name)
        close(case, expected, name, got)

    kind = case["name"].partition("@")[0]
    if kind.startswith("lavit_tokenizer"):
        tokenizer_case(case, expected, check)
    elif kind.startswith("lavit_masked_softmax"):
        softmax_case(case, check)
    else:
        decoder_case(case, expected, check)
    assert checked == set(expected) - {"ids_margin", "ids_safe"}


def softmax_case(case, check):
    inputs, config = reference.inputs(case), case["config"]
    keep = inputs["keep"].bool()
    for image, value in config["force_keep"].items():
        keep[int(image)] = bool(value)
    check("keep", keep)
    logits = config["scale"] * inputs["logits"]
    check("causal_weights", masked_softmax(logits, visible_mask(keep.float())))
    check("cross_weights", masked_softmax(logits, dropped_mask(keep.float())))


def lavit_of(case, places):
    """A tokenizer with the case's weights; the encoder, which the case bypasses, has features of its shape."""
    model, state = case["config"]["model"], reference.state_dict(case)
    tower = {"image_size": 14 * round(places**0.5), "patch": 14, "dim": model["width"], "heads": model["heads"]}
    tower |= {"hidden": 8, "depth": 1, "keep_class_token": False}
    config = LavitConfig(
        image_size=tower["image_size"],
        encoder={"type": "eva", "config": tower},
        merger_heads=model["heads"],
        merger_hidden=int(model["width"] * case["config"]["mlp_ratio"]),
        merger_depth=model["layers"],
        code_dim=model["code_dim"],
        quantizer={**LavitConfig().quantizer, "codebook_size": model["n_code"]},
        understanding_dim=4096,
        **{"decoder_dim": 16, "decoder_heads": 2, "decoder_hidden": 16, "decoder_depth": 1},
    )
    lavit = LAVIT(config).eval()
    codes, report = rename(state, TOKENIZER_KEYS, TOKENIZER_IGNORED, case["name"])
    assert set(report.mapped) | set(report.ignored) == set(state)
    seen, visual = rename(state, VISUAL_KEYS, [*VISUAL_IGNORED], case["name"])
    assert {key.partition(".")[0] for key in visual.mapped} == {"causal_encoder", "vit_proj"}
    rest = {k: v for k, v in lavit.state_dict().items() if k.startswith(("encoder.", "decoder.", "quantizer."))}
    load_strictly(lavit, {**rest, **codes, **seen}, case["name"])
    return lavit


def tokenizer_case(case, expected, check):
    inputs, mix = reference.inputs(case), case["config"]["mix"]
    noise, offset = (torch.tensor(mix[name])[:, None, None] for name in ("noise", "offset"))
    features = noise * inputs["features"] + offset * inputs["offset"]  # (B, N, C)
    check("features", features)
    lavit = lavit_of(case, features.shape[1])

    scores = lavit.selector(features)
    check("scores", scores)
    check("keep_margin", (scores[..., 0] - scores[..., 1]).abs())
    decided = scores[..., 0] > scores[..., 1]
    check("keep", decided)
    keep = expected["keep"]
    check("counts", keep.sum(1))
    # ours keeps one place where the published rule keeps none
    selected, none = select_places(scores, threshold=0.5), ~keep.any(1)
    assert torch.equal(selected[~none], keep[~none]) and bool((selected[none].sum(1) == 1).all())

    merger = lavit.merger
    masks = visible_mask(keep.float()), dropped_mask(keep.float())
    check("block_1", merge_step(merger.blocks[0], features, merger.origin_norm(features), *masks))
    merged = merger(features, keep.float())
    check("merged", merged)
    check("merged_kept", merged[keep])
    z = lavit.bottleneck(merged[keep])
    check("pre_quant", z)
    quantized = lavit.quantizer(torch.nn.functional.normalize(z, dim=-1))
    safe = expected["ids_safe"]
    assert torch.equal(quantized.ids[safe], expected["ids"][safe])
    check("ids", torch.where(safe, quantized.ids, expected["ids"]))
    check("quantized", lavit.quantizer.lookup(expected["ids"]))

    stride = case["config"]["llm_features_stride"]
    continuous = lavit.understanding["projection"](lavit.understanding["merger"](features, keep.float())[keep])
    check("llm_features_sampled", continuous[:, ::stride])

    # the whole way, as `encode` goes it: the same ids for the images that the published rule keeps something of
    tokens = lavit.tokenize_features(features, threshold=0.5)
    flat = tokens.ids[~none][tokens.mask[~none]]
    assert torch.equal(flat[safe], expected["ids"][safe])
    vectors, real, places = merger.kept(features, keep)
    assert torch.equal(vectors[real], rows_at(merged, places)[real])


def decoder_case(case, expected, check):
    model, state = case["config"]["model"], reference.state_dict(case)
    book = state.pop("quantize.embedding.weight")
    highres = "unet_proj_1.weight" in state
    config = LavitConfig(
        code_dim=model["in_chans"],
        decoder_dim=model["embed_dim"],
        decoder_heads=model["num_heads"],
        decoder_hidden=int(model["embed_dim"] * model["mlp_ratio"]),
        decoder_depth=model["depth"],
        condition="highres" if highres else "lowres",
    )
    places, dim = (model["img_size"] // model["patch_size"]) ** 2, 1408
    sizes = (config.decoder_dim, config.decoder_heads, config.decoder_hidden, config.decoder_depth)
    decoder = FeatureDecoder(config.code_dim, places, places, dim, *sizes)
    module = torch.nn.ModuleDict({"decoder": decoder, "conditioner": Conditioner(config, places, dim)})
    renamed, report = rename(state, DECODER_KEYS, [], case["name"])
    assert set(report.mapped) == set(state)
    load_strictly(module, renamed, case["name"])

    ids, counts = reference.inputs(case)["ids"], case["config"]["counts"]
    flat = book[ids]
    check("quantized", flat)
    codes = torch.nn.utils.rnn.pad_sequence(flat.split(counts), batch_first=True)  # (B, n, d)
    mask = torch.arange(codes.shape[1]) < torch.tensor(counts)[:, None]
    decoder = module["decoder"]
    queries, context = decoder.queries.expand(len(counts), -1, -1), decoder.context(codes, mask)
    check("block_1", decoder.blocks[0](queries, context, mask))
    states = []
    decoder.norm.register_forward_hook(lambda module, args, output: states.append(output))
    x = decoder(codes, mask)
    check("normed_queries", states[0])
    check("x_rec", x)
    condition = module["conditioner"](x)
    if highres:
        check("prompt_embeds", condition["prompt_embeds"])
        check("pooled_prompt_embeds", condition["pooled_prompt_embeds"])
    else:
        check("visual_condition", condition["prompt_embeds"])


@pytest.mark.parametrize("condition, decoder_keys", [("lowres", 276), ("highres", 287)])
def test_paper_size_has_the_published_parameter_and_key_counts(condition, decoder_keys):
    with torch.device("meta"):
        lavit = LAVIT(LavitConfig(condition=condition, understanding_dim=4096))
    parts = {name: module.state_dict() for name, module in lavit.named_children()}
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in lavit.named_children()}
    assert (len(parts["encoder"]), parameters["encoder"]) == (528, 1_012_588_928)
    assert (len(parts["selector"]), len(parts["merger"]), len(parts["bottleneck"])) == (10, 268, 4)
    assert round(parameters["merger"] / 1e3) == 398_267 and round(parameters["selector"] / 1e3) == 3_227
    codebook = parts["quantizer"]["codebook.weight"]
    assert tuple(codebook.shape) == (16384, 32)
    file = sum(parameters[name] for name in ("selector", "merger", "bottleneck")) + codebook.numel()
    assert round(file / 1e4) == 40_405  # tokenizer_encoder.bin
    assert len(parts["understanding"]) == 270 and round(parameters["understanding"] / 1e4) == 40_404
    assert len(parts["decoder"]) + len(parts["conditioner"]) == decoder_keys
