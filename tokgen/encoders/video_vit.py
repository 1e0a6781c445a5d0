"""A vision transformer over the patches of a clip: the encoder that TrajViT is measured against.

A clip is cut into tubelets of a few frames by a patch (ViViT, Arnab et al. 2021, arXiv 2103.15691, section 3.2), each becomes a
token, and one transformer sees them all. `VideoViTConfig()` is "ViT3D" of TrajViT's release (Zheng et al. 2025,
arXiv 2505.23617): ViT-L with tubelets of 2 x 16 x 16, 1,568 tokens for 16 frames of 224 px. Its number of tokens follows from
the clip's duration and size; that of `tokgen.encoders.trajvit` from what there is to see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.encoders.base import EncodedClip, VideoEncoder, clip_frames
from tokgen.errors import ConfigError, InputError
from tokgen.nn.attention import rope_table
from tokgen.nn.vit import Block

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the release takes


@dataclass(frozen=True)
class VideoViTConfig:
    """Sizes of a `VideoViT`.

    Attributes:
        image_size, frames: side of the frames in pixels, and number of them, that the positions are for.
        patch, tubelet: side of a tubelet in pixels, and its frames.
        dim, heads, hidden, depth: width, heads, width inside the MLP, blocks.
        eps: of the blocks' norms.
        mean, std: of the preprocessing of pixels in [0, 1].
    """

    image_size: int = 224
    frames: int = 16
    patch: int = 16
    tubelet: int = 2
    dim: int = 1024
    heads: int = 16
    hidden: int = 4096
    depth: int = 24
    eps: float = 1e-12
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.image_size % self.patch or self.frames % self.tubelet:
            raise ConfigError(
                f"VideoViTConfig: image_size {self.image_size} must be a multiple of patch {self.patch}, and frames {self.frames} "
                f"of tubelet {self.tubelet}"
            )
        check_heads("VideoViTConfig", self.dim, self.heads)

    @property
    def grid(self) -> tuple[int, int]:
        """Tubelets in time, and along a side."""
        return self.frames // self.tubelet, self.image_size // self.patch


def check_heads(name: str, dim: int, heads: int, multiple: int = 1) -> None:
    """Raise ConfigError unless each head has a whole width, a multiple of `multiple`."""
    if dim % heads or dim // heads % multiple:
        raise ConfigError(f"{name}: dim {dim} over heads {heads} must give a multiple of {multiple}")


class ClipTransformer(nn.Module):
    """A class token before a clip's tokens, and pre-norm blocks over all of them.

    Args:
        dim, heads, hidden, depth, eps: see `VideoViTConfig`.
        final_norm: what comes out is normalised.
    """

    def __init__(self, dim: int, heads: int, hidden: int, depth: int, eps: float, final_norm: bool = True) -> None:
        super().__init__()
        self.class_token = nn.Parameter(0.02 * torch.randn(dim))  # small, so that what it reads shows from the start
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps) if final_norm else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, passes: int = 1) -> tuple[Tensor, Tensor]:
        """The class token (B, dim) and the tokens (B, N, dim) of tokens (B, N, dim).

        Args:
            mask: bool (B, N), True where a token is real; the others are seen by none. None: all are.
            passes: how many times the blocks are run, each time on what came out before.
        """
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], 1)  # (B, 1 + N, dim)
        keys = None if mask is None else F.pad(mask, (1, 0), value=True)[:, None, None]  # (B, 1, 1, 1 + N)
        for _ in range(passes):
            for block in self.blocks:
                x = block(x, keys)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]


class VideoViT(VideoEncoder):
    """Pixels (B, T, 3, H, W) in [0, 1] -> tubelets -> tokens (B, T / tubelet * (image_size / patch)^2, dim).

    Frames of another size are resized without regard to their aspect ratio. Clips of another length take positions that are
    interpolated in time.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    type_name = "video-vit"
    config_class = VideoViTConfig

    def __init__(self, config: VideoViTConfig) -> None:
        super().__init__(config)
        c = config
        self.name, self.dim = f"video ViT {c.dim}/{c.tubelet}x{c.patch}x{c.patch}", c.dim
        kernel = (c.tubelet, c.patch, c.patch)
        self.patch_embed = nn.Conv3d(3, c.dim, kernel, kernel)
        nn.init.trunc_normal_(self.patch_embed.weight, std=0.02)
        nn.init.zeros_(self.patch_embed.bias)
        self.positions = nn.Parameter(grid_code(*c.grid, c.dim))  # (t, h * w, dim)
        self.transformer = ClipTransformer(c.dim, c.heads, c.hidden, c.depth, c.eps)
        self.register_buffer("mean", torch.tensor(c.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(c.std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> EncodedClip:
        c = self.config
        x = (clip_frames(pixels, c.image_size) - self.mean) / self.std  # (B, T, 3, S, S)
        if x.shape[1] % c.tubelet:
            raise InputError(f"clips have {x.shape[1]} frames; this encoder takes multiples of {c.tubelet}")
        x = self.patch_embed(x.transpose(1, 2)).flatten(3)  # (B, dim, t, h * w)
        places = self.positions
        if len(places) != x.shape[2]:
            places = F.interpolate(places.float().permute(1, 2, 0), x.shape[2], mode="linear").permute(2, 0, 1)
        x = x.permute(0, 2, 3, 1) + places.to(x.dtype)  # (B, t, h * w, dim)
        pooled, tokens = self.transformer(x.flatten(1, 2))
        return EncodedClip(pooled, tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device))


def grid_code(t: int, side: int, dim: int) -> Tensor:
    """Where learned positions begin, (t, side^2, dim): sines and cosines of frame, row and column, a third of the channels each."""
    axes = torch.meshgrid(torch.arange(t), torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack(axes, -1).flatten(1, 2)  # (t, side^2, 3)
    width = dim // 6 * 6
    cos, sin = rope_table(places, width)  # (t, side^2, width / 2) each
    return F.pad(torch.cat([cos, sin], -1), (0, dim - width))
