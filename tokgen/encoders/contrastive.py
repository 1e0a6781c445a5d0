"""A small image-text model of one's own: a ViT and a text transformer that meet in one space; and the same for clips.

The method is CLIP's (Radford et al. 2021, arXiv 2103.00020, section 2): both towers are projected to a common width, and
the cosine between a picture and its caption, times a learned factor, is the logit of their belonging together. The blocks
are the decoder's own (RMSNorm, SwiGLU, rotary positions), seeing both ways; a tower's output is the mean over its tokens.
In a `VideoContrastiveEncoder` an encoder of clips (`tokgen.encoders.trajvit`, `tokgen.encoders.video_vit`) takes the ViT's place, as
in TrajViT (Zheng et al. 2025, arXiv 2505.23617).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokgen.encoders.base import (
    VIDEO_ENCODERS,
    EncodedClip,
    ImageEncoder,
    VideoEncoder,
    as_float,
    config_spec,
    resized,
)
from tokgen.errors import ConfigError
from tokgen.nn.attention import Attention, DecoderBlock, RMSNorm, SwiGLU, rope_table
from tokgen.pretrained import Pretrained, config_from_dict
from tokgen.text import SETTINGS, TextTokenizer

MAX_SCALE = 100.0  # CLIP's bound on the factor of the logits


@dataclass(frozen=True)
class ContrastiveConfig:
    """Sizes of a `ContrastiveEncoder`.

    Args:
        image_size, patch: side of the pictures and of the squares they are cut into, in pixels.
        dim, n_heads, hidden: width, heads and feed-forward of both towers.
        image_layers, text_layers: blocks.
        embed_dim: width of the common space.
        text_vocab, max_text: ids and their number per caption, the begin id included.
    """

    image_size: int = 224
    patch: int = 16
    dim: int = 512
    n_heads: int = 8
    hidden: int = 1536
    image_layers: int = 12
    text_layers: int = 6
    embed_dim: int = 512
    text_vocab: int = 32_000
    max_text: int = 64

    def check(self) -> None:
        """Raise ConfigError, naming the value, if sizes do not fit together."""
        if self.image_size % self.patch:
            raise ConfigError(f"image_size={self.image_size} is not a multiple of patch={self.patch}")
        if self.dim % self.n_heads or self.dim // self.n_heads % 4:
            raise ConfigError(f"dim={self.dim} over n_heads={self.n_heads} must give a multiple of 4")


class TextTower(Pretrained):
    """The half of a contrastive encoder that reads captions; what sees pictures or clips is the subclasses'.

    Args:
        config: fields `dim`, `n_heads`, `hidden`, `text_layers`, `embed_dim`, `text_vocab`, `max_text` of `ContrastiveConfig`.
        text: captions to ids; needed by `encode_text` only.
    """

    kind: ClassVar[str]  # how it is called in its name

    def __init__(self, config: Any, text: TextTokenizer | None = None) -> None:
        Pretrained.__init__(self, config)
        self.text, self.dim, self.name = text, config.embed_dim, self.kind

    def _add_text_tower(self) -> None:
        c = self.config
        self.text_embeddings = nn.Embedding(c.text_vocab, c.dim)
        self.text_layers = self._tower(c.text_layers)
        self.text_norm, self.text_projection = RMSNorm(c.dim), nn.Linear(c.dim, c.embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def _initialise(self, depths: dict[str, int]) -> None:
        """Draw the weights of the submodules whose names begin so, in towers of so many layers."""
        for name, module in self.named_modules():
            depth = next((d for prefix, d in depths.items() if name.startswith(prefix)), None)
            if isinstance(module, (nn.Linear, nn.Embedding)) and depth is not None:
                joins = name.endswith((".wo", ".w2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if joins else 0.02)

    def _tower(self, layers: int) -> nn.ModuleList:
        c = self.config
        return nn.ModuleList(
            DecoderBlock(Attention(c.dim, c.n_heads, qk_norm=True), SwiGLU(c.dim, c.hidden), c.dim)
            for _ in range(layers)
        )

    @property
    def scale(self) -> Tensor:
        """The factor of the logits."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    # -- captions -----------------------------------------------------------------------------------------------------

    def embed_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, embed_dim) of text ids int64 (B, T) and which of them are real."""
        c = self.config
        x = self.text_embeddings(ids)
        rope = rope_table(torch.arange(ids.shape[1], device=ids.device)[None, :, None], c.dim // c.n_heads)
        for layer in self.text_layers:
            x = layer(x, rope, mask[:, None, None])
        x = self.text_norm(x) * mask[..., None]
        return self.text_projection(x.sum(1) / mask.sum(1, keepdim=True))

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """(B, embed_dim), not normalised. Raises ConfigError without a text vocabulary."""
        if self.text is None:
            raise ConfigError("this encoder has no text vocabulary; pass text=TextTokenizer… when building it")
        ids, mask = self.text.encode(captions, self.config.max_text)
        device = self.log_scale.device
        return self.embed_ids(ids.to(device), mask.to(device))

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Any) -> Path:
        if self.text is not None:
            self.text.save(folder)
        return super().save_pretrained(folder)

    @classmethod
    def build(cls, config: Any, folder: Path, data: dict[str, Any], **kwargs: Any) -> TextTower:
        kwargs.setdefault("text", TextTokenizer.load(folder) if (folder / SETTINGS).is_file() else None)
        encoder = cls(config, **kwargs)
        encoder.name = f"{cls.kind} {folder.name}"
        return encoder


class ContrastiveEncoder(ImageEncoder, TextTower):
    """See the module.

    Args:
        text: captions to ids; needed by `encode_text` only.
    """

    type_name = "contrastive"
    kind = "contrastive encoder"
    config_class = ContrastiveConfig

    def __init__(self, config: ContrastiveConfig, text: TextTokenizer | None = None) -> None:
        config.check()
        TextTower.__init__(self, config, text)
        c = config
        self.feature_shape = ((c.image_size // c.patch) ** 2, c.dim)
        self.patches = nn.Linear(3 * c.patch**2, c.dim)
        self.image_layers = self._tower(c.image_layers)
        self.image_norm, self.image_projection = RMSNorm(c.dim), nn.Linear(c.dim, c.embed_dim, bias=False)
        self._add_text_tower()
        self._initialise({"image": c.image_layers, "patches": c.text_layers, "text": c.text_layers})

    spec = config_spec

    def features(self, pixels: Tensor) -> Tensor:
        """(B, N, dim), N = (image_size / patch)^2."""
        c = self.config
        x = resized(as_float(pixels), c.image_size) * 2 - 1
        x = nn.functional.unfold(x, c.patch, stride=c.patch).transpose(1, 2)  # (B, N, 3 patch^2)
        x = self.patches(x)
        side = c.image_size // c.patch
        places = torch.arange(side * side, device=x.device)
        rope = rope_table(torch.stack([places // side, places % side], -1)[None], c.dim // c.n_heads)
        everywhere = torch.ones(1, 1, 1, side * side, dtype=torch.bool, device=x.device)
        for layer in self.image_layers:
            x = layer(x, rope, everywhere)
        return self.image_norm(x)

    def embed(self, pixels: Tensor) -> Tensor:
        return self.image_projection(self.features(pixels).mean(1))


# -- clips ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoContrastiveConfig:
    """Sizes of a `VideoContrastiveEncoder`. The defaults are TrajViT's, with a text transformer of BERT-base's size.

    Args:
        tower: what sees clips: {"type": a name in `tokgen.encoders.base.VIDEO_ENCODERS`, "config": its configuration}.
        dim, n_heads, hidden, text_layers: width, heads, feed-forward and blocks of the text tower.
        embed_dim: width of the common space.
        text_vocab, max_text: ids and their number per caption, the begin id included.
        min_temperature, max_temperature: bounds of what cosines are divided by, which begins at 0.07.
    """

    tower: dict[str, Any] = field(default_factory=lambda: {"type": "trajvit"})
    dim: int = 768
    n_heads: int = 12
    hidden: int = 2048
    text_layers: int = 12
    embed_dim: int = 256
    text_vocab: int = 30_522
    max_text: int = 77
    min_temperature: float = 0.001
    max_temperature: float = 0.5

    def check(self) -> None:
        """Raise ConfigError, naming the value, if values do not fit together."""
        if self.dim % self.n_heads or self.dim // self.n_heads % 2:
            raise ConfigError(f"dim={self.dim} over n_heads={self.n_heads} must give a multiple of 2")
        if not 0 < self.min_temperature <= 0.07 <= self.max_temperature:
            raise ConfigError(
                f"min_temperature={self.min_temperature} and max_temperature={self.max_temperature} must have 0.07 between them"
            )
        unknown = self.tower.keys() - {"type", "config"}
        if unknown or self.tower.get("type") not in VIDEO_ENCODERS or self.tower["type"] == "video-contrastive":
            towers = [name for name in VIDEO_ENCODERS.names() if name != "video-contrastive"]
            raise ConfigError(f"tower={self.tower}; expected type: one of {', '.join(towers)}, and config: its sizes")


class VideoContrastiveEncoder(VideoEncoder, TextTower):
    """An encoder of clips, projected to a space that it shares with captions.

    `embed(pixels, *extras)` gives unit vectors (B, embed_dim) of clips (B, T, 3, H, W); `extras` are those of the tower, which
    for TrajViT are "trajectories". `features` are the tower's tokens. `encode_text` gives captions' vectors.

    Args:
        text: captions to ids; needed by `encode_text` only.

    Raises:
        ConfigError: values that do not fit together, or an unknown tower.
    """

    type_name = "video-contrastive"
    kind = "video contrastive encoder"
    config_class = VideoContrastiveConfig

    def __init__(self, config: VideoContrastiveConfig, text: TextTokenizer | None = None) -> None:
        config.check()
        kind = config.tower["type"]
        cls = VIDEO_ENCODERS[kind]
        sizes = config_from_dict(cls.config_class, config.tower.get("config") or {}, f"tower {kind!r}")
        # what is left out of a tower's configuration is written down: it must not depend on later defaults
        TextTower.__init__(self, replace(config, tower={"type": kind, "config": asdict(sizes)}), text)
        self.tower = cls(sizes)
        self.extras = self.tower.extras
        self.projection = nn.Linear(self.tower.dim, config.embed_dim, bias=False)
        self._add_text_tower()
        self._initialise({"projection": config.text_layers, "text": config.text_layers})

    @property
    def scale(self) -> Tensor:
        c = self.config
        return self.log_scale.exp().clamp(1 / c.max_temperature, 1 / c.min_temperature)

    def forward(self, pixels: Tensor, *extras: Tensor, **named: Tensor) -> EncodedClip:
        encoded = self.tower(pixels, *extras, **named)
        return replace(encoded, pooled=self.projection(encoded.pooled))
