"""Trajectories by SAM 2 (Ravi et al. 2024, arXiv 2408.00714), as TrajViT makes them (arXiv 2505.23617, section 3.1).

The segments of a key frame are followed to the next one; what is found there anew continues the trajectory that it overlaps,
or begins one. A shot starts with a key frame and nothing is followed across a cut.

Where the published pipeline goes wrong, this one differs: masks that overlap give each pixel to the one of larger logit (there
their numbers are added, which makes foreign numbers); pixels that no mask claims belong to the nearest trajectory; each
trajectory continues in one segment at most; one that SAM 2 loses is absent from there on, and if all are lost the frame
becomes a key frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch

from tokgen.errors import CheckpointError, ConfigError
from tokgen.trajectories.base import Trajectories, TrajectorySource
from tokgen.trajectories.keyframes import (
    AutomaticSegments,
    BoundarySegments,
    check_segments,
    first_line,
    load_processor,
    load_whole,
    shots,
    transformers,
)
from tokgen.trajectories.matching import continued, filled

DTYPES = ("float32", "bfloat16", "float16")
SAM2_TYPE = "sam2_video"


class SAM2Source(TrajectorySource):
    """Segments of key frames, followed by SAM 2. Made for a GPU: on two CPU cores an object takes about 3 s per frame at 512.

    Args:
        model: Hub name or folder of a video checkpoint in transformers' layout: SAM 2, SAM 2.1, or EdgeTAM.
        keyframes: Hub name or folder of a boundary model (see `BoundarySegments`); "automatic": SAM 2 finds the masks.
        size: side in pixels of what SAM 2 sees, a multiple of 32; None: the checkpoint's own (1024). TrajViT uses 512.
        every: a key frame comes this many frames after the last, in which new objects can appear.
        cut: change of colours between two frames that parts two shots; see `shots`.
        min_iou: overlap from which on a segment of a key frame continues a trajectory.
        threshold, min_area, max_masks: see `BoundarySegments`.
        points, min_score, min_stability: see `AutomaticSegments`.
        device: where the models run. dtype: what they compute in, float32, bfloat16 or float16.

    Labels come on the grid of SAM 2's masks, size / 4 a side.

    Raises:
        CheckpointError: no such model, or one of another kind. ConfigError: a value that cannot work.
        MissingDependency: transformers, scipy or scikit-image is missing.
    """

    name: ClassVar[str] = "sam2"

    def __init__(
        self,
        model: str = "facebook/sam2.1-hiera-small",
        keyframes: str = "chendelong/DirectSAM-1800px-0424",
        size: int | None = None,
        every: int = 16,
        cut: float = 0.5,
        min_iou: float = 0.5,
        threshold: float = 0.2,
        min_area: float = 16 / 512**2,
        max_masks: int = 128,
        points: int = 32,
        min_score: float = 0.8,
        min_stability: float = 0.95,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        check_segments(threshold, min_area, max_masks, points)
        if every < 1 or not 0 < min_iou <= 1 or (size is not None and (size < 32 or size % 32)):
            raise ConfigError(
                f"every {every} is at least 1, min_iou {min_iou} in (0, 1], and size {size} a multiple of 32"
            )
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self._settings = {
            "model": str(model), "keyframes": str(keyframes), "size": size, "every": every, "cut": cut, "min_iou": min_iou,
            "threshold": threshold, "min_area": min_area, "max_masks": max_masks, "points": points, "min_score": min_score,
            "min_stability": min_stability, "dtype": dtype,
        }  # fmt: skip
        self.every, self.cut, self.min_iou, self.device = every, cut, min_iou, device
        self.dtype = getattr(torch, dtype)
        config = sized_config(str(model), size)
        self.model = load_whole("AutoModel", str(model), "SAM 2 checkpoint", config=config, dtype=self.dtype).to(device)
        if not hasattr(self.model, "propagate_in_video_iterator"):
            raise CheckpointError(
                f"{model!r} is a {type(self.model).__name__}, which does not follow objects; give a SAM 2 video checkpoint"
            )
        self.size = self.model.image_size
        self.processor = _processor(str(model), self.size)
        if keyframes == "automatic":
            self.segment = AutomaticSegments(
                str(model), self.processor, points, min_score, min_stability, min_area, max_masks, device, self.dtype,
                config=sized_config(str(model), size),
            )  # fmt: skip
        else:
            self.segment = BoundarySegments(str(keyframes), threshold, min_area, max_masks, device, self.dtype)

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    @property
    def grid(self) -> int:
        """Side of the label maps."""
        return self.size // 4

    def track(self, video: np.ndarray) -> Trajectories:
        labels = np.full((len(video), self.grid, self.grid), -1, np.int32)
        count = 0
        for start, end in shots(video, self.cut):
            key, before = start, None  # the key frame, and what was followed to it from the last
            while key is not None:
                segments = self._segments(video[key])
                names = continued(before, segments, count, self.min_iou)
                count = max(count, int(names.max()) + 1)
                labels[key] = names[segments]
                following = key + self.every if key + self.every < end else None
                stop = end - 1 if following is None else following
                before = None
                for t, scores in self._follow(video[key : stop + 1], segments):
                    plane = strongest(scores)
                    if (plane < 0).all():  # all are lost: look anew, with no past
                        before, following = None, key + t
                        break
                    before = np.where(plane >= 0, names[plane], -1)
                    labels[key + t] = filled(before)
                key = following
        return Trajectories(labels).compact()

    def _segments(self, frame: np.ndarray) -> np.ndarray:
        """Segments of a key frame on the tracker's grid, int32 (g, g), 0 .. S-1 all of which occur."""
        segments = Trajectories(self.segment(frame)[None])
        return segments.resized(self.grid, self.grid).compact().labels[0]

    @torch.no_grad()
    def _follow(self, frames: np.ndarray, segments: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Mask logits float32 (S, g, g) of the segments of the first of frames (n, H, W, 3) in frames 1 .. n-1."""
        if len(frames) == 1:
            return
        objects = list(range(int(segments.max()) + 1))
        session = self.processor.init_video_session(video=list(frames), inference_device=self.device, dtype=self.dtype)
        masks = [segments == i for i in objects]
        self.processor.add_inputs_to_inference_session(
            inference_session=session, frame_idx=0, obj_ids=objects, input_masks=masks
        )
        for t in range(len(frames)):
            logits = self.model(inference_session=session, frame_idx=t).pred_masks  # (S, 1, g, g)
            if t:
                yield t, logits[:, 0].float().cpu().numpy()


def strongest(logits: np.ndarray) -> np.ndarray:
    """The mask of largest logit at each pixel, int32 (h, w), of logits (S, h, w); -1 where none is above 0."""
    best = logits.argmax(0)
    return np.where(np.take_along_axis(logits, best[None], 0)[0] > 0, best, -1).astype(np.int32)


def sized_config(name: str, size: int | None) -> Any:
    """A checkpoint's configuration, for pictures of another size if that is given.

    SAM 2's weights do not depend on the size: its tables of positions are interpolated or computed.
    """
    try:
        config = transformers().AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no SAM 2 checkpoint at {name!r} ({first_line(error)}); give a Hub name such as "
            "facebook/sam2.1-hiera-small, or a folder that save_pretrained of transformers wrote"
        ) from None
    if size is None or size == getattr(config, "image_size", None):
        return config
    if config.model_type != SAM2_TYPE:
        raise ConfigError(f"size {size}: a {config.model_type} checkpoint runs at its own size only; leave size out")
    config.image_size = config.prompt_encoder_config.image_size = size
    config.memory_attention_rope_feat_sizes = [size // 16] * 2
    config.vision_config.backbone_feature_sizes = [[size // stride] * 2 for stride in (4, 8, 16)]
    config.vision_config.backbone_config.image_size = [size, size]
    return config


def _processor(name: str, size: int) -> Any:
    processor = load_processor("Sam2VideoProcessor", name, "SAM 2 checkpoint")
    square = {"height": size, "width": size}
    processor.image_processor.size = processor.video_processor.size = square
    processor.target_size = size
    return processor
