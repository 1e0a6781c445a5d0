"""TokenFlow: codes that say what a picture shows and how it looks, by one index (arXiv 2412.03069).

Two encoders see the picture: a vision transformer that begins as CLIP's and is trained further, and a VQGAN's convolutions. Their
maps are quantized together, coarse to fine (`tokgen.quantizers.multiscale`), with a dual codebook whose codes are pairs
(`tokgen.quantizers.dual`). The semantic halves decode to the features of a frozen teacher, the pixel halves to the picture.

`TokenFlowConfig()` is variant B at 224 px, `.clipb()`, `.vitamin()` and `.siglip()` give all of them. Published weights load
through `tokgen.importers.tokenflow`. Facts that the paper leaves open are those of the released code
(github.com/ByteVisionLab/TokenFlow).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.encoders.base import ImageEncoder, build_encoder
from tokgen.errors import ConfigError
from tokgen.nn.conv import Decoder, Encoder
from tokgen.nn.vit import Block, resized_positions
from tokgen.quantizers.base import build_quantizer
from tokgen.quantizers.multiscale import MultiScale, ScaledCodes
from tokgen.tokenizers.base import TokenizerOutput, VisualTokenizer
from tokgen.tokens import Tokens

COSINE = "semantic_cosine"
SCALES_14 = (1, 2, 4, 6, 8, 10, 12, 14)
SCALES_27 = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)


def _clip_b() -> dict[str, Any]:
    # the released student sees pixels in [-1, 1], without CLIP's mean and deviation, which its teacher has
    return {"type": "clip", "config": {"mean": [0.5] * 3, "std": [0.5] * 3}}


def _dual_vq() -> dict[str, Any]:
    return {"type": "dual-vq", "codebook_size": 32768, "beta": 0.25}


@dataclass(frozen=True)
class TokenFlowConfig:
    """Sizes and weights of a TokenFlow. The defaults are variant B: 224 px, 561 ids of 32,768, 181.9 M parameters.

    Attributes:
        image_size: side of the pictures in pixels.
        semantic_encoder: see `tokgen.encoders.base.build_encoder`; trained with the rest. It begins as the teacher, in another
            copy: {"pretrained": FOLDER}. Its features of places must have the grid of the last scale.
        semantic_dim, pixel_dim: channels of the two streams. 0 leaves a stream and its encoder out; its decoder then reads the
            other stream's codes without training them, and shows what they hold (the paper's single-codebook baselines).
        scales: sides of the maps, coarse to fine; the last is the grid of both encoders.
        scale_dropout: see `MultiScale`.
        quantizer: a type of `tokgen.quantizers` and its options, "dual-vq" as published; {"index": "separate"} in it gives each
            stream an index of its own.
        channels, channel_mult, num_res_blocks, z_channels, patch, dropout: of the pixel encoder and decoder, see `VQGANConfig`.
        decoder_channels, decoder_res_blocks: of the pixel decoder; None: as the encoder. "Enhanced" in the release: 256 and 4.
        pixel_size: side to which the pixel encoder's pictures are resized, and from which the decoder's are; None: image_size.
        target_dim: channels of the teacher's features.
        decoder_dim, decoder_heads, decoder_depth: of the semantic decoder.
        position_grid: side of the grid that the semantic decoder's positions are for; None: that of the last scale.
        semantic_loss: "cosine", mean of 1 - cos, as released; "l2", mean squared difference of the normalised features, summed over
            channels, as the paper words it: twice as much.
        semantic_weight: of this term.
    """

    image_size: int = 224
    semantic_encoder: dict[str, Any] = field(default_factory=_clip_b)
    semantic_dim: int = 32
    pixel_dim: int = 8
    scales: tuple[int, ...] = SCALES_14
    scale_dropout: float = 0.1
    quantizer: dict[str, Any] = field(default_factory=_dual_vq)
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    patch: int = 1
    dropout: float = 0.0
    decoder_channels: int | None = None
    decoder_res_blocks: int | None = None
    pixel_size: int | None = None
    target_dim: int = 512
    decoder_dim: int = 768
    decoder_heads: int = 12
    decoder_depth: int = 3
    position_grid: int | None = None
    semantic_loss: str = "cosine"
    semantic_weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "scales", tuple(self.scales))
        if min(self.semantic_dim, self.pixel_dim) < 0 or not self.code_dim:
            raise ConfigError(
                f"TokenFlowConfig: semantic_dim {self.semantic_dim} and pixel_dim {self.pixel_dim}; expected 0 or more, and one of "
                "them at least 1"
            )
        if not self.channel_mult or not self.scales:
            raise ConfigError("TokenFlowConfig: channel_mult and scales name one number at least")
        side = self.scales[-1] * self.patch * 2 ** (len(self.channel_mult) - 1)
        if (self.pixel_size or self.image_size) != side:
            raise ConfigError(
                f"TokenFlowConfig: pictures of {self.pixel_size or self.image_size} px do not give a grid of the last scale, "
                f"{self.scales[-1]}, which needs {side} px; set pixel_size, scales, patch or channel_mult"
            )
        if self.decoder_dim % self.decoder_heads:
            raise ConfigError(
                f"TokenFlowConfig: decoder_dim {self.decoder_dim} must be a multiple of decoder_heads {self.decoder_heads}"
            )
        if self.semantic_loss not in ("cosine", "l2"):
            raise ConfigError(f"TokenFlowConfig.semantic_loss {self.semantic_loss!r}; expected 'cosine' or 'l2'")

    @property
    def code_dim(self) -> int:
        return self.semantic_dim + self.pixel_dim

    @classmethod
    def clipb(cls, resolution: int = 224, enhanced: bool = False, **changes: Any) -> TokenFlowConfig:
        """Variant B. At 256 px the positions of 224 px are interpolated, as the release does; 817 ids. `enhanced`: the decoder that
        the released weights have, 376.6 M parameters in all."""
        config: dict[str, Any] = {}
        if resolution == 256:
            encoder = _clip_b()
            encoder["config"] |= {"image_size": 256, "position_grid": 14}
            config = {"image_size": 256, "scales": (*SCALES_14, 16), "semantic_encoder": encoder, "position_grid": 14}
        elif resolution != 224:
            raise ConfigError(f"TokenFlow B takes pictures of 224 or 256 px, got {resolution}")
        if enhanced:
            config |= {"decoder_channels": 256, "decoder_res_blocks": 4}
        return cls(**{**config, **changes})

    @classmethod
    def vitamin(cls, **changes: Any) -> TokenFlowConfig:
        """Variant L: timm's ViTamin-XL at 256 px, 817 ids. Table 11 of the paper lists one scale more than the code, 3."""
        encoder = {"type": "timm", "name": "vitamin_xlarge_256", "args": {"final_norm": False}}
        sizes = {"image_size": 256, "scales": (*SCALES_14, 16), "target_dim": 1152, "decoder_dim": 1152}
        return cls(**{**sizes, "semantic_encoder": encoder, **changes})

    @classmethod
    def siglip(cls, **changes: Any) -> TokenFlowConfig:
        """Variant XL: SigLIP SO400M/14 at 384 px, its states before the last block; pixels at 432 px; 2,227 ids."""
        from tokgen.encoders.clip import ClipViTConfig

        encoder = {"type": "clip", "config": dataclasses.asdict(ClipViTConfig.siglip())}
        sizes = {"image_size": 384, "pixel_size": 432, "scales": SCALES_27, "target_dim": 1152, "decoder_dim": 1152}
        return cls(**{**sizes, "semantic_encoder": encoder, **changes})


class SemanticDecoder(nn.Module):
    """A small vision transformer from a map of codes to one vector for each place, as BEiT v2's decoder (arXiv 2208.06366).

    Args:
        in_dim, grid: channels and side of the map.
        dim, heads, depth: of the transformer.
        position_grid: side of the grid that the learned positions are for.
    """

    def __init__(self, in_dim: int, grid: int, dim: int, heads: int, depth: int, position_grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.enter = nn.Conv2d(in_dim, dim, 1)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + position_grid**2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, 4 * dim, 1e-6, "qv") for _ in range(depth))
        self.norm = nn.LayerNorm(dim, 1e-6)
        for p in (self.class_token, self.positions):
            nn.init.trunc_normal_(p, std=0.02)
        self.blocks.apply(_start)
        for i, block in enumerate(self.blocks, 1):
            block.attn.proj.weight.data.div_(math.sqrt(2 * i))
            block.mlp.fc2.weight.data.div_(math.sqrt(2 * i))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, s, s) -> (B, s * s, dim)."""
        x = self.enter(x).flatten(2).transpose(1, 2)
        places = resized_positions(self.positions[:, 1:], self.grid)
        x = torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        x = x + torch.cat([self.positions[:, :1], places], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1:])


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _task_layer(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out)).apply(_start)


class TokenFlow(VisualTokenizer):
    """Pixels -> maps of codes, coarse to fine -> pixels, and features of a teacher.

    Shapes: pixels (B, 3, S, S) in [0, 1]; tokens `Scales(scales)`, ids (B, N), N the sum of s^2, or (B, N, 2) with separate
    indices; every prefix of whole scales decodes. `codes` and `embeddings` are the sum over scales, (B, s * s, code_dim), s the last
    scale: what the paper's language models read.
    """

    type_name: ClassVar[str] = "tokenflow"
    config_class: ClassVar[type] = TokenFlowConfig
    reports: ClassVar[tuple[str, ...]] = (COSINE,)

    def __init__(self, config: TokenFlowConfig) -> None:
        c, grid = config, config.scales[-1]
        encoder = build_encoder(c.semantic_encoder) if c.semantic_dim else None
        super().__init__(dataclasses.replace(c, semantic_encoder=encoder.spec() if encoder else {}))
        self.semantic_encoder: ImageEncoder | None = encoder
        if encoder is not None:
            places, width = encoder.feature_shape
            if places not in (grid**2, grid**2 + 1):  # a class token is left out
                raise ConfigError(
                    f"the semantic encoder {encoder.name} gives features of {places} places, and the last scale has {grid} x {grid}; "
                    "set scales, or an encoder of another patch or size"
                )
            _train_what_features_need(encoder.train(), c.image_size)
            self.encode_task = _task_layer(width, c.semantic_dim)
        sizes = (c.channel_mult, c.num_res_blocks, c.z_channels, c.dropout, c.patch)
        if c.pixel_dim:
            self.encoder = Encoder(c.channels, *sizes)
            self.pre_quant = nn.Conv2d(c.z_channels, c.pixel_dim, 1)

        streams = {"semantic_dim": c.semantic_dim} if c.quantizer.get("type") == "dual-vq" else {}
        self.quantizer = MultiScale(build_quantizer({**streams, **c.quantizer}, c.code_dim), c.scales, c.scale_dropout)

        self.post_quant = nn.Conv2d(c.pixel_dim or c.code_dim, c.z_channels, 1)
        sizes = (c.channel_mult, c.decoder_res_blocks or c.num_res_blocks, c.z_channels, c.dropout, c.patch)
        self.decoder = Decoder(c.decoder_channels or c.channels, *sizes)
        transformer = (c.decoder_dim, c.decoder_heads, c.decoder_depth, c.position_grid or grid)
        self.semantic_decoder = SemanticDecoder(c.semantic_dim or c.code_dim, grid, *transformer)
        self.decode_task = _task_layer(c.decoder_dim, c.target_dim)

    @property
    def factor(self) -> int:
        return 1  # `image_size` is fixed

    @property
    def image_size(self) -> tuple[int, int]:
        return (self.config.image_size, self.config.image_size)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self.quantizer.codebook_sizes

    # -- the parts ----------------------------------------------------------------------------------------------------

    def encode_features(self, pixels: Tensor) -> Tensor:
        """Both maps before quantization, semantic channels first, (B, s, s, code_dim), of pixels (B, 3, S, S) in [0, 1]."""
        c, grid, parts = self.config, self.config.scales[-1], []
        if self.semantic_encoder is not None:
            features = self.semantic_encoder.features(pixels)[:, -(grid**2) :]  # (B, s * s, width)
            parts.append(self.encode_task(features).unflatten(1, (grid, grid)))
        if c.pixel_dim:
            x = _resized(pixels * 2 - 1, c.pixel_size or c.image_size)
            parts.append(self.pre_quant(self.encoder(x)).permute(0, 2, 3, 1))
        return torch.cat([part.float() for part in parts], -1)

    def decode_pixels(self, codes: Tensor) -> Tensor:
        """Pixels (B, 3, S, S), not clamped, of codes (B, s, s, code_dim)."""
        # without a pixel stream a probe, from which nothing flows back into the codes
        part = codes[..., self.config.semantic_dim :] if self.config.pixel_dim else codes.detach()
        z = self.post_quant(part.permute(0, 3, 1, 2).to(self.post_quant.weight.dtype))
        return (_resized(self.decoder(z), self.config.image_size) + 1) / 2

    def decode_semantics(self, codes: Tensor) -> Tensor:
        """The teacher's features (B, s * s, target_dim) as codes (B, s, s, code_dim) know them."""
        part = codes[..., : self.config.semantic_dim] if self.config.semantic_dim else codes.detach()
        part = part.permute(0, 3, 1, 2).to(self.semantic_decoder.enter.weight.dtype)
        return self.decode_task(self.semantic_decoder(part))

    def _as_tokens(self, quantized: ScaledCodes) -> Tokens:
        return Tokens(quantized.ids, self.quantizer.layout, self.codebook_sizes, quantized.mask, tokenizer=self.stamp())

    def _looked_up(self, tokens: Tokens) -> Tensor:
        self._check_layout(tokens)
        return self.quantizer.lookup(tokens.ids.to(self.device))  # (B, s, s, code_dim)

    def _check_layout(self, tokens: Tokens) -> None:
        if tokens.layout != self.quantizer.layout:
            raise ConfigError(f"this TokenFlow decodes tokens of {self.quantizer.layout}; got {tokens.layout}")

    # -- as a language model reads it ---------------------------------------------------------------------------------

    @property
    def code_dim(self) -> int:
        return self.config.code_dim

    def embeddings(self, tokens: Tokens) -> Tensor:
        return self._looked_up(tokens).flatten(1, 2).float()

    def codebook_table(self) -> Tensor:
        if len(self.codebook_sizes) > 1:
            return super().codebook_table()
        with torch.no_grad():
            return self.quantizer.quantizer.lookup(torch.arange(self.codebook_sizes[0], device=self.device)).float()

    @torch.no_grad()
    def decode_features(self, tokens: Tokens) -> Tensor:
        """What the codes know of the teacher's features, (B, s * s, target_dim); of a prefix of whole scales too."""
        return self.decode_semantics(self._looked_up(tokens))

    @torch.no_grad()
    def progressive(self, tokens: Tokens) -> Tensor:
        """Pictures (S, B, 3, H, W) in [0, 1] after the first scale, the first two, …, of the S scales that the tokens hold."""
        self._check_layout(tokens)
        maps = self.quantizer.progressive(tokens.ids.to(self.device))
        return torch.stack([self.finish(self.decode_pixels(codes)) for codes in maps])

    # -- the contract -------------------------------------------------------------------------------------------------

    def tokenize(self, pixels: Tensor) -> Tokens:
        return self._as_tokens(self.quantizer(self.encode_features(pixels)))

    def detokenize(self, tokens: Tokens) -> Tensor:
        return self.decode_pixels(self._looked_up(tokens))

    def forward(self, pixels: Tensor, target: Tensor | None = None) -> TokenizerOutput:
        """Reconstruct pixels (B, 3, S, S) in [0, 1] with gradients; see `TokenizerOutput`.

        Args:
            target: the teacher's features of the pixels (B, s * s, target_dim), a class token before them allowed. In training it
                gives losses["semantic"]; in eval mode stats["semantic_cosine"] is (B,), the mean cosine over places.

        Raises:
            ConfigError: a target of another shape.
        """
        quantized = self.quantizer(self.encode_features(pixels))
        reconstruction = self.decode_pixels(quantized.codes)
        losses, stats = dict(quantized.losses), dict(quantized.stats)
        if target is not None:
            cosine = self._cosine(self.decode_semantics(quantized.codes), target)  # (B,)
            if self.training:  # |a - b|^2 = 2 (1 - cos) of unit vectors
                scale = {"cosine": 1.0, "l2": 2.0}[self.config.semantic_loss]
                losses["semantic"] = self.config.semantic_weight * scale * (1 - cosine.mean())
            stats[COSINE] = cosine.detach().mean() if self.training else cosine
        if not self.training:
            reconstruction = self.finish(reconstruction)
        codes = quantized.codes.flatten(1, 2)  # (B, s * s, code_dim)
        return TokenizerOutput(reconstruction, self._as_tokens(quantized), losses, stats, codes)

    def _cosine(self, features: Tensor, target: Tensor) -> Tensor:
        """Mean cosine over places, (B,)."""
        target = target[:, -features.shape[1] :] if target.ndim == 3 else target
        if target.shape != features.shape:
            raise ConfigError(
                f"the teacher gives features {tuple(target.shape)} for a batch, and this TokenFlow {tuple(features.shape)}; set "
                "config.target_dim and the last of config.scales to the teacher's, or take another teacher"
            )
        return F.cosine_similarity(features.float(), target.float(), dim=-1).mean(1)

    # -- examples -----------------------------------------------------------------------------------------------------

    @classmethod
    def example_configs(cls) -> dict[str, TokenFlowConfig]:
        tower = {
            "image_size": 32,
            "patch": 8,
            "dim": 32,
            "n_heads": 2,
            "hidden": 48,
            "image_layers": 1,
            "text_layers": 1,
        }
        vit = {"image_size": 32, "patch": 8, "dim": 32, "heads": 2, "hidden": 64, "depth": 2, "position_grid": 3}
        small: dict[str, Any] = {
            "image_size": 32,
            "semantic_encoder": {"type": "contrastive", "config": {**tower, "embed_dim": 16, "text_vocab": 8}},
            "semantic_dim": 12,
            "pixel_dim": 6,
            "scales": (1, 2, 4),
            "quantizer": {"type": "dual-vq", "codebook_size": 64},
            "channels": 32,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "z_channels": 32,
            "patch": 4,
            "target_dim": 24,
            "decoder_dim": 32,
            "decoder_heads": 2,
            "decoder_depth": 2,
        }
        separate = {"quantizer": {"type": "dual-vq", "codebook_size": 64, "index": "separate"}}
        interpolated = {
            "semantic_encoder": {"type": "clip", "config": vit},
            "position_grid": 3,
            "decoder_res_blocks": 2,
        }
        resampled = {"image_size": 28, "pixel_size": 32, "semantic_encoder": {"type": "clip", "config": {
            **vit, "image_size": 28, "patch": 7, "class_token": False, "activation": "gelu_tanh", "embed_dim": 20,
        }}}  # fmt: skip
        return {
            "shared": cls.config_class(**small),
            "separate": cls.config_class(**{**small, **separate}),
            "pixel": cls.config_class(**{**small, "semantic_dim": 0}),
            "semantic": cls.config_class(**{**small, "pixel_dim": 0}),
            "interpolated": cls.config_class(**{**small, **interpolated}),
            "resampled": cls.config_class(**{**small, **resampled}),
        }


def _resized(pixels: Tensor, side: int) -> Tensor:
    """Pictures of that side, bicubic without antialiasing, as published; as they are if they have it."""
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False)


class _Features(nn.Module):
    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder.features(pixels)


def _train_what_features_need(encoder: ImageEncoder, side: int) -> None:
    """Let the parameters train that features depend on. A text tower or a pooling head would never see a gradient.

    Found out by a pass over tensors without numbers.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = _Features(encoder)
    named = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    with FakeTensorMode(), torch.device("cpu"), torch.enable_grad():
        fake = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in named.items()}
        parameters = [fake[name].requires_grad_() for name, _ in module.named_parameters()]
        out = torch.func.functional_call(module, fake, torch.empty(1, 3, side, side))
        gradients = torch.autograd.grad(out.sum(), parameters, allow_unused=True)
    for p, gradient in zip(encoder.parameters(), gradients):
        p.requires_grad_(gradient is not None)
