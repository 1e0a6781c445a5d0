"""Measure the demo models.

    python assets/demo/measure.py [--tokenizer DIR] [--generator DIR] [--pictures DIR]

Reconstruction on the four splits; recall of all training captions and of held-out (emoji, style) pairs by retrieval, and the
grids that show them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import tokgen
from tokgen.evaluation.reconstruction import evaluate_reconstruction, read_pictures
from tokgen.evaluation.retrieval import evaluate_retrieval, feature_space
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.images import image_grid, to_uint8, write_png

HERE = Path(__file__).resolve().parent
README = [
    "red heart, 3d style", "red apple, noto style", "rocket, 3d style", "cat face, flat style",
    "pizza, 3d style", "sunflower, noto style", "octopus, flat style", "guitar, 3d style",
]  # fmt: skip


def reconstruction(tokenizer) -> None:
    print("| split | pictures | PSNR | codes in use | perplexity | tokens | bits |\n|---|---|---|---|---|---|---|")
    parts = {}
    for split, size in (("train", None), ("val", None), ("heldout", None), ("photos", 256)):
        pixels, _, _ = read_pictures(HERE / "shards" / split, size)
        parts[split] = pixels
        row(split, evaluate_reconstruction(tokenizer, pixels))
    row("all emoji", evaluate_reconstruction(tokenizer, torch.cat([parts[s] for s in ("train", "val", "heldout")])))


def row(name: str, r) -> None:
    print(
        f"| {name} | {r.images} | {r.psnr:.2f} dB | {r.usage:.1%} | {r.perplexity:.0f} | {r.tokens:.0f} | {r.bits:.0f} |"
    )


def drawing(pipeline: TextToImagePipeline, pictures: Path) -> None:
    train, captions, about = read_pictures(HERE / "shards/train")
    val, val_captions, val_about = read_pictures(HERE / "shards/val")
    references, everything = torch.cat([train, val]), [*about, *val_about]
    started = time.time()
    drawn = torch.cat([draw(pipeline, captions[i : i + 256]) for i in range(0, len(captions), 256)])
    rate = len(captions) / (time.time() - started)
    new = draw(pipeline, val_captions)
    kept = torch.cat(
        [to_uint8(pipeline.tokenizer.decode(pipeline.tokenizer.encode(part))) for part in train.split(256)]
    )
    for name in (str(HERE / "teacher"), "pixels"):
        space = feature_space(name)
        ceiling = evaluate_retrieval(kept, references, torch.arange(len(train)), space)
        recall = evaluate_retrieval(drawn, references, torch.arange(len(train)), space)
        transfer = evaluate_retrieval(new, references, len(train) + torch.arange(len(val)), space)
        nearest = [everything[int(i)] for i in transfer.nearest]
        thing = sum(a["hexcode"] == b["hexcode"] for a, b in zip(nearest, val_about)) / len(val)
        style = sum(a["style"] == b["style"] for a, b in zip(nearest, val_about)) / len(val)
        print(f"{space[0]}, {len(references)} references, chance {recall.chance:.2%}:")
        print(f"  reconstructions:   top-1 {ceiling.top1:.1%}, the most that a drawing could reach")
        print(f"  training captions: top-1 {recall.top1:.1%}, top-5 {recall.top5:.1%}")
        print(
            f"  held-out pairs:    top-1 {transfer.top1:.1%}, top-5 {transfer.top5:.1%}, right thing {thing:.1%}, right style {style:.1%}"
        )
    print(f"{rate:.1f} pictures/s in batches of 256")
    shown = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:20]
    rows = [p for part in (shown[:10], shown[10:]) for p in (train[part], drawn[part])]
    write_png(image_grid(torch.cat(rows), columns=10), pictures / "recall.png")
    rows = [p for i in (0, 10) for p in (val[i : i + 10], new[i : i + 10])]
    write_png(image_grid(torch.cat(rows), columns=10), pictures / "held-out-pairs.png")
    pixels = draw(pipeline, README).repeat_interleave(2, -1).repeat_interleave(2, -2)
    write_png(image_grid(pixels, columns=8), pictures / "samples.png", {"prompts": README})


def draw(pipeline: TextToImagePipeline, captions: list[str]) -> torch.Tensor:
    return to_uint8(pipeline(captions, output_type="pt", generator=0).images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, default=HERE / "tokenizer")
    parser.add_argument("--generator", type=Path, default=HERE / "generator")
    parser.add_argument("--pictures", type=Path, default=HERE)
    options = parser.parse_args()
    reconstruction(tokgen.load(options.tokenizer))
    drawing(TextToImagePipeline.from_pretrained(options.generator), options.pictures)


if __name__ == "__main__":
    main()
