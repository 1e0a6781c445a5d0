"""Video-LaVIT's motion tokenizer: blocks, ids and maps of the published code."""

from __future__ import annotations

import pytest
import reference
import torch

from tokgen.data.motion import SCALE
from tokgen.errors import CheckpointError
from tokgen.importers.video_lavit import motion_from_state_dict
from tokgen.tokenizers.video_lavit_motion import MotionConfig, MotionTokenizer
from tokgen.tokens import Grid, Tokens

CASES = r"video_lavit_.*"


@torch.no_grad()
def test_numbers_are_the_published_ones(parity_case, close):
    case, expected = parity_case
    config = case["config"]
    inputs = reference.inputs(case)
    motion = inputs["motion"].transpose(1, 2)  # (B, 2, T, h, w) -> (B, T, 2, h, w)
    tokenizer, report = motion_from_state_dict(
        reference.state_dict(case), heads=config["encoder_config"]["num_heads"], size=tuple(motion.shape[-2:])
    )
    assert set(report.mapped) == set(case["keys"]) and not report.ignored
    assert tokenizer.codebook_sizes == (config["n_embed"],)
    assert tokenizer.config.scale_factor == config["motion_scale_factor"] == SCALE
    frames, patches = config["frame_stride"], config["patch_stride"]

    # the encoder, part by part
    encoder = tokenizer.encoder
    x = encoder.embed(motion).flatten(2, 3)  # (B, T, h w, dim)
    group = tokenizer.config.depth // 4
    for i, block in enumerate(encoder.blocks[:group]):
        x = block(x)
        if i == 0:
            close(case, expected, "block_1_sampled", x[:, ::frames, ::patches])
    down = encoder.downs[0](x.unflatten(2, motion.shape[-2:]))
    close(case, expected, "down_1_sampled", down[:, ::6, ::5, ::6])
    close(case, expected, "encoder_features", encoder(motion))

    # ids
    vectors = tokenizer.encode_features(motion)
    close(case, expected, "pre_quant", vectors)
    tokens = tokenizer.encode(motion)
    assert tokens.layout == Grid(*vectors.shape[1:4])
    safe = expected["ids_safe"]
    assert torch.equal(tokens.ids[safe], expected["ids"][safe])
    margin, sure = margins(vectors, tokenizer.quantizer.codebook.weight)
    assert (margin - expected["ids_margin"]).abs().max() < 1e-5  # the case gives no tolerance of its own for it
    assert torch.equal(sure, safe)

    # and back
    quantized = tokenizer.quantizer.lookup(tokens.ids.unflatten(1, tokens.layout.shape))
    close(case, expected, "quantized", quantized)
    close(case, expected, "decoded", tokenizer.decode(tokens).transpose(1, 2))
    given = Tokens(inputs["codes"], tokens.layout, tokenizer.codebook_sizes)
    close(case, expected, "decoded_from_codes", tokenizer.decode(given).transpose(1, 2))
    resized = tokenizer.reconstruct(given, *config["reconstruct_size"])  # (B, T, 2, H, W)
    close(case, expected, "motion_from_codes_sampled", resized.transpose(1, 2)[:, :, ::frames])


def margins(vectors: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much farther the second-best code is (squared distance), and whether that is beyond doubt."""
    vectors = torch.nn.functional.normalize(vectors.flatten(1, 3), dim=-1).double()
    two = torch.cdist(vectors, codes.double()).square().topk(2, largest=False).values
    margin = two[..., 1] - two[..., 0]
    return margin, margin > 1e-4


def test_paper_size_has_the_published_parameter_count_and_tokens():
    with torch.device("meta"):
        tokenizer = MotionTokenizer(MotionConfig())
        codebook = tokenizer.quantizer.codebook.weight  # a buffer here, a parameter in the release
        features = tokenizer.encode_features(torch.empty(2, 24, 2, 20, 36))
        decoded = tokenizer.decode_features(features)
    parameters = sum(p.numel() for p in tokenizer.parameters()) + codebook.numel()
    assert round(parameters / 1e6, 3) == 158.476
    assert features.shape == (2, 3, 5, 9, 32) and Grid(*features.shape[1:4]).length == 135
    assert decoded.shape == (2, 24, 2, 20, 36)
    assert codebook.shape == (1024, 32)


def test_the_file_of_another_family_is_refused_in_one_line():
    with pytest.raises(CheckpointError, match="no motion tokenizer of Video-LaVIT") as error:
        motion_from_state_dict({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)})
    assert "\n" not in str(error.value)
