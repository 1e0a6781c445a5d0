"""TrajTok's segmenter: a network that finds the trajectories of a clip in one pass (arXiv 2602.22779, section 3).

Features of all places of all frames meet K learned queries. The queries read the features, and each place belongs to the
query it is most like: a segment that reaches through time, without tracking. `losses.segmentation` trains it on given
trajectories. `SegmenterConfig()` has the sizes of the released one (59 M parameters).

The released model turns keys by their one-dimensional index; here positions are (t, h, w), the variant that its code also has.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.encoders.base import resized
from tokgen.errors import ConfigError, InputError
from tokgen.nn.attention import apply_rope, rope_table
from tokgen.nn.vit import join_heads
from tokgen.pretrained import Pretrained, Registry
from tokgen.trajectories.base import Trajectories, TrajectorySource
from tokgen.trajectories.matching import continued
from tokgen.trajectories.pyramid import build_pyramid

SEGMENTERS: Registry[TrajectorySegmenter] = Registry(
    "segmenter", {"trajectory-segmenter": "tokgen.trajectories.segmenter:TrajectorySegmenter"}
)


@dataclass(frozen=True)
class SegmenterConfig:
    """Sizes of a `TrajectorySegmenter`.

    Args:
        backbone: see `build_pyramid`.
        image_size: side in pixels that frames are resized to.
        grid: side of the label maps.
        dim, heads, hidden, depth: width, heads, width inside the feed-forward, and blocks of the queries' reading.
        queries: K, the most trajectories that a clip can have.
        frames: that are segmented together; a longer video is cut into pieces of so many.
        max_scale: bound on the factor of the cosines.
        stop_gradient: the queries' reading does not train the features; the places' side of the cosines does (published).
    """

    backbone: dict[str, Any] = field(default_factory=lambda: {"type": "timm", "name": "convnext_small.dinov3_lvd1689m"})
    image_size: int = 224
    grid: int = 56
    dim: int = 512
    heads: int = 8
    hidden: int = 2048
    depth: int = 2
    queries: int = 128
    frames: int = 8
    max_scale: float = 20.0
    stop_gradient: bool = True

    def check(self) -> None:
        """Raise ConfigError, naming the value, if sizes do not fit together."""
        if self.dim % self.heads or self.dim // self.heads < 12 or self.dim % 8:
            raise ConfigError(f"dim={self.dim} over heads={self.heads} must give at least 12, and dim a multiple of 8")
        if min(self.image_size, self.grid, self.depth, self.queries, self.frames) < 1:
            raise ConfigError("image_size, grid, depth, queries and frames must be at least 1")


def fourier_queries(count: int, dim: int, frequencies: int = 4) -> Tensor:
    """The start of the queries, (count, dim): waves over a square grid, mapped by random orthonormal directions, x 0.02.

    Queries start near each other in order and yet all differ.
    """
    side = math.ceil(math.sqrt(count))
    index = torch.arange(count)
    places = torch.stack([index // side, index % side], -1) / max(side - 1, 1)  # (K, 2) in [0, 1]
    angles = 2 * math.pi * places[..., None] * torch.arange(1, frequencies + 1)  # (K, 2, f)
    waves = F.normalize(torch.cat([angles.sin(), angles.cos()], -1).flatten(1), dim=-1)  # (K, 4 f)
    width = waves.shape[1]
    directions, _ = torch.linalg.qr(torch.randn(max(width, dim), min(width, dim)))
    waves = waves @ (directions.T if width <= dim else directions)  # (K, dim)
    return 0.02 * (waves + 1e-3 * torch.randn_like(waves))


class Reading(nn.Module):
    """Queries attend to places and to each other, then a gated feed-forward; pre-norm, residual on the queries.

    Keys of places are turned by (t, h, w) in the first channels of each head (the largest multiple of 6 in half of them,
    so that as many know nothing of the place); queries stand at the origin and are not turned.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.turned = self.head_dim // 12 * 6
        self.norm_places, self.norm_queries = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.gate, self.up, self.down = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, queries: Tensor, places: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """queries (B, K, dim), places (B, N, dim), rope of the places (1, N, turned / 2) each -> (B, K, dim)."""
        x, own = self.norm_places(places), self.norm_queries(queries)
        n = x.shape[1]
        q = self.to_q(own).unflatten(-1, (self.heads, -1))  # (B, K, heads, d)
        k, v = (
            self.to_kv(torch.cat([x, own], 1)).unflatten(-1, (2 * self.heads, -1)).chunk(2, 2)
        )  # (B, N + K, heads, d)
        turned = apply_rope(k[:, :n, :, : self.turned], *rope)
        k = torch.cat([torch.cat([turned, k[:, :n, :, self.turned :]], -1), k[:, n:]], 1)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        queries = queries + self.to_out(join_heads(out))
        x = self.norm(queries)
        return queries + self.down(F.silu(self.gate(x)) * self.up(x))


class TrajectorySegmenter(Pretrained):
    """See the module. Clips are float (B, T, 3, H, W) in [0, 1] or uint8, of any size."""

    type_name = "trajectory-segmenter"
    config_class = SegmenterConfig

    def __init__(self, config: SegmenterConfig | None = None) -> None:
        config = config or SegmenterConfig()
        config.check()
        backbone = build_pyramid(config.backbone)
        super().__init__(dataclasses.replace(config, backbone=backbone.spec()))  # without the way to its weights
        c, self.backbone = config, backbone
        self.projections = nn.ModuleList(nn.Conv2d(width, c.dim, 1) for width in backbone.channels)
        self.norm = nn.LayerNorm(c.dim)  # one for all stages
        self.queries = nn.Parameter(fourier_queries(c.queries, c.dim))
        self.blocks = nn.ModuleList(Reading(c.dim, c.heads, c.hidden) for _ in range(c.depth))
        self.query_norm = nn.LayerNorm(c.dim)
        self.place_head, self.query_head = _head(c.dim), _head(c.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(16.0)))

    @property
    def scale(self) -> Tensor:
        """The factor of the cosines."""
        return (F.softplus(self.log_scale) + 1).clamp(max=self.config.max_scale)

    def features(self, pixels: Tensor) -> Tensor:
        """Features of the places of a clip, (B, T, g, g, dim).

        Raises:
            InputError: other pixels than described above.
        """
        if pixels.ndim != 5 or pixels.shape[2] != 3 or not (pixels.is_floating_point() or pixels.dtype == torch.uint8):
            raise InputError(
                f"clips are {tuple(pixels.shape)} {pixels.dtype}; expected (B, T, 3, H, W), float in [0, 1] or uint8"
            )
        b, t = pixels.shape[:2]
        x = pixels.flatten(0, 1)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        total = 0.0
        side = (self.config.grid, self.config.grid)
        for project, stage in zip(self.projections, self.backbone(resized(x, self.config.image_size, "bilinear"))):
            y = self.norm(project(stage).movedim(1, -1)).movedim(-1, 1)  # (B T, dim, h_i, w_i)
            total = total + F.interpolate(y, size=side, mode="bilinear", align_corners=False)
        return total.movedim(1, -1).unflatten(0, (b, t))

    def read(self, features: Tensor) -> Tensor:
        """The queries after reading features (B, T, g, g, dim), (B, K, dim)."""
        b, t, h, w, _ = features.shape
        places = (features.detach() if self.config.stop_gradient else features).flatten(1, 3)  # (B, N, dim)
        axes = [torch.arange(n, device=features.device) for n in (t, h, w)]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3)
        rope = rope_table(positions, self.blocks[0].turned)
        queries = self.queries.expand(b, -1, -1)
        for block in self.blocks:
            queries = block(queries, places, rope)
        return self.query_norm(queries)

    def assign(self, features: Tensor, queries: Tensor) -> Tensor:
        """Logits of each place belonging to each query, float32 (B, T, g, g, K): scale x cosine."""
        places = F.normalize(self.place_head(features).float(), dim=-1)
        queries = F.normalize(self.query_head(queries).float(), dim=-1)
        with torch.autocast(features.device.type, enabled=False):
            return self.scale.float() * torch.einsum("bthwd,bkd->bthwk", places, queries)

    def forward(self, pixels: Tensor) -> Tensor:
        """Assignment logits float32 (B, T, g, g, K) of clips (B, T, 3, H, W)."""
        features = self.features(pixels)
        return self.assign(features, self.read(features))

    @torch.no_grad()
    def segment(self, pixels: Tensor) -> Tensor:
        """The query that each place belongs to, int64 (B, T, g, g), 0 .. K-1, of clips (B, T, 3, H, W)."""
        return self(pixels).argmax(-1)

    @classmethod
    def example_config(cls) -> SegmenterConfig:
        """A small configuration without downloads, the same code."""
        return SegmenterConfig(
            {"type": "conv", "channels": [32, 64, 64, 64]}, image_size=64, grid=16, dim=64, heads=4, hidden=128, depth=2,
            queries=16, frames=4,
        )  # fmt: skip


def _head(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, dim // 8))


# -- as a source ------------------------------------------------------------------------------------------------------


class SegmenterSource(TrajectorySource):
    """Trajectories of a trained segmenter; every pixel has one.

    A video of more than the segmenter's `frames` is cut into pieces of so many that share one frame. A segment of the next
    piece continues the trajectory that it overlaps on the shared frame by at least `min_iou`, one to one (Hungarian
    method); any other begins a new one.

    Args:
        model: folder or Hub name that `save_pretrained` wrote.
        min_iou: see above.
        device: where the segmenter runs.
    """

    name: ClassVar[str] = "segmenter"

    def __init__(self, model: str | os.PathLike[str], min_iou: float = 0.5, device: str = "cpu") -> None:
        if not 0 < min_iou <= 1:
            raise ConfigError(f"min_iou {min_iou} must be in (0, 1]")
        self.segmenter = TrajectorySegmenter.from_pretrained(model).to(device).requires_grad_(False)
        self.model, self.min_iou, self.device = os.fspath(model), min_iou, device

    def settings(self) -> dict[str, Any]:
        return {"model": self.model, "min_iou": self.min_iou}

    def track(self, video: np.ndarray) -> Trajectories:
        frames, grid = self.segmenter.config.frames, self.segmenter.config.grid
        labels = np.full((len(video), grid, grid), -1, np.int32)
        count, step = 0, max(frames - 1, 1)
        for start in range(0, max(len(video) - 1, 1), step):
            piece = torch.from_numpy(video[start : start + frames]).permute(0, 3, 1, 2)[None].to(self.device)
            segments = Trajectories(self.segmenter.segment(piece)[0].cpu().numpy()).compact().labels
            names = self._names(labels[start] if start else None, segments, count)
            count = max(count, int(names.max()) + 1)
            labels[start : start + frames] = names[segments]
        return Trajectories(labels).compact()

    def _names(self, before: np.ndarray | None, segments: np.ndarray, count: int) -> np.ndarray:
        """Trajectories of a piece's segments, (S,); those absent from the shared frame are new."""
        names = continued(
            before, segments[0], count, self.min_iou
        )  # compact numbers: those of the first frame come first
        later = int(segments.max()) + 1 - len(names)
        fresh = max(count, int(names.max()) + 1)
        return np.concatenate([names, np.arange(fresh, fresh + later, dtype=np.int32)])
