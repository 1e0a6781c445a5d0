"""What `tokgen evaluate` measures: a tokenizer's card, and a generator's."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokgen.errors import CheckpointError, ConfigError, InputError, MissingDependency
from tokgen.evaluation.extractors import Extractor
from tokgen.evaluation.learnability import CodeCollector, bits_of_codes, budget_of, details_of
from tokgen.evaluation.metrics import (
    SSIM_SIDE,
    CodeHistogram,
    FeatureStatistics,
    InceptionScore,
    Means,
    pixel_errors,
    precision_recall,
)
from tokgen.evaluation.report import Report
from tokgen.evaluation.retrieval import matching_rates
from tokgen.evaluation.samples import EvaluationSet
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.images import image_grid, to_uint8
from tokgen.pretrained import fingerprint
from tokgen.quantizers.base import gather_over_ranks, sum_over_ranks
from tokgen.tokenizers.base import VisualTokenizer

NEIGHBOURS = 10_000  # about so many pictures are kept for precision, recall and retrieval
SHOWN = 24  # pictures on the page


# -- tokenizers -----------------------------------------------------------------------------------------------------------


def evaluate_tokenizer(
    tokenizer: VisualTokenizer,
    data: EvaluationSet,
    *,
    extractor: Extractor | None = None,
    learnability: str = "standard",
    options: dict[str, Any] | None = None,
    model: str = "",
) -> tuple[Report, Tensor | None]:
    """Encode and decode every sample.

    Over the ranks of the default process group, where there is one; figures are the same as those of one rank up to rounding.
    The report is whole on rank 0; only there is learnability measured.

    Args:
        data: pictures or clips of sizes that the tokenizer takes.
        extractor: what the Frechet distance between pictures and reconstructions is taken in; None takes none. Clips have none.
        learnability: a name in `BUDGETS`, or "none".
        options: given to `encode`, and part of the report.
        model: what the report calls the tokenizer.

    Returns:
        the report, and a grid of pictures, uint8 (3, h, w), each row of the data above what is decoded of it.

    Raises:
        InputError: data of another kind than the tokenizer takes.
    """
    if learnability != "none":
        budget_of(learnability)
    tokenizer, options = tokenizer.eval(), dict(options or {})
    means, histogram, collected = Means(), CodeHistogram(tokenizer.codebook_sizes), CodeCollector()
    distance, no_distance = _perceptual(tokenizer.device)
    sets: list[_FeatureSet] = [_FeatureSet(), _FeatureSet()]
    decodes, notes, show, columns, layout, side, shapes = True, [], [], 8, None, False, set()
    watch = _Watch(tokenizer.device)
    for batch in data.batches():
        if not batch["key"]:
            continue
        pixels = batch["pixels"]
        extras = {name: batch[name] for name in tokenizer.extras if name in batch}
        tokens = watch("encode_ms", tokenizer.encode, pixels, **extras, **options)
        clips, frames = pixels.ndim == 5, pixels.flatten(0, -4)
        layout, side = tokens.layout, side or bool(tokens.side)
        shapes.add(tuple(pixels.shape[-2:]))
        values = {"tokens": tokens.lengths.double().cpu(), "bits": tokens.bits.cpu()}
        values["bits_per_pixel"] = values["bits"] / pixels[0, ..., 0, :, :].numel()
        means.add(values)
        histogram.update(tokens.cpu())
        if learnability != "none":
            collected.update(batch["key"], tokens)
        if decodes:
            try:
                made = to_uint8(watch("decode_ms", tokenizer.decode, tokens)).cpu()
            except ConfigError as error:  # a semantic tokenizer that was trained without a pixel decoder
                decodes, notes = False, [f"Pixels are not measured: {error}."]
                continue
            made = made.flatten(0, -4)
            means.add(pixel_errors(made, frames))
            if distance is not None:
                means.add({distance.figure: distance(made, frames)})
            if extractor is not None and not clips:
                for part, pictures in zip(sets, (made, frames)):
                    part.update(extractor(pictures))
            if len(show) * columns < SHOWN:  # a row of pictures, or of the frames of a clip
                columns = min(8, pixels.shape[1]) if clips else 8
                rows = [slice(0, columns)] if clips else [slice(i, i + 8) for i in range(0, min(len(frames), SHOWN), 8)]
                show += [(frames[row], made[row]) for row in rows]
    n = int(sum_over_ranks(torch.tensor(means.counts.get("tokens", 0))))
    report = Report("tokenizer", {"model": model, **_subject(tokenizer), "encode_options": options})
    size = "{} x {}".format(*next(iter(shapes))) if len(shapes) == 1 else "several"

    def protocol(name: str, version: int = 1, **more: Any) -> Any:
        return data.protocol(name, version, n, size, **more)

    timing = data.timing()
    ssim = {
        "ssim": f"Gaussian {SSIM_SIDE} x {SSIM_SIDE}, sigma 1.5, data range 1",
        "mean over": "frames" if timing else "pictures",
    }
    found = means.reduce(("psnr", "ssim", "l1"))
    report.add(protocol("pixels", details={**ssim, **timing}), found)
    if found and "ssim" not in found:
        notes.append(f"No SSIM: pictures of less than {SSIM_SIDE} x {SSIM_SIDE} pixels have none.")
    if distance is not None:
        about = {"extractor": distance.name, "extractor_hash": distance.weights, "details": timing}
        report.add(protocol("perceptual", **about), means.reduce((distance.figure,)))
    if no_distance:
        notes.append(no_distance)
    if extractor is not None and decodes and not timing:
        figures = _between(*sets, "rfid" if extractor.standard else "frechet", extractor.standard)
        report.add(protocol("distribution", **_of(extractor)), figures)
        notes += _on_distances(extractor, n, sets[0].width)
    elif timing:
        notes.append("No FVD: no video network's weights are at hand, and frame-wise distances would not be one.")
    elif decodes:
        notes.append("No Frechet distance: there is no extractor.")
    about_codes = {"codebooks": len(tokenizer.codebook_sizes), **timing}
    figures = means.reduce(("tokens", "bits", "bits_per_pixel"))
    report.add(protocol("codes", details=about_codes), {**figures, **histogram.reduce()})
    if learnability != "none":
        ids = collected.reduce()
        if _rank() == 0:
            budget = budget_of(learnability)
            if side:
                notes.append(
                    "Learnability is that of the ids alone, without the integers beside them that decoding needs."
                )
            learned = bits_of_codes(ids, layout, tokenizer.codebook_sizes, budget, tokenizer.device)
            more = {"seeds": f"{budget.seed}", "details": {**details_of(learnability), **timing}}
            report.add(protocol("learnability", **more), learned)
    report.add(protocol("speed", details=_machine(tokenizer.device, data.batch_size)), watch.reduce())
    report.notes = notes
    if len(shapes) > 1 or not show:
        return report, None
    blank = torch.full_like(show[0][0][0], 255)
    rows = [p for pair in show for row in pair for p in [*row, *[blank] * (columns - len(row))]]
    return report, image_grid(rows, columns)


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
) -> tuple[Report, Tensor | None]:
    """Draw a picture of every caption of the data, and compare them with the data's pictures.

    Args:
        data: pictures with captions, at the size that the generator draws.
        extractor: what distances, precision and recall are taken in; None takes none.
        text_encoder: an encoder with `embed` and `encode_text`, which scores pictures by their captions; None scores none.
        seed: the picture of sample KEY is drawn from the first 31 bits of sha256("seed:KEY"), in whatever batch or rank.
        sampling: guidance_scale, temperature, … as the pipeline takes them; those saved with the generator without them.
        model: what the report calls the generator.

    Returns:
        the report (whole on rank 0), and a grid of drawn pictures, uint8 (3, h, w).

    Raises:
        InputError: pictures of another size than those drawn, clips, or captions that are missing.
    """
    sampling, device = dict(sampling or {}), pipeline.device
    drawn_set, true_set = _FeatureSet(), _FeatureSet()
    texts = None if text_encoder is None else _Texts(text_encoder)
    count, seconds, show, captions, settings, shape = 0, 0.0, [], [], {}, None
    for batch in data.batches():
        prompts = batch["caption"]
        if not prompts:
            continue
        if not all(prompts):
            raise InputError(f"sample {batch['key'][prompts.index('')]} of {data.folder} has no caption to draw from")
        started = time.perf_counter()
        result = pipeline(prompts, generator=[seed_of(seed, key) for key in batch["key"]], output_type="pt", **sampling)
        made = to_uint8(result.images).cpu()
        seconds += time.perf_counter() - started
        if made.shape != batch["pixels"].shape:
            raise InputError(
                f"the generator draws {tuple(made.shape[1:])} and the pictures of {data.folder} are "
                f"{tuple(batch['pixels'].shape[1:])}; give size={made.shape[-1]}"
            )
        settings = {k: v for k, v in result.settings.items() if k not in ("prompts", "seeds")}
        count, shape = count + len(made), made.shape[-2:]
        if extractor is not None:
            keep = _few(batch["key"], data.wanted)
            drawn_set.update(extractor(made), keep)
            true_set.update(extractor(batch["pixels"]), keep)
        if texts is not None:
            texts.update(made, batch["pixels"], prompts, _few(batch["key"], data.wanted))
        if len(captions) < SHOWN:
            show.append(made)
            captions += prompts
    n = int(sum_over_ranks(torch.tensor(count)))
    report = Report("generator", {"model": model, **_subject(pipeline.generator), "sampling": settings, "seed": seed})
    seeds = {"seeds": f'sha256("{seed}:KEY")'}

    def protocol(name: str, version: int = 1, **more: Any) -> Any:
        return data.protocol(name, version, n, f"{shape[0]} x {shape[1]}", **more)

    if extractor is not None:
        figures = _between(drawn_set, true_set, "gfid" if extractor.standard else "frechet", extractor.standard)
        if drawn_set.score is not None:
            figures["inception_score" if extractor.standard else "class_score"] = drawn_set.score.reduce()
        drawn, true = drawn_set.features(), true_set.features()
        if len(drawn) > 3:
            figures["precision"], figures["recall"] = precision_recall(drawn, true)
        details = {"neighbours": "k = 3", "among about": min(n, NEIGHBOURS)}
        report.add(protocol("distribution", **_of(extractor), **seeds, details=details), figures)
        report.notes += _on_distances(extractor, n, drawn_set.width)
    if texts is not None:
        about = {
            "extractor": texts.name,
            "extractor_hash": texts.weights,
            "details": {"nearest among about": min(n, NEIGHBOURS)},
        }
        report.add(protocol("text", **about, **seeds), texts.reduce())
        report.notes.append(
            f"The text score is 100 max(cos, 0) by {texts.name}: only with OpenAI's CLIP would it be the usual CLIP score."
        )
    took = float(sum_over_ranks(torch.tensor(seconds, dtype=torch.float64))) / max(n, 1)
    report.add(protocol("speed", details=_machine(device, data.batch_size)), {"seconds": took})
    report.notes.append(
        f"The reference set are the {n} pictures whose captions were drawn. Figures over another number do not compare: "
        "Frechet distances fall as it grows."
    )
    report.captions = captions[:SHOWN]
    return report, image_grid(torch.cat(show)[:SHOWN], columns=8) if show else None


def seed_of(seed: int, key: str) -> int:
    """The seed of sample KEY's picture, below 2^31."""
    return _number(f"{seed}:{key}") >> 32


class _Texts:
    """How well pictures agree with their captions, in the space of an encoder of both."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.name, self.weights = encoder, encoder.name, fingerprint(encoder, "weights")
        self.means, self.kept = Means(), [[], [], []]  # drawn pictures, captions, and a number for each text

    @torch.no_grad()
    def update(self, made: Tensor, truth: Tensor, captions: Sequence[str], keep: Tensor) -> None:
        device = next(self.encoder.parameters()).device
        pictures = [self.encoder.embed(x.to(device)) for x in (made, truth)]
        drawn, true, texts = (
            F.normalize(x.double().cpu(), dim=1) for x in (*pictures, self.encoder.encode_text(captions))
        )
        scores = [100 * (x * texts).sum(1).clamp(min=0) for x in (drawn, true)]
        self.means.add({"text_score": scores[0], "text_score_of_references": scores[1]})
        # captions that are equal word for word are one
        numbers = torch.tensor([_number(c) for c in captions], dtype=torch.int64)
        for kept, x in zip(self.kept, (drawn, texts, numbers)):
            kept.append(x[keep])

    def reduce(self) -> dict[str, float]:
        scores = self.means.reduce(("text_score", "text_score_of_references"))
        drawn, texts, numbers = (gather_over_ranks(torch.cat(kept)) for kept in self.kept)
        rates = matching_rates(drawn, texts, numbers)
        return scores | {name: float(rate) for name, rate in rates.items() if name != "pairs"}


def _number(text: str) -> int:
    """A number below 2^63 that stands for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _few(keys: Sequence[str], total: int) -> Tensor:
    """Which of the samples are among the about `NEIGHBOURS` of all, bool (B,): by their keys, and so the same on any ranks."""
    share = NEIGHBOURS / max(total, NEIGHBOURS)
    return torch.tensor([_number(key) < share * 2**63 for key in keys], dtype=torch.bool)


# -- shared -----------------------------------------------------------------------------------------------------------------


class _FeatureSet:
    """Statistics of one set of pictures in an extractor's features."""

    def __init__(self) -> None:
        self.pool: FeatureStatistics | None = None
        self.spatial: FeatureStatistics | None = None
        self.score: InceptionScore | None = None
        self.kept: list[Tensor] = []

    def update(self, features: dict[str, Tensor], keep: Tensor | None = None) -> None:
        """Count a batch; `keep`, bool (B,), are those whose pooled features precision and recall are taken over."""
        self.pool = self.pool or FeatureStatistics(features["pool"].shape[1])
        self.pool.update(features["pool"])
        if "spatial" in features:
            self.spatial = self.spatial or FeatureStatistics(features["spatial"].shape[1])
            self.spatial.update(features["spatial"])
        if "logits" in features and keep is not None:
            self.score = self.score or InceptionScore(features["logits"].shape[1])
            self.score.update(features["logits"])
        if keep is not None:
            self.kept.append(features["pool"].float().cpu()[keep])

    @property
    def width(self) -> int:
        return 0 if self.pool is None else len(self.pool.mean)

    def features(self) -> Tensor:
        """Those kept on all ranks, (N, D)."""
        return gather_over_ranks(torch.cat(self.kept))


def _between(made: _FeatureSet, truth: _FeatureSet, name: str, standard: bool) -> dict[str, float]:
    figures = {name: made.pool.reduce().frechet(truth.pool.reduce())}
    if made.spatial is not None:
        figures["sfid" if standard else "spatial_frechet"] = made.spatial.reduce().frechet(truth.spatial.reduce())
    return figures


def _of(extractor: Extractor) -> dict[str, str]:
    return {"extractor": extractor.name, "extractor_hash": extractor.weights}


def _on_distances(extractor: Extractor, n: int, width: int) -> list[str]:
    notes = []
    if not extractor.standard:
        notes.append(
            f"The Frechet distance is in features of {extractor.name}: it is no FID, and of another scale than any FID."
        )
    if n <= width:
        notes.append(
            f"Of {n} pictures in {width} dimensions no covariance is known: the Frechet distance is mostly the bias of so few."
        )
    return notes


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


class _Watch:
    """Mean milliseconds for a sample; the first batch of each kind counts only where there is no other."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, {}

    def __call__(self, name: str, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        made = work(*arguments, **named)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self.times.setdefault(name, []).append((time.perf_counter() - started, len(made)))
        return made

    def reduce(self) -> dict[str, float]:
        found = {}
        for name in ("encode_ms", "decode_ms"):
            times = self.times.get(name, [])
            total = torch.tensor(times[1:] or times or [(0.0, 0)], dtype=torch.float64).sum(0)
            seconds, samples = sum_over_ranks(total).tolist()
            if samples:
                found[name] = 1000 * seconds / samples
        return found


def _machine(device: torch.device, batch_size: int) -> dict[str, Any]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    return {"device": name, "batch size": batch_size}


def _subject(module: Any) -> dict[str, Any]:
    parameters = sum(p.numel() for p in module.parameters())
    return {"type": module.type_name, "fingerprint": module.fingerprint, "parameters": parameters}


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
