"""Sampling: settings, randomness, guidance and filters, as plain functions on tensors. The loop is in `decoding`.

Randomness is drawn per image from its own CPU generator and turned into ids by the Gumbel-max trick, so that an image
depends on its own seed only, on any device; ids flip under rounding only where two of them are level to about 1e-6, where an
inverted cumulative distribution would flip for a few per cent of the draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokgen.errors import ConfigError, InputError

Seeds = int | Sequence[int | torch.Generator] | torch.Generator | None

SCHEDULES = ("constant", "linear", "half-linear", "cosine", "power", "interval")


@dataclass(frozen=True)
class SamplingSettings:
    """How ids are drawn. Applied in this order: guidance, temperature, top_k, top_p, min_p.

    Args:
        guidance_scale: w of l_u + w (l_c - l_u); 1 is no guidance and halves the work.
        schedule: how the weight gets from 1 to w over the image, see `guidance_weights`.
        guidance_interval: for "interval", the part of the image, in [0, 1], that is guided.
        guidance_power: for "power", the exponent.
        temperature: 0 takes the most likely id.
        top_k: keep the k most likely ids (and those level with the last); 0 keeps all.
        top_p: keep the smallest set of ids whose probability reaches this (and those level with its last); 1 keeps all.
        min_p: keep ids at least this likely relative to the most likely one; 0 keeps all.
        negative_prompt: what guidance leads away from; "" is the unconditional prompt that dropped captions trained.
        passes: (top_k, top_p) of further passes over the codes of one scale, each of which draws them all again with the codes
            of the pass before in view; only of generators that draw scale by scale (see `tokgen.generators.next_scale`).

    Raises:
        ConfigError: a value out of range.
    """

    guidance_scale: float = 1.0
    schedule: str = "constant"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_power: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    negative_prompt: str = ""
    passes: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        passes = _passes(self.passes)
        object.__setattr__(self, "passes", self.passes if passes is None else passes)
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule={self.schedule!r}; expected one of {', '.join(SCHEDULES)}")
        low_high = self.guidance_interval
        for name, fits, expected in (
            ("guidance_scale", math.isfinite(self.guidance_scale), "a finite number"),
            ("guidance_interval", len(low_high) == 2 and 0 <= low_high[0] <= low_high[1] <= 1, "0 <= low <= high <= 1"),
            ("guidance_power", self.guidance_power > 0, "a number above 0"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a number of at least 0"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "a whole number, 0 for all"),
            ("top_p", 0 < self.top_p <= 1, "0 < top_p <= 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 <= min_p <= 1"),
            ("negative_prompt", isinstance(self.negative_prompt, str), "a text"),
            ("passes", passes is not None, "pairs of top_k (a whole number, 0 for all) and 0 < top_p <= 1"),
        ):
            if not fits:
                raise ConfigError(f"{name}={getattr(self, name)}; expected {expected}")

    @classmethod
    def of(cls, values: dict[str, Any]) -> SamplingSettings:
        """Settings from names and values. Raises ConfigError for an unknown name."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown sampling setting {name!r}; expected one of {', '.join(known)}")
        return cls(**values)


def _passes(given: Any) -> tuple[tuple[int, float], ...] | None:
    """Pairs as they come from files, which have lists and may write 100.0 for 100; None for anything else."""
    if not isinstance(given, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in given):
        return None
    if not all(isinstance(v, int | float) for pair in given for v in pair):
        return None
    fits = all(k >= 0 and k == int(k) and 0 < p <= 1 for k, p in given)
    return tuple((int(k), float(p)) for k, p in given) if fits else None


# -- randomness ---------------------------------------------------------------------------------------------------------


def seeds_of(generator: Seeds, images: int) -> tuple[int, ...]:
    """One seed per image: see `Generator.sample`. Raises InputError if a list has another length."""
    if isinstance(generator, int):
        return tuple(generator + i for i in range(images))
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return tuple(torch.randint(2**62, (images,), generator=generator, device=device).tolist())
    seeds = [seeds_of(g, 1)[0] for g in generator]
    if len(seeds) != images:
        raise InputError(f"{len(seeds)} seeds for {images} images; give one seed per image, or one int for all")
    return tuple(seeds)


class Noise:
    """Standard Gumbel noise, each row from its own image's generator (uniform numbers of mt19937, the same anywhere)."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def draw(self, *shape: int) -> Tensor:
        """float32 (images, *shape)."""
        uniform = torch.stack([torch.rand(shape, generator=g) for g in self.generators])
        return -torch.log(-torch.log(uniform.to(self.device)))  # u = 0 gives -inf: that id is not drawn


# -- guidance and filters -------------------------------------------------------------------------------------------------


def guidance_weights(settings: SamplingSettings, steps: int) -> Tensor:
    """The guidance weight of each step t = 0 … T-1, float32 (T,).

    Token-Shuffle's point (section 3.3 of its paper): the first unconditional logits are the same constant for every
    image, so a full weight there injects an error that autoregression carries along; weights should rise from 1. With
    w the scale and x = t / (T - 1):

        constant     w
        linear       1 + (w - 1) x
        half-linear  1 + (w - 1) min(1, 2 t / T)
        cosine       1 + (w - 1) (1 - cos(pi x)) / 2
        power        1 + (w - 1) x^guidance_power
        interval     w where low <= t / T < high (or high = 1), else 1  (Kynkäänniemi et al. 2024)
    """
    t = torch.arange(steps, dtype=torch.float64)
    x = t / (steps - 1) if steps > 1 else torch.ones(1, dtype=torch.float64)
    low, high = settings.guidance_interval
    rise = {
        "constant": lambda: torch.ones_like(t),
        "linear": lambda: x,
        "half-linear": lambda: (2 * t / steps).clamp(max=1),
        "cosine": lambda: (1 - torch.cos(math.pi * x)) / 2,
        "power": lambda: x**settings.guidance_power,
        "interval": lambda: ((t / steps >= low) & (t / steps < high)).double(),
    }[settings.schedule]()
    return (1 + (settings.guidance_scale - 1) * rise).float()


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Logits (..., K) with the ids that top_k, then top_p, then min_p leave out at -inf.

    Each filter works on what the one before left. Ids level with the last one kept are kept, so the result does not
    depend on how a sort breaks ties.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ranked = logits.sort(-1, descending=True).values
        p = ranked.softmax(-1)
        inside = p.cumsum(-1) - p < top_p  # the first to cross the threshold is kept
        least = ranked.masked_fill(~inside, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    if min_p > 0:  # p_i / p_max = exp(l_i - l_max)
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    return logits


def choose(
    logits: Tensor,
    noise: Tensor | None,
    weight: Tensor | None,
    settings: SamplingSettings,
    last: Tensor | None = None,
) -> Tensor:
    """Ids of m steps.

    Args:
        logits: float32 (rows, m, slots, K); with guidance the first half of the rows is conditional, the second not.
        noise: Gumbel, (images, m, slots, K); None at temperature 0.
        weight: the steps' guidance weights (m,); None without guidance.
        last: bool (images, m), where the last of the K ids may be drawn; None: everywhere.

    Returns:
        int64 (images, m, slots).
    """
    if weight is not None:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + weight[:, None, None] * (conditional - unconditional)
    if last is not None:
        never = ~last[..., None, None] & (torch.arange(logits.shape[-1], device=logits.device) == logits.shape[-1] - 1)
        logits = logits.masked_fill(never, -math.inf)
    if noise is None:
        return logits.argmax(-1)
    logits = filter_logits(logits / settings.temperature, settings.top_k, settings.top_p, settings.min_p)
    return (logits + noise).argmax(-1)
