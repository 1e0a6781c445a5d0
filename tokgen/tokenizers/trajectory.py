"""Trajectory tokens that decode: a clip as a set of things, each with a place, a shape and a look, all of it integers.

TrajViT (arXiv 2505.23617) reads a clip as one vector for each thing that moves through it, and does not decode. Here each vector
becomes a token of several ids that a language model can write and that pixels come back from:

- geometry: birth and death, and an ellipse at a few key frames, by scalar quantizers without parameters (`tokgen.nn.ellipses`);
- shape: FSQ codes of a canonical map, which of the ellipse's surroundings belong to the thing;
- appearance: residual FSQ codes of TrajViT's token and of a canonical texture, the first of which stand alone (nested dropout).

Decoding draws each thing once, carries it along its ellipses, composes the layers (`tokgen.nn.compositor`) and refines the
picture. The number of tokens follows the scene, not its duration or size. No publication decodes pixels from trajectories; the
factors are those of MPEG-4's video objects (shape, motion, texture), of deformable sprites (arXiv 2204.07151) and of object-wise
code blocks (arXiv 2402.01203).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.encoders.trajvit import TrajViT, TrajViTConfig
from tokgen.errors import ConfigError, InputError
from tokgen.nn.compositor import Compositor, Refiner
from tokgen.nn.conv import ResBlock
from tokgen.nn.ellipses import EllipseCodec, Ellipses, from_canonical, measure, order_labels
from tokgen.nn.vit import Block
from tokgen.pretrained import config_from_dict
from tokgen.quantizers.base import build_quantizer
from tokgen.tokenizers.base import TokenizerOutput, VisualTokenizer
from tokgen.tokens import Tokens, Trajectories
from tokgen.trajectories.base import TrajectorySource, build_source


def _shape_quantizer() -> dict[str, Any]:
    return {"type": "fsq", "levels": [8, 8, 8, 5, 5]}


def _appearance_quantizer() -> dict[str, Any]:
    return {"type": "residual-fsq", "levels": [8, 8, 8, 5, 5], "num_quantizers": 4, "dropout": 0.5}


@dataclass(frozen=True)
class GridStream:
    """A second stream of codes on a coarse grid, for what the layers miss; its ids are side information of the tokens.

    Attributes:
        stride: cells of the layers' maps to a cell of the grid, along each side.
        every: frames that share their codes.
        channels: width of the layers around it.
        quantizer: a type of `tokgen.quantizers` with one codebook, and its options.
    """

    stride: int = 4
    every: int = 4
    channels: int = 128
    quantizer: dict[str, Any] = field(default_factory=_shape_quantizer)


@dataclass(frozen=True)
class TrajectoryConfig:
    """Sizes of a `TrajectoryTokenizer`.

    Attributes:
        trajectories: most trajectories of a clip; smaller ones than the largest so many are left to their neighbours.
        frames: longest clip.
        keys, levels: of the ellipses, see `EllipseCodec`.
        stride: pixels to a cell of the maps that layers are drawn on.
        source: finds the trajectories of clips that come without, {"type": a name in `tokgen.trajectories.base.SOURCES`, ...}.
        encoder: settings of `TrajViTConfig` that differ from the published ones.
        canvas: side of the canonical maps that are read, which cover three standard deviations to each side.
        shape, texture: side of the canonical maps that are drawn: logits, and colours and features.
        dim, heads, hidden, depth: of the decoder's transformer over trajectories.
        shape_dim: channels of the shape before it is quantized.
        paint_channels: features of a texture, the first three of which are colours.
        layers: trajectories that may share a pixel.
        refiner_channels, refiner_blocks: of the network that makes pixels of the composed maps.
        shape_quantizer, appearance_quantizer: types of `tokgen.quantizers` and their options.
        prefix_dropout: share of training clips of which only the first 1 .. n trajectories are drawn, so that every prefix decodes.
        layout_weight: of the cross-entropy between the layers' logits and the trajectories.
        grid: a `GridStream`; None has none.
    """

    trajectories: int = 128
    frames: int = 16
    keys: int = 4
    levels: tuple[int, ...] = (128, 128, 64, 64, 32, 8)
    stride: int = 4
    source: dict[str, Any] = field(default_factory=lambda: {"type": "voting", "size": 160, "budget": 128})
    encoder: dict[str, Any] = field(default_factory=dict)
    canvas: int = 16
    shape: int = 16
    texture: int = 12
    dim: int = 512
    heads: int = 8
    hidden: int = 2048
    depth: int = 6
    shape_dim: int = 256
    paint_channels: int = 32
    layers: int = 4
    refiner_channels: int = 256
    refiner_blocks: int = 8
    shape_quantizer: dict[str, Any] = field(default_factory=_shape_quantizer)
    appearance_quantizer: dict[str, Any] = field(default_factory=_appearance_quantizer)
    prefix_dropout: float = 0.25
    layout_weight: float = 0.1
    grid: GridStream | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if isinstance(self.grid, dict):
            object.__setattr__(self, "grid", config_from_dict(GridStream, self.grid, "grid"))
        for name in ("trajectories", "stride", "canvas", "shape", "texture", "layers", "shape_dim", "refiner_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"TrajectoryConfig.{name} is {getattr(self, name)}; expected at least 1")
        if self.paint_channels < 3 or self.dim % self.heads:
            raise ConfigError(
                f"TrajectoryConfig: paint_channels {self.paint_channels} must be at least 3 (the colours), and dim {self.dim} a "
                f"multiple of heads {self.heads}"
            )
        if not 0 <= self.prefix_dropout <= 1:
            raise ConfigError(f"TrajectoryConfig.prefix_dropout is {self.prefix_dropout}; expected a share in [0, 1]")


@dataclass(frozen=True)
class _Scene:
    """What is coded of a batch: ids int64 (B, M, C), which rows are trajectories (B, M), and quantized vectors with gradients."""

    geometry: Tensor
    mask: Tensor
    shape: Tensor
    appearance: Tensor
    codes: Tensor


class TrajectoryTokenizer(VisualTokenizer):
    """Clips (B, T, 3, H, W) in [0, 1] -> `Tokens` with `Trajectories(T, h, w, n)` -> clips.

    T is at most `frames`; H and W are any multiples of `factor`. A token has C = 2 + 6 keys + shape + appearance ids, one codebook
    each; `mask` says how many trajectories the clip has. The largest come first, and every prefix decodes.

    Trajectories int (B, T, h, w), -1 for none, on any grid, may be given (as `tokgen trajectories` puts them into shards);
    otherwise the source of the configuration finds them. How they are numbered makes no difference.
    """

    type_name: ClassVar[str] = "trajectory"
    config_class: ClassVar[type] = TrajectoryConfig
    ndims: ClassVar[tuple[int, ...]] = (5,)
    extras: ClassVar[tuple[str, ...]] = ("trajectories",)
    reports: ClassVar[tuple[str, ...]] = ("layout", "trajectories")

    def __init__(self, config: TrajectoryConfig) -> None:
        super().__init__(config)
        c = config
        self.codec = EllipseCodec(c.frames, c.keys, c.levels)
        geometry = len(self.codec.codebook_sizes)
        self.encoder = TrajViT(config_from_dict(TrajViTConfig, c.encoder, "encoder"))
        cells = c.canvas**2
        self.shape_encoder = nn.Sequential(
            nn.Linear(2 * cells, c.hidden), nn.GELU(), nn.Linear(c.hidden, c.shape_dim), nn.LayerNorm(c.shape_dim)
        )
        self.texture_encoder = nn.Sequential(nn.Linear(4 * cells, c.hidden), nn.GELU(), nn.Linear(c.hidden, c.dim))
        self.token_encoder = nn.Linear(self.encoder.dim, c.dim)
        self.appearance_norm = nn.LayerNorm(c.dim)
        self.shape_quantizer = build_quantizer(c.shape_quantizer, c.shape_dim)
        self.appearance_quantizer = build_quantizer(c.appearance_quantizer, c.dim)

        self.geometry_in = nn.Sequential(nn.Linear(geometry, c.hidden), nn.GELU(), nn.Linear(c.hidden, c.dim))
        self.shape_in = nn.Linear(c.shape_dim, c.dim)
        self.appearance_in = nn.Linear(c.dim, c.dim)
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.hidden) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim)
        self.shape_out = nn.Linear(c.dim, c.shape**2)
        self.texture_out = nn.Linear(c.dim, c.paint_channels * c.texture**2)
        nn.init.zeros_(self.shape_out.weight)
        nn.init.zeros_(self.shape_out.bias)
        self.compositor = Compositor(c.layers)
        self.grid = None if c.grid is None else _Grid(c.grid, c.paint_channels, c.stride)
        self.decoder = Refiner(c.paint_channels, c.refiner_channels, c.refiner_blocks, c.stride)
        sizes = torch.tensor(self.codec.codebook_sizes, dtype=torch.float32)
        self.register_buffer("geometry_scale", 2 / (sizes - 1).clamp(min=1), persistent=False)

    # -- sizes ----------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        return self.config.stride * (self.config.grid.stride if self.config.grid else 1)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        quantizers = self.shape_quantizer, self.appearance_quantizer
        return (*self.codec.codebook_sizes, *(n for q in quantizers for n in q.codebook_sizes))

    @property
    def parts(self) -> tuple[int, int, int]:
        """How many ids of a token are geometry, shape and appearance."""
        return tuple(len(x.codebook_sizes) for x in (self.codec, self.shape_quantizer, self.appearance_quantizer))

    @cached_property
    def source(self) -> TrajectorySource:
        """What finds trajectories where none are given."""
        return build_source(self.config.source)

    # -- trajectories in ------------------------------------------------------------------------------------------------

    def labels(self, pixels: Tensor, trajectories: Tensor | None) -> tuple[Tensor, Tensor]:
        """Trajectories by size on the maps' grid, int64 (B, T, h, w), and how many each clip has, (B,); see `order_labels`."""
        b, t, _, height, width = pixels.shape
        h, w = height // self.config.stride, width // self.config.stride
        if trajectories is None:
            found = [torch.from_numpy(self.source(clip).compact().resized(h, w).labels) for clip in pixels]
            trajectories = torch.stack(found).to(pixels.device)
        else:
            integers = not trajectories.is_floating_point() and trajectories.dtype != torch.bool
            if trajectories.ndim != 4 or trajectories.shape[:2] != (b, t) or not integers:
                raise InputError(
                    f"trajectories are {trajectories.dtype} {tuple(trajectories.shape)}; expected integers ({b}, {t}, h, w) for "
                    f"clips {tuple(pixels.shape)}"
                )
            rows, columns = (
                ((torch.arange(n, device=pixels.device, dtype=torch.float64) + 0.5) * m / n).long()
                for n, m in ((h, trajectories.shape[2]), (w, trajectories.shape[3]))
            )
            trajectories = trajectories.to(pixels.device)[:, :, rows[:, None], columns]
        if int(trajectories.min()) < -1:
            raise InputError(f"trajectories reach {int(trajectories.min())}; expected -1 (none), 0, 1, ...")
        return order_labels(trajectories.long(), self.config.trajectories)

    # -- encoding -------------------------------------------------------------------------------------------------------

    def canvas(self, pixels: Tensor, labels: Tensor, ellipses: Ellipses) -> tuple[Tensor, Tensor, Tensor]:
        """Each trajectory as its ellipse sees it, over the frames it lives in.

        Returns:
            occupancy (B, M, S, S), the share of frames in which a place belongs to it; whether the place was in the picture at
            all; and its colours there, (B, M, 3, S, S), 0.5 where it never was.
        """
        b, t, h, w = labels.shape
        m = self.config.trajectories
        x, y = from_canonical(ellipses, self.config.canvas)  # (B, M, T, S, S)
        inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1) & ellipses.alive[..., None, None]
        at = (y * h).long().clamp(0, h - 1) * w + (x * w).long().clamp(0, w - 1)
        frame = torch.arange(t, device=labels.device).view(t, 1, 1) * (h * w)
        at = (at + frame).flatten(1)  # (B, M T S S), places in the clip
        of = labels.flatten(1).gather(1, at).view_as(x)
        own = inside & (of == torch.arange(m, device=labels.device).view(m, 1, 1, 1))
        colors = F.avg_pool2d(pixels.flatten(0, 1), self.config.stride).unflatten(0, (b, t))  # (B, T, 3, h, w)
        colors = colors.transpose(1, 2).flatten(2)  # (B, 3, T h w)
        colors = colors.gather(2, at[:, None].expand(-1, 3, -1)).unflatten(2, x.shape[1:])  # (B, 3, M, T, S, S)
        count = own.sum(2)
        mean = ((colors - 0.5) * own[:, None]).sum(3) / count.clamp(min=1)[:, None] + 0.5  # (B, 3, M, S, S)
        occupancy = count / inside.sum(2).clamp(min=1)
        return occupancy, inside.any(2), mean.transpose(1, 2)

    def scene(
        self, pixels: Tensor, labels: Tensor, numbers: Tensor
    ) -> tuple[_Scene, dict[str, Tensor], dict[str, Tensor]]:
        """Code a batch: its scene, and losses and stats of the quantizers."""
        m, t = self.config.trajectories, labels.shape[1]
        geometry = self.codec.encode(measure(labels, m))
        mask = torch.arange(m, device=labels.device) < numbers[:, None]
        ellipses = self.codec.decode(geometry, t, mask)
        occupancy, inside, colors = self.canvas(pixels, labels, ellipses)
        signs = torch.where(inside, 2 * occupancy - 1, 0)  # (B, M, S, S)
        shape = self.shape_quantizer(self.shape_encoder(torch.cat([signs, inside.float()], 2).flatten(2)), mask)
        look = torch.cat([signs[:, :, None], 2 * colors - 1], 2).flatten(2)  # (B, M, 4 S^2)
        tokens = self.encoder(pixels, labels, count=m).tokens  # (B, M, dim of the encoder)
        z = self.appearance_norm(self.texture_encoder(look) + self.token_encoder(tokens))
        appearance = self.appearance_quantizer(z, mask)
        ids = [geometry, *(q.ids if q.ids.ndim == 3 else q.ids[..., None] for q in (shape, appearance))]
        scene = _Scene(geometry, mask, shape.codes, appearance.codes, torch.cat(ids, -1))
        losses = {
            f"{name}_{k}": v for name, q in (("shape", shape), ("appearance", appearance)) for k, v in q.losses.items()
        }
        stats = {
            f"{name}_{k}": v for name, q in (("shape", shape), ("appearance", appearance)) for k, v in q.stats.items()
        }
        return scene, losses, stats

    # -- decoding -------------------------------------------------------------------------------------------------------

    def paint(self, scene: _Scene, t: int, h: int, w: int) -> tuple[Tensor, Tensor]:
        """The composed maps (B, T, c, h, w) of a scene, and the layers' logits (B, M, T, h, w)."""
        c = self.config
        places = scene.geometry * self.geometry_scale - 1
        x = self.geometry_in(places) + self.shape_in(scene.shape) + self.appearance_in(scene.appearance)  # (B, M, dim)
        # trajectories see each other, in no order; a row that is none sees itself, so that nothing is undefined
        seen = scene.mask[:, None, None] | torch.eye(len(scene.mask[0]), dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, seen)
        x = self.norm(x)
        shapes = self.shape_out(x).unflatten(-1, (c.shape, c.shape))
        textures = self.texture_out(x).unflatten(-1, (c.paint_channels, c.texture, c.texture)).float()
        textures = torch.cat([textures[:, :, :3] + 0.5, textures[:, :, 3:]], 2)  # colours around grey
        return self.compositor(self.codec.decode(scene.geometry, t, scene.mask), shapes, textures, (h, w))

    def _scene_of(self, tokens: Tokens, appearance: int | None = None) -> _Scene:
        """The scene of tokens, padded to the most trajectories there can be, so that no result depends on the rest of a batch."""
        layout, (geometry, shape, looks) = tokens.layout, self.parts
        if not isinstance(layout, Trajectories) or layout.n != self.config.trajectories:
            raise ConfigError(
                f"this tokenizer decodes up to {self.config.trajectories} trajectories of a clip, not {layout}"
            )
        if layout.t > self.config.frames:
            raise ConfigError(f"{layout} has more frames than the {self.config.frames} of this tokenizer")
        missing = layout.n - tokens.ids.shape[1]
        ids, mask = F.pad(tokens.ids, (0, 0, 0, missing)), F.pad(tokens.mask, (0, missing))
        of_geometry, of_shape, of_look = ids.split((geometry, shape, looks), -1)
        of_look = of_look[..., : looks if appearance is None else appearance]
        vectors = [
            q.lookup(i if len(q.codebook_sizes) > 1 else i[..., 0])
            for q, i in ((self.shape_quantizer, of_shape), (self.appearance_quantizer, of_look))
        ]
        return _Scene(of_geometry, mask, *vectors, ids)

    @torch.no_grad()
    def decode_coarse(self, tokens: Tokens, appearance: int) -> Tensor:
        """As `decode`, from the first `appearance` of the appearance ids of each trajectory. Raises InputError unless there are
        that many, or for an appearance quantizer with one codebook."""
        if not 1 <= appearance <= self.parts[2] or self.parts[2] == 1:
            raise InputError(
                f"appearance={appearance}; this tokenizer has {self.parts[2]} appearance ids, expected 1 to that"
            )
        self.check_tokens(tokens)
        return self.finish(self._decode(tokens.to(self.device), appearance))

    @torch.no_grad()
    def decode_labels(self, tokens: Tokens) -> Tensor:
        """Which trajectory shows where, int64 (B, T, h, w), row numbers of the tokens, as the layers are drawn; -1 where none is."""
        self.check_tokens(tokens)
        tokens = tokens.to(self.device)
        layout = tokens.layout
        _, logits = self.paint(self._scene_of(tokens), layout.t, layout.h, layout.w)
        alive = logits.amax(1) > -1e3
        return torch.where(alive, logits.argmax(1), -1)

    def _decode(self, tokens: Tokens, appearance: int | None = None) -> Tensor:
        layout = tokens.layout
        features, _ = self.paint(self._scene_of(tokens, appearance), layout.t, layout.h, layout.w)
        if self.grid is not None:
            if "grid" not in tokens.side:
                raise InputError(
                    "these tokens lack the ids of the grid stream (side 'grid'), which this tokenizer decodes with"
                )
            features = features + self.grid.decode(tokens.side["grid"], features.shape)
        return self.decoder(features)

    # -- the contract ---------------------------------------------------------------------------------------------------

    def as_tokens(self, codes: Tensor, numbers: Tensor, shape: tuple[int, int, int], grid: Tensor | None) -> Tokens:
        """`Tokens` of ids (B, M, C), of which each clip has so many, without rows that no clip has."""
        n = max(int(numbers.max()), 1)
        mask = torch.arange(n, device=codes.device) < numbers[:, None]
        side = {} if grid is None else {"grid": grid}
        sizes = {} if grid is None else {"grid": self.grid.size}
        layout = Trajectories(*shape, self.config.trajectories)
        return Tokens(codes[:, :n], layout, self.codebook_sizes, mask, self.stamp(), side, sizes)

    def tokenize(self, pixels: Tensor, trajectories: Tensor | None = None) -> Tokens:
        labels, numbers = self.labels(pixels, trajectories)
        scene, _, _ = self.scene(pixels, labels, numbers)
        return self._tokens(pixels, labels, numbers, scene)

    def _tokens(self, pixels: Tensor, labels: Tensor, numbers: Tensor, scene: _Scene) -> Tokens:
        grid = None
        if self.grid is not None:
            grid = self.grid.encode(pixels, self.paint(scene, *labels.shape[1:])[0]).ids
        return self.as_tokens(scene.codes, numbers, labels.shape[1:], grid)

    def detokenize(self, tokens: Tokens) -> Tensor:
        return self._decode(tokens)

    def forward(self, pixels: Tensor, trajectories: Tensor | None = None) -> TokenizerOutput:
        """Reconstruct clips (B, T, 3, H, W) in [0, 1]; in eval mode through the ids alone. Loss "layout" in training.

        Stats "layout", the share of pixels that show the trajectory they belong to, and "trajectories", their number; each (B,)
        in eval mode.
        """
        labels, numbers = self.labels(pixels, trajectories)
        scene, losses, stats = self.scene(pixels, labels, numbers)
        if not self.training:
            tokens = self._tokens(pixels, labels, numbers, scene)
            _, logits = self.paint(scene, *labels.shape[1:])
            known = labels >= 0
            right = ((logits.argmax(1) == labels) & known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
            return TokenizerOutput(
                self.finish(self._decode(tokens)),
                tokens,
                {},
                {**stats, "layout": right, "trajectories": numbers.float()},
            )
        scene, shown = self._prefix(scene, numbers)
        features, logits = self.paint(scene, *labels.shape[1:])  # (B, T, c, h, w), (B, M, T, h, w)
        target = torch.where(labels < shown.view(-1, 1, 1, 1), labels, -1)
        losses["layout"] = self.config.layout_weight * F.cross_entropy(logits, target, ignore_index=-1)
        grid = None
        if self.grid is not None:
            coded = self.grid.encode(pixels, features)
            grid = coded.ids
            losses |= {f"grid_{k}": v for k, v in coded.losses.items()}
            stats |= {f"grid_{k}": v for k, v in coded.stats.items()}
            features = features + self.grid.enlarge(coded.codes, features.shape)
        with torch.no_grad():
            known = target >= 0
            stats["layout"] = ((logits.argmax(1) == target) & known).sum() / known.sum().clamp(min=1)
            stats["trajectories"] = numbers.float().mean()
        tokens = self.as_tokens(scene.codes, numbers, labels.shape[1:], grid)
        return TokenizerOutput(self.decoder(features), tokens, losses, stats)

    def _prefix(self, scene: _Scene, numbers: Tensor) -> tuple[_Scene, Tensor]:
        """The scene with, in some clips, the first few trajectories only; and how many each has."""
        b, m = scene.mask.shape
        fewer = 1 + (torch.rand(b, device=numbers.device) * numbers).long().clamp(max=m - 1)
        cut = torch.rand(b, device=numbers.device) < self.config.prefix_dropout
        shown = torch.where(cut, torch.minimum(fewer, numbers), numbers)
        mask = scene.mask & (torch.arange(m, device=numbers.device) < shown[:, None])
        return _Scene(scene.geometry, mask, scene.shape, scene.appearance, scene.codes), shown

    def as_pixels(self, pixels: Any) -> Tensor:
        pixels = super().as_pixels(pixels)
        if not 1 <= pixels.shape[1] <= self.config.frames:
            raise InputError(
                f"clips of {pixels.shape[1]} frames do not fit this tokenizer, which takes 1 to {self.config.frames}: cut them "
                "into shorter clips, or take every second frame"
            )
        return pixels

    @classmethod
    def example_configs(cls) -> dict[str, TrajectoryConfig]:
        encoder = {
            "image_size": 16, "mask_stride": 2, "widths": [8, 16], "layers": [1, 1], "dim": 32, "heads": 4, "hidden": 32, "depth": 1,
            "appearance_depth": 1, "position_depth": 1, "octaves": 4,
        }  # fmt: skip
        small = {
            "trajectories": 12, "frames": 8, "keys": 3, "levels": (32, 32, 16, 16, 8, 4), "stride": 4, "encoder": encoder, "canvas": 8,
            "shape": 6, "texture": 4, "dim": 32, "heads": 2, "hidden": 48, "depth": 1, "shape_dim": 16, "paint_channels": 8, "layers": 3,
            "refiner_channels": 32, "refiner_blocks": 1, "source": {"type": "voting", "size": 16, "budget": 12},
            "shape_quantizer": {"type": "fsq", "levels": [5, 4, 4]},
            "appearance_quantizer": {"type": "residual-fsq", "levels": [5, 4, 4], "num_quantizers": 2, "dropout": 0.5},
        }  # fmt: skip
        grid = GridStream(stride=2, every=3, channels=32, quantizer={"type": "fsq", "levels": [5, 4, 4]})
        return {"plain": TrajectoryConfig(**small), "grid": TrajectoryConfig(**{**small, "keys": 1, "grid": grid})}


class _Grid(nn.Module):
    """The grid stream: clips and what is painted of them -> codes of coarse cells -> maps to be added to what is painted."""

    def __init__(self, config: GridStream, paint_channels: int, stride: int) -> None:
        super().__init__()
        self.config, self.stride = config, stride
        c = config.channels
        self.enter = nn.Conv2d((3 * stride**2 + paint_channels) * config.stride**2, c, 1)
        self.encoder = ResBlock(c, c)
        self.quantizer = build_quantizer(config.quantizer, c)
        if len(self.quantizer.codebook_sizes) > 1:
            raise ConfigError(f"grid.quantizer has {len(self.quantizer.codebook_sizes)} codebooks; expected one")
        self.decoder = ResBlock(c, c)
        self.leave = nn.Conv2d(c, paint_channels * config.stride**2, 1)

    @property
    def size(self) -> int:
        return self.quantizer.codebook_sizes[0]

    def encode(self, pixels: Tensor, painted: Tensor) -> Any:
        """`Quantized` ids (B, t, h, w), each of `every` frames; pixels (B, T, 3, H, W), painted (B, T, c, h', w')."""
        maps = F.pixel_unshuffle(pixels.flatten(0, 1), self.stride).unflatten(0, pixels.shape[:2])
        maps = torch.cat([maps, painted.detach()], 2)
        missing = -maps.shape[1] % self.config.every
        maps = torch.cat([maps, maps[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
        maps = maps.unflatten(1, (-1, self.config.every)).mean(2)  # (B, t, c, h', w')
        x = self.encoder(self.enter(F.pixel_unshuffle(maps.flatten(0, 1), self.config.stride)))
        return self.quantizer(x.movedim(1, -1).unflatten(0, maps.shape[:2]).float())

    def decode(self, ids: Tensor, shape: torch.Size) -> Tensor:
        return self.enlarge(self.quantizer.lookup(ids), shape)

    def enlarge(self, codes: Tensor, shape: torch.Size) -> Tensor:
        """Maps of `shape` (B, T, c, h', w') of codes (B, t, h, w, channels)."""
        x = self.leave(self.decoder(codes.flatten(0, 1).movedim(-1, 1)))
        x = F.pixel_shuffle(x, self.config.stride).unflatten(0, codes.shape[:2])
        return x.repeat_interleave(self.config.every, 1)[:, : shape[1]]
