"""Motion between two frames (OpenCV's DIS, or scikit-image's iterative Lucas-Kanade without OpenCV), and cuts."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import numpy as np

from tokgen.errors import MissingDependency

_LEAST = 32  # pixels of a side that flow is computed on; smaller pictures are continued by their border


class FlowEstimator:
    """Dense optical flow of grey frames.

    DIS (Kroeger et al., ECCV 2016) in its ultrafast setting, of OpenCV; without OpenCV, iterative Lucas-Kanade (Le Besnerais
    and Champagnat, ICIP 2005) of scikit-image, with which the tracker takes about eight times as long.

    Args:
        finest: pyramid level that the estimate ends at; 0 is the picture's own resolution. (Lucas-Kanade ends at 0 always.)

    Raises:
        MissingDependency: neither package is installed.
    """

    def __init__(self, finest: int = 0) -> None:
        self._dis = None
        if importlib.util.find_spec("cv2") is not None:
            import cv2

            self._dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
            self._dis.setFinestScale(finest)
        elif importlib.util.find_spec("skimage") is None:
            raise MissingDependency(
                'trajectories by voting need OpenCV or scikit-image for optical flow; pip install "tokgen[trajectory]"'
            )

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Where pixels of `first` are in `second`.

        Args:
            first, second: uint8 (H, W).

        Returns:
            float32 (H, W, 2), pixels to the right and down: what is at x in `first` is at x + flow(x) in `second`.
        """
        h, w = first.shape
        if min(h, w) < _LEAST:
            pad = ((0, max(_LEAST - h, 0)), (0, max(_LEAST - w, 0)))
            first, second = np.pad(first, pad, "edge"), np.pad(second, pad, "edge")
        if self._dis is not None:
            flow = self._dis.calc(first, second, None)
        else:
            from skimage.registration import optical_flow_ilk

            down, right = optical_flow_ilk(first, second, dtype=np.float32)
            flow = np.nan_to_num(np.stack([right, down], -1))
        return flow[:h, :w]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """OpenCV works in one thread inside: which thread summed what cannot change a result then."""
    if importlib.util.find_spec("cv2") is None:
        yield
        return
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def carried(flow: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel was in the frame before, and whether that is to be believed.

    Args:
        flow: float (H, W, 2), from this frame to the one before.
        back: float (H, W, 2), from the one before to this.

    Returns:
        int64 (H, W), the pixel's number in the frame before, y * W + x; and bool (H, W): it lies inside, and the two flows
        undo each other: |flow(x) + back(x + flow(x))|^2 <= 0.02 (|flow|^2 + |back|^2) + 1 (Sundaram, Brox and Keutzer, ECCV
        2010). Numbers of pixels outside are those of the nearest inside.
    """
    h, w = flow.shape[:2]
    x = np.rint(flow[..., 0]).astype(np.int64) + np.arange(w)
    y = np.rint(flow[..., 1]).astype(np.int64) + np.arange(h)[:, None]
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    place = np.clip(y, 0, h - 1) * w + np.clip(x, 0, w - 1)
    back = back.reshape(-1, 2)[place]
    error = flow + back
    square = lambda v: np.einsum("ijk,ijk->ij", v, v)  # noqa: E731
    return place, inside & (square(error) <= 0.02 * (square(flow) + square(back)) + 1)


def cut_scores(video: np.ndarray) -> np.ndarray:
    """How different each frame's colours are from those of the one before: half the L1 distance of histograms of 8 x 8 x 8
    colours, 0 (the same) to 1 (nothing in common).

    Args:
        video: uint8 (T, H, W, 3).

    Returns:
        float64 (T,); the first is 0.
    """
    scores, before = np.zeros(len(video)), None
    for t, frame in enumerate(video):
        coarse = (frame >> 5).reshape(-1, 3).astype(np.int64)
        histogram = np.bincount(coarse @ (64, 8, 1), minlength=512) / len(coarse)
        if before is not None:
            scores[t] = np.abs(histogram - before).sum() / 2
        before = histogram
    return scores
