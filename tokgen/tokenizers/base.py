"""The visual tokenizer's contract: pixels to `Tokens` and back."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokgen.errors import ConfigError, InputError, TokenizerMismatch
from tokgen.pretrained import Pretrained, Registry
from tokgen.tokens import Tokens

TOKENIZERS: Registry[VisualTokenizer] = Registry(
    "tokenizer",
    {
        "emu3": "tokgen.tokenizers.emu3:Emu3",
        "lavit": "tokgen.tokenizers.lavit:LAVIT",
        "seed": "tokgen.tokenizers.seed:SEED",
        "tokenflow": "tokgen.tokenizers.tokenflow:TokenFlow",
        "trajectory": "tokgen.tokenizers.trajectory:TrajectoryTokenizer",
        "vqgan": "tokgen.tokenizers.vqgan:VQGAN",
        "video-lavit-motion": "tokgen.tokenizers.video_lavit_motion:MotionTokenizer",
    },
)


@dataclass
class TokenizerOutput:
    """What a tokenizer's forward gives.

    Attributes:
        reconstruction: float, of the shape of the pixels. In eval mode in [0, 1] and equal to `decode(encode(x))` bit for bit; in
            training not clamped, so that the loss sees what lies outside.
        tokens: the ids behind it.
        losses: weighted terms of the quantizer (and of the system itself).
        stats: detached scalars for the log ("usage", "perplexity", ...).
        codes: the quantized vectors (B, M, code_dim) with their gradients; in eval mode `embeddings(tokens)`. None for a
            tokenizer that gives none.
    """

    reconstruction: Tensor
    tokens: Tokens
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    codes: Tensor | None = None


class VisualTokenizer(Pretrained):
    """Base of all tokenizers.

    Pixels are float (B, 3, H, W) or (B, T, 3, H, W) in [0, 1], uint8 tensors of those shapes, one PIL image or a list of
    PIL images of one size. Each system owns its normalisation.

    Subclasses implement `tokenize`, `detokenize` and `forward`, and give `example_configs` for the conformance suite.
    """

    ndims: ClassVar[tuple[int, ...]] = (4,)  # that a batch of pixels may have: 4 for images, 5 for clips
    modality: ClassVar[str] = "pixels"  # the entry of a batch of data that is encoded
    extras: ClassVar[tuple[str, ...]] = ()  # further entries of a batch that `encode` and `forward` take by these names
    reports: ClassVar[tuple[str, ...]] = ()  # stats that are (B,) in eval mode, which a validation averages

    # -- what a system implements -------------------------------------------------------------------------------------

    def tokenize(self, pixels: Tensor, **options: Any) -> Tokens:
        """Tokens of float pixels in [0, 1]; called by `encode` in no-grad mode with the options it was given."""
        raise NotImplementedError

    def detokenize(self, tokens: Tokens) -> Tensor:
        """Pixels of tokens, not yet clamped; called by `decode` in no-grad mode."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Encode, quantize and decode with gradients; the training step's forward."""
        raise NotImplementedError

    @property
    def factor(self) -> int:
        """Height and width of the pixels must be multiples of this."""
        return 1

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that the pixels must have; None where every multiple of `factor` will do."""
        return None

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        raise NotImplementedError

    # -- as a language model reads it ---------------------------------------------------------------------------------

    @property
    def code_dim(self) -> int:
        """Width of `embeddings`. Raises ConfigError for a tokenizer that gives none."""
        raise ConfigError(f"{self.type_name} gives no code vectors; a language model reads its ids")

    def embeddings(self, tokens: Tokens) -> Tensor:
        """Quantized vectors of tokens, float32 (B, M, code_dim): what a language model reads through a projector.

        M is the number of places, in raster order; with several scales of one map it is not the number of ids.
        """
        raise ConfigError(f"{self.type_name} gives no code vectors; a language model reads its ids")

    def codebook_table(self) -> Tensor:
        """The vector of every code, float32 (K, code_dim), as `embeddings` uses it; of a tokenizer with one codebook."""
        raise ConfigError(f"{self.type_name} has no table of code vectors")

    def example_pixels(self, batch: int = 3, wide: bool = False, seed: int = 0, ndim: int | None = None) -> Tensor:
        """Smooth random pictures (B, 3, H, W) or clips (B, T, 3, H, W) in [0, 1] that `encode` takes, each of its own kind.

        Args:
            wide: not square, where the size is free.
            ndim: one of `ndims`; None takes the first.
        """
        clips = (ndim or self.ndims[0]) == 5
        f = self.factor
        h, w = self.image_size or (4 * f, 6 * f if wide else 4 * f)
        frames = 8 if clips else 1
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch * frames, 3, 6, 6, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear") * torch.rand(
            batch * frames, 1, 1, 1, generator=generator
        )
        return pixels.unflatten(0, (batch, frames)) if clips else pixels

    @classmethod
    def example_configs(cls) -> dict[str, Any]:
        """Small configurations, by name, that the conformance suite builds and checks."""
        raise NotImplementedError

    # -- what users call ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pixels: Any, **options: Any) -> Tokens:
        """Tokens of pixels (see the class). Deterministic, and independent of the rest of the batch, in eval mode.

        Args:
            options: what the system's `tokenize` takes besides pixels.

        Raises:
            InputError: wrong shape, dtype, range, or a size that does not fit `factor` or `image_size`.
        """
        return self.tokenize(self.as_pixels(pixels), **options)

    @torch.no_grad()
    def decode(self, tokens: Tokens, check: bool = True) -> Tensor:
        """Pixels, float (B, 3, H, W) or (B, T, 3, H, W) in [0, 1], of tokens this tokenizer made.

        Args:
            check: refuse tokens of another tokenizer (by fingerprint) and ids out of range.

        Raises:
            TokenizerMismatch: the tokens carry another fingerprint. InputError: ids out of range.
        """
        if check:
            self.check_tokens(tokens)
        return self.finish(self.detokenize(tokens.to(self.device)))

    def check_tokens(self, tokens: Tokens) -> None:
        """Raises TokenizerMismatch if the tokens are another tokenizer's, InputError if ids are out of range."""
        if tokens.codebook_sizes != self.codebook_sizes:
            raise TokenizerMismatch(
                f"tokens with codebooks {tokens.codebook_sizes} cannot be decoded by a tokenizer with {self.codebook_sizes}"
            )
        if tokens.tokenizer and tokens.tokenizer != self.fingerprint:
            raise TokenizerMismatch(
                f"tokens were made by tokenizer {tokens.tokenizer}, this one is {self.fingerprint}; decode with the "
                "one that made them, or pass check=False if you know they agree"
            )
        tokens.validate()

    def finish(self, pixels: Tensor) -> Tensor:
        """What `decode` gives of what `detokenize` gave: float, clamped to [0, 1]."""
        return pixels.float().clamp(0, 1)

    def pictures(self, pixels: Tensor) -> Tensor:
        """What logs show of a batch of pixels: float (B, 3, H, W) in [0, 1]; of a clip, its middle frame."""
        return pixels[:, pixels.shape[1] // 2] if pixels.ndim == 5 else pixels

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def as_pixels(self, pixels: Any) -> Tensor:
        """Whatever `encode` accepts as float (B, 3, H, W) or (B, T, 3, H, W) in [0, 1] on this module's device."""
        pixels = _to_tensor(pixels)
        if pixels.ndim == self.ndims[0] - 1:
            raise InputError(
                f"pixels have shape {tuple(pixels.shape)}; a batch is expected: add a dimension with x[None]"
            )
        if pixels.ndim not in self.ndims or pixels.shape[-3] != 3:
            shape = " or ".join("(B, 3, H, W)" if n == 4 else "(B, T, 3, H, W)" for n in self.ndims)
            raise InputError(
                f"pixels have shape {tuple(pixels.shape)}; expected {shape}, channels before height and width"
            )
        h, w = pixels.shape[-2:]
        if self.image_size not in (None, (h, w)):
            size = " x ".join(map(str, self.image_size))
            raise InputError(f"pixels of {h} x {w} do not fit this tokenizer, which takes {size}; resize them first")
        if h % self.factor or w % self.factor or not h or not w:
            raise InputError(
                f"pixels of {h} x {w} do not fit this tokenizer: both must be multiples of {self.factor}, "
                f"for example {max(h // self.factor, 1) * self.factor} x {max(w // self.factor, 1) * self.factor}"
            )
        if pixels.dtype == torch.uint8:
            return pixels.to(self.device).float() / 255
        if not pixels.is_floating_point():
            raise InputError(f"pixels are {pixels.dtype}; expected uint8 in 0..255 or float in [0, 1]")
        pixels = pixels.to(self.device).float()
        if pixels.numel() and (float(pixels.min()) < -1e-3 or float(pixels.max()) > 1 + 1e-3):
            raise InputError(
                f"float pixels reach {float(pixels.min()):.3g}..{float(pixels.max()):.3g}; expected [0, 1] "
                "(for [-1, 1] pass (x + 1) / 2, for 0..255 pass uint8)"
            )
        return pixels

    def stamp(self) -> str:
        """The fingerprint that `tokenize` writes into tokens: empty in training, where weights change every step."""
        return "" if self.training else self.fingerprint


def _to_tensor(pixels: Any) -> Tensor:
    if isinstance(pixels, Tensor):
        return pixels
    from PIL import Image

    images = [pixels] if isinstance(pixels, Image.Image) else pixels
    if not isinstance(images, SequenceABC) or not images or not all(isinstance(i, Image.Image) for i in images):
        raise InputError(f"pixels are {type(pixels).__name__}; expected a tensor, a PIL image or a list of PIL images")
    if len({i.size for i in images}) > 1:
        raise InputError(
            f"PIL images of different sizes {sorted({i.size for i in images})[:4]}; resize them to one size first"
        )
    from torchvision.transforms.functional import pil_to_tensor

    return torch.stack([pil_to_tensor(i.convert("RGB")) for i in images])
