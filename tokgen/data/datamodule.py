"""`ShardsDataModule`: shard folders as Lightning data, checked before training starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch

from tokgen.data.batches import Captions, CodeSamples, ImageSamples, MotionSamples, VideoSamples
from tokgen.data.clips import ClipSamples
from tokgen.data.decode import MAX_MEMBER_BYTES, MAX_PIXELS, BadSample
from tokgen.data.shard_set import ShardSet, features_identity
from tokgen.data.stream import ShardLoader
from tokgen.data.tar import RawSample, Unreadable, read_samples
from tokgen.errors import ConfigError, DataError

log = logging.getLogger(__name__)


class ShardsDataModule(L.LightningDataModule):
    """Streams shard folders (see `tokgen.data.shards`) into batches. The kind of batch follows from the manifest:

    - images: {"pixels": uint8 (B, 3, S, S), "caption": list[str], "key": list[str]}, and "features", float16 (B, N, C), where
      the shards hold features (`tokgen features`) of the very pictures that the batches hold
    - codes: {"ids": int64 (B, N[, C]), "mask": bool (B, N), "caption": list[str], "key": list[str]}, and
      "embedding", float32 (B, D), where the shards hold embeddings (`tokgen tokenize --embed`)
    - videos: {"pixels": uint8 (B, T, 3, S, S), "caption": list[str], "key": list[str]} with `frames`, and "trajectories",
      int32 (B, T, h, w), where the shards hold them (`tokgen trajectories`): 0, 1, … in each clip, -1 where there is none;
      without `frames` undecoded, {"video": list[bytes], "caption": list[str], "key": list[str]}
    - motion: {"motion": float32 (B, T, 2, h, w), "caption": list[str], "key": list[str]}; captions may be missing ("")

    Validation and test batches also hold "valid", bool (B,): False marks a repeat, which metrics must leave out. Every
    sample comes exactly once on the union of ranks; where samples do not divide, the ranks with fewer get a one-sample
    batch of repeats, so that all make the same number of steps.

    Args:
        train, val, test: shard folder or list of folders (paths, or http(s), s3, gs, hf locations).
        batch_size: samples per batch on each rank.
        num_workers: reader processes per rank.
        image_size: side of the square images, or frames, in pixels; None only with resize="none".
        resize: "crop" (central square), "random_crop" (a random square along the long side; central in validation),
            "squash" (aspect ratio lost) or "none" (images already have one size).
        random_flip: mirror half of the training images, clips (with their trajectories) or motion maps. Wrong for pictures with text, or captions with "left".
        random_shift: move training images by up to this many pixels each way, edges repeated.
        shuffle_buffer: undecoded samples that each reader draws from.
        seed: orders, augmentations and caption choices follow from it.
        steps_per_epoch: batches per epoch on each rank; None: as many as the data gives.
        max_bad_fraction: part of an epoch that may be bad before a DataError ends the run.
        max_member_bytes, max_pixels: larger files and images are skipped as bad.
        allow_shell_urls: accept `pipe:` locations, which run a command with {} replaced by the file name.
        caption_variants: probability of training with one of json["captions"] in place of the caption.
        caption_word_dropout: probability of dropping each caption word in training, outside the style phrase (the part
            after the last comma).
        filter: field -> accepted values, on the JSON metadata, such as {"group": ["animals-nature"]}; applies to all
            splits and costs one pass over their JSON members at set-up.
        multiprocessing_context: "fork", "spawn" or "forkserver"; None: Python's default.
        features: read the features of image shards. None: where the folders of all splits hold them from one encoder, for
            this image_size and resize, and pictures are not augmented; True: they must; False: never.
        frames: T, frames of a clip. In training it starts anywhere in the video, in validation it is the middle one; a
            shorter video repeats its last frame.
        fps: frames a second that videos are seen at: the frames nearest in time to k / fps; None: every frame of the file.
        frame_stride: from one frame of the clip to the next, at that rate.
        video_backend: "av", "torchcodec", "decord", or "auto" for the first of these that is installed; see
            `tokgen.data.video.open_video`.
        trajectories: read the trajectories of video shards. None: where all folders hold them from one source; True: they
            must; False: never. They fit only the fps and resize that they were made with.

    Attributes:
        kind: "images", "codes", "videos" or "motion" (after `setup`).
        meta: the manifest's meta (after `setup`); for codes the tokenizer's fingerprint, layout and codebook sizes, and
            "embedding", {"encoder": what made them, "dim": D, …}, where all samples have embeddings of one encoder; for
            images "features", {"encoder", "fingerprint", "shape", …}, and for videos "trajectories", {"source", "grid", …},
            where batches hold them.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        image_size: int | None = None,
        resize: str = "crop",
        random_flip: bool = False,
        random_shift: int = 0,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        max_bad_fraction: float = 0.01,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        max_pixels: int = MAX_PIXELS,
        allow_shell_urls: bool = False,
        caption_variants: float = 0.0,
        caption_word_dropout: float = 0.0,
        filter: dict[str, Any] | None = None,
        multiprocessing_context: str | None = None,
        features: bool | None = None,
        frames: int | None = None,
        fps: float | None = None,
        frame_stride: int = 1,
        video_backend: str = "auto",
        trajectories: bool | None = None,
    ):
        super().__init__()
        self.folders = {"train": train, "val": val, "test": test}
        if not any(self.folders.values()):
            raise ConfigError("ShardsDataModule needs at least one of train, val, test: a shard folder.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.image_size, self.resize = image_size, resize
        self.random_flip, self.random_shift = random_flip, random_shift
        self.shuffle_buffer, self.seed, self.steps_per_epoch = shuffle_buffer, seed, steps_per_epoch
        self.max_bad_fraction, self.max_member_bytes, self.max_pixels = max_bad_fraction, max_member_bytes, max_pixels
        self.allow_shell_urls = allow_shell_urls
        self.caption_variants, self.caption_word_dropout = caption_variants, caption_word_dropout
        self.filter, self.multiprocessing_context = filter, multiprocessing_context
        self.features, self.trajectories = features, trajectories
        self.frames, self.fps, self.frame_stride, self.video_backend = frames, fps, frame_stride, video_backend
        self._features: dict[str, Any] | None = None  # of the manifests; what batches hold, once the first set is open
        self.sets: dict[str, ShardSet] = {}
        self.loaders: dict[str, ShardLoader] = {}

    # ---------------------------------------------------------------------------------------------------- pre-flight

    def setup(self, stage: str | None = None) -> None:
        """Read manifests and check everything that can be checked before training.

        Raises:
            FileNotFoundError: a folder or manifest is missing, or the shards of half of the samples or more.
            DataError: a folder cannot be read, splits do not belong together, too few samples, a first sample that
                does not decode.
            ConfigError: an option that does not fit the data.
        """
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}.get(
            stage, ("train", "val", "test")
        )
        self._open(*wanted)
        sets = list(self.sets.items())
        for split, shards in sets[1:]:
            first, other = sets[0]
            if shards.kind != other.kind:
                raise DataError(
                    f"{first} holds {other.kind} and {split} holds {shards.kind}; both must be of one kind."
                )
            if shards.kind == "codes" and shards.meta.get("tokenizer") != other.meta.get("tokenizer"):
                raise DataError(
                    f"The codes of {first} and {split} were made by different tokenizers; use one for both."
                )
            made, wanted = (self._grid(each) and each.meta["trajectories"]["source"] for each in (shards, other))
            if made != wanted:
                raise DataError(
                    f"The trajectories of {first} come from {wanted or 'nowhere'}, those of {split} from {made or 'nowhere'}; make both with one "
                    f"`tokgen trajectories`, or leave them out with trajectories=False."
                )
        world = self._world()[1]
        if "train" in self.sets and self.sets["train"].samples < world * self.batch_size:
            self._loader("train", train=True)  # raises, in words

    def _open(self, *splits: str) -> None:
        new = {split: self._read(split) for split in splits if self.folders[split] and split not in self.sets}
        if not self.sets:
            self._features = self._choose_features(new)
        elif self.features and any(not self._holds_features(shards) for shards in new.values()):
            raise ConfigError(
                f"features is true, and {' and '.join(new)} holds other features than {next(iter(self.sets))}"
            )
        for shards in new.values():
            self._check_first_sample(shards)
        self.sets |= new

    def _read(self, split: str) -> ShardSet:
        shards = ShardSet.open(self.folders[split], self.allow_shell_urls)
        shards.check_files()
        return shards.select(self.filter) if self.filter else shards

    def _choose_features(self, sets: dict[str, ShardSet]) -> dict[str, Any] | None:
        """The features that batches shall hold, as manifests describe them; None for none."""
        found = [shards.meta.get("features") for shards in sets.values() if shards.kind == "images"]
        if self.features is False or (self.features is None and not any(found)):
            return None
        problem = self._no_features(sets)
        if problem and self.features:
            raise ConfigError(f"features is true, but {problem}")
        if problem:
            log.warning("Precomputed features are not read: %s.", problem)
            return None
        return found[0]

    def _no_features(self, sets: dict[str, ShardSet]) -> str:
        """Why features cannot be used; "" if they can."""
        altered = {"random_flip": self.random_flip, "random_shift": self.random_shift}
        altered["resize=random_crop"] = self.resize == "random_crop"
        names = [name for name, on in altered.items() if on]
        if names:
            return (
                f"they belong to the picture as it was, and {' and '.join(names)} changes it; turn one of the two off"
            )
        for split, shards in sets.items():
            if shards.kind != "images" or not shards.meta.get("features"):
                return f"{split} does not hold features of one encoder in all its folders; make them with `tokgen features`"
        if len({features_identity(shards.meta) for shards in sets.values()}) > 1:
            return f"{' and '.join(sets)} hold features of different encoders or pictures; make all with one `tokgen features`"
        made = next(iter(sets.values())).meta["features"]
        # "none" is said of pictures that all have one size already, which "crop" and "squash" leave as they are
        alike = made["resize"] == self.resize or "none" in (made["resize"], self.resize)
        alone = self.image_size is None and (made["resize"], self.resize) == ("none", "none")
        if not alone and (not alike or made["size"] != self.image_size):
            return (
                f"they were made for image_size {made['size']} and resize {made['resize']!r}, and the data module has "
                f"{self.image_size} and {self.resize!r}; give it those, or make the features again"
            )
        return ""

    def _holds_features(self, shards: ShardSet) -> bool:
        """Whether batches of that set hold the features chosen."""
        wanted = self._features and features_identity({"features": self._features})
        return wanted is not None and features_identity(shards.meta) == wanted

    def _grid(self, shards: ShardSet) -> tuple[int, int] | None:
        """(h, w) of the trajectories that batches of that set hold; None for none."""
        made = shards.meta.get("trajectories")
        if shards.kind != "videos" or not self.frames or self.trajectories is False or not (made or self.trajectories):
            return None
        if not made:
            raise ConfigError(
                f"trajectories is true, and {shards.shards[0].folder} does not hold trajectories of one source in all its "
                f"folders; make them with `tokgen trajectories`"
            )
        ours = {"fps": self.fps, "resize": self.resize}
        other = [name for name, value in ours.items() if made[name] != value]
        if other:
            raise ConfigError(
                f"The trajectories of {shards.shards[0].folder} were made for "
                f"{' and '.join(f'{name} {made[name]}' for name in other)}, and the data module has "
                f"{' and '.join(f'{name} {ours[name]}' for name in other)}; give it those, make the trajectories again, or "
                f"leave them out with trajectories=False."
            )
        return tuple(made["grid"])

    def _check_first_sample(self, shards: ShardSet) -> None:
        """Decode the first good sample among the first few: wrong options show before training, not in a worker."""
        samples = self._samples(shards, train=False)
        options = {"extensions": samples.extensions, "max_member_bytes": self.max_member_bytes}
        errors: list[str] = []
        for shard in shards.shards:
            try:
                for _, raw in read_samples(shard.location, shards.allow_shell_urls, **options):
                    if self._is_good(shards.kind, samples, raw, shard.location, errors):
                        return
                    if len(errors) == 16:
                        break
                break
            except Unreadable as error:  # then the next shard
                unreadable = error
        else:
            raise DataError(f"None of the {len(shards.shards)} shards can be read: {unreadable}") from unreadable
        log.warning("None of the first %d samples of %s is good: %s.", len(errors), shard.location, errors[:3])

    def _is_good(self, kind: str, samples: Any, raw: RawSample, where: str, errors: list[str]) -> bool:
        """Whether the sample decodes; if not, why is added to `errors`."""
        try:
            if raw.problem:
                raise BadSample(raw.problem)
            item = samples(raw, None)
        except BadSample as error:
            errors.append(str(error))
            return False
        samples.collate([item])
        if kind == "images" and self.resize != "none":
            self._check_size(raw, where)
        return True

    def _check_size(self, raw: Any, where: str) -> None:
        samples = ImageSamples(Captions(required=False), None, "none", train=False, max_pixels=self.max_pixels)
        height, width = samples(raw, None)["pixels"].shape[-2:]
        if min(height, width) < self.image_size:
            log.warning(
                "Images are enlarged: %s in %s has %dx%d pixels (width x height), and image_size is %d.",
                raw.key, where, width, height, self.image_size,
            )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- loaders

    @property
    def kind(self) -> str:
        return self._any_set().kind

    @property
    def meta(self) -> dict[str, Any]:
        shards = self._any_set()
        held = {"features": bool(self._features), "trajectories": self._grid(shards) is not None}
        return {name: value for name, value in shards.meta.items() if held.get(name, True)}

    def _any_set(self) -> ShardSet:
        if not self.sets:
            self.setup()
        return next(iter(self.sets.values()))

    def _world(self) -> tuple[int, int]:
        """(rank, world size), from the trainer; (0, 1) without one."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def _samples(self, shards: ShardSet, train: bool) -> Any:
        captions = Captions(
            required=bool(shards.meta.get("captions", True)),
            variants=self.caption_variants if train else 0.0,
            word_dropout=self.caption_word_dropout if train else 0.0,
        )
        if shards.kind == "images":
            try:
                return ImageSamples(
                    captions, self.image_size, self.resize, self.random_flip, self.random_shift, train, self.max_pixels,
                    tuple(self._features["shape"]) if self._holds_features(shards) else None,
                )  # fmt: skip
            except ValueError as error:
                raise ConfigError(str(error)) from error
        if shards.kind == "codes":
            embedding = shards.meta.get("embedding") or {}
            return CodeSamples(captions, tuple(shards.meta.get("codebook_sizes") or ()), embedding.get("dim"))
        if shards.kind == "motion":
            shape = tuple(shards.meta.get("shape") or MotionSamples.shape)
            return MotionSamples(replace(captions, required=False), shape, self.random_flip, train)
        if self.frames is None:
            if self.trajectories:
                raise ConfigError("trajectories is true, but without frames videos are not decoded; give frames")
            return VideoSamples(captions)
        if self.random_shift:
            raise ConfigError("random_shift moves images and not clips; leave it at 0 for videos")
        try:
            return ClipSamples(
                captions, self.frames, self.fps, self.frame_stride, self.image_size, self.resize, self.random_flip, train,
                self.max_pixels, self._grid(shards), self.video_backend,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _loader(self, split: str, train: bool) -> ShardLoader:
        loader = self._make_loader(split, train)
        if split in self.loaders:
            self.loaders[split].close()
        elif train and self.trainer is not None:
            loader.epoch = self.trainer.current_epoch
        self.loaders[split] = loader
        return loader

    def _make_loader(self, split: str, train: bool) -> ShardLoader:
        if not self.folders[split]:
            raise ConfigError(f"There is no {split} split: give the data module {split}=FOLDER.")
        self._open(split)
        rank, world = self._world()
        steps = self.steps_per_epoch if train else None
        limit = self.trainer.limit_train_batches if train and self.trainer is not None else None
        if isinstance(limit, int) and 0 < limit < (steps or self.sets[split].samples // (world * self.batch_size)):
            steps = limit  # Lightning would cut every epoch short; as a length of their own, epochs go on where the last ended
        return ShardLoader(
            self.sets[split], self._samples(self.sets[split], train), batch_size=self.batch_size, rank=rank, world=world,
            num_workers=self.num_workers, seed=self.seed, train=train, shuffle_buffer=self.shuffle_buffer,
            steps_per_epoch=steps, max_bad_fraction=self.max_bad_fraction, max_member_bytes=self.max_member_bytes,
            pin_memory=torch.cuda.is_available(), multiprocessing_context=self.multiprocessing_context,
        )  # fmt: skip

    def place(self, state: Mapping[str, Any]) -> tuple[int, int] | None:
        """(batches done, of how many in the epoch) for a trainer that resumes a loader's `state` under other conditions.

        The rest of that epoch is then shared among other readers, and the epoch shall end when the rest does. None where the
        conditions are the same, so that what the trainer itself has counted holds.
        """
        loader = self._make_loader("train", train=True)
        if not loader.changed(state):
            return None
        loader.load_state_dict(state)
        whole = len(loader)
        return (whole if loader.epoch > state["epoch"] else max(whole - loader.left, 0)), whole

    def train_dataloader(self) -> ShardLoader:
        return self._loader("train", train=True)

    def val_dataloader(self) -> ShardLoader | list:
        return self._loader("val", train=False) if self.folders["val"] else []

    def test_dataloader(self) -> ShardLoader:
        return self._loader("test", train=False)

    def predict_dataloader(self) -> ShardLoader:
        return self._loader("test", train=False)

    def teardown(self, stage: str | None = None) -> None:
        for loader in self.loaders.values():
            loader.close()
