"""`make bench`: one table of ratios with medians.

python -m tests.benchmarks [NAME ...] runs the named parts (quantizers, sampling, data, video, trajectories, optimizer), or all of them.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path


def main() -> None:
    names = sorted(f.stem.removeprefix("bench_") for f in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="NAME", help=f"one of {', '.join(names)}; all without a name")
    parts = parser.parse_args().parts or names
    for part in parts:
        if part not in names:
            parser.error(f"no benchmark {part!r}; expected {', '.join(names)}")
    rows = []
    for part in parts:
        print(f"running {part} ...", flush=True)
        rows += importlib.import_module(f"tests.benchmarks.bench_{part}").run()
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Markdown: what, ours, the peer, and ours / peer."""
    lines = ["| what | ours | peer | ours / peer | |", "|---|---|---|---|---|"]
    for row in rows:
        ours, peer = (f"{row[key]:.4g} {row['unit']}" for key in ("ours", "peer"))
        lines.append(f"| {row['name']} | {ours} | {peer} | {row['ratio']:.2f} | {row['note']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
