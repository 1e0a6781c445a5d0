"""A small decoder from a sequence of features to pixels, for tokenizers whose codes stand for meaning and not for a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.nn.vit import CrossBlock


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Sizes of a `PixelDecoder`.

    Attributes:
        dim, heads, hidden, depth: of its transformer.
        patch: side of the squares of pixels that it paints, a divisor of the picture's side.
    """

    dim: int = 768
    heads: int = 12
    hidden: int = 3072
    depth: int = 8
    patch: int = 16


class PixelDecoder(nn.Module):
    """Learned queries, one for each square of the picture, read the features by cross-attention and become pixels.

    It regresses: of several pictures that fit the features it paints their mean, where a diffusion decoder would draw one.
    In return it is small, deterministic, and trains on one machine.

    Args:
        config: sizes.
        image_size: side of the picture in pixels.
        context_dim, context_length: width and greatest number of the features; their place in the sequence is learned.
    """

    def __init__(self, config: PixelDecoderConfig, image_size: int, context_dim: int, context_length: int) -> None:
        super().__init__()
        if image_size % config.patch or config.dim % config.heads:
            raise ConfigError(
                f"pixel decoder: image_size {image_size} must be a multiple of patch {config.patch}, and dim {config.dim} of "
                f"heads {config.heads}"
            )
        self.patch, self.side, self.length = config.patch, image_size // config.patch, context_length
        self.context = nn.Linear(context_dim, config.dim)
        self.context_norm = nn.LayerNorm(config.dim)
        self.places = nn.Parameter(0.02 * torch.randn(1, context_length, config.dim))
        self.queries = nn.Parameter(0.02 * torch.randn(1, self.side**2, config.dim))
        self.blocks = nn.ModuleList(CrossBlock(config.dim, config.heads, config.hidden) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.paint = nn.Linear(config.dim, 3 * config.patch**2)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, S, S), around [0, 1] but not clamped, of features (B, N, context_dim), N <= context_length.

        Args:
            mask: bool (B, N), True where a feature is real.
        """
        context = self.context_norm(self.context(features) + self.places[:, : features.shape[1]])  # (B, N, dim)
        x = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            x = block(x, context, mask)
        x = self.paint(self.norm(x))  # (B, side^2, 3 patch^2)
        return nn.functional.pixel_shuffle(x.transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch) + 0.5
