"""Make short clips of the demo pictures, and motion shards of them, for `tokenizers/video-lavit-motion-tiny.yaml`.

    python assets/demo/motion_clips.py --out runs/demo-motion --clips 600

A clip is 4 seconds at 6 frames a second, 320 x 180: a camera pans and zooms over a photograph while one to four emoji cross
the picture, each with a speed, a swing and a growth of its own. Writes clips/{train,val}/NAME.mp4 with NAME.txt beside it,
and train/, val/ with the motion of each. Validation clips (a tenth as many) have photographs and emoji that training clips
never show: photos whose JSON says "val", and `shards/heldout`. The same seed gives the same clips.

    python assets/demo/motion_clips.py --out runs/demo-motion --measure runs/motion-tiny/tokenizer [--picture PNG]

measures a motion tokenizer on the validation clips: squared error of the maps, codes in use, and how well the frames after a
keyframe are predicted from it by `warp`. The picture has, for some clips, frames 0, 4, 8, 11: as they are, as true motion
predicts them, and as decoded motion does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import tokgen
from tokgen.data.motion import FRAMES, GROUP, METHODS, motion_map, motion_shards, read_clips
from tokgen.data.synthetic import cutout, photograph, read_pictures
from tokgen.images import image_grid, write_png
from tokgen.quantizers.base import usage_stats
from tokgen.tokenizers.video_lavit_motion import warp

SHARDS = Path(__file__).resolve().parent / "shards"
SIZE = (320, 180)  # width, height
EMOJI = {"train": "train", "val": "heldout"}


def camera(rng: np.random.Generator, photo: Image.Image) -> np.ndarray:
    """The part of the photograph that each frame shows: (FRAMES, 4), left, top, right, bottom."""
    aspect = SIZE[0] / SIZE[1]
    widest = min(photo.width, photo.height * aspect)
    width = np.exp(np.linspace(*np.log(widest * rng.uniform(0.5, 0.95, 2)), FRAMES))
    if rng.random() < 0.4:  # no zoom
        width[:] = width[0]
    height = width / aspect
    places = rng.uniform(0, 1, (2, 2)) if rng.random() < 0.8 else np.repeat(rng.uniform(0, 1, (1, 2)), 2, 0)  # no pan
    ease = np.linspace(0, 1, FRAMES)[:, None]
    ease = ease if rng.random() < 0.5 else ease * ease * (3 - 2 * ease)
    x, y = (places[0] * (1 - ease) + places[1] * ease).T
    left, top = x * (photo.width - width), y * (photo.height - height)
    return np.stack([left, top, left + width, top + height], 1)


def path(rng: np.random.Generator) -> np.ndarray:
    """Middle and side of an emoji in each frame: (FRAMES, 3), pixels."""
    t = np.arange(FRAMES) - FRAMES / 2
    middle = rng.uniform(0.2, 0.8, 2) * SIZE  # half-way through the clip
    speed = rng.normal(0, 4, 2)
    swing = rng.uniform(0, 16, 2) * (rng.random(2) < 0.5)
    phase, rate = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.15, 0.6)
    xy = middle + speed * t[:, None] + swing * np.sin(phase + rate * t[:, None])
    side = rng.uniform(36, 96) * np.exp(rng.normal(0, 0.015) * t)
    return np.concatenate([xy, side.clip(12, 160)[:, None]], 1)


def clip(rng: np.random.Generator, photos: list, emoji: list) -> tuple[list[Image.Image], str]:
    """Frames and caption."""
    data, about = photos[rng.integers(len(photos))]
    photo = photograph(data)
    chosen = [emoji[i] for i in rng.choice(len(emoji), rng.integers(1, 5), replace=False)]
    parts = [(cutout(e), path(rng)) for e, _ in chosen]
    frames = []
    for t, box in enumerate(camera(rng, photo)):
        frame = photo.transform(SIZE, Image.Transform.EXTENT, tuple(box), Image.Resampling.BILINEAR)
        for picture, track in parts:
            x, y, side = track[t]
            scaled = picture.resize((round(side), round(side)), Image.Resampling.BILINEAR)
            frame.paste(scaled, (round(x - side / 2), round(y - side / 2)), scaled)
        frames.append(frame)
    return frames, f"{', '.join(e['label'] for _, e in chosen)} over {about['caption']}"


def write(frames: list[Image.Image], file: Path) -> None:
    with av.open(str(file), "w") as out:
        # every picture on its own, at high quality: what is stored shall not decide what is found
        options = {"g": "1", "flags": "+qscale", "global_quality": str(118 * 3)}
        stream = out.add_stream("mpeg4", rate=6, options=options)
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_image(frame)))
        out.mux(stream.encode())


@torch.no_grad()
def measure(folder: Path, clips: Path, train: Path, method: str, picture: Path | None) -> None:
    """Print what a tokenizer keeps of the motion of the clips of a folder."""
    tokenizer = tokgen.load(folder)
    frames = [next(read_clips(file)).float() / 255 for file in sorted(clips.glob("*.mp4"))]
    size = frames[0].shape[-2:]
    maps = torch.stack([motion_map(METHODS[method]((255 * f).byte()), *size) for f in frames])  # (N, T, 2, h, w)
    tokens = [tokenizer.encode(part) for part in maps.split(4)]
    decoded = torch.cat([tokenizer.decode(part) for part in tokens])
    mean = torch.stack(training_maps(train)).mean((0, 1, 3, 4)).view(2, 1, 1)
    counts = torch.bincount(torch.cat([part.ids for part in tokens]).flatten(), minlength=tokenizer.codebook_sizes[0])
    means = F.adaptive_avg_pool3d(maps.transpose(1, 2), tokenizer.config.grid)  # a number for each code, not quantized
    means = F.interpolate(means, maps.shape[1:2] + maps.shape[3:], mode="trilinear").transpose(1, 2)
    guesses = {"zero": torch.zeros_like(maps), "mean of training": mean, "means over cells": means, "decoded": decoded}
    for name, guess in guesses.items():
        print(f"| squared error, {name} | {float((maps - guess).square().mean()):.3f} |")
    stats = usage_stats(counts)
    print(
        f"| codes in use | {float(stats['usage']):.0%} of {len(counts)}, perplexity {float(stats['perplexity']):.0f} |"
    )
    rows, psnr = [], {"keyframe": [], "true motion": [], "decoded motion": []}
    for i, clip_ in enumerate(frames):
        clip_, key = clip_[:GROUP], clip_[:1]
        guesses = {"keyframe": key.expand_as(clip_)}
        for name, motion in (("true motion", maps), ("decoded motion", decoded)):
            guesses[name] = warp(key, motion[i : i + 1, :GROUP])[0]
        for name, guess in guesses.items():
            psnr[name].append(-10 * (guess - clip_)[1:].square().mean((1, 2, 3)).log10().mean())
        if i % (len(frames) // 3) == 1:
            rows += [part[[0, 4, 8, 11]] for part in (clip_, guesses["true motion"], guesses["decoded motion"])]
    for name, values in psnr.items():
        print(f"| PSNR of frames 1 to {GROUP - 1}, {name} | {float(torch.stack(values).mean()):.2f} dB |")
    if picture is not None:
        write_png(image_grid(torch.cat(rows), 4), picture)


def training_maps(folder: Path) -> list[torch.Tensor]:
    from tokgen.data.datamodule import ShardsDataModule

    data = ShardsDataModule(val=str(folder), batch_size=32)
    return [motion for batch in data.val_dataloader() for motion in batch["motion"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-motion"))
    parser.add_argument("--clips", type=int, default=600, help="training clips; a tenth as many more for validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=sorted(METHODS), default="codec")
    parser.add_argument("--measure", type=Path, help="folder of a motion tokenizer: measure it, make nothing")
    parser.add_argument("--picture", type=Path, help="of --measure: a PNG to write")
    arguments = parser.parse_args()
    out, method = arguments.out, arguments.method
    if arguments.measure:
        return measure(arguments.measure, out / "clips/val", out / "train", method, arguments.picture)
    photos = read_pictures(SHARDS / "photos")
    for split, count in (("train", arguments.clips), ("val", max(1, arguments.clips // 10))):
        folder = out / "clips" / split
        folder.mkdir(parents=True, exist_ok=True)
        own, emoji = [p for p in photos if p[1]["split"] == split], read_pictures(SHARDS / EMOJI[split])
        started = time.time()
        for i in range(count):
            rng = np.random.default_rng([arguments.seed, split == "val", i])
            frames, caption = clip(rng, own, emoji)
            write(frames, folder / f"{i:05d}.mp4")
            (folder / f"{i:05d}.txt").write_text(caption + "\n", encoding="utf-8")
        print(f"{split}: {count} clips in {time.time() - started:.0f} s", flush=True)
        started = time.time()
        report = motion_shards(folder, out / split, method=method, progress=False)
        print(f"{split}: {report}, in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
