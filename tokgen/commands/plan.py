"""The command that says what a run will take."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokgen.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """A card: its name, memory in GB (10^9 bytes), and peak of dense bf16 with fp32 sums in TFLOP/s."""

    name: str
    memory: float
    peak: float


# NVIDIA's data sheets (H200, H100 SXM, A100, L40S, L4: half of what they quote "with sparsity") and its white papers on
# Ada (RTX 4090) and Ampere GA102 (RTX 3090)
GPUS = {
    "h200": Gpu("H200 SXM 141 GB", 141, 989),
    "h100": Gpu("H100 SXM 80 GB", 80, 989),
    "a100-80": Gpu("A100 80 GB", 80, 312),
    "a100-40": Gpu("A100 40 GB", 40, 312),
    "l40s": Gpu("L40S 48 GB", 48, 362),
    "l4": Gpu("L4 24 GB", 24, 121),
    "rtx4090": Gpu("RTX 4090 24 GB", 24, 165),
    "rtx3090": Gpu("RTX 3090 24 GB", 24, 71),
}
USABLE = 0.9  # of a card's memory: the rest is CUDA's own, cuDNN's workspaces, and holes between blocks


def plan(args: Sequence[str]) -> None:
    """Say what a recipe takes before it runs: parameters, memory, arithmetic, GPU-hours.

    Args:
        args: of the command line.

    Raises:
        ConfigError: a wrong option, or something that neither a file nor an option says.
    """
    options, overrides = _parser().parse_known_args(list(args))
    if unknown := [a for a in overrides if a.startswith("--") and "." not in a]:
        raise ConfigError(f"unknown option {unknown[0]}; settings of the run are given as --model.… or --data.…")
    if options.gpu not in GPUS:
        raise ConfigError(f"unknown --gpu {options.gpu!r}; expected one of {', '.join(GPUS)}")
    if not 0 < options.utilization <= 1:
        raise ConfigError(f"--utilization {options.utilization} is a share of the peak, above 0 and at most 1")
    for name in ("batch_size", "ranks", "text_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    from tokgen.training.plan import Given, Recipe
    from tokgen.training.step_cost import largest_batch, measure

    logging.getLogger("tokgen").setLevel(logging.WARNING)
    layout = None if options.layout is None else parse_layout(options.layout)
    sizes = None if options.codebook_sizes is None else tuple(options.codebook_sizes)
    files = [options.recipe, *options.config]
    if not any(_sets_precision(name) for name in files) and not any("precision" in a for a in overrides):
        overrides = [*overrides, "--trainer.precision=bf16-mixed"]
    gpu = GPUS[options.gpu]
    given = Given(options.batch_size, layout, sizes, options.text_size, options.ranks)
    with Recipe(files, given, overrides) as recipe:
        print(f"{options.recipe}: {type(recipe.module).__name__}, {recipe.kind}")
        for note in recipe.notes:
            print(f"  note: {note}")
        _print_parameters(recipe)
        stages = [(name, steps, measure(recipe, first, recipe.batch_size)) for name, first, steps in recipe.stages()]
        _print_memory(recipe, max((step for _, _, step in stages), key=lambda step: step.peak))
        _print_arithmetic(recipe, stages, gpu, options.utilization)
        if options.largest:
            at = max(range(len(stages)), key=lambda i: stages[i][2].peak)
            most = largest_batch(recipe, recipe.stages()[at][1], int(USABLE * gpu.memory * 1e9))
            fits = f"{most} samples at a time on each" if most else "not even one sample at a time"
            print(f"\nlargest batch: {fits} {gpu.name} ({USABLE:.0%} of its memory, to 6 % of the batch)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokgen plan", allow_abbrev=False, description="Say what a recipe takes before it runs.",
        epilog="Further options are settings of the run, as `tokgen fit` takes them: --model.init_args.accumulate 4",
    )  # fmt: skip
    add = parser.add_argument
    add("recipe", help="a YAML file of tokenizers/ or generators/")
    add("-c", "--config", action="append", default=[], help="further YAML files, such as train/fsdp.yaml")
    add("--gpu", default="h100", help=f"one of {', '.join(GPUS)}")
    add("--utilization", type=float, default=0.4, help="share of the peak that the run is taken to reach")
    add("--batch_size", type=int, help="samples at a time on each rank; the recipe's without it")
    add("--ranks", type=int, help="GPUs; without it those that the trainer's settings say, 8 where they say auto")
    add("--layout", help="of a generator's codes, where there are none yet: 16x16, 1,2,4,8 (sides of scales), or JSON")
    add("--codebook_sizes", type=int, nargs="+", help="of these codes")
    add(
        "--text_size",
        type=int,
        help="text ids, classes, or width of text features, where the recipe leaves them to files",
    )
    add("--largest", action="store_true", help="search the largest batch that fits the GPU")
    return parser


def parse_layout(text: str) -> dict[str, Any]:
    """Plain data of a layout: "16x16", "4x16x16", "1,2,4,8" or JSON. Raises ConfigError."""
    from tokgen.tokens import Layout

    try:
        if re.fullmatch(r"\d+(x\d+){1,2}", text):
            names = ("t", "h", "w")
            sides = [int(n) for n in text.split("x")]
            data = {"kind": "Grid", **dict(zip(names[-len(sides) :], sides))}
        elif re.fullmatch(r"\d+(,\d+)*", text):
            data = {"kind": "Scales", "sizes": [int(n) for n in text.split(",")]}
        else:
            data = json.loads(text)
        return Layout.from_dict(data).to_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--layout {text!r} is no layout ({error}); expected 16x16, 1,2,4,8 or JSON") from None


def _sets_precision(name: str) -> bool:
    return Path(name).is_file() and "precision:" in Path(name).read_text(encoding="utf-8", errors="replace")


# -- tables -----------------------------------------------------------------------------------------------------------


def _print_parameters(recipe: Any) -> None:
    rows = recipe.parameters()
    total, trained = sum(r[1] for r in rows), sum(r[2] for r in rows)
    print(f"\nparameters: {total:,}, of which {trained:,} are trained")
    for name, count, learned in rows:
        print(f"  {name:<34} {count:>15,}" + ("" if learned == count else f"   {learned:,} trained"))
    for name, count in recipe.parameters_beside():
        print(f"  beside it: {name:<23} {count:>15,}   frozen")
    found = recipe.tokens()
    if found is not None:
        layout, sizes, bits = found
        shown = f"{len(sizes)} codebooks" if len(sizes) > 4 else " and ".join(f"{k:,}" for k in sizes) + " codes"
        print(f"tokens of a sample: {layout.length:,} in {layout} of {shown}; at most {bits:,.0f} bits")


def _print_memory(recipe: Any, step: Any) -> None:
    where = {True: " of a rank (FSDP2)", False: " of a rank (DDP)" if recipe.copies else ""}[recipe.sharded]
    precision = "bf16-mixed" if recipe.half else "32-true"
    print(f"\nmemory{where}, {step.batch_size} samples at a time, {precision}: {step.peak / 1e9:.2f} GB at the peak")
    rows = {
        "weights and buffers": step.weights, "gradients": step.gradients, "optimizer states": step.states,
        "moving average": step.average, "kept for a bad step": step.kept, "frozen networks beside it": step.beside,
        "for other ranks": step.buckets, "activations and the rest": step.activations,
    }  # fmt: skip
    for name, size in rows.items():
        if size:
            print(f"  {name:<34} {size / 1e9:>12.3f} GB")


def _print_arithmetic(recipe: Any, stages: Any, gpu: Gpu, utilization: float) -> None:
    accumulate = recipe.module.accumulate
    print(f"\narithmetic on {recipe.ranks} rank(s), {recipe.ranks * accumulate * recipe.batch_size:,} samples a step")
    total = 0.0
    for name, steps, step in stages:
        each = step.flops * recipe.ranks
        total += each * steps
        print(f"  {name:<34} {each / 1e12:>12.3f} TFLOP a step, {steps:,} steps")
    print(f"  {total:.3g} FLOP in all; GPU-hours at {utilization:.0%} of the peak:")
    for card in [gpu, *(g for g in GPUS.values() if g is not gpu)]:
        hours = total / (card.peak * 1e12 * utilization) / 3600
        print(
            f"  {card.name:<34} {hours:>12,.1f}"
            + (f"   {hours / recipe.ranks:,.1f} hours of the clock" if card is gpu else "")
        )
