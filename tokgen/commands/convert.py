"""The command that reads published checkpoints."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tokgen.commands.models import load_tokenizer
from tokgen.errors import InputError


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
        "trajvit",
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
            of tokenflow-t2i always; of trajvit the whole contrastive model or its encoder alone.
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
    from tokgen.importers.trajvit import load_trajvit
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
        "trajvit": load_trajvit,
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
    visual = None if tokenizer is None else load_tokenizer(tokenizer, "cpu")
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
