"""EVA-CLIP's vision transformer g/14 (Fang et al. 2022, arXiv 2211.07636), the eye of SEED and of LaVIT.

Both take the raw output of a late block, before any final norm. SEED (as BLIP-2, arXiv 2301.12597) has the first 39 of 40
blocks and keeps the class token: `EvaConfig.seed()`. LaVIT has all 40 blocks of another checkpoint, EVA01-CLIP-g-14-plus,
and drops the class token: `EvaConfig.lavit()`. Published weights load through `tokgen.importers.eva`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokgen.encoders.base import ImageEncoder, as_float, config_spec, resized
from tokgen.errors import ConfigError
from tokgen.nn.vit import Block
from tokgen.pretrained import Pretrained

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's preprocessing
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class EvaConfig:
    """Sizes of an `EvaViT`. The defaults are g/14 as SEED uses it.

    Attributes:
        image_size, patch: side of the pictures and of the squares they are cut into, in pixels.
        dim, heads, hidden, depth: width, heads, width inside the MLP (int(dim * 4.3637) in the publications), blocks.
        keep_class_token: features begin with the class token.
        embed_dim: width of CLIP's common space, with the final norm and projection that lead there; None: the network ends
            with its last block, and its embedding is the class token.
    """

    image_size: int = 224
    patch: int = 14
    dim: int = 1408
    heads: int = 16
    hidden: int = 6144
    depth: int = 39
    keep_class_token: bool = True
    embed_dim: int | None = None

    def __post_init__(self) -> None:
        if self.image_size % self.patch or self.dim % self.heads:
            raise ConfigError(
                f"EvaConfig: image_size {self.image_size} must be a multiple of patch {self.patch}, and dim {self.dim} of "
                f"heads {self.heads}"
            )

    @classmethod
    def seed(cls) -> EvaConfig:
        """985.9 M parameters; features (B, 257, 1408)."""
        return cls()

    @classmethod
    def lavit(cls) -> EvaConfig:
        """1,012.6 M parameters; features (B, 256, 1408)."""
        return cls(depth=40, keep_class_token=False, embed_dim=1024)


class EvaViT(ImageEncoder, Pretrained):
    """Pixels in [0, 1] -> features (B, N, dim), the class token first if the configuration keeps it.

    Pictures of another size are resized without regard to their aspect ratio, as published; bicubic. (SEED's own scripts
    resize bilinearly in some places and bicubically in others; resize before to choose.)
    """

    type_name = "eva"
    config_class = EvaConfig

    def __init__(self, config: EvaConfig) -> None:
        Pretrained.__init__(self, config)
        c = config
        places = (c.image_size // c.patch) ** 2
        self.dim, self.name = c.embed_dim or c.dim, f"EVA-CLIP g/{c.patch}, block {c.depth}"
        self.feature_shape = (places + c.keep_class_token, c.dim)
        self.patch_embed = nn.Conv2d(3, c.dim, c.patch, c.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.positions = nn.Parameter(torch.zeros(1, places + 1, c.dim))
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.hidden, 1e-6, "qv") for _ in range(c.depth))
        self.norm = None if c.embed_dim is None else nn.LayerNorm(c.dim, 1e-6)
        self.head = None if c.embed_dim is None else nn.Linear(c.dim, c.embed_dim)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        for p in (self.class_token, self.positions):
            nn.init.trunc_normal_(p, std=0.02)

    spec = config_spec

    def forward(self, x: Tensor) -> Tensor:
        """All tokens after the last block, class token first, (B, 1 + N, dim), of normalised pixels (B, 3, S, S)."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, N, dim)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return x

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels of this network's size and range, of pixels in [0, 1]."""
        return (resized(as_float(pixels), self.config.image_size) - self.mean) / self.std

    def features(self, pixels: Tensor) -> Tensor:
        x = self(self.normalised(pixels))
        return x if self.config.keep_class_token else x[:, 1:]

    def embed(self, pixels: Tensor) -> Tensor:
        x = self(self.normalised(pixels))[:, 0]
        return x if self.head is None else self.head(self.norm(x))
