"""A clip as soft layers: which trajectory shows at each pixel, what it looks like there, and a network that refines the picture.

The layers are those of deformable sprites (Ye et al. 2022, arXiv 2204.07151) with ellipses for warps: one canonical shape and
texture for each trajectory, carried along by its ellipse. Nothing depends on the order of the trajectories.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.nn.conv import ResBlock, group_norm
from tokgen.nn.ellipses import DEAD, REACH, Ellipses, canonical


class Compositor(nn.Module):
    """Ellipses, canonical shapes and canonical textures to feature maps.

    The logit of trajectory k at a pixel is s (log fill - |u|^2 / 2) - g log(area) + shape_k(u), u its place in the ellipse in
    standard deviations: a Gaussian mixture's (s = 1, g = 0) where g lets a small thing lie in front of what it is inside of.
    `s` and `g` are learned. The `layers` largest logits of a pixel share it by their softmax.

    Args:
        layers: trajectories that may share a pixel.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.sharpness = nn.Parameter(torch.tensor(1.0))
        self.smallness = nn.Parameter(torch.tensor(0.5))

    def forward(
        self, ellipses: Ellipses, shapes: Tensor, textures: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Draw.

        Args:
            ellipses: of M trajectories in T frames.
            shapes: float (B, M, S, S), canonical maps added to the logits.
            textures: float (B, M, c, R, R).
            size: h, w of the maps.

        Returns:
            features (B, T, c, h, w), 0 where nothing lives, and the logits float32 (B, M, T, h, w).
        """
        with torch.autocast(shapes.device.type, enabled=False):
            u, v = canonical(ellipses, *size)  # (B, M, T, h, w)
            logits = self.logits(ellipses, shapes.float(), u, v)
            best, index = logits.topk(min(self.layers, logits.shape[1]), 1)  # (B, m, T, h, w)
            alpha = best.softmax(1) * (best > DEAD / 2)
            painted = _lookup(textures.float(), index, u.gather(1, index), v.gather(1, index))  # (B, m, T, h, w, c)
            features = (alpha[..., None] * painted).sum(1)
        return features.movedim(-1, 2), logits

    def logits(self, ellipses: Ellipses, shapes: Tensor, u: Tensor, v: Tensor) -> Tensor:
        b, m, t, h, w = u.shape
        area = (ellipses.sx * ellipses.sy * (1 - ellipses.rho**2).sqrt()).log()
        weight = self.sharpness * ellipses.fill.log() - self.smallness * area  # (B, M, T)
        near = weight[..., None, None] - self.sharpness / 2 * (u.square() + v.square()).clamp(max=1e3)
        places = (torch.stack([u, v], -1) / REACH).view(b * m, t * h, w, 2)
        shape = F.grid_sample(shapes.flatten(0, 1)[:, None], places, padding_mode="border", align_corners=False)
        return torch.where(ellipses.alive[..., None, None], near + shape.view(b, m, t, h, w), DEAD)


def _lookup(textures: Tensor, index: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear values (B, m, T, h, w, c) of textures (B, M, c, R, R) of trajectories `index` at u, v, in standard deviations.

    `grid_sample` would have to sample all M textures at all pixels; this reads the few that show.
    """
    b, m, c, r, _ = textures.shape
    table = textures.movedim(2, -1).reshape(b * m * r * r, c)
    batch = torch.arange(b, device=index.device).view(b, 1, 1, 1, 1)
    start = (batch * m + index) * (r * r)
    x, y = (((a / REACH + 1) / 2 * r - 0.5).clamp(0, r - 1) for a in (u, v))
    x0, y0 = x.detach().floor().clamp(max=max(r - 2, 0)), y.detach().floor().clamp(max=max(r - 2, 0))
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    corner = start + y0.long() * r + x0.long()
    right, down = min(1, r - 1), r * min(1, r - 1)
    top = F.embedding(corner, table) * (1 - fx) + F.embedding(corner + right, table) * fx
    bottom = F.embedding(corner + down, table) * (1 - fx) + F.embedding(corner + down + right, table) * fx
    return top * (1 - fy) + bottom * fy


class TemporalMix(nn.Module):
    """x plus, channel by channel, a weighted sum of the frames before, at and after; at first nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C, h, w) -> the same; the first and the last frame are their own neighbours."""
        around = torch.cat([x[:, :1], x, x[:, -1:]], 1)
        before, here, after = (w[:, None, None] for w in self.weight)
        return x + before * around[:, :-2] + here * x + after * around[:, 2:]


class Refiner(nn.Module):
    """Feature maps of frames to pixels: what the layers painted, enlarged, plus what residual blocks add.

    Args:
        in_channels: of the maps; the first three are red, green and blue in [0, 1].
        channels, blocks: width and number of the residual blocks, each followed by a `TemporalMix`.
        stride: pixels per cell of the maps.
    """

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.enter = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(channels, channels) for _ in range(blocks))
        self.mixes = nn.ModuleList(TemporalMix(channels) for _ in range(blocks))
        self.norm = group_norm(channels)
        self.paint = nn.Conv2d(channels, 3 * stride**2, 3, padding=1)
        nn.init.zeros_(self.paint.weight)
        nn.init.zeros_(self.paint.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, c, h, w) -> pixels (B, T, 3, stride h, stride w), around [0, 1] but not clamped."""
        b, t = features.shape[:2]
        flat = features.flatten(0, 1)  # (B T, c, h, w)
        x = self.enter(flat)
        for block, mix in zip(self.blocks, self.mixes):
            x = mix(block(x).unflatten(0, (b, t))).flatten(0, 1)
        detail = F.pixel_shuffle(self.paint(F.silu(self.norm(x))), self.stride)
        base = F.interpolate(flat[:, :3], scale_factor=self.stride, mode="bilinear", align_corners=False)
        return (base + detail).unflatten(0, (b, t))
