"""Make video shards of clips of which everything is known: emoji moving over photographs, see `tokgen.data.synthetic`.

    python assets/demo/moving_clips.py --out runs/moving --clips 600 --val 60 --size 64 --frames 16

writes train/, val/ and, with --known, known/: KEY.mp4, KEY.txt (what moves where) and KEY.json (the scenes, and a caption
that also says over what). Photographs and emoji of val are never shown in train. known has the photographs of val, and emoji
that train shows in another style: their names are known, their pictures are not. The same seed gives the same clips. --truth
adds KEY.traj.npy, the true trajectories: every object, and the background of each scene.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from tokgen.data.shards import ShardWriter
from tokgen.data.synthetic import ClipSettings, Material, moving_clip
from tokgen.trajectories.picture import mp4_bytes

SHARDS = Path(__file__).resolve().parent / "shards"
EMOJI = {"train": "train", "val": "heldout", "known": "val"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/moving"))
    parser.add_argument("--clips", type=int, default=600, help="in train")
    parser.add_argument("--val", type=int, default=60, help="in val: emoji and photographs that train does not have")
    parser.add_argument("--known", type=int, default=0, help="in known: emoji that train has in another style")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--fps", type=float, default=8.0, help="of the files")
    parser.add_argument("--objects", type=int, nargs=2, default=(1, 3), help="fewest and most in a scene")
    parser.add_argument("--object-size", type=float, nargs=2, default=(0.25, 0.42), help="sides of the picture")
    parser.add_argument("--speed", type=float, default=6.0, help="of objects, pixels a frame in a picture of 256")
    parser.add_argument("--pan", type=float, default=2.5, help="of cameras, the same")
    parser.add_argument("--cut", type=float, default=0.15, help="the chance that a clip has a cut")
    parser.add_argument("--noise", type=float, default=2.0, help="standard deviation, of 255")
    parser.add_argument("--truth", action="store_true", help="write the true trajectories too")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = ClipSettings(
        frames=arguments.frames, size=arguments.size, objects=tuple(arguments.objects),
        object_size=tuple(arguments.object_size), speed=arguments.speed, pan=arguments.pan, cut=arguments.cut,
        noise=arguments.noise,
    )  # fmt: skip
    meta = {"captions": True, "source": {"folder": "moving", "seed": arguments.seed, **vars(settings)}}
    if arguments.truth:
        grid = [settings.size, settings.size]
        truth = {"source": {"type": "truth"}, "size": settings.size, "resize": "crop", "grid": grid, "fps": None}
        meta["trajectories"] = truth
    for number, (split, emoji) in enumerate(EMOJI.items()):
        count = {"train": arguments.clips, "val": arguments.val, "known": arguments.known}[split]
        if not count:
            continue
        started = time.time()
        material = Material.of_demo(SHARDS, emoji, "train" if split == "train" else "val")
        with ShardWriter(arguments.out / split, kind="videos", meta=meta, max_samples=200) as writer:
            for i in range(count):
                clip = moving_clip(material, [arguments.seed, number, i], settings)
                members = {
                    "mp4": mp4_bytes(clip.frames, arguments.fps, crf=12),
                    "txt": clip.caption,
                    "json": clip.facts,
                }
                if arguments.truth:
                    mask, _ = clip.trajectories().to_sidecar()  # each label plus one
                    members["traj.npy"] = np.ascontiguousarray(mask)
                writer.write(f"{i:05d}", members)
        print(
            f"{split}: {count} clips, {writer.manifest.bytes / 2**20:.1f} MB, {time.time() - started:.0f} s", flush=True
        )


if __name__ == "__main__":
    main()
