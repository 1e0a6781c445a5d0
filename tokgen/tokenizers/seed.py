"""SEED: 32 tokens in causal order that stand for what a picture shows (arXiv 2307.08041; SEED-2: arXiv 2310.01218).

A frozen vision transformer sees the picture; a causal Q-Former, taught by contrast with captions, condenses it to a short
sequence, each token of which builds on those before it, as words do; the sequence is quantized. Codes decode to the
embedding that another vision model (CLIP) would give the picture, which conditions a diffusion model that draws it.

`SeedConfig()` is SEED-2 as released, `SeedConfig.v1()` the first version, whose codes decode to the 77 text states of Stable
Diffusion's prompt. Published weights load through `tokgen.importers.seed`. Facts that no paper states are those of the
released code (github.com/AILab-CVC/SEED).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import CheckpointError, ConfigError, InputError, MissingDependency
from tokgen.losses.contrastive import contrastive_loss
from tokgen.nn.feature_decoder import FeatureDecoder
from tokgen.nn.qformer import QFormer
from tokgen.nn.vit import Block
from tokgen.quantizers.base import build_quantizer
from tokgen.text import TextTokenizer
from tokgen.tokenizers.semantic import PIXELS, SemanticTokenizer, StageOutput, in_eval_mode
from tokgen.tokens import Sequence, Tokens

CONTRASTIVE, CODEBOOK = "contrastive", "codebook"
IMAGE, TEXT = "image_embedding", "text_states"  # what codes decode to, and the teacher that a stage learns it from
MIN_TEMPERATURE = 0.01  # CLIP's bound, a factor of 100; SEED's release has none


def _seed_quantizer() -> dict[str, Any]:
    # the release's legacy order of the weights: 1 on the commitment, 0.25 on the codebook
    options = {"codebook_size": 8192, "metric": "l2", "update": "gradient", "beta": 1.0, "codebook_weight": 0.25}
    return {"type": "vq", **options}


@dataclass(frozen=True)
class SeedConfig:
    """Sizes and weights of a SEED tokenizer. The defaults are SEED-2's release: 32 of 8,192 codes for 224 px.

    Attributes:
        image_size: side of the pictures in pixels.
        encoder: the frozen vision encoder, see `tokgen.encoders.base.build_encoder`.
        queries, causal: of the Q-Former; without `causal` its queries see each other both ways (the papers' ablation).
        dim, heads, hidden, layers, cross_attention_freq, dropout: of the Q-Former; a reverse Q-Former shares them.
        code_dim, quantizer: channels that are quantized, and a type of `tokgen.quantizers` with its options.
        decoder_depth, decoder_heads: blocks of each of the two decoders of codes.
        target: what codes decode to: "image_embedding" (B, target_dim), SEED-2, or "text_states" (B, 77, target_dim), v1.
        target_dim: its width.
        detok_head: how: "mlp" (SEED-2's released weights) or "reverse_qformer" (SEED-2's training code, and v1).
        head_widths: of the MLP, for each token before they are joined.
        reverse_queries, reverse_layers: of the reverse Q-Former.
        text_vocab, max_text: ids of the text side and their number per caption, begin id included; 0: no text side, which
            suffices to encode and decode. BERT's 30,522 and [DEC] in the release.
        text_end: id that ends captions, as BERT's [SEP], 102; None: none.
        embed_dim: width of the space in which pictures and captions are compared.
        label_smoothing: of the contrastive loss.
        feature_places: learned places are added to the encoder's features, for encoders whose features do not tell where
            they are (rotary positions); EVA's do.
        grounding_weight, grounding_depth: of a term of the stage "contrastive" that the release does not have, and blocks of
            its decoder: the encoder's features are to be read off the queries, weight * (1 - cosine). The release starts from
            BLIP-2's Q-Former, whose queries differ; from nothing, contrast alone teaches the last query, and all others
            become its copies. 0: none.
        quantizer_weight, reconstruction_weight, target_weight: of the terms of the stage "codebook".
        pixel_decoder: fields of `PixelDecoderConfig`, for pixels without a diffusion model; None: none.
    """

    image_size: int = 224
    encoder: dict[str, Any] = field(default_factory=lambda: {"type": "eva", "config": {}})
    queries: int = 32
    causal: bool = True
    dim: int = 768
    heads: int = 12
    hidden: int = 3072
    layers: int = 12
    cross_attention_freq: int = 2
    dropout: float = 0.1
    code_dim: int = 32
    quantizer: dict[str, Any] = field(default_factory=_seed_quantizer)
    decoder_depth: int = 4
    decoder_heads: int = 12
    target: str = IMAGE
    target_dim: int = 1024
    detok_head: str = "mlp"
    head_widths: tuple[int, ...] = (256, 128, 32)
    reverse_queries: int = 1
    reverse_layers: int = 4
    text_vocab: int = 0
    max_text: int = 32
    text_end: int | None = None
    embed_dim: int = 256
    label_smoothing: float = 0.1
    feature_places: bool = False
    grounding_weight: float = 0.0
    grounding_depth: int = 2
    quantizer_weight: float = 5.0
    reconstruction_weight: float = 2.0
    target_weight: float = 0.5
    pixel_decoder: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_widths", tuple(self.head_widths))
        if self.target not in (IMAGE, TEXT):
            raise ConfigError(f"SeedConfig.target {self.target!r}; expected {IMAGE!r} or {TEXT!r}")
        if self.detok_head not in ("mlp", "reverse_qformer"):
            raise ConfigError(f"SeedConfig.detok_head {self.detok_head!r}; expected 'mlp' or 'reverse_qformer'")
        if self.target == TEXT and self.detok_head == "mlp":
            raise ConfigError(f"SeedConfig.target {TEXT!r} is a sequence; it needs detok_head 'reverse_qformer'")
        if self.target == IMAGE and self.detok_head == "reverse_qformer" and self.reverse_queries != 1:
            raise ConfigError(f"SeedConfig.target {IMAGE!r} is one vector; it needs reverse_queries 1")
        if self.dim % self.heads or self.dim % self.decoder_heads:
            raise ConfigError(
                f"SeedConfig.dim {self.dim} must be a multiple of heads {self.heads} and decoder_heads {self.decoder_heads}"
            )
        for name in ("queries", "code_dim", "decoder_depth", "target_dim", "max_text"):
            if getattr(self, name) < 1:
                raise ConfigError(f"SeedConfig.{name} is {getattr(self, name)}; expected at least 1")

    @classmethod
    def v1(cls, **changes: Any) -> SeedConfig:
        """The first version: codes decode to the 77 x 768 states of Stable Diffusion 1's text encoder."""
        first = {"target": TEXT, "target_dim": 768, "detok_head": "reverse_qformer", "reverse_queries": 77}
        return cls(**{**first, **changes})


class TokenDecoder(nn.Module):
    """Places, then transformer blocks that see both ways: (B, n, dim) -> (B, n, dim)."""

    def __init__(self, length: int, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.02 * torch.randn(1, length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, 4 * dim) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places
        for block in self.blocks:
            x = block(x)
        return x


class MLPHead(nn.Module):
    """Each token is narrowed, all are joined: (B, n, dim) -> (B, target_dim)."""

    def __init__(self, length: int, dim: int, widths: tuple[int, ...], target_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in zip((dim, *widths), widths):
            layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
        self.narrow = nn.Sequential(*layers[:-1])
        self.project = nn.Linear(length * (dim, *widths)[-1], target_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.narrow(x).flatten(1))


class ReverseHead(nn.Module):
    """Learned queries read the tokens, all of them: (B, n, dim) -> (B, target_dim), or (B, queries, target_dim) for several.

    Args:
        options: of the `QFormer`.
    """

    def __init__(self, queries: int, dim: int, target_dim: int, **options: Any) -> None:
        super().__init__()
        self.qformer = QFormer(queries, dim, causal=False, dim=dim, **options)
        self.project = nn.Linear(dim, target_dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.qformer(x))  # (B, queries, target_dim)
        return y[:, 0] if y.shape[1] == 1 else y


class SEED(SemanticTokenizer):
    """Pixels -> 32 codes in causal order -> an embedding of the picture -> pixels.

    Shapes: pixels (B, 3, S, S) in [0, 1]; tokens `Sequence(queries)`, ids (B, queries).

    Pixels come from `decode`, by the small decoder that the stage "pixels" trains, or from `draw`, by a diffusion model.

    Stages (section 3 of the papers, losses as in the released code):
        "contrastive": the Q-Former learns from captions; needs a text side.
        "codebook": codes, and what they decode to; the Q-Former is frozen. Needs the teacher that `config.target` names.
        "pixels": the pixel decoder.

    Args:
        text: captions to ids, for a configuration with `text_vocab`.
    """

    type_name: ClassVar[str] = "seed"
    config_class: ClassVar[type] = SeedConfig
    stages: ClassVar[tuple[str, ...]] = (CONTRASTIVE, CODEBOOK, PIXELS)

    def __init__(self, config: SeedConfig, text: TextTokenizer | None = None) -> None:
        super().__init__(config, text)
        c = self.config
        shape = {"heads": c.heads, "hidden": c.hidden, "dropout": c.dropout}
        shape["cross_attention_freq"] = c.cross_attention_freq
        places, width = self.encoder.feature_shape
        self.ln_vision = nn.LayerNorm(width, 1e-5)
        self.feature_places = nn.Parameter(0.5 * torch.randn(1, places, width)) if c.feature_places else None
        self.qformer = QFormer(c.queries, width, c.causal, c.dim, layers=c.layers, text_vocab=c.text_vocab, **shape)
        self.encode_task = nn.Sequential(nn.Linear(c.dim, c.dim), nn.Tanh(), nn.Linear(c.dim, c.code_dim))
        self.quantizer = build_quantizer(c.quantizer, c.code_dim)
        self.decode_task = nn.Sequential(nn.Linear(c.code_dim, c.code_dim), nn.Tanh(), nn.Linear(c.code_dim, c.dim))
        self.reconstruction = TokenDecoder(c.queries, c.dim, c.decoder_heads, c.decoder_depth)
        self.generation = TokenDecoder(c.queries, c.dim, c.decoder_heads, c.decoder_depth)
        if c.detok_head == "mlp":
            self.head: nn.Module = MLPHead(c.queries, c.dim, c.head_widths, c.target_dim)
        else:
            self.head = ReverseHead(c.reverse_queries, c.dim, c.target_dim, layers=c.reverse_layers, **shape)
        if c.text_vocab:
            self.vision_projection = nn.Linear(c.dim, c.embed_dim)
            self.text_projection = nn.Linear(c.dim, c.embed_dim)
            self.temperature = nn.Parameter(torch.tensor(0.07))
        self.grounding: FeatureDecoder | None = None
        if c.grounding_weight:
            sizes = (c.dim, c.heads, c.hidden, c.grounding_depth)
            self.grounding = FeatureDecoder(c.dim, c.queries, places, width, *sizes)
        self.add_pixel_decoder(c.dim, c.queries)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(self.quantizer.codebook_sizes)

    # -- pictures to codes --------------------------------------------------------------------------------------------

    def query_features(self, features: Tensor) -> Tensor:
        """The continuous sequence before quantization, (B, queries, dim), of the encoder's features (B, N, C)."""
        norm = self.ln_vision
        with torch.autocast(features.device.type, enabled=False):  # in fp32, as published
            x = F.layer_norm(features.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
            x = x if self.feature_places is None else x + self.feature_places
        return self.qformer(x.to(norm.weight.dtype))

    def tokenize_features(self, features: Tensor) -> Tokens:
        return self._as_tokens(self.quantizer(self.encode_task(self.query_features(features))).ids)

    def _as_tokens(self, ids: Tensor) -> Tokens:
        return Tokens(ids, Sequence(self.config.queries), self.codebook_sizes, tokenizer=self.stamp())

    # -- codes to features --------------------------------------------------------------------------------------------

    def _looked_up(self, tokens: Tokens) -> Tensor:
        """The codes of tokens, raised to the width of the decoders, (B, queries, dim)."""
        n = self.config.queries
        if tokens.ids.shape[1] != n or not bool(tokens.mask.all()):
            lengths = sorted(set(tokens.lengths.tolist()))
            raise InputError(f"SEED decodes {n} tokens a picture; got {', '.join(map(str, lengths))}")
        return self.decode_task(self.quantizer.lookup(tokens.ids.to(self.device)))

    def decode_features(self, tokens: Tokens) -> Tensor:
        """What pixel decoders read: (B, queries, dim). Raises InputError if there are not exactly `queries` tokens."""
        return self.generation(self._looked_up(tokens))

    @torch.no_grad()
    def generation_embedding(self, tokens: Tokens) -> Tensor:
        """What the diffusion model is conditioned on: (B, target_dim), or (B, reverse_queries, target_dim) for v1."""
        return self.head(self.decode_features(tokens))

    @torch.no_grad()
    def reconstruct_queries(self, tokens: Tokens) -> Tensor:
        """The sequence that was quantized, as the codes know it: (B, queries, dim); see `query_features`."""
        return self.reconstruction(self._looked_up(tokens))

    # -- the common space of pictures and captions --------------------------------------------------------------------

    @property
    def reads_captions(self) -> bool:
        """Whether there are a text side and its vocabulary, so that codes can be compared with captions."""
        return bool(self.config.text_vocab) and self.text is not None

    @torch.no_grad()
    def image_embedding(self, pixels: Any) -> Tensor:
        """Unit vectors (B, embed_dim) of pixels, before quantization. Raises ConfigError without a text side."""
        self._need_text_side()
        return self._image_embedding(self.query_features(self.encoder.features(self.as_pixels(pixels))))

    @torch.no_grad()
    def code_embedding(self, tokens: Tokens) -> Tensor:
        """Unit vectors (B, embed_dim) of what codes have kept of pictures. Raises ConfigError without a text side."""
        self._need_text_side()
        return self._image_embedding(self.reconstruct_queries(tokens))

    @torch.no_grad()
    def encode_text(self, captions: SequenceABC[str]) -> Tensor:
        """Unit vectors (B, embed_dim) of captions. Raises ConfigError without a text side or a vocabulary."""
        return self.text_embedding(*self.text_ids(captions))

    def text_ids(self, captions: SequenceABC[str]) -> tuple[Tensor, Tensor]:
        """ids int64 (B, T) and mask bool (B, T) of captions, T <= max_text. Raises ConfigError without a vocabulary."""
        self._need_text_side()
        if self.text is None:
            raise ConfigError("this SEED has no text vocabulary; pass text=TextTokenizer… when building it")
        end = self.config.text_end
        ids, mask = self.text.encode(captions, self.config.max_text - (end is not None))
        if end is not None:
            ids, mask = F.pad(ids, (0, 1), value=self.text.pad_id), F.pad(mask, (1, 0), value=True)
            ids = torch.where(mask & ~F.pad(mask[:, 1:], (0, 1), value=False), end, ids)  # after the last real id
        return ids.to(self.device), mask.to(self.device)

    def text_embedding(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors (B, embed_dim) of text ids (B, T): the state of the first, BERT's [CLS]."""
        return F.normalize(self.text_projection(self.qformer.read(ids, mask)[:, 0]).float(), dim=-1)

    def _image_embedding(self, sequence: Tensor) -> Tensor:
        # the last query alone: it has seen all others
        return F.normalize(self.vision_projection(sequence[:, -1]).float(), dim=-1)

    def _need_text_side(self) -> None:
        if not self.config.text_vocab:
            raise ConfigError(
                "this SEED has no text side, which comparing with captions needs; give config.text_vocab and train the stage "
                f"{CONTRASTIVE!r}"
            )

    # -- training -----------------------------------------------------------------------------------------------------

    def stage_modules(self, stage: str) -> list[nn.Module | nn.Parameter]:
        if stage == CONTRASTIVE:
            self._need_text_side()
            parts = [self.ln_vision, self.qformer, self.vision_projection, self.text_projection, self.temperature]
            return [*parts, *(part for part in (self.feature_places, self.grounding) if part is not None)]
        if stage == CODEBOOK:
            parts = [self.encode_task, self.quantizer, self.decode_task]
            return [*parts, self.reconstruction, self.generation, self.head]
        return super().stage_modules(stage)

    def stage_needs(self, stage: str) -> tuple[str, ...]:
        if stage == CONTRASTIVE:
            return ("caption",)
        if stage == CODEBOOK:
            return (IMAGE,) if self.config.target == IMAGE else ("caption", TEXT)
        return ()

    def stage_step(self, stage: str, batch: dict[str, Any]) -> StageOutput:
        if stage == CONTRASTIVE:
            return self._contrastive_step(batch)
        if stage == CODEBOOK:
            return self._codebook_step(batch)
        return super().stage_step(stage, batch)

    def _contrastive_step(self, batch: dict[str, Any]) -> StageOutput:
        """The last query and the caption's first token find each other among those of all ranks (BLIP-2's ITC)."""
        features = self.vision_features(batch)
        sequence = self.query_features(features)
        images = self._image_embedding(sequence)
        texts = self.text_embedding(*self.text_ids(batch["caption"]))
        temperature = self.temperature.clamp(min=MIN_TEMPERATURE)
        groups = torch.tensor([zlib.crc32(c.encode()) for c in batch["caption"]], device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            loss = contrastive_loss(
                images,
                texts,
                1 / temperature,
                groups,  # the release counts equal captions as negatives
                self.config.label_smoothing,
                "ranks-detached" if self.training else "local",
            )
        losses, stats = {"contrastive": loss}, {"temperature": temperature.detach()}
        if self.grounding is not None:
            cosine = F.cosine_similarity(self.grounding(sequence).float(), features.float(), dim=-1).mean()
            losses["grounding"] = self.config.grounding_weight * (1 - cosine)
            stats["cosine_features"] = cosine.detach()
        return StageOutput(losses, stats, pair=(images, texts))

    def _codebook_step(self, batch: dict[str, Any]) -> StageOutput:
        c = self.config
        with torch.no_grad(), in_eval_mode(self.qformer):
            sequence = self.query_features(self.vision_features(batch))  # (B, queries, dim)
        quantized = self.quantizer(self.encode_task(sequence))
        raised = self.decode_task(quantized.codes)
        cosine = F.cosine_similarity(self.reconstruction(raised).float(), sequence.float(), dim=-1).mean()
        drawn, target = self.head(self.generation(raised)).float(), batch[c.target].float()
        if drawn.shape != target.shape:
            raise ConfigError(
                f"the teacher {c.target!r} gives {tuple(target.shape)} for a batch, and SEED {tuple(drawn.shape)}; set "
                "config.target_dim (and reverse_queries) to the teacher's, or take another teacher"
            )
        losses = {name: c.quantizer_weight * loss for name, loss in quantized.losses.items()}
        losses["sequence"] = c.reconstruction_weight * (1 - cosine)
        losses["target"] = c.target_weight * F.mse_loss(drawn, target)
        near = F.cosine_similarity(drawn, target, dim=-1).mean()
        stats = {"cosine_reconstruction": cosine.detach(), "cosine_target": near.detach()}
        return StageOutput(losses, {**quantized.stats, **stats}, self._as_tokens(quantized.ids))

    # -- pixels by diffusion ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(
        self,
        tokens: Tokens,
        pipeline: Any,
        guidance_scale: float | None = None,
        num_inference_steps: int = 20,
        height: int | None = None,
        width: int | None = None,
        negative_image_embeds: Tensor | None = None,
        generator: int | SequenceABC[int] = 0,
        check: bool = True,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] that a diffusion model draws of tokens.

        Each picture has a seed of its own, from which come its latents and the little noise that unCLIP puts on the
        embedding even at level 0; it does not depend on the rest of the batch.

        Args:
            pipeline: of diffusers, or its Hub name or folder: a `StableUnCLIPImg2ImgPipeline` such as
                stabilityai/stable-diffusion-2-1-unclip; for v1 a `StableDiffusionPipeline`.
            guidance_scale: None: 10, the release's, with an image embedding; diffusers' 7.5 with text states.
            height, width: in pixels; None: the pipeline's own, 768 for the published one.
            negative_image_embeds: (B or 1, target_dim), `generation_embedding` of what to stay away from; None: zeros. For
                v1 text states, None: those of the empty prompt.
            generator: seeds, one per picture; an int s means s, s + 1, …
            check: refuse tokens of another tokenizer and ids out of range.

        Raises:
            TokenizerMismatch, InputError: as `decode`, or seeds of another number. ConfigError: a pipeline that the embedding
            does not fit. MissingDependency: no diffusers, and a name was given.
        """
        if check:
            self.check_tokens(tokens)
        pipeline = _pipeline(pipeline)
        seeds = [generator + i for i in range(len(tokens))] if isinstance(generator, int) else list(generator)
        if len(seeds) != len(tokens):
            raise InputError(f"{len(seeds)} seeds for {len(tokens)} pictures; give one per picture, or one int for all")
        where = {"device": pipeline.device, "dtype": pipeline.unet.dtype}
        embeds = self.generation_embedding(tokens).to(**where)
        negative = negative_image_embeds
        if negative is not None:
            if negative.shape[1:] != embeds.shape[1:] or len(negative) not in (1, len(embeds)):
                raise InputError(
                    f"negative_image_embeds are {tuple(negative.shape)}; expected {(len(embeds), *embeds.shape[1:])}"
                )
            negative = negative.to(**where).expand_as(embeds)
        options = {"num_inference_steps": num_inference_steps, "height": height, "width": width, "output_type": "pt"}
        options["generator"] = _generators(seeds)
        guidance = guidance_scale
        if self.config.target == TEXT:
            _check_pipeline(pipeline, "StableDiffusionPipeline", pipeline.unet.config.cross_attention_dim, embeds)
            guidance = 7.5 if guidance is None else guidance
            out = pipeline(prompt_embeds=embeds, negative_prompt_embeds=negative, guidance_scale=guidance, **options)
        else:
            normalizer = getattr(pipeline, "image_normalizer", None)
            wanted = None if normalizer is None else normalizer.config.embedding_dim
            _check_pipeline(pipeline, "StableUnCLIPImg2ImgPipeline", wanted, embeds)
            guidance = 10.0 if guidance is None else guidance
            with _negative(pipeline, negative, seeds):
                out = pipeline(prompt=[""] * len(embeds), image_embeds=embeds, guidance_scale=guidance, **options)
        return out.images.float().clamp(0, 1)

    # -- examples -----------------------------------------------------------------------------------------------------

    @classmethod
    def example_configs(cls) -> dict[str, SeedConfig]:
        eva = {"image_size": 28, "patch": 14, "dim": 32, "heads": 2, "hidden": 64, "depth": 2}
        small: dict[str, Any] = {
            "image_size": 28,
            "encoder": {"type": "eva", "config": eva},
            "queries": 8,
            "dim": 48,
            "heads": 4,
            "hidden": 96,
            "layers": 3,
            "code_dim": 8,
            "quantizer": {**_seed_quantizer(), "codebook_size": 64},
            "decoder_depth": 1,
            "decoder_heads": 4,
            "target_dim": 16,
            "head_widths": (24, 8),
            "reverse_layers": 2,
            "embed_dim": 16,
            "pixel_decoder": {"dim": 32, "heads": 2, "hidden": 64, "depth": 1, "patch": 14},
        }
        tower = {
            "image_size": 32,
            "patch": 8,
            "dim": 32,
            "n_heads": 2,
            "hidden": 64,
            "image_layers": 1,
            "text_layers": 1,
        }
        text = {"embed_dim": 16, "text_vocab": 280, "max_text": 8}
        contrastive = {"type": "contrastive", "config": {**tower, **text}}
        reverse = {**small, "detok_head": "reverse_qformer"}
        return {
            "mlp": SeedConfig(**small),
            "reverse": SeedConfig(**reverse),
            "v1": SeedConfig.v1(**{**reverse, "reverse_queries": 5}),
            "bidirectional": SeedConfig(**{**small, "causal": False, "queries": 32}),
            "text": SeedConfig(**{**small, "encoder": contrastive, "text_vocab": 280, "max_text": 12}),
            "grounded": SeedConfig(
                **{**small, "encoder": contrastive, **text, "feature_places": True, "grounding_weight": 1.0}
            ),
        }


# -- diffusion pipelines ----------------------------------------------------------------------------------------------


def _pipeline(source: Any) -> Any:
    """A pipeline of diffusers, of its name or folder if it is one."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise MissingDependency(
            f"drawing with {source} needs diffusers; install it with pip install 'tokgen[diffusers]'"
        ) from None
    try:
        return DiffusionPipeline.from_pretrained(os.fspath(source))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no diffusion pipeline at {str(source)!r}: {str(error).splitlines()[0]}") from None


def _check_pipeline(pipeline: Any, kind: str, width: int | None, embeds: Tensor) -> None:
    if width != embeds.shape[-1]:
        has = "takes no image embeddings" if width is None else f"takes {width} channels"
        raise ConfigError(
            f"{type(pipeline).__name__} {has}, and these tokens decode to {embeds.shape[-1]}; give a {kind} of that width"
        )


def _generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same pictures on any device


class _negative:
    """Within the block, the unguided half of what `pipeline.unet` is conditioned on is `negative` instead of zeros.

    The published code's option, which diffusers' pipeline does not have.
    """

    def __init__(self, pipeline: Any, negative: Tensor | None, seeds: list[int]) -> None:
        self.pipeline, self.negative, self.hook = pipeline, None, None
        if negative is not None:  # noised as the picture's own embedding is
            self.negative = pipeline.noise_image_embeddings(negative, noise_level=0, generator=_generators(seeds))

    def _replace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        labels = kwargs["class_labels"]
        if len(labels) != 2 * len(self.negative):
            return None  # no guidance
        return args, {
            **kwargs,
            "class_labels": torch.cat([self.negative.to(labels.dtype), labels[len(self.negative) :]]),
        }

    def __enter__(self) -> None:
        if self.negative is not None:
            self.hook = self.pipeline.unet.register_forward_pre_hook(self._replace, with_kwargs=True)

    def __exit__(self, *error: Any) -> None:
        if self.hook is not None:
            self.hook.remove()
