"""The decoding loop of generators that draw scale by scale: S calls of the transformer for S maps of codes.

All codes of a scale are drawn in one call, each given the text and all earlier scales, but independently of one another.
TokenFlow's further passes (Qu et al. 2024, arXiv 2412.03069v2, section 3.3) mend what does not fit together: the scale is
read again with its own codes in the map, and all of its codes are drawn anew from the logits at the same slots, within fewer
and fewer of the likeliest. The first scale, one code, has nothing to fit and takes none. With `SamplingSettings`:

    published      top_k, top_p     passes
    one pass       600, 0.6         ()
    two            1200, 0.8        ((1, 1.0),)
    three          1200, 0.8        ((100, 0.8), (1, 1.0))

Its guidance, (1 + t) l_c - t l_u with t rising evenly from 0 at the first scale to `cfg` at the last, is the schedule
"linear" with guidance_scale 1 + cfg (8.5 for the published 7.5).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tokgen.errors import ConfigError
from tokgen.generators.decoding import SamplingReport, progress_bar, synchronise, with_unconditional
from tokgen.generators.sampling import Noise, SamplingSettings, choose, guidance_weights

if TYPE_CHECKING:
    from tokgen.generators.base import Generator
    from tokgen.generators.tokenflow import TokenFlowGenerator

SLOTS = (
    64  # drawn from at once: logits and noise of a large scale would fill the memory. Another number is another noise
)


@torch.no_grad()
def generate(
    model: TokenFlowGenerator,
    prompt: Tensor,
    prompt_mask: Tensor,
    settings: SamplingSettings,
    seeds: Sequence[int],
    *,
    unconditional: tuple[Tensor, Tensor] | None = None,
    given: tuple[Tensor, Tensor] | None = None,
    speculative: int = 1,
    draft: Generator | None = None,
    compile: bool = False,
    progress: bool = False,
) -> tuple[Tensor, SamplingReport]:
    """Draw one image's ids for each row of the prompt.

    Args:
        prompt, prompt_mask: the condition's tensors, B rows.
        seeds: B of them.
        unconditional: the other prompt of guidance, of the shapes of the first; None is the condition's own.
        given: ids (B, N, 1) and which of them stay, bool (B, N, 1); the others are drawn, given all earlier scales. Scales
            that all images have from the start cost one call together.
        speculative, draft, compile: of generators that draw id by id; refused here.

    Returns:
        ids int64 (B, N, 1), and what was done. Its `steps` are scales, its `calls` have a further one for each pass.

    Raises:
        ConfigError: one of `speculative`, `draft` and `compile`.
    """
    if speculative != 1 or draft is not None:
        raise ConfigError(
            "a whole scale is drawn in one call and there is nothing to guess; leave out speculative and draft"
        )
    if compile:
        raise ConfigError("each scale has a shape of its own, which is not compiled; leave out compile")
    training = model.training
    model.eval()  # as it was afterwards
    try:
        return _Run(model, prompt, prompt_mask, settings, seeds, unconditional, given).draw(progress)
    finally:
        model.train(training)


class _Run:
    """One batch: its prompt, cache, noise and ids so far."""

    def __init__(
        self,
        model: TokenFlowGenerator,
        prompt: Tensor,
        prompt_mask: Tensor,
        settings: SamplingSettings,
        seeds: Sequence[int],
        unconditional: tuple[Tensor, Tensor] | None,
        given: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.started, self.calls = time.perf_counter(), 0
        self.model, self.settings, self.seeds = model, settings, tuple(seeds)
        device, self.images, scales = model.device, len(prompt), len(model.scales)
        prompt, prompt_mask = prompt.to(device), prompt_mask.to(device)
        self.guided = settings.guidance_scale != 1
        if self.guided:
            prompt, prompt_mask = with_unconditional(model, prompt, prompt_mask, unconditional)
        self.weights = guidance_weights(settings, scales).to(device) if self.guided else None
        self.noise = Noise(seeds, device) if settings.temperature > 0 else None
        self.text, (self.x, self.mask) = prompt.shape[1], model.prefix(prompt, prompt_mask)

        slots = self.x.shape[1] + model.layout.length - 1
        self.first_slot = self.x.shape[1] - 1  # of the slots that predict codes
        self.rope = model.rope(self.text, slots)
        self.cache = model.new_cache(len(self.x), slots)
        self.keys = F.pad(self.mask, (0, slots - self.x.shape[1]), value=True)  # (rows, slots)
        self.ids = torch.zeros(self.images, model.layout.length, dtype=torch.int64, device=device)
        self.stays = torch.zeros_like(self.ids, dtype=torch.bool)
        if given is not None:
            self.stays = given[1][..., 0].to(device)
            self.ids = torch.where(self.stays, given[0][..., 0].to(device), self.ids)

    def draw(self, progress: bool) -> tuple[Tensor, SamplingReport]:
        model, scales = self.model, len(self.model.scales)
        whole = [bool(self.stays[:, self.part(i)].all()) for i in range(scales)]
        first = next((i for i in range(scales) if not whole[i]), scales)  # scales before it are given
        prefilled = time.perf_counter()
        running = None  # the map of all scales so far, at the side of the last of them
        for i in range(first):
            running = model.add_scale(None if i == 0 else model.resize(running, i), self.ids[:, self.part(i)], i)
        with progress_bar(scales - first, progress) as advance:
            for i in range(first, scales):
                before = None if i == 0 else model.resize(running, i)
                hidden = self.prefill(first) if i == first else self.scale(before, i)
                self.choose(hidden, i, self.settings)
                if i == first:
                    synchronise(model.device)
                    prefilled = time.perf_counter()
                running = model.add_scale(before, self.ids[:, self.part(i)], i)
                if i > 0 and self.settings.passes:
                    running = self.again(before, running, i)
                advance(1)
        synchronise(model.device)
        report = SamplingReport(
            settings=self.settings,
            seeds=self.seeds,
            images=self.images,
            ids=self.ids.numel() - int(self.stays.sum()),
            steps=scales - first,
            calls=self.calls,
            draft_calls=0,
            prefill_seconds=prefilled - self.started,
            decode_seconds=time.perf_counter() - prefilled,
            compiled=False,
        )
        return self.ids[..., None], report

    def part(self, scale: int) -> slice:
        """Its codes."""
        return slice(*self.model.scale_starts[scale : scale + 2])

    def at(self, scale: int) -> slice:
        """Its slots in the sequence."""
        return slice(*(self.first_slot + start for start in self.model.scale_starts[scale : scale + 2]))

    def rows(self, x: Tensor) -> Tensor:
        return torch.cat([x, x]) if self.guided else x

    def prefill(self, scale: int) -> Tensor:
        """Run the prompt and all scales up to one, whose codes are not yet needed: its states (rows, s^2, dim)."""
        model = self.model
        features = model.maps(self.ids, scale + 1)
        x = torch.cat([self.x, self.rows(model.embed(features, 1))], 1) if scale else self.x
        length = x.shape[1]
        rope = self.rope[0][:, :length], self.rope[1][:, :length]
        self.calls += 1
        at = torch.arange(length, device=x.device)
        return model.blocks(x, rope, model.attends(self.mask, scale + 1), self.cache, at, length, self.at(scale).start)

    def scale(self, features: Tensor, scale: int) -> Tensor:
        """Run the slots of one scale over what is cached, from a map at its side: states (rows, s^2, dim)."""
        model, at = self.model, self.at(scale)
        x = self.rows(model.embed(features.flatten(2).mT, self.part(scale).start))
        rope = self.rope[0][:, at], self.rope[1][:, at]
        self.calls += 1
        # a scale sees everything up to its own end
        places, seen = torch.arange(at.start, at.stop, device=x.device), self.keys[:, None, None, : at.stop]
        return model.blocks(x, rope, seen, self.cache, places, at.stop)

    def choose(self, hidden: Tensor, scale: int, settings: SamplingSettings) -> None:
        """Draw the codes of a scale; given ones stay."""
        part, weight = self.part(scale), None if self.weights is None else self.weights[scale : scale + 1]
        drawn = []
        for states in hidden.split(SLOTS, 1):
            logits = self.model.code_logits(states)  # (rows, slots, K)
            noise = None if self.noise is None else self.noise.draw(*logits.shape[1:])[:, None]
            drawn.append(choose(logits[:, None], noise, weight, settings)[:, 0])
        self.ids[:, part] = torch.where(self.stays[:, part], self.ids[:, part], torch.cat(drawn, 1))

    def again(self, before: Tensor, running: Tensor, scale: int) -> Tensor:
        """The further passes over a scale; gives the map with its final codes.

        Later scales see it as the first pass left it, with the map of the scales before: its keys and values are put back.
        """
        at, layers = self.at(scale), [*self.cache.k, *self.cache.v]
        kept = [t[:, :, at].clone() for t in layers]
        for top_k, top_p in self.settings.passes:
            hidden = self.scale(running, scale)
            self.choose(hidden, scale, dataclasses.replace(self.settings, top_k=top_k, top_p=top_p))
            running = self.model.add_scale(before, self.ids[:, self.part(scale)], scale)
        for tensor, old in zip(layers, kept):
            tensor[:, :, at] = old
        return running
