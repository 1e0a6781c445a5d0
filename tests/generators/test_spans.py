"""Pictures in a language model's ids: written, read back, and generated only whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tokgen.errors import ConfigError, InputError
from tokgen.generators.spans import ImageSpan, SpanGrammar
from tokgen.tokens import Grid, Sequence, Tokens

SPAN = ImageSpan(begin=20, end=21, offset=22, codes=8, min_length=2, max_length=5)  # 30 ids


def tokens(*rows: list[int], n: int = 5, codes: int = 8) -> Tokens:
    ids, mask = torch.zeros(len(rows), n, dtype=torch.int64), torch.zeros(len(rows), n, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    return Tokens(ids, Sequence(n), (codes,), mask)


def test_presets_have_the_published_vocabularies():
    assert (ImageSpan.seed().vocabulary, ImageSpan.lavit().vocabulary) == (40_194, 48_386)
    assert ImageSpan.video_lavit_motion().vocabulary == 49_412
    assert ImageSpan.lavit(20, 200).max_length == 200
    code = Tokens(torch.full((1, 32), 8191), Sequence(32), (8192,))
    (row,) = ImageSpan.seed().wrap(code)
    assert len(row) == 34 and row[:2] == [40_192, 32_000 + 8191] and row[-1] == 40_193


def test_what_was_wrapped_parses_back():
    made = tokens([7, 0, 3], [1, 2, 3, 4, 5])
    rows = SPAN.wrap(made)
    assert rows == [[20, 29, 22, 25, 21], [20, 23, 24, 25, 26, 27, 21]]
    back = SPAN.parse(rows, tokenizer="f" * 16)
    assert torch.equal(back.ids, made.ids) and torch.equal(back.mask, made.mask)
    assert back.tokenizer == "f" * 16 and back.layout == Sequence(5)
    # within text, several in one row, padded with end ids
    one = SPAN.parse(torch.tensor([1, 2, *rows[0], 3, *rows[1], 21, 21]))
    assert torch.equal(one.ids, made.ids)
    assert len(SPAN.parse([1, 2, 3])) == 0
    motion = replace(SPAN, min_length=4, max_length=4)
    assert motion.parse([20, 22, 23, 24, 25, 21], layout=Grid(1, 2, 2)).layout == Grid(1, 2, 2)


def test_padding_is_on_the_side_asked_for():
    made = tokens([7, 0, 3], [1, 2, 3, 4, 5])
    for left in (True, False):
        ids, mask = SPAN.wrap_padded(made, pad_id=0, left=left)
        assert ids.shape == mask.shape == (2, 7)
        assert [ids[i][mask[i]].tolist() for i in range(2)] == SPAN.wrap(made)
        assert mask[0].tolist() == ([False] * 2 + [True] * 5 if left else [True] * 5 + [False] * 2)
        assert ids[~mask].eq(0).all()


@pytest.mark.parametrize(
    "ids, message",
    [
        ([20, 22, 21], "has 1 codes; expected 2 to 5"),
        ([20, *[22] * 6, 21], "has 6 codes; expected 2 to 5"),
        ([1, 20, 22, 23], "row 0 ends inside a span, after 2 codes"),
        ([20, 22, 5, 21], "id 5 at place 2 of row 0 stands inside a span"),
        ([20, 22, 20, 21], "id 20 at place 2 of row 0 stands inside a span"),
        ([[1], [3, 24]], "id 24 at place 1 of row 1 is a code outside of any span"),
    ],
)
def test_a_wrong_span_is_named(ids, message):
    with pytest.raises(InputError, match=message) as error:
        SPAN.parse(ids)
    assert "\n" not in str(error.value)


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="must all differ"):
        replace(SPAN, end=25)
    with pytest.raises(ConfigError, match="min_length <= max_length"):
        replace(SPAN, min_length=6)
    with pytest.raises(InputError, match="this model writes 8 codes"):
        SPAN.wrap(tokens([1, 2], codes=9))
    with pytest.raises(InputError, match="picture 1 has 1 codes"):
        SPAN.wrap(tokens([1, 2], [1]))


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def generate(model, prompts, spans, new, **options):
    from transformers import LogitsProcessorList

    ids = torch.tensor(prompts)
    grammar = SpanGrammar(spans, ids.shape[1] + new)
    return model.generate(
        ids, attention_mask=ids != 0, max_new_tokens=new, logits_processor=LogitsProcessorList([grammar]), **options
    )


FIXED = replace(SPAN, min_length=4, max_length=4)
PROMPTS = [[0, 1, 5, 20], [1, 6, 7, 8]]  # one row has begun a picture, the other has not


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 3.0}, {"num_beams": 3}])
@pytest.mark.parametrize("span", [FIXED, SPAN], ids=["fixed", "variable"])
def test_generate_makes_whole_spans_only(model, span, options):
    seen = 0
    for seed in range(6 if options.get("do_sample") else 1):
        torch.manual_seed(seed)
        out = generate(model, PROMPTS, span, 25, **options)
        parsed = span.parse(out)  # raises if one span is not whole
        assert ((parsed.lengths >= span.min_length) & (parsed.lengths <= span.max_length)).all()
        assert len(parsed) >= 1  # that of the prompt
        seen += len(parsed)
    assert seen > (6 if options.get("do_sample") else 0)


def test_without_the_grammar_this_model_makes_broken_spans(model):
    torch.manual_seed(0)
    ids = torch.tensor(PROMPTS)
    out = model.generate(ids, attention_mask=ids != 0, max_new_tokens=25, do_sample=True, temperature=3.0)
    with pytest.raises(InputError):
        SPAN.parse(out)


@pytest.mark.parametrize("new", [3, 5, 6, 7])
def test_no_span_is_begun_that_has_no_room(model, new):
    for seed in range(10):
        torch.manual_seed(seed)
        out = generate(model, PROMPTS[1:], FIXED, new, do_sample=True, temperature=50.0, eos_token_id=None)
        assert out.shape[1] == 4 + new
        FIXED.parse(out)


def test_a_span_that_cannot_be_closed_is_refused_at_once(model):
    with pytest.raises(InputError, match="a span has 0 codes, needs 4 to 4 and an end, and 4 ids are left"):
        generate(model, PROMPTS, FIXED, 4)
    assert len(FIXED.parse(generate(model, PROMPTS, FIXED, 5))) == 1
    with pytest.raises(InputError, match="the model has 40 ids"):
        generate(model, PROMPTS, ImageSpan.seed(), 50)


def test_kinds_of_spans_do_not_mix(model):
    motion = ImageSpan(begin=30, end=31, offset=32, codes=8, min_length=3, max_length=3)
    kinds = [0, 0]
    for seed in range(8):
        torch.manual_seed(seed)
        out = generate(model, PROMPTS, [FIXED, motion], 40, do_sample=True, temperature=50.0, eos_token_id=None)
        for k, span in enumerate((FIXED, motion)):
            kinds[k] += len(span.parse(out))
    assert min(kinds) > 0


def test_scores_of_the_allowed_stay_as_they_are():
    scores = torch.randn(3, 40)
    rows = torch.tensor([[1, 2, 3, 4], [1, 20, 22, 23], [20, 22, 23, 21]])
    out = SpanGrammar(SPAN, 30)(rows, scores)
    allowed = out > -torch.inf
    assert torch.equal(out[allowed], scores[allowed])
    outside = [i for i in range(40) if not 21 <= i < 30]
    assert allowed[0].nonzero()[:, 0].tolist() == allowed[2].nonzero()[:, 0].tolist() == outside
    assert allowed[1].nonzero()[:, 0].tolist() == list(range(21, 30))
