"""VQGAN tokenizer in LlamaGen's form (arXiv 2406.06525, section 3.1): the baseline the other systems build on.

A convolutional encoder, one codebook, a convolutional decoder. `VQGANConfig()` is VQ-16, `VQGANConfig.vq8()` VQ-8; their
published weights load through `tokgen.importers.llamagen`. `VQGANConfig.ibq()` is IBQ's tokenizer, and Emu3.5's, whose
weights load through `tokgen.importers.ibq`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.nn.conv import Decoder, Encoder
from tokgen.quantizers.base import build_quantizer
from tokgen.tokenizers.base import TokenizerOutput, VisualTokenizer
from tokgen.tokens import Grid, Tokens


def _llamagen_quantizer() -> dict[str, Any]:
    return {"type": "vq", "codebook_size": 16384, "metric": "cosine", "update": "gradient", "beta": 0.25}


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a VQGAN. The defaults are LlamaGen's VQ-16: 71.9 M parameters, 16 x 16 pixels a token, 16,384 codes.

    Attributes:
        channels: width of the first level.
        channel_mult: width of each level as a multiple of `channels`, high to low resolution.
        num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
        z_channels: width of the encoder's output and the decoder's input.
        code_dim: channels of a code.
        patch: pixels folded into channels before the first convolution (1: the published model).
        dropout: in the residual blocks.
        quantizer: a type of `tokgen.quantizers` and its options.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    code_dim: int = 8
    patch: int = 1
    dropout: float = 0.0
    quantizer: dict[str, Any] = field(default_factory=_llamagen_quantizer)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        for name in ("channels", "num_res_blocks", "z_channels", "code_dim", "patch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"VQGANConfig.{name} is {getattr(self, name)}; expected at least 1")
        if not self.channel_mult:
            raise ConfigError("VQGANConfig.channel_mult is empty; give one multiple per level, such as (1, 1, 2, 2, 4)")

    @classmethod
    def vq8(cls) -> VQGANConfig:
        """LlamaGen's VQ-8: 70.1 M parameters, 8 x 8 pixels a token."""
        return cls(channel_mult=(1, 2, 2, 4))

    @classmethod
    def ibq(cls, codebook_size: int = 131072, channels: int = 128) -> VQGANConfig:
        """IBQ's tokenizer (arXiv 2412.02692, sec. 4.1): the same network, deeper, with codes of 256 channels.

        Args:
            codebook_size: 131,072 is ETT's (arXiv 2505.10562), 140.3 M parameters; IBQ has 1,024 to 262,144.
            channels: 256 gives the 455 M parameters of Emu3.5's vision tokenizer.
        """
        quantizer = {"type": "ibq", "codebook_size": codebook_size}
        return cls(channels, num_res_blocks=4, code_dim=256, quantizer=quantizer)


class VQGAN(VisualTokenizer):
    """Pixels -> grid of codes -> pixels. Fully convolutional: any height and width that are multiples of `factor`.

    Shapes: pixels (B, 3, H, W) in [0, 1]; tokens `Grid(H/f, W/f)`, ids (B, N) or (B, N, C) for C codebooks.
    """

    type_name: ClassVar[str] = "vqgan"
    config_class: ClassVar[type] = VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        arguments = (
            config.channels,
            config.channel_mult,
            config.num_res_blocks,
            config.z_channels,
            config.dropout,
            config.patch,
        )
        self.encoder = Encoder(*arguments)
        self.pre_quant = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.quantizer = build_quantizer(config.quantizer, config.code_dim)
        self.post_quant = nn.Conv2d(config.code_dim, config.z_channels, 1)
        self.decoder = Decoder(*arguments)

    @property
    def factor(self) -> int:
        return self.config.patch * 2 ** (len(self.config.channel_mult) - 1)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(self.quantizer.codebook_sizes)

    # -- the three parts ----------------------------------------------------------------------------------------------

    def encode_features(self, pixels: Tensor) -> Tensor:
        """Latents before quantization, (B, h, w, code_dim), of pixels (B, 3, H, W) in [0, 1]."""
        z = self.pre_quant(self.encoder(pixels * 2 - 1))  # (B, code_dim, h, w)
        return z.permute(0, 2, 3, 1)

    def decode_features(self, codes: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), not clamped, of codes (B, h, w, code_dim)."""
        codes = codes.permute(0, 3, 1, 2).to(self.post_quant.weight.dtype)
        return (self.decoder(self.post_quant(codes)) + 1) / 2

    def as_tokens(self, ids: Tensor) -> Tokens:
        """`Tokens` of ids (B, h, w) or (B, h, w, C)."""
        return Tokens(ids.flatten(1, 2), Grid(*ids.shape[1:3]), self.codebook_sizes, tokenizer=self.stamp())

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
        return self.as_tokens(self.quantizer(self.encode_features(pixels)).ids)

    def detokenize(self, tokens: Tokens) -> Tensor:
        if (
            not isinstance(tokens.layout, Grid)
            or tokens.layout.t is not None
            or tokens.ids.shape[1] != tokens.layout.length
        ):
            raise ConfigError(f"VQGAN decodes a full image grid; got {tokens.ids.shape[1]} tokens of {tokens.layout}")
        ids = tokens.ids.unflatten(1, tokens.layout.shape)  # (B, h, w[, C])
        return self.decode_features(self.quantizer.lookup(ids))

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Reconstruct pixels (B, 3, H, W) in [0, 1] with gradients; see `TokenizerOutput`."""
        quantized = self.quantizer(self.encode_features(pixels))
        reconstruction = self.decode_features(quantized.codes)
        if not self.training:
            reconstruction = self.finish(reconstruction)
        tokens, codes = self.as_tokens(quantized.ids), quantized.codes.flatten(1, 2)  # (B, h w, code_dim)
        return TokenizerOutput(reconstruction, tokens, quantized.losses, quantized.stats, codes)

    @classmethod
    def example_configs(cls) -> dict[str, VQGANConfig]:
        small: dict[str, Any] = {
            "channels": 32,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "z_channels": 32,
            "code_dim": 8,
        }
        vq = {"type": "vq", "codebook_size": 64}
        return {
            "cosine": VQGANConfig(**small, quantizer={**vq, "metric": "cosine"}),
            "ema-patch": VQGANConfig(**{**small, "patch": 4}, quantizer={**vq, "update": "ema"}),
            "ibq": VQGANConfig(**small, quantizer={"type": "ibq", "codebook_size": 64}),
            "simvq": VQGANConfig(**small, quantizer={"type": "simvq", "codebook_size": 64}),
            "fsq": VQGANConfig(**small, quantizer={"type": "fsq", "levels": [8, 5, 5]}),
            "lfq": VQGANConfig(**small, quantizer={"type": "lfq", "bits": 8}),
            "bsq": VQGANConfig(**small, quantizer={"type": "bsq", "bits": 8}),
            "residual": VQGANConfig(
                **small, quantizer={"type": "residual-vq", "codebook_size": 64, "num_quantizers": 2}
            ),
        }
