"""The convolutional encoder and decoder of VQGAN (arXiv 2012.09841), in LlamaGen's arrangement (arXiv 2406.06525).

Levels run from high to low resolution in the encoder and back in the decoder; attention sits at the lowest resolution
only. With `patch` > 1 the pixels are first folded into channels (space to depth), which makes a small tokenizer cheap:
every convolution at full resolution disappears. `patch=1` is the published model.

Blocks take the kind of their norms, a function of the width, and hand on to them what they are given besides the map
(`condition`): nothing for GroupNorm, the codes for norms that these condition (`tokgen.nn.spatiotemporal.SpatialNorm`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, eps 1e-6, as in the published models. Raises ConfigError if channels do not divide."""
    if channels % 32:
        raise ConfigError(f"{channels} channels do not divide into the 32 groups of GroupNorm; use a multiple of 32")
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Pre-activation residual block: (norm, swish, conv3x3) twice; a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, norm: Norm = group_norm) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, *condition)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h, *condition))))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map, with 1x1 projections and a residual."""

    def __init__(self, channels: int, norm: Norm = group_norm) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        n = self.norm(x, *condition)
        # (B, C, h, w) -> (B, 1, hw, C): one head as wide as the map
        q, k, v = (f(n).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # scale C^-1/2
        out = out.squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.proj(out)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        attention: bool,
        dropout: float,
        norm: Norm = group_norm,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.blocks = nn.ModuleList(ResBlock(a, b, dropout, norm) for a, b in itertools.pairwise(widths))
        self.attention = nn.ModuleList(SpatialAttention(out_channels, norm) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, *condition)
            if self.attention:
                x = self.attention[i](x, *condition)
        return x


def middle(channels: int, dropout: float, norm: Norm = group_norm) -> nn.Sequential:
    """The bottleneck: residual block, attention, residual block."""
    return nn.Sequential(
        ResBlock(channels, channels, dropout, norm),
        SpatialAttention(channels, norm),
        ResBlock(channels, channels, dropout, norm),
    )


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> features (B, z_channels, H/f, W/f), f = patch * 2^(levels - 1)."""

    def __init__(
        self,
        channels: int,
        channel_mult: tuple[int, ...],
        num_res_blocks: int,
        z_channels: int,
        dropout: float,
        patch: int,
    ) -> None:
        super().__init__()
        self.fold = nn.PixelUnshuffle(patch) if patch > 1 else nn.Identity()
        self.conv_in = nn.Conv2d(3 * patch**2, channels, 3, padding=1)
        widths = [channels * m for m in channel_mult]
        last = len(widths) - 1
        self.levels = nn.ModuleList(
            Level(([channels, *widths])[i], w, num_res_blocks, attention=i == last, dropout=dropout)
            for i, w in enumerate(widths)
        )
        self.downsample = nn.ModuleList(nn.Conv2d(w, w, 3, stride=2) for w in widths[:-1])
        self.mid = middle(widths[-1], dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(self.fold(x))
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.downsample):
                x = self.downsample[i](F.pad(x, (0, 1, 0, 1)))  # pad right and bottom only, as published
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> pixels (B, 3, f h, f w), not clamped. `levels[0]` is the lowest resolution.

    `norm` makes all norms, and is called with `condition`.
    """

    def __init__(
        self,
        channels: int,
        channel_mult: tuple[int, ...],
        num_res_blocks: int,
        z_channels: int,
        dropout: float,
        patch: int,
        norm: Norm = group_norm,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in reversed(channel_mult)]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], dropout, norm)
        # one more residual block per level than the encoder, as published
        self.levels = nn.ModuleList(
            Level(([widths[0], *widths])[i], w, num_res_blocks + 1, attention=i == 0, dropout=dropout, norm=norm)
            for i, w in enumerate(widths)
        )
        self.upsample = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for w in widths[:-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * patch**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(patch) if patch > 1 else nn.Identity()

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive adversarial weight compares gradients (arXiv 2012.09841, eq. 7)."""
        return self.conv_out.weight

    def forward(self, z: Tensor, *condition: Tensor) -> Tensor:
        x = self.conv_in(z)
        for part in self.mid:
            x = part(x, *condition)
        for i, level in enumerate(self.levels):
            x = level(x, *condition)
            if i < len(self.upsample):
                x = self.upsample[i](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.unfold(self.conv_out(F.silu(self.norm_out(x, *condition))))
