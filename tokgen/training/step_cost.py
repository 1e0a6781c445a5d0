"""What one step of a recipe costs: its peak of memory and its arithmetic, counted as its operations pass a meter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tokgen.errors import ConfigError
from tokgen.training.meter import Meter, bytes_of, state_bytes
from tokgen.training.plan import Recipe, tensors_of


@dataclass
class Step:
    """One step on one rank, in bytes and floating-point operations. `peak` includes everything; `buckets` are what ranks need
    to talk: DDP's gradient buckets, FSDP2's gathered units."""

    batch_size: int
    peak: int
    flops: int
    weights: int
    gradients: int
    states: int
    average: int
    kept: int
    beside: int
    buckets: int = 0

    @property
    def activations(self) -> int:
        """What is left of the peak: activations, temporaries, the batch; gradients where the peak comes before them are among
        the difference, so that it is a lower bound."""
        rest = self.weights + self.gradients + self.states + self.average + self.kept + self.beside + self.buckets
        return max(self.peak - rest, 0)


def measure(recipe: Recipe, first: int, batch_size: int) -> Step:
    """Peak of memory and arithmetic of one step, batch_size samples at a time, in the stage that begins at step `first`."""
    module = recipe.module
    module._kept.clear()
    module._micro, module._step = 0, max(first, 1)
    trained = _trained(recipe, first)
    states = sum(state_bytes(o, {id(p) for p in trained}) for o in recipe.optimizers)
    weights = [*module.parameters(), *module.buffers()]
    average, beside = list(recipe.ema.average.values()), tensors_of(recipe.beside)
    micro = min(module.accumulate, 2)  # the second meets the gradients of the first; others are like it
    whole, module.accumulate = module.accumulate, micro
    meter = Meter(recipe.integer)
    try:
        batch = recipe.batch(batch_size)
        with meter, torch.autocast("cpu", torch.bfloat16, enabled=recipe.half):
            meter.watch([weights, average, beside, batch])
            meter.alive += states
            for _ in range(micro):
                module.training_step(batch, 0)
    finally:
        module.accumulate = whole
    kept = [copy for pairs in module._kept.values() for _, copy in pairs]
    step = Step(
        batch_size=batch_size, peak=meter.peak, flops=meter.flops * whole // micro, weights=bytes_of(weights),
        gradients=bytes_of(trained), states=states, average=bytes_of(average), kept=bytes_of(kept), beside=bytes_of(beside),
    )  # fmt: skip
    return _on_a_rank(recipe, step)


def _trained(recipe: Recipe, first: int) -> list[nn.Parameter]:
    """The parameters that the stage which begins at step `first` trains."""
    parameters = [p for p in recipe.module.parameters() if p.requires_grad]
    parts = getattr(recipe.module, "trained", None)
    if parts is None:
        return parameters
    wanted = {id(p) for p in parts[recipe.module.schedule.at(first)[0]]}
    disc = getattr(recipe.module, "discriminator", None)
    if disc is not None:
        wanted |= {id(p) for p in disc.parameters()}
    return [p for p in parameters if id(p) in wanted]


def _on_a_rank(recipe: Recipe, step: Step) -> Step:
    """DDP holds the gradients once more, in its buckets. FSDP2 holds a share of what belongs to parameters, and two of its
    units whole: the one at work and the next, with the gradient of one."""
    if recipe.copies and recipe.ranks > 1:
        step.buckets = step.gradients
        step.peak += step.buckets
    elif recipe.sharded and recipe.ranks > 1:
        generator = getattr(recipe.module, "generator", None)
        if generator is None:
            raise ConfigError(f"{type(recipe.module).__name__} is not sharded; plan it with train/ddp.yaml")
        blocks = [bytes_of(b.parameters()) for b in generator.layers]
        unit = max(*blocks, bytes_of(generator.parameters()) - sum(blocks))
        for name in ("weights", "gradients", "states", "average"):
            whole = getattr(step, name)
            setattr(step, name, whole // recipe.ranks)
            step.peak -= whole - whole // recipe.ranks
        step.buckets = 3 * unit
        step.peak += step.buckets
    return step


def largest_batch(recipe: Recipe, first: int, budget: int, limit: int = 4096) -> int:
    """The most samples at a time whose step stays within `budget` bytes; 0 if not even one does, at most `limit`."""
    low, high = 0, 1
    while high <= limit and measure(recipe, first, high).peak <= budget:
        low, high = high, 2 * high
    while high - low > max(low // 16, 1):  # to 6 %: rounder numbers are taken anyway
        middle = (low + high) // 2
        low, high = (middle, high) if measure(recipe, first, middle).peak <= budget else (low, middle)
    return low
