"""TrajViT: one token for each thing that moves through a clip (Zheng et al. 2025, arXiv 2505.23617, "One Trajectory, One Token").

Who belongs together through time is given, a label volume (`tokgen.trajectories`). A small ResNet sees every frame; its features
are averaged over the pixels that a trajectory has in a frame; a Perceiver resampler makes one appearance token of these averages,
another one position token of the places where the trajectory was; a transformer sees the sums, as many as there are
trajectories, and a class token. `TrajViTConfig()` is the published size, a transformer of ViT-L's depth and of width 512.

The release does some things that nobody meant. They are mended here; checkpoints that were trained with them need them, and each
has a switch (found by running the release, except the last):

- `legacy_double_pass`: the transformer runs twice, the second time on its own output (a hook on its first block fires twice in a
  forward pass): twice the depth and the arithmetic of what the paper describes.
- `legacy_ignore_mask`: the mask of padding never reaches attention (the sdpa class is handed a `head_mask` in its place, which is
  None). 24 rows of padding more, for the same clip, move the class token by 22 %: what a clip means depends on its batch.
- `legacy_position`: box coordinates lie side by side on one ramp of frequencies that does not begin anew for each of the four. A
  shift by 0.25 moves the code by 0.94, 0.094, 0.009 and 0.0009 for the first to the fourth coordinate: all but the first edge
  are nearly invisible. Ours are Fourier features of each coordinate, of time, and the trajectory's size.
- `final_norm: false`: nothing normalises what the last pre-norm block gives.

The release also sums the numbers of masks that overlap and keeps trajectories that were lost as if they were there; label volumes
can say neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.encoders.base import EncodedClip, VideoEncoder, clip_frames
from tokgen.encoders.video_vit import MEAN, STD, ClipTransformer, check_heads
from tokgen.errors import ConfigError, InputError
from tokgen.nn.attention import apply_rope, rope_table
from tokgen.nn.vit import join_heads, split_heads

MAX_TRAJECTORIES = 8192  # numbers in one clip; a token each, and attention among all of them
LEGACY_FRAMES = 10  # frames of nothing that the release lets a row of padding look at


@dataclass(frozen=True)
class TrajViTConfig:
    """Sizes of a `TrajViT`. The defaults are the published ones, with the release's defects mended (see the module).

    Attributes:
        image_size: side of the frames in pixels.
        mask_stride: pixels to a cell of the grid on which trajectories are averaged, 56 x 56 in the publication.
        widths, layers: channels and residual layers of the ResNet's stages, whose strides are 4, 8, 16, 32; the defaults are
            ResNet-18.
        dim, heads, hidden, depth: width, heads, width inside the MLP and blocks of the transformer; the resamplers have its
            width and heads.
        appearance_depth, position_depth: layers of the two resamplers.
        octaves: frequencies of each coordinate of a box and of time, each twice the one before; the finest of 8 has a period of
            1/64 of the picture.
        eps: of the transformer's norms.
        final_norm: the transformer's output is normalised.
        legacy_double_pass, legacy_ignore_mask, legacy_position: see the module.
        mean, std: of the preprocessing of pixels in [0, 1].
    """

    image_size: int = 224
    mask_stride: int = 4
    widths: tuple[int, ...] = (64, 128, 256, 512)
    layers: tuple[int, ...] = (2, 2, 2, 2)
    dim: int = 512
    heads: int = 16
    hidden: int = 2048
    depth: int = 24
    appearance_depth: int = 4
    position_depth: int = 2
    octaves: int = 8
    eps: float = 1e-12
    final_norm: bool = True
    legacy_double_pass: bool = False
    legacy_ignore_mask: bool = False
    legacy_position: bool = False
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        for name in ("widths", "layers", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_heads("TrajViTConfig", self.dim, self.heads, 4)  # half of each head turns, in pairs
        if self.image_size % self.mask_stride:
            raise ConfigError(
                f"TrajViTConfig: image_size {self.image_size} is no multiple of mask_stride {self.mask_stride}"
            )
        if not self.widths or len(self.widths) != len(self.layers):
            raise ConfigError(
                f"TrajViTConfig: {len(self.widths)} widths and {len(self.layers)} layers; expected one of each per stage"
            )

    @property
    def grid(self) -> int:
        return self.image_size // self.mask_stride

    @classmethod
    def released(cls) -> TrajViTConfig:
        """The network as the release computes it, for its checkpoints."""
        return cls(final_norm=False, legacy_double_pass=True, legacy_ignore_mask=True, legacy_position=True)


# -- which pixels belong to whom --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segments:
    """The pixels of M trajectories in T frames, on a grid of side x side.

    Attributes:
        slots: int64 (B, T, side, side), (b T + t) M + m at the pixels of trajectory m; B T M where there is none.
        area: int64 (B, M, T), pixels.
        edges: int64 (B, M, T, 4), least row and column, greatest row and column; side, side, -1, -1 where there is none.
    """

    slots: Tensor
    area: Tensor
    edges: Tensor

    @property
    def side(self) -> int:
        return self.slots.shape[-1]

    @property
    def visible(self) -> Tensor:
        """bool (B, M, T)."""
        return self.area > 0

    @staticmethod
    def of(trajectories: Tensor, side: int, count: int | None = None) -> Segments:
        """Of numbers int (B, T, h, w), -1 for none: each cell of the grid has the number at its centre.

        M is `count`, or one more than the greatest number, and at least 1.
        """
        b, t, h, w = trajectories.shape
        m = count or max(int(trajectories.max()) + 1, 1)
        device = trajectories.device
        cells = torch.arange(side, device=device)
        rows, columns = ((2 * cells + 1) * length // (2 * side) for length in (h, w))
        numbers = trajectories[:, :, rows[:, None], columns].long()  # (B, T, side, side)
        frames = torch.arange(b * t, device=device).view(b, t, 1, 1)
        slots = torch.where(numbers >= 0, frames * m + numbers, b * t * m)
        flat = slots.flatten()
        area = torch.zeros(b * t * m + 1, dtype=torch.int64, device=device)
        area = area.index_add(0, flat, torch.ones_like(flat))
        row, column = (x.expand_as(slots).flatten() for x in (cells[:, None], cells))
        edges = [
            torch.full_like(area, start).scatter_reduce(0, flat, places, kind)
            for kind, start in (("amin", side), ("amax", -1))
            for places in (row, column)
        ]
        split = lambda x: x[:-1].unflatten(0, (b, t, m)).transpose(1, 2)  # noqa: E731  (without the slot of none)
        return Segments(slots, split(area), split(torch.stack(edges, -1)))

    def mean(self, maps: Tensor) -> Tensor:
        """Means over each segment of maps (B, T, n, n, C) enlarged to the grid bilinearly, float32 (B, M, T, C); zero where there
        is no pixel.

        A mean is linear in the maps, so that coarse ones are not enlarged: what counts is how much of each of their cells a
        segment takes, a matrix of M x n^2 for each frame. Maps as fine as the grid are added up pixel by pixel.
        """
        b, m, t = self.area.shape
        n, flat = maps.shape[2], self.slots.flatten()
        with torch.autocast(maps.device.type, enabled=False):
            maps = maps.float().flatten(2, 3)  # (B, T, n^2, C)
            if n == self.side:
                sums = maps.new_zeros(b * t * m + 1, maps.shape[-1]).index_add(0, flat, maps.flatten(0, 2))
                sums = sums[:-1].unflatten(0, (b, t, m))
            else:
                shares = maps.new_zeros((b * t * m + 1) * n * n)
                below, above, weight = _neighbours(self.side, n, maps.device)
                for rows, of_rows in ((below, 1 - weight), (above, weight)):
                    for columns, of_columns in ((below, 1 - weight), (above, weight)):
                        cells = (rows[:, None] * n + columns).expand_as(self.slots).flatten()
                        parts = (of_rows[:, None] * of_columns).expand_as(self.slots).flatten()
                        shares = shares.index_add(0, flat * (n * n) + cells, parts)
                sums = shares[: -n * n].view(b, t, m, n * n) @ maps  # (B, T, M, C)
            return sums.transpose(1, 2) / self.area.clamp(min=1)[..., None]


def _neighbours(fine: int, coarse: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear interpolation of `coarse` values at `fine` places: both neighbours int64, and the weight of the second."""
    place = ((torch.arange(fine, device=device) + 0.5) * coarse / fine - 0.5).clamp(min=0)
    below = place.long().clamp(max=coarse - 1)
    return below, (below + 1).clamp(max=coarse - 1), place - below


# -- where they are ---------------------------------------------------------------------------------------------------


def position_features(segments: Segments, octaves: int) -> Tensor:
    """Where and how large each segment is, (B, M, T, 10 octaves + 8): of its box's centre, width and height and of time, all in
    [0, 1], the values and their Fourier features; the logarithm of its share of the picture, in [-1, 0]; whether its
    trajectory was absent in the frame before, and in the frame after. Numbers without meaning where there is no segment.
    """
    top, left, bottom, right = segments.edges.unbind(-1)  # (B, M, T) each
    frames = top.shape[-1]
    time = ((torch.arange(frames, device=top.device) + 0.5) / frames).expand(top.shape)
    sides = [(left + right + 1) / 2, (top + bottom + 1) / 2, right + 1 - left, bottom + 1 - top]
    box = torch.stack([*(x / segments.side for x in sides), time], -1)  # (B, M, T, 5)
    angles = box[..., None] * (math.pi * 2 ** torch.arange(octaves, device=box.device))  # (B, M, T, 5, octaves)
    share = segments.area.clamp(min=1).log() / max(2 * math.log(segments.side), 1.0)
    absent = F.pad(~segments.visible, (1, 1))  # what is before and after the clip is unknown
    rest = torch.stack([share - 1, absent[..., :-2].float(), absent[..., 2:].float()], -1)
    return torch.cat([box, angles.sin().flatten(-2), angles.cos().flatten(-2), rest], -1)


def ramp_code(coordinates: Tensor, dim: int) -> Tensor:
    """The release's code of A coordinates (..., A), (..., dim), dim a multiple of A: each has dim / A channels, alternately sine
    and cosine, and the frequencies 10000^(-channel / dim) fall through all of them."""
    channel = torch.arange(dim, device=coordinates.device)
    angle = coordinates.repeat_interleave(dim // coordinates.shape[-1], -1) * 10_000 ** (-channel / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


# -- what they look like ----------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """A convolution without bias, and BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ResidualLayer(nn.Module):
    """relu(shortcut(x) + two 3 x 3 convolutions of x) (He et al. 2015, arXiv 1512.03385, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(in_channels, out_channels, 3, stride)
        self.second = ConvNorm(out_channels, out_channels, 3)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.second(F.relu(self.first(x))))


class ResNet(nn.Module):
    """Frames (N, 3, H, W) -> one map per stage, (N, widths[i], H / 2^(i + 2), W / 2^(i + 2)), the finest first."""

    def __init__(self, widths: tuple[int, ...], layers: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = ConvNorm(3, widths[0], 7, 2)
        before = (widths[0], *widths)
        self.stages = nn.ModuleList(
            nn.Sequential(*(
                ResidualLayer(before[i] if j == 0 else width, width, 2 if i > 0 and j == 0 else 1) for j in range(count)
            ))
            for i, (width, count) in enumerate(zip(widths, layers))
        )  # fmt: skip

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class ResamplerLayer(nn.Module):
    """A latent reads what is visible, and itself; half of each head's channels are turned by the frame's number."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.rotary = heads, dim // heads // 2  # channels of a head that turn
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def turned(self, x: Tensor) -> Tensor:
        """x (N, heads, L, d) with position l turned by l."""
        x = x.transpose(1, 2)  # (N, L, heads, d)
        cos, sin = rope_table(torch.arange(x.shape[1], device=x.device)[None, :, None], self.rotary)
        half = apply_rope(x[..., : self.rotary].contiguous(), cos, sin)
        return torch.cat([half, x[..., self.rotary :]], -1).transpose(1, 2)

    def forward(self, latents: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """latents (N, 1, dim), x (N, T, dim), mask bool (N, 1, 1, 1 + T): what is seen of the latent, then of x."""
        latents, x = self.norm_latents(latents), self.norm_media(x)
        q = split_heads(self.to_q(latents), self.heads)  # (N, heads, 1, d); at position 0, where nothing turns
        k, v = (split_heads(y, self.heads) for y in self.to_kv(torch.cat([latents, x], 1)).chunk(2, -1))
        return self.to_out(join_heads(F.scaled_dot_product_attention(q, self.turned(k), v, attn_mask=mask)))


class Resampler(nn.Module):
    """One vector of a trajectory's vectors in its frames (Perceiver resampler: Alayrac et al. 2022, arXiv 2204.14198, without its
    feed-forward layers, and with one latent). The latent sees itself too, so that a trajectory without a frame has a result."""

    def __init__(self, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, dim))
        self.layers = nn.ModuleList(ResamplerLayer(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x (B, M, T, dim) where visible, bool (B, M, T) -> (B, M, dim)."""
        mask = F.pad(visible.flatten(0, 1), (1, 0), value=True)[:, None, None]  # (B M, 1, 1, 1 + T)
        rows = x.flatten(0, 1)  # (B M, T, dim)
        latents = self.latents.to(x.dtype).expand(len(rows), 1, -1)
        for layer in self.layers:
            latents = latents + layer(latents, rows, mask)
        return self.norm(latents).unflatten(0, x.shape[:2])[:, :, 0]


# -- the encoder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrajectoryTokens:
    """Tokens of trajectories before they see each other.

    Attributes:
        appearance, position: (B, M, dim) each, what a trajectory looks like and where it goes.
        mask: bool (B, M), True where clip b has a trajectory m.
    """

    appearance: Tensor
    position: Tensor
    mask: Tensor


class TrajViT(VideoEncoder):
    """Pixels (B, T, 3, H, W) in [0, 1] and trajectories int (B, T, h, w), -1 for none -> tokens (B, M, dim), mask (B, M).

    Row m is trajectory number m; M is one more than the batch's greatest number. Frames of another size are resized without
    regard to their aspect ratio, trajectories to a grid of image_size / mask_stride by the number at each cell's centre; one that
    loses all of its pixels there is absent. Any number of frames goes.

    Outside training a clip's result does not depend on the rest of the batch, nor on how its trajectories are numbered; one that
    is absent changes nothing.
    """

    type_name = "trajvit"
    config_class = TrajViTConfig
    extras = ("trajectories",)

    def __init__(self, config: TrajViTConfig) -> None:
        super().__init__(config)
        c = config
        self.name, self.dim = f"TrajViT {c.dim}, {c.depth} blocks", c.dim
        self.backbone = ResNet(c.widths, c.layers)
        self.stage_projections = nn.ModuleList(nn.Linear(width, c.dim) for width in c.widths)
        self.stage_norm = nn.LayerNorm(c.dim)
        self.appearance = Resampler(c.dim, c.heads, c.appearance_depth)
        self.places = None if c.legacy_position else nn.Linear(10 * c.octaves + 8, c.dim)
        self.position = Resampler(c.dim, c.heads, c.position_depth)
        self.transformer = ClipTransformer(c.dim, c.heads, c.hidden, c.depth, c.eps, c.final_norm)
        self.register_buffer("mean", torch.tensor(c.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(c.std).view(3, 1, 1), persistent=False)

    def segments(self, pixels: Tensor, trajectories: Tensor, count: int | None = None) -> Segments:
        """The trajectories of clips on this encoder's grid. Raises InputError if they do not belong to the pixels."""
        integers = not trajectories.is_floating_point() and trajectories.dtype != torch.bool
        if (
            trajectories.ndim != 4
            or trajectories.shape[:2] != pixels.shape[:2]
            or not integers
            or 0 in trajectories.shape
        ):
            raise InputError(
                f"trajectories are {tuple(trajectories.shape)} {trajectories.dtype}; expected integers (B, T, h, w) for clips "
                f"{tuple(pixels.shape)}"
            )
        least, greatest = (int(x) for x in trajectories.aminmax())
        if least < -1 or greatest >= MAX_TRAJECTORIES:
            raise InputError(
                f"trajectories reach {least}..{greatest}; expected -1 (none), 0, 1, ... below {MAX_TRAJECTORIES}, such as "
                "Trajectories.compact() gives"
            )
        return Segments.of(trajectories, self.config.grid, count)

    def look(self, frames: Tensor, segments: Segments) -> Tensor:
        """Features of each trajectory in each frame, (B, M, T, dim), of frames (B, T, 3, S, S) in [0, 1]: those of all stages,
        projected, normalised and averaged over its pixels."""
        x = ((frames - self.mean) / self.std).flatten(0, 1)
        means = []
        for maps, projection in zip(self.backbone(x), self.stage_projections):
            maps = self.stage_norm(projection(maps.permute(0, 2, 3, 1)))  # (B T, n, n, dim)
            means.append(segments.mean(maps.unflatten(0, frames.shape[:2])))
        return torch.stack(means).sum(0)

    def trajectory_tokens(self, pixels: Tensor, trajectories: Tensor, count: int | None = None) -> TrajectoryTokens:
        """Appearance and position of each trajectory, without the others.

        Raises:
            InputError: pixels or trajectories of another shape, dtype or range.
        """
        c = self.config
        frames = clip_frames(pixels, c.image_size)
        segments = self.segments(pixels, trajectories, count)
        mask = segments.visible.any(-1)  # (B, M)
        seen = segments.visible
        if c.legacy_ignore_mask:  # its rows of padding, which all see, look at some frames of nothing
            seen = seen | (~mask[..., None] & (torch.arange(seen.shape[-1], device=seen.device) < LEGACY_FRAMES))
        appearance = self.appearance(self.look(frames, segments), seen)
        if self.places is None:
            places = ramp_code(segments.edges / segments.side, c.dim)  # (B, M, T, dim)
        else:
            places = self.places(position_features(segments, c.octaves))
        return TrajectoryTokens(appearance, self.position(places, seen), mask)

    def forward(self, pixels: Tensor, trajectories: Tensor, count: int | None = None) -> EncodedClip:
        """See the class; `count` fixes M, which numbers must stay below."""
        c = self.config
        tokens = self.trajectory_tokens(pixels, trajectories, count)
        mask = None if c.legacy_ignore_mask else tokens.mask
        passes = 2 if c.legacy_double_pass else 1
        pooled, x = self.transformer(tokens.appearance + tokens.position, mask, passes)
        return EncodedClip(pooled, x * tokens.mask[..., None], tokens.mask)
