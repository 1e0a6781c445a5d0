"""Synthetic clips: what is said of them is what they show."""

from __future__ import annotations

import importlib.util
import io
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokgen.data.shards import Manifest, verify
from tokgen.data.synthetic import ClipSettings, Material, cutout, moving_clip, read_pictures
from tokgen.data.tar import iter_samples
from tokgen.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "assets/demo/shards"
# one object and nothing that is not asked for
PLAIN = ClipSettings(12, 48, (1, 1), (0.3, 0.4), 6.0, 2.5, moving_camera=0, cut=0, cross=0, enter=0, noise=0)


@pytest.fixture(scope="module")
def material() -> Material:
    return Material.of_demo(SHARDS)


def picture(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return file.getvalue()


@pytest.fixture(scope="module")
def squares() -> Material:
    """Emoji that are squares of one colour, over a photograph of one colour."""
    emoji = []
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
        pixels = np.full((64, 64, 3), 255, np.uint8)
        pixels[8:56, 8:56] = colour
        emoji.append((picture(pixels), {"label": name, "style": "flat"}))
    return Material(emoji, [(picture(np.full((90, 80, 3), (0, 0, 255), np.uint8)), {"caption": "blue"})])


def clips(material: Material, settings: ClipSettings, count: int = 24):
    return [moving_clip(material, [7, i], settings) for i in range(count)]


def middles(labels: np.ndarray, label: int) -> np.ndarray:
    """Where it is in each frame, (T, 2), pixels to the right and down; NaN where it is not."""
    out = np.full((len(labels), 2), np.nan)
    for t, frame in enumerate(labels == label):
        if frame.any():
            out[t] = np.argwhere(frame).mean(0)[::-1]
    return out


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_a_seed_gives_its_clip_whatever_came_before(material):
    settings = ClipSettings(8, 32, (1, 3), cut=0.5)
    first = moving_clip(material, [0, 3], settings)
    moving_clip(material, [0, 4], settings)
    again, other = moving_clip(Material.of_demo(SHARDS), [0, 3], settings), moving_clip(material, [0, 4], settings)
    assert first.frames.dtype == np.uint8 and first.frames.shape == (8, 32, 32, 3)
    assert first.labels.dtype == np.int32 and first.labels.shape == (8, 32, 32)
    assert np.array_equal(first.frames, again.frames) and np.array_equal(first.labels, again.labels)
    assert (first.caption, first.facts) == (again.caption, again.facts)
    assert first.caption != other.caption and not np.array_equal(first.frames, other.frames)


def test_labels_are_where_more_than_half_of_the_colour_is(squares):
    mixed = 0
    for clip in clips(squares, PLAIN):
        share = clip.frames[..., :2].max(-1) / 255  # of red or green, over blue
        sure = np.abs(share - 0.5) > 0.01
        assert np.array_equal((clip.labels == 1)[sure], (share > 0.5)[sure])
        assert np.abs(clip.frames.astype(int).sum(-1) - 255).max() <= 2  # colours blend without a fringe
        mixed += ((share > 0.1) & (share < 0.9)).sum()
    assert mixed > 100  # edges are smooth


def test_what_is_in_front_hides_what_is_behind(squares):
    hidden = 0
    for clip in clips(squares, replace(PLAIN, objects=(2, 2), cross=1)):
        names = {thing["label"]: thing["name"] for thing in clip.facts["scenes"][0]["objects"]}
        for label, name in names.items():
            inside = clip.frames[clip.labels == label][:, {"red": 0, "green": 1}[name]]
            assert inside.min() > 60 and np.median(inside) == 255
        areas = [(clip.labels == label).sum((1, 2)) for label in names]
        hidden += areas[0].min() < 0.6 * areas[0].max() and areas[1].min() > 0.5 * areas[1].max()
    assert hidden > 6


def test_the_background_stays_where_the_camera_does(material):
    for clip in clips(material, PLAIN, 8):
        still = ~(clip.labels > 0).any(0)
        rim = np.pad(still, 2, constant_values=True)
        still &= np.all([rim[y : y + 48, x : x + 48] for y, x in itertools.product(range(5), range(5))], axis=0)
        assert still.sum() > 300 and (clip.frames[:, still] == clip.frames[0, still]).all()


def test_noise_and_light(material):
    plain, noisy = (moving_clip(material, 5, replace(PLAIN, noise=n)) for n in (0, 6))
    assert 4.5 < (noisy.frames.astype(float) - plain.frames).std() < 6.5
    light = moving_clip(material, 5, replace(PLAIN, flicker=0.25)).frames.mean((1, 2, 3)) / plain.frames.mean((1, 2, 3))
    assert np.ptp(light) > 0.2 and np.array_equal(noisy.labels, plain.labels)


# -- what is said of them ----------------------------------------------------------------------------------------------


def test_objects_move_as_is_said(material):
    seen = set()
    for clip in clips(material, replace(PLAIN, frames=24), 60):
        (thing,) = clip.facts["scenes"][0]["objects"]
        assert clip.caption.startswith(thing["name"] + " ") and clip.caption.endswith("the camera stays")
        path = middles(clip.labels, 1)
        way = path[-1] - path[0]
        if thing["moves"] == "still":
            assert "stays" in clip.caption.split(";")[0] and np.abs(way).max() < 3
        elif not thing["bounces"]:
            assert f" moves {thing['moves']}" in clip.caption
            right, down = way
            along = {"right": right, "left": -right, "down": down, "up": -down}[thing["moves"]]
            assert along > 1.5 and along >= np.abs(way).max() - 1.5
        else:
            assert "bounces back" in clip.caption
        seen.add((thing["moves"], thing["bounces"]))
    assert {(d, False) for d in ("left", "right", "up", "down", "still")} <= seen and any(b for _, b in seen)


def test_objects_grow_and_shrink_as_is_said(material):
    sizes = []
    for clip in clips(material, replace(PLAIN, speed=0, object_size=(0.3, 0.3)), 40):
        (thing,) = clip.facts["scenes"][0]["objects"]
        area = (clip.labels == 1).sum((1, 2))
        at_edge = (clip.labels[:, [0, -1]] > 0).any() or (clip.labels[:, :, [0, -1]] > 0).any()
        if at_edge:
            continue
        ratio = area[-1] / area[0]
        assert {"grows": ratio > 1.5, "shrinks": ratio < 0.7, "same": 0.8 < ratio < 1.25}[thing["size"]]
        assert (thing["size"] in clip.caption) == (thing["size"] != "same")
        sizes.append(thing["size"])
    assert len(sizes) > 10 and set(sizes) == {"grows", "shrinks", "same"}


def test_what_enters_was_not_there_before(material):
    for clip in clips(material, replace(PLAIN, enter=1)):
        (thing,) = clip.facts["scenes"][0]["objects"]
        visible = (clip.labels == 1).any((1, 2))
        assert thing["enters"] and not visible[0] and visible[-1]
        first = middles(clip.labels, 1)[visible][0] / 48
        side = clip.caption.partition("enters from the ")[2].split(" ")[0].strip(",;")
        right, down = first
        assert {"left": right < 0.3, "right": right > 0.7, "top": down < 0.3, "bottom": down > 0.7}[side]


def test_what_crosses_changes_sides(material):
    found = 0
    for clip in clips(material, replace(PLAIN, objects=(2, 2), cross=1)):
        (scene,) = clip.facts["scenes"]
        for a, b in scene["cross"]:
            found += 1
            names = {thing["label"]: thing["name"] for thing in scene["objects"]}
            assert f"{names[a]} and {names[b]} cross" in clip.caption
            apart = middles(clip.labels, a) - middles(clip.labels, b)
            assert (apart[0] * apart[-1] < 0).any()
    assert found > 12


def shift(before: np.ndarray, after: np.ndarray, most: int) -> tuple[int, int]:
    """How far a picture's content has moved, to the right and down: where the least is left of the difference."""
    before, after = before.mean(-1), after.mean(-1)
    s, best = len(before), (np.inf, 0, 0)
    for down, right in itertools.product(range(-most, most + 1), repeat=2):
        a = before[max(0, -down) : s - max(0, down), max(0, -right) : s - max(0, right)]
        b = after[max(0, down) : s - max(0, -down), max(0, right) : s - max(0, -right)]
        best = min(best, (float(np.abs(a - b).mean()), right, down))
    return best[1:]


def test_the_camera_moves_as_is_said(material):
    seen = set()
    for clip in clips(material, replace(PLAIN, objects=(0, 0), moving_camera=1, pan=3.0), 40):
        camera = clip.facts["scenes"][0]["camera"]
        assert clip.caption == f"the camera {camera}" and not clip.labels.any()
        seen.add(camera)
        first, last = clip.frames[0], clip.frames[-1]
        if camera.startswith("pans") and "back" not in camera:
            right, down = shift(first, last, 12)  # the content goes against the camera
            along = {"left": right, "right": -right, "up": down, "down": -down}[camera.split()[1]]
            assert along >= 3 and along == max(abs(right), abs(down))
        elif camera.startswith("zooms"):
            wide, near = (first, last) if camera == "zooms in" else (last, first)
            side = round(48 * 0.72)
            inner = wide[(48 - side) // 2 :][:side, (48 - side) // 2 :][:, :side]
            inner = np.asarray(Image.fromarray(inner).resize((48, 48), Image.Resampling.BICUBIC))
            assert np.abs(inner.astype(int) - near).mean() < np.abs(wide.astype(int) - near).mean()
    assert {"pans left", "pans right", "pans up", "pans down", "zooms in", "zooms out"} <= seen


def test_a_cut_changes_everything(material):
    for clip in clips(material, replace(PLAIN, objects=(1, 2), cut=1), 12):
        first, second = clip.facts["scenes"]
        at = second["first"]
        assert first["first"] == 0 and 4 <= at <= 8 and first["background"] != second["background"]
        assert "; then a cut: " in clip.caption and first["background"] in clip.facts["captions"][0]
        assert not set(np.unique(clip.labels[:at])) & set(np.unique(clip.labels[at:])) - {0}
        steps = np.abs(np.diff(clip.frames.astype(int), axis=0)).mean((1, 2, 3))
        assert steps.argmax() == at - 1
        truth = clip.trajectories()
        assert truth.panoptic and not set(np.unique(truth.labels[:at])) & set(np.unique(truth.labels[at:]))
        assert truth.count == len(np.unique(clip.labels[:at])) + len(np.unique(clip.labels[at:]))


# -- what they are made of ---------------------------------------------------------------------------------------------


def test_validation_shows_nothing_of_training(material):
    val = Material.of_demo(SHARDS, "heldout", "val")
    assert not material.names & val.names and len(val.names) > 20
    photos = [{data for data, _ in m.photos} for m in (material, val)]
    assert len(photos[0]) == 14 and len(photos[1]) == 5 and not photos[0] & photos[1]
    known = Material.of_demo(SHARDS, "val", "val")
    assert known.names <= material.names
    assert not {data for data, _ in known.emoji} & {data for data, _ in material.emoji}
    for name in material.names | val.names:
        assert name.replace(" ", "").isalpha() and not {"left", "right", "up", "down", "arrow"} & set(name.split())


def test_a_cutout_keeps_the_white_inside():
    pixels = np.full((20, 20, 3), 255, np.uint8)
    pixels[5:15, 5:15] = (200, 0, 0)
    pixels[8:12, 8:12] = 255
    pixels[0, 0] = 240  # no quite white corner
    alpha = np.asarray(cutout(picture(pixels)))[..., 3]
    wanted = np.zeros((20, 20), np.uint8)
    wanted[5:15, 5:15] = 255
    assert np.array_equal(alpha, wanted)


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 0}, {"size": 4}, {"objects": (3, 1)}, {"objects": (-1, 1)}, {"object_size": (0, 0.3)},
        {"object_size": (0.5, 1.3)}, {"speed": -1}, {"cut": 1.5}, {"noise": -2}, {"enter": -0.1},
    ],
)  # fmt: skip
def test_settings_that_no_clip_can_have(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match={"size": "side 4"}.get(name, name)):
        ClipSettings(**wrong)


def test_too_little_to_draw(squares, tmp_path):
    with pytest.raises(ConfigError, match="2 emoji and 1 photos"):
        moving_clip(squares, 0, replace(PLAIN, objects=(1, 3)))
    with pytest.raises(DataError, match=r"assets/demo/shards"):
        read_pictures(tmp_path)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_short_clips(material, frames):
    for clip in clips(material, replace(PLAIN, frames=frames, objects=(0, 3), cut=1, cross=1, enter=1), 12):
        assert clip.frames.shape == (frames, 48, 48, 3) and clip.caption and clip.trajectories().panoptic


# -- the script --------------------------------------------------------------------------------------------------------


def test_the_script_writes_shards_with_the_truth(tmp_path, monkeypatch, material):
    av = pytest.importorskip("av")
    spec = importlib.util.spec_from_file_location("moving_clips", ROOT / "assets/demo/moving_clips.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = f"x --out {tmp_path} --clips 3 --val 2 --known 1 --size 32 --frames 8 --truth"
    monkeypatch.setattr(sys, "argv", words.split())
    script.main()
    assert not verify(tmp_path / "train") and not verify(tmp_path / "val") and not verify(tmp_path / "known")
    manifest = Manifest.load(tmp_path / "train")
    wanted = {"source": {"type": "truth"}, "size": 32, "resize": "crop", "grid": [32, 32], "fps": None}
    assert manifest.kind == "videos" and manifest.samples == 3 and manifest.meta["trajectories"] == wanted
    settings = ClipSettings(8, 32, (1, 3), (0.25, 0.42), 6.0, 2.5, cut=0.15)
    extensions = ("mp4", "txt", "json", "traj.npy")
    with open(tmp_path / "train" / "00000.tar", "rb") as file:
        for i, (_, raw) in enumerate(iter_samples(file, extensions=extensions, max_member_bytes=1 << 20)):
            clip = moving_clip(material, [0, 0, i], settings)
            assert raw.members["txt"].decode() == clip.caption
            labels = np.load(io.BytesIO(raw.members["traj.npy"]))
            assert labels.dtype == np.uint8 and np.array_equal(labels.astype(int) - 1, clip.trajectories().labels)
            with av.open(io.BytesIO(raw.members["mp4"])) as container:
                assert float(container.streams.video[0].average_rate) == 8
                shown = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
            error = np.square(shown.astype(float) - clip.frames).mean((1, 2, 3))
            assert shown.shape == clip.frames.shape and (10 * np.log10(255**2 / error) > 24).all()
