"""Two sets of pictures, or of clips, in an extractor's features: what the group "distribution" of a report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokgen.evaluation.extractors import Extractor
from tokgen.evaluation.metrics import FeatureStatistics, InceptionScore, Rows, below, those, within


class FeatureSet:
    """Statistics of one set of pictures, or clips, in an extractor's features."""

    def __init__(self) -> None:
        self.pool: FeatureStatistics | None = None
        self.spatial: FeatureStatistics | None = None
        self.score: InceptionScore | None = None
        self.kept = Rows()

    def update(self, keys: Sequence[str], features: dict[str, Tensor], keep: Tensor | None = None) -> None:
        """Count a batch; `keep`, bool (B,), are those whose pooled features precision and recall are taken over."""
        self._open({name: x.shape[1] for name, x in features.items() if name != "logits" or keep is not None})
        self.pool.update(features["pool"])
        if self.spatial is not None:
            self.spatial.update(features["spatial"])
        if self.score is not None:
            self.score.update(features["logits"])
        if keep is not None:
            self.kept.add(those(keys, keep), pool=features["pool"].float().cpu()[keep])

    def _open(self, widths: Mapping[str, int]) -> None:
        self.pool = self.pool or FeatureStatistics(widths["pool"])
        if "spatial" in widths:
            self.spatial = self.spatial or FeatureStatistics(widths["spatial"])
        if "logits" in widths:
            self.score = self.score or InceptionScore(widths["logits"])

    def state(self) -> dict[str, Tensor]:
        parts = {"pool": self.pool, "spatial": self.spatial, "score": self.score, "kept": self.kept}
        return {k: x for name, part in parts.items() if part is not None for k, x in below(name, part.state()).items()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        widths = {name: len(state[f"{name}.mean"]) for name in ("pool", "spatial") if f"{name}.mean" in state}
        if "score.sums" in state:
            widths["logits"] = len(state["score.sums"]) - 2
        self._open(widths)
        for name in ("pool", "spatial", "score", "kept"):
            if own := within(state, name):
                getattr(self, name).merge(own)

    @property
    def width(self) -> int:
        return 0 if self.pool is None else len(self.pool.mean)

    def features(self) -> Tensor:
        """Those kept, (N, D)."""
        return self.kept.result().get("pool", torch.zeros(0, self.width))


def distances(made: FeatureSet, truth: FeatureSet, name: str, extractor: Extractor) -> dict[str, float]:
    """Frechet distances, called `name` ("rfid", "gfid") and "sfid" in the FID's own features alone."""
    standard = extractor.standard
    figures = {name if standard else "frechet": made.pool.frechet(truth.pool)}
    if made.spatial is not None:
        figures["sfid" if standard else "spatial_frechet"] = made.spatial.frechet(truth.spatial)
    return figures


def by(extractor: Extractor) -> dict[str, str]:
    """A protocol's fields on the extractor."""
    return {"extractor": extractor.name, "extractor_hash": extractor.weights}


def caveats(extractor: Extractor, n: int, width: int) -> list[str]:
    """What a report says beside Frechet distances of `n` pictures, or clips, in `width` features."""
    notes = []
    what, usual = ("clips", "FVD") if extractor.of_clips else ("pictures", "FID")
    if not extractor.standard:
        notes.append(
            f"The Frechet distance is in features of {extractor.name}: it is no {usual}, and of another scale than any {usual}."
        )
    if n <= width:
        notes.append(
            f"Of {n} {what} in {width} dimensions no covariance is known: the Frechet distance is mostly the bias of so few."
        )
    return notes
