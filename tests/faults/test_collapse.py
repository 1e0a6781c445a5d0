"""A collapsed codebook comes back: with revival nearly all codes are in use again within steps that can be told beforehand."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from tests.training import tiny
from tokgen.training.callbacks import CodebookMonitor

torch.set_num_threads(1)  # the tensors are tiny: threads would wait for each other
CODES, VECTORS = 64, 4 * 16  # codes; vectors of a step
DECAY, BELOW, WINDOW = 0.99, 0.5, 20  # of the counts; half of uniform use; steps between two looks


class Counts(tiny.L.Callback):
    """Codes, their counts and their optimizer's second moments before and after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        codebook = pl_module.tokenizer.quantizer.codebook
        state = {"weight": codebook.weight, "count": codebook.ema_count}
        moments = trainer.optimizers[0].state.get(codebook.weight)
        state |= {"sum": codebook.ema_sum} if moments is None else {"moment": moments["exp_avg_sq"]}
        self.states.append({k: v.detach().clone() for k, v in state.items()})


def train(run, update: str, revive_below: float, steps: int, *callbacks) -> list[float]:
    """Usage in each window of a training on varied pictures that begins with all codes but two far away."""
    quantizer = {"type": "vq", "codebook_size": CODES, "update": update, "decay": DECAY, "revive_below": revive_below}
    module, record = tiny.autoencoder(disc_weight=0.0, tokenizer=tiny.tokenizer(quantizer)), tiny.Record()
    codebook = module.tokenizer.quantizer.codebook
    with torch.no_grad():
        codebook.weight[2:] += 100.0
        if update == "ema":
            codebook.ema_sum.copy_(codebook.weight * codebook.start_count)
    monitor, options = CodebookMonitor(WINDOW), {"max_steps": steps, "log_every_n_steps": 1000}
    tiny.trainer(run, record, monitor, *callbacks, **options).fit(module, tiny.pixels(VECTORS // 16, 256))
    return record.column("codebook/usage")


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_revival_brings_a_collapsed_codebook_back(tmp_path, caplog, update):
    caplog.set_level(logging.WARNING, "tokgen")
    counts = Counts()
    due = (
        math.ceil(math.log(BELOW) / math.log(DECAY)) + 1
    )  # unused steps until a count has fallen from 1 below the limit
    usage = train(tmp_path, update, BELOW, 80, counts)
    assert all(u < 0.05 for u in usage[: due // WINDOW]) and usage[-1] >= 0.95, usage
    assert caplog.text.count("collapsing") == due // WINDOW  # as long as it lasts

    before, after = counts.states[due - 2], counts.states[due - 1]
    far = before["weight"].abs().amax(1) > 50
    assert far.sum() == CODES - 2 and not bool((after["weight"].abs().amax(1) > 50).any())  # in one step
    assert bool((before["count"][far] < BELOW).all())
    assert bool((after["count"][far] >= DECAY).all())  # they started again at 1, and this step's vectors came in
    if update == "ema":  # no weight of the old place is left in the sums
        assert float((after["sum"] / after["count"][:, None]).abs().max()) < 10
    else:  # as documented, the optimizer's moments stay: those of a code that was never used are 0
        assert not bool(before["moment"][far].any())


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_without_revival_it_stays_collapsed(tmp_path, update):
    usage = train(tmp_path, update, 0.0, 80)
    assert len(usage) == 4 and max(usage) < 0.05
