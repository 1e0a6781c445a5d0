"""Sampling: guidance, filters and the decoding loop, as plain functions on tensors.

`prefill` runs the prompt, `decode_one` one step, `generate` loops. Conditional and unconditional rows go through the
model as one batch. Randomness is drawn per image from its own CPU generator and turned into ids by the Gumbel-max trick,
so that an image depends on its own seed only, on any device; ids flip under rounding only where two of them are level to
about 1e-6, where an inverted cumulative distribution would flip for a few per cent of the draws.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokgen.errors import ConfigError, InputError, MissingDependency
from tokgen.nn.attention import KVCache, prefix_attention

if TYPE_CHECKING:
    from tokgen.generators.llama import LlamaGenerator

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
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


@dataclass(frozen=True)
class SamplingReport:
    """What a run of `generate` did.

    Attributes:
        settings: as used.
        seeds: one per image; passing it back as `generator=[seed]` draws the image again.
        images, ids: how many were drawn; ids counts every codebook.
        steps: transformer calls per image.
        prefill_seconds, decode_seconds: wall-clock; the first includes the first step's draw, the second any compilation.
        compiled: whether the decoding step was compiled.
    """

    settings: SamplingSettings
    seeds: tuple[int, ...]
    images: int
    ids: int
    steps: int
    prefill_seconds: float
    decode_seconds: float
    compiled: bool

    @property
    def ids_per_second(self) -> float:
        return self.ids / max(self.prefill_seconds + self.decode_seconds, 1e-9)


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


def choose(logits: Tensor, noise: Tensor | None, weight: Tensor | None, settings: SamplingSettings) -> Tensor:
    """Ids of one step.

    Args:
        logits: float32 (rows, slots, K); with guidance the first half of the rows is conditional, the second not.
        noise: Gumbel, (images, slots, K); None at temperature 0.
        weight: the step's guidance weight, a scalar tensor; None without guidance.

    Returns:
        int64 (images, slots).
    """
    if weight is not None:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + weight * (conditional - unconditional)
    if noise is None:
        return logits.argmax(-1)
    logits = filter_logits(logits / settings.temperature, settings.top_k, settings.top_p, settings.min_p)
    return (logits + noise).argmax(-1)


def draw_step(
    model: LlamaGenerator,
    head: tuple[Tensor, Tensor | None],
    hidden: Tensor,
    codebook: int,
    noise: Tensor | None,
    weight: Tensor | None,
    settings: SamplingSettings,
) -> Tensor:
    """The ids of one step from the state before it: all at once, or slot by slot with an autoregressive window head.

    Args:
        hidden: (rows, 1, dim), the last block's output.
        noise, weight, settings: as `choose`; noise is (images, slots, K).

    Returns:
        int64 (images, slots) of the given codebook.
    """
    slots = model.to_slots(hidden)  # (rows, 1, slots, channels)
    if model.window_head is None:
        return choose(model.code_logits(slots, codebook, head)[:, 0], noise, weight, settings)
    ids: list[Tensor] = []
    before = torch.empty(len(hidden), 1, 0, dtype=torch.int64, device=hidden.device)
    for k in range(model.slots):
        # a window has few slots: running the narrow head over all of them again is cheaper than a cache of its own
        states = model.within_window(slots[:, :, : k + 1], before)[:, :, -1:]
        logits = model.code_logits(states, codebook, head)[:, 0]
        ids.append(choose(logits, None if noise is None else noise[:, k : k + 1], weight, settings))  # (images, 1)
        drawn = ids[-1] if weight is None else ids[-1].repeat(2, 1)
        before = torch.cat([before, model.shared_ids(drawn[:, None], codebook)], -1)  # (rows, 1, k + 1)
    return torch.cat(ids, -1)


# -- the loop -------------------------------------------------------------------------------------------------------------


def prefill(
    model: LlamaGenerator,
    x: Tensor,
    mask: Tensor,
    rope: tuple[Tensor, Tensor],
    cache: KVCache,
) -> Tensor:
    """Run the prompt, fill the cache's first P slots, and give the state (rows, 1, dim) that step 1 is drawn from.

    Args:
        x, mask: the prefix (rows, P, dim) and which of it is real (rows, P).
        rope: of the whole sequence.
    """
    p = x.shape[1]
    rope = rope[0][:, :p], rope[1][:, :p]
    at = torch.arange(p, device=x.device)
    return model.blocks(x, rope, prefix_attention(mask, p), cache, at, p, keep=p - 1)


def decode_one(
    model: LlamaGenerator,
    head: tuple[Tensor, Tensor | None],
    ids: Tensor,
    codebook: int,
    at: Tensor,
    end: int | None,
    keys: Tensor | None,
    rope: tuple[Tensor, Tensor],
    cache: KVCache,
    noise: Tensor | None,
    weight: Tensor | None,
    settings: SamplingSettings,
) -> Tensor:
    """One step: the ids of the step before in, the next step's ids out. This is the function that is compiled.

    Args:
        ids: int64 (images, slots), of the given codebook.
        at: int64 (1,), the cache slot of this step.
        end: number of slots to attend to; None attends to all slots under a mask, so that shapes stay the same.
        keys: bool (rows, cache length), which slots will hold real tokens; None if all will.

    Returns:
        int64 (images, slots), of the next codebook.
    """
    x = model.embed(ids[:, None], codebook)  # (images, 1, dim)
    if weight is not None:
        x = torch.cat([x, x])  # (rows, 1, dim)
    if end is None:
        past = torch.arange(cache.length, device=x.device) <= at
        mask = (past[None] if keys is None else past & keys)[:, None, None]  # (rows, 1, 1, cache length)
    else:
        mask = None if keys is None else keys[:, None, None, :end]
    rope = rope[0].index_select(1, at), rope[1].index_select(1, at)
    hidden = model.blocks(x, rope, mask, cache, at, end)
    following = (codebook + 1) % len(model.codebook_sizes)
    return draw_step(model, head, hidden, following, noise, weight, settings)


@functools.cache
def compiled_decode_one(device: str) -> Callable[..., Tensor]:
    """`decode_one` compiled as one graph; CUDA graphs take away the launches. Raises MissingDependency."""
    if device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise MissingDependency(
            "compile=True needs a C++ compiler on the CPU and none was found; install g++, set CXX, or leave compile off"
        )
    mode = "reduce-overhead" if device == "cuda" else None
    return torch.compile(decode_one, fullgraph=True, dynamic=False, mode=mode)


@torch.no_grad()
def generate(
    model: LlamaGenerator,
    prompt: Tensor,
    prompt_mask: Tensor,
    settings: SamplingSettings,
    seeds: Sequence[int],
    *,
    compile: bool = False,
    progress: bool = False,
) -> tuple[Tensor, SamplingReport]:
    """Draw one image's ids for each row of the prompt; always exactly the layout's length.

    Args:
        prompt, prompt_mask: the condition's tensors, B rows.
        seeds: B of them.

    Returns:
        ids int64 (B, N, C) in the layout's order, and what was done.
    """
    training = model.training
    model.eval()  # no dropout; as it was afterwards
    try:
        return _generate(model, prompt, prompt_mask, settings, seeds, compile, progress)
    finally:
        model.train(training)


def _generate(
    model: LlamaGenerator,
    prompt: Tensor,
    prompt_mask: Tensor,
    settings: SamplingSettings,
    seeds: Sequence[int],
    compile: bool,
    progress: bool,
) -> tuple[Tensor, SamplingReport]:
    from tokgen.generators.token_shuffle import from_windows

    device, codebooks, images = model.device, len(model.codebook_sizes), len(prompt)
    start = time.perf_counter()
    prompt, prompt_mask = prompt.to(device), prompt_mask.to(device)
    guided = settings.guidance_scale != 1
    if guided:  # conditional rows, then unconditional ones
        pairs = zip((prompt, prompt_mask), model.condition.null(prompt, prompt_mask))
        prompt, prompt_mask = (torch.cat(pair) for pair in pairs)
    weights = guidance_weights(settings, model.steps).to(device) if guided else [None] * model.steps
    noise = Noise(seeds, device) if settings.temperature > 0 else None
    draw = lambda k: None if noise is None else noise.draw(model.slots, model.codebook_sizes[k % codebooks])  # noqa: E731

    x, mask = model.prefix(prompt, prompt_mask)
    p = x.shape[1]
    rope, head = model.rope(mask), model.head()
    length = p + model.steps - 1
    cache = model.new_cache(len(x), length)
    keys = torch.nn.functional.pad(mask, (0, length - p), value=True)
    keys = keys if compile or not bool(mask.all()) else None
    step = compiled_decode_one(device.type) if compile else decode_one

    out = torch.empty(images, model.steps, model.slots, dtype=torch.int64, device=device)
    out[:, 0] = draw_step(model, head, prefill(model, x, mask, rope, cache), 0, draw(0), weights[0], settings)
    _synchronise(device)
    prefilled = time.perf_counter()
    for k in _track(range(1, model.steps), progress):
        at = torch.tensor([p + k - 1], device=device)
        end = None if compile else p + k
        out[:, k] = step(
            model, head, out[:, k - 1], (k - 1) % codebooks, at, end, keys, rope, cache, draw(k), weights[k], settings
        )
    _synchronise(device)
    report = SamplingReport(
        settings=settings,
        seeds=tuple(seeds),
        images=images,
        ids=out.numel(),
        steps=model.steps,
        prefill_seconds=prefilled - start,
        decode_seconds=time.perf_counter() - prefilled,
        compiled=compile,
    )
    return from_windows(out, model.order, codebooks), report


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _track(steps: range, progress: bool) -> Any:
    if not progress:
        return steps
    from rich.progress import track

    return track(steps, description="drawing")
