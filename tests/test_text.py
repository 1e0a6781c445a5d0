from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tokgen.errors import CheckpointError, ConfigError, InputError, MissingDependency
from tokgen.text import BOS, PAD, TextTokenizer

STRANGE = [
    "naïve café", "红心，三维", "🫶🏽 family 👨‍👩‍👧", "ׁשלום العالم", "a\u200bb", "½ ﬁ ẞ", "<pad> <s> </s>", PAD + BOS,
    "3d  style", "x3d style 3d styles", "\x00\x07", "''''", "Ġ", "it's we'll", "a" * 50, "",
]  # fmt: skip


@pytest.mark.parametrize("string", STRANGE)
@pytest.mark.parametrize("whitespace", [True, False])
def test_any_string_comes_back(captions, string, whitespace):
    text = TextTokenizer.train(captions, 300, ["3d style"], normalize_whitespace=whitespace)
    ids, mask = text.encode([string, " a \t b\n"], 500)
    assert (ids[mask] != text.pad_id).all()
    assert (ids[:, 1:][mask[:, 1:]] > 1).all()  # no text encodes to padding or begin
    expected = [" ".join(s.split()) if whitespace else s for s in (string, " a \t b\n")]
    assert text.decode(ids, mask) == expected == [text.normalise(s) for s in (string, " a \t b\n")]


def test_every_code_point_comes_back(text):
    everything = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    strings = ["x" + "".join(everything[i : i + 4096]) + "x" for i in range(0, len(everything), 50 * 4096)]
    bare = TextTokenizer(text.tokenizer, {**text.settings, "normalize_whitespace": False})
    assert bare.decode(*bare.encode(strings, 10**6)) == strings


def test_a_lone_surrogate_is_replaced(text):
    assert text.decode(*text.encode(["a\ud800b"], 20)) == ["a?b"]


def test_special_words_are_one_id_wherever_they_stand_whole(text):
    ids, mask = text.encode(
        ["3d style", "cat, 3d style", "3d style cat", "cat 3d style.", "3d styles", "flat style"], 30
    )
    three = text.tokenizer.token_to_id("Ġ3dĠstyle")
    assert mask[0].sum() == 2
    assert ids[0, 1] == three
    assert (ids == three).sum(1).tolist() == [1, 1, 1, 1, 0, 0]
    assert mask[5].sum() == 2


def test_special_words_may_hold_any_character(captions):
    words = ["c++", "(a|b)", "a.b", "50%", "ʕ•ᴥ•ʔ", "c+"]
    text = TextTokenizer.train(captions, 300, words)
    for word in words:
        ids, mask = text.encode([f"so {word} it is"], 60)
        assert (ids == text.tokenizer.token_to_id(_bytes(text, word))).sum() == 1, word
        assert text.decode(ids, mask) == [f"so {word} it is"]


def _bytes(text, word):
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" " + word)
    return "".join(piece for piece, _ in split)


def test_lower_casing(captions):
    text = TextTokenizer.train(captions, 300, ["3D Style"], lowercase=True)
    assert torch.equal(text.encode(["RED Heart, 3D STYLE"], 20)[0], text.encode(["red heart, 3d style"], 20)[0])


def test_rows_begin_with_begin_and_are_padded_on_the_right(text):
    ids, mask = text.encode(["cat", "", "grinning face of a dog"], 20)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert (ids[:, 0] == text.bos_id).all()
    assert mask[1].tolist() == [True] + [False] * (mask.shape[1] - 1)
    assert mask[2].all()
    assert (mask.int().diff(dim=1) <= 0).all()
    assert text.encode(["cat"], 20, pad_to=12)[0].shape == (1, 12)


def test_truncation_is_counted_and_said(captions):
    text = TextTokenizer.train(captions, 260)
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than 5 ids"):
        ids, mask = text.encode(["grinning dog", "a", "a b c d e f"], 5)
    assert ids.shape == (3, 5)
    assert mask.sum(1).tolist() == [5, 3, 5]
    text.encode(["grinning dog"], 5)
    assert text.truncated == 3


def test_saved_and_loaded_is_the_same(text, captions, tmp_path):
    text.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.json", "tokenizer.json"]
    again = TextTokenizer.load(tmp_path)
    assert again.settings == text.settings
    assert torch.equal(again.encode([*captions, "ünseen 🐟"], 50)[0], text.encode([*captions, "ünseen 🐟"], 50)[0])


def test_a_damaged_folder_is_named(text, tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    text.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TextTokenizer.load(tmp_path)


def test_bad_arguments_are_named(captions, text):
    with pytest.raises(ConfigError, match="vocab_size=200"):
        TextTokenizer.train(captions, 200)
    with pytest.raises(ConfigError, match="repeated"):
        TextTokenizer.train(captions, 300, ["a", "a"])
    with pytest.raises(InputError, match="list of strings"):
        text.encode("cat", 5)
    with pytest.raises(InputError, match="max_length"):
        text.encode(["cat"], 0)


@pytest.mark.slow
def test_training_gives_the_same_vocabulary_in_any_process(captions):
    code = (
        "import sys, json; from tokgen.text import TextTokenizer;"
        "print(TextTokenizer.train(json.loads(sys.argv[1]), 330, ['3d style']).tokenizer.to_str())"
    )
    many = [f"{a} {b} {c}" for a in captions for b in ("sun", "moon", "seven") for c in ("up", "down", "seventh")]
    outputs = set()
    for seed in ("0", "1", "77"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, json.dumps(many)]
        outputs.add(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
    assert len(outputs) == 1


def test_a_published_tokenizer_by_name(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = transformers.PreTrainedTokenizerFast(tokenizer_object=text.tokenizer, bos_token=BOS, pad_token=PAD)
    source.save_pretrained(tmp_path / "source")
    named = TextTokenizer.from_name(str(tmp_path / "source"))
    ids, mask = named.encode(["red heart", "", "a\tb  c"], 20)
    assert (ids[:, 0] == named.bos_id).all()
    assert named.decode(ids, mask) == ["red heart", "", "a b c"]
    named.save(tmp_path / "saved")
    again = TextTokenizer.load(tmp_path / "saved")  # without transformers
    assert torch.equal(again.encode(["red heart", "", "a\tb  c"], 20)[0], ids)
    with pytest.raises(CheckpointError, match="nowhere"):
        TextTokenizer.from_name(str(tmp_path / "nowhere"))


def test_missing_transformers_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match=r"tokgen\[transformers\]"):
        TextTokenizer.from_name("some/model")
