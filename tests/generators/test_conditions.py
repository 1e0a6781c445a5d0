"""Classes and text features before the codes: what users write, what the model sees, and what is saved."""

from __future__ import annotations

import pytest
import torch

from tokgen.errors import CheckpointError, ConfigError, InputError
from tokgen.generators.conditions import (
    ClassNames,
    T5Features,
    dump_prompts,
    load_prompts,
    to_the_end,
    undump_prompts,
)
from tokgen.generators.decoding import generate
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.generators.sampling import SamplingSettings

NAMES = ["crane (bird)", "crane (machine)", "7"]
FEATURES = {"condition": "features", "max_text": 6, "feature_dim": 16}
CLASSES = {"condition": "class", "num_classes": 3}


def generator(text=None, **options) -> LlamaGenerator:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16, "rope": "2d", "rope_prefix": "zero", **options}
    model = LlamaGenerator(LlamaConfig({"kind": "Grid", "h": 2, "w": 4}, (24,), **sizes), text)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


# -- classes ------------------------------------------------------------------------------------------------------------


def test_a_class_is_a_name_a_number_or_digits():
    labels, mask = ClassNames(NAMES).encode(["crane (machine)", 0, "1", "7", ""])
    assert labels.tolist() == [[1], [0], [1], [2], [3]]  # "7" is a name; "" is the row after the last class
    assert mask.shape == (5, 1) and mask.all()


@pytest.mark.parametrize("prompt", ["heron", "3", 3, -1])
def test_an_unknown_class_is_named(prompt):
    with pytest.raises(
        InputError, match=rf"no class {prompt!r}; expected a number from 0 to 2 or a name such as crane"
    ):
        ClassNames(NAMES).encode([prompt])


def test_repeated_class_names_are_refused():
    with pytest.raises(ConfigError, match="different"):
        ClassNames(["crane", "heron", "crane"])


def test_the_unconditional_class_is_what_guidance_starts_from():
    model = generator(ClassNames(NAMES), **CLASSES)
    settings = SamplingSettings(guidance_scale=1.0, temperature=0)
    labels, mask = model.encode_prompts(["7"])
    null, null_mask = model.condition.null(labels, mask)
    alone, _ = generate(model, null, null_mask, settings, [0])
    assert torch.equal(alone[..., 0], model.generate([""], temperature=0).ids)
    # a guidance of 0 is the unconditional model
    assert torch.equal(model.generate(["7"], temperature=0, guidance_scale=0.0).ids, alone[..., 0])
    assert not torch.equal(model.generate(["7"], temperature=0).ids, alone[..., 0])


# -- features -----------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_encoder_with_padding_on_the_left(t5_folder):
    from transformers import AutoTokenizer, T5EncoderModel

    features, mask = T5Features(str(t5_folder), length=6).encode(["a RED heart", "fish", ""])
    assert features.shape == (3, 6, 16)
    assert mask.tolist() == [[False] * 2 + [True] * 4, [False] * 4 + [True] * 2, [False] * 5 + [True]]
    assert not features[~mask].any()
    encoder, words = T5EncoderModel.from_pretrained(t5_folder).eval(), AutoTokenizer.from_pretrained(t5_folder)
    for row, real, caption in zip(features, mask, ["a red heart", "fish", ""]):
        with torch.no_grad():
            alone = encoder(**words([caption], return_tensors="pt")).last_hidden_state[0]
        assert alone.std() > 0.1
        assert torch.allclose(row[real], alone, atol=1e-5)


def test_features_do_not_depend_on_the_batch(t5_folder):
    text = T5Features(str(t5_folder), length=6)
    together = text.encode(["fish", "a red heart", "blue"])
    for i, caption in enumerate(["fish", "a red heart", "blue"]):
        alone = text.encode([caption])
        assert torch.allclose(alone[0][0], together[0][i], atol=1e-6) and torch.equal(alone[1][0], together[1][i])


def test_long_captions_are_cut_with_a_warning(t5_folder):
    with pytest.warns(UserWarning, match="fills all 4 rows"):
        features, mask = T5Features(str(t5_folder), length=4).encode(["a red heart a blue fish"])
    assert mask.all() and features.shape == (1, 4, 16)


def test_rows_move_to_the_end_in_their_order_and_nothing_stays_behind():
    features = torch.arange(1.0, 9).view(2, 4, 1)
    features[1, 3] = torch.nan  # whatever lies in a padded row
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]])
    moved, real = to_the_end(features, mask)
    assert moved[..., 0].tolist() == [[0, 0, 1, 2], [0, 0, 5, 7]]
    assert real.tolist() == [[False, False, True, True]] * 2


def test_padded_rows_are_never_read(t5_folder):
    model = generator(T5Features(str(t5_folder), length=6), **FEATURES)
    features, mask = model.encode_prompts(["fish", "a red heart"])
    ids = torch.randint(24, (2, 8))
    logits = model(features, mask, ids).logits
    other = torch.where(mask[..., None], features, torch.randn_like(features))
    assert torch.equal(model(other, mask, ids).logits, logits)
    assert not torch.allclose(model(features + mask[..., None], mask, ids).logits, logits, atol=1e-2)


def test_unconditional_rows_keep_the_captions_mask_and_are_saved(tmp_path, t5_folder):
    model = generator(T5Features(str(t5_folder), length=6), **FEATURES)
    features, mask = model.encode_prompts(["fish", "a red heart"])
    null, null_mask = model.condition.null(features, mask)
    assert torch.equal(null_mask, mask) and torch.equal(null[0], null[1])
    assert torch.equal(null[0], model.condition.unconditional)
    assert "condition.unconditional" not in dict(model.named_parameters())  # never trained
    model.save_pretrained(tmp_path)
    again = LlamaGenerator.from_pretrained(tmp_path)
    assert torch.equal(again.condition.unconditional, model.condition.unconditional)
    prompts = {"guidance_scale": 3.0, "generator": 4}
    assert torch.equal(again.generate(["blue fish"], **prompts).ids, model.generate(["blue fish"], **prompts).ids)


# -- files and errors ---------------------------------------------------------------------------------------------------


def test_prompt_encoders_come_back_from_a_folder_and_from_strings(tmp_path, t5_folder):
    for text in (ClassNames(NAMES), T5Features("owner/encoder", 77, lowercase=False)):
        folder = tmp_path / text.settings["kind"]
        text.save(folder)
        for again in (load_prompts(folder), undump_prompts(dump_prompts(text))):
            assert type(again) is type(text) and again.settings == text.settings
    with pytest.raises(CheckpointError, match=r"text\.json cannot be read"):
        load_prompts(tmp_path)


def test_wrong_prompts_and_places_are_named(t5_folder):
    with pytest.raises(InputError, match="list of strings"):
        T5Features(str(t5_folder)).encode("red heart")
    with pytest.raises(InputError, match="list of strings"):
        T5Features(str(t5_folder)).encode([3])
    with pytest.raises(CheckpointError, match=r"no T5 encoder at '\./nowhere'"):
        T5Features("./nowhere").encode(["red heart"])
    with pytest.raises(ConfigError, match="text_loss needs condition='text'"):
        labels = torch.zeros(1, 1, dtype=torch.int64)
        generator(**CLASSES)(labels, labels == 0, torch.zeros(1, 8, dtype=torch.int64), text_loss=0.1)


@pytest.mark.parametrize("options", [FEATURES, CLASSES], ids=["features", "class"])
def test_cached_steps_are_the_whole_sequence(options, t5_folder):
    text = T5Features(str(t5_folder), length=6) if "max_text" in options else ClassNames(NAMES)
    model = generator(text, **options)
    prompts = ["fish", "a red heart"] if "max_text" in options else ["7", ""]
    tokens = model.generate(prompts, temperature=0)
    assert torch.equal(model(*model.encode_prompts(prompts), tokens.ids).logits.argmax(-1), tokens.ids)
    assert tokens.ids.unique().numel() > 2
