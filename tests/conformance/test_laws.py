"""Every registered tokenizer and quantizer, in each example configuration, keeps the laws."""

from __future__ import annotations

import pytest

from tokgen.conformance import check_quantizer, check_tokenizer, examples
from tokgen.quantizers.base import QUANTIZERS
from tokgen.tokenizers.base import TOKENIZERS


def cases(registry, options):
    return [f"{name}/{label}" for name in registry.names() for label in getattr(registry[name], options)()]


def build(case):
    return dict(examples(case.split("/")[0]))[case]


@pytest.mark.parametrize("case", cases(TOKENIZERS, "example_configs"))
def test_tokenizer_keeps_the_laws(case):
    tokenizer = build(case)
    findings = check_tokenizer(tokenizer)
    assert len(findings) == len(tokenizer.ndims) * (4 * (4 if tokenizer.image_size is None else 2) + 1)
    assert [f for f in findings if f.problem] == []


@pytest.mark.parametrize("case", cases(QUANTIZERS, "example_options"))
def test_quantizer_keeps_the_laws(case):
    findings = check_quantizer(build(case))
    assert len(findings) == 4 * 4
    assert [f for f in findings if f.problem] == []


def test_a_tokenizer_that_breaks_a_law_is_found(monkeypatch):
    tokenizer = build("vqgan/cosine")
    decode = type(tokenizer).detokenize
    monkeypatch.setattr(type(tokenizer), "detokenize", lambda self, tokens: decode(self, tokens) + 1e-3)
    broken = {f.law for f in check_tokenizer(tokenizer, publication=False) if f.problem}
    assert broken == {"round trip"}


def test_a_quantizer_whose_ids_depend_on_the_batch_is_found(monkeypatch):
    quantizer = build("vq/gradient")
    forward = type(quantizer).forward
    monkeypatch.setattr(type(quantizer), "forward", lambda self, z, mask=None: forward(self, z - z.mean(0), mask))
    assert "determinism" in {f.law for f in check_quantizer(quantizer) if f.problem}
