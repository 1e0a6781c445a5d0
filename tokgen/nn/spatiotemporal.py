"""What a convolutional image tokenizer needs to take clips as well: causal convolutions in time, as in Emu3's vision tokenizer
(arXiv 2409.18869, section 2.2), and norms that the codes condition (MoVQ, arXiv 2209.09002, section 3.2).

Maps of clips are (B, C, T, h, w) here. A frame sees itself and what came before it, never what comes after.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.nn.conv import group_norm

PAST = 2  # frames of zeros before the first, whatever the kernel's length


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift at each place are read off the codes there, as fine as the codes are.

    Shapes: x (B, channels, f h, f w), codes (B, code_dim, h, w) with any whole f.
    """

    def __init__(self, channels: int, code_dim: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.scale = nn.Conv2d(code_dim, channels, 1)
        self.shift = nn.Conv2d(code_dim, channels, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        # 1 x 1 convolutions and repetition commute: convolve where there are f^2 times fewer places
        scale, shift = (F.interpolate(f(codes), x.shape[-2:], mode="nearest") for f in (self.scale, self.shift))
        return self.norm(x) * scale + shift


class CausalConv3d(nn.Conv3d):
    """A convolution over (frames, height, width) that keeps height and width and looks two frames back.

    Its kernel spans 3 frames; with a stride of 2 in time it spans 4, so that of T frames T / 2 come out.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> None:
        kernel = (PAST + stride, size, size)
        super().__init__(in_channels, out_channels, kernel, (stride, 1, 1), padding=(0, size // 2, size // 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, PAST, 0)))


class TemporalBlock(nn.Module):
    """Residual block: (BatchNorm, swish, causal convolution) twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels)
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class TemporalEncoder(nn.Module):
    """Maps (B, C, T, h, w) -> (B, C, T / 2^halvings, h, w): strided convolutions, then residual blocks."""

    def __init__(self, channels: int, halvings: int, num_blocks: int) -> None:
        super().__init__()
        self.downsample = nn.ModuleList(CausalConv3d(channels, channels, stride=2) for _ in range(halvings))
        self.blocks = nn.ModuleList(TemporalBlock(channels) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.downsample:
            x = F.silu(conv(x))
        for block in self.blocks:
            x = block(x)
        return x


class TemporalDecoder(nn.Module):
    """Maps (B, C, t, h, w) -> (B, C, t * 2^doublings, h, w): residual blocks, then repetition and convolutions."""

    def __init__(self, channels: int, doublings: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TemporalBlock(channels) for _ in range(num_blocks))
        self.upsample = nn.ModuleList(CausalConv3d(channels, channels) for _ in range(doublings))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for conv in self.upsample:
            x = F.silu(conv(x.repeat_interleave(2, dim=2)))
        return x
