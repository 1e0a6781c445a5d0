"""Studies of codebooks on the demo data: the same recipe with one thing changed, one table.

    python train/study_codebooks.py tokenflow   one index for two codebooks against pixels alone, meaning alone, and two indices
    python train/study_codebooks.py t2i         next-scale drawing with a tokenizer of the study before: one pass and several
    python train/study_codebooks.py ibq         index backpropagation against VQ and SimVQ at 1,024, 16,384 and 131,072 codes

Every arm trains through `tokgen fit`. Finished runs are kept, so that an interrupted study goes on. Options: --out, --seeds,
--steps, --jobs (runs at a time, one thread each).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from study import ROOT, tokgen
from study_tokenizers import COLUMNS, CONFIG, TEACHER, UNSEEN, pictures, retrieval, rows, table, train_all, write_rows

QUANTIZER = f"{CONFIG}quantizer."
STEPS = ["--model.init_args.schedule.total_steps"]

# -- TokenFlow --------------------------------------------------------------------------------------------------------

TOKENFLOW_ARMS = {  # what a codebook of one stream knows of the other is read off by a decoder that does not train it
    "one index": [],
    "pixels alone": [f"{CONFIG}semantic_dim", "0"],
    "meaning alone": [f"{CONFIG}pixel_dim", "0"],
    "two indices": [f"{QUANTIZER}index", "separate"],
    "two indices of 5 bits": [f"{QUANTIZER}index", "separate", f"{QUANTIZER}codebook_size", "32"],  # equal bits
}


@torch.no_grad()
def measure_tokenflow(run: Path) -> dict[str, float]:
    """Pixels, meaning (the rebuilt features in the teacher's place, and a linear probe on the code vectors), and usage."""
    import tokgen as package
    from tokgen.evaluation.reconstruction import evaluate_reconstruction

    torch.set_num_threads(1)
    tokenizer, teacher = package.load(run / "tokenizer"), package.load(TEACHER)
    result: dict[str, float] = {}
    vectors, groups = {}, {}
    for split in ("train", *UNSEEN):
        pixels, captions, about = pictures(split)
        tokens = [tokenizer.encode(part) for part in pixels.split(128)]
        vectors[split] = torch.cat([tokenizer.embeddings(part).flatten(1) for part in tokens])  # (n, M code_dim)
        groups[split] = [entry["group"] for entry in about]
        if split == "train":
            result |= scale_usage(tokenizer, torch.cat([part.ids for part in tokens]))
            continue
        rebuilt = torch.cat([tokenizer.decode_features(part) for part in tokens])
        result[f"{split} cosine"] = torch.cosine_similarity(rebuilt, teacher.features(pixels), dim=-1).mean().item()
        embedded = teacher.image_projection(rebuilt.mean(1))
        result |= retrieval(split, embedded, teacher.encode_text(captions))
        report = evaluate_reconstruction(tokenizer, pixels)
        result |= {
            f"{split} psnr": report.psnr,
            "bits": report.bits,
            "ids": report.tokens * len(tokenizer.codebook_sizes),
        }
    names = sorted(set(groups["train"]))
    labels = {split: torch.tensor([names.index(g) for g in of_split]) for split, of_split in groups.items()}
    for split in UNSEEN:
        result[f"{split} probe"] = probe(vectors["train"], labels["train"], vectors[split], labels[split])
    return result


def probe(x: torch.Tensor, labels: torch.Tensor, unseen: torch.Tensor, truth: torch.Tensor) -> float:
    """Accuracy of ridge regression onto the eight groups of emoji; the penalty is 1 % of the mean variance times n."""
    mean = x.mean(0)
    x, unseen = (x - mean).double(), (unseen - mean).double()
    target = torch.nn.functional.one_hot(labels).double()
    gram = x.T @ x
    gram += torch.eye(len(gram)) * 0.01 * gram.diagonal().mean()
    weights = torch.linalg.solve(gram, x.T @ (target - target.mean(0)))
    return ((unseen @ weights + target.mean(0)).argmax(1) == truth).double().mean().item()


def scale_usage(tokenizer: Any, ids: torch.Tensor) -> dict[str, float]:
    """Share of the codes that occur, over all scales and at each."""
    ids = ids if ids.ndim == 3 else ids[..., None]  # (n, N, C)
    sizes = tokenizer.codebook_sizes
    used = lambda part: statistics.mean(len(part[..., c].unique()) / k for c, k in enumerate(sizes))  # noqa: E731
    result, start = {"usage": used(ids)}, 0
    for side in tokenizer.config.scales:
        result[f"usage {side}"] = used(ids[:, start : start + side * side])
        start += side * side
    return result


def draw_scales(run: Path, out: Path) -> None:
    """Unseen pictures, and below them what the codes of the first scale decode to, of the first two, and so on."""
    import tokgen as package

    tokenizer = package.load(run / "tokenizer")
    shown = torch.cat([pictures(split)[0][:4] for split in UNSEEN])
    tokens = tokenizer.encode(shown)
    write_rows(out / "scales.png", shown, *[tokenizer.decode(tokens.prefix(n)) for n in tokens.layout.prefixes()])


def study_tokenflow(out: Path, seeds: list[int], steps: int, jobs: int) -> str:
    import tokgen as package

    runs = train_all(out, "tokenflow-tiny", TOKENFLOW_ARMS, seeds, jobs, [*STEPS, str(steps)])
    results = {name: [measure_tokenflow(runs[name, s]) for s in seeds] for name in TOKENFLOW_ARMS}
    draw_scales(runs["one index", seeds[0]], out)
    teacher, of_teacher = package.load(TEACHER), {}
    for split in UNSEEN:
        pixels, captions, _ = pictures(split)
        with torch.no_grad():
            of_teacher |= retrieval(split, teacher.embed(pixels), teacher.encode_text(captions))
    columns = {}
    for split in UNSEEN:
        columns |= {
            f"{split}: pixels, dB": (f"{split} psnr", 1, ".2f", ""),
            "cosine to the teacher": (f"{split} cosine", 1, ".3f", ""),
            "picture to caption, R@1": (f"{split} image_to_text", 100, ".1f", " %"),
            "R@5": (f"{split} image_to_text_5", 100, ".1f", " %"),
            "linear probe": (f"{split} probe", 100, ".1f", " %"),
        }
        columns = {k if k.startswith(UNSEEN) else f"{split}: {k}": v for k, v in columns.items()}
    columns |= {"ids a picture": ("ids", 1, ".0f", ""), "bits": ("bits", 1, ".0f", "")}
    sides = [int(key.split()[1]) for key in results["one index"][0] if key.startswith("usage ")]
    usage = {"all scales": ("usage", 100, ".1f", " %")} | {
        f"{side} x {side}": (f"usage {side}", 100, ".1f", " %") for side in sides
    }
    line = ", ".join(f"{s} {100 * of_teacher[f'{s} image_to_text']:.1f} %" for s in UNSEEN)
    return "\n\n".join([table(results, columns), f"the teacher itself, R@1: {line}", table(results, usage)])


# -- TokenFlow's generator --------------------------------------------------------------------------------------------

MODEL = "--model.init_args."
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "one pass": {"temperature": 1.0},
    "two passes": {"temperature": 1.0, "passes": ((1, 1.0),)},
    "three passes": {"temperature": 1.0, "passes": ((100, 0.8), (1, 1.0))},
}


def study_t2i(out: Path, seeds: list[int], steps: int, jobs: int) -> str:
    """`tokenflow-t2i-tiny` on the 443 pictures that `make demo` draws."""
    import demo

    tokenizer = out.parent / "study-tokenflow" / f"one-index-{seeds[0]}" / "tokenizer"
    run = out / "run"
    if not (run / "finished").is_file():
        demo.subset(out / "shards")
        for split in ("train", "val"):
            tokgen(
                "tokenize", out / "shards" / split, "--model", tokenizer, "--size", 64, "--out", out / "codes" / split
            )
        tokgen(
            "fit", "-c", "generators/tokenflow-t2i-tiny.yaml", "-c", "train/cpu.yaml", "--run_dir", run, "--ckpt_path", "auto",
            "--data.train", out / "codes/train", "--data.val", out / "codes/val", "--data.batch_size", 16,
            f"{MODEL}visual_tokenizer", tokenizer, f"{MODEL}text.vocab_size", 768, f"{MODEL}schedule.total_steps", steps,
            f"{MODEL}schedule.warmup_steps", steps // 20, "--ema.decay", 0.98, "--trainer.val_check_interval", steps // 2,
            log=out / "log.txt",
        )  # fmt: skip
        (run / "finished").touch()
    return measure_t2i(run / "generator", out)


@torch.no_grad()
def measure_t2i(generator: Path, out: Path) -> str:
    from tokgen.evaluation.reconstruction import read_pictures
    from tokgen.evaluation.retrieval import evaluate_retrieval, feature_space
    from tokgen.generators.pipeline import TextToImagePipeline
    from tokgen.images import to_uint8

    torch.set_num_threads(1)
    pipeline = TextToImagePipeline.from_pretrained(generator)
    tokenizer, space = pipeline.tokenizer, feature_space("pixels")
    known, captions, _ = read_pictures(out / "shards/train")
    unseen, unseen_captions, _ = read_pictures(out / "shards/val")
    references, targets = torch.cat([known, unseen]), torch.arange(len(known))

    def found(drawn: torch.Tensor, targets: torch.Tensor) -> str:
        return f"{100 * evaluate_retrieval(to_uint8(drawn), references, targets, space).top1:.1f} %"

    kept = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in known.split(128)])
    lines = ["| | training captions | unseen pairs | s a picture |", "|---|---|---|---|"]
    lines.append(f"| what the tokenizer keeps | {found(kept, targets)} | | |")
    for name, settings in WAYS.items():
        started = time.time()
        drawn = pipeline(captions, output_type="pt", generator=0, **settings).images
        seconds = (time.time() - started) / len(captions)
        new = pipeline(unseen_captions, output_type="pt", generator=0, **settings).images
        row = (found(drawn, targets), found(new, len(known) + torch.arange(len(unseen))), f"{seconds:.3f}")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    shown = torch.linspace(0, len(known) - 1, COLUMNS).long()
    texts = [captions[i] for i in shown]
    tokens = pipeline.generator.generate(texts, generator=0, temperature=0.0)
    write_rows(out / "drawn.png", known[shown], *tokenizer.progressive(tokens))
    return "\n".join([f"nearest pictures by {space[0]}, of {len(references)}", "", *lines])


# -- IBQ --------------------------------------------------------------------------------------------------------------

CODEBOOKS = (1024, 16384, 131072)
VECTORS = 16 * 64  # of a batch
IBQ_ARMS: dict[str, dict[str, Any]] = {
    "IBQ": {},
    "VQ": {"type": "vq"},
    "VQ, revived": {"type": "vq", "kmeans_init": True},
    "SimVQ": {"type": "simvq"},
}


def ibq_arms() -> dict[str, list[str]]:
    arms = {}
    for codes in CODEBOOKS:
        for name, options in IBQ_ARMS.items():
            if options.get("kmeans_init"):  # below a hundredth of what uniform use would give
                options = {**options, "revive_below": 0.01 * VECTORS / codes}
            whole = [f"{CONFIG}quantizer", json.dumps({**options, "codebook_size": codes})]
            arms[f"{name} {codes}"] = whole if options else [f"{QUANTIZER}codebook_size", str(codes)]
    return arms


def measure_ibq(run: Path) -> dict[str, float]:
    import tokgen as package
    from tokgen.evaluation.reconstruction import evaluate_reconstruction

    torch.set_num_threads(1)
    tokenizer = package.load(run / "tokenizer")
    pixels = torch.cat([pictures(split)[0] for split in UNSEEN])
    ids = torch.cat([tokenizer.encode(part).ids.flatten() for part in pictures("train")[0].split(256)])
    size = tokenizer.codebook_sizes[0]
    seconds = [16 / row["train/samples_per_second"] for row in rows(run) if "train/samples_per_second" in row]
    return {
        "psnr": evaluate_reconstruction(tokenizer, pixels).psnr,
        "codes": len(ids.unique()),
        "usage": len(ids.unique()) / size,
        "possible": min(1.0, len(ids) / size),
        "seconds": statistics.median(seconds),
    }


def study_ibq(out: Path, seeds: list[int], steps: int, jobs: int) -> str:
    arms = ibq_arms()
    runs = train_all(out, "ibq-tiny", arms, seeds, jobs, [*STEPS, str(steps)])
    results = {name: [measure_ibq(runs[name, s]) for s in seeds] for name in arms}
    columns = {
        "pixels, dB": ("psnr", 1, ".2f", ""),
        "codes used": ("codes", 1, ".0f", ""),
        "share": ("usage", 100, ".1f", " %"),
        "s a step": ("seconds", 1, ".3f", ""),
    }
    return table(results, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    studies = {"tokenflow": (study_tokenflow, [0, 1], 1200), "t2i": (study_t2i, [0], 500), "ibq": (study_ibq, [0], 150)}
    parser.add_argument("study", choices=studies)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    out = (options.out or ROOT / "runs" / f"study-{options.study}").resolve()
    study, seeds, steps = studies[options.study]
    text = study(out, options.seeds or seeds, options.steps or steps, options.jobs)
    (out / "table.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    sys.exit(main())
