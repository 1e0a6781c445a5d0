"""Video-text retrieval: an encoder of trajectories against an equal vision transformer over patches, trained equally long.

    python assets/demo/moving_clips.py --out runs/moving --clips 3000 --val 200 --known 200
    for split in train val known; do tokgen trajectories runs/moving/$split runs/moving-trajectories/$split --size 64 --grid 32 --set budget=32; done
    python train/study_trajvit.py --shards runs/moving-trajectories

Every arm trains through `tokgen fit -c tokenizers/trajvit-tiny.yaml` with the same batches, text tower and steps; parameters
of the towers agree within 5 %. Measured on each split that the folder holds beside train: which caption a clip finds and
which clip a caption finds, tokens per clip, and seconds per step. Captions say which thing moves where; `known` has things
that train shows in another style, `val` things that it never shows. Finished runs are kept, so that an interrupted study goes
on. Options: --shards, --out, --seeds, --arms, --steps, --lr (several: each arm is shown at its best on the split that validates),
--jobs (runs at a time, one thread each).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from study import ROOT, tokgen
from study_tokenizers import rows, spread, table

RECIPE = ROOT / "tokenizers/trajvit-tiny.yaml"
CONFIG = "--model.init_args.config."
PATCHES = {"image_size": 64, "frames": 16, "dim": 128, "heads": 4}
ARMS: dict[str, dict[str, Any]] = {  # what takes the recipe's tower's place
    "trajectories": {},
    "patches": {"type": "video-vit", "config": {**PATCHES, "patch": 8, "tubelet": 4, "hidden": 384, "depth": 6}},
    "patches, few": {"type": "video-vit", "config": {**PATCHES, "patch": 16, "tubelet": 4, "hidden": 416, "depth": 4}},
    "patches, many": {"type": "video-vit", "config": {**PATCHES, "patch": 8, "tubelet": 2, "hidden": 384, "depth": 6}},
    "trajectories, the release's positions": {"legacy_position": True},
}
DEFAULT = ["trajectories", "patches", "patches, few"]
MEASURES = {
    "clip to caption: R@1": "image_to_text", "R@5": "image_to_text_5",
    "caption to clip: R@1": "text_to_image", " R@5": "text_to_image_5",
}  # fmt: skip


def tower(arm: str) -> dict[str, Any]:
    recipe = yaml.safe_load(RECIPE.read_text())["model"]["init_args"]["config"]["tower"]
    change = ARMS[arm]
    return change if "type" in change else {**recipe, "config": {**recipe["config"], **change}}


def validation(shards: Path) -> str:
    return next(split for split in ("known", "val") if (shards / split).is_dir())


def train(out: Path, shards: Path, arm: str, seed: int, steps: int, lr: float) -> Path:
    run = out / f"{arm.replace(', ', '-').replace(' ', '-')}-{lr:g}-{seed}"
    finished = run / "finished"  # the encoder is published at every checkpoint, and says nothing
    if not finished.is_file():
        run.mkdir(parents=True, exist_ok=True)
        tokgen(
            "fit", "-c", RECIPE, "-c", "train/cpu.yaml", "--run_dir", run, "--ckpt_path", "auto",
            "--data.train", shards / "train", "--data.val", shards / validation(shards), "--data.seed", seed,
            "--seed_everything", seed, "--model.init_args.schedule.total_steps", steps,
            "--model.init_args.schedule.warmup_steps", max(steps // 12, 1),
            "--trainer.val_check_interval", max(steps // 4, 1), "--trainer.log_every_n_steps", 10,
            "--model.init_args.optimizer.init_args.lr", lr, f"{CONFIG}tower", json.dumps(tower(arm)), log=run / "log.txt",
        )  # fmt: skip
        finished.touch()
    return run


@torch.no_grad()
def measure(run: Path, shards: Path) -> dict[str, float]:
    """Figures of one finished run, kept in its `study.json`."""
    import tokgen as package
    from tokgen.data.datamodule import ShardsDataModule
    from tokgen.evaluation.retrieval import matching_rates

    kept = run / "study.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    encoder = package.load(run / "encoder")
    settings = {k: v for k, v in yaml.safe_load(RECIPE.read_text())["data"].items() if k not in ("train", "val")}
    rates = [row["train/samples_per_second"] for row in rows(run) if "train/samples_per_second" in row]
    result: dict[str, float] = {"seconds": settings["batch_size"] / statistics.median(rates)}
    result["parameters"] = sum(p.numel() for p in encoder.tower.parameters())
    for split in sorted(path.name for path in shards.iterdir() if path.is_dir() and path.name != "train"):
        data = ShardsDataModule(val=str(shards / split), **settings)
        clips, texts, captions, tokens = [], [], [], []
        for batch in data.val_dataloader():
            keep = batch["valid"].bool()
            encoded = encoder(batch["pixels"], **{name: batch[name] for name in encoder.extras})
            words = [c for c, real in zip(batch["caption"], keep.tolist()) if real]
            clips.append(encoded.pooled[keep])
            texts.append(encoder.encode_text(words))
            captions += words
            tokens.append(encoded.mask[keep].sum(1))
        numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        groups = torch.tensor([numbers[caption] for caption in captions])
        found = matching_rates(torch.cat(clips), torch.cat(texts), groups)
        result |= {f"{split} {name}": float(value) for name, value in found.items()}
        result[f"{split} tokens"] = torch.cat(tokens).double().mean().item()
    kept.write_text(json.dumps(result))
    return result


def report(results: dict[str, list[dict[str, float]]], steps: int) -> str:
    first = next(iter(results.values()))[0]
    splits = [key.removesuffix(" tokens") for key in first if key.endswith(" tokens")]
    columns = {
        "parameters of the tower": ("parameters", 1e-6, ".2f", " M"),
        "tokens a clip": (f"{splits[0]} tokens", 1, ".1f", ""),
        "seconds a step": ("seconds", 1, ".2f", ""),
        "learning rate": ("lr", 1, ".4f", ""),
    }
    parts = [f"{steps} steps", table(results, columns)]
    for split in splits:
        pairs = int(first[f"{split} pairs"])
        lines = [
            f"| {split}, {pairs} clips | " + " | ".join(name.strip() for name in MEASURES) + " |",
            "|---|---|---|---|---|",
        ]
        for name, runs in results.items():
            cells = [spread(runs, f"{split} {key}", 100, ".1f", " %") for key in MEASURES.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append(
            f"| by chance | {100 / pairs:.1f} % | {500 / pairs:.1f} % | {100 / pairs:.1f} % | {500 / pairs:.1f} % |"
        )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    from concurrent.futures import ThreadPoolExecutor

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=ROOT / "runs/moving-trajectories")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=DEFAULT)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.0005])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    shards = options.shards.resolve()
    if not (shards / "train/manifest.json").is_file() or not any((shards / s).is_dir() for s in ("known", "val")):
        parser.error(f"no shards in {shards}; expected train, and known or val, with trajectories")
    out = (options.out or ROOT / "runs/study-trajvit").resolve()

    def run(arm: str, lr: float, seed: int) -> dict[str, float]:
        return {**measure(train(out, shards, arm, seed, options.steps, lr), shards), "lr": lr}

    def hits(runs: list[dict[str, float]]) -> float:
        ways = ("image_to_text_5", "text_to_image_5")
        return statistics.mean(run[f"{validation(shards)} {way}"] for run in runs for way in ways)

    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            (arm, lr, seed): pool.submit(run, arm, lr, seed)
            for seed in options.seeds
            for arm in options.arms
            for lr in options.lr
        }
        results = {
            arm: max(([futures[arm, lr, seed].result() for seed in options.seeds] for lr in options.lr), key=hits)
            for arm in options.arms
        }
    text = report(results, options.steps)
    (out / "table.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    sys.exit(main())
