"""Studies on the demo data: the same recipe with one thing changed, several seeds, one table.

    python train/study.py windows        Token-Shuffle's window 1, 2, 4, and 2 with the autoregressive head
    python train/study.py arra           ARRA's alignment against the same recipe without it
    python train/study.py captions       what helps captions that were never seen: variants, dropped words, dropout, vocabulary

Every arm trains through `tokgen fit` on the same codes for the same number of pictures; parameters are matched by the
width of the feed-forward. Finished runs are kept, so that an interrupted study goes on. Options: --out, --seeds, --steps,
--jobs (runs at a time, one thread each), --tokenizer, --teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARDS = ROOT / "assets/demo/shards"
DRAWN = 1024  # training captions that are drawn for the Frechet distance

WINDOWS = {  # hidden makes the parameters equal to 1 %
    "window 1": {"window": 1, "hidden": 576},
    "window 2": {"window": 2, "hidden": 512},
    "window 4": {"window": 4, "hidden": 512},
    "window 2, autoregressive": {"window": 2, "hidden": 448, "window_head": "autoregressive"},
}
ARRA = {
    "no alignment": None,
    "block 1": {"block": 1},
    "block 4 of 5": {"block": 4},
}
CAPTIONS = {
    "as the recipe": [],
    "caption variants, half of the time": ["--data.caption_variants", "0.5"],
    "a fifth of the words dropped": ["--data.caption_word_dropout", "0.2"],
    "dropout 0.1": [
        "--model.init_args.config.token_dropout=0.1", "--model.init_args.config.residual_dropout=0.1",
        "--model.init_args.config.ffn_dropout=0.1",
    ],
    "style not an id of its own": ["--model.init_args.text.special_words", "[]"],
    "vocabulary of 512": ["--model.init_args.text.vocab_size", "512"],
    "vocabulary of 4096": ["--model.init_args.text.vocab_size", "4096"],
}  # fmt: skip


def arms(study: str) -> dict[str, list[str]]:
    """Command-line arguments of each arm."""
    model = "--model.init_args."
    if study == "windows":
        return {
            name: [a for key, value in config.items() for a in (f"{model}config.{key}", str(value))]
            + ([] if "window_head" in config else [f"{model}config.window_head", "independent"])
            for name, config in WINDOWS.items()
        }
    if study == "captions":
        return CAPTIONS
    plain = [f"{model}config.window_head", "independent"]
    return {name: plain + ([] if a is None else [f"{model}alignment", json.dumps(a)]) for name, a in ARRA.items()}


def tokgen(*arguments: object, log: Path | None = None) -> float:
    """Run a tokgen command on one thread; returns its seconds."""
    words = [str(a) for a in arguments]
    print(f"$ tokgen {shlex.join(words)}", flush=True)
    started = time.time()
    with open(log or os.devnull, "w") as file:
        subprocess.run(
            [sys.executable, "-m", "tokgen", *words], cwd=ROOT, check=True,
            stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    return time.time() - started


def train(out: Path, name: str, seed: int, steps: int, arguments: list[str]) -> Path:
    run = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    if not (run / "generator/config.json").is_file():
        run.mkdir(parents=True, exist_ok=True)
        tokgen(
            "fit", "-c", "generators/token-shuffle-tiny.yaml", "-c", "train/cpu.yaml", "--run_dir", run,
            "--data.train", out / "codes/train", "--data.val", out / "codes/val",
            "--seed_everything", seed, "--data.seed", seed, "--model.init_args.schedule.total_steps", steps,
            "--trainer.val_check_interval", max(steps // 6, 1), "--samples.count", 0, "--ckpt_path", "auto", *arguments,
            log=run / "log.txt",
        )  # fmt: skip
    return run


def measure(run: Path, teacher: str) -> dict:
    """Figures of one finished run, kept in its `study.json`."""
    import torch

    from tokgen.evaluation.frechet import frechet_distance
    from tokgen.evaluation.reconstruction import read_pictures
    from tokgen.evaluation.retrieval import evaluate_retrieval, feature_space
    from tokgen.generators.pipeline import TextToImagePipeline
    from tokgen.images import to_uint8

    kept = run / "study.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row]
    validation = {int(row["step"]): row["val/loss"] for row in rows if "val/loss" in row}
    pipeline = TextToImagePipeline.from_pretrained(run / "generator")
    known, captions, about = read_pictures(SHARDS / "train")
    unseen, unseen_captions, unseen_about = read_pictures(SHARDS / "val")
    space = feature_space(teacher)

    def draw(texts: list[str], **settings) -> torch.Tensor:
        parts = [
            pipeline(texts[i : i + 128], output_type="pt", generator=i, **settings).images
            for i in range(0, len(texts), 128)
        ]
        return to_uint8(torch.cat(parts))

    chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:DRAWN]
    started = time.time()
    drawn = draw([captions[i] for i in chosen], temperature=1.0, guidance_scale=1.0)
    seconds = (time.time() - started) / DRAWN
    new = draw(unseen_captions, temperature=0.0, guidance_scale=1.5)
    references, everything = torch.cat([known, unseen]), [*about, *unseen_about]
    retrieved = evaluate_retrieval(new, references, len(known) + torch.arange(len(unseen)), space)
    nearest = [everything[int(i)] for i in retrieved.nearest]
    share = lambda key: sum(a[key] == b[key] for a, b in zip(nearest, unseen_about)) / len(unseen)  # noqa: E731
    ids = pipeline.generator.layout.length
    result = {
        "parameters": sum(p.numel() for p in pipeline.generator.parameters()),
        "validation": validation,
        "loss": validation[max(validation)],
        "train_ms": 1000 * ids / statistics.median(rates),
        "draw_ms": 1000 * seconds,
        "frechet": frechet_distance(drawn, known, space),
        "top1": retrieved.top1,
        "top5": retrieved.top5,
        "thing": share("hexcode"),
        "style": share("style"),
        "space": retrieved.space,
    }
    kept.write_text(json.dumps(result))
    return result


def table(results: dict[str, list[dict]]) -> str:
    def cell(name: str, key: str, form: str, scale: float = 1.0) -> str:
        values = [scale * r[key] for r in results[name]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):{form}} ± {spread:{form}}"

    lines = [
        "| | parameters | validation loss a code | Frechet distance | held-out pairs: top-1, top-5 | right thing | right style | training, ms a picture | drawing, ms a picture |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        lines.append(
            f"| {name} | {runs[0]['parameters'] / 1e6:.2f} M | {cell(name, 'loss', '.3f')} | {cell(name, 'frechet', '.4f')} | "
            f"{cell(name, 'top1', '.1f', 100)} %, {cell(name, 'top5', '.1f', 100)} % | {cell(name, 'thing', '.1f', 100)} % | "
            f"{cell(name, 'style', '.1f', 100)} % | {cell(name, 'train_ms', '.1f')} | {cell(name, 'draw_ms', '.1f')} |"
        )
    lines += ["", "validation loss by step:", ""]
    steps = sorted(map(int, next(iter(results.values()))[0]["validation"]))
    lines += ["| | " + " | ".join(map(str, steps)) + " |", "|---|" + "---|" * len(steps)]
    for name, runs in results.items():
        means = [statistics.mean({int(k): v for k, v in r["validation"].items()}[s] for r in runs) for s in steps]
        lines.append(f"| {name} | " + " | ".join(f"{m:.3f}" for m in means) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=["windows", "arra", "captions"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "assets/demo/tokenizer")
    parser.add_argument("--teacher", type=Path, default=ROOT / "assets/demo/teacher")
    options = parser.parse_args()
    out = (options.out or ROOT / "runs" / f"study-{options.study}").resolve()
    embed = ["--embed", options.teacher] if options.study == "arra" else []
    for split in ("train", "val"):
        tokgen(
            "tokenize",
            SHARDS / split,
            "--model",
            options.tokenizer,
            "--out",
            out / "codes" / split,
            "--size",
            64,
            *embed,
        )
    wanted = arms(options.study)
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            (name, seed): pool.submit(train, out, name, seed, options.steps, arguments)
            for seed in options.seeds
            for name, arguments in wanted.items()
        }
        runs = {key: future.result() for key, future in futures.items()}
    results = {name: [measure(runs[name, s], str(options.teacher)) for s in options.seeds] for name in wanted}
    text = table(results)
    (out / "table.md").write_text(text + "\n")
    print(f"\nfeature space: {next(iter(results.values()))[0]['space']}\n\n{text}")


if __name__ == "__main__":
    main()
