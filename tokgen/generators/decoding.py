"""The decoding loop: `prefill` runs the prompt, `decode_block` one call of the transformer, `generate` loops.

Conditional and unconditional rows go through the model as one batch, over a static cache. The grammar needs no masks: the
number of steps follows from the layout, and a step's logits are those of its own codebook alone. Where items end by themselves
(see `ends`), a step that may end has one id more, and the loop ends with the last item.

**Speculative decoding.** With its noise fixed, a step's ids are a function of the ids before it (Gumbel-max). So a whole
block of W steps can be guessed, run through the transformer in one call, and checked: the first step of the block is right,
and so is each further one whose inputs were guessed right. What comes out are the ids that step-by-step decoding gives with
the same seed, not merely ids of the same distribution, as with acceptance by chance (Leviathan et al. 2023, arXiv 2211.17192;
Teng et al. 2024, arXiv 2410.01699). The price: a guess counts only if it is hit exactly.

Guesses come from a smaller model that draws with the same noise, such as the generator's own int8 copy (the coupling makes two
nearly equal models draw the same id nearly always), or without one from the picture itself, and from what the block drew
before (Jacobi iteration: Santilli et al. 2023, arXiv 2305.10427).
"""

from __future__ import annotations

import os
import shutil
import time
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokgen.errors import ConfigError, MissingDependency
from tokgen.generators.ends import DRAW, DRAW_OR_END, Endings, check_drawing, open_ends
from tokgen.generators.sampling import Noise, SamplingSettings, choose, guidance_weights
from tokgen.generators.token_shuffle import from_windows, to_windows
from tokgen.nn.attention import KVCache, prefix_attention
from tokgen.tokens import Grid

if TYPE_CHECKING:
    from tokgen.generators.base import Generator
    from tokgen.generators.llama import Head, LlamaGenerator


@dataclass(frozen=True)
class SamplingReport:
    """What a run of `generate` did.

    Attributes:
        settings: as used.
        seeds: one per image; passing it back as `generator=[seed]` draws the image again.
        images, ids: how many were drawn; ids counts every codebook, and not those that were given.
        steps: decoding steps per image that were drawn.
        calls: of the transformer, the prompt's included.
        draft_calls: of the model that guesses, likewise; 0 without one.
        prefill_seconds, decode_seconds: wall-clock; the first includes the first step's draw, the second any compilation.
        compiled: whether the decoding step was compiled.
    """

    settings: SamplingSettings
    seeds: tuple[int, ...]
    images: int
    ids: int
    steps: int
    calls: int
    draft_calls: int
    prefill_seconds: float
    decode_seconds: float
    compiled: bool

    @property
    def ids_per_second(self) -> float:
        return self.ids / max(self.prefill_seconds + self.decode_seconds, 1e-9)

    @property
    def steps_per_call(self) -> float:
        """Steps accepted per call of the transformer; 1 without speculative decoding."""
        return self.steps / max(self.calls, 1)


def draw_steps(
    model: LlamaGenerator,
    head: Head,
    hidden: Tensor,
    codebook: int,
    noise: Sequence[Tensor] | None,
    weight: Tensor | None,
    fixed: Tensor | None,
    settings: SamplingSettings,
) -> Tensor:
    """The ids of m consecutive steps, each from the state before it.

    All ids of a step at once, or slot by slot with an autoregressive window head.

    Args:
        hidden: (rows, m, dim), the last block's output.
        codebook: of the first step.
        noise: each step's, (images, slots, K of its codebook); None at temperature 0.
        weight: guidance weight of each step (m,), or None.
        fixed: int64 (images, m, slots), ids that are given, and `DRAW` or `DRAW_OR_END` where one is drawn; None draws all.

    Returns:
        int64 (images, m, slots).
    """
    slots = model.to_slots(hidden)  # (rows, m, slots, channels)
    images, m, codebooks = len(hidden) // (1 if weight is None else 2), hidden.shape[1], len(model.codebook_sizes)
    out = torch.empty(images, m, model.slots, dtype=torch.int64, device=hidden.device)
    for first in range(min(codebooks, m)):  # steps of one codebook together: their logits have one width
        part, own = slice(first, m, codebooks), (codebook + first) % codebooks
        some = None if noise is None else torch.stack(list(noise[part]), 1)  # (images, steps, slots, K)
        w = None if weight is None else weight[part]
        given = None if fixed is None else fixed[:, part]
        if model.window_head is None:
            last = given[..., 0] == DRAW_OR_END if model.end is not None and own == 0 else None
            out[:, part] = _keep(choose(model.code_logits(slots[:, part], own, head), some, w, settings, last), given)
            continue
        before = torch.empty(len(hidden), slots[:, part].shape[1], 0, dtype=torch.int64, device=hidden.device)
        for k in range(model.slots):
            # a window has few slots: running the narrow head over all of them again is cheaper than a cache of its own
            states = model.within_window(slots[:, part, : k + 1], before)[:, :, -1:]
            at_slot = None if some is None else some[:, :, k : k + 1]
            ids = choose(model.code_logits(states, own, head), at_slot, w, settings)
            ids = _keep(ids, None if given is None else given[:, :, k : k + 1])  # (images, steps, 1)
            out[:, part, k : k + 1] = ids
            shared = ids + model.codebook_ranges[own][0]
            before = torch.cat([before, shared if weight is None else shared.repeat(2, 1, 1)], -1)
    return out


def _keep(ids: Tensor, given: Tensor | None) -> Tensor:
    return ids if given is None else torch.where(given < 0, ids, given)


def prefill(model: LlamaGenerator, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
    """Run the first P inputs, fill the cache's first P slots, and give the state (rows, 1, dim) of the last of them.

    Args:
        x, mask: inputs (rows, P, dim) and which of them are real (rows, P).
        rope: of the whole sequence.
    """
    p = x.shape[1]
    rope = rope[0][:, :p], rope[1][:, :p]
    return model.blocks(x, rope, prefix_attention(mask, p), cache, torch.arange(p, device=x.device), p, keep=p - 1)


def decode_block(
    model: LlamaGenerator,
    head: Head,
    ids: Tensor,
    codebook: int,
    at: Tensor,
    end: int | None,
    keys: Tensor | None,
    rope: tuple[Tensor, Tensor],
    cache: KVCache,
    noise: Sequence[Tensor] | None,
    weight: Tensor | None,
    fixed: Tensor | None,
    settings: SamplingSettings,
) -> Tensor:
    """The ids of m consecutive steps in, those of the steps after each out. This is the function that is compiled.

    Args:
        ids: int64 (images, m, slots), the first of the given codebook.
        at: int64 (m,), the cache slots of these steps.
        end: number of slots to attend to; None attends to all slots under a mask, so that shapes stay the same.
        keys: bool (rows, cache length), which slots will hold real tokens; None if all will.
        noise, weight, fixed: of the steps that come out, as `draw_steps`.

    Returns:
        int64 (images, m, slots), the first of the next codebook.
    """
    x = model.embed(ids, codebook)  # (images, m, dim)
    if weight is not None:
        x = torch.cat([x, x])  # (rows, m, dim)
    length = cache.length if end is None else end
    if ids.shape[1] == 1 and end is not None:  # one step sees everything up to itself
        mask = None if keys is None else keys[:, None, None, :end]
    else:
        mask = (torch.arange(length, device=x.device) <= at[:, None])[None, None]  # (1, 1, m, keys)
        mask = mask if keys is None else mask & keys[:, None, None, :length]
    rope = rope[0].index_select(1, at), rope[1].index_select(1, at)
    hidden = model.blocks(x, rope, mask, cache, at, end)
    return draw_steps(model, head, hidden, (codebook + 1) % len(model.codebook_sizes), noise, weight, fixed, settings)


_COMPILED: weakref.WeakKeyDictionary[LlamaGenerator, Callable[..., Tensor]] = weakref.WeakKeyDictionary()


def compiled_decode_block(model: LlamaGenerator) -> Callable[..., Tensor]:
    """`decode_block` compiled as one graph for a model; CUDA graphs take away the launches. Raises MissingDependency."""
    device = model.device.type
    if device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise MissingDependency(
            "compile=True needs a C++ compiler on the CPU and none was found; install g++, set CXX, or leave compile off"
        )
    if model not in _COMPILED:
        # torch counts and limits recompilations by code object: each model gets its own
        own = types.FunctionType(decode_block.__code__.replace(), decode_block.__globals__, decode_block.__name__)
        mode = "reduce-overhead" if device == "cuda" else None
        _COMPILED[model] = torch.compile(own, fullgraph=True, dynamic=False, mode=mode)
    return _COMPILED[model]


@torch.no_grad()
def generate(
    model: LlamaGenerator,
    prompt: Tensor,
    prompt_mask: Tensor,
    settings: SamplingSettings,
    seeds: Sequence[int],
    *,
    unconditional: tuple[Tensor, Tensor] | None = None,
    given: tuple[Tensor, Tensor] | None = None,
    speculative: int = 1,
    draft: LlamaGenerator | None = None,
    compile: bool = False,
    progress: bool = False,
) -> tuple[Tensor, SamplingReport]:
    """Draw one image's ids for each row of the prompt; always exactly the layout's length, but for items that end.

    Args:
        prompt, prompt_mask: the condition's tensors, B rows.
        seeds: B of them.
        unconditional: the other prompt of guidance, of the shapes of the first; None is the condition's own.
        given: ids (B, N, C) and which of them stay, bool (B, N, C); the others are drawn, each given those before it in
            decoding order, drawn or not. Steps that all images have from the start cost one call together.
        speculative: steps W of a block; 1 decodes step by step. A batch advances by the fewest steps that any of its images
            accepts.
        draft: model that guesses, of the same condition, layout and codebooks; None guesses without one.

    Returns:
        ids int64 (B, N, C) in the layout's order, -1 after the end of an item, and what was done.

    Raises:
        ConfigError: `speculative` below 1, a draft of other steps or codes, or what items that end do not have.
    """
    if speculative < 1:
        raise ConfigError(f"speculative={speculative}; expected a number of steps of at least 1")
    if model.end is not None:
        check_drawing(model, speculative, compile)
    if draft is not None:
        _check_draft(model, draft, speculative)
    training = model.training
    model.eval()  # no dropout; as it was afterwards
    try:
        return _generate(
            model, prompt, prompt_mask, settings, seeds, unconditional, given, speculative, draft, compile, progress
        )
    finally:
        model.train(training)


def _generate(
    model: LlamaGenerator,
    prompt: Tensor,
    prompt_mask: Tensor,
    settings: SamplingSettings,
    seeds: Sequence[int],
    unconditional: tuple[Tensor, Tensor] | None,
    given: tuple[Tensor, Tensor] | None,
    speculative: int,
    draft: LlamaGenerator | None,
    compile: bool,
    progress: bool,
) -> tuple[Tensor, SamplingReport]:
    device, codebooks, images = model.device, len(model.codebook_sizes), len(prompt)
    start = time.perf_counter()
    prompt, prompt_mask = prompt.to(device), prompt_mask.to(device)
    guided = settings.guidance_scale != 1
    if guided:
        prompt, prompt_mask = with_unconditional(model, prompt, prompt_mask, unconditional)
    weights = guidance_weights(settings, model.steps).to(device) if guided else None
    noise = _StepNoise(model, seeds, device) if settings.temperature > 0 else None

    fixed = _as_steps(model, given, images)  # (images, S, slots) or None
    endings = Endings(model, images, device)
    done = 0 if fixed is None else _leading(fixed)
    out = torch.zeros(images, model.steps, model.slots, dtype=torch.int64, device=device)
    if fixed is not None:
        out = torch.where(fixed < 0, out, fixed)
    given_ids = 0 if fixed is None else int((fixed >= 0).sum())

    run = _Run(model, prompt, prompt_mask, guided, compile)
    if done < model.steps:
        out[:, done : done + 1] = endings.take(run.prefill(out, done, noise, weights, fixed, settings), done)
        done += 1
    first = done
    guesser = None
    if draft is not None and done < model.steps:
        guesser = _Run(draft, prompt, prompt_mask, guided, compile)
        guesser.prefill(out, done - 1, noise, weights, fixed, settings)
    drafted = done  # steps below this were drawn by the draft, or are final, and their inputs are in its cache
    guessed = done  # steps below this hold an id: final, given or guessed
    synchronise(device)
    prefilled = time.perf_counter()

    width = max(min(speculative, model.steps - first), 1)
    with progress_bar(model.steps - first, progress) as advance:
        while done < model.steps and not endings.over:
            low = min(done, model.steps - width)  # at the end the block reaches back, so that its width stays
            if noise is not None:
                noise.forget(min(low, drafted))
            if guesser is None:
                guessed = _guess(model, out, fixed, guessed, low + width)
            else:
                for k in range(drafted, low + width - 1):  # the last step of a block is nobody's input
                    ids = guesser.step(out, k, 1, noise, weights, fixed, settings)
                    if k >= done:
                        out[:, k : k + 1] = ids
            drawn = endings.take(run.step(out, low, width, noise, weights, fixed, settings), low)
            skip = done - low  # steps of the block that were final before
            # the guesses that turned out right, over all images
            hit = (drawn == out[:, low : low + width])[:, skip:-1].all(-1).all(0)
            accepted = 1 if width - skip == 1 else 1 + int(hit.int().cumprod(0).sum())
            out[:, done : low + width] = drawn[:, skip:]
            done += accepted
            drafted = min(low + width - 1, done)
            advance(accepted)
    synchronise(device)
    ids = endings.cut(from_windows(out, model.order, codebooks))
    report = SamplingReport(
        settings=settings,
        seeds=tuple(seeds),
        images=images,
        ids=int((ids != DRAW).sum()) - given_ids,
        steps=0 if not run.calls else done - first + 1,
        calls=run.calls,
        draft_calls=0 if guesser is None else guesser.calls,
        prefill_seconds=prefilled - start,
        decode_seconds=time.perf_counter() - prefilled,
        compiled=compile,
    )
    return ids, report


def with_unconditional(
    model: Generator, prompt: Tensor, prompt_mask: Tensor, other: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The rows of a prompt and after them as many that guidance leads away from, `other` or the condition's own."""
    other = model.condition.null(prompt, prompt_mask) if other is None else other
    return torch.cat([prompt, other[0].to(prompt.device)]), torch.cat([prompt_mask, other[1].to(prompt.device)])


class _Run:
    """One model over one batch: its cache, and where its steps lie in it.

    Args:
        prompt, prompt_mask: all rows, the unconditional ones last if `guided`.
    """

    def __init__(self, model: LlamaGenerator, prompt: Tensor, prompt_mask: Tensor, guided: bool, compile: bool) -> None:
        self.model, self.guided, self.compile = model, guided, compile
        self.x, self.mask = model.prefix(prompt, prompt_mask)  # (rows, P, dim), (rows, P)
        self.prefix = self.x.shape[1]
        self.rope, self.head = model.rope(self.mask), model.head()
        length = self.prefix + model.steps - 1
        self.cache = model.new_cache(len(self.x), length)
        keys = F.pad(self.mask, (0, length - self.prefix), value=True)
        self.keys = keys if compile or not bool(self.mask.all()) else None
        self.decode = compiled_decode_block(model) if compile else decode_block
        self.calls = 0

    def prefill(
        self,
        out: Tensor,
        done: int,
        noise: _StepNoise | None,
        weights: Tensor | None,
        fixed: Tensor | None,
        settings: SamplingSettings,
    ) -> Tensor:
        """Run the prompt and the first `done` steps of `out`; gives the ids of the step after them, (images, 1, slots)."""
        x, mask = self.x, self.mask
        if done:
            known = self.model.embed(out[:, :done])
            x = torch.cat([x, known.repeat(2, 1, 1) if self.guided else known], 1)
            mask = F.pad(mask, (0, done), value=True)
        self.calls += 1
        hidden = prefill(self.model, x, mask, self.rope, self.cache)
        return draw_steps(
            self.model, self.head, hidden, done % len(self.model.codebook_sizes), *_of(noise, weights, fixed, done, 1), settings
        )  # fmt: skip

    def step(
        self,
        out: Tensor,
        low: int,
        width: int,
        noise: _StepNoise | None,
        weights: Tensor | None,
        fixed: Tensor | None,
        settings: SamplingSettings,
    ) -> Tensor:
        """The ids of steps low … low + width - 1, from the steps of `out` before each: (images, width, slots)."""
        start = self.prefix + low - 1
        self.calls += 1
        return self.decode(
            self.model, self.head, out[:, low - 1 : low - 1 + width], (low - 1) % len(self.model.codebook_sizes),
            torch.arange(start, start + width, device=out.device), None if self.compile else start + width,
            self.keys, self.rope, self.cache, *_of(noise, weights, fixed, low, width), settings,
        )  # fmt: skip


def _of(
    noise: _StepNoise | None, weights: Tensor | None, fixed: Tensor | None, low: int, width: int
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    """Noise, guidance weights and given ids of steps low … low + width - 1."""
    return (
        None if noise is None else noise.of(low, width),
        None if weights is None else weights[low : low + width],
        None if fixed is None else fixed[:, low : low + width],
    )


class _StepNoise:
    """The noise of each step, drawn once and in order, and kept until it is forgotten."""

    def __init__(self, model: LlamaGenerator, seeds: Sequence[int], device: torch.device) -> None:
        first, *others = model.codebook_sizes
        self.noise, self.slots = Noise(seeds, device), model.slots
        self.sizes = (first + (model.end is not None), *others)
        self.kept: dict[int, Tensor] = {}
        self.following = 0

    def of(self, step: int, count: int) -> list[Tensor]:
        """Of `count` steps from `step` on."""
        while self.following < step + count:
            size = self.sizes[self.following % len(self.sizes)]
            self.kept[self.following] = self.noise.draw(self.slots, size)
            self.following += 1
        return [self.kept[k] for k in range(step, step + count)]

    def forget(self, below: int) -> None:
        for old in [k for k in self.kept if k < below]:
            del self.kept[old]


def _check_draft(model: LlamaGenerator, draft: LlamaGenerator, speculative: int) -> None:
    same = ("layout", "codebook_sizes", "steps", "slots")
    if any(getattr(model, name) != getattr(draft, name) for name in same) or model.device != draft.device:
        raise ConfigError(
            f"the draft draws {draft.layout} of {draft.codebook_sizes} in {draft.steps} steps on {draft.device}, the generator "
            f"{model.layout} of {model.codebook_sizes} in {model.steps} on {model.device}; they must agree"
        )
    if speculative == 1:
        raise ConfigError(
            "a draft guesses nothing with speculative=1; set speculative to the steps of a block, such as 8"
        )


def _as_steps(model: LlamaGenerator, given: tuple[Tensor, Tensor] | None, images: int) -> Tensor | None:
    if given is None and model.end is None:
        return None
    if given is None:
        ids = torch.full((images, model.layout.length, len(model.codebook_sizes)), DRAW)
    else:
        ids = given[0].masked_fill(~given[1], DRAW)
    steps = to_windows(ids if model.end is None else open_ends(ids), model.order.cpu())
    return steps.to(model.device)


def _leading(fixed: Tensor) -> int:
    """Steps from the start that are given in all images."""
    whole = (fixed >= 0).all(-1).all(0)
    return int(whole.int().cumprod(0).sum())


def _guess(model: LlamaGenerator, out: Tensor, fixed: Tensor | None, start: int, stop: int) -> int:
    """Fill steps start … stop - 1 with what stands a row of windows above, or else one window before; returns the new end.

    Pictures repeat themselves downwards; a wrong guess costs nothing but its own step.
    """
    codebooks = len(model.codebook_sizes)
    above = codebooks * (model.layout.w // model.config.window if isinstance(model.layout, Grid) else 1)
    for k in range(start, stop):
        back = above if k >= above else codebooks
        guess = out[:, k - back] if k >= back else torch.zeros_like(out[:, k])
        out[:, k] = guess if fixed is None else _keep(guess, fixed[:, k])
    return max(start, stop)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class progress_bar:
    """A progress bar over steps, or nothing; as a context it gives the function that advances it."""

    def __init__(self, steps: int, shown: bool) -> None:
        self.steps, self.progress = steps, None
        if shown:
            from rich.progress import Progress

            self.progress = Progress()

    def __enter__(self) -> Callable[[int], Any]:
        if self.progress is None:
            return lambda steps: None
        self.progress.__enter__()
        task = self.progress.add_task("drawing", total=self.steps)
        return lambda steps: self.progress.advance(task, steps)

    def __exit__(self, *error: Any) -> None:
        if self.progress is not None:
            self.progress.__exit__(*error)
