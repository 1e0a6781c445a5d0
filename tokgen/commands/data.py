"""Commands that make data sets: shards of files, of codes, of features, of motion, of trajectories."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from tokgen.commands.models import best_device, encode_options, load_tokenizer
from tokgen.errors import InputError


def pack(
    source: str,
    out: str,
    size: int | None = None,
    format: Literal["keep", "png", "webp", "jpg"] = "keep",
    max_samples: int = 10_000,
    path_column: str | None = None,
    caption_column: str | None = None,
) -> None:
    """Make shards of a folder of images or videos with captions beside them, or of a csv or parquet with paths and captions.

    Args:
        source: the folder, .csv or .parquet.
        out: folder for the shards and their manifest.
        size: short side to scale images to; they stay as they are without it.
        format: "keep" keeps the bytes of each image; others encode anew.
        max_samples: samples in a shard.
        path_column: column of the csv or parquet that holds paths; found by name without it.
        caption_column: the same for captions.
    """
    from tokgen.data.pack import pack as run

    print(
        run(
            source, out, size=size, format=None if format == "keep" else format, max_samples=max_samples,
            path_column=path_column, caption_column=caption_column,
        )
    )  # fmt: skip


def tokenize(
    shards: str,
    model: str,
    out: str,
    embed: str | None = None,
    size: int | None = None,
    batch_size: int = 32,
    resize: Literal["crop", "squash"] = "crop",
    max_samples: int = 10_000,
    keep: int | float | None = None,
    frames: int | None = None,
    fps: float | None = None,
    frame_stride: int = 1,
    device: str | None = None,
) -> None:
    """Write code shards (ids and captions) of image, video or motion shards, for generators to train on; continues an interrupted run.

    Processes started with the same options share the work, max_samples at a time: under torchrun
    (`torchrun --nproc-per-node 8 -m tokgen tokenize …`), or one by one on machines that share the folder. What is written does
    not depend on their number, and those that are left do the work of one that is lost.

    Args:
        shards: folder of image shards, of video shards, of each of which the clip in the middle is taken, or of motion shards.
        model: folder or Hub name of the tokenizer.
        out: folder for the code shards.
        embed: image encoder whose embedding of each picture is stored too, for global alignment (ARRA): a folder, or a
            name such as "transformers:openai/clip-vit-large-patch14".
        size: side of the square images; without it they are taken as they are, or as the tokenizer needs them.
        batch_size: images or clips encoded at once.
        resize: how images become square.
        max_samples: samples in a shard, and what a process takes at a time.
        keep: of tokenizers that choose how many tokens a picture gets: a count, or a share such as 0.25.
        frames: of videos, frames of a clip.
        fps: of videos, frames a second; every frame of the file without it.
        frame_stride: of videos, from one frame of the clip to the next, at that rate.
        device: such as "cuda:0"; the best there is without it, under torchrun a GPU for each process.
    """
    from tokgen.precompute import tokenize_shards

    device = _device(device)
    tokenizer = load_tokenizer(model, device)
    options = encode_options(tokenizer, keep=keep)
    encoder = None
    if embed is not None:
        from tokgen.encoders.base import load_encoder

        encoder = load_encoder(embed).to(device)
    report = tokenize_shards(
        tokenizer, shards, out, encoder=encoder, encoder_from=embed, size=size, batch_size=batch_size, resize=resize,
        max_samples=max_samples, options=options, frames=frames, fps=fps, frame_stride=frame_stride,
    )  # fmt: skip
    print(f"{report}; code shards are in {out}")


def features(
    shards: str,
    encoder: str,
    out: str,
    size: int | None = None,
    resize: Literal["squash", "crop"] = "squash",
    batch_size: int = 32,
    max_samples: int = 10_000,
    device: str | None = None,
) -> None:
    """Write image shards with a frozen encoder's features, for semantic tokenizers to train on; continues an interrupted run.

    Processes share the work, as with `tokgen tokenize`.

    Args:
        shards: folder of image shards.
        encoder: what the tokenizer's config.encoder names: a folder, or a name such as "timm:vit_base_patch16_224.dino".
        out: folder for the image shards with features.
        size: side of the square images, image_size in training; without it all images must be squares of one size.
        resize: how images become square, as in training.
        batch_size: images encoded at once.
        max_samples: samples in a shard, and what a process takes at a time.
        device: such as "cuda:0"; the best there is without it, under torchrun a GPU for each process.
    """
    from tokgen.encoders.base import load_encoder
    from tokgen.precompute import feature_shards

    network = load_encoder(encoder).to(_device(device))
    report = feature_shards(
        network, shards, out, encoder_from=encoder, size=size, resize=resize, batch_size=batch_size, max_samples=max_samples
    )  # fmt: skip
    print(f"{report}; image shards with features of {network.name} are in {out}")


def _device(device: str | None) -> str:
    """The one asked for, or the best there is; of several GPUs the one that torchrun means for this process."""
    import torch

    device = device or best_device()
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device


def motion(
    source: str,
    out: str,
    method: Literal["codec", "match"] = "codec",
    fps: float = 6.0,
    side: int = 640,
    clips: int | None = None,
    max_samples: int = 2000,
) -> None:
    """Write motion shards of videos, for motion tokenizers to train on; continues an interrupted run.

    Args:
        source: folder of videos (NAME.txt beside NAME.mp4 is its caption), or of video shards.
        out: folder for the motion shards.
        method: "codec" takes the motion vectors of MPEG-4 part 2, as published; "match" finds them by block matching.
        fps: frames a second; the publication has 6.
        side: longer side that larger pictures are shrunk to, in pixels.
        clips: of each video, at most; all without it.
        max_samples: samples in a shard.
    """
    from tokgen.data.motion import motion_shards

    report = motion_shards(source, out, method=method, fps=fps, side=side, clips=clips, max_samples=max_samples)
    print(f"{report}; motion shards are in {out}")


def trajectories(
    videos: str,
    out: str,
    source: str = "voting",
    set: list[str] | None = None,
    size: int = 160,
    resize: Literal["crop", "squash"] = "crop",
    grid: int = 56,
    fps: float | None = None,
    max_frames: int = 3000,
    workers: int = 0,
    max_samples: int = 500,
    picture: str | None = None,
) -> None:
    """Find which pixels of videos belong together through time; writes video shards with trajectories; continues a run.

    Processes share the work, as with `tokgen tokenize`; on one machine --workers is simpler.

    Args:
        videos: folder of video shards; or one video file, whose trajectories are written as OUT_mask.npz and OUT_graph.npz.
        out: folder for the video shards with trajectories; of one video, what its files' names begin with.
        source: what finds them: voting (on any computer), sam2, segmenter; or arrays, your own, with --set folder=DIR, where
            DIR/KEY_mask.npz and DIR/KEY_graph.npz are those of the video KEY.
        set: the source's settings, such as budget=64.
        size: side of the square pictures that the source sees.
        resize: how pictures become square, as in training.
        grid: side of the square grid that trajectories are kept on.
        fps: pictures a second, as in training; every frame of the file without it.
        max_frames: videos of more pictures are left out.
        workers: processes; 0 works in this one.
        max_samples: samples in a shard, and what a process takes at a time.
        picture: also draw the first video: a .png of some of its pictures, or a .gif or .mp4 of all.
    """
    from tokgen.trajectories.picture import check_picture, write_picture
    from tokgen.trajectories.precompute import Frames, stored_clips, trajectory_shards, trajectory_sidecar

    settings = {"type": source, **_assignments(set or [])}
    if picture is not None:
        check_picture(picture)
        picture = picture if os.environ.get("RANK", "0") == "0" else None  # one process draws it
    frames = Frames(size=size, resize=resize, grid=grid, fps=fps, max_frames=max_frames)
    if Path(videos).is_file():
        pictures, found = trajectory_sidecar(videos, out, settings, frames)
        print(
            f"{found.count} trajectories through {len(pictures.frames)} pictures, in {out}_mask.npz and {out}_graph.npz"
        )
    else:
        report = trajectory_shards(videos, out, settings, frames, workers=workers, max_samples=max_samples)
        print(f"{report}; video shards with trajectories are in {out}")
        if picture is not None:
            _, pictures, found = next(stored_clips(out))
    if picture is not None:
        write_picture(picture, pictures.frames, found, fps=pictures.fps)
        print(f"drawn to {picture}")


def _assignments(words: list[str]) -> dict[str, Any]:
    """Of words key=value, where a value is written as in YAML. Raises InputError for another."""
    import yaml

    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not key.isidentifier():
            raise InputError(f"--set takes key=value, such as budget=64, and not {word!r}")
    return settings
