"""Clips of which everything is known: emoji that move over photographs, each pixel's object, and a caption from the truth.

A clip is one scene, or two with a cut between them. In a scene a camera stays, pans or zooms over a photograph, and emoji
cross the picture: they move, bounce, enter, grow, shrink, turn and hide one another. All is drawn anti-aliased from one
random generator, so that the same seed and settings give the same clip. The caption is written from the paths as they were
drawn, in few words:

    red heart moves right and grows; sloth enters from the left; the camera pans up; then a cut: fox stays; the camera stays
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokgen.data.tar import iter_samples
from tokgen.errors import ConfigError, DataError
from tokgen.trajectories.base import Trajectories

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # to the right, and down
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
ORIGINS = {
    "left": "right",
    "right": "left",
    "up": "bottom",
    "down": "top",
    "still": "side",
}  # where what enters is from
SEEN = 0.03  # sides of the picture: shorter ways are not spoken of


# -------------------------------------------------------------------------------------------------------- what is drawn


def read_pictures(folder: str | os.PathLike[str]) -> list[tuple[bytes, dict[str, Any]]]:
    """(WebP bytes, JSON) of each sample of a folder of the demo's shards. Raises DataError if there are none."""
    found = []
    for path in sorted(Path(folder).glob("*.tar")):
        with open(path, "rb") as file:
            for _, raw in iter_samples(file, extensions=("webp", "json"), max_member_bytes=1 << 20):
                found.append((raw.members["webp"], json.loads(raw.members["json"])))
    if not found:
        raise DataError(
            f"no pictures in {folder}; expected the demo's shards, assets/demo/shards/NAME of the repository"
        )
    return found


@functools.lru_cache(maxsize=64)
def photograph(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@functools.lru_cache(maxsize=4096)
def cutout(data: bytes) -> Image.Image:
    """An emoji, RGBA, without the white around it: what is like a corner and reaches it has alpha 0."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    pixels = np.asarray(image).astype(np.int16)
    around = np.zeros(pixels.shape[:2], bool)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        if around[corner]:
            continue
        alike = (np.abs(pixels - pixels[corner]).sum(-1) <= 30) & ~around
        filled = np.zeros_like(around)
        filled[corner] = True
        count = 0
        while count != (count := int(filled.sum())):  # grown by the four neighbours until nothing changes
            grown = filled.copy()
            grown[1:] |= filled[:-1]
            grown[:-1] |= filled[1:]
            grown[:, 1:] |= filled[:, :-1]
            grown[:, :-1] |= filled[:, 1:]
            filled = grown & alike
        around |= filled
    image.putalpha(Image.fromarray((255 * ~around).astype(np.uint8)))
    return image


@dataclass(frozen=True, eq=False)
class Material:
    """What clips are made of: pictures as `read_pictures` gives them.

    Args:
        emoji: on white, with a "label" each.
        photos: with a "caption" each.
    """

    emoji: Sequence[tuple[bytes, dict[str, Any]]]
    photos: Sequence[tuple[bytes, dict[str, Any]]]

    @functools.cached_property
    def names(self) -> frozenset[str]:
        return frozenset(about["label"] for _, about in self.emoji)

    @staticmethod
    def of_demo(shards: str | os.PathLike[str], emoji: str = "train", photos: str = "train") -> Material:
        """From the demo's shards: emoji of `shards/EMOJI` with plain words as names, photos whose JSON says `photos`."""
        named = [e for e in read_pictures(Path(shards) / emoji) if _plain(e[1]["label"])]
        return Material(named, [p for p in read_pictures(Path(shards) / "photos") if p[1]["split"] == photos])


def _plain(label: str) -> bool:
    """One to three words in small letters; none of them about places, which captions give to movement."""
    words = label.split()
    spoken = ("arrow", "left", "right", "up", "down", "leftwards", "rightwards", "upwards", "downwards", "button")
    return re.fullmatch("[a-z]+( [a-z]+){0,2}", label) is not None and not set(words) & set(spoken)


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class ClipSettings:
    """Of clips. The defaults are those of the study of trackers.

    Args:
        frames, size: of a clip; pictures are squares of that side.
        objects: fewest and most in a scene.
        object_size: smallest and largest, in sides of the picture.
        speed: of objects, pixels a frame in a picture of 256 pixels; each has 0.5 to 1.3 times it.
        pan: of cameras that pan, the same; each has 0.6 to 1.4 times it.
        moving_camera: the chance that a scene's camera pans or, more rarely, zooms.
        cut: the chance that a clip has a cut.
        cross: the chance that two of a scene's objects meet on their ways and pass.
        enter: the chance that one of them comes in during the scene.
        noise: standard deviation, of 255.
        flicker: how far the light swings, as a part of it.

    Raises:
        ConfigError: a value that no clip can have.
    """

    frames: int = 24
    size: int = 256
    objects: tuple[int, int] = (2, 6)
    object_size: tuple[float, float] = (0.16, 0.34)
    speed: float = 4.0
    pan: float = 1.5
    moving_camera: float = 0.65
    cut: float = 0.2
    cross: float = 0.3
    enter: float = 0.4
    noise: float = 2.0
    flicker: float = 0.0

    def __post_init__(self) -> None:
        if self.frames < 1 or self.size < 16:
            raise ConfigError(f"clips of {self.frames} frames of side {self.size}; expected at least 1 and 16")
        if not 0 <= self.objects[0] <= self.objects[1]:
            raise ConfigError(f"objects is {self.objects}; expected the fewest and the most, from 0 up")
        if not 0 < self.object_size[0] <= self.object_size[1] <= 1:
            raise ConfigError(f"object_size is {self.object_size}; expected the smallest and the largest, up to 1")
        for name in ("speed", "pan", "noise", "flicker"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("moving_camera", "cut", "cross", "enter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a chance from 0 to 1")


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip and all that is known of it.

    Args:
        frames: uint8 (T, S, S, 3).
        labels: int32 (T, S, S): 0 is the background, 1 to K the foremost object whose alpha is more than a half.
        caption: what moves where.
        facts: the scenes: first frame, background, camera, and objects by their label; and "captions", further ones.
    """

    frames: np.ndarray
    labels: np.ndarray
    caption: str
    facts: dict[str, Any]

    def trajectories(self) -> Trajectories:
        """The true ones: every object, and the background of each scene."""
        labels, k = self.labels.copy(), int(self.labels.max())
        for number, scene in enumerate(self.facts["scenes"], 1):
            part = labels[scene["first"] :]
            part[self.labels[scene["first"] :] == 0] = k + number  # until the next scene's is put over it
        return Trajectories(labels).compact()


# ---------------------------------------------------------------------------------------------------------- from a seed


@dataclass
class _Object:
    picture: Image.Image  # RGBA
    about: dict[str, Any]
    path: np.ndarray  # (n, 2): its middle, sides of the picture to the right and down
    side: np.ndarray  # (n,), sides of the picture
    angle: np.ndarray  # (n,), degrees
    enters: bool
    label: int = 0


def moving_clip(material: Material, seed: int | Sequence[int], settings: ClipSettings = ClipSettings()) -> Clip:
    """The clip of a seed: a pure function of its arguments. Raises ConfigError if there are too few emoji or photos."""
    rng = np.random.default_rng(seed)
    t = settings.frames
    starts = [0]
    if t >= 8 and rng.random() < settings.cut:
        starts.append(int(rng.integers(t // 3, t - t // 3 + 1)))
    if len(material.photos) < len(starts) or len(material.names) < settings.objects[1] * len(starts):
        raise ConfigError(f"{len(material.emoji)} emoji and {len(material.photos)} photos are too few for such clips")
    photos = rng.choice(len(material.photos), len(starts), replace=False)
    taken: set[str] = set()
    frames, labels, scenes, captions = [], [], [], []
    label = 0
    for photo, start, end in zip(photos, starts, [*starts[1:], t]):
        data, about = material.photos[photo]
        n = end - start
        picture = photograph(data)
        boxes = _camera(rng, picture.size, n, settings)
        objects = _objects(rng, material, taken, n, settings)
        for thing in objects:
            label += 1
            thing.label = label
        drawn, owner = _draw(picture, boxes, objects, settings.size)
        frames.append(drawn)
        labels.append(owner)
        scenes.append(_scene(start, about["caption"], boxes, [o for o in objects if (owner == o.label).any()]))
        captions.append(_sentence(scenes[-1]))
    video = np.concatenate(frames)  # float32 (T, S, S, 3)
    light = 1 + settings.flicker * np.sin(np.arange(t, dtype=np.float32) / 4)[:, None, None, None]
    video = video * light + settings.noise * rng.standard_normal(video.shape, np.float32)
    places = "; then a cut: ".join(f"{c}; over {scene['background']}" for c, scene in zip(captions, scenes))
    return Clip(
        frames=np.rint(video).clip(0, 255).astype(np.uint8),
        labels=np.concatenate(labels),
        caption="; then a cut: ".join(captions),
        facts={"scenes": scenes, "captions": [places]},
    )


def _camera(rng: np.random.Generator, photo: tuple[int, int], n: int, settings: ClipSettings) -> np.ndarray:
    """The square of the photograph that each frame shows: (n, 3), left, top, side."""
    size = np.array(photo, float)
    side = np.full(n, size.min() * rng.uniform(0.55, 0.85))
    move = "none"
    if rng.random() < settings.moving_camera:
        move = "zoom" if rng.random() < 0.2 else str(rng.choice(list(DIRECTIONS)))
    way = settings.pan / 256 * rng.uniform(0.6, 1.4) * np.arange(n)  # sides of the picture
    if move == "zoom":
        side *= np.exp(np.linspace(0, 1, n) * rng.choice([-1, 1]) * rng.uniform(0.25, 0.45))
        side *= min(1, 0.95 * size.min() / side.max())
        corner = (size - side.max()) * rng.uniform(0, 1, 2) + (side.max() - side[:, None]) / 2
    elif move in DIRECTIONS:
        axis = 0 if move in ("left", "right") else 1
        side[:] = np.clip(
            size[axis] / (1 + way[-1]), 0.35 * size.min(), side[0]
        )  # so that there is room for all the way
        room = size - side[0]
        corner = np.repeat([rng.uniform(0, 1, 2) * room], n, 0)
        way = way * side[0]
        way += rng.uniform(0, max(0.0, room[axis] - way[-1]))
        way = room[axis] - np.abs(way % (2 * room[axis]) - room[axis])  # back where the photograph ends
        corner[:, axis] = way if move in ("right", "down") else room[axis] - way
    else:
        corner = np.repeat([rng.uniform(0, 1, 2) * (size - side[0])], n, 0)
    return np.concatenate([corner, side[:, None]], 1)


def _objects(
    rng: np.random.Generator, material: Material, taken: set[str], n: int, settings: ClipSettings
) -> list[_Object]:
    """The objects of a scene of n frames, from the back to the front; their names are added to `taken`."""
    count = int(rng.integers(settings.objects[0], settings.objects[1] + 1))
    sizes = rng.uniform(*settings.object_size, count)
    growth = rng.choice([0, 0, 1, -1], count) * rng.uniform(0.35, 0.6, count)
    turns = rng.choice([0, 0, 1, -1], count) * rng.uniform(45, 120, count)
    sides = sizes[:, None] * np.exp(growth[:, None] * np.linspace(-0.5, 0.5, n))  # (count, n)
    paths, enters = _paths(rng, sides, settings)
    objects = []
    for path, side, turn, late in zip(paths, sides, turns, enters):
        while (chosen := material.emoji[rng.integers(len(material.emoji))])[1]["label"] in taken:
            pass
        taken.add(chosen[1]["label"])
        objects.append(_Object(cutout(chosen[0]), chosen[1], path, side, turn * np.linspace(-0.5, 0.5, n), enters=late))
    return objects


def _paths(rng: np.random.Generator, sides: np.ndarray, settings: ClipSettings) -> tuple[list[np.ndarray], list[bool]]:
    """Where objects of these sides (count, n) go: their middles (n, 2), and which of them come in during the scene."""
    count, n = sides.shape
    time = np.arange(n) - (n - 1) / 2
    middles: list[np.ndarray] = []  # half-way through the scene: apart from one another, if there is room
    for i in range(count):
        places = rng.uniform(0.2, 0.8, (16, 2))
        gaps = [min((float(np.abs(p - m).max()) for m in middles), default=1.0) for p in places]
        middles.append(places[next((k for k, gap in enumerate(gaps) if gap > sides[i].max()), int(np.argmax(gaps)))])
    towards = [str(d) for d in rng.choice(list(DIRECTIONS), count)]
    slants = np.deg2rad(rng.uniform(-20, 20, count))
    speeds = settings.speed / 256 * rng.uniform(0.5, 1.3, count) * (rng.random(count) > 0.15)  # some stay
    pair = count > 1 and n > 1 and rng.random() < settings.cross
    enters = [False] * count
    if count > (2 if pair else 0) and n >= 6 and rng.random() < settings.enter:
        enters[-1] = True
    if pair:  # they meet half-way, and begin and end apart
        towards[1], slants[1] = OPPOSITE[towards[0]], slants[0]
        middles[1] = middles[0] + sides[0].mean() * rng.uniform(-0.25, 0.25, 2)
        speeds[:2] = np.maximum(speeds[:2], 0.75 * sides[:2].max() / (n - 1))
    paths = []
    for i in range(count):
        unit, (sin, cos) = np.array(DIRECTIONS[towards[i]], float), (np.sin(slants[i]), np.cos(slants[i]))
        if enters[i]:
            begin, outside = rng.uniform(0.15, 0.4) * n, 0.5 + 0.71 * sides[i].max()  # its corner, if it turns
            speed = max(speeds[i], (outside - 0.15) / (n - begin))
            across = np.where(unit == 0, rng.uniform(0.25, 0.75, 2), 0.5)
            along = speed * np.maximum(0, np.arange(n) - begin) - outside  # from the middle of the picture
            paths.append(across + along[:, None] * unit)
        else:
            slanted = np.array([[cos, -sin], [sin, cos]]) @ unit
            paths.append(_bounce(middles[i] + speeds[i] * time[:, None] * slanted))
    return paths, enters


def _bounce(path: np.ndarray, low: float = 0.1, high: float = 0.9) -> np.ndarray:
    """A path that turns round near the edges of the picture."""
    return high - np.abs((path - low) % (2 * (high - low)) - (high - low))


# -------------------------------------------------------------------------------------------------------------- drawing


def _draw(photo: Image.Image, boxes: np.ndarray, objects: list[_Object], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames of a scene, float32 (n, S, S, 3) in [0, 255], and the label in front, int32 (n, S, S)."""
    frames = np.empty((len(boxes), size, size, 3), np.float32)
    owner = np.zeros((len(boxes), size, size), np.int32)
    for t, (left, top, side) in enumerate(boxes):
        box = (left, top, min(left + side, photo.width), min(top + side, photo.height))  # against rounding
        frames[t] = photo.resize((size, size), Image.Resampling.BICUBIC, box)  # averages where it shrinks
    for thing in objects:
        # at twice the picture's resolution, averaged at the end; colours times alpha blend without fringes
        widest = max(2, round(2 * size * float(thing.side.max())))
        picture = thing.picture.resize((widest, widest), Image.Resampling.BICUBIC).convert("RGBa")
        for t in range(len(boxes)):
            middle, side, angle = thing.path[t] * size, thing.side[t] * size, np.deg2rad(thing.angle[t])
            reach = 0.5 * side * (abs(np.cos(angle)) + abs(np.sin(angle))) + 1
            x0, y0 = np.maximum(0, np.floor(middle - reach)).astype(int)
            x1, y1 = np.minimum(size, np.ceil(middle + reach)).astype(int)
            if x0 >= x1 or y0 >= y1:
                continue
            # from half-pixels of the part (x0..x1, y0..y1) to pixels of the emoji
            a, b = np.cos(angle) * widest / side / 2, np.sin(angle) * widest / side / 2
            u, v = 2 * (x0 - middle[0]), 2 * (y0 - middle[1])
            affine = (a, b, a * u + b * v + widest / 2, -b, a, a * v - b * u + widest / 2)
            part = picture.transform(
                (2 * int(x1 - x0), 2 * int(y1 - y0)), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
            )
            part = np.asarray(part.reduce(2), np.float32)
            alpha = part[..., 3:] / 255
            place = (t, slice(y0, y1), slice(x0, x1))
            frames[place] = frames[place] * (1 - alpha) + part[..., :3]
            owner[place][alpha[..., 0] > 0.5] = thing.label
    return frames, owner


# ------------------------------------------------------------------------------------------------------------- captions


def _scene(first: int, background: str, boxes: np.ndarray, objects: list[_Object]) -> dict[str, Any]:
    """What there is to say about a scene, from the paths as they were drawn."""
    middle = boxes[:, :2] + boxes[:, 2:] / 2
    ratio = boxes[-1, 2] / boxes[0, 2]
    pan, back = _way(middle / boxes[:, 2:])
    camera = "zooms in" if ratio < 0.9 else "zooms out" if ratio > 1.1 else "stays"
    if camera == "stays" and pan != "still":
        camera = f"pans {pan} and back" if back else f"pans {pan}"
    described = []
    for thing in objects:
        seen = ((thing.path > -0.1) & (thing.path < 1.1)).all(1)
        direction, bounces = _way(thing.path[seen] if seen.any() else thing.path)
        growth = thing.side[-1] / thing.side[0]
        described.append(
            {
                "label": thing.label,
                "name": thing.about["label"],
                "style": thing.about["style"],
                "moves": direction,
                "bounces": bounces,
                "enters": thing.enters,
                "size": "grows" if growth > 1.25 else "shrinks" if growth < 0.8 else "same",
                "turns": bool(abs(thing.angle[-1] - thing.angle[0]) > 30),
            }
        )
    pairs = [
        [a.label, b.label] for i, a in enumerate(objects) for b in objects[i + 1 :] if _cross(a, b)
    ]  # fmt: skip
    return {"first": first, "background": background, "camera": camera, "objects": described, "cross": pairs}


def _way(path: np.ndarray) -> tuple[str, bool]:
    """Where a path (n, 2) leads at first, along the axis that it moves on more, and whether it turns round."""
    steps = np.diff(path, axis=0)
    if not len(steps) or np.abs(steps).sum(0).max() < SEEN:
        return "still", False
    axis = int(np.abs(steps).sum(0).argmax())
    legs = [0.0]
    for step in steps[:, axis]:
        if legs[-1] * step < 0:
            legs.append(0.0)
        legs[-1] += step
    legs = [leg for leg in legs if abs(leg) >= SEEN]
    if not legs:
        return "still", False
    names = ("left", "right") if axis == 0 else ("up", "down")
    return names[int(legs[0] > 0)], len(legs) > 1


def _cross(a: _Object, b: _Object) -> bool:
    """Whether two objects change sides along an axis, moving against each other, and touch on the way."""
    if a.enters or b.enters:
        return False
    apart = a.path - b.path  # (n, 2)
    touching = (np.hypot(*apart.T) < 0.4 * (a.side + b.side)).any()
    moves = (a.path[-1] - a.path[0]) * (b.path[-1] - b.path[0]) < 0  # (2,)
    return bool(touching and (moves & (apart[0] * apart[-1] < 0) & (np.abs(apart[0] - apart[-1]) > 4 * SEEN)).any())


def _sentence(scene: dict[str, Any]) -> str:
    names = {thing["label"]: thing["name"] for thing in scene["objects"]}
    clauses = []
    for thing in scene["objects"]:
        if thing["enters"]:
            said = [f"enters from the {ORIGINS[thing['moves']]}"]
        elif thing["moves"] == "still":
            said = ["stays"]
        else:
            said = [f"moves {thing['moves']}"]
        said += (
            ["bounces back"] * thing["bounces"]
            + [thing["size"]] * (thing["size"] != "same")
            + ["turns"] * thing["turns"]
        )
        clauses.append(
            f"{thing['name']} {', '.join(said[:-1])} and {said[-1]}" if said[1:] else f"{thing['name']} {said[0]}"
        )
    clauses += [f"{names[a]} and {names[b]} cross" for a, b in scene["cross"]]
    return "; ".join([*clauses, f"the camera {scene['camera']}"])
