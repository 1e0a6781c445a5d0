"""Clips of videos as batches of pixels: the sample class for video shards; see `tokgen.data.batches`.

A video is seen on its *timeline*, which has one rate for all videos: at position k stands the frame that is nearest in time
to k / fps (`VideoReader.timeline`). A clip is a run of its positions, and trajectories have one plane for each of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokgen.data.batches import RESIZE_MODES, Captions, resize_image
from tokgen.data.decode import MAX_PIXELS, TRAJECTORIES, VIDEO_EXTENSIONS, BadSample, decode_trajectories
from tokgen.data.tar import RawSample
from tokgen.data.video import BACKENDS, UnreadableVideo, open_video
from tokgen.errors import DataError
from tokgen.trajectories.base import Trajectories


@dataclass(frozen=True)
class ClipSamples:
    """`KEY.mp4|webm|mov|mkv` with `KEY.txt` -> {"pixels": uint8 (B, T, 3, S, S), "caption": list, "key": list}.

    Args:
        frames: T, positions of the timeline in a clip. A shorter video repeats its last frame.
        fps: positions of the timeline in a second; None: every frame of the file.
        stride: from one position of the clip to the next.
        size: side of the square frames, in pixels; None with resize="none".
        resize: "crop", "random_crop", "squash" (see `resize_image`; all frames of a clip alike) or "none" (all videos must
            have one size).
        flip: mirror left and right with probability 1/2: all frames of a clip, and its trajectories.
        train: draw the start of the clip, crops and flips; otherwise the clip is the middle one, the crop central.
        trajectories: (h, w) of the planes that every sample must then have, `KEY.traj.npy`: the batch also holds
            {"trajectories": int32 (B, T, h, w)}, numbers 0, 1, … in order of first appearance in the clip, -1 for none.
        backend: that decodes; see `open_video`.
    """

    captions: Captions = field(default_factory=Captions)
    frames: int = 16
    fps: float | None = None
    stride: int = 1
    size: int | None = None
    resize: str = "crop"
    flip: bool = False
    train: bool = True
    max_pixels: int = MAX_PIXELS
    trajectories: tuple[int, int] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1:
            raise ValueError(f"frames {self.frames} and frame_stride {self.stride}: both are 1 or more.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps is a number of frames a second above 0, or None for every frame, not {self.fps}.")
        if self.resize not in RESIZE_MODES:
            raise ValueError(f"resize {self.resize!r} is not one of {', '.join(RESIZE_MODES)}.")
        if self.resize != "none" and (self.size is None or self.size < 1):
            raise ValueError(f"resize {self.resize!r} needs image_size, a positive number of pixels, not {self.size}.")
        if self.backend not in BACKENDS:
            raise ValueError(f"video_backend {self.backend!r} is not one of {', '.join(BACKENDS)}.")

    @property
    def extensions(self) -> tuple[str, ...]:
        trajectories = () if self.trajectories is None else (TRAJECTORIES,)
        return (*VIDEO_EXTENSIONS, *self.captions.extensions, *trajectories)

    def __call__(self, raw: RawSample, rng: random.Random) -> dict[str, Any]:
        caption = self.captions(raw, rng)
        extension = next((e for e in VIDEO_EXTENSIONS if e in raw.members), None)
        if extension is None:
            raise BadSample("no video")
        if self.trajectories is not None and TRAJECTORIES not in raw.members:
            raise BadSample("no trajectories")
        try:
            name = f"{raw.key}.{extension}"
            with open_video(raw.members[extension], self.backend, name=name, max_pixels=self.max_pixels) as video:
                timeline = video.timeline(self.fps)
                positions = self._positions(len(timeline), rng)
                flip = self.train and self.flip and rng.random() < 0.5
                crop = rng.getrandbits(64) if self.train and self.resize == "random_crop" else None
                item: dict[str, Any] = {"caption": caption, "key": raw.key}
                if self.trajectories is not None:  # first: cheaper than the pictures
                    planes = decode_trajectories(raw.members[TRAJECTORIES], (len(timeline), *self.trajectories))
                    labels = planes[positions].astype(np.int32) - 1
                    labels = Trajectories(labels[:, :, ::-1] if flip else labels).compact().labels
                    item["trajectories"] = torch.from_numpy(labels)  # (T, h, w)
                pictures = [self._square(frame, crop) for frame in video.frames(timeline[positions])]
        except UnreadableVideo as error:
            raise BadSample(error.reason, str(error)) from None
        pixels = torch.stack(pictures)  # (T, 3, S, S)
        return {"pixels": pixels.flip(-1) if flip else pixels, **item}

    def _positions(self, length: int, rng: random.Random) -> np.ndarray:
        """The clip's positions on a timeline of that length."""
        spare = max(0, length - ((self.frames - 1) * self.stride + 1))
        start = rng.randint(0, spare) if self.train else spare // 2
        return np.minimum(start + self.stride * np.arange(self.frames), length - 1)

    def _square(self, frame: np.ndarray, crop: int | None) -> Tensor:
        x = torch.from_numpy(frame).permute(2, 0, 1)  # (3, H, W)
        if self.resize == "none":
            return x
        # a generator of its own for each frame: all of the clip are cropped alike
        return resize_image(x, self.size, self.resize, None if crop is None else random.Random(crop))

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        sizes = {tuple(item["pixels"].shape[-2:]) for item in items}
        if len(sizes) > 1 or (self.size is not None and sizes != {(self.size, self.size)}):
            raise DataError(
                f"Videos {', '.join(item['key'] for item in items[:3])}, … have frames of (height, width) {sorted(sizes)} and "
                f'resize is "none", which needs one size{f" ({self.size})" if self.size else ""}; choose "crop" or "squash" '
                f"with image_size."
            )
        batch = {
            "pixels": torch.stack([item["pixels"].contiguous() for item in items]),  # (B, T, 3, S, S)
            "caption": [item["caption"] for item in items],
            "key": [item["key"] for item in items],
        }
        if self.trajectories is not None:
            batch["trajectories"] = torch.stack([item["trajectories"] for item in items])  # (B, T, h, w)
        return batch
