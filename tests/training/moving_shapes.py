"""Clips of coloured shapes that move over a plain background, with the shape of each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def clip(seed: int, frames: int = 4, size: int = 64, shapes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (T, S, S, 3) and int32 (T, S, S): 0 the background, 1 .. shapes."""
    rng = np.random.default_rng(seed)
    video = np.zeros((frames, size, size, 3), np.uint8)
    labels = np.zeros((frames, size, size), np.int32)
    y, x = np.mgrid[:size, :size] + 0.5
    video[:] = rng.integers(0, 256, 3)
    for i in range(shapes):
        colour, radius = rng.integers(0, 256, 3), rng.uniform(0.12, 0.25) * size
        start, speed = rng.uniform(0.2, 0.8, 2) * size, rng.uniform(-3, 3, 2)
        for t in range(frames):
            dy, dx = np.abs(y - start[0] - t * speed[0]), np.abs(x - start[1] - t * speed[1])
            inside = np.hypot(dy, dx) < radius if i % 2 else np.maximum(dy, dx) < radius
            video[t][inside], labels[t][inside] = colour, i + 1
    noise = rng.normal(0, 4, video.shape)
    return (video + noise).clip(0, 255).astype(np.uint8), labels


class Clips(torch.utils.data.Dataset):
    """`clip`s as the data module gives them: "pixels" uint8 (T, 3, S, S), "trajectories" int32 (T, h, w)."""

    def __init__(self, first: int, count: int, **settings: int) -> None:
        self.first, self.count, self.settings = first, count, settings

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        video, labels = clip(self.first + i, **self.settings)
        return {
            "pixels": torch.from_numpy(video).permute(0, 3, 1, 2),
            "trajectories": torch.from_numpy(labels),
            "caption": "shapes",
        }


class Loader(torch.utils.data.DataLoader):
    """Batches in order, which go on after a resume where they were."""

    start = done = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self.start = self.start, 0
        for i, batch in enumerate(super().__iter__()):
            if i >= start:
                self.done = i + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["done"]


def loader(first: int, count: int, batch: int = 8, **settings: int) -> Loader:
    return Loader(Clips(first, count, **settings), batch)
