"""Plots of `tokgen.evaluation.language`, one PNG a question, several languages in each. Drawn by matplotlib, without a display."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokgen.errors import MissingDependency
from tokgen.evaluation.language import Measures
from tokgen.files import replacing

Studies = Mapping[str, Mapping[str, Measures]]


def check_plots() -> None:
    """Raises MissingDependency without matplotlib; known before the work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependency(
            'plots need matplotlib; install it with pip install "tokgen[plots]", or leave them out with --no_plots'
        ) from None


def plot_studies(studies: Studies, folder: str | os.PathLike[str]) -> list[Path]:
    """Write zipf.png, innovation.png, perplexity.png and information.png of `language.study` results by name of the language.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    check_plots()
    folder = Path(folder)
    plots = {"zipf": _zipf, "innovation": _innovation, "perplexity": _perplexity, "information": _information}
    paths = []
    for name, draw in plots.items():
        paths.append(folder / f"{name}.png")
        draw(studies, paths[-1])
    return paths


@contextmanager
def _figure(path: Path, columns: int) -> Iterator[list[Any]]:
    """The axes of a row of plots; saved, whole or not at all, at the end."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state shared with the caller's plots

    figure = Figure(figsize=(3 + 4 * columns, 4), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    yield list(axes)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _zipf(studies: Studies, path: Path) -> None:
    orders = sorted({n for study in studies.values() for n in study["ids"].zipf})
    with _figure(path, len(orders)) as axes:
        for n, at in zip(orders, axes):
            for i, (name, study) in enumerate(studies.items()):
                for kind, style in (("ids", "-"), ("shuffled", ":")):
                    curve = study[kind].zipf.get(n)
                    if curve is not None and (n > 1 or kind == "ids"):  # shuffling changes no frequency of single ids
                        label = name if kind == "ids" else f"{name}, shuffled"
                        at.loglog(curve.ranks, curve.shares, style, color=f"C{i}", label=label)
            at.set(title=f"{n}-grams", xlabel="rank", ylabel="share of all")


def _innovation(studies: Studies, path: Path) -> None:
    with _figure(path, 1) as (at,):
        for i, (name, study) in enumerate(studies.items()):
            for kind, style in (("ids", "-"), ("shuffled", ":")):
                curve = study[kind].innovation
                at.loglog(
                    curve.seen, curve.types, style, color=f"C{i}", label=name if kind == "ids" else f"{name}, shuffled"
                )
        at.set(title="innovation", xlabel="ids seen", ylabel="different ids seen")


def _perplexity(studies: Studies, path: Path) -> None:
    with _figure(path, 1) as (at,):
        for i, (name, study) in enumerate(studies.items()):
            for kind, style in (("ids", "o-"), ("shuffled", "x:")):
                bits = study[kind].ngrams
                label = name if kind == "ids" else f"{name}, shuffled"
                at.semilogy(list(bits), [2**b for b in bits.values()], style, color=f"C{i}", label=label)
        at.set(title="n-gram models, held-out sentences", xlabel="n", ylabel="perplexity")
        at.set_xticks(sorted({n for study in studies.values() for n in study["ids"].ngrams}))


def _information(studies: Studies, path: Path) -> None:
    axes_names = [
        a for a in ("sequence", "across", "down", "time") if any(a in s["ids"].information for s in studies.values())
    ]
    with _figure(path, len(axes_names)) as axes:
        for along, at in zip(axes_names, axes):
            for i, (name, study) in enumerate(studies.items()):
                for kind, style in (("ids", "o-"), ("within", "x:")):
                    excess = {d: found.excess for d, found in study[kind].information.get(along, {}).items()}
                    label = name if kind == "ids" else f"{name}, shuffled within sentences"
                    at.plot(list(excess), list(excess.values()), style, color=f"C{i}", label=label)
            at.set_xscale("log", base=2)
            at.set(title=along, xlabel="distance", ylabel="mutual information above chance, bits")
