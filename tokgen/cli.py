"""`tokgen`: train, use and check tokenizers and generators from the command line.

`tokgen fit|validate|test|predict` is Lightning's CLI with several -c files (what x where); the other commands take the
same kind of options and --config files. A mistake of the user's ends with one line and code 2; `--debug` shows where.
"""

from __future__ import annotations

import inspect
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from tokgen.errors import InputError, TokgenError

TRAINING = ("fit", "validate", "test", "predict")


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
    """Write code shards (ids and captions) of image or video shards, for generators to train on; continues an interrupted run.

    Args:
        shards: folder of image shards, or of video shards, of each of which the clip in the middle is taken.
        model: folder or Hub name of the tokenizer.
        out: folder for the code shards.
        embed: image encoder whose embedding of each picture is stored too, for global alignment (ARRA): a folder, or a
            name such as "transformers:openai/clip-vit-large-patch14".
        size: side of the square images; without it they are taken as they are, or as the tokenizer needs them.
        batch_size: images or clips encoded at once.
        resize: how images become square.
        max_samples: samples in a shard.
        keep: of tokenizers that choose how many tokens a picture gets: a count, or a share such as 0.25.
        frames: of videos, frames of a clip.
        fps: of videos, frames a second; every frame of the file without it.
        frame_stride: of videos, from one frame of the clip to the next, at that rate.
        device: such as "cuda:0"; the best there is without it.
    """
    from tokgen.precompute import tokenize_shards

    tokenizer = _load(model, "tokenizer", device)
    options = _encode_options(tokenizer, keep=keep)
    encoder = None
    if embed is not None:
        from tokgen.encoders.base import load_encoder

        encoder = load_encoder(embed).to(device or _best_device())
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

    Args:
        shards: folder of image shards.
        encoder: what the tokenizer's config.encoder names: a folder, or a name such as "timm:vit_base_patch16_224.dino".
        out: folder for the image shards with features.
        size: side of the square images, image_size in training; without it all images must be squares of one size.
        resize: how images become square, as in training.
        batch_size: images encoded at once.
        max_samples: samples in a shard.
        device: such as "cuda:0"; the best there is without it.
    """
    from tokgen.encoders.base import load_encoder
    from tokgen.precompute import feature_shards

    network = load_encoder(encoder).to(device or _best_device())
    report = feature_shards(
        network, shards, out, encoder_from=encoder, size=size, resize=resize, batch_size=batch_size, max_samples=max_samples
    )  # fmt: skip
    print(f"{report}; image shards with features of {network.name} are in {out}")


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
        max_samples: samples in a shard.
        picture: also draw the first video: a .png of some of its pictures, or a .gif or .mp4 of all.
    """
    from tokgen.trajectories.picture import check_picture, write_picture
    from tokgen.trajectories.precompute import Frames, stored_clips, trajectory_shards, trajectory_sidecar

    settings = {"type": source, **_assignments(set or [])}
    if picture is not None:
        check_picture(picture)
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


def encode(
    images: list[str],
    model: str,
    out: str,
    size: int | None = None,
    resize: Literal["crop", "squash"] = "crop",
    keep: int | float | None = None,
    device: str | None = None,
) -> None:
    """Turn images into a file of tokens.

    Args:
        images: .jpg, .png or .webp files; several must come to one size.
        model: folder or Hub name of the tokenizer.
        out: the token file to write (.safetensors).
        size: side of the square images; without it that which the tokenizer is made for, or else images are cropped to the
            tokenizer's factor.
        resize: how images become square: the centre, or the whole without regard to its aspect ratio.
        keep: of tokenizers that choose how many tokens a picture gets: a count, or a share such as 0.25.
        device: such as "cuda:0"; the best there is without it.
    """
    import torch

    from tokgen.data.batches import resize_image
    from tokgen.images import read_image

    if Path(out).suffix != ".safetensors":
        raise InputError(
            f"tokens are written as safetensors; give --out a name that ends in .safetensors instead of {out!r}"
        )
    tokenizer = _load(model, "tokenizer", device)
    _need_pictures(tokenizer, model)
    options = _encode_options(tokenizer, keep=keep)
    size = tokenizer.image_size[0] if size is None and tokenizer.image_size is not None else size
    if resize == "squash":
        if size is None:
            raise InputError("--resize squash needs a size to squash to; give --size")
        pictures = [resize_image(read_image(path), size, resize) for path in images]
    else:
        pictures = [read_image(path, size, tokenizer.factor) for path in images]
    if len({p.shape for p in pictures}) > 1:
        raise InputError(
            f"the images come to different sizes {sorted({tuple(p.shape[1:]) for p in pictures})}; give --size"
        )
    tokens = tokenizer.encode(torch.stack(pictures), **options).cpu()
    tokens.save(out)
    lengths = sorted(set(tokens.lengths.tolist()))
    ragged = f", {lengths[0]} to {lengths[-1]} tokens" if len(lengths) > 1 else f", {lengths[0]} tokens"
    print(f"{len(tokens)} image(s), {tokens.layout}{ragged}, {tokens.bits.mean():.0f} bits each, saved to {out}")


def decode(
    tokens: str,
    model: str,
    out: str,
    pipeline: str | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    columns: int | None = None,
    device: str | None = None,
) -> None:
    """Turn a file of tokens back into a picture (several become a grid).

    Args:
        tokens: a file that `tokgen encode` wrote.
        model: folder or Hub name of the tokenizer that made them.
        out: the .png to write.
        pipeline: folder or Hub name of the diffusion pipeline that a semantic tokenizer's codes condition (seed, lavit); the
            tokenizer's own decoder without it.
        seed: of the first picture that a pipeline draws, counted up from there.
        guidance_scale, num_inference_steps: of the pipeline; those published with the tokenizer without them.
        columns: pictures in a row of the grid.
        device: such as "cuda:0"; the best there is without it.
    """
    from tokgen.images import image_grid, write_png
    from tokgen.tokens import Tokens

    loaded, tokenizer = Tokens.load(tokens), _load(model, "tokenizer", device)
    _need_pictures(tokenizer, model)
    settings: dict[str, Any] = {"tokens": Path(tokens).name, "tokenizer": loaded.tokenizer}
    given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    given = {name: value for name, value in given.items() if value is not None}
    if pipeline is not None:
        if not hasattr(tokenizer, "draw"):
            raise InputError(f"--pipeline says nothing about {model} ({tokenizer.type_name}), which decodes by itself")
        settings |= {"pipeline": pipeline, "seed": seed, **given}
        pixels = tokenizer.draw(loaded, pipeline, generator=seed, **given)
    elif given:
        raise InputError(f"--{next(iter(given))} is for a diffusion pipeline; give --pipeline too, or leave it out")
    else:
        pixels = tokenizer.decode(loaded)
    if pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)  # the frames of clips, one after the other
    write_png(pixels[0] if len(pixels) == 1 else image_grid(pixels, columns), out, settings)
    print(f"{len(pixels)} image(s) of {pixels.shape[-2]} x {pixels.shape[-1]} decoded to {out}")


def sample(
    prompts: list[str],
    model: str,
    out: str = "sample.png",
    num_images_per_prompt: int = 1,
    seed: int = 0,
    guidance_scale: float | None = None,
    guidance_schedule: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    negative_prompt: str | None = None,
    passes: list[tuple[float, float]] | None = None,
    scale: int = 1,
    fps: float = 8.0,
    precision: Literal["float32", "bfloat16", "int8"] = "float32",
    speculative: int = 1,
    compile: bool = False,
    device: str | None = None,
) -> None:
    """Draw pictures or clips from text. Settings left out take the values published with the generator.

    Args:
        prompts: one or more texts.
        model: folder or Hub name of the generator; it names or holds its tokenizer.
        out: the .png to write; several pictures become a grid. The effective settings are stored in it. Clips can also be
            written as .gif or .mp4; as .png, each is a row of its frames.
        num_images_per_prompt: pictures for each prompt.
        seed: picture i uses seed + i, so that it comes out the same in any batch.
        guidance_scale: 1 is no guidance.
        guidance_schedule: how guidance grows over the picture.
        temperature: 0 takes the likeliest code.
        top_k: draw among the k likeliest codes (0: all).
        top_p: draw among the likeliest codes that make up this probability (1: all).
        min_p: drop codes less likely than this share of the likeliest (0: none).
        negative_prompt: what guidance leads away from; without it the empty prompt.
        passes: of generators that draw scale by scale: top_k and top_p of each further pass over a scale, such as
            "[[100, 0.8], [1, 1.0]]".
        scale: enlarge the pictures by this whole number when writing.
        fps: frames a second of a .gif or .mp4.
        precision: of the generator; int8 keeps weights in 8 bits and is the fastest for few pictures.
        speculative: let an int8 copy guess this many steps ahead, checked by the generator in one call: the same
            pictures in fewer calls, which pays off where a call of many steps costs little more than one.
        compile: compile the decoding step; pays off for many or large pictures.
        device: such as "cuda:0"; the best there is without it.
    """
    import torch

    from tokgen.generators.pipeline import TextToImagePipeline
    from tokgen.images import image_grid, write_png

    if not prompts or any(not p.strip() for p in prompts):
        raise InputError('a prompt is empty; say what to draw, such as "red heart, 3d style"')
    pipeline = TextToImagePipeline.from_pretrained(model, device=device or _best_device(), precision=precision)
    frames, end = getattr(pipeline.generator.layout, "t", None), Path(out).suffix.lower()
    if end != ".png" and (frames is None or end not in (".gif", ".mp4")):
        kinds = ".png" if frames is None else ".png, .gif or .mp4"
        raise InputError(f"what {model} draws is written as {kinds}; give --out a name that ends so instead of {out!r}")
    count = len(prompts) * num_images_per_prompt
    given = {
        "guidance_scale": guidance_scale, "schedule": guidance_schedule, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "min_p": min_p, "negative_prompt": negative_prompt, "passes": passes,
    }  # fmt: skip
    result = pipeline(
        prompts,
        num_images_per_prompt=num_images_per_prompt,
        generator=[seed + i for i in range(count)],
        output_type="pt",
        speculative=speculative,
        draft=pipeline.generator.int8() if speculative > 1 else None,
        compile=compile,
        progress=sys.stderr.isatty(),
        **{name: value for name, value in given.items() if value is not None},
    )
    pixels = result.images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    settings = {**result.settings, "prompts": prompts, "seed": seed, "num_images_per_prompt": num_images_per_prompt}
    columns = num_images_per_prompt if num_images_per_prompt > 1 else None
    if end != ".png":
        from tokgen.trajectories.picture import write_video

        clips = pixels if pixels.ndim == 5 else pixels[:, None]  # (B, T, 3, H, W)
        grids = [image_grid(at, columns) for at in clips.unbind(1)]  # of each moment, all clips
        write_video(torch.stack(grids).permute(0, 2, 3, 1).numpy(), out, fps)
    elif pixels.ndim == 5:
        write_png(image_grid(pixels.flatten(0, 1), pixels.shape[1]), out, settings)
    else:
        write_png(pixels[0] if count == 1 else image_grid(pixels, columns), out, settings)
    report = result.report
    steps = f", {report.steps_per_call:.1f} steps a call" if speculative > 1 else ""
    print(
        f"{count} {'picture' if pixels.ndim == 4 else 'clip'}(s) drawn to {out}, {report.ids_per_second:.0f} tokens/s{steps}"
    )


def check(target: str) -> None:
    """Check a model folder, a registered tokenizer or quantizer by name, or a folder of shards.

    Args:
        target: folder or Hub name of a tokenizer, a name such as "vqgan" or "fsq", or a shard folder.
    """
    from tokgen.conformance import check as check_laws
    from tokgen.conformance import examples
    from tokgen.quantizers.base import QUANTIZERS
    from tokgen.tokenizers.base import TOKENIZERS, VisualTokenizer

    if (Path(target) / "manifest.json").is_file():
        from tokgen.data.shards import Manifest, verify

        problems = verify(target)
        if problems:
            raise TokgenError(f"{target} is damaged:\n  " + "\n  ".join(problems))
        print(f"{target}: {Manifest.load(target).samples} samples, every shard is whole")
        return
    if target in TOKENIZERS or target in QUANTIZERS:
        modules = list(examples(target))
    else:
        module = _load(target, None, None)
        if not isinstance(module, VisualTokenizer):
            raise InputError(f"{target} is {_what(module)}; `tokgen check` takes tokenizers, quantizers and shards")
        modules = [(target, module)]
    broken = 0
    for label, module in modules:
        findings = check_laws(module)
        for finding in findings:
            if finding.problem:
                print(f"{label}: {finding.law} ({finding.case}): {finding.problem}")
        broken += sum(bool(f.problem) for f in findings)
        print(f"{label}: {sum(not f.problem for f in findings)} of {len(findings)} checks hold")
    if broken:
        raise TokgenError(f"{target} breaks {broken} law(s), listed above")


def convert(
    family: Literal[
        "llamagen-vq",
        "llamagen-gpt",
        "ibq",
        "eva",
        "clip",
        "seed",
        "lavit",
        "video-lavit-motion",
        "emu3",
        "tokenflow",
        "tokenflow-t2i",
    ],
    checkpoint: str,
    out: str,
    tokenizer: str | None = None,
    grid: int | None = None,
    heads: int | None = None,
    text_encoder: str | None = None,
    class_names: str | None = None,
    form: Literal["seed", "lavit", "clip", "siglip", "tokenflow"] | None = None,
    vit: str | None = None,
    decoder: str | None = None,
    visual_weight: str | None = None,
    text: str | None = None,
    ema: bool | None = None,
    l2_normalize: bool | None = None,
    resolution: int | None = None,
) -> None:
    """Turn a published checkpoint into a model folder, strictly: every tensor is mapped or named as ignored.

    Args:
        family: which published layout it has.
        checkpoint: the downloaded file, such as seed_quantizer.pt of seed, tokenizer_encoder.bin of lavit,
            motion_tokenizer.bin of video-lavit-motion, eva_vit_g.pth or eva_vitg_psz14.bin of eva; of emu3 also a folder,
            of tokenflow-t2i always.
        out: folder to write.
        tokenizer: of a generator: folder of the tokenizer whose codes it draws (converted before), which is recorded;
            tokenflow-t2i reads its code vectors.
        grid: of llamagen-gpt: side of the square of codes, such as 24; taken from published file names without it.
        heads: of llamagen-gpt, clip, lavit and video-lavit-motion: attention heads, for sizes that were not published.
        text_encoder: of llamagen-gpt by text: Hub name or folder of the T5; the published one without it.
        class_names: of llamagen-gpt by class: text file of names, one in a line; numbers without it.
        form: of eva: whose vision tower it is (seed, lavit). Of clip: "clip", with its projection, as a teacher; "siglip", its states
            before the last block; "tokenflow", CLIP as TokenFlow's encoder begins, on pixels in [-1, 1].
        vit: of seed and lavit: file of the vision tower, eva_vit_g.pth or eva_vitg_psz14.bin.
        decoder: of lavit: tokenizer_decoder.bin or highres_tokenizer_decoder.bin.
        visual_weight: of lavit: visual_weight.bin, the features that its language model reads; left out without it.
        text: Hub name or folder of a text vocabulary: BERT's of seed with its text side, Llama-2's of tokenflow-t2i.
        ema: of ibq: false takes the weights themselves, not their moving average; the average if there is one without it.
        l2_normalize: of ibq: true where vectors and codes are normalised, which the tensors do not tell.
        resolution: of tokenflow B: 256 to interpolate its positions; the size it was trained for without it.
    """
    from tokgen.generators.base import Generator
    from tokgen.importers.clip import load_clip
    from tokgen.importers.emu3 import load_emu3
    from tokgen.importers.eva import load_eva
    from tokgen.importers.ibq import load_ibq
    from tokgen.importers.lavit import load_lavit
    from tokgen.importers.llamagen import load_vq
    from tokgen.importers.llamagen_gpt import load_gpt
    from tokgen.importers.seed import load_seed
    from tokgen.importers.tokenflow import load_tokenflow
    from tokgen.importers.tokenflow_t2i import load_t2i
    from tokgen.importers.video_lavit import load_motion_tokenizer

    loaders: dict[str, Callable[..., Any]] = {
        "llamagen-vq": load_vq,
        "llamagen-gpt": load_gpt,
        "ibq": load_ibq,
        "eva": load_eva,
        "clip": load_clip,
        "seed": load_seed,
        "lavit": lambda path, vit, decoder, visual_weight=None, heads=None: load_lavit(
            vit, path, decoder, visual_weight, heads
        ),
        "video-lavit-motion": load_motion_tokenizer,
        "emu3": load_emu3,
        "tokenflow": load_tokenflow,
        "tokenflow-t2i": load_t2i,
    }
    loader, options = loaders[family], {"grid": grid, "heads": heads, "text_encoder": text_encoder}
    options |= {"class_names": class_names, "form": form, "vit": vit, "decoder": decoder}
    options |= {"visual_weight": visual_weight, "text": text, "ema": ema, "l2_normalize": l2_normalize}
    options |= {"resolution": resolution}
    options = {name: value for name, value in options.items() if value is not None}
    wanted = dict(list(inspect.signature(loader).parameters.items())[1:])  # beside the checkpoint
    for name in options:
        if name not in wanted:
            raise InputError(f"--{name} says nothing about {family}; leave it out")
    if tokenizer is not None and "tokenizer" in wanted:
        options["tokenizer"] = tokenizer
    for name, parameter in wanted.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise InputError(f"{family} also needs --{name}; `tokgen convert --help` says what it is")
    if tokenizer is not None and not Path(tokenizer).is_dir():
        raise InputError(f"no tokenizer folder at {tokenizer}; make it with tokgen convert")
    visual = None if tokenizer is None else _load(tokenizer, "tokenizer", "cpu")
    if "tokenizer" in options:
        options["tokenizer"] = visual
    module, report = loader(checkpoint, **options)
    if visual is not None:
        if not isinstance(module, Generator):
            raise InputError(f"--tokenizer says nothing about {family}; leave it out")
        module.check_tokenizer(visual)
        module.tokenizer_fingerprint = visual.fingerprint
        module.visual_tokenizer = os.path.relpath(tokenizer, out)
    module.save_pretrained(out)
    print(f"{report}\nsaved to {out}")


COMMANDS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (pack, tokenize, features, motion, trajectories, encode, decode, sample, check, convert)
}
POSITIONAL = {
    "pack": ["source"], "tokenize": ["shards"], "features": ["shards"], "motion": ["source"],
    "trajectories": ["videos", "out"], "encode": ["images"], "decode": ["tokens"],
    "sample": ["prompts"], "check": ["target"], "convert": ["family", "checkpoint"],
}  # fmt: skip


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


def _best_device() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return str(accelerator) if accelerator is not None and torch.accelerator.is_available() else "cpu"


def _load(model: str, expected: str | None, device: str | None) -> Any:
    from tokgen.hub import load
    from tokgen.tokenizers.base import VisualTokenizer

    module = load(model, device=device or _best_device())
    if expected == "tokenizer" and not isinstance(module, VisualTokenizer):
        raise InputError(f"{model} is {_what(module)}; a tokenizer is needed here")
    return module


def _what(module: Any) -> str:
    from tokgen.encoders.base import ImageEncoder

    return (
        f"an image encoder ({module.name})" if isinstance(module, ImageEncoder) else f"a generator ({module.type_name})"
    )


def _need_pictures(tokenizer: Any, model: str) -> None:
    if tokenizer.modality != "pixels" or 4 not in tokenizer.ndims:
        raise InputError(
            f"{model} is a {tokenizer.type_name}, whose tokens stand for {tokenizer.modality} and not for pictures; use it in "
            "Python, as its card shows"
        )


def _encode_options(tokenizer: Any, **given: Any) -> dict[str, Any]:
    """Those options of `encode` that were given. Raises InputError for one that the tokenizer does not take."""
    options = {name: value for name, value in given.items() if value is not None}
    takes = inspect.signature(getattr(tokenizer, "tokenize_features", tokenizer.tokenize)).parameters
    for name in options:
        if name not in takes:
            raise InputError(
                f"--{name} says nothing about a {tokenizer.type_name} tokenizer, which has no such choice; leave it out"
            )
    return options


def _parser(name: str) -> Any:
    from docstring_parser import parse
    from jsonargparse import ActionConfigFile, ArgumentParser

    positional = POSITIONAL[name]
    function = COMMANDS[name]
    parser = ArgumentParser(prog=f"tokgen {name}", description=(function.__doc__ or "").split("\n\n")[0].strip())
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file with any of the options below")
    hints = typing.get_type_hints(function)
    helps = {p.arg_name: p.description for p in parse(function.__doc__ or "").params}
    for key, parameter in inspect.signature(function).parameters.items():
        options: dict[str, Any] = {"type": hints[key], "help": helps.get(key, "")}
        if key in positional:
            if typing.get_origin(hints[key]) is list:
                options.update(type=typing.get_args(hints[key])[0], nargs="+")
            parser.add_argument(key, **options)
        elif parameter.default is inspect.Parameter.empty:
            parser.add_argument(f"--{key}", required=True, **options)
        elif hints[key] == (list[str] | None):
            parser.add_argument(f"--{key}", default=parameter.default, **{**options, "type": str, "nargs": "+"})
        else:
            parser.add_argument(f"--{key}", default=parameter.default, **options)
    return parser


def _usage() -> str:
    lines = ["usage: tokgen COMMAND [OPTIONS]   (tokgen COMMAND --help says more)", ""]
    lines.append("  fit          Train: tokgen fit -c tokenizers/vqgan-tiny.yaml -c train/cpu.yaml")
    lines.append("  validate, test, predict   The same with a checkpoint: --ckpt_path PATH")
    for name, function in COMMANDS.items():
        lines.append(f"  {name:<12} {(function.__doc__ or '').strip().splitlines()[0]}")
    lines += ["", "  --debug      Show the traceback of an error", "  --version"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0, or 2 after a mistake that one line explains)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or bool(os.environ.get("TOKGEN_DEBUG"))
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        import tokgen

        print(f"tokgen {tokgen.__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS and name not in TRAINING:
        print(f"tokgen: unknown command {name!r}; expected one of {', '.join([*TRAINING, *COMMANDS])}", file=sys.stderr)
        return 2
    try:
        if name in TRAINING:
            from tokgen.training.lightning_cli import run

            run(name, rest)
        else:
            values = _parser(name).parse_args(rest).as_dict()
            values.pop("config", None)
            COMMANDS[name](**values)
    except KeyboardInterrupt:
        print("tokgen: interrupted", file=sys.stderr)
        return 130
    except (TokgenError, OSError, ValueError) as error:
        if debug:
            raise
        print(f"tokgen {name}: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
