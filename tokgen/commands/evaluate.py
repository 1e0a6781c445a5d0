"""The commands that measure models and set reports side by side."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from tokgen.commands.models import best_device, encode_options, load_tokenizer, need_pixels
from tokgen.errors import DataError, InputError

PICTURE = "pictures.png"
ONLY = {  # options that say something of one kind alone
    "tokenizer": ("learnability", "probe", "keep"),
    "generator": (
        "prompts", "layout", "images_per_prompt", "guidance_scale", "guidance_schedule", "temperature",
        "top_k", "top_p", "min_p", "precision", "tokenizer",
    ),
}  # fmt: skip


def evaluate(
    what: Literal["tokenizer", "generator"],
    model: str,
    out: str,
    data: str | None = None,
    samples: int | None = None,
    size: int | None = None,
    resize: Literal["crop", "squash"] = "crop",
    extractor: str = "auto",
    learnability: Literal["standard", "short", "none"] | None = None,
    probe: str | None = None,
    keep: int | float | None = None,
    frames: int | None = None,
    fps: float | None = None,
    frame_stride: int | None = None,
    text_encoder: str | None = None,
    prompts: str | None = None,
    layout: Literal["geneval", "genai"] | None = None,
    images_per_prompt: int | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    guidance_schedule: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    precision: Literal["float32", "bfloat16", "int8"] | None = None,
    tokenizer: str | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    save_every: float = 5.0,
    device: str | None = None,
) -> None:
    """Measure a tokenizer or a generator by named protocols, and write a report card.

    Under torchrun (`torchrun --nproc-per-node 8 -m tokgen evaluate …`) the ranks share the samples. What has been measured is kept
    in OUT/partial until the report is whole: the same command, with as many processes as you like, goes on from there.

    Args:
        what: "tokenizer" or "generator".
        model: its folder or Hub name.
        out: folder for report.json, report.md and pictures.png; or, with --prompts, for the pictures drawn.
        data: folder of image shards, of video shards for models of clips, or of motion shards, to measure on.
        samples: how many of them, evenly spaced; all without it.
        size: side of the square pictures or frames; without it what the model is made for, or else pictures as they are.
        resize: how pictures become square: the centre, or the whole without regard to its aspect ratio.
        extractor: network for Frechet distances: "inception" (weights in torch hub's cache) or "inception:PATH", "mobilenet", a name
            or folder of an image encoder, "none", or "auto" for the first of inception and mobilenet that is at hand. Of clips: a
            folder or transformers:NAME of a video encoder (VideoMAE, ViViT, TimeSformer, tokgen's); "auto" is none.
        learnability: budget of the model that learns the codes: "standard" (without it; for a GPU), "short", or "none".
        probe: a field of the samples' JSON, such as "group", or "cls": how well a linear model reads it off the codes.
        keep: of tokenizers that choose how many tokens a picture gets: a count, or a share such as 0.25.
        frames: of clips; as many as the tokenizer takes, or the generator draws, without it.
        fps: frames a second that videos are seen at; every frame of the file without it.
        frame_stride: from one frame of a clip to the next.
        text_encoder: folder of an encoder of pictures, or clips, and captions: how well what is drawn, or decoded, agrees with its caption.
        prompts: a .jsonl of GenEval, a .json of GenAI-Bench or a .txt; what they ask for is drawn into --out and not measured.
        layout: of those pictures: "geneval" (without it) or "genai".
        images_per_prompt: of GenEval; 4 without it.
        seed: what is drawn follows from it.
        guidance_scale, guidance_schedule, temperature, top_k, top_p, min_p: as in `tokgen sample`.
        precision: of the generator, see `tokgen sample`.
        tokenizer: folder of the generator's tokenizer, where it neither holds nor names it.
        batch_size: samples at a time on each rank.
        num_workers: processes that read the data.
        save_every: minutes of measuring between two writes into OUT/partial: what a lost process costs at most.
        device: such as "cuda:0"; the best there is without it.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    other = next(kind for kind in ONLY if kind != what)
    for name in ONLY[other]:
        if name in given:
            raise InputError(f"--{name} is of evaluating a {other}, and {model} shall be a {what}; leave it out")
    if (data is None) == (prompts is None):
        raise InputError("give --data, shards to measure on; or, of a generator, --prompts to draw for a benchmark")
    for name in ("layout", "images_per_prompt"):
        if name in given and prompts is None:
            raise InputError(f"--{name} is of drawing a benchmark's pictures; give --prompts too, or leave it out")
    if samples is not None and samples < 1:
        raise InputError(f"--samples {samples}; expected at least 1")
    if save_every < 0:
        raise InputError(f"--save_every {save_every:g}; expected minutes, 0 or more")
    with _ranks(device) as (rank, device):
        if what == "tokenizer":
            report, picture = _tokenizer(given, device)
        elif prompts is None:
            report, picture = _generator(given, device)
        else:
            _benchmark(given, device)
            return
        if rank == 0:
            _write(report, picture, given)


def _tokenizer(given: dict[str, Any], device: str) -> Any:
    from tokgen.data.shards import Manifest
    from tokgen.evaluation.card import evaluate_tokenizer

    model, size = given["model"], given.get("size")
    tokenizer = load_tokenizer(model, device)
    kind = Manifest.load(given["data"]).kind
    if tokenizer.modality == "motion":
        if kind != "motion":
            raise InputError(
                f"{model} is a {tokenizer.type_name}, which takes motion, and {given['data']} holds {kind}; give shards of "
                f"`tokgen motion`"
            )
        if size is not None:
            raise InputError("--size is of pictures, and motion maps have the size of their shards; leave it out")
    elif kind == "motion":
        raise InputError(f"{model} is a {tokenizer.type_name}, which takes pixels, and {given['data']} holds motion")
    else:
        need_pixels(tokenizer, model, 5 if kind == "videos" else 4)
        size = tokenizer.image_size[0] if size is None and tokenizer.image_size is not None else size
    options = encode_options(tokenizer, keep=given.get("keep"))
    return evaluate_tokenizer(
        tokenizer,
        _set(given, size, _timing(given, kind, tokenizer, getattr(tokenizer.config, "frames", None))),
        extractor=_extractor(given, device, kind),
        text_encoder=_text_encoder(given, device, kind),
        learnability=given.get("learnability", "standard"),
        options=options,
        model=model,
        partial=_partial(given),
        save_every=given["save_every"],
    )


def _timing(given: dict[str, Any], kind: str, tokenizer: Any, frames: int | None) -> dict[str, Any]:
    """What clips are: options of the data for videos, none for other kinds. `frames` where none are asked for."""
    if kind != "videos":
        if any(name in given for name in ("frames", "fps", "frame_stride")):
            held = "pictures" if kind == "images" else kind
            raise InputError(f"--frames, --fps and --frame_stride are for videos, and {given['data']} holds {held}")
        return {}
    frames = given.get("frames") or frames
    if frames is None:
        raise InputError(f"{tokenizer.type_name} takes clips of any length; give --frames")
    wanted = None if "trajectories" in tokenizer.extras else False
    return {
        "frames": frames, "fps": given.get("fps"), "frame_stride": given.get("frame_stride", 1), "trajectories": wanted
    }  # fmt: skip


def _generator(given: dict[str, Any], device: str) -> Any:
    from tokgen.data.shards import Manifest
    from tokgen.evaluation.card import evaluate_generator

    pipeline = _pipeline(given, device)
    kind, side, frames = Manifest.load(given["data"]).kind, *_drawn(pipeline)
    if kind != ("images" if frames is None else "videos"):
        drawn = "pictures" if frames is None else "clips"
        raise InputError(f"{given['model']} draws {drawn}, and {given['data']} holds {kind}; give it shards of {drawn}")
    return evaluate_generator(
        pipeline,
        _set(given, given.get("size") or side, _timing(given, kind, pipeline.tokenizer, frames)),
        extractor=_extractor(given, device, kind),
        text_encoder=_text_encoder(given, device, kind),
        seed=given["seed"],
        sampling=_sampling(given),
        model=given["model"],
        partial=_partial(given),
        save_every=given["save_every"],
    )


def _benchmark(given: dict[str, Any], device: str) -> None:
    from tokgen.evaluation.prompts import draw_prompts, read_prompts
    from tokgen.quantizers.base import world_size

    if world_size() > 1:
        raise InputError("a benchmark's pictures are drawn by one process; start it without torchrun")
    listed = read_prompts(given["prompts"])
    layout = given.get("layout", "geneval")
    if layout == "genai" and "images_per_prompt" in given:
        raise InputError("--images_per_prompt is of GenEval: GenAI-Bench scores one picture for each prompt")
    samples = given.get("samples")
    listed = listed if samples is None else listed[:samples]
    number = draw_prompts(
        _pipeline(given, device), listed, given["out"], layout=layout, images_per_prompt=given.get("images_per_prompt", 4),
        seed=given["seed"], batch_size=given["batch_size"], sampling=_sampling(given),
    )  # fmt: skip
    print(f"{number} pictures of {len(listed)} prompts are in {given['out']}, for the scorer of {layout}")


def _pipeline(given: dict[str, Any], device: str) -> Any:
    from tokgen.generators.pipeline import TextToImagePipeline

    return TextToImagePipeline.from_pretrained(
        given["model"], given.get("tokenizer"), device=device, precision=given.get("precision", "float32")
    )


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    names = {"guidance_schedule": "schedule"}
    wanted = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p", "min_p")
    return {names.get(name, name): given[name] for name in wanted if name in given}


def _drawn(pipeline: Any) -> tuple[int | None, int | None]:
    """Side of the pictures or frames that a generator draws (None where its tokens do not say), and frames of a clip, None
    of pictures."""
    from tokgen.tokens import Trajectories

    layout, tokenizer = pipeline.generator.layout, pipeline.tokenizer
    frames = getattr(layout, "t", None)
    scale = tokenizer.factor
    if isinstance(layout, Trajectories):
        scale = tokenizer.config.stride
    elif frames is not None:
        frames *= getattr(tokenizer.config, "temporal_factor", 1)
    if tokenizer.image_size is not None:
        sides = set(tokenizer.image_size)
    else:
        sides = {n * scale for n in (getattr(layout, "h", 0), getattr(layout, "w", 0))}
    return (sides.pop() if len(sides) == 1 and min(sides) else None), frames


def _set(given: dict[str, Any], size: int | None, timing: dict[str, Any]) -> Any:
    from tokgen.evaluation.samples import EvaluationSet

    return EvaluationSet(
        given["data"], given.get("samples"), given.get("probe"), image_size=size,
        resize="none" if size is None else given["resize"], batch_size=given["batch_size"], num_workers=given["num_workers"],
        features=False, **timing,
    )  # fmt: skip


def _partial(given: dict[str, Any]) -> Path:
    from tokgen.evaluation.progress import PARTIAL

    return Path(given["out"]) / PARTIAL


def _extractor(given: dict[str, Any], device: str, kind: str) -> Any:
    from tokgen.evaluation.extractors import load_extractor

    if kind == "motion":
        return None
    extractor = load_extractor(given["extractor"], clips=kind == "videos")
    return None if extractor is None else extractor.to(device)


def _text_encoder(given: dict[str, Any], device: str, kind: str) -> Any:
    from tokgen.encoders.base import load_clip_encoder, load_encoder

    if "text_encoder" not in given:
        return None
    encoder = (load_clip_encoder if kind == "videos" else load_encoder)(given["text_encoder"]).to(device)
    if not hasattr(encoder, "encode_text"):
        raise InputError(f"{given['text_encoder']} ({encoder.name}) reads no captions; give a contrastive encoder")
    return encoder


def _write(report: Any, picture: Any, given: dict[str, Any]) -> None:
    import platform
    import shlex

    import torch

    import tokgen
    from tokgen.evaluation.progress import clear
    from tokgen.evaluation.report import label, shown
    from tokgen.images import write_png
    from tokgen.quantizers.base import world_size

    out = given["out"]
    options = [
        word for name, value in given.items() if name not in ("what", "model") for word in (f"--{name}", str(value))
    ]
    report.about = {
        "command": shlex.join(["tokgen", "evaluate", given["what"], given["model"], *options]), "processes": world_size(),
        "data": given["data"], "tokgen": tokgen.__version__, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    if picture is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_png(picture, Path(out) / PICTURE)
    path = report.save(out, PICTURE if picture is not None else None)
    for group, figures in report.figures.items():
        print(
            f"{group} ({report.protocols[group].hash}): "
            + ", ".join(f"{label(n)} {shown(n, v)}" for n, v in figures.items())
        )
    clear(_partial(given))
    print(f"report in {path} and {path.with_suffix('.md')}")


@contextlib.contextmanager
def _ranks(device: str | None) -> Iterator[tuple[int, str]]:
    """This process's rank and device; under torchrun, a process group."""
    import torch

    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or torch.distributed.is_initialized():
        yield (torch.distributed.get_rank() if torch.distributed.is_initialized() else 0), device or best_device()
        return
    device = device or best_device()
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    # sums are sent to rank 0 by the CPU, whatever computes the features. A rank that is done early waits for it there; for
    # one that is lost nobody waits: torchrun ends the others, and gloo sees a connection close
    timeout = timedelta(hours=2)
    store, rank, world = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun's store outlives a restart, and with it the addresses of the processes that were lost. On several machines
        # agents may count restarts differently
        store = torch.distributed.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        yield torch.distributed.get_rank(), device
    finally:
        torch.distributed.destroy_process_group()


def compare(reports: list[str], only: list[str] | None = None, force: bool = False, out: str | None = None) -> None:
    """Set reports of `tokgen evaluate` side by side; figures of unlike protocols are refused.

    Args:
        reports: two or more folders or report.json files.
        only: groups of figures, such as pixels codes; all without it.
        force: print figures of unlike protocols too, apart.
        out: a .md file to write besides printing.
    """
    from tokgen.evaluation.report import Report
    from tokgen.evaluation.report import compare as side_by_side
    from tokgen.files import replacing

    folders = [Path(path).parent if Path(path).suffix == ".json" else Path(path) for path in reports]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):  # runs/a/card and runs/b/card
        names = [str(path) for path in reports]
    loaded: dict[str, Report] = {}
    for name, path in zip(names, reports):
        if name in loaded:
            raise DataError(f"{path} is given twice")
        loaded[name] = Report.load(path)
    text = side_by_side(loaded, only, force)
    if out is not None:
        with replacing(out) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    print(text)
