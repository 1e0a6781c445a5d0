"""Sampling against transformers' `generate` on the same weights, and Token-Shuffle windows against the plain model.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_sampling.py

One image with guidance at LlamaGen-B's size (110 M parameters, 16,384 codes), greedy, so that both sides can be checked to
draw the same ids. Rivals take turns; each figure is the median of its turns. On one thread the seconds are the process's
own CPU time, which neighbours on a busy machine disturb much less than the wall clock.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tokgen.generators.decoding import generate
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.generators.sampling import SamplingSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "generators"))
from llama_peer import to_transformers

GUIDANCE, TEXT = 4.0, 8


def build(window: int = 1, side: int = 8, **sizes: int) -> LlamaGenerator:
    torch.manual_seed(0)
    config = LlamaConfig(
        layout={"kind": "Grid", "h": side, "w": side},
        codebook_sizes=(16_384,),
        text_vocab=1024,
        max_text=TEXT,
        window=window,
        **sizes,
    )
    return LlamaGenerator(config).eval()


def ours(model: LlamaGenerator, text: torch.Tensor, compile: bool = False) -> torch.Tensor:
    mask = torch.ones_like(text, dtype=torch.bool)
    settings = SamplingSettings(guidance_scale=GUIDANCE, temperature=0)
    return generate(model, text, mask, settings, [0] * len(text), compile=compile)[0][..., 0]


def theirs(peer: Any, model: LlamaGenerator, text: torch.Tensor) -> torch.Tensor:
    """`generate` as its users do it: both branches in one batch, left-padded, guided by a logits processor."""
    from transformers import LogitsProcessor, LogitsProcessorList

    first = model.config.text_vocab + 1

    class Guidance(LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            conditional, unconditional = scores.chunk(2)
            scores = (unconditional + GUIDANCE * (conditional - unconditional)).repeat(2, 1)
            scores[:, :first] = -torch.inf
            return scores

    boi = torch.full((1, 1), model.config.text_vocab)
    unconditional = torch.zeros_like(text)
    unconditional[:, -1] = text[:, 0]  # padding, then begin-of-sequence
    ids = torch.cat([torch.cat([text, boi], 1), torch.cat([unconditional, boi], 1)])
    mask = torch.ones_like(ids)
    mask[1, : TEXT - 1] = 0
    out = peer.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=model.layout.length,
        logits_processor=LogitsProcessorList([Guidance()]),
    )
    return out[:1, TEXT + 1 :] - first


def alternate(turns: int, *calls: Callable[[], Any]) -> list[float]:
    """Median seconds of each call; they take turns, so that a busy spell hits all of them."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 1):  # the first turn warms up
        for call, times in zip(calls, seconds):
            start = clock()
            call()
            if turn:
                times.append(clock() - start)
    return [statistics.median(times) for times in seconds]


def run(turns: int = 3, compile: bool = True, **sizes: int) -> list[dict[str, Any]]:
    """Rows {name, ours, peer, ratio, unit, note}; ratio is ours / peer, below 1 where ours is faster.

    Args:
        turns: timed turns per row.
        compile: also time the compiled step (needs a C++ compiler, and about a minute to compile).
        sizes: overrides of `LlamaConfig`, for a quick look at a smaller model.
    """
    return list(rows(turns, compile, **sizes))


def rows(turns: int = 3, compile: bool = True, **sizes: int) -> Iterator[dict[str, Any]]:
    """The rows of `run`, as they are measured."""
    text = torch.randint(1, 1024, (1, TEXT), generator=torch.Generator().manual_seed(0))
    plain = build(1, **sizes)
    n = plain.layout.length
    peer = to_transformers(plain)
    same = torch.equal(ours(plain, text), theirs(peer, plain, text))

    def row(name: str, mine: float, other: float, note: str) -> dict[str, Any]:
        return {"name": name, "ours": mine, "peer": other, "ratio": mine / other, "unit": "s", "note": note}

    def both(*calls: Callable[[], Any]) -> list[float]:
        with torch.no_grad():
            return alternate(turns, *calls)

    identical = "same ids" if same else "IDS DIFFER"
    eager, hf = both(lambda: ours(plain, text), lambda: theirs(peer, plain, text))
    yield row("sampling, eager", eager, hf, f"{n} ids, guidance {GUIDANCE:g}; peer: transformers generate; {identical}")
    if compile:
        same = torch.equal(ours(plain, text, True), ours(plain, text))
        compiled, hf = both(lambda: ours(plain, text, True), lambda: theirs(peer, plain, text))
        yield row(
            "sampling, compiled", compiled, hf, f"peer: transformers generate; {'same ids' if same else 'IDS DIFFER'}"
        )
    for window in (2, 4):
        shuffled = build(window, **sizes)
        mine, base = both(lambda s=shuffled: ours(s, text), lambda: ours(plain, text))
        yield row(f"sampling, window {window}", mine, base, f"{n // window**2} steps; peer: window 1, eager")


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{'':24} {'ours':>9} {'peer':>9} {'ratio':>7}")
    for r in rows():
        print(
            f"{r['name']:24} {r['ours']:7.3f} {r['unit']} {r['peer']:7.3f} {r['unit']} {r['ratio']:7.3f}  {r['note']}"
        )


if __name__ == "__main__":
    main()
