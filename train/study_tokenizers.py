"""Studies of the semantic tokenizers on the demo data: the same recipe with one thing changed, several seeds, one table.

    python train/study_tokenizers.py seed      SEED's causal queries against queries that see both ways
    python train/study_tokenizers.py lavit     LaVIT's dynamic length against a fixed length that is equal on average

Every arm trains through `tokgen fit`. Finished runs are kept, so that an interrupted study goes on. Options: --out, --seeds,
--jobs (runs at a time, one thread each).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from study import ROOT, SHARDS, tokgen

CONFIG = "--model.init_args.tokenizer.init_args.config."
TEACHER = ROOT / "assets/demo/teacher"
UNSEEN = ("val", "heldout")  # known things in other styles; things that were never seen


def train(out: Path, recipe: str, name: str, seed: int, arguments: list[str]) -> Path:
    run = out / f"{name.replace(' ', '-')}-{seed}"
    finished = run / "finished"  # the tokenizer is published at every checkpoint, and says nothing
    if not finished.is_file():
        run.mkdir(parents=True, exist_ok=True)
        tokgen(
            "fit", "-c", f"tokenizers/{recipe}.yaml", "-c", "train/cpu.yaml", "--run_dir", run, "--ckpt_path", "auto",
            "--seed_everything", seed, "--data.seed", seed, "--trainer.val_check_interval", 200, *arguments, log=run / "log.txt",
        )  # fmt: skip
        finished.touch()
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_validation(run: Path, stage: int) -> dict[str, float]:
    """The last validation of a stage."""
    return [row for row in rows(run) if row.get("val/stage") == stage][-1]


def pictures(split: str) -> tuple[torch.Tensor, list[str], list[dict[str, Any]]]:
    from tokgen.evaluation.reconstruction import read_pictures

    return read_pictures(SHARDS / split)


# -- SEED -------------------------------------------------------------------------------------------------------------

SEED_ARMS = {
    "causal": [],
    "both ways": [f"{CONFIG}causal", "false"],
    "causal, not grounded": [f"{CONFIG}grounding_weight", "0"],
}
SEED_STAGES = ["--model.init_args.stages", json.dumps([  # without pixels, which change neither codes nor queries
    {"name": "contrastive", "steps": 800, "warmup_steps": 50, "final": 0.02},
    {"name": "codebook", "steps": 600, "warmup_steps": 50, "final": 0.02},
])]  # fmt: skip
PREDICTOR = [  # the small model that predicts codes: generators/llama-tiny.yaml with these changes
    "--model.init_args.visual_tokenizer", "null", "--model.init_args.config.rope", "1d", "--model.init_args.config.dim", "192",
    "--model.init_args.config.n_layers", "4", "--model.init_args.config.caption_dropout", "0.5",
    "--model.init_args.schedule.total_steps", "700", "--trainer.val_check_interval", "100", "--samples.count", "0",
]  # fmt: skip


def measure_seed(run: Path, seed: int) -> dict[str, float]:
    import tokgen as package
    from tokgen.quantizers.base import usage_stats

    kept = run / "study.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    tokenizer = package.load(run / "tokenizer")
    result: dict[str, float] = {}
    for split in UNSEEN:
        pixels, captions, _ = pictures(split)
        tokens = tokenizer.encode(pixels)
        text = tokenizer.encode_text(captions)
        result |= retrieval(f"{split} queries", tokenizer.image_embedding(pixels), text)
        result |= retrieval(f"{split} codes", tokenizer.code_embedding(tokens), text)
    pixels = torch.cat([pictures(split)[0] for split in ("train", *UNSEEN)])
    ids = torch.cat([tokenizer.encode(part).ids for part in pixels.split(256)])
    stats = usage_stats(torch.bincount(ids.flatten(), minlength=tokenizer.codebook_sizes[0]))
    result |= {name: float(value) for name, value in stats.items()}
    codebook = last_validation(run, 1)
    result["sequence"] = codebook["val/cosine_reconstruction"]
    result["target"] = codebook["val/cosine_target"]
    result["likeness"] = likeness(tokenizer, pictures("val")[0])

    # how well a small model predicts the codes, with the caption and without, in bits a code of `val`
    for split in ("train", "val"):
        tokgen("tokenize", SHARDS / split, "--model", run / "tokenizer", "--out", run / "codes" / split)
    predictor = run / "predictor"
    tokgen(
        "fit", "-c", "generators/llama-tiny.yaml", "-c", "train/cpu.yaml", "--run_dir", predictor, "--seed_everything", seed,
        "--data.train", run / "codes/train", "--data.val", run / "codes/val", *PREDICTOR, log=run / "predictor.txt",
    )  # fmt: skip
    result["bits given the caption"] = min(r["val/bits_per_code"] for r in rows(predictor) if "val/bits_per_code" in r)
    result |= unconditional_bits(predictor / "generator", tokenizer)
    kept.write_text(json.dumps(result))
    return result


@torch.no_grad()
def unconditional_bits(generator: Path, tokenizer: Any) -> dict[str, float]:
    """Bits a code of `val` without captions, and what the frequencies of single codes in `train` alone would cost."""
    import tokgen as package

    model = package.load(generator)
    pixels, captions, _ = pictures("val")
    ids = tokenizer.encode(pixels).ids
    prompt, mask = model.condition.null(*model.encode_prompts(captions))
    loss = float(model(prompt, mask, ids).losses["ce"])
    train = torch.cat([tokenizer.encode(part).ids for part in pictures("train")[0].split(256)])
    counts = torch.bincount(train.flatten(), minlength=tokenizer.codebook_sizes[0]) + 1.0
    alone = -(counts / counts.sum()).log2()[ids].mean()
    return {"bits": loss / torch.log(torch.tensor(2.0)).item(), "bits of single codes": float(alone)}


@torch.no_grad()
def likeness(tokenizer: Any, pixels: torch.Tensor) -> float:
    """How alike the queries of a picture are: mean cosine between what two of them say of it beyond their means."""
    sequence = tokenizer.query_features(tokenizer.encoder.features(pixels))  # (B, Q, dim)
    unit = torch.nn.functional.normalize(sequence - sequence.mean(0), dim=-1)
    q = unit.shape[1]
    return float(((unit @ unit.transpose(1, 2)).sum((1, 2)) - q).mean() / (q * (q - 1)))


def retrieval(name: str, images: torch.Tensor, texts: torch.Tensor) -> dict[str, float]:
    from tokgen.evaluation.retrieval import matching_rates

    rates = matching_rates(images, texts, torch.arange(len(images)))
    return {f"{name} {key}": float(value) for key, value in rates.items() if key != "pairs"}


def study_seed(out: Path, seeds: list[int], jobs: int) -> str:
    import tokgen as package

    ungrounded = "causal, not grounded"  # one seed: it is to show why the term is there
    runs = train_all(
        out, "seed-tiny", {n: a for n, a in SEED_ARMS.items() if n != ungrounded}, seeds, jobs, SEED_STAGES
    )
    runs |= train_all(out, "seed-tiny", {ungrounded: SEED_ARMS[ungrounded]}, seeds[:1], jobs, SEED_STAGES)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {key: pool.submit(measure_seed, run, key[1]) for key, run in runs.items()}
        results = {name: [f.result() for key, f in futures.items() if key[0] == name] for name in SEED_ARMS}
    teacher, of_teacher = package.load(TEACHER), {}
    for split in UNSEEN:
        pixels, captions, _ = pictures(split)
        with torch.no_grad():
            of_teacher |= retrieval(split, teacher.embed(pixels), teacher.encode_text(captions))

    lines = ["| | picture to caption: R@1 | R@5 | caption to picture: R@1 | R@5 |", "|---|---|---|---|---|"]
    directions = ("image_to_text", "image_to_text_5", "text_to_image", "text_to_image_5")
    for split in UNSEEN:
        row = [f"{100 * of_teacher[f'{split} {d}']:.1f} %" for d in directions]
        lines.append(f"| {split}: the teacher | " + " | ".join(row) + " |")
        for name in results:
            for what in ("queries", "codes"):
                row = [spread(results[name], f"{split} {what} {d}", 100, ".1f", " %") for d in directions]
                lines.append(f"| {split}: {name}, {what} | " + " | ".join(row) + " |")
    columns = {
        "bits a code": ("bits", 1, ".2f", ""),
        "given the caption": ("bits given the caption", 1, ".2f", ""),
        "single codes": ("bits of single codes", 1, ".2f", ""),
        "usage": ("usage", 100, ".1f", " %"),
        "perplexity": ("perplexity", 1, ".0f", ""),
        "cosine to the queries": ("sequence", 1, ".3f", ""),
        "to the teacher's embedding": ("target", 1, ".3f", ""),
        "likeness of the queries": ("likeness", 1, ".2f", ""),
    }
    drawn = draw_seed(runs["causal", seeds[0]], out)
    return "\n".join(lines) + "\n\n" + table(results, columns) + "\n\n" + drawn


def draw_seed(run: Path, out: Path) -> str:
    """Train the stage "pixels" on a run's codes, and write originals above what they decode to."""
    import tokgen as package

    pixels = out / "pixels"
    if not (pixels / "finished").is_file():
        stages = [{"name": "pixels", "steps": 600, "warmup_steps": 50, "final": 0.02}]
        tokgen(
            "fit", "-c", "tokenizers/seed-tiny.yaml", "-c", "train/cpu.yaml", "--run_dir", pixels, "--ckpt_path", "auto",
            "--model.init_args.init_from", run / "tokenizer", "--model.init_args.teachers", "null",
            "--model.init_args.stages", json.dumps(stages), "--trainer.val_check_interval", 200, log=out / "pixels.txt",
        )  # fmt: skip
        (pixels / "finished").touch()
    tokenizer = package.load(pixels / "tokenizer")
    shown = torch.cat([pictures(split)[0][: 2 * COLUMNS] for split in UNSEEN])
    write_rows(out / "decoded.png", shown, tokenizer.decode(tokenizer.encode(shown)))
    return f"pixels: {last_validation(pixels, 0)['val/psnr']:.2f} dB on val; {out / 'decoded.png'}"


# -- LaVIT ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_lavit(run: Path) -> dict[str, float]:
    import tokgen as package
    from tokgen.evaluation.reconstruction import evaluate_reconstruction

    torch.set_num_threads(1)
    tokenizer = package.load(run / "tokenizer")
    pixels = torch.cat([pictures(split)[0] for split in UNSEEN])
    counts = tokenizer.encode(pixels).lengths
    sizes = torch.tensor([png_bytes(picture) for picture in pixels])
    report = evaluate_reconstruction(tokenizer, pixels)
    features = tokenizer.encoder.features(pixels)
    rebuilt = tokenizer.decode_features(tokenizer.encode(pixels))
    ids = torch.cat([tokenizer.encode(p).ids.flatten() for p in pictures("train")[0].split(256)])
    rules = {"systematic": {}, "threshold": {"threshold": 0.5}, "draws": {"sample": torch.Generator().manual_seed(0)}}
    rules_found = {}
    for name, options in rules.items():
        tokens = tokenizer.encode(pixels, **options)
        rules_found[f"{name} tokens"] = tokens.lengths.double().mean().item()
        rules_found[f"{name} cosine"] = loss_of(features, tokenizer.decode_features(tokens))
    return {
        **rules_found,
        "kept": counts.double().mean().item(),
        "kept_std": counts.double().std().item(),
        "least": float(counts.min()),
        "most": float(counts.max()),
        "correlation": rank_correlation(counts, sizes),
        "variance": rank_correlation(counts, (features - features.mean(1, keepdim=True)).square().sum(-1).mean(1)),
        "area": rank_correlation(counts, (pixels.float().mean(1) < 0.97 * 255).float().mean((1, 2))),
        "without": last_validation(run, 0)["val/cosine"],
        "with": last_validation(run, 1)["val/cosine"],
        "cosine": loss_of(features, rebuilt),
        "psnr": report.psnr,
        "bits": report.bits,
        "usage": len(ids.unique()) / tokenizer.codebook_sizes[0],
    }


def loss_of(features: torch.Tensor, rebuilt: torch.Tensor) -> float:
    return 1 - torch.nn.functional.cosine_similarity(features, rebuilt, dim=-1).mean().item()


def draw_lavit(run: Path, out: Path) -> str:
    """Unseen pictures from those that keep fewest tokens to those that keep most, the dropped places faded, and decoded."""
    import tokgen as package
    from tokgen.tokenizers.lavit import mark_kept

    tokenizer = package.load(run / "tokenizer")
    pixels = torch.cat([pictures(split)[0] for split in UNSEEN])
    order = tokenizer.encode(pixels).lengths.argsort(stable=True)
    shown = pixels[order[torch.linspace(0, len(pixels) - 1, 2 * COLUMNS).round().long()]]
    tokens = tokenizer.encode(shown)
    write_rows(out / "kept.png", shown, mark_kept(shown, tokenizer.keep_map(shown)), tokenizer.decode(tokens))
    return f"tokens of the pictures in {out / 'kept.png'}: {tokens.lengths.tolist()}"


def png_bytes(picture: torch.Tensor) -> int:
    """Size of a picture uint8 (3, H, W) as PNG, a measure of how busy it is."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG", optimize=True)
    return buffer.tell()


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's, ties ranked by their mean; 0 where one does not vary."""

    def ranks(v: torch.Tensor) -> torch.Tensor:
        _, inverse, counts = v.unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        return (ends - (counts - 1) / 2)[inverse]

    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-9))


def study_lavit(out: Path, seeds: list[int], jobs: int) -> str:
    runs = train_all(out, "lavit-tiny", {"dynamic": []}, seeds, jobs)
    results = {"dynamic": [measure_lavit(runs["dynamic", s]) for s in seeds]}
    length = round(statistics.mean(r["kept"] for r in results["dynamic"]))
    fixed = f"fixed, {length}"
    runs |= train_all(out, "lavit-tiny", {fixed: [f"{CONFIG}fixed_keep", str(length)]}, seeds, jobs)
    results[fixed] = [measure_lavit(runs[fixed, s]) for s in seeds]
    columns = {
        "tokens": ("kept", 1, ".1f", ""),
        "their deviation": ("kept_std", 1, ".1f", ""),
        "least": ("least", 1, ".0f", ""),
        "most": ("most", 1, ".0f", ""),
        "rank correlation with PNG size": ("correlation", 1, ".2f", ""),
        "variance of the features": ("variance", 1, ".2f", ""),
        "area not white": ("area", 1, ".2f", ""),
        "1 - cosine on val: no codebook": ("without", 1, ".3f", ""),
        "codebook": ("with", 1, ".3f", ""),
        "val and heldout": ("cosine", 1, ".3f", ""),
        "pixels, dB": ("psnr", 1, ".2f", ""),
        "bits a picture": ("bits", 1, ".0f", ""),
        "codes used": ("usage", 100, ".1f", " %"),
    }
    of_rules = {
        f"{rule}: {what}": (f"{rule} {key}", 1, form, "")
        for rule in ("systematic", "threshold", "draws")
        for what, key, form in (("tokens", "tokens", ".1f"), ("1 - cosine", "cosine", ".3f"))
    }
    drawn = draw_lavit(runs["dynamic", seeds[0]], out)
    return "\n\n".join([table(results, columns), table({"dynamic": results["dynamic"]}, of_rules), drawn])


# -- both -------------------------------------------------------------------------------------------------------------


def train_all(
    out: Path, recipe: str, arms: dict[str, list[str]], seeds: list[int], jobs: int, common: Sequence[str] = ()
) -> dict[tuple[str, int], Path]:
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            (name, seed): pool.submit(train, out, recipe, name.replace(",", ""), seed, [*common, *arguments])
            for seed in seeds
            for name, arguments in arms.items()
        }
        return {key: future.result() for key, future in futures.items()}


COLUMNS = 8


def write_rows(path: Path, *parts: torch.Tensor) -> None:
    """Rows of `COLUMNS` pictures, those of each part below those of the one before; enlarged twice."""
    from tokgen.images import image_grid, write_png

    parts = tuple(p.float() / 255 if p.dtype == torch.uint8 else p for p in parts)
    rows = [part[i : i + COLUMNS] for i in range(0, len(parts[0]), COLUMNS) for part in parts]
    write_png(image_grid(torch.cat(rows), COLUMNS).repeat_interleave(2, -1).repeat_interleave(2, -2), path)


def spread(runs: list[dict[str, float]], key: str, scale: float, form: str, unit: str) -> str:
    values = [scale * run[key] for run in runs]
    text = f"{statistics.mean(values):{form}}"
    return text + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "") + unit


def table(results: dict[str, list[dict[str, float]]], columns: dict[str, tuple[str, float, str, str]]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, runs in results.items():
        lines.append(f"| {name} | " + " | ".join(spread(runs, *how) for how in columns.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=["seed", "lavit"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    out = (options.out or ROOT / "runs" / f"study-{options.study}").resolve()
    text = {"seed": study_seed, "lavit": study_lavit}[options.study](out, options.seeds, options.jobs)
    (out / "table.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    sys.exit(main())
