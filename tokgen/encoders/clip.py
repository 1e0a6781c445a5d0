"""The vision transformers of CLIP (Radford et al. 2021, arXiv 2103.00020) and SigLIP (Zhai et al. 2023, arXiv 2303.15343).

`ClipViTConfig()` is OpenAI's ViT-B/16, `ClipViTConfig.siglip()` SigLIP's SO400M/14. As a network of this package's own they
can be trained further inside a tokenizer (TokenFlow does) and published with it, whatever transformers calls their weights.
Published weights load through `tokgen.importers.clip`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokgen.encoders.base import ImageEncoder, as_float, config_spec, resized
from tokgen.encoders.eva import MEAN, STD
from tokgen.errors import ConfigError
from tokgen.nn.vit import ACTIVATIONS, Block, resized_positions
from tokgen.pretrained import Pretrained

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ClipViTConfig:
    """Sizes of a `ClipViT`. The defaults are OpenAI's ViT-B/16, its features after the final norm.

    Attributes:
        image_size, patch: side of the pictures and of the squares they are cut into, in pixels; what is left over at the right
            and below is not seen.
        dim, heads, hidden, depth: width, heads, width inside the MLP, blocks.
        position_grid: side of the grid that the learned positions are for; None: that of the pictures.
        activation: in the MLP, "quick_gelu" (OpenAI), "gelu_tanh" (SigLIP) or "gelu".
        class_token, pre_norm, patch_bias: CLIP has the first two, SigLIP the third.
        post_norm: features are normalised; without it they are the last block's output.
        embed_dim: features are projected to CLIP's common space of this width; None: they are not.
        eps: of the norms.
        mean, std: of the preprocessing of pixels in [0, 1]; a half each is [-1, 1].
    """

    image_size: int = 224
    patch: int = 16
    dim: int = 768
    heads: int = 12
    hidden: int = 3072
    depth: int = 12
    position_grid: int | None = None
    activation: str = "quick_gelu"
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    post_norm: bool = True
    embed_dim: int | None = None
    eps: float = 1e-5
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.image_size < self.patch or self.dim % self.heads:
            raise ConfigError(
                f"ClipViTConfig: image_size {self.image_size} must be at least patch {self.patch}, and dim {self.dim} a multiple "
                f"of heads {self.heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"ClipViTConfig.activation {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch

    @classmethod
    def siglip(cls) -> ClipViTConfig:
        """SigLIP SO400M/14 at 384 px without its last block, norm and pooling: the states before the last block."""
        sizes = {"image_size": 384, "patch": 14, "dim": 1152, "heads": 16, "hidden": 4304, "depth": 26, "eps": 1e-6}
        parts = {"class_token": False, "pre_norm": False, "patch_bias": True, "post_norm": False}
        return cls(**sizes, **parts, activation="gelu_tanh", mean=HALF, std=HALF)


class ClipViT(ImageEncoder, Pretrained):
    """Pixels in [0, 1] -> features (B, N, dim or embed_dim), without the class token.

    Pictures of another size are resized without regard to their aspect ratio. The embedding is the class token's, or the mean
    of the features where there is none.
    """

    type_name = "clip"
    config_class = ClipViTConfig

    def __init__(self, config: ClipViTConfig) -> None:
        Pretrained.__init__(self, config)
        c = config
        self.name = f"CLIP ViT {c.dim}/{c.patch}, block {c.depth}"
        self.dim = c.embed_dim or c.dim
        self.feature_shape = (c.grid**2, self.dim)
        self.patch_embed = nn.Conv2d(3, c.dim, c.patch, c.patch, bias=c.patch_bias)
        scale = c.dim**-0.5
        self.class_token = nn.Parameter(scale * torch.randn(c.dim)) if c.class_token else None
        positions = (c.position_grid or c.grid) ** 2 + c.class_token
        self.positions = nn.Parameter(scale * torch.randn(positions, c.dim))
        self.norm_pre = nn.LayerNorm(c.dim, c.eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(c.dim, c.heads, c.hidden, c.eps, activation=c.activation) for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.dim, c.eps) if c.post_norm else nn.Identity()
        self.projection = nn.Linear(c.dim, c.embed_dim, bias=False) if c.embed_dim is not None else nn.Identity()
        self.register_buffer("mean", torch.tensor(c.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(c.std).view(1, 3, 1, 1), persistent=False)

    spec = config_spec

    def forward(self, x: Tensor) -> Tensor:
        """All tokens, class token first if there is one, (B, [1 +] N, dim or embed_dim), of normalised pixels (B, 3, S, S)."""
        c, first = self.config, int(self.config.class_token)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, N, dim)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1).to(x.dtype), x], 1)
        places = resized_positions(self.positions[first:], c.grid)  # (N, dim)
        x = self.norm_pre(x + torch.cat([self.positions[:first], places]))
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels of this network's size and range, of pixels in [0, 1]."""
        return (resized(as_float(pixels), self.config.image_size) - self.mean) / self.std

    def features(self, pixels: Tensor) -> Tensor:
        return self(self.normalised(pixels))[:, int(self.config.class_token) :]

    def embed(self, pixels: Tensor) -> Tensor:
        x = self(self.normalised(pixels))
        return x[:, 0] if self.config.class_token else x.mean(1)
