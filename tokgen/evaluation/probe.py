"""How much of a label codes hold in the open: the accuracy of a linear model that reads it off them.

Ridge regression onto the classes, its largest output the answer, by five-fold cross-validation over all samples: each fold is
read by a model of the other four, and so each sample once by a model that never saw it. The penalty is chosen among `PENALTIES`
by how well models of three of these four folds read the fourth. Features are standardised by the training folds alone.

All in closed form and double precision.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokgen.errors import ConfigError
from tokgen.evaluation.metrics import Rows, key_hash
from tokgen.evaluation.retrieval import pixel_features
from tokgen.tokenizers.base import VisualTokenizer
from tokgen.tokens import Tokens

FOLDS = 5
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the number of samples, of features with variance 1
BINS = 1024  # of the histogram of codes; larger codebooks are hashed into it
LEAST = 10  # samples of a class on average, below which there is no probe


class Probe(Rows):
    """What a probe reads of each sample, and of which class it is."""

    def update(self, batch: dict[str, Any], tokens: Tokens, tokenizer: VisualTokenizer) -> None:
        """Count a batch with its "label"."""
        values = {
            "label": torch.tensor([key_hash(label) for label in batch["label"]], dtype=torch.int64),
            "codes": code_histogram(tokens.cpu()).half(),
        }
        vectors = mean_vectors(tokenizer, tokens)
        if vectors is not None:
            values["vectors"] = vectors.float().cpu()
        if tokenizer.modality == "pixels":
            pixels = batch["pixels"]
            frames = pixels.flatten(0, -4)
            small = pixel_features(frames).unflatten(0, (len(pixels), -1)).mean(1)
            values["pixels"] = small.half()  # to an eighth of a level of 255 or better
        self.add(batch["key"], **values)

    def figures(self) -> tuple[dict[str, float], int, str]:
        """The figures, the number of classes, and why there are no figures ("" where there are)."""
        found = self.result()
        names, labels, counts = found["label"].unique(return_inverse=True, return_counts=True)
        if len(names) < 2 or len(labels) < LEAST * len(names):
            return (
                {},
                len(names),
                f"{len(names)} classes among {len(labels)} samples; a probe needs 2, and {LEAST} of each",
            )
        figures = {
            f"probe_of_{name}": accuracy(found[name], labels)
            for name in ("vectors", "codes", "pixels")
            if name in found
        }
        return figures | {"largest_class": float(counts.max() / len(labels))}, len(names), ""


def details_of(field: str, classes: int) -> dict[str, Any]:
    """What the protocol says of a probe."""
    return {
        "field": field, "classes": classes, "model": "ridge onto one-hot classes, features standardised",
        "split": f"{FOLDS}-fold, by the sha256 of keys", "penalties": list(PENALTIES), "bins of codes": BINS,
    }  # fmt: skip


def code_histogram(tokens: Tokens) -> Tensor:
    """Square roots of the shares of an item's ids that fall into each bin, float32 (B, bins).

    Each code has a bin of its own while the codebooks together have at most `BINS` codes; else codes are hashed into `BINS`
    (Weinberger et al. 2009, arXiv 0902.2206, without signs).
    """
    ids, mask = tokens.to_sequence()  # (B, N C), codebooks one after the other
    bins = min(tokens.vocabulary, BINS)
    if tokens.vocabulary > BINS:
        ids = (ids * 2654435761 % 2**32) * bins // 2**32  # Knuth's multiplicative hash
    counts = torch.zeros(len(ids), bins, device=ids.device).scatter_add_(1, ids, mask.float())
    return (counts / mask.sum(1, keepdim=True).clamp(min=1)).sqrt()


@torch.no_grad()
def mean_vectors(tokenizer: VisualTokenizer, tokens: Tokens) -> Tensor | None:
    """The mean of an item's code vectors over its places, (B, code_dim); None for a tokenizer without vectors of places."""
    tokens = tokens.to(tokenizer.device)
    try:
        return tokenizer.embeddings(tokens).mean(1)
    except ConfigError:  # such as those whose items differ in length: their codebooks have vectors all the same
        quantizer = getattr(tokenizer, "quantizer", None)
    if quantizer is None:
        return None
    real = tokens.mask[..., None]
    return (quantizer.lookup(tokens.ids).float() * real).sum(1) / real.sum(1).clamp(min=1)


def accuracy(features: Tensor, labels: Tensor) -> float:
    """Share of the samples whose class a ridge regression of the other folds reads off their features.

    Args:
        features: (n, D), in an arbitrary order that is always the same: fold i is the i-th fifth.
        labels: int64 (n,), the classes 0, 1, …
    """
    n, x = len(labels), features.double()
    target = F.one_hot(labels).double()
    fold = torch.repeat_interleave(
        torch.arange(FOLDS), torch.tensor([(i + 1) * n // FOLDS - i * n // FOLDS for i in range(FOLDS)])
    )
    right = torch.zeros(FOLDS, FOLDS, len(PENALTIES))  # [i, j]: hits in fold i of models without i and j
    for i, j in itertools.combinations_with_replacement(range(FOLDS), 2):
        training = (fold != i) & (fold != j)
        for k, (weights, bias) in enumerate(_models(x[training], target[training])):
            for read, other in {(i, j), (j, i)}:
                answers = (x[fold == read] @ weights + bias).argmax(1)
                right[read, other, k] = (answers == labels[fold == read]).sum()
    hits = 0.0
    for i in range(FOLDS):
        scores = sum(right[j, i] for j in range(FOLDS) if j != i)
        best = int((scores == scores.max()).nonzero()[-1])  # the strongest where several are alike
        hits += float(right[i, i, best])
    return hits / n


def _models(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights (D, classes) and bias (classes,) for each of `PENALTIES`, of features (n, D) and one-hot classes (n, classes)."""
    mean, std = x.mean(0), x.std(0, correction=0)
    scale = torch.where(std > 1e-9 * x.abs().amax(0), 1 / std, 0)  # a feature that does not vary says nothing
    z, t = (x - mean) * scale, y - y.mean(0)
    wide = z.shape[1] > len(z)  # then the smaller matrix is that of the samples
    gram = (z @ z.T if wide else z.T @ z) / len(z)
    for penalty in PENALTIES:
        factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype))
        weights = z.T @ torch.cholesky_solve(t, factor) if wide else torch.cholesky_solve(z.T @ t, factor)
        weights = scale[:, None] * weights / len(z)
        yield weights, y.mean(0) - mean @ weights
