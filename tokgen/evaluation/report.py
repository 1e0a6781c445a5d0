"""Report cards: figures with the protocols that they were measured by, in a file, on a page, and side by side.

DIR/report.json   everything, for `tokgen compare`
DIR/report.md     the same to read, with the pictures beside it
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokgen.errors import DataError, InputError
from tokgen.evaluation.protocol import Protocol
from tokgen.files import replacing, write_json

FORMAT, VERSION = "tokgen-report", 1
REPORT, PAGE = "report.json", "report.md"
# name -> (how it is printed, unit, which way is better: +1, -1, or 0 for neither)
FIGURES: dict[str, tuple[str, str, int]] = {
    "psnr": ("PSNR", "dB", 1),
    "ssim": ("SSIM", "", 1),
    "l1": ("L1", "", -1),
    "lpips": ("LPIPS (VGG)", "", -1),
    "mobilenet_distance": ("MobileNetV2 distance", "", -1),
    "rfid": ("rFID", "", -1),
    "gfid": ("gFID", "", -1),
    "sfid": ("sFID", "", -1),
    "frechet": ("Frechet distance", "", -1),
    "spatial_frechet": ("spatial Frechet distance", "", -1),
    "inception_score": ("Inception score, one split", "", 1),
    "class_score": ("class score, one split", "", 1),
    "precision": ("precision", "", 1),
    "recall": ("recall", "", 1),
    "tokens": ("tokens", "", -1),
    "bits": ("bits", "", -1),
    "bits_per_pixel": ("bits per pixel", "", -1),
    "usage": ("codes in use", "", 1),
    "entropy": ("entropy per code", "bits", 0),
    "perplexity": ("perplexity", "", 0),
    "ar_bits_per_code": ("learned: bits per code", "bits", -1),
    "ar_bits": ("learned: bits", "", -1),
    "training_bits_per_code": ("the same on its training items", "bits", 0),
    "probe_of_vectors": ("read off the mean code vector", "", 1),
    "probe_of_codes": ("read off the histogram of codes", "", 1),
    "probe_of_pixels": ("read off 16 x 16 pixels, without any tokenizer", "", 0),
    "largest_class": ("share of the largest class", "", 0),
    "motion_error": ("squared error of the maps", "", -1),
    "motion_error_of_zero": ("squared error of no motion", "", 0),
    "bits_per_code": ("bits per code of the references", "bits", -1),
    "bits_of_item": ("bits of a reference", "bits", -1),
    "caption_gain": ("bits that its caption saves", "bits", 1),
    "drawn_tokens": ("tokens, drawn", "", 0),
    "reference_tokens": ("tokens of the references", "", 0),
    "drawn_entropy": ("entropy per code, drawn", "bits", 0),
    "reference_entropy": ("entropy per code of the references", "bits", 0),
    "text_score": ("text score", "", 1),
    "text_score_of_references": ("text score of the references", "", 0),
    "image_to_text": ("own caption is nearest", "", 1),
    "text_to_image": ("own picture is nearest", "", 1),
    "image_to_text_5": ("own caption among 5", "", 1),
    "text_to_image_5": ("own picture among 5", "", 1),
    "image_to_text_of_references": ("own caption is nearest, of the references", "", 0),
    "text_to_image_of_references": ("own picture is nearest, of the references", "", 0),
    "encode_ms": ("encoding", "ms", -1),
    "decode_ms": ("decoding", "ms", -1),
    "seconds": ("drawing", "s", -1),
}
TITLES = {
    "pixels": "Pixels",
    "perceptual": "Perceptual distance",
    "distribution": "Distribution of features",
    "motion": "Motion",
    "codes": "Codes",
    "probe": "What a linear model reads off the codes",
    "learnability": "How learnable the codes are",
    "likelihood": "How well the references' codes are predicted",
    "drawn": "Codes drawn",
    "text": "Agreement with the caption",
    "retrieval": "Codes and captions, as the tokenizer itself reads them",
    "speed": "Speed",
}


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        task: "tokenizer" or "generator".
        subject: what was measured: model, type, fingerprint, parameters, settings that draw the pictures again.
        figures: group -> name -> value; names are those of `FIGURES`, with a list where there is a value for each codebook.
        protocols: group -> how its figures were measured.
        notes: sentences on what the figures are not.
        captions: of the pictures, in their order.
        about: versions, device, data; for the reader, not compared.
    """

    task: str
    subject: dict[str, Any]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    protocols: dict[str, Protocol] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, protocol: Protocol, figures: dict[str, Any]) -> None:
        """A group of figures; none is no group."""
        if figures:
            self.protocols[protocol.name], self.figures[protocol.name] = protocol, figures

    def save(self, folder: str | os.PathLike[str], picture: str | None = None) -> Path:
        """Write report.json and report.md. `picture` is the name of a PNG that lies beside them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = {"format": FORMAT, "version": VERSION, **vars(self)}
        data["protocols"] = {name: p.to_dict() for name, p in self.protocols.items()}
        write_json(data, folder / REPORT)
        with replacing(folder / PAGE) as temporary:
            temporary.write_text(page(self, picture), encoding="utf-8")
        return folder / REPORT

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report.json, or that of a folder. Raises DataError when there is none, or one that was changed."""
        file = Path(path) / REPORT if Path(path).is_dir() else Path(path)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"no report at {file}; make one with `tokgen evaluate`") from None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{file} cannot be read as a report ({error})") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise DataError(f"{file} is not a report of `tokgen evaluate`")
        if data.pop("version", None) != VERSION:
            raise DataError(f"{file} is a report of another version than {VERSION}; measure again")
        try:
            data["protocols"] = {k: Protocol.from_dict(v, str(file)) for k, v in data["protocols"].items()}
            report = cls(**data)
            complete = report.figures.keys() == report.protocols.keys()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{file} is not a whole report ({type(error).__name__}: {error})") from None
        if not complete:
            raise DataError(f"{file} holds figures without their protocols; measure again")
        return report


# -- to read ------------------------------------------------------------------------------------------------------------


def page(report: Report, picture: str | None = None) -> str:
    """A report as Markdown."""
    subject = report.subject
    lines = [f"# {subject.get('model', '')}", ""]
    lines += [f"A {subject.get('type')} {report.task}, fingerprint `{subject.get('fingerprint')}`.", ""]
    for group, figures in report.figures.items():
        protocol = report.protocols[group]
        lines += [f"## {TITLES.get(group, group)}", "", "| figure | value |", "|---|---|"]
        lines += [f"| {label(name)} | {shown(name, value)} |" for name, value in figures.items()]
        lines += [
            "",
            f"Protocol `{protocol.name}` version {protocol.version}, hash `{protocol.hash}`: {described(protocol)}.",
        ]
        lines += [""]
    if picture is not None:
        about = "Each row of pictures, and below it what is decoded from its tokens." if not report.captions else (
            "Drawn, row by row, from: " + "; ".join(report.captions) + "."
        )  # fmt: skip
        lines += ["## Pictures", "", f"![pictures]({picture})", "", about, ""]
    if report.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in report.notes), ""]
    for title, facts in (("Model", subject), ("Run", report.about)):
        lines += [f"## {title}", "", "```json", json.dumps(facts, indent=2, ensure_ascii=False), "```", ""]
    return "\n".join(lines)


def label(name: str) -> str:
    text, unit, better = FIGURES[name]
    arrow = {1: " ↑", -1: " ↓", 0: ""}[better]
    return f"{text}{f' ({unit})' if unit else ''}{arrow}"


def shown(name: str, value: Any) -> str:
    """A figure as it is printed: of several codebooks the mean, and each."""
    if isinstance(value, list):
        each = ", ".join(shown(name, v) for v in value[:8]) + (", …" if len(value) > 8 else "")
        return each if len(value) == 1 else f"{shown(name, sum(value) / len(value))} (each: {each})"
    if name in ("usage", "precision", "recall", "largest_class") or name.startswith(
        ("image_to_", "text_to_", "probe_of_")
    ):
        return f"{value:.1%}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def described(protocol: Protocol) -> str:
    what = [f"{protocol.samples} samples ({protocol.selection}) of reference `{protocol.reference}`"]
    what += [
        f"size {protocol.size}",
        f"resize {protocol.crop}, {protocol.filter}",
        protocol.value_range,
        protocol.rounding,
    ]
    if protocol.extractor:
        what.append(f"features of {protocol.extractor} `{protocol.extractor_hash}`")
    if protocol.seeds:
        what.append(f"seeds {protocol.seeds}")
    return "; ".join(what + [f"{name} {value}" for name, value in protocol.details.items()])


# -- side by side ---------------------------------------------------------------------------------------------------------


def compare(reports: dict[str, Report], groups: Sequence[str] | None = None, force: bool = False) -> str:
    """A table of the figures of several reports, one column each, in Markdown.

    Args:
        reports: name of a column -> report; all of one task.
        groups: compare these groups only; None takes all that any report has.
        force: print figures of unlike protocols too, each protocol in a table of its own.

    Raises:
        InputError: fewer than two reports, tasks that differ, an unknown group, or, without `force`, unlike protocols: it says
            which fields differ, and how.
    """
    if len(reports) < 2:
        raise InputError("comparing needs at least two reports")
    tasks = {name: report.task for name, report in reports.items()}
    if len(set(tasks.values())) > 1:
        raise InputError(
            f"these are reports of different things: {', '.join(f'{n} of a {t}' for n, t in tasks.items())}"
        )
    known = list(dict.fromkeys(group for report in reports.values() for group in report.figures))
    unknown = [group for group in groups or () if group not in known]
    if unknown:
        raise InputError(f"no report has figures of {', '.join(unknown)}; they have {', '.join(known)}")
    tables, problems = [], []
    for group in groups or known:
        alike: dict[str, dict[str, Report]] = {}  # protocol hash -> its reports
        for name, report in reports.items():
            if group in report.protocols:
                alike.setdefault(report.protocols[group].hash, {})[name] = report
        families = list(alike.values())
        for other in families[1:]:
            problems.append(_unlike(group, families[0], other))
        tables += [_table(group, reports if len(families) == 1 else family, len(families) > 1) for family in families]
    if problems and not force:
        agreeing = [g for g in known if len({r.protocols[g].hash for r in reports.values() if g in r.protocols}) == 1]
        hint = f"--only {' '.join(agreeing)} compares what agrees" if agreeing else "nothing that they measured agrees"
        raise InputError(f"{'; '.join(problems)}. {hint}; --force prints unlike figures apart; or measure again alike")
    return "\n\n".join(tables)


def _unlike(group: str, first: dict[str, Report], second: dict[str, Report]) -> str:
    a, b = next(iter(first)), next(iter(second))
    differing = first[a].protocols[group].differences(second[b].protocols[group])
    fields = ", ".join(f"{name} ({x!r} and {y!r})" for name, (x, y) in differing.items())
    return f"{a} and {b} measured {group!r} by unlike protocols: {fields}"


def _table(group: str, reports: dict[str, Report], apart: bool) -> str:
    measured = [report for report in reports.values() if group in report.figures]
    names = list(dict.fromkeys(name for report in measured for name in report.figures[group]))
    protocol = measured[0].protocols[group]
    rows = [f"| {TITLES.get(group, group)} | {' | '.join(reports)} |", "|---" * (len(reports) + 1) + "|"]
    for name in names:
        values = [report.figures.get(group, {}).get(name) for report in reports.values()]
        rows.append(f"| {label(name)} | " + " | ".join("–" if v is None else shown(name, v) for v in values) + " |")
    note = f"Protocol `{group}` `{protocol.hash}`: {described(protocol)}."
    return "\n".join(
        [*rows, "", note if not apart else f"Not to be compared with the other tables of this group. {note}"]
    )
