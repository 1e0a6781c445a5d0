"""The segments of a single frame, which a tracker then follows: shots, boundary models, automatic masks.

TrajViT (arXiv 2505.23617, section 3.1) takes the regions between the boundaries that DirectSAM draws. Two things differ
here. Its regions are dilated to cover the boundaries and so overlap; here they grow by watershed until they meet
(Chen et al. 2024, arXiv 2402.14327), so that every pixel belongs to one. And instead of a boundary model, SAM 2 itself can
find masks, prompted with a grid of points (Kirillov et al. 2023, arXiv 2304.02643, appendix B).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokgen.errors import CheckpointError, ConfigError, MissingDependency
from tokgen.trajectories.flow import cut_scores
from tokgen.trajectories.matching import filled, scipy_module

HOLE = 0.01  # part of the picture from which on an area that no automatic mask covers is a segment itself
OVERLAP = 0.7  # of two automatic masks that are taken for one: the published value, there of their boxes
POINTS_AT_ONCE = 64


# -- shots ------------------------------------------------------------------------------------------------------------


def shots(video: np.ndarray, cut: float) -> list[tuple[int, int]]:
    """[first, last + 1) of every shot of frames uint8 (T, H, W, 3); `cut` is the change of colours (see
    `cut_scores`) that parts two shots."""
    starts = [0, *np.flatnonzero(cut_scores(video) > cut).tolist()]
    return list(zip(starts, [*starts[1:], len(video)]))


# -- loading ----------------------------------------------------------------------------------------------------------


def load_whole(kind: Any, name: str, what: str, **settings: Any) -> Any:
    """A model of transformers in eval mode. Raises CheckpointError where it is missing, of another kind, or incomplete.

    Args:
        kind: a class of transformers, or its name, such as "AutoModel".
        name: Hub name or folder.
        what: for messages ("boundary model").
    """
    kind = getattr(transformers(), kind) if isinstance(kind, str) else kind
    try:
        model, report = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"no {what} at {name!r} ({first_line(error)}); give a Hub name, or a folder that save_pretrained of "
            "transformers wrote"
        ) from None
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random weights
        raise CheckpointError(
            f"{name!r} holds no weights for {', '.join(missing[:3])} ({len(missing)} missing); it is no {what}"
        )
    return model.eval().requires_grad_(False)


def load_processor(kind: str, name: str, what: str) -> Any:
    """A processor of transformers. Raises CheckpointError if there is none."""
    try:
        return getattr(transformers(), kind).from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{what} {name!r} has no {kind} ({first_line(error)}); its folder needs the processor's files too"
        ) from None


def transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependency(
            "SAM 2 and boundary models need transformers; install it with pip install 'tokgen[transformers]'"
        ) from None
    return transformers


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- boundaries -------------------------------------------------------------------------------------------------------


class BoundarySegments:
    """The regions between boundaries.

    Args:
        model: Hub name or folder of a semantic segmentation model with one logit per pixel, a boundary's, such as
            "chendelong/DirectSAM-1800px-0424".
        threshold: probability from which on a pixel is boundary. TrajViT takes 0.2, DirectSAM's own examples 0.5.
        min_area: regions up to this part of the picture are no seeds; the others grow over them.
        max_masks: the largest that are kept.
    """

    def __init__(self, model: str, threshold: float, min_area: float, max_masks: int, device: str, dtype: Any) -> None:
        self.model = load_whole("AutoModelForSemanticSegmentation", model, "boundary model", dtype=dtype).to(device)
        labels = self.model.config.num_labels
        if labels != 1:
            raise CheckpointError(
                f"{model!r} gives {labels} logits per pixel; a boundary model gives one (DirectSAM, for example)"
            )
        self.processor = load_processor("AutoImageProcessor", model, "boundary model")
        self.threshold, self.min_area, self.max_masks = threshold, min_area, max_masks

    @torch.no_grad()
    def boundaries(self, frame: np.ndarray) -> np.ndarray:
        """Probability of a boundary, float32 (h, w), as fine as the model gives it."""
        pixels = self.processor(images=frame, return_tensors="pt").pixel_values
        logits = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype)).logits  # (1, 1, h, w)
        return logits[0, 0].float().sigmoid().cpu().numpy()

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Segments of a frame uint8 (H, W, 3), int32 (h, w), 0 .. S-1, largest first; every pixel has one."""
        return regions_between(self.boundaries(frame), self.threshold, self.min_area, self.max_masks)


def regions_between(boundary: np.ndarray, threshold: float, min_area: float, max_masks: int) -> np.ndarray:
    """Segments int32 (h, w), 0 .. S-1, largest first, of boundary probabilities (h, w); see `BoundarySegments`."""
    try:
        from skimage.segmentation import watershed
    except ImportError:
        raise MissingDependency(
            "boundary models need scikit-image; install it with pip install 'tokgen[trajectory]'"
        ) from None
    components, _ = scipy_module("ndimage").label(boundary < threshold)
    areas = np.bincount(components.ravel())
    areas[0] = 0  # the boundary
    seeds = np.argsort(-areas, kind="stable")[:max_masks]
    seeds = seeds[areas[seeds] > min_area * boundary.size]
    if not len(seeds):
        return np.zeros(boundary.shape, np.int32)
    table = np.zeros(len(areas), np.int32)
    table[seeds] = np.arange(1, len(seeds) + 1)
    return watershed(boundary, table[components]).astype(np.int32) - 1  # the lowest boundaries are crossed first


# -- automatic masks --------------------------------------------------------------------------------------------------


class AutomaticSegments:
    """Masks that SAM 2 finds by itself: one prompt for each point of a grid, three masks for each prompt.

    Args:
        model: Hub name or folder of a SAM 2 (or EdgeTAM) checkpoint.
        processor: of the tracker, for the frame's pixels.
        points: per side of the grid.
        min_score, min_stability: a mask's predicted overlap with the truth, and the overlap of its parts above and below
            the threshold (logits 1 and -1); masks below either are dropped.
        min_area, max_masks: as in `BoundarySegments`.
    """

    def __init__(
        self, model: str, processor: Any, points: int, min_score: float, min_stability: float, min_area: float,
        max_masks: int, device: str, dtype: Any, **settings: Any,
    ) -> None:  # fmt: skip
        self.model = load_whole("AutoModelForMaskGeneration", model, "SAM 2 checkpoint", dtype=dtype, **settings)
        self.model.to(device)
        if not hasattr(self.model, "get_image_embeddings"):
            raise CheckpointError(f"{model!r} is a {type(self.model).__name__}, which cannot make masks automatically")
        self.processor, self.points = processor, points
        self.min_score, self.min_stability = min_score, min_stability
        self.min_area, self.max_masks = min_area, max_masks

    @torch.no_grad()
    def masks(self, frame: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mask logits (3 P, h, w) and their predicted quality (3 P,), float32, for the P points of the grid."""
        device, dtype = self.model.device, self.model.dtype
        pixels = self.processor(images=frame, return_tensors="pt").pixel_values
        embeddings = self.model.get_image_embeddings(pixels.to(device, dtype))
        side = self.processor.target_size
        centres = (torch.arange(self.points, device=device, dtype=dtype) + 0.5) * side / self.points
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        grid = torch.stack([x, y], -1).view(1, -1, 1, 2)  # (1, P, 1, 2): each point a prompt of its own
        logits, scores = [], []
        for points in grid.split(POINTS_AT_ONCE, 1):
            out = self.model(image_embeddings=embeddings, input_points=points, multimask_output=True)
            logits.append(out.pred_masks[0].flatten(0, 1).float())
            scores.append(out.iou_scores[0].flatten().float())
        return torch.cat(logits), torch.cat(scores)

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """As `BoundarySegments`. Of nested masks the smaller is seen, as the part of a whole; an area without a mask is a
        segment if it is large, and belongs to the nearest otherwise."""
        logits, scores = self.masks(frame)
        stability = (logits > 1).sum((1, 2)) / (logits > -1).sum((1, 2)).clamp(min=1)
        good = (scores >= self.min_score) & (stability >= self.min_stability)
        masks, scores = (logits[good] > 0).cpu(), scores[good].cpu()
        del logits
        return layered(distinct(masks, scores, OVERLAP).numpy(), self.min_area, self.max_masks)


def distinct(masks: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """The masks bool (M, h, w), best first, without those that overlap a better one by more than `overlap` (IoU)."""
    masks = masks[scores.argsort(descending=True, stable=True)]
    flat = masks.flatten(1).float()
    shared = flat @ flat.T
    areas = flat.sum(1)
    same = shared / (areas[:, None] + areas[None] - shared).clamp(min=1) > overlap
    kept: list[int] = []
    for i in range(len(masks)):
        if not same[i, kept].any():
            kept.append(i)
    return masks[kept]


def layered(masks: np.ndarray, min_area: float, max_masks: int) -> np.ndarray:
    """Segments int32 (h, w), 0 .. S-1, largest first, of masks bool (M, h, w) that may overlap and leave gaps."""
    _, height, width = masks.shape
    pixels = height * width
    canvas = np.full((height, width), -1, np.int64)
    order = np.argsort(-masks.sum((1, 2)), kind="stable")
    for layer, mask in enumerate(masks[order]):
        canvas[mask] = layer
    gaps, count = scipy_module("ndimage").label(canvas < 0)
    for gap in range(1, count + 1):
        area = gaps == gap
        if area.sum() >= HOLE * pixels:
            canvas[area] = len(masks) + gap
    values, index, areas = np.unique(canvas, return_inverse=True, return_counts=True)
    areas[values < 0] = 0
    ranks = np.argsort(-areas, kind="stable")
    ranks = ranks[:max_masks][areas[ranks[:max_masks]] > min_area * pixels]
    if not len(ranks):
        return np.zeros((height, width), np.int32)
    table = np.full(len(values), -1, np.int32)
    table[ranks] = np.arange(len(ranks))
    return filled(table[index.reshape(height, width)])


def check_segments(threshold: float, min_area: float, max_masks: int, points: int) -> None:
    """Raise ConfigError, naming the value."""
    if not 0 < threshold < 1 or not 0 <= min_area < 1 or max_masks < 1 or points < 1:
        raise ConfigError(
            f"threshold {threshold} lies between 0 and 1, min_area {min_area} is a part of the picture from 0 up, and "
            f"max_masks {max_masks} and points {points} are at least 1"
        )
