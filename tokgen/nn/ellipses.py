"""Trajectories as ellipses that move through a clip: measured from labels, coded as integers, drawn as soft layers.

A trajectory lives from its birth to its death; in between, a few key frames spread evenly over its life say where its ellipse
is, and the frames between two keys are interpolated. All of this is coded by uniform scalar quantizers without parameters, so
that `decode(ids)` is exact and `encode(decode(ids))` gives the ids back. Drawing is a power diagram: where ellipses overlap,
the one whose centre is nearer in its own measure shows (as Gaussians do in a mixture), so every pixel shows some trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tokgen.errors import ConfigError, InputError

SMALLEST, LARGEST = (
    0.004,
    0.6,
)  # standard deviation, in widths (heights) of the picture: half a pixel of 128, two far edges
STEEPEST = 0.97  # correlation of x and y
THINNEST, FULLEST = 1 / 64, 2.0  # share of the ellipse of two standard deviations that the trajectory's pixels fill
DEAD = -1e4  # logit of a trajectory where it does not live; finite, so that no row is ever without a number
REACH = 3.0  # canonical maps cover this many standard deviations to each side


@dataclass(frozen=True)
class Ellipses:
    """Ellipses of M trajectories in T frames; positions and lengths in widths (x) and heights (y) of the picture.

    Attributes:
        x, y: centres, float32 (B, M, T).
        sx, sy: standard deviations of the pixels' places, of a uniform ellipse half its half-axes.
        rho: correlation of x and y.
        fill: share of the ellipse with half-axes of two standard deviations that is covered.
        alive: bool, whether the trajectory shows at all.
    """

    x: Tensor
    y: Tensor
    sx: Tensor
    sy: Tensor
    rho: Tensor
    fill: Tensor
    alive: Tensor

    def __getitem__(self, index: object) -> Ellipses:
        return Ellipses(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


# -- measuring ----------------------------------------------------------------------------------------------------------


def order_labels(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Number the trajectories of each clip by size: labels int64 (B, T, h, w) -> (ranks int64 (B, T, h, w), numbers (B,)).

    The largest is 0; equal ones go by their first pixel. So the order does not depend on the numbers that the source gave,
    and the first n trajectories are the ones that cover most. Those beyond the first `count`, and pixels without a trajectory, are -1.
    """
    b, pixels = len(labels), labels[0].numel()
    flat = labels.flatten(1) + 1  # 0: none
    m = int(flat.max()) + 1
    volume = torch.zeros(b, m, dtype=torch.int64, device=labels.device)
    volume.scatter_add_(1, flat, torch.ones_like(flat))
    first = torch.full_like(volume, pixels)
    first.scatter_reduce_(1, flat, torch.arange(pixels, device=labels.device).expand_as(flat), "amin")
    volume[:, 0] = 0
    order = (volume * (pixels + 1) + pixels - first).argsort(1, descending=True)  # no two alike but empty ones
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(m, device=labels.device).expand_as(order))
    ranks = torch.where((ranks < count) & (volume > 0), ranks, -1)
    return ranks.gather(1, flat).view_as(labels), (volume > 0).sum(1).clamp(max=count)


def measure(labels: Tensor, count: int) -> Ellipses:
    """Moments of trajectories 0 .. count-1 in labels int64 (B, T, h, w), -1 none. From sums of integers: exact in any order."""
    b, t, h, w = labels.shape
    flat = (torch.arange(b * t, device=labels.device)[:, None] * (count + 1) + labels.view(b * t, -1) + 1).flatten()
    y = (2 * torch.arange(h, device=labels.device) + 1).view(h, 1).expand(h, w)  # places in half pixels
    x = (2 * torch.arange(w, device=labels.device) + 1).expand(h, w)
    values = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], -1).view(1, h * w, 6)
    sums = torch.zeros(b * t * (count + 1), 6, dtype=torch.int64, device=labels.device)
    sums.index_add_(0, flat, values.expand(b * t, -1, -1).reshape(-1, 6))
    sums = sums.view(b, t, count + 1, 6)[:, :, 1:].transpose(1, 2)  # (B, M, T, 6)
    n, sx, sy, sxx, syy, sxy = sums.unbind(-1)
    size = n.clamp(min=1).float()
    # n * sum of squares - square of sum is an exact integer; each pixel has an extent of its own, 1/12 of its width squared
    varx = ((n * sxx - sx * sx) / size**2 / 4 + 1 / 12) / w**2
    vary = ((n * syy - sy * sy) / size**2 / 4 + 1 / 12) / h**2
    cov = (n * sxy - sx * sy) / size**2 / (4 * w * h)
    rho = (cov / (varx * vary).sqrt()).clamp(-STEEPEST, STEEPEST)
    fill = n / (4 * math.pi * h * w) / (varx * vary * (1 - rho**2)).sqrt()
    return Ellipses(sx / size / (2 * w), sy / size / (2 * h), varx.sqrt(), vary.sqrt(), rho, fill, n > 0)


# -- coding -------------------------------------------------------------------------------------------------------------


class EllipseCodec:
    """Ellipses as integers: birth, death, and x, y, log sx, log sy, rho, log fill at each of `keys` key frames.

    Args:
        frames: the longest clip.
        keys: key frames of a life, evenly from birth to death. Their values are the least-squares fit of a line from key to
            key to all frames in which the trajectory is seen.
        levels: of x, y, sx, sy, rho and fill. The first level of fill says that the trajectory is hidden around that key.
    """

    def __init__(self, frames: int, keys: int, levels: Sequence[int]) -> None:
        if frames < 1 or keys < 1 or len(levels) != 6 or min(levels) < 2:
            raise ConfigError(
                f"ellipses of {frames} frames, {keys} keys and levels {tuple(levels)}; expected at least one frame and key, and "
                "at least 2 levels of each of x, y, sx, sy, rho, fill"
            )
        self.frames, self.keys, self.levels = frames, keys, tuple(int(n) for n in levels)
        span = math.log(SMALLEST), math.log(LARGEST)
        self.low = (0.0, 0.0, span[0], span[0], -STEEPEST, math.log(THINNEST))
        self.high = (1.0, 1.0, span[1], span[1], STEEPEST, math.log(FULLEST))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.frames, self.frames, *self.levels * self.keys)

    def hats(self, birth: Tensor, death: Tensor, t: int) -> Tensor:
        """How much each key counts in each frame of the life, float32 (..., T, J), summing to 1; births and deaths int64 (...)."""
        since = torch.arange(t, device=birth.device) - birth[..., None]
        life = (death - birth)[..., None]
        at = since / life.clamp(min=1) * (self.keys - 1)  # (..., T)
        hats = (1 - (at[..., None] - torch.arange(self.keys, device=birth.device)).abs()).clamp(min=0)
        return hats * ((since >= 0) & (since <= life))[..., None]

    def encode(self, ellipses: Ellipses) -> Tensor:
        """int64 (B, M, 2 + 6 J); rows of trajectories that never live are 0. Raises InputError for more frames than `frames`."""
        alive = ellipses.alive
        t = alive.shape[-1]
        if t > self.frames:
            raise InputError(
                f"a clip of {t} frames; this tokenizer takes up to {self.frames}: cut it into shorter clips"
            )
        time = torch.arange(t, device=alive.device)
        birth = torch.where(alive, time, t - 1).amin(-1)
        death = torch.where(alive, time, 0).amax(-1).maximum(birth)
        values = [
            ellipses.x,
            ellipses.y,
            ellipses.sx.log(),
            ellipses.sy.log(),
            ellipses.rho,
            ellipses.fill.clamp(min=1e-6).log(),
        ]
        keys, seen = self._fit(torch.stack(values, -1), alive, self.hats(birth, death, t))  # (B, M, J, 6), (B, M, J)
        codes = [self._quantize(keys[..., i], i) for i in range(6)]
        codes[5] = torch.where(seen, codes[5], 0)
        ids = torch.cat([birth[..., None], death[..., None], torch.stack(codes, -1).flatten(2)], -1)
        return ids.masked_fill(~alive.any(-1, keepdim=True), 0)

    def _fit(self, values: Tensor, alive: Tensor, hats: Tensor) -> tuple[Tensor, Tensor]:
        """Values at the keys from those in the frames, values (B, M, T, 6) -> (B, M, J, 6), and where anything is seen (B, M, J)."""
        weights = hats * alive[..., None]  # (B, M, T, J)
        near = weights.sum(-2)
        # a key that no frame speaks for takes its neighbours' values: a little of the squared difference of keys is added
        step = torch.diff(torch.eye(self.keys, device=hats.device), dim=0)
        normal = weights.transpose(-1, -2) @ hats + 1e-3 * step.T @ step
        if self.keys == 1:
            normal = normal.clamp(min=1e-3)
        normal = normal + 1e-6 * torch.eye(self.keys, device=hats.device)
        right = weights.transpose(-1, -2) @ torch.where(alive[..., None], values, 0)
        dtype = torch.float32 if hats.device.type == "mps" else torch.float64
        keys = torch.linalg.solve(normal.to(dtype), right.to(dtype)).float()
        return keys, near * 2 >= hats.sum(-2).clamp(min=1e-6)

    def _quantize(self, value: Tensor, i: int) -> Tensor:
        n = self._cells(i)
        cell = ((value - self.low[i]) / (self.high[i] - self.low[i]) * n).floor().clamp(0, n - 1).long()
        return cell + int(i == 5)

    def _dequantize(self, codes: Tensor, i: int) -> Tensor:
        n = self._cells(i)
        cell = (codes - int(i == 5)).clamp(min=0).float()
        return self.low[i] + (cell + 0.5) / n * (self.high[i] - self.low[i])

    def _cells(self, i: int) -> int:
        return self.levels[i] - int(i == 5)  # the first level of fill is "hidden"

    def decode(self, ids: Tensor, t: int, mask: Tensor) -> Ellipses:
        """Ellipses in T frames of ids int64 (B, M, 2 + 6 J); `mask` bool (B, M) says which rows are trajectories at all.

        Any ids in range are some ellipses: a death before the birth counts as the birth.
        """
        birth = ids[..., 0].clamp(max=t - 1)
        death = ids[..., 1].clamp(max=t - 1).maximum(birth)
        codes = ids[..., 2:].unflatten(-1, (self.keys, 6))
        keys = torch.stack([self._dequantize(codes[..., i], i) for i in range(6)], -1)  # (B, M, J, 6)
        hats = self.hats(birth, death, t)
        x, y, sx, sy, rho, fill = (hats @ keys).unbind(-1)  # each (B, M, T)
        shown = (hats @ (codes[..., 5:] > 0).float())[..., 0] >= 0.5  # nowhere outside the life, where hats are 0
        return Ellipses(x, y, sx.exp(), sy.exp(), rho, fill.exp(), shown & mask[..., None])


# -- drawing ------------------------------------------------------------------------------------------------------------


def canonical(ellipses: Ellipses, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Where each pixel of an h x w picture lies in each ellipse, in standard deviations: u, v float32 (B, M, T, h, w)."""
    x = (torch.arange(w, device=ellipses.x.device) + 0.5) / w
    y = ((torch.arange(h, device=ellipses.x.device) + 0.5) / h)[:, None]
    place = [f[..., None, None] for f in (ellipses.x, ellipses.y, ellipses.sx, ellipses.sy, ellipses.rho)]
    u = ((x - place[0]) / place[2]).expand(*ellipses.x.shape, h, w)
    v = ((y - place[1]) / place[3] - place[4] * u) / (1 - place[4] ** 2).sqrt()
    return u, v


def from_canonical(ellipses: Ellipses, side: int) -> tuple[Tensor, Tensor]:
    """The inverse, for the centres of a canonical map: x, y float32 (B, M, T, side, side) in widths and heights."""
    at = ((torch.arange(side, device=ellipses.x.device) + 0.5) / side * 2 - 1) * REACH
    u, v = at, at[:, None]
    x, y, sx, sy, rho = (f[..., None, None] for f in (ellipses.x, ellipses.y, ellipses.sx, ellipses.sy, ellipses.rho))
    return (x + sx * u).expand(*ellipses.x.shape, side, side), y + sy * (rho * u + (1 - rho**2).sqrt() * v)
