"""Sampling against transformers' `generate` on the same weights, and against what reading the weights alone would take.

    OMP_NUM_THREADS=2 python tests/benchmarks/bench_sampling.py

LlamaGen-B's size (110 M parameters, 16,384 codes, 256 ids a picture), random weights. Rivals take turns; each figure is the
median of its turns. On one thread the seconds are the process's own CPU time, which neighbours on a busy machine disturb
much less than the wall clock. Plain and speculative decoding draw the same ids, which is checked; int8 draws those of the
rounded weights. The limit is steps x bytes of weights that a step reads / measured reading speed; it holds for one picture,
where arithmetic is negligible, and not for batches.
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


def build(window: int = 1, side: int = 16, **sizes: int) -> LlamaGenerator:
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


def ours(model: LlamaGenerator, text: torch.Tensor, guidance: float = GUIDANCE, **how: Any) -> torch.Tensor:
    mask = torch.ones_like(text, dtype=torch.bool)
    settings = SamplingSettings(guidance_scale=guidance, temperature=0)
    ids, report = generate(model, text, mask, settings, [0] * len(text), **how)
    ours.steps_per_call = report.steps_per_call
    return ids[..., 0]


def weight_bytes(model: LlamaGenerator) -> int:
    """Bytes that one decoding step reads: everything but the embeddings."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    read = [t for name, t in tensors.items() if "embeddings" not in name and name not in ("order", "places")]
    return sum(t.numel() * t.element_size() for t in read)


def reading_speed(megabytes: int = 512) -> float:
    """Bytes a second of a sum over memory that no cache holds, the best of ten."""
    x = torch.ones(megabytes * 2**18)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return x.numel() * 4 / min(times)


def theirs(peer: Any, model: LlamaGenerator, text: torch.Tensor, guidance: float = GUIDANCE) -> torch.Tensor:
    """`generate` as its users do it: both branches in one batch, left-padded, guided by a logits processor."""
    from transformers import LogitsProcessor, LogitsProcessorList

    first = model.config.text_vocab + 1

    class Guidance(LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if guidance != 1:
                conditional, unconditional = scores.chunk(2)
                scores = (unconditional + guidance * (conditional - unconditional)).repeat(2, 1)
            scores[:, :first] = -torch.inf
            return scores

    boi = torch.full((len(text), 1), model.config.text_vocab)
    ids = torch.cat([text, boi], 1)
    mask = torch.ones_like(ids)
    if guidance != 1:
        unconditional = torch.zeros_like(text)
        unconditional[:, -1] = text[:, 0]  # padding, then begin-of-sequence
        ids = torch.cat([ids, torch.cat([unconditional, boi], 1)])
        mask = torch.ones_like(ids)
        mask[len(text) :, : TEXT - 1] = 0
    out = peer.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=model.layout.length,
        logits_processor=LogitsProcessorList([Guidance()]),
    )
    return out[: len(text), TEXT + 1 :] - first


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


def run(turns: int = 2, compile: bool = True, **sizes: int) -> list[dict[str, Any]]:
    """Rows {name, ours, peer, ratio, unit, note}; ratio is ours / peer, below 1 where ours is faster.

    Args:
        turns: timed turns per row.
        compile: also time the compiled step (needs a C++ compiler, and about a minute to compile).
        sizes: overrides of `LlamaConfig`, for a quick look at a smaller model.
    """
    return list(rows(turns, compile, **sizes))


def rows(turns: int = 2, compile: bool = True, **sizes: int) -> Iterator[dict[str, Any]]:
    """The rows of `run`, as they are measured; all variants of one window take turns with the peer."""
    text = torch.randint(1, 1024, (1, TEXT), generator=torch.Generator().manual_seed(0))
    plain, speed = build(1, **sizes), reading_speed()
    n, peer = plain.layout.length, to_transformers(plain)

    def row(name: str, mine: float, other: float, *notes: str) -> dict[str, Any]:
        note = ", ".join(filter(None, notes))
        return {"name": name, "ours": mine, "peer": other, "ratio": mine / other, "unit": "s", "note": note}

    for window in (1, 2, 4):
        model = plain if window == 1 else build(window, **sizes)
        small, label = model.int8(), f"window {window}"
        variants: dict[str, tuple[LlamaGenerator, dict[str, Any]]] = {}
        for compiled in (False, True)[: 1 + (compile and window < 4)]:
            end, how = ", compiled" * compiled, {"compile": compiled}
            variants[label + end] = (model, how)
            variants[f"{label}, int8{end}"] = (small, how)
            variants[f"{label}, speculative{end}"] = (model, {**how, "speculative": 8, "draft": small})
        with torch.no_grad():
            expected, accepted = ours(model, text), {}
            hf = theirs(peer, plain, text)
            same = {}
            for name, (m, how) in variants.items():
                same[name] = torch.equal(ours(m, text, **how), expected)
                accepted[name] = ours.steps_per_call
            calls = [lambda m=m, how=how: ours(m, text, **how) for m, how in variants.values()]
            *mine, theirs_took = alternate(turns, *calls, lambda: theirs(peer, plain, text))
        for (name, (m, how)), seconds in zip(variants.items(), mine):
            least = m.steps * weight_bytes(m) / speed
            exact = "" if m is small else "same ids" if same[name] else "IDS DIFFER"
            if name == "window 1":
                exact = "ids of transformers" if torch.equal(expected, hf) else "IDS DIFFER FROM transformers"
            yield row(
                name, seconds, theirs_took, f"{n} ids in {m.steps} steps", exact,
                f"{accepted[name]:.1f} steps a call" if "draft" in how
                else f"{least / seconds:.0%} of the limit of {least:.2f} s",
            )  # fmt: skip
        if window < 4:
            many = text.repeat(16, 1)
            with torch.no_grad():
                calls = [lambda m=model, t=many: ours(m, t, 1.0), lambda t=many: theirs(peer, plain, t, 1.0)]
                yield row(f"window {window}, batch 16", *alternate(1, *calls), "16 pictures, unguided")


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{'':24} {'ours':>9} {'peer':>9} {'ratio':>7}")
    for r in rows():
        print(
            f"{r['name']:24} {r['ours']:7.3f} {r['unit']} {r['peer']:7.3f} {r['unit']} {r['ratio']:7.3f}  {r['note']}"
        )


if __name__ == "__main__":
    main()
