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
    device: str | None = None,
) -> None:
    """Write code shards (ids and captions) of image shards, for generators to train on; continues an interrupted run.

    Args:
        shards: folder of image shards.
        model: folder or Hub name of the tokenizer.
        out: folder for the code shards.
        embed: image encoder whose embedding of each picture is stored too, for global alignment (ARRA): a folder, or a
            name such as "transformers:openai/clip-vit-large-patch14".
        size: side of the square images; without it they are taken as they are.
        batch_size: images encoded at once.
        resize: how images become square.
        max_samples: samples in a shard.
        device: such as "cuda:0"; the best there is without it.
    """
    from tokgen.precompute import tokenize_shards

    encoder = None
    if embed is not None:
        from tokgen.encoders.base import load_encoder

        encoder = load_encoder(embed).to(device or _best_device())
    report = tokenize_shards(
        _load(model, "tokenizer", device), shards, out,
        encoder=encoder, encoder_from=embed, size=size, batch_size=batch_size, resize=resize, max_samples=max_samples,
    )  # fmt: skip
    print(f"{report}; code shards are in {out}")


def encode(images: list[str], model: str, out: str, size: int | None = None, device: str | None = None) -> None:
    """Turn images into a file of tokens.

    Args:
        images: .jpg, .png or .webp files; several must come to one size.
        model: folder or Hub name of the tokenizer.
        out: the token file to write (.safetensors).
        size: scale the short side to this and crop a square; without it images are cropped to the tokenizer's factor.
        device: such as "cuda:0"; the best there is without it.
    """
    import torch

    from tokgen.images import read_image

    if Path(out).suffix != ".safetensors":
        raise InputError(
            f"tokens are written as safetensors; give --out a name that ends in .safetensors instead of {out!r}"
        )
    tokenizer = _load(model, "tokenizer", device)
    pictures = [read_image(path, size, tokenizer.factor) for path in images]
    if len({p.shape for p in pictures}) > 1:
        raise InputError(
            f"the images come to different sizes {sorted({tuple(p.shape[1:]) for p in pictures})}; give --size"
        )
    tokens = tokenizer.encode(torch.stack(pictures)).cpu()
    tokens.save(out)
    bits = tokens.bits.mean().item()
    print(f"{len(tokens)} image(s), {tokens.layout}, {bits:.0f} bits each, saved to {out}")


def decode(tokens: str, model: str, out: str, columns: int | None = None, device: str | None = None) -> None:
    """Turn a file of tokens back into a picture (several become a grid).

    Args:
        tokens: a file that `tokgen encode` wrote.
        model: folder or Hub name of the tokenizer that made them.
        out: the .png to write.
        columns: pictures in a row of the grid.
        device: such as "cuda:0"; the best there is without it.
    """
    from tokgen.images import image_grid, write_png
    from tokgen.tokens import Tokens

    loaded = Tokens.load(tokens)
    pixels = _load(model, "tokenizer", device).decode(loaded)
    settings = {"tokens": Path(tokens).name, "tokenizer": loaded.tokenizer}
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
    scale: int = 1,
    precision: Literal["float32", "bfloat16", "int8"] = "float32",
    speculative: int = 1,
    compile: bool = False,
    device: str | None = None,
) -> None:
    """Draw pictures from text. Settings left out take the values published with the generator.

    Args:
        prompts: one or more texts.
        model: folder or Hub name of the generator; it names or holds its tokenizer.
        out: the .png to write; several pictures become a grid. The effective settings are stored in it.
        num_images_per_prompt: pictures for each prompt.
        seed: picture i uses seed + i, so that it comes out the same in any batch.
        guidance_scale: 1 is no guidance.
        guidance_schedule: how guidance grows over the picture.
        temperature: 0 takes the likeliest code.
        top_k: draw among the k likeliest codes (0: all).
        top_p: draw among the likeliest codes that make up this probability (1: all).
        min_p: drop codes less likely than this share of the likeliest (0: none).
        scale: enlarge the pictures by this whole number when writing.
        precision: of the generator; int8 keeps weights in 8 bits and is the fastest for few pictures.
        speculative: let an int8 copy guess this many steps ahead, checked by the generator in one call: the same
            pictures in fewer calls, which pays off where a call of many steps costs little more than one.
        compile: compile the decoding step; pays off for many or large pictures.
        device: such as "cuda:0"; the best there is without it.
    """
    from tokgen.generators.pipeline import TextToImagePipeline
    from tokgen.images import image_grid, write_png

    if not prompts or any(not p.strip() for p in prompts):
        raise InputError('a prompt is empty; say what to draw, such as "red heart, 3d style"')
    pipeline = TextToImagePipeline.from_pretrained(model, device=device or _best_device(), precision=precision)
    count = len(prompts) * num_images_per_prompt
    given = {
        "guidance_scale": guidance_scale, "schedule": guidance_schedule, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "min_p": min_p,
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
    write_png(pixels[0] if count == 1 else image_grid(pixels, columns), out, settings)
    report = result.report
    steps = f", {report.steps_per_call:.1f} steps a call" if speculative > 1 else ""
    print(f"{count} picture(s) drawn to {out}, {report.ids_per_second:.0f} tokens/s{steps}")


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
            raise InputError(
                f"{target} is a {module.type_name} generator; `tokgen check` takes tokenizers, quantizers and shards"
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


def convert(
    family: Literal["llamagen-vq", "llamagen-gpt"],
    checkpoint: str,
    out: str,
    tokenizer: str | None = None,
    grid: int | None = None,
    heads: int | None = None,
    text_encoder: str | None = None,
    class_names: str | None = None,
) -> None:
    """Turn a published checkpoint into a model folder, strictly: every tensor is mapped or named as ignored.

    Args:
        family: which published layout it has.
        checkpoint: the downloaded .pt or .safetensors file.
        out: folder to write.
        tokenizer: of a generator: folder of the tokenizer whose codes it draws (converted before), which is recorded.
        grid: of llamagen-gpt: side of the square of codes, such as 24; taken from published file names without it.
        heads: of llamagen-gpt: attention heads, for sizes that were not published.
        text_encoder: of llamagen-gpt by text: Hub name or folder of the T5; the published one without it.
        class_names: of llamagen-gpt by class: text file of names, one in a line; numbers without it.
    """
    from tokgen.generators.base import Generator
    from tokgen.importers.llamagen import load_vq
    from tokgen.importers.llamagen_gpt import load_gpt

    loader = {"llamagen-vq": load_vq, "llamagen-gpt": load_gpt}[family]
    options = {"grid": grid, "heads": heads, "text_encoder": text_encoder, "class_names": class_names}
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in inspect.signature(loader).parameters:
            raise InputError(f"--{name} says nothing about {family}; leave it out")
    if tokenizer is not None and not Path(tokenizer).is_dir():
        raise InputError(f"no tokenizer folder at {tokenizer}; make it with tokgen convert llamagen-vq")
    visual = None if tokenizer is None else _load(tokenizer, "tokenizer", "cpu")
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
    f.__name__: f for f in (pack, tokenize, encode, decode, sample, check, convert)
}
POSITIONAL = {
    "pack": ["source"], "tokenize": ["shards"], "encode": ["images"], "decode": ["tokens"],
    "sample": ["prompts"], "check": ["target"], "convert": ["family", "checkpoint"],
}  # fmt: skip


def _best_device() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return str(accelerator) if accelerator is not None and torch.accelerator.is_available() else "cpu"


def _load(model: str, expected: str | None, device: str | None) -> Any:
    from tokgen.hub import load
    from tokgen.tokenizers.base import VisualTokenizer

    module = load(model, device=device or _best_device())
    if expected == "tokenizer" and not isinstance(module, VisualTokenizer):
        raise InputError(f"{model} is a generator ({module.type_name}); a tokenizer is needed here")
    return module


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
        else:
            parser.add_argument(f"--{key}", default=parameter.default, **options)
    return parser


def _usage() -> str:
    lines = ["usage: tokgen COMMAND [OPTIONS]   (tokgen COMMAND --help says more)", ""]
    lines.append("  fit        Train: tokgen fit -c tokenizers/vqgan-tiny.yaml -c train/cpu.yaml")
    lines.append("  validate, test, predict   The same with a checkpoint: --ckpt_path PATH")
    for name, function in COMMANDS.items():
        lines.append(f"  {name:<10} {(function.__doc__ or '').strip().splitlines()[0]}")
    lines += ["", "  --debug    Show the traceback of an error", "  --version"]
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
