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
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARDS = ROOT / "assets/demo/shards"
DRAWN = 1024  # training captions that are drawn for the Frechet distance
RECALLED = 512  # of them, drawn greedily for recall

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
    "AdamW alone": ["--model.init_args.optimizer", '{"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002, "betas": [0.9, 0.98], "weight_decay": 0.02}}'],
    "caption variants and keywords, half of the time": ["--data.caption_variants", "0.5"],
    "a fifth of the words dropped": ["--data.caption_word_dropout", "0.2"],
    "a fifth of the codes dropped": ["--model.init_args.config.code_dropout", "0.2"],
    "dropout 0.1": [
        "--model.init_args.config.token_dropout=0.1", "--model.init_args.config.residual_dropout=0.1",
        "--model.init_args.config.ffn_dropout=0.1",
    ],
    "style not an id of its own": ["--model.init_args.text.special_words", "[]"],
    "vocabulary of 512": ["--model.init_args.text.vocab_size", "512"],
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
    with open(log, "w") if log else tempfile.TemporaryFile("w+") as file:
        done = subprocess.run(
            [sys.executable, "-m", "tokgen", *words], cwd=ROOT,
            stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            file.seek(0)
            raise SystemExit(f"it failed: see {log}" if log else file.read()[-2000:])
    return time.time() - started


def train(out: Path, name: str, seed: int, steps: int, arguments: list[str]) -> Path:
    run = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    finished = run / "finished"  # the generator is published at every checkpoint, and says nothing
    if not finished.is_file():
        run.mkdir(parents=True, exist_ok=True)
        tokgen(
            "fit", "-c", "generators/token-shuffle-tiny.yaml", "-c", "train/cpu.yaml", "--run_dir", run,
            "--data.train", out / "codes/train", "--data.val", out / "codes/val",
            "--seed_everything", seed, "--data.seed", seed, "--model.init_args.schedule.total_steps", steps,
            "--trainer.val_check_interval", max(steps // 6, 1), "--samples.count", 0, "--ckpt_path", "auto", *arguments,
            log=run / "log.txt",
        )  # fmt: skip
        finished.touch()
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
    losses = {int(row["step"]): row["train/ce"] for row in rows if "train/ce" in row}
    training = {  # the mean over the 100 steps before each validation
        at: statistics.mean(loss for step, loss in losses.items() if at - 100 < step <= at) for at in validation
    }
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
    again = draw([captions[i] for i in chosen[:RECALLED]], temperature=0.0, guidance_scale=1.5)
    new = draw(unseen_captions, temperature=0.0, guidance_scale=1.5)
    references, everything = torch.cat([known, unseen]), [*about, *unseen_about]
    recalled = evaluate_retrieval(again, references, chosen[:RECALLED], space)
    retrieved = evaluate_retrieval(new, references, len(known) + torch.arange(len(unseen)), space)
    nearest = [everything[int(i)] for i in retrieved.nearest]
    share = lambda key: sum(a[key] == b[key] for a, b in zip(nearest, unseen_about)) / len(unseen)  # noqa: E731
    ids = pipeline.generator.layout.length
    result = {
        "parameters": sum(p.numel() for p in pipeline.generator.parameters()),
        "validation": validation,
        "training": training,
        "loss": validation[max(validation)],
        "best": min(validation.values()),
        "recall": recalled.top1,
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
        return f"{statistics.mean(values):{form}}" + (f" ± {spread:{form}}" if len(values) > 1 else "")

    columns = {
        "validation loss a code: best": ("best", ".3f", 1, ""),
        "last": ("loss", ".3f", 1, ""),
        "Frechet distance": ("frechet", ".4f", 1, ""),
        "recall": ("recall", ".1f", 100, " %"),
        "held-out pairs: top-1": ("top1", ".1f", 100, " %"),
        "top-5": ("top5", ".1f", 100, " %"),
        "right thing": ("thing", ".1f", 100, " %"),
        "right style": ("style", ".1f", 100, " %"),
        "training, ms a picture": ("train_ms", ".1f", 1, ""),
        "drawing, ms a picture": ("draw_ms", ".1f", 1, ""),
    }
    lines = ["| | parameters | " + " | ".join(columns) + " |", "|---|" + "---|" * (len(columns) + 1)]
    for name, runs in results.items():
        cells = [cell(name, key, form, scale) + unit for key, form, scale, unit in columns.values()]
        lines.append(f"| {name} | {runs[0]['parameters'] / 1e6:.2f} M | " + " | ".join(cells) + " |")
    for which in ("training", "validation"):
        steps = sorted(map(int, next(iter(results.values()))[0][which]))
        lines += ["", f"{which} loss by step:", "", "| | " + " | ".join(map(str, steps)) + " |"]
        lines.append("|---|" + "---|" * len(steps))
        for name, runs in results.items():
            series = [{int(k): v for k, v in r[which].items()} for r in runs]
            lines.append(
                f"| {name} | " + " | ".join(f"{statistics.mean(x[s] for x in series):.3f}" for s in steps) + " |"
            )
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
        where = ["--model", options.tokenizer, "--out", out / "codes" / split]
        tokgen("tokenize", SHARDS / split, *where, "--size", 64, *embed)
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
