"""Trajectories on a CPU: quality and cost of the voting tracker beside supervoxels and frame-by-frame segments.

python -m tests.benchmarks.bench_trajectories [--video FILE] prints the whole table, or the tracker's cost on a video of one's
own. Costs are milliseconds of one core a frame (`time.process_time`, one thread), whatever else the machine does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from tokgen.data.video import open_video
from tokgen.trajectories.base import Trajectories
from tokgen.trajectories.flow import FlowEstimator, carried, one_thread
from tokgen.trajectories.metrics import score_trajectories
from tokgen.trajectories.voting import VotingTracker

FRAMES = 24
# seed, speed of the objects and of the camera in pixels a frame
BASE = (
    {"seed": 0, "speed": 4.0, "pan": 1.5},
    {"seed": 1, "speed": 6.0, "pan": 3.0},
    {"seed": 2, "speed": 2.0, "pan": 0.5},
)
HARDER = {
    "slow (1 px, camera .3)": {"seed": 3, "speed": 1.0, "pan": 0.3},
    "fast (9 px, camera 5)": {"seed": 3, "speed": 9.0, "pan": 5.0},
    "25 % flicker, noise of 6": {"seed": 3, "light": 0.25, "noise": 6.0},
    "camera only": {"seed": 3, "speed": 0.0, "pan": 2.0},
}


# ------------------------------------------------------------------------------------------------------------- the clips


def photo(name: str, shape: tuple[int, int]) -> np.ndarray:
    """A photograph of scikit-image, uint8 (H, W, 3)."""
    import skimage.data
    from skimage.transform import resize

    picture = getattr(skimage.data, name)()
    picture = picture[..., :3] if picture.ndim == 3 else np.stack([picture] * 3, -1)
    return (resize(picture, shape, anti_aliasing=True) * 255).astype(np.uint8)


def outline(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """A shape in a square of side n, bool (n, n)."""
    y, x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j]
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    if kind == "blob":
        phase, depth = rng.uniform(0, 6.28, 4), rng.uniform(0.03, 0.12, 4)
        return radius < 0.75 + sum(depth[k] * np.cos((k + 2) * angle + phase[k]) for k in range(4))
    return {
        "disk": radius < 0.95,
        "star": radius < 0.6 + 0.33 * np.cos(5 * angle),
        "square": (abs(x) < 0.7) & (abs(y) < 0.7),
        "ring": (radius < 0.95) & (radius > 0.45),
        "bar": (abs(x) < 0.95) & (abs(y) < 0.35),
    }[kind]


def sprites(
    size: int,
    frames: int = FRAMES,
    seed: int = 0,
    speed: float = 4.0,
    pan: float = 1.5,
    light: float = 0.0,
    noise: float = 2.0,
) -> tuple[np.ndarray, Trajectories]:
    """Six textured shapes that move, turn, grow, bounce and hide one another over a panned photograph; the last comes in from
    the left. Frames uint8 (T, S, S, 3), and the objects."""
    import cv2

    rng = np.random.default_rng(seed)
    background = photo("astronaut", (size + 140, size + 140))
    things = []
    for k, (kind, texture) in enumerate(
        zip(
            ("disk", "star", "square", "blob", "bar", "ring"),
            ("chelsea", "coffee", "rocket", "brick", "grass", "retina"),
        )
    ):
        n = int(rng.integers(size // 6, size // 3))
        picture, mask = photo(texture, (n, n)), outline(kind, n, rng)
        start, heading = rng.uniform(size * 0.15, size * 0.85, 2), rng.uniform(0, 6.28)
        step = speed * rng.uniform(0.5, 1.3) * np.array([np.cos(heading), np.sin(heading)])
        if k == 5:
            start, step = np.array([-n * 0.6, size * rng.uniform(0.3, 0.7)]), np.array([speed * 1.2, 0.2])
        things.append((picture, mask, n, start, step, rng.uniform(-2.5, 2.5), rng.uniform(-0.008, 0.012)))

    video, truth = np.zeros((frames, size, size, 3), np.uint8), np.full((frames, size, size), -1, np.int32)
    low, high = size * 0.08, size * 0.92
    for t in range(frames):
        shift = np.float32(
            [[1, 0, -(70 + pan * t - pan * frames / 2)], [0, 1, -(70 + 0.5 * pan * t - 0.25 * pan * frames)]]
        )
        frame = cv2.warpAffine(background, shift, (size, size), borderMode=cv2.BORDER_REFLECT).astype(np.float32)
        for k, (picture, mask, n, start, step, turn, growth) in enumerate(things):
            place = start + step * t
            if k < 5:
                place = low + np.abs((place - low) % (2 * (high - low)))
                place = np.where(place > high, 2 * high - place, place)
            pose = cv2.getRotationMatrix2D((n / 2, n / 2), turn * t, 1 + growth * t)
            pose[:, 2] += place - n / 2
            alpha = cv2.warpAffine(mask.astype(np.uint8) * 255, pose, (size, size))
            part = (alpha / 255.0)[..., None]
            frame = frame * (1 - part) + cv2.warpAffine(picture, pose, (size, size)) * part
            truth[t][alpha > 127] = k
        frame = frame * (1 + light * np.sin(t / 4)) + rng.normal(0, noise, frame.shape)
        video[t] = frame.clip(0, 255).astype(np.uint8)
    return video, Trajectories(truth)


def with_cut(size: int) -> tuple[np.ndarray, Trajectories]:
    """Twelve frames of one clip, then twelve of another, mirrored and dimmed: twelve objects share the budget."""
    (a, of_a), (b, of_b) = sprites(size, FRAMES // 2, seed=4), sprites(size, FRAMES // 2, seed=5)
    later = of_b.labels[:, :, ::-1]
    video = np.concatenate([a, b[:, :, ::-1] // 2 + 60])
    return video, Trajectories(np.concatenate([of_a.labels, np.where(later >= 0, later + 6, -1)]))


# ------------------------------------------------------------------------------------------------------------- the peers


def supervoxels(n: int) -> Callable[[np.ndarray], Trajectories]:
    """SLIC over space-time."""
    from skimage.segmentation import slic

    return lambda video: Trajectories(
        slic(video, n_segments=n, compactness=10.0, start_label=0, max_num_iter=5, channel_axis=-1)
    )


def matched(segment: Callable[[np.ndarray], np.ndarray], least: float = 0.3) -> Callable[[np.ndarray], Trajectories]:
    """Each frame's segments, one to one with those of the frame before that flow carries to them, the best IoU first."""

    def track(video: np.ndarray) -> Trajectories:
        flow, out, count, before = FlowEstimator(), [], 0, None
        for frame in video:
            grey = (frame @ np.float32([0.299, 0.587, 0.114])).astype(np.uint8)
            now = segment(frame)
            n = int(now.max()) + 1
            ids = np.full(n, -1)
            if before is not None:
                place, _ = carried(flow(grey, before), np.zeros((*grey.shape, 2)))
                joint = np.bincount((now * count + out[-1].ravel()[place]).ravel(), minlength=n * count).reshape(
                    n, count
                )
                iou = joint / np.maximum(joint.sum(1, keepdims=True) + joint.sum(0) - joint, 1)
                taken = np.zeros(count, bool)
                for entry in np.argsort(-iou, axis=None, kind="stable")[: 4 * n]:
                    i, j = divmod(int(entry), count)
                    if iou[i, j] < least:
                        break
                    if ids[i] < 0 and not taken[j]:
                        ids[i], taken[j] = j, True
            fresh = ids < 0
            ids[fresh] = count + np.arange(int(fresh.sum()))
            count = max(count, int(ids.max()) + 1)
            out.append(ids[now])
            before = grey
        return Trajectories(np.stack(out))

    return track


def peers() -> dict[str, Callable[[np.ndarray], Trajectories]]:
    from skimage.segmentation import felzenszwalb, slic

    return {
        "SLIC supervoxels, n=200": supervoxels(200),
        "SLIC supervoxels, n=600": supervoxels(600),
        "SLIC-96 a frame, matched": matched(
            lambda f: slic(f, n_segments=96, compactness=10.0, start_label=0, max_num_iter=5).astype(np.int64)
        ),
        "Felzenszwalb a frame, matched": matched(
            lambda f: felzenszwalb(f, scale=150, sigma=0.8, min_size=80).astype(np.int64)
        ),
    }


# ----------------------------------------------------------------------------------------------------------- the measure


def measure(source: Callable, clips: list[tuple[np.ndarray, Trajectories]]) -> dict[str, float]:
    """Means over clips: of `TrajectoryScores`, and "ms", of one core, a frame."""
    rows = []
    with one_thread():
        for video, truth in clips:
            started = time.process_time()
            found = source(video)
            ms = (time.process_time() - started) / len(video) * 1e3
            rows.append({**vars(score_trajectories(found, truth)), "ms": ms})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def table() -> str:
    lines = [
        "| method | ms a frame | trajectories | life of 24 | ASA | frame IoU | tube IoU | MBO |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(name: str, source: Callable, clips: list) -> None:
        m = measure(source, clips)
        lines.append(
            f"| {name} | {m['ms']:.0f} | {m['count']:.0f} | {m['life']:.1f} | {m['asa']:.3f} | {m['frame_iou']:.3f} "
            f"| **{m['tube_iou']:.3f}** | {m['mbo']:.3f} |"
        )

    clips = {size: [sprites(size, **settings) for settings in BASE] for size in (256, 160)}
    VotingTracker()(clips[160][0][0][:2])  # what is loaded once
    for name, source in peers().items():
        row(f"{name}, 256 px", source, clips[256])
    for size in (256, 160):
        for budget in (None, 128, 64, 32):
            row(f"voting, {size} px, budget {budget}", VotingTracker(size=size, budget=budget), clips[size])
    for name, settings in HARDER.items():
        for size in (256, 160):
            row(f"voting, {size} px, 128: {name}", VotingTracker(size=size), [sprites(size, **settings)])
    for size in (256, 160):
        row(f"voting, {size} px, 128: a cut in the middle", VotingTracker(size=size), [with_cut(size)])
    return "\n".join(lines)


def of_video(path: str, frames: int = FRAMES) -> str:
    """The tracker's cost on a video's first frames."""
    with open_video(path) as reader:
        video = reader.get_frames(range(min(frames, len(reader))))
    lines = [f"{path}: {video.shape[0]} frames of {video.shape[2]} x {video.shape[1]}", ""]
    lines += ["| size | budget | ms a frame | trajectories | life |", "|---|---|---|---|---|"]
    for size in (256, 160):
        for budget in (None, 128):
            started = time.process_time()
            found = VotingTracker(size=size, budget=budget)(video)
            ms = (time.process_time() - started) / len(video) * 1e3
            life = (found.volumes() > 0).sum(1).mean()
            lines.append(f"| {size} | {budget} | {ms:.0f} | {found.count} | {life:.1f} |")
    return "\n".join(lines)


def run() -> list[dict]:
    """For `python -m tests.benchmarks`: tube IoU and cost beside the best peer, Felzenszwalb segments matched by flow."""
    clips = [sprites(256, **settings) for settings in BASE]
    ours, peer = measure(VotingTracker(), clips), measure(peers()["Felzenszwalb a frame, matched"], clips)
    note = "3 clips of 24 frames of 256 px, budget 128, one thread; peer: Felzenszwalb a frame, matched"
    return [
        {"name": f"trajectories, {what}", "ours": ours[key], "peer": peer[key], "ratio": ours[key] / peer[key], "unit": unit, "note": note}
        for what, key, unit in (("tube IoU", "tube_iou", ""), ("cost", "ms", "ms/frame"))
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", help="measure on the first frames of this file instead")
    arguments = parser.parse_args()
    print(of_video(arguments.video) if arguments.video else table())
