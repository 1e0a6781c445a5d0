"""The dual codebook of TokenFlow (arXiv 2412.03069, section 3.2, "shared mapping"): two streams, one index.

A vector is a semantic part and a pixel part. Code i is a pair, a semantic code and a pixel code, and the index of a vector is
the pair that is nearest in the sum of both distances. Each part is l2-normalised on its own, so that both distances lie in
[0, 4] and the streams count equally however wide they are. `index="separate"` gives each stream the nearest code of its own,
which is the baseline with twice as many indices; a stream of width 0 leaves an ordinary codebook of unit vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.quantizers.base import CodeQuantizer, masked_mean, straight_through
from tokgen.quantizers.search import nearest
from tokgen.quantizers.vq import Codebook, assignment_entropies


class DualVQ(CodeQuantizer):
    """Nearest pair of codes: argmin of |u_s - e_s|^2 + pixel_weight |u_p - e_p|^2 (arXiv 2412.03069, eq. 2 and 3).

    u is z with both parts normalised, semantic channels first; codes are (e_s, e_p), normalised likewise, and gradients pass
    straight through to u. Rows are stored as the optimizer leaves them and normalised wherever they are used, as published:
    the gradient is that of the direction, and no step has to write into a parameter that the optimizer owns.

    The codes are `codebooks.0.weight` (K, dim), a row for a pair; with index="separate" `codebooks.0.weight`
    (K, semantic_dim) and `codebooks.1.weight` (K, dim - semantic_dim).

    Losses, means over all `dim` channels together, as published:
        codebook: mean (sg[u] - code)^2.   commitment: beta * mean (u - sg[code])^2.
        entropy: entropy_weight * (mean of H(p_i) - H(mean of p_i)), p_i = softmax(-distance_i / entropy_temperature), over this
            rank's batch; present if entropy_weight > 0; with separate indices the sum of both streams'. In chunks, see
            `tokgen.quantizers.vq.assignment_entropies`.

    Args:
        dim: channels of z, of both streams together.
        codebook_size: number of codes K.
        semantic_dim: channels of the semantic stream, which come first; 0 or `dim` leaves one stream.
        index: "shared": ids (...); "separate": ids (..., 2).
        pixel_weight: w of the distance; 1 everywhere in the publication.
        beta, entropy_weight, entropy_temperature: of the losses.
        kmeans_init, revive_below, decay: see `tokgen.quantizers.vq.VQ`; pairs start and move as wholes. Off, as published: at
            paper size more than 95 % of the codes stay in use.

    Raises:
        ConfigError: a value outside the above.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        semantic_dim: int = 32,
        index: str = "shared",
        pixel_weight: float = 1.0,
        beta: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        kmeans_init: bool = False,
        revive_below: float = 0.0,
        decay: float = 0.99,
    ) -> None:
        if not 0 <= semantic_dim <= dim:
            raise ConfigError(f"DualVQ: semantic_dim {semantic_dim}; expected 0 to dim {dim}")
        if index not in ("shared", "separate"):
            raise ConfigError(f"DualVQ: index {index!r}; expected 'shared' or 'separate'")
        if not pixel_weight > 0 or not entropy_temperature > 0:
            raise ConfigError(
                f"DualVQ: pixel_weight {pixel_weight} and entropy_temperature {entropy_temperature} must be above 0"
            )
        # channels of the streams that exist, semantic before pixel, and their weights in the distance
        streams = {"semantic": (semantic_dim, 1.0), "pixel": (dim - semantic_dim, pixel_weight)}
        widths = {name: width for name, (width, _) in streams.items() if width}
        if len(widths) < 2:
            index = "shared"  # of one stream there is nothing to separate
        super().__init__(dim, None, (codebook_size,) * (1 if index == "shared" else 2))
        self.index, self.beta = index, beta
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.widths = tuple(widths.values())
        self.weights = tuple(streams[name][1] for name in widths)
        # one codebook over all streams, or one for each
        self.parts = (self.widths,) if index == "shared" else tuple((width,) for width in self.widths)
        self.codebooks = nn.ModuleList(
            _UnitCodebook(codebook_size, widths, decay, kmeans_init, revive_below) for widths in self.parts
        )

    @classmethod
    def example_options(cls) -> dict[str, dict[str, Any]]:
        small = {"codebook_size": 48, "semantic_dim": 5}
        return {
            "shared": {**small, "entropy_weight": 0.1},
            "weighted": {**small, "pixel_weight": 0.3, "kmeans_init": True, "revive_below": 0.05},
            "separate": {**small, "index": "separate", "entropy_weight": 0.1, "revive_below": 0.05},
            "pixel": {"codebook_size": 40, "semantic_dim": 0},
            "semantic": {"codebook_size": 64, "semantic_dim": 8, "kmeans_init": True},
        }

    def table(self) -> list[Tensor]:
        """The normalised codes of each codebook, fp32 (K, width), with gradients."""
        return [_unit(book.weight.float(), widths) for book, widths in zip(self.codebooks, self.parts)]

    def assign(self, y: Tensor) -> Tensor:
        return self._nearest(_unit(y, self.widths))

    def _nearest(self, u: Tensor) -> Tensor:
        """ids (n,) or (n, 2) of normalised u (n, dim)."""
        if self.index == "separate":
            parts = zip(u.split(self.widths, -1), self.table())
            return torch.stack([nearest(part, codes, "dot") for part, codes in parts], -1)
        # all codes have the same lengths, so that the nearest is that of the greatest u_s.e_s + w u_p.e_p
        scaled = [w * part for w, part in zip(self.weights, u.split(self.widths, -1))]
        return nearest(torch.cat(scaled, -1), self.table()[0], "dot")

    def embed(self, ids: Tensor) -> Tensor:
        columns = ids.unbind(-1) if self.index == "separate" else [ids]
        rows = [F.embedding(i, book.weight).float() for i, book in zip(columns, self.codebooks)]
        return torch.cat([_unit(row, widths) for row, widths in zip(rows, self.parts)], -1)

    def train_step(self, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        u = _unit(y, self.widths)
        kept = u if keep is None else u[keep]
        sizes = [sum(widths) for widths in self.parts]
        for book, part in zip(self.codebooks, kept.split(sizes, -1)):
            book.prepare(part)
        ids = self._nearest(u)
        codes = self.embed(ids)
        losses = {
            "codebook": masked_mean((codes - u.detach()).square(), keep),
            "commitment": self.beta * masked_mean((u - codes.detach()).square(), keep),
        }
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * self._entropy(kept)
        seen = ids if keep is None else ids[keep]
        columns = seen.unbind(-1) if self.index == "separate" else [seen]
        for book, part, i in zip(self.codebooks, kept.split(sizes, -1), columns):
            book.observe(part, i)
        return straight_through(u, codes.detach()), ids, losses

    def _entropy(self, u: Tensor) -> Tensor:
        if self.index == "separate":
            pairs = list(zip(u.split(self.widths, -1), self.table()))
        else:  # scaled by the roots of the weights, the squared distance is the weighted sum
            roots = torch.cat([u.new_full((n,), w**0.5) for n, w in zip(self.widths, self.weights)])
            pairs = [(u * roots, self.table()[0] * roots)]
        terms = [assignment_entropies(a, b, self.entropy_temperature) for a, b in pairs]
        return sum(each - mean for each, mean in terms)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, widths={self.widths}, weights={self.weights}, index={self.index!r}"


class _UnitCodebook(Codebook):
    """A `Codebook` whose parts of each row have length 1 when they are written, at the start too."""

    def __init__(
        self, size: int, widths: tuple[int, ...], decay: float, kmeans_init: bool, revive_below: float
    ) -> None:
        super().__init__(size, sum(widths), "l2", "gradient", decay, 1e-5, kmeans_init, revive_below)
        self.widths = widths
        with torch.no_grad():
            self.weight.copy_(self.written(self.weight))  # uniform, then normalised, as published

    def written(self, codes: Tensor) -> Tensor:
        return _unit(codes, self.widths)


def _unit(x: Tensor, widths: tuple[int, ...]) -> Tensor:
    """x (n, sum of widths) with every part of the channels normalised by itself."""
    return torch.cat([F.normalize(part, dim=-1) for part in x.split(widths, -1)], -1)
