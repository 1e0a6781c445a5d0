"""LaVIT's tokenizer (Jin et al. 2024, arXiv 2309.04669, section 3.1): as many tokens as the picture needs.

A frozen encoder sees the picture; a selector keeps some of its places; a merger lets the kept ones read the dropped ones;
what it says of them is quantized, in raster order; a decoder reconstructs the features of all places from the codes. Where
the kept places were is not transmitted: the decoder sees the order of the tokens only.

`LavitConfig()` has the published sizes; published weights load through `tokgen.importers.lavit`. No training code was
published: what is said here of training follows the paper and its authors' answers, and settings without a public source
are marked so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.encoders.eva import EvaConfig
from tokgen.errors import ConfigError, InputError, MissingDependency
from tokgen.nn.feature_decoder import FeatureDecoder
from tokgen.nn.token_merger import MERGERS, TokenMerger, TokenSelector, draw_places, select_places
from tokgen.nn.vit import join_heads, split_heads
from tokgen.quantizers.base import build_quantizer
from tokgen.tokenizers.semantic import PIXELS, SemanticTokenizer, StageOutput
from tokgen.tokens import Sequence as SequenceLayout
from tokgen.tokens import Tokens

CONDITIONS = ("lowres", "highres")


def _eva() -> dict[str, Any]:
    return {"type": "eva", "config": dataclasses.asdict(EvaConfig.lavit())}


def _ema_codebook() -> dict[str, Any]:
    # size, moving averages and the k-means start are the authors'; decay and beta those of BEiT v2, and not confirmed
    return {
        "type": "vq",
        "codebook_size": 16384,
        "metric": "sphere",
        "update": "ema",
        "kmeans_init": True,
        "decay": 0.99,
        "beta": 1.0,
    }


@dataclass(frozen=True)
class LavitConfig:
    """Sizes of a LaVIT tokenizer. The defaults are the published ones.

    Attributes:
        image_size: side of the pictures in pixels.
        encoder: see `tokgen.encoders.base.build_encoder`; its features (B, N, C) have no class token, and N is a square.
        merger_heads, merger_hidden, merger_depth: of the merger; its width is that of the features.
        merger_impl: "masked" or "gathered", see `tokgen.nn.token_merger.TokenMerger`.
        code_dim: channels of a code.
        quantizer: a type of `tokgen.quantizers` and its options.
        decoder_dim, decoder_heads, decoder_hidden, decoder_depth: of the decoder from codes to features.
        keep_ratio, ratio_weight: share of places that training aims at, 1/3 in the paper, and weight of the term that pulls
            it there (DynamicViT's 2; LaVIT's own is not public).
        fixed_keep: keep exactly so many places of every picture, in training too (those with the best noisy scores); there
            is no ratio term then.
        threshold: of the probability of being kept, outside training; None: as many places as a draw keeps on average.
        understanding_dim: width of a language model that reads continuous features: a second merger, and a projection to
            this width (4096 in the publication); None: none.
        condition: projections that condition a latent diffusion model on the reconstructed features: "lowres" (Stable
            Diffusion 1), "highres" (Stable Diffusion XL), None.
        condition_dims: widths of the two text encoders that they stand for; "lowres" uses the first, "highres" both.
        pixel_decoder: fields of `PixelDecoderConfig`, or None.
    """

    image_size: int = 224
    encoder: dict[str, Any] = field(default_factory=_eva)
    merger_heads: int = 16
    merger_hidden: int = 6144
    merger_depth: int = 12
    merger_impl: str = "masked"
    code_dim: int = 32
    quantizer: dict[str, Any] = field(default_factory=_ema_codebook)
    decoder_dim: int = 1408
    decoder_heads: int = 16
    decoder_hidden: int = 6144
    decoder_depth: int = 12
    keep_ratio: float = 1 / 3
    ratio_weight: float = 2.0
    fixed_keep: int | None = None
    threshold: float | None = None
    understanding_dim: int | None = None
    condition: str | None = None
    condition_dims: tuple[int, int] = (768, 1280)
    pixel_decoder: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "condition_dims", tuple(self.condition_dims))
        if self.merger_impl not in MERGERS:
            raise ConfigError(f"LavitConfig.merger_impl is {self.merger_impl!r}; expected {' or '.join(MERGERS)}")
        if self.condition not in (None, *CONDITIONS):
            raise ConfigError(f"LavitConfig.condition is {self.condition!r}; expected {', '.join(CONDITIONS)} or None")
        if not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"LavitConfig.keep_ratio is {self.keep_ratio}; expected above 0 and at most 1")
        if self.fixed_keep is not None and self.threshold is not None:
            raise ConfigError("LavitConfig: fixed_keep and threshold are two rules for what is kept; give one")
        if self.decoder_dim % self.decoder_heads:
            raise ConfigError(
                f"LavitConfig.decoder_dim {self.decoder_dim} is not a multiple of decoder_heads {self.decoder_heads}"
            )


class LAVIT(SemanticTokenizer):
    """Pixels -> features -> up to N tokens in raster order -> features -> pixels.

    Shapes: pixels (B, 3, S, S) in [0, 1]; features (B, N, C); tokens `Sequence(N)`, ids (B, n), n the batch's greatest
    count; reconstructed features (B, N, C).

    `encode(pixels)` keeps of each picture as many places as the selector would keep on average; `encode(pixels, keep=0.25)`
    a quarter of the places, `keep=16` sixteen, `threshold=0.3` all that are kept with a probability above 0.3,
    `sample=generator` a draw, as the published code does at inference (which makes ids random, and dependent on the batch);
    see `tokgen.nn.token_merger.select_places`.

    Two stages come before pixels, as the authors train (issues 3, 10 and 29 of their repository): "features" trains
    selector, merger and decoder without quantization; the bottleneck's vector goes on l2-normalised, because codes lie on
    the unit sphere: the decoder meets the inputs that it knows when the codebook comes in, and the codebook starts by
    k-means among them. "codebook" quantizes, and trains on everything; freeze `selector` for the authors' other answer.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    type_name: ClassVar[str] = "lavit"
    config_class: ClassVar[type] = LavitConfig
    stages: ClassVar[tuple[str, ...]] = ("features", "codebook", PIXELS)

    def __init__(self, config: LavitConfig) -> None:
        super().__init__(config)
        places, dim = self.encoder.feature_shape
        self.side = round(places**0.5)
        if self.side**2 != places:
            raise ConfigError(
                f"the encoder gives {places} features, which is no square of places; LaVIT takes one without class token, "
                "such as eva with keep_class_token false"
            )
        if dim % config.merger_heads:
            raise ConfigError(
                f"LavitConfig.merger_heads {config.merger_heads} does not divide the features' width {dim}"
            )
        if config.fixed_keep is not None and not 1 <= config.fixed_keep <= places:
            raise ConfigError(f"LavitConfig.fixed_keep is {config.fixed_keep}; expected 1 to {places} places")

        def merger() -> TokenMerger:
            return TokenMerger(dim, config.merger_heads, config.merger_hidden, config.merger_depth, config.merger_impl)

        self.selector = TokenSelector(dim)
        self.merger = merger()
        self.bottleneck = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.code_dim))
        self.quantizer = build_quantizer(config.quantizer, config.code_dim)
        self.decoder = FeatureDecoder(
            config.code_dim, places, places, dim, config.decoder_dim, config.decoder_heads, config.decoder_hidden,
            config.decoder_depth,
        )  # fmt: skip
        self.conditioner: Conditioner | None = None
        if config.condition is not None:
            self.conditioner = Conditioner(config, places, dim)
        self.understanding: nn.ModuleDict | None = None
        if config.understanding_dim is not None:
            projection = nn.Linear(dim, config.understanding_dim)
            self.understanding = nn.ModuleDict({"merger": merger(), "projection": projection})
        self.add_pixel_decoder(dim, places)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(self.quantizer.codebook_sizes)

    # -- features to codes --------------------------------------------------------------------------------------------

    def select(self, features: Tensor, **options: Any) -> Tensor:
        """Which places are kept, bool (B, N); options as in `tokgen.nn.token_merger.select_places`."""
        if all(value is None for value in options.values()):
            options = {"keep": self.config.fixed_keep, "threshold": self.config.threshold}
        return select_places(self.selector(features), **options)

    def compress(self, features: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is said of the kept places, before quantization.

        Args:
            features: (B, N, C).
            keep: bool (B, N), or float with gradients; at least one place of each picture.

        Returns:
            unit vectors (B, n, code_dim), bool (B, n) of the real ones, and their places int64 (B, n).
        """
        merged, real, places = self.merger.kept(features, keep)  # (B, n, C)
        return F.normalize(self.bottleneck(merged).float(), dim=-1), real, places

    def tokenize_features(
        self,
        features: Tensor,
        keep: float | int | None = None,
        threshold: float | None = None,
        sample: torch.Generator | None = None,
    ) -> Tokens:
        """Tokens of features (B, N, C); see `tokgen.nn.token_merger.select_places` for the options.

        Selection is the deterministic one and the codebook stays as it is, in training mode too: training draws and
        learns in `stage_step`.
        """
        kept = self.select(features, keep=keep, threshold=threshold, sample=sample)
        vectors, real, _ = self.compress(features, kept)
        with _evaluating(self.quantizer):
            ids = self.quantizer(vectors, real).ids
        return self.as_tokens(ids, real)

    def as_tokens(self, ids: Tensor, real: Tensor) -> Tokens:
        """`Tokens` of ids (B, n) or (B, n, codebooks)."""
        return Tokens(ids, SequenceLayout(self.side**2), self.codebook_sizes, real, self.stamp())

    # -- codes to features --------------------------------------------------------------------------------------------

    def decode_features(self, tokens: Tokens) -> Tensor:
        """Features (B, N, C) of tokens. Raises InputError if a picture has none, or more than there are places."""
        if tokens.ids.shape[1] > self.side**2:
            raise InputError(f"{tokens.ids.shape[1]} tokens a picture; this lavit has {self.side**2} places")
        if not tokens.mask.any(1).all():
            raise InputError(f"picture {int(tokens.mask.any(1).int().argmin())} has no token; LaVIT needs at least one")
        return self.decoder(self.quantizer.lookup(tokens.ids), tokens.mask)

    @torch.no_grad()
    def condition(self, tokens: Tokens) -> dict[str, Tensor]:
        """What a diffusion pipeline is conditioned on, by the names of its arguments; see `draw`.

        Returns:
            "prompt_embeds" (B, N, condition_dims[0]) with "lowres"; with "highres" (B, N, sum of condition_dims), and
            "pooled_prompt_embeds" (B, condition_dims[1]).
        """
        if self.conditioner is None:
            raise ConfigError("this lavit conditions no diffusion model; give config.condition, 'lowres' or 'highres'")
        self.check_tokens(tokens)
        return self.conditioner(self.decode_features(tokens.to(self.device)))

    # -- training -----------------------------------------------------------------------------------------------------

    def stage_modules(self, stage: str) -> list[nn.Module | nn.Parameter]:
        if stage in ("features", "codebook"):
            parts = [self.selector, self.merger, self.bottleneck, self.decoder]
            return [*parts, self.quantizer] if stage == "codebook" else parts
        return super().stage_modules(stage)

    def stage_step(self, stage: str, batch: dict[str, Any]) -> StageOutput:
        """Equation 4: the mean of 1 - cos(x, reconstruction) over all places, and ratio_weight * (keep_ratio - share kept in
        the batch)^2; in the stage "codebook" the quantizer's terms too. Selection is drawn in training and deterministic in
        validation. "kept" is the mean number of tokens of a picture, "kept_std" its deviation over the batch."""
        if stage not in ("features", "codebook"):
            return super().stage_step(stage, batch)
        features = self.vision_features(batch)
        if self.training:
            keep = draw_places(self.selector(features), self.config.fixed_keep)  # (B, N), with gradients
            # One place more or less moves its picture's share of the loss by at most about 1 / B. The published softmax can
            # give a thousand times that, where a masked key has the largest logit; such steps would ruin the selector.
            bound = 1 / len(features)
            if keep.requires_grad:  # the stage may freeze the selector
                keep.register_hook(lambda gradient: gradient.clamp(-bound, bound))
        else:
            keep = self.select(features)
        codes, real, places = self.compress(features, keep)
        losses, stats, tokens = {}, {}, None
        if stage == "codebook":
            quantized = self.quantizer(codes, real)
            codes, losses, stats = quantized.codes, dict(quantized.losses), dict(quantized.stats)
            tokens = self.as_tokens(quantized.ids, real)
        reconstruction = self.decoder(codes, real, keep.gather(1, places) if self.training else None)

        share = keep.float().mean()
        losses["cosine"] = 1 - F.cosine_similarity(features, reconstruction.float(), dim=-1).mean()
        if self.config.fixed_keep is None:
            losses["ratio"] = self.config.ratio_weight * (self.config.keep_ratio - share).square()
        counts = real.sum(1).float()
        stats |= {"kept": counts.mean(), "kept_std": counts.std(correction=0)}
        return StageOutput(losses, stats, tokens)

    # -- what a language model reads, and what a user sees --------------------------------------------------------------

    @torch.no_grad()
    def features_for_llm(self, pixels: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Continuous features of the kept places, for a language model that understands pictures (section 3.2).

        They come from a merger of their own, which was trained together with the language model: that of the codes gives
        other ones.

        Returns:
            features (B, n, understanding_dim), and bool (B, n) of the real ones.
        """
        if self.understanding is None:
            raise ConfigError(
                "this lavit has no merger for understanding; give config.understanding_dim and its weights"
            )
        features = self.encoder.features(self.as_pixels(pixels))
        merged, real, _ = self.understanding["merger"].kept(features, self.select(features, **options))
        return self.understanding["projection"](merged), real

    @torch.no_grad()
    def keep_map(self, pixels: Any, **options: Any) -> Tensor:
        """Which places of pictures are kept, bool (B, h, w), by the options of `encode`."""
        features = self.encoder.features(self.as_pixels(pixels))
        return self.select(features, **options).unflatten(1, (self.side, self.side))

    @torch.no_grad()
    def draw(
        self,
        tokens: Tokens,
        pipeline: Any,
        guidance_scale: float = 5.0,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        unconditional: Tensor | None = None,
        generator: int | Sequence[int] = 0,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] that a diffusion model draws of tokens.

        Each picture's noise comes from a seed of its own and does not depend on the rest of the batch.

        Args:
            pipeline: of diffusers, or a folder for `diffusion_pipeline`: a `StableDiffusionPipeline` (config.condition
                "lowres") or `StableDiffusionXLPipeline` ("highres").
            guidance_scale, num_inference_steps: the published defaults.
            height, width: in pixels; None: the pipeline's own.
            unconditional: with "lowres", what guidance leads away from: (1, n, condition_dims[0]), n <= N, such as the
                published uncond_embeddings.bin; the UNet does not see the remaining places. None, and always with
                "highres": zeros.
            generator: seeds, one per picture; an int s means s, s + 1, …

        Raises:
            TokenizerMismatch, InputError: as `decode`; seeds of another number, or an `unconditional` that does not fit.
            ConfigError: no projections, or a pipeline of another kind or width. MissingDependency: no diffusers.
        """
        condition = self.condition(tokens)
        if isinstance(pipeline, (str, os.PathLike)):
            pipeline = diffusion_pipeline(pipeline, self.config.condition)
        _check_pipeline(pipeline, self.config.condition, condition["prompt_embeds"].shape[-1])
        seeds = [generator + i for i in range(len(tokens))] if isinstance(generator, int) else list(generator)
        if len(seeds) != len(tokens):
            raise InputError(f"{len(seeds)} seeds for {len(tokens)} pictures; give one per picture, or one int for all")
        condition = {k: v.to(pipeline.device, pipeline.unet.dtype) for k, v in condition.items()}
        negative = {f"negative_{name}": torch.zeros_like(value) for name, value in condition.items()}
        hidden = contextlib.nullcontext()
        if unconditional is not None:
            prompt = negative["negative_prompt_embeds"]
            most, wide = prompt.shape[1:]
            if self.config.condition != "lowres":
                raise InputError(
                    "unconditional is for condition 'lowres'; with 'highres' guidance leads away from zeros"
                )
            if unconditional.ndim != 3 or unconditional.shape[-1] != wide or unconditional.shape[1] > most:
                raise InputError(f"unconditional is {tuple(unconditional.shape)}; expected (1, up to {most}, {wide})")
            n = unconditional.shape[1]
            prompt[:, :n] = unconditional.to(prompt)
            if guidance_scale > 1:
                hidden = _hidden_padding(pipeline, len(tokens), n, most)
        with hidden:
            images = pipeline(
                **condition,
                **negative,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],  # CPU: the same noise on all devices
                height=height,
                width=width,
                output_type="pt",
            ).images
        return images.float().clamp(0, 1)

    @classmethod
    def example_configs(cls) -> dict[str, LavitConfig]:
        eva = {"image_size": 32, "patch": 4, "dim": 64, "heads": 4, "hidden": 96, "depth": 2, "keep_class_token": False}
        own = {"image_size": 32, "patch": 8, "dim": 64, "n_heads": 4, "hidden": 96, "image_layers": 2, "text_layers": 1}
        own |= {"embed_dim": 32, "text_vocab": 32, "max_text": 8}
        small: dict[str, Any] = {
            "image_size": 32,
            "encoder": {"type": "eva", "config": eva},
            **{"merger_heads": 4, "merger_hidden": 96, "merger_depth": 2, "code_dim": 8},
            **{"decoder_dim": 32, "decoder_heads": 4, "decoder_hidden": 64, "decoder_depth": 2},
            "quantizer": {**_ema_codebook(), "codebook_size": 64},
            "pixel_decoder": {"dim": 32, "heads": 4, "hidden": 64, "depth": 1, "patch": 8},
        }
        contrastive = {"encoder": {"type": "contrastive", "config": own}, "quantizer": {"type": "lfq", "bits": 8}}
        # thresholds in the midst of what these untrained selectors give, so that lengths differ
        return {
            "eva": LavitConfig(**small, threshold=0.512),
            "gathered": LavitConfig(**small, threshold=0.512, merger_impl="gathered"),
            "fixed": LavitConfig(**small, fixed_keep=20),
            "contrastive": LavitConfig(**{**small, **contrastive}, threshold=0.42),
        }


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


# -- pixels by diffusion (section 3.1, equation 5) ----------------------------------------------------------------------


class Conditioner(nn.Module):
    """Reconstructed features as the text conditions of a latent diffusion model; trained together with its UNet."""

    def __init__(self, config: LavitConfig, places: int, dim: int) -> None:
        super().__init__()
        widths = config.condition_dims[: 1 if config.condition == "lowres" else 2]
        self.prompts = nn.ModuleList(nn.Linear(dim, width) for width in widths)
        self.pool = AttentionPool(places, dim, config.decoder_heads, widths[1]) if len(widths) == 2 else None

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """See `LAVIT.condition`; features (B, N, dim)."""
        condition = {"prompt_embeds": torch.cat([prompt(features) for prompt in self.prompts], -1)}
        return condition if self.pool is None else {**condition, "pooled_prompt_embeds": self.pool(features)}


class AttentionPool(nn.Module):
    """CLIP's pooling (arXiv 2103.00020, section 2.4): the mean of the features attends to itself and all of them."""

    def __init__(self, places: int, dim: int, heads: int, out: int) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"attention pooling: {heads} heads do not divide the features' width {dim}")
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(1 + places, dim) / dim**0.5)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, out)."""
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positions  # (B, 1 + N, dim)
        parts = self.query(x[:, :1]), self.key(x), self.value(x)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))[:, 0]


def diffusion_pipeline(folder: str | os.PathLike[str], condition: str) -> Any:
    """A diffusers pipeline for `LAVIT.draw`: VAE, UNet and DDIM sampling, without text encoders.

    Args:
        folder: with the folders `vae`, `unet` and `scheduler`, as LaVIT's pixel_decoding and highres_pixel_decoding and
            any published Stable Diffusion have them.
        condition: "lowres" makes a `StableDiffusionPipeline`, "highres" a `StableDiffusionXLPipeline`.
    """
    if condition not in CONDITIONS:
        raise ConfigError(f"condition is {condition!r}; expected {' or '.join(CONDITIONS)}")
    for part in ("vae", "unet", "scheduler"):
        if not os.path.isdir(os.path.join(folder, part)):
            raise ConfigError(
                f"{folder} has no folder {part!r}; expected vae, unet and scheduler as diffusers saves them"
            )
    diffusers = _diffusers()
    parts = {
        "vae": diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        "scheduler": diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
        "text_encoder": None,
        "tokenizer": None,
    }
    if condition == "highres":
        return diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts, **unchecked)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise MissingDependency(
            "drawing with a diffusion model needs diffusers; install it with pip install 'tokgen[diffusers]'"
        ) from None
    return diffusers


def _check_pipeline(pipeline: Any, condition: str | None, width: int) -> None:
    diffusers = _diffusers()
    kind = diffusers.StableDiffusionXLPipeline if condition == "highres" else diffusers.StableDiffusionPipeline
    if not isinstance(pipeline, kind):
        raise ConfigError(
            f"condition {condition!r} needs a {kind.__name__}; got a {type(pipeline).__name__} (see diffusion_pipeline)"
        )
    if pipeline.unet.config.cross_attention_dim != width:
        raise ConfigError(
            f"the pipeline's UNet reads conditions of width {pipeline.unet.config.cross_attention_dim}, and this lavit gives "
            f"{width}; give config.condition_dims that fit"
        )


@contextlib.contextmanager
def _hidden_padding(pipeline: Any, batch: int, real: int, places: int) -> Iterator[None]:
    """Within the block, the UNet does not see the unconditional rows' padding; pipelines have no argument for it."""
    mask = torch.ones(2 * batch, places, device=pipeline.device)
    mask[:batch, real:] = 0  # the unconditional half comes first

    def add_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "encoder_attention_mask": mask}

    handle = pipeline.unet.register_forward_pre_hook(add_mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# -- pictures with kept places marked -----------------------------------------------------------------------------------


def mark_kept(pixels: Tensor, keep_map: Tensor, dim: float = 0.25) -> Tensor:
    """Pictures in which the dropped places are faded towards grey, so that they show on white and on black.

    Args:
        pixels: float (B, 3, H, W) in [0, 1] or uint8.
        keep_map: bool (B, h, w), of `LAVIT.keep_map`; H and W are multiples of h and w.
        dim: how much of a dropped place remains.

    Returns:
        float (B, 3, H, W).

    Raises:
        InputError: shapes that do not fit.
    """
    h, w = keep_map.shape[-2:]
    if pixels.ndim != 4 or len(pixels) != len(keep_map) or pixels.shape[-2] % h or pixels.shape[-1] % w:
        raise InputError(
            f"pixels {tuple(pixels.shape)} and keep_map {tuple(keep_map.shape)} do not fit; expected (B, 3, H, W) and "
            "(B, h, w), H and W multiples of h and w"
        )
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    kept = keep_map.to(pixels.device)[:, None]
    kept = kept.repeat_interleave(pixels.shape[-2] // h, 2).repeat_interleave(pixels.shape[-1] // w, 3)
    return torch.where(kept, pixels, 0.5 + dim * (pixels - 0.5))
