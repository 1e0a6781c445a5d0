"""What `tokgen evaluate` measures: a tokenizer's card, and a generator's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokgen.encoders.base import ClipEncoder
from tokgen.errors import CheckpointError, ConfigError, InputError, MissingDependency
from tokgen.evaluation.agreement import CodeAgreement, TextAgreement
from tokgen.evaluation.distribution import FeatureSet, by, caveats, distances
from tokgen.evaluation.extractors import Extractor
from tokgen.evaluation.learnability import bits_of_codes, budget_of, details_of, rows_of
from tokgen.evaluation.likelihood import Likelihood
from tokgen.evaluation.metrics import (
    NEIGHBOURS,
    SSIM_SIDE,
    CodeHistogram,
    Means,
    Rows,
    few,
    number_of,
    pixel_errors,
    precision_recall,
)
from tokgen.evaluation.probe import Probe
from tokgen.evaluation.probe import details_of as details_of_probe
from tokgen.evaluation.progress import Facts, Pictures, Progress, Sums
from tokgen.evaluation.report import Report
from tokgen.evaluation.samples import EvaluationSet
from tokgen.evaluation.speed import Watch, machine
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.images import image_grid, to_uint8
from tokgen.pretrained import fingerprint
from tokgen.tokenizers.base import VisualTokenizer
from tokgen.tokens import Layout

VERSION = 3  # of what partial files hold; it grows when a change of code changes their sums
SHOWN = 24  # pictures on the page


# -- tokenizers -----------------------------------------------------------------------------------------------------------


def evaluate_tokenizer(
    tokenizer: VisualTokenizer,
    data: EvaluationSet,
    *,
    extractor: Extractor | None = None,
    text_encoder: Any = None,
    learnability: str = "standard",
    options: dict[str, Any] | None = None,
    model: str = "",
    partial: str | os.PathLike[str] | None = None,
    save_every: float = 5.0,
) -> tuple[Report, Tensor | None]:
    """Encode and decode every sample.

    Where there is a default process group, its ranks share the samples; figures are those of one process up to rounding, and
    only rank 0 has them. Only there is learnability measured. Where `data` has a label, a probe for it is; where the tokenizer
    reads captions itself (`reads_captions`), its codes are matched with those of the data.

    Args:
        data: pictures, clips or motion maps of sizes that the tokenizer takes.
        extractor: what the Frechet distance between pictures, or clips, and reconstructions is taken in; None takes none.
        text_encoder: an encoder with `embed` and `encode_text`, of pictures or of clips: how well reconstructions, and the data
            themselves, agree with their captions; None measures no such thing.
        learnability: a name in `BUDGETS`, or "none".
        options: given to `encode`, and part of the report.
        model: what the report calls the tokenizer.
        partial: folder for what has been measured so far (see `Progress`), which the caller clears; None keeps nothing.
        save_every: minutes of measuring between two writes there.

    Returns:
        the report, and a grid of pictures, uint8 (3, h, w), each row of the data above what is decoded of it; on other ranks
        than 0 an empty report and None.

    Raises:
        InputError: data of another kind than the tokenizer or one of the encoders takes, captions that are missing.
    """
    _check_encoders(extractor, text_encoder, "motion" if tokenizer.modality == "motion" else _kind(data))
    if learnability != "none":
        budget_of(learnability)
    tokenizer, options = tokenizer.eval(), dict(options or {})
    moves = tokenizer.modality == "motion"
    distance, no_distance = (None, "") if moves else _perceptual(tokenizer.device)
    texts = None if text_encoder is None else TextAgreement(text_encoder, data.wanted)
    reads = getattr(tokenizer, "reads_captions", False)
    sums = Sums(
        means=Means(), codes=CodeHistogram(tokenizer.codebook_sizes), ids=Rows(), probe=Probe(), made=FeatureSet(),
        truth=FeatureSet(), watch=Watch(tokenizer.device), facts=Facts(), shown=Pictures(),
        **({"texts": texts} if texts else {}), **({"retrieval": CodeAgreement(tokenizer, data.wanted)} if reads else {}),
    )  # fmt: skip
    identity = {
        "version": VERSION, "task": "tokenizer", "model": tokenizer.fingerprint, "options": options, "data": _identity(data),
        "extractor": extractor and extractor.weights, "distance": distance and distance.weights,
        "text encoder": texts and texts.weights, "learnability": learnability != "none",
    }  # fmt: skip
    progress = Progress(data, sums, identity, Path(partial) if partial else None, save_every)
    means, watch, facts, columns = sums.means, sums.watch, sums.facts, min(8, data.frames or 8)
    for batch in progress.batches():
        pixels = batch[tokenizer.modality]
        extras = {name: batch[name] for name in tokenizer.extras if name in batch}
        tokens = watch("encode_ms", tokenizer.encode, pixels, **extras, **options)
        facts.add("layout", tokens.layout.to_dict())
        facts.add("size", list(pixels.shape[-2:]))
        if tokens.side:
            facts.add("side", sorted(tokens.side))
        values = {"tokens": tokens.lengths.double().cpu(), "bits": tokens.bits.cpu()}
        if not moves:
            values["bits_per_pixel"] = values["bits"] / pixels[0, ..., 0, :, :].numel()
        means.add(values)
        sums.codes.update(tokens.cpu())
        if learnability != "none":
            sums.ids.add(batch["key"], ids=rows_of(tokens))
        if data.label is not None:
            sums.probe.update(batch, tokens, tokenizer)
        if reads:
            sums.retrieval.update(batch["key"], tokens, batch["caption"])
        if facts["no pixels"]:
            continue
        try:
            made = watch("decode_ms", tokenizer.decode, tokens)
        except ConfigError as error:  # a semantic tokenizer that was trained without a pixel decoder
            facts.add("no pixels", str(error))
            continue
        first = batch["number"] * data.batch_size < SHOWN
        if moves:
            means.add(_motion_errors(made.cpu(), pixels))
            if first:
                sums.shown.add(batch["number"], *(to_uint8(tokenizer.pictures(x.cpu())) for x in (pixels, made)))
            continue
        made, clips = to_uint8(made).cpu(), pixels.ndim == 5
        frames = made.flatten(0, -4), pixels.flatten(0, -4)
        means.add(pixel_errors(*frames))
        if distance is not None:
            means.add({distance.figure: distance(*frames)})
        if extractor is not None:
            sums.made.update(batch["key"], extractor(made))
            sums.truth.update(batch["key"], extractor(pixels))
        if texts is not None:
            _need_captions(data, batch, "compare with")
            texts.update(batch["key"], made, pixels, batch["caption"])
        if first:  # of clips a row of frames each
            rows = [x[: -(-SHOWN // columns), :columns].flatten(0, 1) if clips else x[:SHOWN] for x in (pixels, made)]
            sums.shown.add(batch["number"], *rows)
    report = Report("tokenizer", {"model": model, **_subject(tokenizer), "encode_options": options})
    if not progress.collect():
        return report, None
    _tokenizer_groups(report, tokenizer, data, sums, extractor, distance, learnability)
    if no_distance:
        report.notes.append(no_distance)
    return report, _pairs(sums.shown.result(), columns)


def _tokenizer_groups(
    report: Report,
    tokenizer: VisualTokenizer,
    data: EvaluationSet,
    sums: Sums,
    extractor: Extractor | None,
    distance: _Distance | None,
    learnability: str,
) -> None:
    """The report's groups of figures, and its notes, of all that was counted."""
    means, facts, notes = sums.means, sums.facts, report.notes
    n, sizes, timing = means.counts.get("tokens", 0), facts["size"], data.timing()
    if not n:
        raise InputError(f"no sample of {data.folder} could be read; there is nothing to measure")
    size = "{} x {}".format(*sizes[0]) if len(sizes) == 1 else "several"

    def protocol(name: str, version: int = 1, **more: Any) -> Any:
        return data.protocol(name, version, n, size, **more)

    if tokenizer.modality == "motion":
        found = means.result(("motion_error", "motion_error_of_zero"))
        report.add(protocol("motion", details={"error": "mean square of the maps' own units"}), found)
    ssim = {
        "ssim": f"Gaussian {SSIM_SIDE} x {SSIM_SIDE}, sigma 1.5, data range 1",
        "mean over": "frames" if timing else "pictures",
    }
    found = means.result(("psnr", "ssim", "l1"))
    report.add(protocol("pixels", details={**ssim, **timing}), found)
    if found and "ssim" not in found:
        notes.append(f"No SSIM: pictures of less than {SSIM_SIDE} x {SSIM_SIDE} pixels have none.")
    notes += [f"Pixels are not measured: {why}." for why in facts["no pixels"]]
    if distance is not None:
        about = {"extractor": distance.name, "extractor_hash": distance.weights, "details": timing}
        report.add(protocol("perceptual", **about), means.result((distance.figure,)))
    if sums.made.pool is not None:
        figures = distances(sums.made, sums.truth, "rfid", extractor)
        report.add(protocol("distribution", **by(extractor), details=timing), figures)
        notes += caveats(extractor, n, sums.made.width)
    elif found:
        notes.append(NO_FVD if timing else "No Frechet distance: there is no extractor.")
    if "texts" in sums.measures:
        _add_agreement(report, sums.texts, protocol, n)
    if "retrieval" in sums.measures:
        figures, among = sums.retrieval.result()
        report.add(protocol("retrieval", details={"nearest among": among}), figures)
    about_codes = {"codebooks": len(tokenizer.codebook_sizes), **timing}
    figures = means.result(("tokens", "bits", "bits_per_pixel"))
    report.add(protocol("codes", details=about_codes), {**figures, **sums.codes.result()})
    if data.label is not None:
        figures, classes, why = sums.probe.figures()
        report.add(protocol("probe", details={**details_of_probe(data.label, classes), **timing}), figures)
        notes += [f"No probe of {data.label}: {why}."] if why else []
        if figures and "probe_of_vectors" not in figures:
            notes.append(f"The probe reads codes alone: {tokenizer.type_name} has no one vector for each place.")
    if learnability != "none":
        budget = budget_of(learnability)
        if facts["side"]:
            notes.append("Learnability is that of the ids alone, without the integers beside them that decoding needs.")
        layout = Layout.from_dict(facts["layout"][0])
        learned = bits_of_codes(sums.ids.result()["ids"], layout, tokenizer.codebook_sizes, budget, tokenizer.device)
        more = {"seeds": f"{budget.seed}", "details": {**details_of(learnability), **timing}}
        report.add(protocol("learnability", **more), learned)
    report.add(protocol("speed", details=machine(tokenizer.device, data.batch_size)), sums.watch.result())


def _motion_errors(made: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Mean squared error of motion maps (B, T, 2, h, w), and that of a map that says that nothing moves."""
    made, truth = made.double(), truth.double()
    return {
        "motion_error": (made - truth).square().flatten(1).mean(1),
        "motion_error_of_zero": truth.square().flatten(1).mean(1),
    }


def _pairs(shown: list[list[Tensor]], columns: int) -> Tensor | None:
    """Rows of pictures, each above what is decoded of it; None without any, or where their sizes differ."""
    rows, left = [], SHOWN
    for truth, made in shown:
        truth, made = truth[:left], made[:left]
        left -= len(truth)
        rows += [part for pair in zip(truth.split(columns), made.split(columns)) for part in pair if len(part)]
    if not rows or len({row.shape[1:] for row in rows}) > 1:
        return None
    columns = max(map(len, rows))
    blank = torch.full_like(rows[0][0], 255)
    return image_grid([p for row in rows for p in [*row, *[blank] * (columns - len(row))]], columns)


# -- generators -----------------------------------------------------------------------------------------------------------


def evaluate_generator(
    pipeline: TextToImagePipeline,
    data: EvaluationSet,
    *,
    extractor: Extractor | None = None,
    text_encoder: Any = None,
    seed: int = 0,
    sampling: dict[str, Any] | None = None,
    model: str = "",
    partial: str | os.PathLike[str] | None = None,
    save_every: float = 5.0,
) -> tuple[Report, Tensor | None]:
    """Draw a picture, or a clip, of every caption of the data, and compare them with the data's own.

    Args:
        data: pictures or clips with captions, at the size that the generator draws.
        extractor: what distances, precision and recall are taken in; None takes none.
        text_encoder: an encoder with `embed` and `encode_text`, which scores pictures, or clips, by their captions; None scores none.
        seed: the picture of sample KEY is drawn from the first 31 bits of sha256("seed:KEY"), in whatever batch or rank.
        sampling: guidance_scale, temperature, … as the pipeline takes them; those saved with the generator without them.
        model: what the report calls the generator.
        partial, save_every: see `evaluate_tokenizer`.

    Returns:
        the report, and a grid of drawn pictures or rows of frames, uint8 (3, h, w); on other ranks than 0 an empty report and
        None.

    Raises:
        InputError: pictures of another size than those drawn, or captions that are missing.
    """
    sampling, clips = dict(sampling or {}), bool(data.frames)
    _check_encoders(extractor, text_encoder, _kind(data))
    texts = None if text_encoder is None else TextAgreement(text_encoder, data.wanted)
    likelihood = Likelihood(pipeline)
    sums = Sums(
        means=Means(), made=FeatureSet(), truth=FeatureSet(), facts=Facts(), shown=Pictures(), likelihood=likelihood,
        drawn=CodeHistogram(pipeline.generator.codebook_sizes),
        **({"texts": texts} if texts else {}),
    )  # fmt: skip
    identity = {
        "version": VERSION, "task": "generator", "model": pipeline.generator.fingerprint, "seed": seed, "sampling": sampling,
        "defaults": pipeline.generator.generation, "tokenizer": pipeline.tokenizer.fingerprint, "precision": pipeline.precision,
        "data": _identity(data), "extractor": extractor and extractor.weights, "text encoder": texts and texts.weights,
    }  # fmt: skip
    progress = Progress(data, sums, identity, Path(partial) if partial else None, save_every)
    facts = sums.facts
    for batch in progress.batches():
        prompts, keys = batch["caption"], batch["key"]
        _need_captions(data, batch, "draw from")
        started = time.perf_counter()
        result = pipeline(prompts, generator=[seed_of(seed, key) for key in keys], output_type="pt", **sampling)
        made = to_uint8(result.images).cpu()
        seconds = (time.perf_counter() - started) / len(made)
        if made.shape != batch["pixels"].shape:
            raise InputError(
                f"the generator draws {tuple(made.shape[1:])} and {data.folder} gives {tuple(batch['pixels'].shape[1:])}"
                f"; give size={made.shape[-1]}" + (f" and frames={made.shape[1]}" if clips else "")
            )
        facts.add("settings", {k: v for k, v in result.settings.items() if k not in ("prompts", "seeds")})
        facts.add("size", list(made.shape[-2:]))
        sums.means.add({
            "seconds": torch.full((len(made),), seconds, dtype=torch.float64), "drawn_tokens": result.tokens.lengths.cpu()
        })  # fmt: skip
        sums.drawn.update(result.tokens.cpu())
        likelihood.update(batch)
        keep = few(keys, data.wanted)
        if extractor is not None:
            sums.made.update(keys, extractor(made), keep)
            sums.truth.update(keys, extractor(batch["pixels"]), keep)
        if texts is not None:
            texts.update(keys, made, batch["pixels"], prompts)
        if batch["number"] * data.batch_size < SHOWN:
            sums.shown.add(batch["number"], made)
            facts.add("captions", [batch["number"], prompts])
    report = Report("generator", {"model": model, **_subject(pipeline.generator), "sampling": sampling, "seed": seed})
    if not progress.collect():
        return report, None
    _generator_groups(report, pipeline, data, sums, extractor, seed)
    report.subject["sampling"] = facts["settings"][0]
    shown = torch.cat([made for (made,) in sums.shown.result()])
    if clips:  # a row of frames for each of a few
        shown = shown[:, :8]
        columns, shown = shown.shape[1], shown[: -(-SHOWN // shown.shape[1])]
    else:
        columns, shown = 8, shown[:SHOWN]
    report.captions = [c for _, several in sorted(facts["captions"]) for c in several][: len(shown)]
    return report, image_grid(shown.flatten(0, -4), columns)


def _generator_groups(
    report: Report,
    pipeline: TextToImagePipeline,
    data: EvaluationSet,
    sums: Sums,
    extractor: Extractor | None,
    seed: int,
) -> None:
    """The report's groups of figures, and its notes, of all that was counted."""
    means, timing, notes = sums.means, data.timing(), report.notes
    n = means.counts.get("seconds", 0)
    if not n:
        raise InputError(f"no sample of {data.folder} could be read; there is nothing to measure")
    size, seeds = "{} x {}".format(*sums.facts["size"][0]), {"seeds": f'sha256("{seed}:KEY")'}

    def protocol(name: str, version: int = 1, **more: Any) -> Any:
        return data.protocol(name, version, n, size, **more)

    if extractor is not None:
        figures = distances(sums.made, sums.truth, "gfid", extractor)
        if sums.made.score is not None:
            figures["inception_score" if extractor.standard else "class_score"] = sums.made.score.result()
        drawn, true = sums.made.features(), sums.truth.features()
        if len(drawn) > 3:
            figures["precision"], figures["recall"] = precision_recall(drawn, true)
        details = {"neighbours": "k = 3", "among about": min(n, NEIGHBOURS), **timing}
        report.add(protocol("distribution", **by(extractor), **seeds, details=details), figures)
        notes += caveats(extractor, n, sums.made.width)
    elif timing:
        notes.append(NO_FVD)
    if "texts" in sums.measures:
        _add_agreement(report, sums.texts, protocol, n, **seeds)
    codes = {"codebooks": len(pipeline.generator.codebook_sizes), **timing}
    report.add(protocol("likelihood", details=codes), sums.likelihood.result())
    notes += sums.likelihood.notes()
    drawn = {"drawn_tokens": means.result(("drawn_tokens",))["drawn_tokens"], **sums.likelihood.lengths()}
    entropies = {"drawn_entropy": sums.drawn.result()["entropy"], **sums.likelihood.entropies()}
    report.add(protocol("drawn", **seeds, details=codes), {**drawn, **entropies})
    report.add(protocol("speed", details=machine(pipeline.device, data.batch_size)), means.result(("seconds",)))
    notes.append(
        f"The reference set are the {n} {'clips' if timing else 'pictures'} whose captions were drawn."
        + ("" if timing else " Figures over another number do not compare: Frechet distances fall as it grows.")
    )


def seed_of(seed: int, key: str) -> int:
    """The seed of sample KEY's picture, below 2^31."""
    return number_of(f"{seed}:{key}") >> 32


# -- shared -----------------------------------------------------------------------------------------------------------------


NO_FVD = "No Frechet distance: no extractor of clips was given, and a distance between single frames would not be one of clips."


def _kind(data: EvaluationSet) -> str:
    return "clips" if data.frames else "pictures"


def _check_encoders(extractor: Extractor | None, text_encoder: Any, kind: str) -> None:
    """Raise InputError unless both read what there is to see."""
    takes = {}
    if extractor is not None:
        takes["the extractor"] = extractor.name, "clips" if extractor.of_clips else "pictures"
    if text_encoder is not None:
        takes["the text encoder"] = text_encoder.name, "clips" if isinstance(text_encoder, ClipEncoder) else "pictures"
        if getattr(text_encoder, "extras", ()):
            raise InputError(
                f"the text encoder {text_encoder.name} reads {', '.join(text_encoder.extras)} beside the clips, which are not known "
                "of drawn or decoded ones; take one of pixels alone, or leave it out"
            )
    for what, (name, taken) in takes.items():
        if taken != kind:
            raise InputError(f"{what} {name} reads {taken}, and these are {kind}; take one of {kind}, or leave it out")


def _need_captions(data: EvaluationSet, batch: dict[str, Any], purpose: str) -> None:
    if not all(batch["caption"]):
        raise InputError(
            f"sample {batch['key'][batch['caption'].index('')]} of {data.folder} has no caption to {purpose}"
        )


def _add_agreement(report: Report, texts: TextAgreement, protocol: Callable[..., Any], n: int, **more: Any) -> None:
    about = {"extractor": texts.name, "extractor_hash": texts.weights}
    about["details"] = {"nearest among about": min(n, NEIGHBOURS)}
    report.add(protocol("text", **about, **more), texts.result())
    if "text" in report.figures:
        report.notes.append(
            f"The text score is 100 max(cos, 0) by {texts.name}: only with OpenAI's CLIP would it be the usual CLIP score."
        )


def _identity(data: EvaluationSet) -> dict[str, Any]:
    """All of a set that sums over it depend on."""
    return {
        **data.protocol("", VERSION, data.wanted, str(data.image_size), details=data.timing()).to_dict(), "label": data.label,
    }  # fmt: skip


class _Distance:
    """LPIPS where its weights are, else the same formula on MobileNetV2."""

    def __init__(self, figure: str, name: str, network: Any, device: torch.device) -> None:
        self.figure, self.name, self.weights = figure, name, fingerprint(network, "weights")
        self.network, self.device = network.to(device), device

    @torch.no_grad()
    def __call__(self, made: Tensor, truth: Tensor, rows: int = 16) -> Tensor:
        pairs = zip(made.split(rows), truth.split(rows))
        floats = ([x.to(self.device).float() / 255 for x in pair] for pair in pairs)
        return torch.cat([self.network.per_image(*pair).cpu() for pair in floats])


def _perceptual(device: torch.device) -> tuple[_Distance | None, str]:
    """The perceptual distance that is at hand, and what to say of it."""
    from tokgen.losses.perceptual import build_perceptual

    try:
        return _Distance("lpips", "LPIPS 0.1 on VGG16", build_perceptual("lpips"), device), ""
    except (CheckpointError, MissingDependency) as error:
        missing = f"No LPIPS ({error})."
    try:
        distance = _Distance(
            "mobilenet_distance", "ImageNet MobileNetV2, unit weights", build_perceptual("mobilenet"), device
        )
        return distance, "There were no LPIPS weights: the MobileNetV2 distance has its formula and another scale."
    except (CheckpointError, MissingDependency):
        return None, missing


def _subject(module: Any) -> dict[str, Any]:
    parameters = sum(p.numel() for p in module.parameters())
    return {"type": module.type_name, "fingerprint": module.fingerprint, "parameters": parameters}
