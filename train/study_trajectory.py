"""Trajectory tokens against grids: how many they are, and what comes back from them.

    python train/study_trajectory.py tokens [--video FILE...]   tokens against duration and camera motion; no training
    python train/study_trajectory.py decode --shards DIR        PSNR and bits of clips, beside a VidTok trained equally long
    python train/study_trajectory.py text --generator RUN/generator --codes DIR   does the drawn camera go where the text says?

`tokens` draws moving clips of which the truth is known (`tokgen.data.synthetic`), and reads real ones if any are given. `decode` takes
DIR/train and DIR/val, video shards with trajectories (see `tokenizers/trajectory.md`), trains `trajectory-tiny` and then diffusers'
`AutoencoderVidTok` for the same processor time, and writes a table and a film. Finished runs are kept. `text` takes a text-to-video generator and DIR/train
and DIR/known, its code shards. Options: --out, --steps, --seed, --merge.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import ROOT, SHARDS

from tokgen.files import write_json

# -- tokens -----------------------------------------------------------------------------------------------------------

DURATIONS = (8, 16, 32, 64)
SIZE = 160  # side of the tracker's pictures
PATCH, PICTURE = (2, 16, 16), 224  # of the space-time patch tokenizer: ViViT's, and TrajViT's baseline's
CLIPS = 6
CAMERAS = {"still": 0.0, "pan 2.5 px a frame": 2.5, "pan 6 px a frame": 6.0}


def patches(frames: int) -> int:
    return frames // PATCH[0] * (PICTURE // PATCH[1]) ** 2


def track(clips: list[np.ndarray], truths: list[Any] | None, merge: float) -> dict[str, float]:
    """Trajectories as many as the scene has (no budget), and how well they follow the objects."""
    from tokgen.trajectories.metrics import score_trajectories
    from tokgen.trajectories.voting import VotingTracker

    free = VotingTracker(size=SIZE, budget=None, merge=merge)
    found = [free(clip) for clip in clips]
    result = {"count": statistics.mean(f.count for f in found)}
    if truths is not None:
        scores = [score_trajectories(f.resized(*t.shape[1:]), t) for f, t in zip(found, truths)]
        result["tube"] = statistics.mean(s.tube_iou for s in scores)
        result["life"] = statistics.mean(s.life / f.shape[0] for s, f in zip(scores, found))
    return result


def moving(frames: int, pan: float) -> tuple[list[np.ndarray], list[Any]]:
    """Clips at a constant speed, however long; objects bounce off the borders."""
    from tokgen.data.synthetic import ClipSettings, Material, moving_clip
    from tokgen.trajectories.base import Trajectories

    material = Material.of_demo(SHARDS)
    settings = ClipSettings(frames=frames, size=256, pan=pan, moving_camera=float(pan > 0), cut=0.0)
    clips = [moving_clip(material, seed, settings) for seed in range(CLIPS)]
    return [c.frames for c in clips], [Trajectories(c.labels - 1) for c in clips]


def real(path: Path, frames: int) -> np.ndarray | None:
    """The first frames of a video; None if it has fewer."""
    from tokgen.data.video import open_video

    with open_video(path) as video:
        return None if len(video) < frames else video.get_frames(list(range(frames)))


def tokens(videos: list[Path], out: Path, merge: float) -> str:
    lines = [
        "| frames | space-time patches | " + " | ".join(f"camera {name}" for name in CAMERAS)
        + "".join(f" | {v.stem}" for v in videos) + " |",
        "|---|---|" + "---|" * (len(CAMERAS) + len(videos)),
    ]  # fmt: skip
    kept = out / f"tokens-{merge:g}.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for frames in DURATIONS:
        cells = []
        for name, pan in CAMERAS.items():
            key = f"{name}, {frames}"
            if key not in results:
                results[key] = track(*moving(frames, pan), merge)
                write_json(results, kept)
            r = results[key]
            cells.append(f"{r['count']:.0f} ({r['tube']:.2f})")
        for video in videos:
            key = f"{video.stem}, {frames}"
            if key not in results:
                clip = real(video, frames)
                results[key] = None if clip is None else track([clip], None, merge)
                write_json(results, kept)
            cells.append("" if results[key] is None else f"{results[key]['count']:.0f}")
        lines.append(f"| {frames} | {patches(frames)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# -- decode -----------------------------------------------------------------------------------------------------------

FRAMES = 8
BLOCK = 8
# 4 x 4 x 4 cells and 4,096 codes: bits of a clip close to those of trajectory-tiny
VIDTOK = {
    "ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "z_channels": 4, "double_z": False, "regularizer": "fsq",
    "codebook_size": 4096, "is_causal": False,
}  # fmt: skip
VIDTOK_BATCH, VIDTOK_LR = 4, 1e-3


def data(shards: Path, batch: int, seed: int) -> Any:
    from tokgen.data import ShardsDataModule

    module = ShardsDataModule(
        train=str(shards / "train"), val=str(shards / "val"), frames=FRAMES, image_size=64, batch_size=batch, seed=seed
    )
    module.setup("fit")
    return module


def train_ours(run: Path, shards: Path, steps: int, seed: int) -> float:
    """Processor seconds that training took."""
    finished = run / "finished.json"
    if not finished.is_file():
        run.mkdir(parents=True, exist_ok=True)
        words = [
            "fit", "-c", "tokenizers/trajectory-tiny.yaml", "-c", "train/cpu.yaml", "--run_dir", run, "--data.train", shards / "train",
            "--data.val", shards / "val", "--model.init_args.schedule.total_steps", steps, "--seed_everything", seed, "--data.seed", seed,
            "--trainer.val_check_interval", 250,
        ]  # fmt: skip
        print("$ tokgen", *words, flush=True)
        with open(run / "log.txt", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tokgen", *map(str, words)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"training failed; see {run / 'log.txt'}")
        write_json({"seconds": usage.ru_utime + usage.ru_stime}, finished)
    return json.loads(finished.read_text())["seconds"]


def train_vidtok(run: Path, shards: Path, seconds: float, seed: int) -> Any:
    """A VidTok that learned for so many processor seconds; the learning rate falls with them."""
    from diffusers import AutoencoderVidTok

    torch.manual_seed(seed)
    if (run / "config.json").is_file():
        return AutoencoderVidTok.from_pretrained(run).eval()
    model = AutoencoderVidTok(**VIDTOK).train()
    optimizer = torch.optim.AdamW(model.parameters(), VIDTOK_LR, betas=(0.9, 0.95), weight_decay=0.02, fused=True)
    module, begun, step = data(shards, VIDTOK_BATCH, seed), time.process_time(), 0
    while (spent := time.process_time() - begun) < seconds:
        for batch in module.train_dataloader():
            spent = time.process_time() - begun
            if spent >= seconds:
                break
            share = spent / seconds
            for group in optimizer.param_groups:
                group["lr"] = (
                    VIDTOK_LR * min(1, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
                )
            x = batch["pixels"].float().transpose(1, 2) / 127.5 - 1  # (B, 3, T, H, W)
            error = (model(x).sample - x).abs().mean()
            error.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                print(f"vidtok step {step}, {spent:.0f} of {seconds:.0f} s, l1 {error.item() / 2:.4f}", flush=True)
    model.save_pretrained(run)
    write_json({"steps": step, "seconds": seconds}, run / "training.json")
    return model.eval()


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of each clip, (B,)."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def frames_of(clip: torch.Tensor) -> np.ndarray:
    """float (T, 3, H, W) in [0, 1] as uint8 (T, H, W, 3)."""
    return (clip * 255).round().byte().permute(0, 2, 3, 1).numpy()


def block_means(clips: torch.Tensor) -> torch.Tensor:
    x = torch.nn.functional.avg_pool2d(clips.flatten(0, 1), BLOCK)
    x = (x * 255).round() / 255
    return x.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3).view_as(clips)


@torch.no_grad()
def decode(shards: Path, out: Path, steps: int, seed: int) -> str:
    import tokgen
    from tokgen.trajectories.base import Trajectories
    from tokgen.trajectories.picture import film, write_video

    torch.set_num_threads(1)
    seconds = train_ours(out / f"trajectory-{seed}", shards, steps, seed)
    with torch.enable_grad():
        vidtok = train_vidtok(out / f"vidtok-{seed}", shards, seconds, seed)
    ours = tokgen.load(out / f"trajectory-{seed}" / "tokenizer").eval()
    result: dict[str, list[float]] = {}

    def note(name: str, values: torch.Tensor) -> None:
        result.setdefault(name, []).extend(values.tolist())

    shown = None
    for batch in data(shards, 12, seed).val_dataloader():
        clips, valid = batch["pixels"].float() / 255, batch["valid"].bool()
        given = batch["trajectories"]
        tokens = ours.encode(clips, trajectories=given)
        decoded = ours.decode(tokens)
        note("ours", psnr(decoded, clips)[valid])
        note("ours bits", tokens.bits[valid])
        note("ours tokens", tokens.lengths.double()[valid])
        labels = ours.decode_labels(tokens)
        ranks, _ = ours.labels(clips, given)
        note("ours layout", (labels == ranks).flatten(1).double().mean(1)[valid])
        for n in range(1, ours.parts[2]):
            note(f"ours {n}", psnr(ours.decode_coarse(tokens, n), clips)[valid])
        for n in (8, 16, 32):
            if n < tokens.ids.shape[1]:
                note(f"first {n}", psnr(ours.decode(tokens.prefix(n)), clips)[valid])
        x = clips.transpose(1, 2) * 2 - 1
        note("vidtok", psnr((vidtok(x).sample.transpose(1, 2) / 2 + 0.5).clamp(0, 1), clips)[valid])
        cells = vidtok.encode(x)[1][0].numel()
        note("vidtok bits", torch.full((int(valid.sum()),), cells * math.log2(VIDTOK["codebook_size"])))
        note("blocks", psnr(block_means(clips), clips)[valid])
        means = clips.new_zeros(clips.shape)
        for b, clip in enumerate(
            clips
        ):  # one colour for each trajectory, with its true outline, whose bits are not counted
            index = ranks[b].clamp(min=-1) + 1
            big = index.repeat_interleave(64 // index.shape[-1], 1).repeat_interleave(64 // index.shape[-1], 2)
            flat, values = big.flatten(), clip.movedim(1, -1).reshape(-1, 3)
            sums = torch.zeros(int(flat.max()) + 1, 3).index_add_(0, flat, values)
            sums = sums / torch.bincount(flat, minlength=len(sums)).clamp(min=1)[:, None]
            means[b] = sums[flat].view(FRAMES, 64, 64, 3).movedim(-1, 1)
        note("means", psnr(means, clips)[valid])
        if shown is None:
            shown = clips[:6], ranks[:6], decoded[:6]
    films = [film(frames_of(c), Trajectories(x.numpy()), frames_of(d)) for c, x, d in zip(*shown)]
    write_video(np.concatenate(films, 1).repeat(2, 1).repeat(2, 2), out / "decoded.gif", 4.0)
    mean = {name: statistics.mean(values) for name, values in result.items()}
    write_json(mean | {"seconds": seconds}, out / "decode.json")
    bits = {"ours": mean["ours bits"], "vidtok": mean["vidtok bits"], "blocks": FRAMES * (64 // BLOCK) ** 2 * 24}
    rows = [
        ("trajectory tokens", "ours", bits["ours"]),
        *((f"… the first {n} of the appearance codes", f"ours {n}", None) for n in range(1, ours.parts[2])),
        *((f"… the first {n} trajectories", f"first {n}", None) for n in (8, 16, 32) if f"first {n}" in mean),
        ("VidTok, FSQ", "vidtok", bits["vidtok"]),
        ("8 x 8 block means", "blocks", bits["blocks"]),
        ("one colour a trajectory, true outlines (not counted)", "means", None),
    ]
    lines = ["| | PSNR | bits a clip |", "|---|---|---|"]
    lines += [f"| {name} | {mean[key]:.2f} dB | {'' if b is None else f'{b:,.0f}'} |" for name, key, b in rows]
    tail = f"{mean['ours tokens']:.1f} trajectories a clip, layout right {mean['ours layout']:.3f}; {seconds:.0f} processor seconds each"
    return "\n".join(lines) + f"\n\n{tail}"


# -- text -------------------------------------------------------------------------------------------------------------


def drift(codec: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How far the things of clips move to the right from frame to frame, a mean over their areas, (B,): against the camera."""
    e = codec.decode(ids[..., : len(codec.codebook_sizes)], FRAMES, mask)
    area = (e.sx * e.sy * e.fill * e.alive)[..., 1:]
    return (e.x.diff(dim=-1) * (e.alive[..., 1:] & e.alive[..., :-1]) * area).sum((1, 2)) / area.sum((1, 2))


@torch.no_grad()
def text_study(folder: Path, codes: Path, split: str, seed: int) -> str:
    """Bits a code by frequency alone, and whether drawn cameras pan to the side that their captions name: of the first 120
    clips of a split."""
    import tokgen
    from tokgen.data import ShardsDataModule
    from tokgen.nn.ellipses import EllipseCodec
    from tokgen.pretrained import read_config

    torch.set_num_threads(1)
    generator = tokgen.load(folder).eval()
    about = read_config(folder / generator.visual_tokenizer)["config"]
    codec = EllipseCodec(about["frames"], about["keys"], about["levels"])
    module = ShardsDataModule(train=str(codes / "train"), val=str(codes / split), batch_size=120, seed=seed)
    module.setup("fit")
    train, batch = list(module.train_dataloader()), next(iter(module.val_dataloader()))
    bits, n = 0.0, 0
    for c, size in enumerate(generator.codebook_sizes):
        counts = 0.1 + sum(torch.bincount(b["ids"][..., c][b["mask"]], minlength=size) for b in train)
        seen = batch["ids"][..., c][batch["mask"] & batch["valid"].bool()[:, None]]
        bits, n = bits - float((counts / counts.sum())[seen].log2().sum()), n + len(seen)
    lines = [
        f"{bits / n:.2f} bits a code by frequency, {sum(map(math.log2, generator.codebook_sizes)) / len(generator.codebook_sizes):.2f} uniform"
    ]
    ways = {"the camera pans left": 1, "the camera pans right": -1}
    rows = [i for i, caption in enumerate(batch["caption"]) if batch["valid"][i] and any(w in caption for w in ways)]
    captions = [batch["caption"][i] for i in rows]
    wanted = torch.tensor([next(sign for w, sign in ways.items() if w in c) for c in captions])
    true = drift(codec, batch["ids"][rows], batch["mask"][rows]).sign() == wanted
    lines.append(f"{int(true.sum())} of {len(rows)} true clips drift as their captions say")
    for scale in (1.0, 1.5, 3.0):
        drawn = generator.generate(captions, generator=seed, temperature=0.8, guidance_scale=scale)
        right = drift(codec, drawn.ids, drawn.mask).sign() == wanted
        lengths = drawn.lengths.double()
        lines.append(
            f"guidance {scale}: {int(right.sum())} of {len(rows)}; {lengths.mean():.1f} trajectories, "
            f"{int(lengths.min())} to {int(lengths.max())}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("tokens", "decode", "text"))
    parser.add_argument("--video", type=Path, nargs="*", default=[])
    parser.add_argument("--shards", type=Path, default=ROOT / "runs/moving-trajectories")
    parser.add_argument("--generator", type=Path, default=ROOT / "runs/trajectory-t2v-tiny/generator")
    parser.add_argument("--codes", type=Path, default=ROOT / "runs/moving-codes")
    parser.add_argument("--split", default="known", help="of --codes, whose captions are drawn")
    parser.add_argument("--merge", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/study-trajectory")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    if options.study == "tokens":
        text = tokens([v.resolve() for v in options.video], out, options.merge)
    elif options.study == "text":
        text = text_study(options.generator, options.codes, options.split, options.seed)
    else:
        text = decode(options.shards.resolve(), out, options.steps, options.seed)
    (out / f"{options.study}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
