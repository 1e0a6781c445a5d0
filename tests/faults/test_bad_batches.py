"""A batch that is not finite changes nothing, in any module: no weight, buffer, average or optimizer state, and training goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.faults.children import run_ranks
from tests.training import moving_shapes, tiny
from tokgen.training.autoencoder import AutoencoderLoss
from tokgen.training.base import Schedule, TrainingModule
from tokgen.training.contrastive import ContrastiveModule
from tokgen.training.ema import EMA
from tokgen.training.end_to_end import EndToEndModule, TuningStage
from tokgen.training.segmenter import SegmenterModule
from tokgen.training.staged import Stage

torch.set_num_threads(1)  # the tensors are tiny: threads would wait for each other
FIRST, LAST = 4, 7  # of an accumulated step, as batches are counted from 0


def everything(trainer: Any, module: TrainingModule) -> dict[str, Tensor]:
    """All that a training consists of, but for the number of skipped steps, which counts."""
    state = {k: v.detach().clone() for k, v in module.state_dict().items() if k != "skipped_steps"}
    for callback in trainer.callbacks:
        if isinstance(callback, EMA):
            state |= {f"ema.{k}": v.clone() for k, v in callback.average.items()}
            state["ema.updates"] = torch.tensor(callback.updates)
    for n, optimizer in enumerate(trainer.optimizers):
        for i, moments in optimizer.state_dict()["state"].items():
            state |= {f"optimizer{n}.{i}.{k}": v.clone() for k, v in moments.items() if isinstance(v, Tensor)}
    return state


class Poison(tiny.L.Callback):
    """Makes some batches NaN, and keeps the state of the training before each step, with the number of the batch."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.batch = bad, 0
        self.states: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_start(self, trainer, pl_module) -> None:
        backward = pl_module.manual_backward
        pl_module.manual_backward = lambda loss: backward(loss * self.factor)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        bad, self.factor = self.batch in self.bad, 1.0
        if pl_module.between_steps:
            self.states.append((self.batch, everything(trainer, pl_module)))
            assert not any(p.grad is not None and bool(p.grad.any()) for p in pl_module.parameters())
        if bad and "pixels" in batch:
            batch["pixels"] = torch.full(batch["pixels"].shape, math.nan)
        elif bad:  # codes are whole numbers
            self.factor = math.inf
        self.batch += 1

    def on_train_end(self, trainer, pl_module) -> None:
        self.states.append((self.batch, everything(trainer, pl_module)))

    def unchanged(self) -> list[int]:
        """The batches whose steps changed nothing, by the first of each step."""
        pairs = zip(self.states, self.states[1:])
        return [n for (n, a), (_, b) in pairs if a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 48), ("val", 6)):
        tiny.write_images(folder / "images" / split, count, count)
        tiny.write_codes(folder / "codes" / split, count, count)
    tiny.eyes(folder / "eye")
    return folder


def contrastive(folder: Path, **settings: Any) -> ContrastiveModule:
    sizes = {"image_size": 16, "patch": 4, "dim": 32, "n_heads": 2, "hidden": 32, "image_layers": 1, "text_layers": 1}
    return ContrastiveModule({**sizes, "embed_dim": 16, "max_text": 24}, tiny.Text(vocab_size=300), **settings)


def end_to_end(folder: Path, **settings: Any) -> EndToEndModule:
    loss = AutoencoderLoss(perceptual="none", disc_channels=8, disc_layers=1, disc_start=0, lecam_weight=0.1)
    lm = {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16}
    stages = [TuningStage("semantic", 20, alpha=0.25)]
    return EndToEndModule(
        tiny.tokenizer(tiny.EMA_VQ), stages, lm, tiny.Text(vocab_size=290), max_text=16, loss=loss, **settings
    )


def segmenter(folder: Path, **settings: Any) -> SegmenterModule:
    config = {
        "backbone": {"type": "conv", "channels": [32, 32, 64, 64]}, "image_size": 48, "grid": 12, "dim": 64, "heads": 4,
        "hidden": 128, "queries": 8, "frames": 2,
    }  # fmt: skip
    return SegmenterModule(config, schedule=Schedule(100), **settings)


def stage(kind: str, name: str, **changes: Any) -> Any:
    return lambda folder, **settings: tiny.staged(kind, folder / "eye", [Stage(name, 20)], changes, **settings)


def pictures(quantizer: dict[str, Any] | None = None) -> Any:
    return lambda folder, **settings: tiny.autoencoder(
        tokenizer=tiny.tokenizer(quantizer, dropout=0.1), lecam_weight=0.1, adaptive=True, **settings
    )


MODULES = {
    "autoencoder": pictures(), "autoencoder-ema": pictures(tiny.EMA_VQ), "autoencoder-ibq": pictures({"type": "ibq", "codebook_size": 32}),
    "seed-contrastive": stage("seed", "contrastive"), "seed-codebook": stage("seed", "codebook"), "seed-pixels": stage("seed", "pixels"),
    "lavit-features": stage("lavit", "features"), "lavit-codebook": stage("lavit", "codebook"), "lavit-pixels": stage("lavit", "pixels"),
    "contrastive": contrastive, "end-to-end": end_to_end, "segmenter": segmenter,
    "generator": lambda folder, **settings: tiny.generator(**settings),
}  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", MODULES)
def test_a_bad_batch_changes_nothing(folder, tmp_path, name, accumulate):
    """The first batch of all, and of a step in the middle the first or the last batch."""
    torch.manual_seed(0)
    module, poison, ema = MODULES[name](folder, accumulate=accumulate), Poison(0, FIRST, LAST), EMA(0.9)
    if name == "segmenter":
        data = {"train_dataloaders": moving_shapes.loader(0, 24, batch=2, frames=2, size=48, shapes=2)}
    else:
        data = {"datamodule": tiny.shards(folder / ("codes" if name == "generator" else "images"))}
    trainer = tiny.trainer(tmp_path, poison, ema, limit_train_batches=10, max_epochs=1)
    trainer.fit(module, **data)
    bad = [0, FIRST, LAST] if accumulate == 1 else [0, FIRST, LAST - 1]
    assert poison.unchanged() == bad
    steps = 10 // accumulate - 3
    assert (module.step, trainer.global_step, int(module.skipped_steps)) == (steps, steps, 3)
    assert ema.updates == (steps if module.ema_modules else 0)
    assert all(bool(torch.isfinite(v.float()).all()) for v in everything(trainer, module).values())


def rank(number: int, folder: Path) -> None:
    """Rank one's third batch and rank zero's sixth are NaN."""
    module = tiny.autoencoder(tokenizer=tiny.tokenizer(tiny.EMA_VQ), lecam_weight=0.1)
    poison = Poison(2) if number else Poison(5)
    trainer = tiny.trainer(folder, poison, EMA(0.9), devices=2, strategy="ddp", limit_train_batches=8, max_epochs=1)
    trainer.fit(module, tiny.pixels(3, 100))
    assert poison.unchanged() == [2, 5] and (module.step, int(module.skipped_steps)) == (6, 2)
    torch.save(
        {k: v for k, v in everything(trainer, module).items() if "num_batches" not in k}, folder / f"{number}.pt"
    )


@pytest.mark.slow
def test_a_bad_batch_of_one_rank_is_skipped_by_all(tmp_path):
    codes, output = run_ranks(rank, tmp_path)
    assert codes == [0, 0], "\n".join(output)[-4000:]
    one, other = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in range(2))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
