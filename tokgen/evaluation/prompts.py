"""Prompts of text-to-image benchmarks, and the folders in which their scorers expect the pictures.

Scoring itself needs the benchmarks' own detectors and judges, each with an environment of its own; what is written here is
their input.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokgen.errors import InputError
from tokgen.files import replacing
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.images import to_uint8, write_png

LAYOUTS = ("geneval", "genai")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its name in the benchmark, its text, and the line that GenEval's scorer wants beside the pictures."""

    name: str
    text: str
    metadata: dict[str, Any]


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Prompts of a .jsonl of GenEval (one {"prompt": …, …} in each line), a .json of GenAI-Bench ({"00000": {"prompt": …}, …}),
    or a .txt with one in each line.

    Raises:
        InputError: no such file, another form, or no prompts.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a .jsonl, .json or .txt of prompts") from None
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        if path.suffix == ".jsonl":
            entries = [(f"{i:05d}", json.loads(line)) for i, line in enumerate(lines)]
        elif path.suffix == ".json":
            entries = list(json.loads(text).items())
        else:
            entries = [(f"{i:05d}", {"prompt": line.strip()}) for i, line in enumerate(lines)]
        prompts = [Prompt(str(name), data["prompt"], data) for name, data in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f'{path} holds no prompts ({type(error).__name__}: {error}); expected lines like {{"prompt": "…"}} in a .jsonl, '
            f'{{"00000": {{"prompt": "…"}}}} in a .json, or a prompt in each line of a .txt'
        ) from None
    bad = next((p for p in prompts if not isinstance(p.text, str) or not p.text.strip()), None)
    if bad is not None or not prompts:
        raise InputError(f"{path} holds {'no prompts' if not prompts else f'an empty prompt, {bad.name}'}")
    # names become file names
    odd = next((p for p in prompts if not p.name.replace("-", "").replace("_", "").isalnum()), None)
    if odd is not None:
        raise InputError(f"{path} names a prompt {odd.name!r}; names are letters, digits, '_' and '-'")
    return prompts


def draw_prompts(
    pipeline: TextToImagePipeline,
    prompts: list[Prompt],
    out: str | os.PathLike[str],
    *,
    layout: str = "geneval",
    images_per_prompt: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    sampling: dict[str, Any] | None = None,
) -> int:
    """Draw and write pictures; those that are there already stay, so that an interrupted run continues. Returns their number.

        geneval   OUT/00000/metadata.jsonl, OUT/00000/samples/0000.png … 0003.png
        genai     OUT/00000.jpeg, one picture for each prompt

    Args:
        images_per_prompt: of geneval; genai has one.
        seed: picture j of prompt i has seed + i * images_per_prompt + j.
        sampling: as the pipeline takes it.

    Raises:
        InputError: an unknown layout, or fewer than one picture.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout={layout!r}; expected one of {', '.join(LAYOUTS)}")
    if images_per_prompt < 1 or batch_size < 1:
        raise InputError(
            f"images_per_prompt={images_per_prompt} and batch_size={batch_size}; expected at least 1 of each"
        )
    out, each = Path(out), images_per_prompt if layout == "geneval" else 1
    jobs = []
    for i, prompt in enumerate(prompts):
        if layout == "geneval":
            with replacing(out / prompt.name / "metadata.jsonl") as temporary:
                temporary.write_text(json.dumps(prompt.metadata, ensure_ascii=False) + "\n", encoding="utf-8")
        for j in range(each):
            file = (
                out / prompt.name / "samples" / f"{j:04d}.png" if layout == "geneval" else out / f"{prompt.name}.jpeg"
            )
            if not file.is_file():
                jobs.append((prompt.text, seed + i * each + j, file))
    for part in _parts(jobs, batch_size):
        result = pipeline(
            [text for text, _, _ in part], generator=[s for _, s, _ in part], output_type="pt", **(sampling or {})
        )
        if result.images.ndim != 4:
            raise InputError("these benchmarks score pictures, and the generator draws clips")
        for (text, own_seed, file), picture in zip(part, to_uint8(result.images)):
            settings = {k: v for k, v in result.settings.items() if k not in ("prompts", "seeds")}
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".png":
                write_png(picture, file, {**settings, "prompts": [text], "seeds": [own_seed]})
            else:
                _write_jpeg(picture, file)
    return len(prompts) * each


def _parts(jobs: list[Any], size: int) -> Iterator[list[Any]]:
    return (jobs[i : i + size] for i in range(0, len(jobs), size))


def _write_jpeg(picture: torch.Tensor, file: Path) -> None:
    from PIL import Image

    with replacing(file) as temporary:
        Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(
            temporary, format="JPEG", quality=95, subsampling=0
        )
