from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tokgen.errors import CheckpointError, ConfigError, InputError, TokenizerMismatch
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.tokenizers.base import TOKENIZERS


@pytest.fixture(scope="module")
def tokenizer():
    cls = TOKENIZERS["vqgan"]
    return cls(cls.example_configs()["fsq"]).eval()  # 8 * 5 * 5 codes


@pytest.fixture
def pipe(make, tokenizer):
    model = make(codebook_sizes=tuple(tokenizer.codebook_sizes), window=2, rope="2d")
    model.tokenizer_fingerprint = tokenizer.fingerprint
    model.generation = {"guidance_scale": 2.0, "schedule": "half-linear", "top_k": 50}
    return TextToImagePipeline(model, tokenizer)


def test_output_types_are_views_of_one_picture(pipe, tokenizer):
    tokens = pipe("cat", generator=1, output_type="tokens")
    assert tokens.images is None
    assert tokens.tokens.tokenizer == tokenizer.fingerprint
    pt = pipe("cat", generator=1, output_type="pt").images
    side = 4 * tokenizer.factor
    assert pt.shape == (1, 3, side, side)
    assert torch.equal(pt, tokenizer.decode(tokens.tokens))
    assert np.array_equal(pipe("cat", generator=1, output_type="np").images, pt.permute(0, 2, 3, 1).numpy())
    (image,) = pipe("cat", generator=1).images
    assert isinstance(image, Image.Image)
    assert np.array_equal(np.asarray(image), (pt[0] * 255).round().byte().permute(1, 2, 0).numpy())


def test_images_of_one_prompt_stand_together(pipe, captions):
    out = pipe(captions[:2], num_images_per_prompt=3, generator=10, output_type="pt")
    assert len(out.images) == 6
    assert out.settings["prompts"] == [captions[0]] * 3 + [captions[1]] * 3
    alone = pipe(captions[1], generator=14, output_type="pt")
    assert torch.equal(alone.tokens.ids[0], out.tokens.ids[4])
    assert len({tuple(row) for row in out.tokens.ids.tolist()}) == 6


def test_settings_draw_the_picture_again(pipe):
    out = pipe(["cat", "red heart"], temperature=0.9, output_type="tokens")
    stored = json.loads(json.dumps(out.settings))
    names = (
        "guidance_scale",
        "schedule",
        "guidance_interval",
        "guidance_power",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
    )
    assert (stored["guidance_scale"], stored["schedule"], stored["top_k"], stored["temperature"]) == (
        2.0, "half-linear", 50, 0.9,
    )  # fmt: skip
    again = pipe(
        stored["prompts"], generator=stored["seeds"], output_type="tokens", **{name: stored[name] for name in names}
    )
    assert torch.equal(again.tokens.ids, out.tokens.ids)
    assert stored["generator"] == pipe.generator.fingerprint


def test_saved_and_loaded_draws_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "tokenizer" / "config.json").is_file()
    again = TextToImagePipeline.from_pretrained(tmp_path / "whole", device="cpu")
    expected = pipe("cat", generator=2, output_type="pt").images
    assert torch.equal(again("cat", generator=2, output_type="pt").images, expected)


def test_a_generator_may_name_its_tokenizer(pipe, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pipe.generator.visual_tokenizer = "../tokenizer"
    pipe.generator.save_pretrained(tmp_path / "generator")
    assert TextToImagePipeline.from_pretrained(tmp_path / "generator").tokenizer.fingerprint == tokenizer.fingerprint
    pipe.generator.visual_tokenizer = None
    pipe.generator.save_pretrained(tmp_path / "lonely")
    with pytest.raises(CheckpointError, match="pass tokenizer="):
        TextToImagePipeline.from_pretrained(tmp_path / "lonely")
    given = TextToImagePipeline.from_pretrained(tmp_path / "lonely", tokenizer=tmp_path / "tokenizer")
    assert given.tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(CheckpointError, match="not a generator"):
        TextToImagePipeline.from_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="expected a visual tokenizer"):
        TextToImagePipeline.from_pretrained(tmp_path / "lonely", tokenizer=tmp_path / "lonely")


def test_another_tokenizer_is_refused(pipe, make):
    cls = TOKENIZERS["vqgan"]
    torch.manual_seed(1)
    other = cls(cls.example_configs()["fsq"]).eval()
    with pytest.raises(TokenizerMismatch, match="trained on codes of tokenizer"):
        TextToImagePipeline(pipe.generator, other)
    with pytest.raises(TokenizerMismatch, match="draws codebooks"):
        TextToImagePipeline(make(codebook_sizes=(24,)), other)


def test_bad_calls_are_named(pipe):
    with pytest.raises(InputError, match="output_type='jpg'"):
        pipe("cat", output_type="jpg")
    with pytest.raises(InputError, match="num_images_per_prompt=0"):
        pipe("cat", num_images_per_prompt=0)
    with pytest.raises(InputError, match="at least one"):
        pipe([])


# -- in-painting ------------------------------------------------------------------------------------------------------


def test_what_is_not_masked_keeps_its_tokens(pipe, tokenizer):
    side, f = 4 * tokenizer.factor, tokenizer.factor
    picture = Image.fromarray((np.random.default_rng(0).random((side, side, 3)) * 255).astype(np.uint8))
    mask = np.zeros((side, side), np.uint8)
    mask[f + 1, f + 1] = 255  # one pixel of token (1, 1)
    own = tokenizer.encode([picture])
    out = pipe(["cat", "red heart"], image=picture, mask_image=Image.fromarray(mask), generator=0, output_type="tokens")
    same = (out.tokens.ids == own.ids).all(0)
    same[5] = False  # it may come out equal by chance
    assert same.tolist() == [i != 5 for i in range(16)]
    assert out.report.ids == 2
    everywhere = torch.ones(side, side)
    drawn = pipe("cat", image=picture, mask_image=everywhere, generator=0, output_type="tokens").tokens.ids
    assert torch.equal(drawn, pipe("cat", generator=0, output_type="tokens").tokens.ids)


def test_a_mask_that_does_not_fit_is_named(pipe):
    picture = torch.zeros(1, 3, 4 * pipe.tokenizer.factor, 4 * pipe.tokenizer.factor)
    with pytest.raises(InputError, match="mask_image"):
        pipe("cat", image=picture)
    with pytest.raises(InputError, match=r"\(3, 3\)"):
        pipe("cat", image=picture, mask_image=torch.zeros(3, 3))


# -- precision --------------------------------------------------------------------------------------------------------


def test_precisions_draw_nearly_the_same(pipe, captions, tmp_path):
    folder = pipe.save_pretrained(tmp_path / "model")
    drawn = {}
    for precision in ("float32", "bfloat16", "int8"):
        loaded = TextToImagePipeline.from_pretrained(folder, precision=precision)
        out = loaded(captions, generator=0, output_type="tokens")
        assert out.settings["precision"] == precision
        drawn[precision] = out.tokens.ids
    assert torch.equal(drawn["float32"], pipe(captions, generator=0, output_type="tokens").tokens.ids)
    for precision in ("bfloat16", "int8"):
        # the first step's noise decides nearly always alike; later ones follow what came before
        assert (drawn[precision][:, 0] == drawn["float32"][:, 0]).float().mean() >= 0.75
    assert (
        next(TextToImagePipeline.from_pretrained(folder, precision="bfloat16").generator.parameters()).dtype
        == torch.bfloat16
    )
    with pytest.raises(ConfigError, match="fp4"):
        TextToImagePipeline.from_pretrained(folder, precision="fp4")
    with pytest.raises(ConfigError, match="int8 copy"):
        TextToImagePipeline.from_pretrained(folder, precision="int8").save_pretrained(tmp_path / "again")
