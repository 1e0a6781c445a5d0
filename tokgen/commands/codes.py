"""Commands on single pictures and clips: to tokens and back; and the laws of tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tokgen.commands.models import encode_options, load_model, load_tokenizer, need_pixels, what_it_is
from tokgen.commands.output import check_output, write_pixels
from tokgen.errors import InputError, TokgenError


def encode(
    files: list[str],
    model: str,
    out: str,
    size: int | None = None,
    resize: Literal["crop", "squash"] = "crop",
    keep: int | float | None = None,
    frames: int | None = None,
    fps: float | None = None,
    device: str | None = None,
) -> None:
    """Turn pictures or videos into a file of tokens.

    Args:
        files: .jpg, .png or .webp pictures; or videos, of tokenizers of clips. Several must come to one size.
        model: folder or Hub name of the tokenizer.
        out: the token file to write (.safetensors).
        size: side of the square pictures; without it that which the tokenizer is made for, or else they are cropped to the
            tokenizer's factor.
        resize: how pictures become square: the centre, or the whole without regard to its aspect ratio.
        keep: of tokenizers that choose how many tokens a picture gets: a count, or a share such as 0.25.
        frames: of each video, from its beginning; as many as the tokenizer takes without it.
        fps: frames a second that videos are seen at; every frame of the file without it.
        device: such as "cuda:0"; the best there is without it.
    """
    import torch

    from tokgen.data.batches import resize_image
    from tokgen.data.decode import VIDEO_EXTENSIONS
    from tokgen.images import read_image

    if Path(out).suffix != ".safetensors":
        raise InputError(
            f"tokens are written as safetensors; give --out a name that ends in .safetensors instead of {out!r}"
        )
    tokenizer = load_tokenizer(model, device)
    clips = Path(files[0]).suffix.lower().lstrip(".") in VIDEO_EXTENSIONS
    need_pixels(tokenizer, model, 5 if clips else 4)
    options = encode_options(tokenizer, keep=keep)
    size = tokenizer.image_size[0] if size is None and tokenizer.image_size is not None else size
    if resize == "squash" and size is None:
        raise InputError("--resize squash needs a size to squash to; give --size")
    if clips:
        pictures = [_clip(path, tokenizer, size, resize, frames, fps) for path in files]  # (T, 3, H, W) each
    elif frames is not None or fps is not None:
        raise InputError(f"--frames and --fps are for videos, and {files[0]} is a picture; leave them out")
    elif resize == "squash":
        pictures = [resize_image(read_image(path), size, resize) for path in files]
    else:
        pictures = [read_image(path, size, tokenizer.factor) for path in files]
    what, shapes = "clip" if clips else "image", {tuple(p.shape) for p in pictures}
    if len(shapes) > 1:
        sizes = sorted((n[0], *n[2:]) if clips else n[1:] for n in shapes)
        raise InputError(f"the {what}s come to different sizes {sizes}; give --size{' and --frames' if clips else ''}")
    tokens = tokenizer.encode(torch.stack(pictures), **options).cpu()
    tokens.save(out)
    lengths = sorted(set(tokens.lengths.tolist()))
    ragged = f", {lengths[0]} to {lengths[-1]} tokens" if len(lengths) > 1 else f", {lengths[0]} tokens"
    print(f"{len(tokens)} {what}(s), {tokens.layout}{ragged}, {tokens.bits.mean():.0f} bits each, saved to {out}")


def _clip(path: str, tokenizer: Any, size: int | None, resize: str, frames: int | None, fps: float | None) -> Any:
    """The beginning of a video, uint8 (T, 3, H, W)."""
    import torch

    from tokgen.data.batches import resize_image
    from tokgen.data.video import open_video

    frames = frames or getattr(tokenizer.config, "frames", None)
    if frames is None:
        raise InputError(
            f"{tokenizer.type_name} takes clips of any length; say with --frames how much of {path} to encode"
        )
    with open_video(path) as video:
        clip = torch.from_numpy(video.get_frames(video.timeline(fps)[:frames])).permute(0, 3, 1, 2)
    if size is not None:
        return torch.stack([resize_image(frame, size, resize) for frame in clip])
    h, w = (n // tokenizer.factor * tokenizer.factor for n in clip.shape[-2:])
    top, left = (clip.shape[-2] - h) // 2, (clip.shape[-1] - w) // 2
    return clip[..., top : top + h, left : left + w]


def decode(
    tokens: str,
    model: str,
    out: str,
    pipeline: str | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    columns: int | None = None,
    fps: float = 8.0,
    device: str | None = None,
) -> None:
    """Turn a file of tokens back into a picture or a clip (several become a grid).

    Args:
        tokens: a file that `tokgen encode` wrote.
        model: folder or Hub name of the tokenizer that made them.
        out: the .png to write; of clips also a .gif or .mp4.
        pipeline: folder or Hub name of the diffusion pipeline that a semantic tokenizer's codes condition (seed, lavit); the
            tokenizer's own decoder without it.
        seed: of the first picture that a pipeline draws, counted up from there.
        guidance_scale, num_inference_steps: of the pipeline; those published with the tokenizer without them.
        columns: pictures in a row of the grid.
        fps: of clips.
        device: such as "cuda:0"; the best there is without it.
    """
    from tokgen.tokens import Tokens

    loaded, tokenizer = Tokens.load(tokens), load_tokenizer(model, device)
    clips = getattr(loaded.layout, "t", None) is not None
    need_pixels(tokenizer, model, 5 if clips else 4)
    check_output(out, clips, f"what {model} decodes")
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
    write_pixels(pixels, out, settings, columns, fps)
    what = "clip" if pixels.ndim == 5 else "image"
    print(f"{len(pixels)} {what}(s) of {pixels.shape[-2]} x {pixels.shape[-1]} decoded to {out}")


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
        module = load_model(target)
        if not isinstance(module, VisualTokenizer):
            raise InputError(
                f"{target} is {what_it_is(module)}; `tokgen check` takes tokenizers, quantizers and shards"
            )
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
