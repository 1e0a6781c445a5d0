"""Video-LaVIT's motion tokenizer (arXiv 2402.03161, section 3.1): the motion of a clip of 24 frames as 135 codes.

A clip is a keyframe, which an image tokenizer encodes, and what moves after it: the motion vectors of a video codec, as maps
of 20 x 36 (`tokgen.data.motion`). Twelve blocks that attend within each frame and then along time, with a strided
convolution after every third, bring a map to 3 x 5 x 9 vectors, each quantized to one of 1,024 codes; the decoder mirrors
them. `MotionConfig()` is the published size (158.5 M parameters); its weights load through `tokgen.importers.video_lavit`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.data.motion import FRAMES, HEIGHT, SCALE, STD, WIDTH
from tokgen.errors import ConfigError, InputError
from tokgen.nn.vit import MLP, SelfAttention
from tokgen.quantizers.base import build_quantizer
from tokgen.tokenizers.base import TokenizerOutput, VisualTokenizer
from tokgen.tokens import Grid, Tokens

# of (frames, height, width), after each of the encoder's groups of blocks; the decoder goes back in reverse
STRIDES = ((1, 2, 2), (2, 1, 1), (2, 1, 1), (2, 2, 2))
FACTOR = tuple(math.prod(axis) for axis in zip(*STRIDES))  # (8, 4, 4)
NORM_EPS = 1e-5


def _published_quantizer() -> dict[str, Any]:
    return {
        "type": "vq",
        "codebook_size": 1024,
        "metric": "sphere",
        "update": "ema",
        "decay": 0.99,
        "kmeans_init": True,
        "beta": 1.0,
    }


@dataclass(frozen=True)
class MotionConfig:
    """Sizes of a motion tokenizer. The defaults are the published ones: 158.5 M parameters, 135 codes a clip.

    Attributes:
        dim, heads, hidden: width of the transformers, heads of their attention, width inside their MLPs.
        depth: blocks of the encoder, and of the decoder; a multiple of 4, the number of groups.
        frames, height, width: of the motion maps; multiples of 8, 4 and 4.
        code_dim: channels of a code.
        quantizer: a type of `tokgen.quantizers` and its options. Size, normalised input, plain rows, decay and k-means
            start are those of the release; the weight of the commitment term is not stated (here as in BEiT v2's quantizer,
            arXiv 2208.06366, which it resembles).
        scale_factor: the maps hold displacements in standard deviations times this; see `tokgen.data.motion`.
    """

    dim: int = 512
    heads: int = 8
    hidden: int = 2048
    depth: int = 12
    frames: int = FRAMES
    height: int = HEIGHT
    width: int = WIDTH
    code_dim: int = 32
    quantizer: dict[str, Any] = field(default_factory=_published_quantizer)
    scale_factor: float = SCALE

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "hidden", "depth", "frames", "height", "width", "code_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"MotionConfig.{name} is {getattr(self, name)}; expected at least 1")
        if self.dim % self.heads or self.depth % len(STRIDES):
            raise ConfigError(
                f"MotionConfig: dim {self.dim} must be a multiple of heads {self.heads}, and depth {self.depth} of the "
                f"{len(STRIDES)} groups of blocks"
            )
        if any(n % f for n, f in zip((self.frames, self.height, self.width), FACTOR)):
            raise ConfigError(
                f"MotionConfig: {self.frames} frames of {self.height} x {self.width}; expected multiples of "
                f"{FACTOR[0]}, {FACTOR[1]} and {FACTOR[2]}"
            )
        if not self.scale_factor > 0:
            raise ConfigError(f"MotionConfig.scale_factor is {self.scale_factor}; expected a number above 0")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Codes along frames, height and width."""
        t, h, w = (n // f for n, f in zip((self.frames, self.height, self.width), FACTOR))
        return t, h, w


# -- the networks -------------------------------------------------------------------------------------------------------


class SpatioTemporalBlock(nn.Module):
    """x + attention within each frame, then x + attention along time at each place, then x + mlp."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm0, self.spatial = nn.LayerNorm(dim, NORM_EPS), SelfAttention(dim, heads, "qv")
        self.norm1, self.temporal = nn.LayerNorm(dim, NORM_EPS), SelfAttention(dim, heads, "qv")
        self.norm2, self.mlp = nn.LayerNorm(dim, NORM_EPS), MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, N, dim), N places in a frame."""
        b, t, n, _ = x.shape
        y = self.norm0(x).flatten(0, 1)  # (B T, N, dim)
        x = x + self.spatial(y).unflatten(0, (b, t))
        y = self.norm1(x).transpose(1, 2).flatten(0, 1)  # (B N, T, dim)
        x = x + self.temporal(y).unflatten(0, (b, n)).transpose(1, 2)
        return x + self.mlp(self.norm2(x))


class Resize(nn.Module):
    """A convolution of 3 x 3 x 3 over (frames, height, width) that divides the sizes by `stride`, or, with `up`, multiplies
    them (repeating what is there before it convolves)."""

    def __init__(self, dim: int, stride: tuple[int, int, int], up: bool) -> None:
        super().__init__()
        self.stride, self.up = stride, up
        self.conv = nn.Conv3d(dim, dim, 3, padding=1) if up else nn.Conv3d(dim, dim, 3, stride)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Begin as the mean of what is joined (or its repetition) with a little noise: there is no way around these layers,
        and with PyTorch's own start each about halves what goes in. The published start is not known."""
        weight = self.conv.weight.mul_(0.3)  # (dim, dim, 3, 3, 3)
        t, h, w = (weight.new_tensor([0.5, 0.5, 0] if s == 2 and not self.up else [0, 1, 0]) for s in self.stride)
        kernel = t[:, None, None] * h[:, None] * w
        weight.add_(torch.eye(len(weight))[:, :, None, None, None] * kernel)
        self.conv.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, h, w, dim) -> (B, T', h', w', dim)."""
        x = x.permute(0, 4, 1, 2, 3)  # (B, dim, T, h, w)
        if self.up:
            x = self.conv(F.interpolate(x, scale_factor=tuple(map(float, self.stride)), mode="nearest"))
        else:  # zeros on both sides, but behind only where the stride is 2; F.pad counts axes from the last
            x = self.conv(F.pad(x, [n for s in reversed(self.stride) for n in ((1, 1) if s == 1 else (0, 1))]))
        return x.permute(0, 2, 3, 4, 1)


def _blocks(config: MotionConfig) -> nn.ModuleList:
    return nn.ModuleList(SpatioTemporalBlock(config.dim, config.heads, config.hidden) for _ in range(config.depth))


def _group(blocks: nn.ModuleList, i: int, x: Tensor) -> Tensor:
    """x (B, T, h, w, dim) through the i-th quarter of the blocks."""
    size, (h, w) = len(blocks) // len(STRIDES), x.shape[2:4]
    x = x.flatten(2, 3)  # (B, T, h w, dim)
    for block in blocks[i * size : (i + 1) * size]:
        x = block(x)
    return x.unflatten(2, (h, w))


class MotionEncoder(nn.Module):
    """Motion maps (B, T, 2, H, W) -> (B, T/8, H/4, W/4, dim)."""

    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(2, config.dim)
        self.places = nn.Parameter(0.02 * torch.randn(1, config.height * config.width, config.dim))
        self.times = nn.Parameter(0.02 * torch.randn(1, config.frames, config.dim))
        self.blocks = _blocks(config)
        self.downs = nn.ModuleList(Resize(config.dim, stride, up=False) for stride in STRIDES)
        self.norm = nn.LayerNorm(config.dim, NORM_EPS)

    def embed(self, motion: Tensor) -> Tensor:
        """(B, T, H, W, dim): each place's displacement, with where and when it is."""
        x = self.in_proj(motion.permute(0, 1, 3, 4, 2))
        places = self.places.unflatten(1, x.shape[2:4])[:, None]  # (1, 1, H, W, dim)
        return x + places + self.times[:, :, None, None]

    def forward(self, motion: Tensor) -> Tensor:
        x = self.embed(motion)  # (B, T, H, W, dim)
        for i, down in enumerate(self.downs):
            x = down(_group(self.blocks, i, x))  # (B, 24, 10, 18) -> (12, 10, 18) -> (6, 10, 18) -> (3, 5, 9)
        return self.norm(x)


class MotionDecoder(nn.Module):
    """Codes (B, T/8, H/4, W/4, code_dim) -> (B, T, H, W, dim). Without a table of positions, as published."""

    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.code_dim, config.dim)
        self.ups = nn.ModuleList(Resize(config.dim, stride, up=True) for stride in reversed(STRIDES))
        self.blocks = _blocks(config)
        self.norm = nn.LayerNorm(config.dim, NORM_EPS)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.in_proj(codes)
        for i, up in enumerate(self.ups):
            x = _group(self.blocks, i, up(x))  # (B, 6, 10, 18) -> (12, 10, 18) -> (24, 10, 18) -> (24, 20, 36)
        return self.norm(x)


class MotionTokenizer(VisualTokenizer):
    """Motion maps -> grid of codes -> motion maps.

    Its "pixels" are motion maps, float (B, 24, 2, 20, 36): how far the content at each place moved since the frame before, to
    the right and down, as parts of the frame's width and height in the published units (`tokgen.data.motion.motion_map`
    makes them). Tokens: `Grid(3, 5, 9)`, ids (B, 135).

    Losses: the reconstruction's mean squared error (the training module's) and the quantizer's, as in VQ-VAE.
    """

    type_name: ClassVar[str] = "video-lavit-motion"
    config_class: ClassVar[type] = MotionConfig
    ndims: ClassVar[tuple[int, ...]] = (5,)
    modality: ClassVar[str] = "motion"

    def __init__(self, config: MotionConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.encoder = MotionEncoder(config)
        self.pre_quant = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.code_dim))
        self.quantizer = build_quantizer(config.quantizer, config.code_dim)
        self.decoder = MotionDecoder(config)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 2))

    @property
    def image_size(self) -> tuple[int, int]:
        return (self.config.height, self.config.width)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(self.quantizer.codebook_sizes)

    # -- the three parts ----------------------------------------------------------------------------------------------

    def encode_features(self, motion: Tensor) -> Tensor:
        """Vectors before quantization, (B, 3, 5, 9, code_dim), of motion maps (B, 24, 2, 20, 36)."""
        return self.pre_quant(self.encoder(motion))

    def decode_features(self, codes: Tensor) -> Tensor:
        """Motion maps (B, 24, 2, 20, 36) of codes (B, 3, 5, 9, code_dim)."""
        x = self.head(self.decoder(codes.to(self.decoder.in_proj.weight.dtype)))  # (B, 24, 20, 36, 2)
        return x.permute(0, 1, 4, 2, 3)

    def as_tokens(self, ids: Tensor) -> Tokens:
        """`Tokens` of ids (B, 3, 5, 9) or (B, 3, 5, 9, C)."""
        return Tokens(ids.flatten(1, 3), Grid(*ids.shape[1:4]), self.codebook_sizes, tokenizer=self.stamp())

    # -- the contract -------------------------------------------------------------------------------------------------

    def tokenize(self, pixels: Tensor) -> Tokens:
        return self.as_tokens(self.quantizer(self.encode_features(pixels)).ids)

    def detokenize(self, tokens: Tokens) -> Tensor:
        if tokens.layout != Grid(*self.config.grid) or tokens.ids.shape[1] != tokens.layout.length:
            t, h, w = self.config.grid
            raise ConfigError(
                f"this motion tokenizer decodes the {t * h * w} tokens of Grid(t={t}, h={h}, w={w}); got "
                f"{tokens.ids.shape[1]} of {tokens.layout}"
            )
        return self.decode_features(self.quantizer.lookup(tokens.ids.unflatten(1, tokens.layout.shape)))

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Reconstruct motion maps (B, 24, 2, 20, 36) with gradients; see `TokenizerOutput`."""
        quantized = self.quantizer(self.encode_features(pixels))
        reconstruction = self.decode_features(quantized.codes)
        if not self.training:
            reconstruction = self.finish(reconstruction)
        return TokenizerOutput(reconstruction, self.as_tokens(quantized.ids), quantized.losses, quantized.stats)

    def finish(self, pixels: Tensor) -> Tensor:
        """Float; motion has no bounds to be clamped to."""
        return pixels.float()

    def as_pixels(self, pixels: Any) -> Tensor:
        c = self.config
        shape = (c.frames, 2, c.height, c.width)
        wanted = f"float (B, {c.frames}, 2, {c.height}, {c.width}): frames, then displacement to the right and down"
        if not isinstance(pixels, Tensor):
            raise InputError(
                f"motion is {type(pixels).__name__}; expected {wanted}; tokgen.data.motion makes it of video files"
            )
        if tuple(pixels.shape) == shape:
            raise InputError(f"motion has shape {shape}; a batch is expected: add a dimension with x[None]")
        if pixels.ndim != 5 or tuple(pixels.shape[1:]) != shape or not pixels.is_floating_point():
            raise InputError(f"motion is {pixels.dtype} {tuple(pixels.shape)}; expected {wanted}")
        if not torch.isfinite(pixels).all():
            raise InputError("motion holds numbers that are not finite; places without a motion vector must be 0")
        return pixels.to(self.device, torch.float32)

    def example_pixels(self, batch: int = 3, wide: bool = False, seed: int = 0, ndim: int | None = None) -> Tensor:
        """Smooth random motion (B, T, 2, H, W), each clip of its own strength, around a pan of its own."""
        c, generator = self.config, torch.Generator().manual_seed(seed)
        coarse = torch.randn(batch, 2, 4, 3, 5, generator=generator)
        motion = F.interpolate(coarse, (c.frames, c.height, c.width), mode="trilinear", align_corners=True)
        pan = torch.randn(batch, 2, 1, 1, 1, generator=generator)
        strength = 0.2 + 2 * torch.rand(batch, 1, 1, 1, 1, generator=generator)
        return (strength * (motion + pan)).transpose(1, 2)

    def pictures(self, pixels: Tensor) -> Tensor:
        return motion_colors(pixels[:, pixels.shape[1] // 2])

    @classmethod
    def example_configs(cls) -> dict[str, MotionConfig]:
        small: dict[str, Any] = {"dim": 32, "heads": 2, "hidden": 64, "depth": 4, "code_dim": 8}
        vq = {**_published_quantizer(), "codebook_size": 64}
        return {
            "published": MotionConfig(**small, frames=8, height=8, width=12, quantizer=vq),
            "fsq": MotionConfig(**{**small, "code_dim": 3}, quantizer={"type": "fsq", "levels": [8, 5, 5]}),
        }

    # -- what the codes hold ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, tokens: Tokens, height: int, width: int) -> Tensor:
        """Motion of tokens for frames of another size: (B, T, 2, height, width), in standard deviations.

        This is what the published video detokenizer is conditioned on: maps resized by bicubic interpolation and divided by
        `scale_factor`. `tokgen.data.motion.displacements` turns maps into pixels.
        """
        motion = self.decode(tokens)
        maps = F.interpolate(motion.flatten(0, 1), (height, width), mode="bicubic", align_corners=False)
        return maps.unflatten(0, motion.shape[:2]) / self.config.scale_factor


def warp(keyframe: Tensor, motion: Tensor, scale_factor: float = SCALE) -> Tensor:
    """Frames that a keyframe and motion maps predict: to see what motion, true or decoded, holds.

    Motion says how far the content now at a place has come since the frame before, so frame t shows at x what frame t - 1
    showed at x - d_t(x) (backward warping, clamped at the edges). The places are followed back to the keyframe, which is
    sampled once, so that frames do not blur with t. What comes into view is not predicted.

    Args:
        keyframe: float (B, 3, H, W), the frame before motion[:, 0]; where that is 0 everywhere, as after
            `tokgen.data.motion.motion_map`, it is frame 0 itself.
        motion: float (B, T, 2, h, w), maps of any size in the tokenizer's units.
        scale_factor: of these maps.

    Returns:
        float (B, T, 3, H, W).
    """
    if keyframe.ndim != 4 or motion.ndim != 5 or motion.shape[2] != 2 or len(keyframe) != len(motion):
        raise InputError(
            f"warp takes a keyframe (B, 3, H, W) and motion (B, T, 2, h, w); got {tuple(keyframe.shape)} and "
            f"{tuple(motion.shape)}"
        )
    h, w = keyframe.shape[-2:]
    # grid_sample measures from -1 to 1, so a part of the width is twice that
    shift = 2 * motion.float() * torch.tensor(STD, device=motion.device).view(2, 1, 1) / scale_factor
    y = torch.linspace(1 / h - 1, 1 - 1 / h, h, device=motion.device)
    x = torch.linspace(1 / w - 1, 1 - 1 / w, w, device=motion.device)
    here = torch.stack(torch.meshgrid(x, y, indexing="xy")).expand(len(keyframe), -1, -1, -1)  # (B, 2, H, W)
    origin, frames = here, []
    for step in shift.unbind(1):
        before = here - F.interpolate(step, (h, w), mode="bilinear", align_corners=False)
        # the keyframe's place of what is now here: that of where it was one frame ago
        origin = _sample(origin, before)
        frames.append(_sample(keyframe.float(), origin))
    return torch.stack(frames, 1)


def _sample(values: Tensor, at: Tensor) -> Tensor:
    """values (B, C, H, W) at places (B, 2, H, W) in [-1, 1]."""
    grid = at.permute(0, 2, 3, 1)
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)


def motion_colors(motion: Tensor, full: float = 4.0, enlarge: int = 4) -> Tensor:
    """Motion maps (B, 2, h, w) as pictures (B, 3, h * enlarge, w * enlarge) in [0, 1]: hue is the direction, rest is white.

    Args:
        full: length of full colour, in the maps' units.
    """
    x, y = motion.float().unbind(1)
    hue = torch.atan2(y, x) / (2 * math.pi)  # (B, h, w), right is red
    strength = torch.hypot(x, y).div(full).clamp(max=1)
    # HSV to RGB at full value: each channel falls from 1 by `strength` away from its own third of the circle
    k = torch.stack([(n / 6 + hue) % 1 * 6 for n in (5, 3, 1)], 1)  # (B, 3, h, w)
    rgb = 1 - strength[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)
    return rgb.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
