"""The command that draws from text."""

from __future__ import annotations

import sys
from typing import Literal

from tokgen.commands.models import best_device
from tokgen.commands.output import check_output, write_pixels
from tokgen.errors import InputError


def sample(
    prompts: list[str],
    model: str,
    out: str = "sample.png",
    num_images_per_prompt: int = 1,
    seed: int = 0,
    guidance_scale: float | None = None,
    guidance_schedule: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    negative_prompt: str | None = None,
    passes: list[tuple[float, float]] | None = None,
    scale: int = 1,
    fps: float = 8.0,
    precision: Literal["float32", "bfloat16", "int8"] = "float32",
    speculative: int = 1,
    compile: bool = False,
    device: str | None = None,
) -> None:
    """Draw pictures or clips from text. Settings left out take the values published with the generator.

    Args:
        prompts: one or more texts.
        model: folder or Hub name of the generator; it names or holds its tokenizer.
        out: the .png to write; several pictures become a grid. The effective settings are stored in it. Clips can also be
            written as .gif or .mp4; as .png, each is a row of its frames.
        num_images_per_prompt: pictures for each prompt.
        seed: picture i uses seed + i, so that it comes out the same in any batch.
        guidance_scale: 1 is no guidance.
        guidance_schedule: how guidance grows over the picture.
        temperature: 0 takes the likeliest code.
        top_k: draw among the k likeliest codes (0: all).
        top_p: draw among the likeliest codes that make up this probability (1: all).
        min_p: drop codes less likely than this share of the likeliest (0: none).
        negative_prompt: what guidance leads away from; without it the empty prompt.
        passes: of generators that draw scale by scale: top_k and top_p of each further pass over a scale, such as
            "[[100, 0.8], [1, 1.0]]".
        scale: enlarge the pictures by this whole number when writing.
        fps: frames a second of a .gif or .mp4.
        precision: of the generator; int8 keeps weights in 8 bits and is the fastest for few pictures.
        speculative: let an int8 copy guess this many steps ahead, checked by the generator in one call: the same
            pictures in fewer calls, which pays off where a call of many steps costs little more than one.
        compile: compile the decoding step; pays off for many or large pictures.
        device: such as "cuda:0"; the best there is without it.
    """

    from tokgen.generators.pipeline import TextToImagePipeline

    if not prompts or any(not p.strip() for p in prompts):
        raise InputError('a prompt is empty; say what to draw, such as "red heart, 3d style"')
    pipeline = TextToImagePipeline.from_pretrained(model, device=device or best_device(), precision=precision)
    check_output(out, getattr(pipeline.generator.layout, "t", None) is not None, f"what {model} draws")
    count = len(prompts) * num_images_per_prompt
    given = {
        "guidance_scale": guidance_scale, "schedule": guidance_schedule, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "min_p": min_p, "negative_prompt": negative_prompt, "passes": passes,
    }  # fmt: skip
    result = pipeline(
        prompts,
        num_images_per_prompt=num_images_per_prompt,
        generator=[seed + i for i in range(count)],
        output_type="pt",
        speculative=speculative,
        draft=pipeline.generator.int8() if speculative > 1 else None,
        compile=compile,
        progress=sys.stderr.isatty(),
        **{name: value for name, value in given.items() if value is not None},
    )
    pixels = result.images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    settings = {**result.settings, "prompts": prompts, "seed": seed, "num_images_per_prompt": num_images_per_prompt}
    write_pixels(pixels, out, settings, num_images_per_prompt if num_images_per_prompt > 1 else None, fps)
    report = result.report
    steps = f", {report.steps_per_call:.1f} steps a call" if speculative > 1 else ""
    print(
        f"{count} {'picture' if pixels.ndim == 4 else 'clip'}(s) drawn to {out}, {report.ids_per_second:.0f} tokens/s{steps}"
    )
