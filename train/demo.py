"""`make demo`: train a tokenizer, then a text-to-image generator on its codes, and see what they draw.

Everything goes through the command line that users have; each command is printed before it runs. The demo trains on the
animals-and-nature part of the emoji shards at 32 px. Options: --out FOLDER, --tokenizer-steps N, --generator-steps N.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARDS = ROOT / "assets/demo/shards"
GROUP = "animals-nature"
SIZE = 32


def run(*arguments: object) -> float:
    """Run a tokgen command from the repository's root; returns the seconds it took."""
    words = [str(a) for a in arguments]
    print(f"\n$ tokgen {shlex.join(words)}", flush=True)
    started = time.time()
    done = subprocess.run([sys.executable, "-m", "tokgen", *words], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    return time.time() - started


def subset(folder: Path) -> None:
    """The part of the shards that the demo trains on, as shards of its own (bytes unchanged)."""
    from tokgen.data.decode import EXTENSIONS, MAX_MEMBER_BYTES, decode_json
    from tokgen.data.shards import Manifest, ShardWriter
    from tokgen.data.tar import iter_samples

    for split in ("train", "val"):
        with ShardWriter(folder / split, kind="images", meta={"group": GROUP}) as writer:
            for shard in Manifest.load(SHARDS / split).shards:
                with open(SHARDS / split / shard.name, "rb") as file:
                    for _, raw in iter_samples(file, extensions=EXTENSIONS, max_member_bytes=MAX_MEMBER_BYTES):
                        if decode_json(raw.members["json"]).get("group") == GROUP:
                            writer.write(raw.key, raw.members)


def train(out: Path, tokenizer_steps: int, generator_steps: int) -> dict[str, float]:
    """Train both models and encode the shards in between; returns seconds by stage."""
    seconds = {}
    model = "--model.init_args."
    seconds["tokenizer"] = run(
        "fit", "-c", "tokenizers/vqgan-tiny.yaml", "-c", "train/cpu.yaml", "--run_dir", out / "tokenizer-run",
        "--data.train", out / "shards/train", "--data.val", out / "shards/val", "--data.image_size", SIZE,
        f"{model}tokenizer.init_args.config.patch", 4,
        f"{model}tokenizer.init_args.config.quantizer", "{type: fsq, levels: [8, 5, 5, 5]}",
        f"{model}schedule.total_steps", tokenizer_steps, f"{model}schedule.warmup_steps", tokenizer_steps // 20,
        f"{model}loss.disc_train_from", tokenizer_steps * 7 // 10, f"{model}loss.disc_start", tokenizer_steps * 8 // 10,
        "--trainer.val_check_interval", max(tokenizer_steps // 3, 1), "--ema.decay", 0.99,
    )  # fmt: skip
    tokenizer = out / "tokenizer-run/tokenizer"
    for split in ("train", "val"):
        run("tokenize", out / "shards" / split, "--model", tokenizer, "--out", out / "codes" / split, "--size", SIZE)
    seconds["generator"] = run(
        "fit", "-c", "generators/token-shuffle-tiny.yaml", "-c", "train/cpu.yaml", "--run_dir", out / "generator-run",
        "--data.train", out / "codes/train", "--data.val", out / "codes/val", "--data.batch_size", 32, "--data.caption_variants", 0,
        f"{model}visual_tokenizer", tokenizer, f"{model}text.vocab_size", 768,
        f"{model}schedule.total_steps", generator_steps, f"{model}schedule.warmup_steps", generator_steps // 20,
        "--trainer.val_check_interval", max(generator_steps // 3, 1), "--ema.decay", 0.98,
        "--samples.prompts", "[cat face\\, 3d style, cherry blossom\\, flat style, octopus\\, noto style]",
    )  # fmt: skip
    return seconds


def report(out: Path, seconds: dict[str, float]) -> None:
    """Write the two grids and the table of figures."""
    import torch

    from tokgen.evaluation.reconstruction import evaluate_reconstruction, read_pictures
    from tokgen.evaluation.retrieval import evaluate_retrieval, feature_space
    from tokgen.generators.pipeline import TextToImagePipeline
    from tokgen.images import image_grid, to_uint8, write_png

    pipeline = TextToImagePipeline.from_pretrained(out / "generator-run/generator")
    known, captions, _ = read_pictures(out / "shards/train", SIZE)
    unseen, unseen_captions, _ = read_pictures(out / "shards/val", SIZE)

    tokenizer = pipeline.tokenizer
    held_out, seen = (evaluate_reconstruction(tokenizer, pixels) for pixels in (unseen, known))
    decoded = to_uint8(tokenizer.decode(tokenizer.encode(unseen[:8])))
    pairs = torch.cat([unseen[:8], decoded])
    write_png(
        image_grid(pairs.repeat_interleave(3, -1).repeat_interleave(3, -2), columns=8), out / "reconstruction.png"
    )

    started = time.time()
    drawn = to_uint8(pipeline(captions, output_type="pt", generator=0).images)
    rate = len(captions) * tokenizer.encode(known[:1]).ids.shape[1] / (time.time() - started)
    new = to_uint8(pipeline(unseen_captions, output_type="pt", generator=0).images)
    shown = torch.linspace(0, len(captions) - 1, 16).long()
    pictures = torch.cat([known[shown[:8]], drawn[shown[:8]], known[shown[8:]], drawn[shown[8:]]])
    write_png(
        image_grid(pictures.repeat_interleave(3, -1).repeat_interleave(3, -2), columns=8), out / "text-to-image.png"
    )

    # at 32 px ImageNet features do not recognise even the tokenizer's own reconstructions; pooled pixels do
    space = feature_space("pixels")
    references = torch.cat([known, unseen])
    kept = to_uint8(tokenizer.decode(tokenizer.encode(known)))
    ceiling = evaluate_retrieval(kept, references, torch.arange(len(known)), space)
    recall = evaluate_retrieval(drawn, references, torch.arange(len(known)), space)
    transfer = evaluate_retrieval(new, references, len(known) + torch.arange(len(unseen)), space)
    loss = [json.loads(line) for line in (out / "generator-run/metrics.jsonl").read_text().splitlines()]
    last = [row["train/loss"] for row in loss if "train/loss" in row][-1]
    rows = [
        ("tokenizer: PSNR, pictures it has seen / held out", f"{seen.psnr:.1f} / {held_out.psnr:.1f} dB"),
        ("tokenizer: codes in use, of all codes", f"{seen.usage:.0%} of {tokenizer.codebook_sizes[0]}"),
        ("tokenizer: tokens and bits a picture", f"{held_out.tokens:.0f}, {held_out.bits:.0f} bits"),
        ("generator: training loss at the end", f"{last:.2f} nats a code"),
        (
            "generator: recall (its own picture is the nearest)",
            f"{recall.top1:.0%} of {len(known)}, chance {recall.chance:.1%}",
        ),
        ("generator: the same for what the tokenizer keeps (ceiling)", f"{ceiling.top1:.0%}"),
        (
            "generator: unseen pairs of thing and style",
            f"{transfer.top1:.0%} of {len(unseen)}, chance {transfer.chance:.1%}",
        ),
        ("drawing", f"{rate:.0f} tokens/s, {len(captions)} pictures at once"),
        ("training time, tokenizer and generator", f"{seconds['tokenizer']:.0f} s, {seconds['generator']:.0f} s"),
    ]
    print(f"\nNearest pictures are found by {space[0]}.")
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
    print(table)
    (out / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{out / 'reconstruction.png'}: held-out pictures above, what 64 tokens keep of them below")
    print(f"{out / 'text-to-image.png'}: training pictures above, what their captions draw below")
    print(
        f'Draw: .venv/bin/tokgen sample "cat face, 3d style" --model {out / "generator-run/generator"} --scale 8 --out cat.png'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo-output")
    parser.add_argument("--tokenizer-steps", type=int, default=500)
    parser.add_argument("--generator-steps", type=int, default=500)
    options = parser.parse_args()
    out = options.out.resolve()
    for part in ("shards", "codes", "tokenizer-run", "generator-run"):
        shutil.rmtree(out / part, ignore_errors=True)
    subset(out / "shards")
    report(out, train(out, options.tokenizer_steps, options.generator_steps))


if __name__ == "__main__":
    main()
