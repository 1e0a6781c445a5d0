"""Emu3's vision tokenizer (arXiv 2409.18869, section 2.2): pictures and clips as codes of one codebook.

A VQGAN of SBER-MoVQGAN's kind: the decoder reads the codes twice, as its input and, at every norm, as scale and shift (MoVQ,
arXiv 2209.09002). Emu3 adds causal convolutions in time around it, on its narrow maps only, so that clips become 4 times shorter as
well. A picture is a clip of 4 frames that stands still, of which the decoder keeps the first.

`Emu3Config()` is the published model (270.7 M parameters); its weights load through `tokgen.importers.emu3`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokgen.errors import ConfigError, InputError
from tokgen.nn.conv import Decoder, Encoder
from tokgen.nn.spatiotemporal import CausalConv3d, SpatialNorm, TemporalDecoder, TemporalEncoder
from tokgen.quantizers.base import build_quantizer
from tokgen.tokenizers.base import TokenizerOutput, VisualTokenizer
from tokgen.tokens import Grid, Tokens

PIXELS_AT_ONCE = 1 << 20  # of frames that are encoded or decoded together outside of training: four of 512 x 512


def _published_quantizer() -> dict[str, Any]:
    return {"type": "vq", "codebook_size": 32768, "metric": "l2", "update": "gradient", "beta": 0.25}


@dataclass(frozen=True)
class Emu3Config:
    """Sizes of an Emu3 tokenizer. The defaults are the published ones: 8 x 8 pixels a token, 4 frames in a clip.

    Attributes:
        channels: width of the first level.
        channel_mult: width of each level as a multiple of `channels`, high to low resolution.
        num_res_blocks: residual blocks a level in the encoder, one more in the decoder; and of the blocks in time of each.
        code_dim: channels of a code, and of all maps between encoder and decoder.
        temporal_factor: frames of a clip that share their tokens; a power of 2.
        patch: pixels folded into channels before the first convolution (1: the published model).
        quantizer: a type of `tokgen.quantizers` and its options. Size and plain distances are published, the weight of the
            commitment term is not.
    """

    channels: int = 256
    channel_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    code_dim: int = 4
    temporal_factor: int = 4
    patch: int = 1
    quantizer: dict[str, Any] = field(default_factory=_published_quantizer)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        for name in ("channels", "num_res_blocks", "code_dim", "temporal_factor", "patch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Emu3Config.{name} is {getattr(self, name)}; expected at least 1")
        if not self.channel_mult:
            raise ConfigError("Emu3Config.channel_mult is empty; give one multiple per level, such as (1, 2, 2, 4)")
        if self.temporal_factor & (self.temporal_factor - 1):
            raise ConfigError(f"Emu3Config.temporal_factor is {self.temporal_factor}; expected a power of 2")


class Emu3(VisualTokenizer):
    """Pixels -> grid of codes -> pixels. Any height and width that are multiples of `factor`.

    Shapes: pictures (B, 3, H, W) in [0, 1], tokens `Grid(H/f, W/f)`; clips (B, T, 3, H, W), T a multiple of `temporal_factor`,
    tokens `Grid(T/temporal_factor, H/f, W/f)`. The first of these grids is what the first frames alone would give: no token
    depends on later frames. Tokens of a picture decode to a picture, those of a clip to a clip.
    """

    type_name: ClassVar[str] = "emu3"
    config_class: ClassVar[type] = Emu3Config
    ndims: ClassVar[tuple[int, ...]] = (4, 5)

    def __init__(self, config: Emu3Config) -> None:
        super().__init__(config)
        dim, halvings = config.code_dim, config.temporal_factor.bit_length() - 1
        sizes = (config.channels, config.channel_mult, config.num_res_blocks, dim, 0.0, config.patch)
        self.encoder = Encoder(*sizes)
        self.temporal_encoder = TemporalEncoder(dim, halvings, config.num_res_blocks)
        self.pre_quant = CausalConv3d(dim, dim, size=1)
        self.quantizer = build_quantizer(config.quantizer, dim)
        self.post_quant = CausalConv3d(dim, dim, size=1)
        self.temporal_decoder = TemporalDecoder(dim, halvings, config.num_res_blocks)
        self.decoder = Decoder(*sizes, norm=partial(SpatialNorm, code_dim=dim))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                # as the release's class starts; with PyTorch's start next to nothing of the picture comes through the layers in time
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def factor(self) -> int:
        return self.config.patch * 2 ** (len(self.config.channel_mult) - 1)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(self.quantizer.codebook_sizes)

    # -- the three parts ----------------------------------------------------------------------------------------------

    def encode_features(self, pixels: Tensor) -> Tensor:
        """Vectors before quantization, (B, t, h, w, code_dim), of pictures (t = 1) or clips in [0, 1]."""
        frames = pixels[:, None] if pixels.ndim == 4 else pixels  # (B, T, 3, H, W)
        size = frames.shape[-2:].numel()
        z = self._by_frames(self.encoder, size, frames.flatten(0, 1) * 2 - 1)  # (B T, code_dim, h, w)
        z = z.unflatten(0, frames.shape[:2]).transpose(1, 2)  # (B, code_dim, T, h, w)
        if pixels.ndim == 4:
            z = z.expand(-1, -1, self.config.temporal_factor, -1, -1)  # the picture stands still
        return self.pre_quant(self.temporal_encoder(z)).permute(0, 2, 3, 4, 1).float()

    def decode_features(self, codes: Tensor, picture: bool) -> Tensor:
        """Pixels, not clamped, of codes (B, t, h, w, code_dim): (B, T, 3, H, W), or with `picture` (B, 3, H, W), frame 0."""
        codes = codes.permute(0, 4, 1, 2, 3).to(self.post_quant.weight.dtype)  # (B, code_dim, t, h, w)
        # input and condition of the decoder go through the same layers in time, and in training share their statistics
        both = self.temporal_decoder(torch.cat([self.post_quant(codes), codes]))  # (2 B, code_dim, T, h, w)
        if picture:
            both = both[:, :, :1]
        frames = both.transpose(1, 2).flatten(0, 1)  # (2 B T, code_dim, h, w)
        size = codes.shape[-2:].numel() * self.factor**2
        pixels = (self._by_frames(self.decoder, size, *frames.chunk(2)) + 1) / 2
        return pixels if picture else pixels.unflatten(0, (len(codes), -1))

    def _by_frames(self, module: nn.Module, size: int, *maps: Tensor) -> Tensor:
        """`module` of the maps (N, ...) of N frames of `size` pixels, which it treats one by one: in training all at once."""
        n = max(PIXELS_AT_ONCE // size, 1)
        if self.training or len(maps[0]) <= n:
            return module(*maps)
        return torch.cat([module(*part) for part in zip(*(m.split(n) for m in maps))])

    def as_tokens(self, ids: Tensor, picture: bool) -> Tokens:
        """`Tokens` of ids (B, t, h, w) or (B, t, h, w, C)."""
        grid = Grid(*ids.shape[2:4]) if picture else Grid(*ids.shape[1:4])
        return Tokens(ids.flatten(1, 3), grid, self.codebook_sizes, tokenizer=self.stamp())

    # -- as a language model reads it ---------------------------------------------------------------------------------

    @property
    def code_dim(self) -> int:
        return self.config.code_dim

    def embeddings(self, tokens: Tokens) -> Tensor:
        return self.quantizer.lookup(tokens.ids.to(self.device)).float()

    def codebook_table(self) -> Tensor:
        if len(self.codebook_sizes) > 1:
            return super().codebook_table()
        with torch.no_grad():
            return self.quantizer.lookup(torch.arange(self.codebook_sizes[0], device=self.device)).float()

    # -- the contract -------------------------------------------------------------------------------------------------

    def tokenize(self, pixels: Tensor) -> Tokens:
        return self.as_tokens(self.quantizer(self.encode_features(pixels)).ids, pixels.ndim == 4)

    def detokenize(self, tokens: Tokens) -> Tensor:
        if not isinstance(tokens.layout, Grid) or tokens.ids.shape[1] != tokens.layout.length:
            raise ConfigError(
                f"Emu3 decodes a full grid of a picture or a clip; got {tokens.ids.shape[1]} tokens of {tokens.layout}"
            )
        grid = (tokens.layout.t or 1, tokens.layout.h, tokens.layout.w)
        return self.decode_features(self.quantizer.lookup(tokens.ids.unflatten(1, grid)), tokens.layout.t is None)

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Reconstruct pictures (B, 3, H, W) or clips (B, T, 3, H, W) in [0, 1] with gradients; see `TokenizerOutput`."""
        picture = pixels.ndim == 4
        quantized = self.quantizer(self.encode_features(pixels))
        reconstruction = self.decode_features(quantized.codes, picture)
        if not self.training:
            reconstruction = self.finish(reconstruction)
        tokens, codes = self.as_tokens(quantized.ids, picture), quantized.codes.flatten(1, 3)  # (B, t h w, code_dim)
        return TokenizerOutput(reconstruction, tokens, quantized.losses, quantized.stats, codes)

    def as_pixels(self, pixels: Any) -> Tensor:
        pixels, f = super().as_pixels(pixels), self.config.temporal_factor
        if pixels.ndim == 5 and (pixels.shape[1] % f or not pixels.shape[1]):
            raise InputError(
                f"clips of {pixels.shape[1]} frames do not fit this tokenizer: expected a multiple of {f}; leave some out, or "
                "repeat the last one"
            )
        return pixels

    @classmethod
    def example_configs(cls) -> dict[str, Emu3Config]:
        vq = {"type": "vq", "codebook_size": 64}
        return {
            "published": Emu3Config(32, (1, 2), 1, quantizer=vq),
            "folded": Emu3Config(
                32, (1,), 1, code_dim=5, temporal_factor=2, patch=4, quantizer={**vq, "update": "ema"}
            ),
        }
