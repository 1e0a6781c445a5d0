"""Report cards of every tokenizer and generator on the demo data: train, measure, write `docs/cards`.

    python train/cards.py                        all of them
    python train/cards.py --only ibq seed        some, and the table of all that are there

The shipped demo models are measured as they are; the others are trained by their tiny recipes, some for fewer steps than these
say (see `CARDS`). Of each tokenizer come a card on pictures that training never showed (`val`), one on those that it
did, and the study of its codes as a language; of each generator one on captions of `val` and one on those of training. Finished runs are kept in --out, so
that an interrupted call goes on; all takes about seven hours of one core. Options: --out, --cards, --only, --learnability, --train-only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from study import ROOT, tokgen

MODEL = "--model.init_args."
TEACHER = Path("assets/demo/teacher")
SIZES = {"pictures": ["--size", 64], "clips": ["--frames", 8, "--size", 64], "motion": []}  # of data, by its kind


@dataclass(frozen=True)
class Card:
    """A model and what it learns from; `recipe` None is a shipped model, which `model` names."""

    recipe: str | None = None
    steps: int = 0  # 0: the recipe's own
    data: str = "pictures"
    tokenizer: str = ""  # of a generator: the card whose codes it learns
    model: str = ""
    needs: str = ""  # another card that is trained first


TOKENIZERS = {
    "vqgan": Card(model="assets/demo/tokenizer"),
    "ibq": Card("ibq-tiny"),
    "ett": Card("ett-tiny", needs="ibq"),
    "emu3": Card("emu3-tiny"),
    "tokenflow": Card("tokenflow-tiny"),
    "seed": Card("seed-tiny"),
    "lavit": Card("lavit-tiny"),
    "trajectory": Card("trajectory-tiny", 1600, data="clips"),
    "video-lavit-motion": Card("video-lavit-motion-tiny", data="motion"),
}
GENERATORS = {
    "token-shuffle": Card(model="assets/demo/generator", tokenizer="vqgan"),
    "llama": Card("llama-tiny", tokenizer="vqgan"),
    "arra": Card("arra-tiny", tokenizer="vqgan"),
    "tokenflow-t2i": Card("tokenflow-t2i-tiny", tokenizer="tokenflow"),
    "trajectory-t2v": Card("trajectory-t2v-tiny", 1000, tokenizer="trajectory", data="clips"),
}
CARDS = TOKENIZERS | GENERATORS


# -- what they are trained on -------------------------------------------------------------------------------------------


def prepare(out: Path, kind: str) -> Path:
    """The shards of a kind, `train` and `val`, made if they are not there."""
    demo, folder = Path("assets/demo"), out / kind
    if kind == "pictures":
        return demo / "shards"
    if not (folder / "finished").is_file():
        if kind == "motion":
            script(demo / "motion_clips.py", "--out", folder, "--clips", 200)
        else:
            moving = out / "moving"
            script(
                demo / "moving_clips.py", "--out", moving, "--clips", 1000, "--val", 60, "--size", 64, "--frames", 16
            )
            for split in ("train", "val"):
                tokgen(
                    "trajectories", moving / split, folder / split, "--source", "voting",
                    "--set", "size=64", "budget=32", "merge=16", "--size", 64, "--grid", 32,
                )  # fmt: skip
        (folder / "finished").touch()
    return folder


def script(path: Path, *arguments: object) -> None:
    words = [str(a) for a in arguments]
    print(f"$ python {path} {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, str(path), *words], check=True, stdout=subprocess.DEVNULL)


def codes(out: Path, name: str) -> Path:
    """Code shards of a tokenizer, `train` and `val`, with the teacher's embeddings of pictures."""
    card, folder = TOKENIZERS[name], out / name / "codes"
    embed = ["--embed", TEACHER] if card.data == "pictures" else []
    for split in ("train", "val"):
        source = prepare(out, card.data) / split
        options = [*SIZES[card.data], *embed]
        tokgen("tokenize", source, "--model", model_of(out, name), "--out", folder / split, *options)
    return folder


# -- training -----------------------------------------------------------------------------------------------------------


def model_of(out: Path, name: str) -> Path:
    card = CARDS[name]
    if card.recipe is None:
        return Path(card.model)
    return out / name / ("generator" if name in GENERATORS else "tokenizer")


def recipe_of(card: Card) -> Path:
    return Path("generators" if card.tokenizer else "tokenizers") / f"{card.recipe}.yaml"


def train(out: Path, name: str) -> None:
    card, run = CARDS[name], out / name
    if card.recipe is None or (run / "finished").is_file():
        return
    arguments: list[object] = [f"{MODEL}schedule.total_steps", card.steps] if card.steps else []
    if card.needs:
        train(out, card.needs)
        arguments += [f"{MODEL}init_from", model_of(out, card.needs)]
    if card.tokenizer:
        train(out, card.tokenizer)
        shards = codes(out, card.tokenizer)
        arguments += [f"{MODEL}visual_tokenizer", model_of(out, card.tokenizer), "--samples.count", 0]
    else:
        shards = prepare(out, card.data)
    run.mkdir(parents=True, exist_ok=True)
    started = time.time()
    tokgen(
        "fit", "-c", recipe_of(card), "-c", "train/cpu.yaml", "--run_dir", run, "--ckpt_path", "auto",
        "--data.train", shards / "train", "--data.val", shards / "val", "--trainer.val_check_interval", 200, *arguments,
        log=run / "log.txt",
    )  # fmt: skip
    (run / "finished").write_text(f"{time.time() - started:.0f}\n")


# -- measuring ----------------------------------------------------------------------------------------------------------


def measure(out: Path, cards: Path, name: str, learnability: str) -> None:
    card, target = CARDS[name], cards / name
    shards, options = prepare(out, card.data), SIZES[card.data]
    extractor = ["--extractor", "mobilenet" if card.data == "pictures" else "none"]
    text = ["--text_encoder", TEACHER] if card.data == "pictures" else []
    model = model_of(out, name)
    if name in GENERATORS:
        common = ["evaluate", "generator", model, "--tokenizer", model_of(out, card.tokenizer), *extractor, *text]
        some = ["--samples", 1000 if card.data == "pictures" else 60]
        once(target / "unseen", *common, "--data", shards / "val")
        once(target / "seen", *common, "--data", shards / "train", *some)
        return
    probe, some = (["--probe", "group"], ["--samples", 2000]) if card.data == "pictures" else ([], [])
    common = ["evaluate", "tokenizer", model, *options, *extractor]
    once(target / "unseen", *common, "--data", shards / "val", "--learnability", "none", *text)
    once(target / "seen", *common, "--data", shards / "train", *some, "--learnability", learnability, *probe)
    if not (target / "language/report.json").is_file():
        tokgen("analyze", codes(out, name) / "train", "--out", target / "language")


def once(target: Path, *arguments: object) -> None:
    """A card that is not there yet."""
    if not (target / "report.json").is_file():
        tokgen(*arguments, "--out", target)


# -- the page of all ----------------------------------------------------------------------------------------------------

HEAD = """# Report cards

Written by `python train/cards.py --learnability short`, on the demo data ([what it is](../../assets/demo/README.md)). Every figure stands in its card with the protocol that it was
measured by; `tokgen compare docs/cards/ibq/seen docs/cards/seed/seen` puts cards side by side.

**This is no ranking.** `vqgan` and `token-shuffle` are the shipped demo models; the others were trained by their tiny recipes, which differ in size and data, some for fewer steps
(the table says), one run each. What the methods do when trained alike, with seeds, is in [studies](../studies.md).

All figures of tokenizers are of `val` (205 pictures or 60 clips that training never showed), but for the probe and learnability, which are of 2,000 (all 1,000 clips) that it did; of several codebooks the mean. Frechet distances are in the features of
MobileNetV2. *Own caption is nearest*: the demo teacher looks for the captions of reconstructions, or drawings, among all of `val`; below the table, those of the pictures themselves. A dash is
what was not measured.
"""

GENERATORS_HEAD = """A picture, or clip, is drawn for each caption of `val`, and for 1,000 (60 clips) of training's. Those of pictures were trained until they know their few pictures by heart: what they draw of
training's captions is recall, and `val` names what they never saw, or not in that style. *Own caption is nearest*: among all that were drawn. *Bits that a caption saves*: of a whole reference; less than none where captions
mislead.
"""


def figure(report: dict[str, Any], group: str, name: str, form: str) -> str:
    value = report.get("figures", {}).get(group, {}).get(name)
    if value is None:
        return "–"
    return format(sum(value) / len(value) if isinstance(value, list) else value, form)


def read(path: Path) -> dict[str, Any]:
    return json.loads((path / "report.json").read_text()) if (path / "report.json").is_file() else {}


def overview(cards: Path) -> str:
    """The tables of all cards that are there."""
    tokenizers = (  # title, card, group, figure, format
        ("PSNR, dB", "unseen", "pixels", "psnr", ".2f"),
        ("SSIM", "unseen", "pixels", "ssim", ".3f"),
        ("Frechet distance", "unseen", "distribution", "frechet", ".1f"),
        ("own caption is nearest", "unseen", "text", "image_to_text", ".1%"),
        ("tokens", "unseen", "codes", "tokens", ".1f"),
        ("bits", "unseen", "codes", "bits", ".0f"),
        ("codes in use", "unseen", "codes", "usage", ".1%"),
        ("perplexity", "unseen", "codes", "perplexity", ".0f"),
        ("probe of the codes, 8 groups", "seen", "probe", "probe_of_codes", ".1%"),
        ("learned: bits a code", "seen", "learnability", "ar_bits_per_code", ".2f"),
    )
    generators = (
        ("Frechet distance", "unseen", "distribution", "frechet", ".1f"),
        ("own caption is nearest", "unseen", "text", "image_to_text", ".1%"),
        ("of training's", "seen", "text", "image_to_text", ".1%"),
        ("bits a code of the references", "unseen", "likelihood", "bits_per_code", ".2f"),
        ("of training's", "seen", "likelihood", "bits_per_code", ".2f"),
        ("bits that a caption saves", "unseen", "likelihood", "caption_gain", ".1f"),
        ("of training's", "seen", "likelihood", "caption_gain", ".1f"),
        ("drawing, s", "unseen", "speed", "seconds", ".3f"),
    )

    def truth(name: str) -> str:
        return figure(read(cards / name), "text", "image_to_text_of_references", ".1%")

    lines = [
        *(HEAD, "## Tokenizers", "", *_table(cards, TOKENIZERS, ("tokenizer", "steps"), tokenizers), ""),
        *(f"Of the pictures themselves: {truth('vqgan/unseen')}.", "", "## Generators", "", GENERATORS_HEAD),
        *(*_table(cards, GENERATORS, ("generator", "steps", "codes of"), generators), ""),
        f"Own caption is nearest, of the pictures themselves: {truth('token-shuffle/unseen')}; of training's, "
        f"{truth('token-shuffle/seen')}.",
    ]
    return "\n".join(lines) + "\n"


def _table(cards: Path, of: dict[str, Card], first: tuple[str, ...], columns: tuple[tuple[str, ...], ...]) -> list[str]:
    """A row for each model that has a card."""
    titles = [*first, *(title for title, *_ in columns), "cards"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, card in of.items():
        reports = {kind: read(cards / name / kind) for kind in ("unseen", "seen")}
        if not any(reports.values()):
            continue
        row = [figure(reports[kind], group, key, form) for _, kind, group, key, form in columns]
        found = [what for what in ("unseen", "seen", "language") if (cards / name / what / "report.md").is_file()]
        links = ", ".join(f"[{what}]({name}/{what}/report.md)" for what in found)
        lines.append("| " + " | ".join([*[name, _steps(card), card.tokenizer][: len(first)], *row, links]) + " |")
    return lines


def _steps(card: Card) -> str:
    """Those that it was trained for, in all its stages."""
    if card.recipe is None:
        return "shipped"
    model = yaml.safe_load((ROOT / recipe_of(card)).read_text())["model"]["init_args"]
    whole = sum(stage["steps"] for stage in model["stages"]) if "stages" in model else model["schedule"]["total_steps"]
    return f"{card.steps} of {whole}" if card.steps else str(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/cards"), help="where runs and codes go")
    parser.add_argument("--cards", type=Path, default=Path("docs/cards"), help="where cards go")
    parser.add_argument("--only", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--learnability", choices=("short", "none"), default="none", help="minutes of one core each")
    parser.add_argument("--train-only", action="store_true", help="train, and measure another time")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # so that cards name what anybody has
    out = arguments.out
    for name in arguments.only:
        train(out, name)
        if not arguments.train_only:
            measure(out, arguments.cards, name, arguments.learnability)
    if not arguments.train_only:
        page = arguments.cards / "README.md"
        page.write_text(overview(arguments.cards))
        print(f"\n{page}")


if __name__ == "__main__":
    main()
