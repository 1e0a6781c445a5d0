"""What semantic tokenizers share: they quantize the features of a frozen vision encoder, and are trained in stages.

Codes decode to features first; to pixels by a small decoder of the tokenizer's own (`tokgen.nn.pixel_decoder`), or by a
diffusion pipeline that the features condition.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokgen.encoders.base import ImageEncoder, build_encoder
from tokgen.errors import ConfigError
from tokgen.nn.pixel_decoder import PixelDecoder, PixelDecoderConfig
from tokgen.pretrained import config_from_dict
from tokgen.text import SETTINGS, TextTokenizer
from tokgen.tokenizers.base import TokenizerOutput, VisualTokenizer
from tokgen.tokens import Tokens

PIXELS = "pixels"  # the stage that trains the pixel decoder, with all else frozen


@dataclass
class StageOutput:
    """What one step of a stage gives.

    Attributes:
        losses: weighted terms, to be added.
        stats: detached scalars for the log.
        tokens: codes of the batch, where the stage has any.
        reconstruction: pixels (B, 3, H, W), in the stage "pixels".
        pair: embeddings of pictures and of their captions, (B, D) each, in a contrastive stage.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tokens | None = None
    reconstruction: Tensor | None = None
    pair: tuple[Tensor, Tensor] | None = None


class SemanticTokenizer(VisualTokenizer):
    """Base of the semantic tokenizers. Pixels have one size, `config.image_size`.

    The configuration has `image_size`, `encoder` (see `build_encoder`) and `pixel_decoder` (fields of
    `PixelDecoderConfig`, or None for none). The encoder's weights are part of the tokenizer, frozen, so that a published
    folder encodes by itself; `encoder={"pretrained": ...}` is replaced by what it stands for.

    Subclasses call `add_pixel_decoder` at the end of their constructor, and implement

        tokenize_features   features (B, N, C) -> Tokens
        decode_features     Tokens -> what the pixel decoder or a diffusion pipeline reads: (B, M, D)
        stage_modules, stage_step, stage_needs

    Attributes:
        stages: names of the stages of training, in their order.
        text: captions to ids, for tokenizers with a text side.
    """

    stages: ClassVar[tuple[str, ...]] = (PIXELS,)

    def __init__(self, config: Any, text: TextTokenizer | None = None) -> None:
        encoder = build_encoder(config.encoder)
        super().__init__(dataclasses.replace(config, encoder=encoder.spec()))
        self.encoder: ImageEncoder = encoder
        self.text = text
        self.pixel_decoder: PixelDecoder | None = None

    def add_pixel_decoder(self, dim: int, length: int) -> None:
        """Build `pixel_decoder` for features (B, up to `length`, dim), if the configuration asks for one."""
        if self.config.pixel_decoder is not None:
            config = config_from_dict(PixelDecoderConfig, self.config.pixel_decoder, "pixel_decoder")
            self.pixel_decoder = PixelDecoder(config, self.config.image_size, dim, length)

    def train(self, mode: bool = True) -> SemanticTokenizer:
        super().train(mode)
        self.encoder.eval()
        return self

    @property
    def image_size(self) -> tuple[int, int]:
        return (self.config.image_size, self.config.image_size)

    # -- what a system implements -------------------------------------------------------------------------------------

    def tokenize_features(self, features: Tensor, **options: Any) -> Tokens:
        """Tokens of the encoder's features (B, N, C)."""
        raise NotImplementedError

    def decode_features(self, tokens: Tokens) -> Tensor:
        """What decodes to pixels, (B, M, D), of tokens."""
        raise NotImplementedError

    def stage_modules(self, stage: str) -> list[nn.Module | nn.Parameter]:
        """What the stage trains; all else is frozen."""
        if stage == PIXELS:
            return [self._pixel_decoder()]
        raise ConfigError(f"{self.type_name} has no stage {stage!r}; expected one of {', '.join(self.stages)}")

    def stage_needs(self, stage: str) -> tuple[str, ...]:
        """Names that the stage reads from the batch besides pixels and features: "caption", or the outputs of teachers."""
        return ()

    def stage_step(self, stage: str, batch: dict[str, Any]) -> StageOutput:
        """Losses of a stage, with gradients for what it trains.

        Args:
            batch: "pixels", float (B, 3, H, W) in [0, 1]; "features" (B, N, C) where the data holds them; what
                `stage_needs` names.
        """
        if stage == PIXELS:
            with torch.no_grad(), in_eval_mode(*self.children()):
                tokens = self.tokenize_features(self.vision_features(batch))
                features = self.decode_features(tokens)
            return StageOutput(tokens=tokens, reconstruction=self._pixel_decoder()(features))
        raise ConfigError(f"{self.type_name} has no stage {stage!r}; expected one of {', '.join(self.stages)}")

    # -- the parts ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def vision_features(self, batch: dict[str, Any]) -> Tensor:
        """The encoder's features (B, N, C): those of the batch, or else of its pixels."""
        features = batch.get("features")
        return self.encoder.features(batch["pixels"]) if features is None else features.float()

    def _pixel_decoder(self) -> PixelDecoder:
        if self.pixel_decoder is None:
            raise ConfigError(
                f"this {self.type_name} has no pixel decoder; give config.pixel_decoder and train the stage {PIXELS!r}, or "
                f"draw with a diffusion pipeline (see {type(self).__name__})"
            )
        return self.pixel_decoder

    # -- the contract -------------------------------------------------------------------------------------------------

    def tokenize(self, pixels: Tensor, **options: Any) -> Tokens:
        return self.tokenize_features(self.encoder.features(pixels), **options)

    def detokenize(self, tokens: Tokens) -> Tensor:
        return self._pixel_decoder()(self.decode_features(tokens))

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Tokens and reconstruction; training goes through `stage_step`."""
        tokens = self.tokenize(pixels)
        reconstruction = self.detokenize(tokens)
        return TokenizerOutput(reconstruction if self.training else self.finish(reconstruction), tokens)

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Any) -> Path:
        if self.text is not None:
            self.text.save(folder)
        return super().save_pretrained(folder)

    @classmethod
    def build(cls, config: Any, folder: Path, data: dict[str, Any], **kwargs: Any) -> SemanticTokenizer:
        if (folder / SETTINGS).is_file():
            kwargs.setdefault("text", TextTokenizer.load(folder))
        return cls(config, **kwargs)


def parameters_of(modules: Iterable[nn.Module | nn.Parameter]) -> list[nn.Parameter]:
    """The parameters of modules, and parameters themselves."""
    return [p for m in modules for p in ([m] if isinstance(m, nn.Parameter) else m.parameters())]


@contextlib.contextmanager
def in_eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Within the block, no dropout and no moving averages in what a stage builds on but does not train."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
