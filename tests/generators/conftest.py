from __future__ import annotations

import pytest
import torch

from tokgen.generators.llama import LlamaConfig, LlamaGenerator


@pytest.fixture
def make(text):
    """A small generator. Its weights are drawn wide, so that its predictions differ clearly from id to id."""

    def build(grid=(4, 4), codebook_sizes=(24,), std=0.15, **options):
        layout = dict(zip(("t", "h", "w")[-len(grid) :], grid), kind="Grid")
        sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "max_text": 40, **options}
        model = LlamaGenerator(
            LlamaConfig(layout=sizes.pop("layout", layout), codebook_sizes=codebook_sizes, text_vocab=280, **sizes),
            text,
        )
        if std:
            for p in model.parameters():
                if p.ndim > 1:
                    torch.nn.init.normal_(p, std=std)
        return model.eval()

    return build
