"""Measures that stream: a batch at a time, in double precision.

What a measure has counted is its `state`, tensors by name; `merge` adds the state of another process, or of an earlier run of this
one, so that the parts of a set give what the whole gives. Nothing is kept of a sample but what `Rows` is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokgen.errors import InputError
from tokgen.evaluation.frechet import frechet_from_statistics
from tokgen.quantizers.base import usage_stats
from tokgen.tokens import Tokens

SSIM_SIDE = 11  # of the Gaussian window: smaller pictures have no SSIM
NEIGHBOURS = 10_000  # about so many pictures are kept for precision, recall and retrieval
PERFECT = (0.5 / 255) ** 2  # squared error that a perfect picture counts as: half a level, 54 dB, and not infinity


# -- pictures against pictures ------------------------------------------------------------------------------------------


def pixel_errors(made: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """ "psnr" (dB), "l1" (in [0, 1]) and, from 11 x 11 pixels on, "ssim" of each pair, float64 (B,).

    SSIM (Wang et al. 2004) with a Gaussian window of 11 x 11, sigma 1.5, data range 1, K 0.01 and 0.03, mean over channels
    and over the places whose window lies inside the picture, as scikit-image with `gaussian_weights`.

    Args:
        made, truth: uint8 (B, 3, H, W).
    """
    if made.dtype != torch.uint8 or truth.dtype != torch.uint8 or made.shape != truth.shape or made.ndim != 4:
        raise InputError(
            f"pictures are {made.dtype} {tuple(made.shape)} and {truth.dtype} {tuple(truth.shape)}; expected uint8 "
            f"(B, 3, H, W), both of one shape"
        )
    a, b = made.cpu().double() / 255, truth.cpu().double() / 255
    mse = (a - b).square().mean((1, 2, 3)).clamp(min=PERFECT)
    errors = {"psnr": -10 * mse.log10(), "l1": (a - b).abs().mean((1, 2, 3))}
    if min(a.shape[-2:]) >= SSIM_SIDE:
        from torchmetrics.functional.image import structural_similarity_index_measure

        # torchmetrics' own mean includes places whose window hangs over the edge, which moves the figure
        _, places = structural_similarity_index_measure(
            a, b, gaussian_kernel=True, sigma=1.5, kernel_size=SSIM_SIDE, data_range=1.0, reduction="none",
            return_full_image=True,
        )  # fmt: skip
        edge = SSIM_SIDE // 2
        errors["ssim"] = places[..., edge:-edge, edge:-edge].mean((1, 2, 3))
    return errors


class Means:
    """Means over samples of named values."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """One value for each sample, (B,)."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.double().sum())
            self.counts[name] = self.counts.get(name, 0) + len(value)

    def state(self) -> dict[str, Tensor]:
        return {n: torch.tensor([s, self.counts[n]], dtype=torch.float64) for n, s in self.sums.items()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        for name, (total, count) in ((name, pair.tolist()) for name, pair in state.items()):
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0) + int(count)

    def result(self, names: Sequence[str]) -> dict[str, float]:
        """Means of those of the names that any sample had a value of."""
        return {name: self.sums[name] / self.counts[name] for name in names if self.counts.get(name)}


class Rows:
    """Values of single samples, in an order that follows from their keys alone: a shuffle that is the same everywhere."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Tensor]] = []

    def add(self, keys: Sequence[str], **values: Tensor) -> None:
        """A row of each value, (B, ...), for each key."""
        if keys:
            self.parts.append({"key": torch.tensor([key_hash(k) for k in keys], dtype=torch.int64), **values})

    def state(self) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in self.parts]) for name in (self.parts[0] if self.parts else ())}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self.parts.append(dict(state))

    def result(self) -> dict[str, Tensor]:
        """Each value of all samples, (N, ...); nothing where there were none."""
        state = self.state()
        order = state.pop("key").argsort(stable=True) if state else None
        return {name: value[order] for name, value in state.items()}


def key_hash(key: str) -> int:
    """The first 64 bits of a key's sha256, as a signed number."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)


def number_of(text: str) -> int:
    """A number below 2^63 that stands for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def few(keys: Sequence[str], total: int) -> Tensor:
    """Which of the samples are among the about `NEIGHBOURS` of all, bool (B,): by their keys, and so the same on any ranks."""
    share = NEIGHBOURS / max(total, NEIGHBOURS)
    return torch.tensor([number_of(key) < share * 2**63 for key in keys], dtype=torch.bool)


def those(keys: Sequence[str], keep: Tensor) -> list[str]:
    return [key for key, kept in zip(keys, keep.tolist()) if kept]


def within(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state that were put below `prefix.`, by their own names."""
    return {name.removeprefix(f"{prefix}."): x for name, x in state.items() if name.startswith(f"{prefix}.")}


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `within`."""
    return {f"{prefix}.{name}": x for name, x in state.items()}


# -- codes --------------------------------------------------------------------------------------------------------------


class CodeHistogram:
    """How often each code of each codebook occurs.

    Args:
        sizes: codes of each codebook.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.counts = [torch.zeros(size, dtype=torch.int64) for size in sizes]

    def update(self, tokens: Tokens) -> None:
        ids = tokens.ids if tokens.ids.ndim == 3 else tokens.ids[..., None]  # (B, N, C)
        for c, counts in enumerate(self.counts):
            counts += torch.bincount(ids[..., c][tokens.mask].cpu(), minlength=len(counts))

    def state(self) -> dict[str, Tensor]:
        return {str(c): counts for c, counts in enumerate(self.counts)}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        for c, counts in enumerate(self.counts):
            counts += state[str(c)]

    def result(self) -> dict[str, list[float]]:
        """ "usage" (share of codes that occur), "perplexity" and "entropy" (bits), of each codebook."""
        stats = [usage_stats(counts) for counts in self.counts]
        usage, perplexity = ([float(s[name]) for s in stats] for name in ("usage", "perplexity"))
        return {"usage": usage, "perplexity": perplexity, "entropy": [float(s["perplexity"].log2()) for s in stats]}


# -- sets against sets --------------------------------------------------------------------------------------------------


class FeatureStatistics:
    """Number, mean and summed squared deviations of feature vectors, float64 (Chan, Golub and LeVeque 1979).

    Args:
        dim: D, width of a vector.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.m2 = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Count features (B, D). Raises InputError for another width, or values that are not finite."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise InputError(f"features are {tuple(features.shape)}; expected (B, {len(self.mean)})")
        if not len(features):
            return
        x = features.detach().to("cpu", torch.float64)
        if not bool(x.isfinite().all()):
            raise InputError("features are not finite; the extractor's weights are damaged, or a picture is")
        batch = FeatureStatistics(x.shape[1])
        batch.n, batch.mean = len(x), x.mean(0)
        deviation = x - batch.mean
        batch.m2 = deviation.T @ deviation
        self.merge(batch.state())

    def state(self) -> dict[str, Tensor]:
        return {"n": torch.tensor(self.n), "mean": self.mean, "m2": self.m2}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        more = int(state["n"])
        n = self.n + more
        if not n:
            return
        step = state["mean"] - self.mean
        self.m2 += state["m2"] + torch.outer(step, step) * (self.n * more / n)
        self.mean = self.mean + step * (more / n)
        self.n = n

    @property
    def covariance(self) -> Tensor:
        """(D, D), divided by n - 1. Raises InputError for fewer than two vectors."""
        if self.n < 2:
            raise InputError(f"a covariance needs at least two pictures, and {self.n} were counted; give more samples")
        return self.m2 / (self.n - 1)

    def frechet(self, other: FeatureStatistics) -> float:
        """Frechet distance between Gaussians of these statistics (see `tokgen.evaluation.frechet`)."""
        return frechet_from_statistics(self.mean, self.covariance, other.mean, other.covariance)


class InceptionScore:
    """exp of the mean divergence of a picture's classes from all pictures' (Salimans et al. 2016, arXiv 1606.03498, section 4).

    Over all pictures at once. The usual mean over ten tenths is a little lower: it is the same with `splits=1`.

    Args:
        classes: width of the logits.
    """

    def __init__(self, classes: int) -> None:
        self.sums = torch.zeros(classes + 2, dtype=torch.float64)  # of p, of its entropy, and the number of pictures

    def update(self, logits: Tensor) -> None:
        """Count the class logits (B, classes) of pictures."""
        log_p = logits.detach().to("cpu", torch.float64).log_softmax(1)
        p = log_p.exp()
        entropy = -(p * log_p).sum()
        self.sums += torch.cat([p.sum(0), entropy[None], entropy.new_tensor([len(p)])])

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        self.sums += state["sums"]

    def result(self) -> float:
        sums = self.sums
        mean = sums[:-2] / sums[-1]
        whole = -(mean * mean.clamp(min=1e-300).log()).sum()
        return float((whole - sums[-2] / sums[-1]).exp())


def precision_recall(made: Tensor, truth: Tensor, k: int = 3, rows: int = 1024) -> tuple[float, float]:
    """How many made pictures lie among the true ones, and how many true ones among the made (Kynkaanniemi et al. 2019,
    arXiv 1904.06991, section 2).

    A set's manifold is the union of balls around its features, each reaching to its k-th nearest neighbour in the set.

    Args:
        made, truth: features (N, D) and (M, D), more than k of each.
        rows: features compared with all others at a time, which bounds the memory.

    Raises:
        InputError: not enough features.
    """
    if min(len(made), len(truth)) <= k:
        raise InputError(f"{len(made)} and {len(truth)} features; precision and recall need more than k = {k} of each")
    made, truth = made.double(), truth.double()

    def inside(x: Tensor, manifold: Tensor) -> float:
        # torch's own default multiplies matrices, whose rounding puts a picture at a distance from itself
        exact = "donot_use_mm_for_euclid_dist"
        radius = torch.cat(
            [torch.cdist(part, manifold, compute_mode=exact).kthvalue(k + 1).values for part in manifold.split(rows)]
        )  # of each ball; the nearest is the feature itself
        hits = [(torch.cdist(part, manifold, compute_mode=exact) <= radius).any(1) for part in x.split(rows)]
        return float(torch.cat(hits).double().mean())

    return inside(made, truth), inside(truth, made)
