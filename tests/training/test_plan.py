"""A plan agrees with what is measured on real steps of the tiny recipes, and takes no memory for large ones."""

from __future__ import annotations

import io
import resource
from pathlib import Path

import lightning as L
import moving_shapes
import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tokgen
from tokgen.cli import main
from tokgen.commands.plan import parse_layout
from tokgen.data.shards import ShardWriter
from tokgen.errors import ConfigError, TokgenError
from tokgen.training.lightning_cli import TokgenLightningCLI
from tokgen.training.meter import Meter
from tokgen.training.plan import Given, Recipe
from tokgen.training.step_cost import largest_batch, measure

ROOT = Path(__file__).parent.parent.parent
CPU = str(ROOT / "train/cpu.yaml")
FILES = sorted([*ROOT.glob("tokenizers/*.yaml"), *ROOT.glob("generators/*.yaml")])
# a tiny recipe is the code of its large one
RECIPES = [f for f in FILES if not f.stem.endswith("-tiny") or f.with_stem(f.stem.removesuffix("-tiny")) not in FILES]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name folders from there


# ------------------------------------------------------------------------------------------------------- real steps


class Probe(L.Callback):
    """The most bytes of tensors alive in the third step, as the allocator of the CPU saw it."""

    peak = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx != 2:
            return
        kept = [copy for pairs in pl_module._kept.values() for _, copy in pairs]
        states = [
            t for o in trainer.optimizers for s in o.state.values() for t in s.values() if isinstance(t, torch.Tensor)
        ]
        averages = [t for c in trainer.callbacks for t in getattr(c, "average", {}).values()]
        beside = [
            m for name in ("perceptual", "teacher") if isinstance(m := pl_module.__dict__.get(name), torch.nn.Module)
        ]
        networks = [t for m in (pl_module, *beside) for t in (*m.parameters(), *m.buffers())]
        inputs = [t for t in batch.values() if isinstance(t, torch.Tensor)]
        self.before = sum({id(t): t.nbytes for t in [*kept, *states, *averages, *networks, *inputs]}.values())
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx != 2:
            return
        self.profile.__exit__(None, None, None)
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        self.peak = self.before + int(np.cumsum(sizes).max())


class Probed(TokgenLightningCLI):
    def before_fit(self):
        super().before_fit()
        self.probe = Probe()
        self.trainer.callbacks.append(self.probe)


def measured(recipe: str, run: Path, options: list[str]) -> int:
    settings = ["--trainer.max_steps=3", "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"]
    settings += ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--checkpoint.export=none"]
    cli = Probed(["fit", "-c", recipe, "-c", CPU, "--run_dir", str(run), *settings, *options])
    assert cli.model.step == 3
    return cli.probe.peak


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def code_shards(folder: Path) -> Path:
    """Codes of the demo tokenizer, with captions as long as the recipe reads."""
    tokenizer = tokgen.load("assets/demo/tokenizer")
    sizes = tokenizer.codebook_sizes
    meta = {
        "tokenizer": tokenizer.fingerprint,
        "layout": {"kind": "Grid", "h": 8, "w": 8},
        "codebook_sizes": list(sizes),
    }
    rng = np.random.default_rng(0)
    with ShardWriter(folder, kind="codes", meta=meta, max_samples=100) as writer:
        for i in range(24):
            words = " ".join("".join(chr(97 + c) for c in rng.integers(0, 26, 5)) for _ in range(30))
            writer.write(f"{i:03d}", {"npy": npy(rng.integers(0, sizes[0], 64)), "txt": words})
    return folder


def clip_shards(folder: Path) -> Path:
    """Clips of moving shapes with their trajectories."""
    import av

    made = {"source": {"type": "truth", "budget": 32}, "size": 64, "resize": "crop", "grid": [32, 32], "fps": None}
    with ShardWriter(folder, kind="videos", meta={"trajectories": made}, max_samples=100) as writer:
        for i in range(12):
            video, labels = moving_shapes.clip(i, frames=8)
            file = io.BytesIO()
            with av.open(file, "w", format="mp4") as container:
                stream = container.add_stream("mpeg4", rate=8)
                stream.width = stream.height = 64
                stream.pix_fmt = "yuv420p"
                for frame in video:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
            planes = (labels[:, ::2, ::2] + 1).astype(np.uint8)
            writer.write(f"{i:03d}", {"mp4": file.getvalue(), "traj.npy": npy(planes), "txt": "shapes"})
    return folder


CASES = {
    "vqgan-tiny": [
        "--model.init_args.loss.disc_train_from=0",
        "--model.init_args.loss.disc_start=0",
        "--data.batch_size=4",
    ],
    "ibq-tiny": ["--data.batch_size=4"],
    "tokenflow-tiny": ["--data.batch_size=4"],
    "llama-tiny": ["--data.batch_size=4"],
    "trajectory-tiny": ["--data.batch_size=2"],
}


@pytest.mark.parametrize("name", CASES)
def test_planned_memory_is_the_measured_within_fifteen_percent(name, tmp_path):
    options = list(CASES[name])
    recipe = f"generators/{name}.yaml" if name == "llama-tiny" else f"tokenizers/{name}.yaml"
    made = {"llama-tiny": code_shards, "trajectory-tiny": clip_shards}.get(name)
    shards = "assets/demo/shards/val" if made is None else str(made(tmp_path / "shards"))
    options += [f"--data.train={shards}", f"--data.val={shards}", "--data.shuffle_buffer=8"]
    real = measured(recipe, tmp_path / "run", options)
    with Recipe([recipe, CPU], Given(), options) as planned:
        first = planned.stages()[-1][1]
        step = measure(planned, first, planned.batch_size)
    print(f"{name}: planned {step.peak / 1e6:.2f} MB, measured {real / 1e6:.2f} MB, {step.peak / real - 1:+.1%}")
    assert abs(step.peak / real - 1) < 0.15
    assert step.activations > 0


# ------------------------------------------------------------------------------------------------------- known figures


def test_parameters_and_states_are_exact():
    with Recipe(["tokenizers/vqgan.yaml"], Given(batch_size=1)) as recipe:
        rows = {name: (count, trained) for name, count, trained in recipe.parameters()}
        assert sum(count for name, (count, _) in rows.items() if name.startswith("tokenizer.")) == 71_883_403
        assert recipe.tokens()[2] == 256 * 14
        stages = recipe.stages()
        assert [(first, steps) for _, first, steps in stages] == [(0, 20_000), (20_000, 380_000)]
        step = measure(recipe, stages[-1][1], 1)
        total = sum(count for count, _ in rows.values())
        assert step.states == 2 * 4 * total and step.gradients == 4 * total
        assert step.average == 4 * 71_883_403
        assert dict(recipe.parameters_beside())["perceptual"] == 14_714_688  # VGG16's convolutions


def test_flops_are_those_of_the_matrices():
    """A decoder's step is near 6 x parameters x positions, and grows with the batch."""
    layout = {"kind": "Grid", "h": 16, "w": 16}
    with Recipe(["generators/llama.yaml"], Given(layout=layout, codebook_sizes=(16384,))) as recipe:
        small, large = measure(recipe, 0, 1), measure(recipe, 0, 2)
        inside = sum(p.numel() for p in recipe.module.generator.layers.parameters())
    positions = 120 + 1 + 256
    assert 6 * inside * positions < small.flops < 1.25 * 6 * inside * positions
    assert large.flops == pytest.approx(2 * small.flops, rel=1e-3)
    assert small.peak < large.peak


def test_large_recipes_take_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout = {"kind": "Grid", "h": 32, "w": 32}
    given = Given(layout=layout, codebook_sizes=(16384,), text_size=128_256, ranks=64)
    with Recipe(["generators/token-shuffle-512.yaml", "train/fsdp.yaml"], given) as recipe:
        sharded = measure(recipe, 0, 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB; the weights alone are 11 GB
    assert sharded.weights > 2.6e9 * 4 / 64 * 0.9 and sharded.peak < 60e9


def test_ranks_share_or_copy():
    layout = {"kind": "Grid", "h": 8, "w": 8}
    peaks = {}
    for machine in ("gpu", "ddp", "fsdp"):
        given = Given(layout=layout, batch_size=2, ranks=1 if machine == "gpu" else 8)
        with Recipe(["generators/llama-tiny.yaml", f"train/{machine}.yaml"], given) as recipe:
            peaks[machine] = measure(recipe, 0, 2)
    alone, copied, shared = peaks["gpu"], peaks["ddp"], peaks["fsdp"]
    assert copied.peak == alone.peak + alone.gradients
    assert shared.states == alone.states // 8 and shared.peak < copied.peak


def test_the_largest_batch_fits_and_a_larger_one_does_not():
    with Recipe(["tokenizers/ibq-tiny.yaml", CPU], Given()) as recipe:
        budget = measure(recipe, 0, 6).peak
        most = largest_batch(recipe, 0, budget)
        assert most == 6
        assert largest_batch(recipe, 0, 1000) == 0


def test_the_meter_counts_what_lives():
    meter = Meter()
    with meter:
        x = torch.zeros(1000)
        y = x + 1
        del x
        z = y.view(10, 100) @ torch.ones(100, 5)
    assert meter.peak >= 8000 and meter.flops == 2 * 10 * 100 * 5
    del y, z
    assert meter.alive == 0


# --------------------------------------------------------------------------------------------------------- every recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.stem)
def test_every_recipe_is_planned_or_says_what_is_missing(recipe):
    """At its own size, without memory; what needs a folder or a Hub model names it in one line."""
    layout = {"kind": "Grid", "h": 16, "w": 16}
    if "tokenflow" in recipe.stem:
        layout = {"kind": "Scales", "sizes": [1, 2, 4]}
    sizes = (16384,)
    if "t2v" in recipe.stem:
        layout, sizes = {"kind": "Trajectories", "t": 8, "h": 32, "w": 32, "n": 32}, (64, 64, 1000)
    try:
        with Recipe([str(recipe), "train/gpu.yaml"], Given(1, layout, sizes, 30_522)) as planned:
            step = measure(planned, planned.stages()[-1][1], 2)
        assert step.peak > step.weights and step.flops > 0
    except TokgenError as error:
        assert recipe.stem in ("arra-adapt", "arra-lm", "ett", "tokenflow-t2i"), error
        assert "\n" not in str(error)
        named = {
            "arra-adapt": "models/llamagen-t2i",
            "arra-lm": "Qwen3",
            "ett": "Qwen2.5",
            "tokenflow-t2i": "Llama-2-7b",
        }
        assert named[recipe.stem] in str(error)


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_plan(capsys):
    assert main(["plan", "tokenizers/vqgan-tiny.yaml", "-c", CPU, "--gpu", "a100-40", "--batch_size", "2"]) == 0
    said = capsys.readouterr().out
    for words in ("tokens of a sample: 64", "768 bits", "2 samples at a time, 32-true", "A100 40 GB", "700 steps"):
        assert words in said, said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nothing.yaml"], "no configuration file"),
        (["tokenizers/vqgan-tiny.yaml", "--gpu", "abacus"], "expected one of h200"),
        (["tokenizers/vqgan-tiny.yaml", "--utilization", "2"], "share of the peak"),
        (["tokenizers/vqgan-tiny.yaml", "--batch_size", "0"], "at least 1"),
        (["tokenizers/vqgan-tiny.yaml", "--what", "2"], "unknown option --what"),
        (["tokenizers/vqgan-tiny.yaml", "--model.init_args.acumulate", "2"], "acumulate"),
        (["generators/llama.yaml"], "--layout"),
        (["generators/llama.yaml", "--layout", "round"], "no layout"),
    ],
)
def test_mistakes_get_one_line(arguments, words, capsys):
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.strip().count("\n") == 0


def test_layouts_are_read():
    assert parse_layout("16x24") == {"kind": "Grid", "h": 16, "w": 24}
    assert parse_layout("4x16x24") == {"kind": "Grid", "t": 4, "h": 16, "w": 24}
    assert parse_layout("1,2,4") == {"kind": "Scales", "sizes": [1, 2, 4]}
    assert parse_layout('{"kind": "Sequence", "n": 32}')["n"] == 32
    for text in ("", "0x3", "x", "4,2", "[]", '{"kind": "Grid"}'):
        with pytest.raises(ConfigError, match="no layout"):
            parse_layout(text)
