"""LaVIT's dynamic tokens (arXiv 2309.04669, section 3.1): a selector that keeps some places of a picture, and a merger that
lets the kept ones read what the dropped ones held.

The selector is DynamicViT's predictor (Rao et al. 2021, arXiv 2106.02034, section 3.2), used once, on the encoder's last
features. In the merger a kept place sees the kept places before it (so that its code can be predicted from left to right),
and then, by cross-attention, the dropped places of the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError, InputError
from tokgen.nn.vit import CrossBlock, join_heads

MERGERS = ("masked", "gathered")

# -- selection --------------------------------------------------------------------------------------------------------


class TokenSelector(nn.Module):
    """Scores of places: log-probabilities of keeping (channel 0) and of dropping (channel 1), always in fp32.

    Args:
        dim: width of the features, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise ConfigError(
                f"the selector halves its width twice: features of {dim} channels are not a multiple of 4"
            )
        self.norm = nn.LayerNorm(dim, 1e-5)
        self.lift = nn.Linear(dim, dim)
        self.score = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, 2)."""
        with torch.autocast(features.device.type, enabled=False):
            x = F.gelu(self.lift(self.norm(features.float())))
            local, everywhere = x.chunk(2, -1)  # (B, N, C/2) each
            everywhere = everywhere.mean(1, keepdim=True).expand_as(local)
            return self.score(torch.cat([local, everywhere], -1)).log_softmax(-1)


def select_places(
    scores: Tensor,
    keep: float | int | None = None,
    threshold: float | None = None,
    sample: torch.Generator | None = None,
) -> Tensor:
    """Which places are kept, bool (B, N), without gradients. Never none: at least the best one is.

    With no option, a draw without chance: in raster order, a place is kept whenever the sum of the probabilities so far
    rounds to one more than before (systematic sampling). So many are kept as a draw keeps on average, and as evenly spread.
    Where the selector is sure this is what it finds likelier kept than dropped. Where it is not, as when it gives every
    place its third, a threshold of 1/2 would keep next to nothing, and the best third would lie in a heap: sets that the
    merger and the decoder, trained on draws, have never seen.

    Args:
        scores: of a `TokenSelector`, (B, N, 2).
        keep: exactly so many (int), or that share of the places, rounded (float): the same rule after all log odds were
            shifted until the probabilities add up to it.
        threshold: those whose probability of being kept lies above this; 1/2 is the published code's rule without its noise.
        sample: a draw from these probabilities, as the published code makes it at inference too.

    Raises:
        InputError: more than one of the three, or a number out of range.
    """
    if sum(option is not None for option in (keep, threshold, sample)) > 1:
        raise InputError("give one of keep, threshold and sample: each is a rule for what is kept")
    margin = (scores[..., 0] - scores[..., 1]).detach()  # log odds of being kept
    if keep is not None:
        return _spread(_shifted(margin.double(), _count(keep, scores.shape[1])))
    if threshold is not None:
        if not 0 < threshold < 1:
            raise InputError(f"threshold is {threshold}; expected a probability between 0 and 1")
        return _at_least_one(margin > math.log(threshold / (1 - threshold)), margin)
    if sample is not None:
        return _at_least_one(margin + _logistic(margin, sample) > 0, margin)
    return _at_least_one(_spread(margin.double().sigmoid()), margin)


def draw_places(scores: Tensor, keep: int | None = None) -> Tensor:
    """Which places are kept in a step of training: float (B, N), 0 or 1, with the gradient of the probability.

    Gumbel-softmax of temperature 1, straight through (Jang et al. 2017, arXiv 1611.01144). Of two classes only the
    difference of the noise counts, which is logistic.

    Args:
        keep: exactly so many: those with the best noisy scores.
    """
    margin = scores[..., 0] - scores[..., 1]
    margin = margin + _logistic(margin)
    hard = _at_least_one(margin > 0, margin) if keep is None else _best(margin, _count(keep, scores.shape[1]))
    soft = margin.sigmoid()
    return hard.float() + (soft - soft.detach())  # this order: the value is 0 or 1 exactly


def _count(keep: float | int, places: int) -> int:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise InputError(f"keep is {keep!r}; expected a share of the {places} places (float) or a count (int)")
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise InputError(f"keep is a share of {keep}; expected above 0 and at most 1.0 (an int is a count)")
        return max(1, round(keep * places))
    if not 1 <= keep <= places:
        raise InputError(f"keep is a count of {keep}; expected 1 to {places} places (a float is a share)")
    return keep


def _spread(probability: Tensor) -> Tensor:
    """Systematic sampling of float64 probabilities (B, N): their sum, rounded, of the places."""
    steps = (probability.cumsum(1) + 0.5).floor()
    return steps.diff(dim=1, prepend=torch.zeros_like(steps[:, :1])) > 0


def _shifted(margin: Tensor, count: int) -> Tensor:
    """sigmoid(margin + b) with the b of each row for which it adds up to `count`, by bisection."""
    low, high = -margin.amax(1, keepdim=True) - 40, -margin.amin(1, keepdim=True) + 40
    for _ in range(64):
        middle = (low + high) / 2
        over = (margin + middle).sigmoid().sum(1, keepdim=True) > count
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (margin + high).sigmoid()


def _best(margin: Tensor, count: int) -> Tensor:
    order = margin.detach().argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(margin, dtype=torch.bool).scatter(1, order, True)


def _at_least_one(keep: Tensor, margin: Tensor) -> Tensor:
    return keep | (_best(margin, 1) & ~keep.any(1, keepdim=True))


def _logistic(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    device = like.device if generator is None else generator.device
    u = torch.rand(like.shape, generator=generator, device=device).clamp(min=1e-12)
    return (u.log() - (-u).log1p()).to(like.device)


def kept_order(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Where the kept places are, in raster order, padded to the batch's greatest count.

    Args:
        keep: bool (B, N).

    Returns:
        places int64 (B, n), and bool (B, n), True where a row is real.
    """
    counts = keep.sum(1)
    n = int(counts.max())
    places = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :n]
    return places, torch.arange(n, device=keep.device) < counts[:, None]


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """Rows (B, n, C) of x (B, N, C) at places (B, n)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


# -- merging ----------------------------------------------------------------------------------------------------------


def masked_softmax(logits: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """DynamicViT's softmax under a policy, as LaVIT has it; fp32.

    e = exp(logits - max) * mask, (e + eps / N) / (sum e + eps). It departs from an exact masked softmax in two ways that
    trained weights know: the maximum is over all N keys, masked ones too, and masked keys keep a little weight. Where the
    mask leaves nothing, the weights are uniform.

    Args:
        logits: (B, heads, M, N).
        mask: float, broadcastable to it; may carry gradients.
    """
    logits = logits.float()
    e = (logits - logits.detach().amax(-1, keepdim=True)).exp() * mask
    return (e + eps / logits.shape[-1]) / (e.sum(-1, keepdim=True) + eps)


def visible_mask(keep: Tensor) -> Tensor:
    """What self-attention sees, float (B, 1, N, N) of keep float (B, N): kept places up to the query, and the query."""
    n = keep.shape[1]
    eye = torch.eye(n, device=keep.device)
    seen = keep[:, None, None, :]
    return (seen + (1 - seen) * eye).tril()


def dropped_mask(keep: Tensor) -> Tensor:
    """What cross-attention sees, float (B, 1, 1, N): the dropped places, wherever they are."""
    return 1 - keep[:, None, None, :]


class TokenMerger(nn.Module):
    """Blocks of self-attention among the kept places and cross-attention to the dropped ones.

    Args:
        dim, heads, hidden, depth: sizes; `dim` is the features' width.
        how: "masked" computes at all N places with the published masked softmax, which selection can learn through;
            "gathered" uses an exact softmax on the kept places alone where no gradients are asked for, which is faster and
            within 5e-6 of it at ordinary weights. They part where logits are extreme (see `masked_softmax`).
    """

    def __init__(self, dim: int, heads: int, hidden: int, depth: int, how: str = "masked") -> None:
        super().__init__()
        if how not in MERGERS:
            raise ConfigError(f"merger {how!r}; expected one of {', '.join(MERGERS)}")
        self.how = how
        self.origin_norm = nn.LayerNorm(dim, 1e-5)
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, 1e-5)

    def forward(self, features: Tensor, keep: Tensor) -> Tensor:
        """All places (B, N, C), kept and dropped, of features (B, N, C) and keep float (B, N); the published form."""
        visible, dropped = visible_mask(keep), dropped_mask(keep)
        origin = self.origin_norm(features)  # of the features, once, for all blocks
        x = features
        for block in self.blocks:
            x = merge_step(block, x, origin, visible, dropped)
        return self.norm(x)

    def kept(self, features: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The kept places alone, in raster order, padded.

        Args:
            features: (B, N, C).
            keep: (B, N); float from `draw_places`, or bool without gradients.

        Returns:
            vectors (B, n, C), which of them are real, bool (B, n), and their places int64 (B, n).
        """
        places, real = kept_order(keep if keep.dtype == torch.bool else keep > 0.5)
        if self.how == "masked" or keep.dtype != torch.bool:
            return rows_at(self(features, keep.float()), places), real, places
        return self._gathered(features, keep, places, real), real, places

    def _gathered(self, features: Tensor, keep: Tensor, places: Tensor, real: Tensor) -> Tensor:
        n = places.shape[1]
        x, origin = rows_at(features, places), self.origin_norm(features)
        eye = torch.eye(n, dtype=torch.bool, device=x.device)
        visible = (real[:, None, None, :] | eye).tril()  # (B, 1, n, n); a padded row sees itself: none is blind
        # where nothing was dropped, all places are read with one weight: queries of zero
        full = keep.all(1)[:, None, None, None]
        dropped = ~keep[:, None, None, :] | full  # (B, 1, 1, N)

        def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            if mask is dropped:
                q = q.masked_fill(full, 0)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        for block in self.blocks:
            x = merge_step(block, x, origin, visible, dropped, exact)
        return self.norm(x)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of (B, heads, ·, d) by `masked_softmax`."""
    weights = masked_softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, mask)
    return weights.to(v.dtype) @ v


def merge_step(
    block: CrossBlock,
    x: Tensor,
    origin: Tensor,
    visible: Tensor,
    dropped: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = masked_attention,
) -> Tensor:
    """One block of the merger on x (B, n, C), with origin (B, N, C) as the cross-attention's keys and values."""
    own, cross = block.self_attn, block.cross_attn
    x = x + own.proj(join_heads(attend(*own.project(block.norm0(x)), visible)))
    x = x + cross.proj(join_heads(attend(*cross.project(block.norm1(x), origin), dropped)))
    return x + block.mlp(block.norm2(x))
