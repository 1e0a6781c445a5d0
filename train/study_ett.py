"""What tuning a tokenizer by captions does to it (ETT), on the demo data: four ways to join it with a language model.

    python train/study_ett.py

For each seed an IBQ tokenizer is trained (`ibq-tiny`), then a small language model learns to caption from its ids, from its
vectors, with the tokenizer tuned by captions alone, or with the tokenizer's own loss beside them; then each of these language
models learns to draw with its tokenizer's codes. Finished runs are kept, so that an interrupted study goes on. Options: --out,
--seeds, --drawing (how many of the seeds learn to draw, which takes the longest), --jobs (runs at a time, one thread each).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from study import ROOT, SHARDS, tokgen
from study_tokenizers import TEACHER, UNSEEN, pictures, rows, table, write_rows

MODEL = "--model.init_args."
ALIGNMENT = {"name": "alignment", "steps": 200, "warmup_steps": 20, "final": 0.1, "train": ["projector", "lm"]}
SEMANTIC = {"name": "semantic", "steps": 300, "warmup_steps": 20, "final": 0.02}
ARMS: dict[str, dict[str, Any]] = {
    "frozen, indices": {"visual": "indices", "train": ["projector", "lm"]},
    "frozen, embeddings": {"train": ["projector", "lm"]},
    "captions alone": {"train": ["projector", "lm", "tokenizer"], "alpha": 0.0},
    "ETT": {"train": ["projector", "lm", "tokenizer"], "alpha": 0.25},
}
DRAWING = [  # generators/llama-tiny.yaml with these changes; sizes and vocabulary are the language model's
    f"{MODEL}config", "{}", f"{MODEL}schedule.total_steps", "200", f"{MODEL}schedule.warmup_steps", "20",
    "--samples.count", "0",
]  # fmt: skip
DRAWN = 512  # training captions that are drawn for the Frechet distance


def fit(run: Path, recipe: str, *arguments: object) -> Path:
    finished = run / "finished"  # models are published at every checkpoint, and say nothing
    if not finished.is_file():
        run.mkdir(parents=True, exist_ok=True)
        where = ["--run_dir", run, "--ckpt_path", "auto", "--trainer.val_check_interval", 500]
        tokgen("fit", "-c", recipe, "-c", "train/cpu.yaml", *where, *arguments, log=run / "log.txt")
        finished.touch()
    return run


def run_arm(out: Path, name: str, seed: int, draws: bool) -> dict[str, float]:
    """Tune, learn to draw, measure."""
    arm, base = ARMS[name], out / f"base-{seed}"
    run = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    stage = SEMANTIC | {"train": arm["train"], "alpha": arm.get("alpha", 0.25), "tokenizer_lr": 0.5}
    seeds = ["--seed_everything", seed, "--data.seed", seed]
    indices = arm.get("visual") == "indices"
    of_codes = [f"{MODEL}language_model.code_embedding", "table", f"{MODEL}language_model.code_head", "linear"]
    fit(
        run, "tokenizers/ett-tiny.yaml", f"{MODEL}init_from", base / "tokenizer", f"{MODEL}stages", json.dumps([ALIGNMENT, stage]),
        *([f"{MODEL}visual", "indices", *of_codes] if indices else []), *seeds,
    )  # fmt: skip
    if not draws:
        return measure_tokenizer(run)
    for split in ("train", "val"):
        codes = run / "codes" / split
        if not (codes / "manifest.json").is_file():
            tokgen("tokenize", SHARDS / split, "--model", run / "tokenizer", "--out", codes)
    drawing = fit(
        run / "drawing", "generators/llama-tiny.yaml", f"{MODEL}init_from", run / "lm", f"{MODEL}visual_tokenizer",
        run / "tokenizer", "--data.train", run / "codes/train", "--data.val", run / "codes/val", *DRAWING, *seeds,
    )  # fmt: skip
    return measure_drawing(run, drawing, measure_tokenizer(run))


@torch.no_grad()
def measure_tokenizer(run: Path) -> dict[str, float]:
    """Captions, pixels, usage, and what the teacher still sees in what the tokenizer keeps."""
    import tokgen as package
    from tokgen.evaluation.reconstruction import evaluate_reconstruction
    from tokgen.evaluation.retrieval import matching_rates

    kept = run / "tokenizer.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    last = [row for row in rows(run) if "val/caption_loss" in row][-1]
    tokenizer = package.load(run / "tokenizer")
    report = evaluate_reconstruction(tokenizer, torch.cat([pictures(split)[0] for split in UNSEEN]))
    ids = torch.cat([tokenizer.encode(part).ids.flatten() for part in pictures("train")[0].split(256)])
    unseen, texts, _ = pictures("val")
    teacher = package.load(TEACHER)
    decoded = teacher.embed(tokenizer.decode(tokenizer.encode(unseen)))
    rates = matching_rates(decoded, teacher.encode_text(texts), torch.arange(len(texts)))
    result = {
        "caption": last["val/caption_loss"],
        "accuracy": last["val/caption_accuracy"],
        "psnr": report.psnr,
        "usage": len(ids.unique()) / tokenizer.codebook_sizes[0],
        "kept": float(rates["image_to_text"]),
    }
    kept.write_text(json.dumps(result))
    return result


@torch.no_grad()
def measure_drawing(run: Path, drawing: Path, result: dict[str, float]) -> dict[str, float]:
    """`result` with what the generator of a run draws, in the teacher's space."""
    import tokgen as package
    from tokgen.evaluation.frechet import frechet_from_features
    from tokgen.evaluation.retrieval import embed_pictures, feature_space, matching_rates
    from tokgen.generators.pipeline import TextToImagePipeline
    from tokgen.images import to_uint8

    kept = run / "study.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    pipeline = TextToImagePipeline.from_pretrained(drawing / "generator")
    tokenizer, teacher, space = pipeline.tokenizer, package.load(TEACHER), feature_space(str(TEACHER))
    known, captions, _ = pictures("train")

    def draw(texts: list[str], **settings: float) -> torch.Tensor:
        parts = [
            pipeline(texts[i : i + 128], output_type="pt", generator=i, **settings).images
            for i in range(0, len(texts), 128)
        ]
        return to_uint8(torch.cat(parts))

    chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:DRAWN].tolist()
    real = embed_pictures(known, space)
    result = dict(result)
    result["frechet"] = frechet_from_features(
        embed_pictures(draw([captions[i] for i in chosen], temperature=1.0, guidance_scale=1.0), space), real
    )
    rebuilt = torch.cat([to_uint8(tokenizer.decode(tokenizer.encode(part))) for part in known[chosen].split(128)])
    result["floor"] = frechet_from_features(embed_pictures(rebuilt, space), real)  # what perfect drawing would reach
    unseen, texts, _ = pictures("val")
    generator = pipeline.generator
    loss = generator(*generator.encode_prompts(texts), tokenizer.encode(unseen).ids).losses["ce"]
    result["bits"] = float(loss) / math.log(2)
    words, groups = teacher.encode_text(texts), torch.arange(len(texts))
    drawn = draw(texts, temperature=0.0, guidance_scale=1.5)
    result["drawn"] = float(matching_rates(teacher.embed(drawn), words, groups)["image_to_text"])
    kept.write_text(json.dumps(result))
    return result


def draw_comparison(out: Path, seed: int) -> None:
    """Unseen pictures, and below them what each tokenizer makes of them."""
    import tokgen as package

    shown = torch.cat([pictures(split)[0][:4] for split in UNSEEN])
    folders = [out / f"base-{seed}", *(out / f"{n.replace(', ', '-').replace(' ', '-')}-{seed}" for n in ("captions alone", "ETT"))]  # fmt: skip
    tokenizers = [package.load(folder / "tokenizer") for folder in folders]
    write_rows(out / "decoded.png", shown, *[t.decode(t.encode(shown)) for t in tokenizers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/study-ett")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--drawing", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    out = options.out.resolve()

    def base(seed: int) -> Path:
        return fit(
            out / f"base-{seed}", "tokenizers/ibq-tiny.yaml", "--seed_everything", seed, "--data.seed", seed,
            f"{MODEL}schedule.total_steps", "1000",
        )  # fmt: skip

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(base, options.seeds))
        futures = {
            (name, s): pool.submit(run_arm, out, name, s, s in options.seeds[: options.drawing])
            for s in options.seeds
            for name in ARMS
        }
        results = {name: [futures[name, s].result() for s in options.seeds] for name in ARMS}
    draw_comparison(out, options.seeds[0])
    columns = {
        "caption loss, nats an id": ("caption", 1, ".3f", ""),
        "ids right": ("accuracy", 100, ".1f", " %"),
        "pixels, dB": ("psnr", 1, ".2f", ""),
        "codes used": ("usage", 100, ".1f", " %"),
        "decoded to caption, R@1": ("kept", 100, ".1f", " %"),
        "bits a code": ("bits", 1, ".2f", ""),
        "Frechet distance of drawings": ("frechet", 1, ".4f", ""),
        "of the tokenizer's own reconstructions": ("floor", 1, ".4f", ""),
        "drawn to caption, R@1": ("drawn", 100, ".1f", " %"),
    }
    start = statistics.mean(json.loads((out / f"base-{s}" / "metrics.jsonl").read_text().splitlines()[-1]).get("val/psnr", float("nan")) for s in options.seeds)  # fmt: skip
    drawn = ("bits", "frechet", "floor", "drawn")
    parts = [{k: v for k, v in columns.items() if (v[0] in drawn) == wanted} for wanted in (False, True)]
    drew = {name: [r for r in runs if "bits" in r] for name, runs in results.items()}
    text = table(results, parts[0]) + "\n\n" + table(drew, parts[1]) + f"\n\nbefore tuning: {start:.2f} dB on val"
    (out / "table.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    sys.exit(main())
