"""A small image-text model of one's own: a ViT and a text transformer that meet in one space.

The method is CLIP's (Radford et al. 2021, arXiv 2103.00020, section 2): both towers are projected to a common width, and
the cosine between a picture and its caption, times a learned factor, is the logit of their belonging together. The blocks
are the decoder's own (RMSNorm, SwiGLU, rotary positions), seeing both ways; a tower's output is the mean over its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokgen.encoders.base import ImageEncoder, as_float, config_spec, resized
from tokgen.errors import ConfigError
from tokgen.nn.attention import Attention, DecoderBlock, RMSNorm, SwiGLU, rope_table
from tokgen.pretrained import Pretrained
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


class ContrastiveEncoder(ImageEncoder, Pretrained):
    """See the module.

    Args:
        text: captions to ids; needed by `encode_text` only.
    """

    type_name = "contrastive"
    config_class = ContrastiveConfig

    def __init__(self, config: ContrastiveConfig, text: TextTokenizer | None = None) -> None:
        config.check()
        Pretrained.__init__(self, config)
        c = config
        self.text, self.dim, self.name = text, c.embed_dim, "contrastive encoder"
        self.feature_shape = ((c.image_size // c.patch) ** 2, c.dim)
        self.patches = nn.Linear(3 * c.patch**2, c.dim)
        self.image_layers = self._tower(c.image_layers)
        self.image_norm, self.image_projection = RMSNorm(c.dim), nn.Linear(c.dim, c.embed_dim, bias=False)
        self.text_embeddings = nn.Embedding(c.text_vocab, c.dim)
        self.text_layers = self._tower(c.text_layers)
        self.text_norm, self.text_projection = RMSNorm(c.dim), nn.Linear(c.dim, c.embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                depth = c.image_layers if name.startswith("image") else c.text_layers
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

    spec = config_spec

    # -- pictures -----------------------------------------------------------------------------------------------------

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
    def build(cls, config: Any, folder: Path, data: dict[str, Any], **kwargs: Any) -> ContrastiveEncoder:
        kwargs.setdefault("text", TextTokenizer.load(folder) if (folder / SETTINGS).is_file() else None)
        encoder = cls(config, **kwargs)
        encoder.name = f"contrastive encoder {folder.name}"
        return encoder
