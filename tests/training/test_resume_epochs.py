"""Where one epoch ends and the next begins: whenever a checkpoint was written, the run goes on as if it had not stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import tiny
import torch

from tokgen.training.base import Schedule
from tokgen.training.captions import Text
from tokgen.training.checkpoint import LAST, Checkpoint
from tokgen.training.contrastive import ContrastiveModule
from tokgen.training.lightning_cli import JsonLinesLogger

SIZES = {
    "image_size": 16, "patch": 8, "dim": 16, "n_heads": 1, "hidden": 16, "image_layers": 1, "text_layers": 1, "embed_dim": 8, "max_text": 8,
}  # fmt: skip
TOTAL = 16  # batches; seven are an epoch


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    tiny.write_images(folder / "train", 28, 0)
    tiny.write_images(folder / "val", 8, 1)
    return folder


class Watch(L.Callback):
    """Keys and places of the training batches, steps of the validations; a copy of `last.ckpt` before the next batch."""

    def __init__(self, copies: Path | None = None, interrupt_at: int = 0) -> None:
        self.batches, self.validations = [], []
        self.copies, self.interrupt_at = copies, interrupt_at

    def on_train_batch_start(self, trainer, module, batch, index):
        if (
            self.copies
            and module.step
            and module.between_steps
            and trainer.checkpoint_callback.saved_step == module.step
        ):
            shutil.copy(
                Path(trainer.default_root_dir) / "checkpoints" / LAST, self.copies / f"{len(self.batches)}.ckpt"
            )
        self.batches.append((trainer.current_epoch, index, *batch["key"]))

    def on_train_batch_end(self, trainer, module, *args):
        if len(self.batches) == self.interrupt_at:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer, module):
        self.validations.append(module.step)


def fit(images, run, watch, total=TOTAL, start=None, data=None, save=None, accumulate=1, logger=False, **options):
    torch.manual_seed(0 if start is None else 1)
    module = ContrastiveModule(
        config=SIZES, text=Text(vocab_size=300), schedule=Schedule(100, kind="constant"), noise=0.05, accumulate=accumulate,
        optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3, fused=True),
    )  # fmt: skip
    shards = tiny.ShardsDataModule(
        train=str(images / "train"),
        val=str(images / "val"),
        batch_size=4,
        image_size=16,
        random_flip=True,
        **(data or {}),
    )
    checkpoint = Checkpoint(every_n_steps=save, every_n_minutes=None, export="none")
    options = {"max_steps": total // accumulate, **options}
    trainer = tiny.trainer(run, checkpoint, watch, logger=logger, **options)
    trainer.fit(module, datamodule=shards, ckpt_path=start)
    return module, checkpoint


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


# What a run is made of; the batches after which it is resumed, with the last checkpoint written at the end of a batch as by a
# run that was killed later, and with the one written at the end of training.
CASES = {
    "plain": ({}, (6, 7, 8), (6, 7, 8, 14)),
    "workers": ({"data": {"num_workers": 2}}, (7,), (7,)),
    "steps": ({"data": {"steps_per_epoch": 6}}, (6,), (6, 12)),
    "accumulate": ({"limit_train_batches": 6, "accumulate": 2}, (6, 12), (6, 12)),
    "part": ({"limit_train_batches": 0.6}, (4,), (4, 7)),  # epochs of four batches, and of the three that are left
    "epochs": ({"max_steps": -1, "max_epochs": 2}, (6, 7), ()),
}


@pytest.mark.parametrize("case", CASES)
def test_batches_and_weights_are_those_of_the_run_that_did_not_stop(images, tmp_path, case):
    options, killed, ended = CASES[case]
    (tmp_path / "copies").mkdir()
    whole = Watch(tmp_path / "copies")
    expected, _ = fit(images, tmp_path / "whole", whole, save=1, **options)
    assert len({batch[2:] for batch in whole.batches}) == len(whole.batches) >= 14
    starts = [(batch, tmp_path / "copies" / f"{batch}.ckpt") for batch in killed]
    for batch in ended:
        fit(images, tmp_path / f"{batch}", Watch(), total=batch, **options)
        starts.append((batch, tmp_path / f"{batch}" / "checkpoints" / LAST))
    for batch, start in starts:
        rest = Watch()
        module, _ = fit(images, tmp_path / "rest", rest, start=start, **options)
        assert [b[2:] for b in rest.batches] == [b[2:] for b in whole.batches[batch:]], start
        assert case == "part" or rest.batches == whole.batches[batch:], start  # Lightning's own count of epochs too
        assert same_weights(module, expected), start


@pytest.mark.parametrize("every", [7, 8])
def test_a_validation_that_was_due_is_made_up_for_once(images, tmp_path, every):
    (tmp_path / "copies").mkdir()
    whole, run = Watch(tmp_path / "copies"), tmp_path / "run"
    options = {"val_check_interval": every}
    expected, kept = fit(images, run, whole, save=every, logger=JsonLinesLogger(run), **options)
    assert whole.validations == [every, 2 * every]
    lines = (run / "metrics.jsonl").read_text()

    # killed after the validation, resumed from the checkpoint before it
    rest, start = Watch(), tmp_path / "copies" / f"{every}.ckpt"
    module, again = fit(images, run, rest, start=start, logger=JsonLinesLogger(run, every), **options)
    assert rest.validations == whole.validations and rest.batches == whole.batches[every:]
    assert same_weights(module, expected) and again.best_score == kept.best_score
    for old, new in zip(lines.splitlines(), (run / "metrics.jsonl").read_text().splitlines(), strict=True):
        old, new = json.loads(old), json.loads(new)
        assert {k: v for k, v in old.items() if "per_second" not in k} == {
            k: v for k, v in new.items() if "per_second" not in k
        }

    # ended with the validation, which the last checkpoint knows
    fit(images, tmp_path / "ended", Watch(), total=every, **options)
    rest = Watch()
    fit(images, tmp_path / "ended", rest, start=tmp_path / "ended" / "checkpoints" / LAST, **options)
    assert rest.validations == [2 * every] and rest.batches == whole.batches[every:]

    # interrupted between the two
    with pytest.raises(SystemExit):
        fit(images, tmp_path / "cut", Watch(interrupt_at=every), **options)
    rest = Watch()
    fit(images, tmp_path / "cut", rest, start=tmp_path / "cut" / "checkpoints" / LAST, **options)
    assert rest.validations == whole.validations and rest.batches == whole.batches[every:]
