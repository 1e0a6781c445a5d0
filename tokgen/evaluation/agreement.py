"""How well pictures agree with their captions: drawn ones, decoded ones, and codes that are read without being decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokgen.evaluation.metrics import Means, Rows, few, number_of, those
from tokgen.evaluation.progress import Sums
from tokgen.evaluation.retrieval import matching_rates
from tokgen.pretrained import fingerprint
from tokgen.tokenizers.base import VisualTokenizer
from tokgen.tokens import Tokens


class TextAgreement:
    """Drawn or decoded pictures and those of the data, by an encoder of pictures and captions (`embed` and `encode_text`).

    Scores are 100 max(cos, 0), as CLIPScore's without its factor of 2.5 (Hessel et al. 2021, arXiv 2104.08718).
    """

    def __init__(self, encoder: Any, total: int) -> None:
        """`total`: samples that there are, of which about `NEIGHBOURS` are matched."""
        self.encoder, self.name, self.weights, self.total = (
            encoder,
            encoder.name,
            fingerprint(encoder, "weights"),
            total,
        )
        self.sums = Sums(means=Means(), kept=Rows())

    def state(self) -> dict[str, Tensor]:
        return self.sums.state()

    def merge(self, state: Mapping[str, Tensor]) -> None:
        self.sums.merge(state)

    @torch.no_grad()
    def update(self, keys: Sequence[str], made: Tensor, truth: Tensor, captions: Sequence[str]) -> None:
        """Count a batch of uint8 pictures (B, 3, H, W)."""
        device = next(self.encoder.parameters()).device
        pictures = [self.encoder.embed(x.to(device)) for x in (made, truth)]
        made, truth, texts = (
            F.normalize(x.double().cpu(), dim=1) for x in (*pictures, self.encoder.encode_text(captions))
        )
        scores = [100 * (x * texts).sum(1).clamp(min=0) for x in (made, truth)]
        self.sums.means.add({"text_score": scores[0], "text_score_of_references": scores[1]})
        _keep(self.sums.kept, self.total, keys, captions, made=made, truth=truth, texts=texts)

    def result(self) -> dict[str, float]:
        kept, scores = self.sums.kept.result(), self.sums.means.result(("text_score", "text_score_of_references"))
        if not kept:
            return {}
        own = _rates(kept, "truth")
        return (
            scores
            | _rates(kept, "made")
            | {f"{name}_of_references": own[name] for name in ("image_to_text", "text_to_image")}
        )


class CodeAgreement:
    """Codes and captions in the common space of a tokenizer that reads both (`code_embedding` and `encode_text`)."""

    def __init__(self, tokenizer: VisualTokenizer, total: int) -> None:
        self.tokenizer, self.total, self.kept = tokenizer, total, Rows()

    def state(self) -> dict[str, Tensor]:
        return self.kept.state()

    def merge(self, state: Mapping[str, Tensor]) -> None:
        self.kept.merge(state)

    def update(self, keys: Sequence[str], tokens: Tokens, captions: Sequence[str]) -> None:
        """Count a batch; samples without a caption are left out."""
        codes, texts = self.tokenizer.code_embedding(tokens), self.tokenizer.encode_text(captions)
        _keep(self.kept, self.total, keys, captions, codes=codes.double().cpu(), texts=texts.double().cpu())

    def result(self) -> tuple[dict[str, float], int]:
        """Rates, and among how many."""
        kept = self.kept.result()
        return (_rates(kept, "codes"), len(kept["codes"])) if kept else ({}, 0)


def _keep(rows: Rows, total: int, keys: Sequence[str], captions: Sequence[str], **embeddings: Tensor) -> None:
    keep = few(keys, total) & torch.tensor([bool(c) for c in captions])
    numbers = torch.tensor([number_of(c) for c in captions], dtype=torch.int64)  # equal captions are one
    rows.add(those(keys, keep), numbers=numbers[keep], **{name: x[keep] for name, x in embeddings.items()})


def _rates(kept: dict[str, Tensor], name: str) -> dict[str, float]:
    rates = matching_rates(kept[name], kept["texts"], kept["numbers"])
    return {name: float(rate) for name, rate in rates.items() if name != "pairs"}
