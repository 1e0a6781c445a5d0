"""Losses that explode: the guard goes back to a checkpoint, on every rank alike, and the run ends well."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import mean

import lightning as L
import pytest
import torch

from tests.faults.children import run_ranks
from tests.training import tiny
from tokgen.training.autoencoder import AutoencoderLoss
from tokgen.training.base import Schedule, TrainingDiverged
from tokgen.training.checkpoint import LAST, Checkpoint, read_checkpoint
from tokgen.training.ema import EMA
from tokgen.training.end_to_end import EndToEndModule, TuningStage
from tokgen.training.guard import Guard
from tokgen.training.sharding import FullyShardedStrategy

FSQ = {"type": "fsq", "levels": [8, 8, 8, 8]}
TOTAL, HURT = 132, 95  # steps; the checkpoint of step 96 holds weights that were hurt


class Hurt(L.Callback):
    """Multiplies the weights of a part of the module after a step, once; or after every step from there on."""

    def __init__(self, part: str, factor: float, step: int = HURT, again: bool = False) -> None:
        self.part, self.factor, self.step, self.again = part, factor, step, again

    def on_train_batch_end(self, trainer, pl_module, *args):
        if pl_module.step == self.step or (self.again and pl_module.step > self.step):
            with torch.no_grad():
                for p in pl_module.get_submodule(self.part).parameters():
                    p.mul_(self.factor)
            self.step = self.step if self.again else -1


class Kill(L.Callback):
    """Ends the run after a step as a kill does: nothing is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if pl_module.step == self.step:
            trainer.checkpoint_callback.save_on_exception = False
            raise Killed


class Killed(Exception):
    pass


def adam(lr: float):
    return lambda p: torch.optim.AdamW(p, lr=lr, fused=True)


def autoencoder(**settings):
    torch.manual_seed(0)
    defaults = {
        "tokenizer": tiny.tokenizer(FSQ), "disc_start": 24, "disc_train_from": 18, "disc_weight": 0.05,
        "schedule": Schedule(TOTAL, final=0.02), "optimizer": adam(1e-2),
    }  # fmt: skip
    return tiny.autoencoder(**{**defaults, **settings})


def fit(folder, data, module, *callbacks, steps=TOTAL, every=12, start=None, **options):
    """Returns (module, what was logged by step, error that ended it)."""
    record = tiny.Record()
    saver = Checkpoint(every_n_steps=every, every_n_minutes=None, export="none")
    trainer = tiny.trainer(folder, *callbacks, EMA(0.9), record, saver, max_steps=steps, **options)
    ended = None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start)
    except (TrainingDiverged, Killed) as error:
        ended = error
    return module, record.rows, ended


def reconstruction(rows) -> float:
    """The loss over the last epoch, which has 12 batches."""
    return mean([row["train/reconstruction"] for row in rows if "train/reconstruction" in row][-12:])


def ends(*runs) -> list[float]:
    """Reconstruction losses of the run that nothing happened to, the guarded and the ruined one; docs/faults.md quotes them."""
    values = [reconstruction(rows) for rows in runs]
    print("reconstruction at the end: {:.5f} left alone, {:.5f} with the guard, {:.5f} without".format(*values))
    return values


def losses(rows):
    """By step: all that was logged of it but speeds."""
    table = {}
    for row in rows:
        table.setdefault(row["step"], {}).update({k: v for k, v in row.items() if "per_second" not in k})
    return table


def rollbacks(module):
    return next(c for c in module.trainer.callbacks if isinstance(c, Guard)).rollbacks


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "images"
    tiny.write_images(folder / "train", 48, 0)
    tiny.write_images(folder / "val", 10, 1)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, pictures):
    """The folder of the run that all begin with, with checkpoints of steps 84 and 72."""
    folder = tmp_path_factory.mktemp("base") / "run"
    fit(folder, tiny.shards(pictures), autoencoder(), Guard(window=4), steps=84)
    return folder


def go_on(base, folder, pictures, *callbacks, steps=TOTAL):
    """The rest of the run, from a copy of its folder."""
    shutil.copytree(base, folder)
    data, start = tiny.shards(pictures), folder / "checkpoints" / LAST
    return fit(folder, data, autoencoder(seed=7), *callbacks, steps=steps, start=start)


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory, pictures, base):
    """The run to which nothing happens."""
    return go_on(base, tmp_path_factory.mktemp("unhurt") / "run", pictures, Guard(window=4))


@pytest.fixture(scope="module")
def hurt(tmp_path_factory, pictures, base):
    """The run whose discriminator is hurt."""
    callbacks = Guard(window=4), Hurt("discriminator", 1e3)
    return go_on(base, tmp_path_factory.mktemp("hurt") / "run", pictures, *callbacks)


@pytest.mark.slow
def test_a_healthy_run_is_the_same_with_and_without_it(tmp_path, pictures, base, unhurt):
    module, rows, ended = unhurt
    _, others, _ = go_on(base, tmp_path / "run", pictures, steps=108)
    assert ended is None and rollbacks(module) == [] and reconstruction(rows) < 0.04
    table = losses(rows)
    assert losses(others) == {step: table[step] for step in range(85, 109)}


@pytest.mark.slow
def test_a_discriminator_that_explodes_does_not_ruin_the_reconstructions(tmp_path, pictures, base, unhurt, hurt):
    module, rows, ended = hurt
    _, ruined, _ = go_on(base, tmp_path / "run", pictures, Hurt("discriminator", 1e3))
    healthy, guarded, alone = ends(unhurt[1], rows, ruined)
    assert ended is None and module.step == TOTAL
    assert guarded < 1.2 * healthy  # 14 of its steps are lost
    assert alone > 4 * healthy
    # found in the window of 95 to 98; the weights of 96 were dragged along already
    assert rollbacks(module) == [(98, 84)] and module.lr_scales == {1: 0.5}
    (told,) = [row for row in rows if "guard/rollbacks" in row]
    assert told == {"step": 98, "guard/rollbacks": 1, "guard/lr_scale": 1.0, "guard/disc_lr_scale": 0.5}
    assert [row["step"] for row in rows if "train/reconstruction" in row] == list(range(85, TOTAL + 1))
    rate = module.trainer.optimizers[1].param_groups[0]["lr"]
    assert rate == pytest.approx(0.5e-3 * module.schedule.factor(TOTAL - 1))


@pytest.mark.slow
def test_a_tokenizer_that_explodes_comes_back(tmp_path, pictures, base, unhurt):
    hurt = lambda: Hurt("tokenizer.decoder", 3.0)  # noqa: E731
    module, rows, ended = go_on(base, tmp_path / "with", pictures, Guard(window=4), hurt())
    _, ruined, _ = go_on(base, tmp_path / "without", pictures, hurt())
    healthy, guarded, alone = ends(unhurt[1], rows, ruined)
    assert ended is None and rollbacks(module) == [(100, 84)] and module.lr_scales == {0: 0.5}
    assert guarded < 1.35 * healthy  # some of it for the halved rate
    assert alone > 4 * healthy


class AsSaved(L.Callback):
    """Whether weights, EMA and optimizer states are those of the checkpoint, right after a roll-back."""

    def __init__(self) -> None:
        self.seen = []

    def on_record(self, trainer, pl_module, values):
        if "guard/rollbacks" not in values:
            return
        target = rollbacks(pl_module)[-1][1]
        folder = Path(trainer.default_root_dir) / "checkpoints"
        saved = next(c for c in map(read_checkpoint, sorted(folder.glob("*.ckpt"))) if c["global_step"] == target)
        whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
        own = {k: v for k, v in saved["state_dict"].items() if k not in ("train_step", "skipped_steps")}
        state, average = pl_module.state_dict(), next(c for c in trainer.callbacks if isinstance(c, EMA)).average
        self.seen += [torch.equal(whole(state[k]), v) for k, v in own.items()]
        self.seen += [torch.equal(whole(average[k]), v) for k, v in saved["callbacks"]["EMA"]["average"].items()]
        for optimizer, kept in zip(trainer.optimizers, saved["optimizer_states"]):
            moments = [whole(s["exp_avg"]) for s in optimizer.state_dict()["state"].values()]
            self.seen += [torch.equal(a, b["exp_avg"]) for a, b in zip(moments, kept["state"].values(), strict=True)]


@pytest.mark.slow
def test_weights_that_became_nan_are_replaced_and_what_is_restored_is_what_was_saved(tmp_path, pictures):
    module = autoencoder(max_bad_steps=3, tokenizer=tiny.tokenizer(tiny.EMA_VQ), lecam_weight=0.1)
    # the checkpoint of step 36 holds them too
    check, poison = AsSaved(), Hurt("tokenizer.decoder", float("nan"), step=36)
    module, _, ended = fit(tmp_path, tiny.shards(pictures), module, Guard(), poison, check, steps=48)
    assert ended is None and module.step == 48 and module.skipped == 3
    assert rollbacks(module) == [(36, 24)] and module.lr_scales == {0: 0.5}
    assert len(check.seen) > 50 and all(check.seen)
    assert all(bool(torch.isfinite(v.float()).all()) for v in module.state_dict().values())
    assert not any(
        bool(v.isnan().any()) for v in read_checkpoint(tmp_path / "checkpoints" / LAST)["state_dict"].values()
    )


@pytest.mark.slow
def test_killed_after_a_rollback_and_resumed_is_the_run_that_was_not(tmp_path, pictures, base, hurt):
    """Killed before the next checkpoint, so that the trouble comes again, and killed after it."""
    shutil.copytree(base, tmp_path / "run")
    rows: list[dict[str, float]] = []
    for kill in (102, 110, None):
        callbacks = [Guard(window=4), Hurt("discriminator", 1e3), *([Kill(kill)] if kill else [])]
        start = tmp_path / "run" / "checkpoints" / LAST
        module, more, ended = fit(tmp_path / "run", tiny.shards(pictures), autoencoder(seed=7), *callbacks, start=start)
        assert isinstance(ended, Killed) if kill else ended is None
        rows = [row for row in rows if row["step"] < more[0]["step"]] + more
        assert rollbacks(module) == [(98, 84)]
    straight, expected, _ = hurt
    assert {row["step"] for row in rows} == set(range(85, TOTAL + 1))
    assert losses(rows) == losses(expected)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), straight.state_dict().values()))


@pytest.mark.slow
def test_a_discriminator_with_far_too_high_a_learning_rate(tmp_path, pictures):
    """It joins a good tokenizer. Nothing is broken by hand."""

    def module():
        sgd = lambda p: torch.optim.SGD(p, lr=10.0, momentum=0.9)  # noqa: E731
        return autoencoder(
            disc_start=84, disc_train_from=78, disc_norm="group", schedule=Schedule(200, kind="constant"),
            optimizer=adam(5e-3), disc_optimizer=sgd,
        )  # fmt: skip

    _, before, _ = fit(tmp_path / "with", tiny.shards(pictures), module(), Guard(window=4, lr_factor=0.1), steps=72)
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    runs = {}
    for name, guard in (("with", [Guard(window=4, lr_factor=0.1)]), ("without", [])):
        start = tmp_path / name / "checkpoints" / LAST
        runs[name] = fit(tmp_path / name, tiny.shards(pictures), module(), *guard, steps=120, start=start)
    guarded, rows, ended = runs["with"]
    assert ended is None and guarded.step == 120 and guarded.lr_scales.keys() == {1}
    at_first, with_guard, without = ends(before, rows, runs["without"][1])  # "left alone" is before it joined
    assert with_guard < 2 * at_first
    assert without > 8 * at_first


@pytest.mark.slow
def test_trouble_that_does_not_end_ends_the_run(tmp_path, pictures):
    module, poison = autoencoder(max_bad_steps=2), Hurt("tokenizer.decoder", float("nan"), step=30, again=True)
    module, _, ended = fit(tmp_path, tiny.shards(pictures), module, Guard(max_rollbacks=2), poison, steps=60)
    assert isinstance(ended, TrainingDiverged) and "2 roll-backs within" in str(ended)
    assert "0.25 of its setting" in str(ended) and len(rollbacks(module)) == 2
    assert int(read_checkpoint(tmp_path / "checkpoints" / LAST)["global_step"]) == 24  # not what diverged


def test_without_a_checkpoint_of_its_own_a_run_ends_and_says_so(tmp_path, pictures):
    """One that an earlier run has left in the folder is not taken."""
    fit(tmp_path, tiny.shards(pictures), autoencoder(seed=3), Guard(), steps=2)
    kept = (tmp_path / "checkpoints" / LAST).read_bytes()
    module, poison = autoencoder(max_bad_steps=2), Hurt("tokenizer.decoder", float("nan"), step=8)
    _, _, ended = fit(tmp_path, tiny.shards(pictures), module, Guard(), poison, steps=20, every=None)
    assert isinstance(ended, TrainingDiverged)
    assert "no checkpoint" in str(ended) and "every_n_steps" in str(ended)
    assert (tmp_path / "checkpoints" / LAST).read_bytes() == kept


# -- recipes that nothing happens to ----------------------------------------------------------------------------------


def delayed_discriminator(folder):
    loss = {"disc_start": 30, "disc_train_from": 25, "adaptive": True, "lecam_weight": 0.01, "disc_weight": 0.5}
    return tiny.autoencoder(tokenizer=tiny.tokenizer(tiny.EMA_VQ), **loss)


def stages(folder):
    every = [tiny.Stage("contrastive", 20), tiny.Stage("codebook", 20), tiny.Stage("pixels", 20, warmup_steps=3)]
    return tiny.staged("seed", tiny.eyes(folder / "eye"), every)


def warmed_up(folder):
    return tiny.generator(schedule=Schedule(100, warmup_steps=20))


def end_to_end(folder):
    torch.manual_seed(0)
    terms = {"perceptual": "none", "disc_channels": 8, "disc_layers": 1, "disc_start": 35}
    tuning = [TuningStage("alignment", 20, train=("projector", "lm")), TuningStage("semantic", 40)]
    lm = {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16}
    return EndToEndModule(
        tiny.tokenizer({"type": "ibq", "codebook_size": 32}), tuning, lm, tiny.Text(vocab_size=290), max_text=16,
        loss=AutoencoderLoss(**terms), optimizer=adam(1e-3), disc_optimizer=adam(1e-3),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [delayed_discriminator, stages, warmed_up, end_to_end])
def test_a_normal_run_is_left_alone(tmp_path, pictures, recipe):
    """Windows of two steps, which are more easily disturbed than the usual ones."""
    data = tiny.shards(pictures)
    if recipe is warmed_up:
        for split, count in (("train", 48), ("val", 10)):
            tiny.write_codes(tmp_path / "codes" / split, count, 0)
        data = tiny.shards(tmp_path / "codes")
    module, _, ended = fit(tmp_path, data, recipe(tmp_path), Guard(window=2), steps=60, every=None)
    assert ended is None and module.step == 60 and rollbacks(module) == []
    tracks = next(c for c in module.trainer.callbacks if isinstance(c, Guard)).tracks
    assert tracks and all(len(track.history) >= 5 for track in tracks.values())  # it did look


# -- several processes ------------------------------------------------------------------------------------------------


def both_kinds(rank: int, folder: Path) -> None:
    for kind in ("ddp", "fsdp"):
        fit_on_ranks(kind, folder)


def fit_on_ranks(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    check = AsSaved()
    options = {"devices": 2, "steps": 32}
    if kind == "ddp":
        module, data, hurt = (
            autoencoder(disc_start=6, disc_train_from=4, disc_norm="group"),
            tiny.shards(folder / "images"),
            "discriminator",
        )
        options |= {"strategy": "ddp"}
    else:
        module, data, hurt = tiny.generator(), tiny.shards(folder / "codes"), "generator"
        options |= {"strategy": FullyShardedStrategy()}
    callbacks = Guard(window=4), Hurt(hurt, 1e3, step=26), check
    module, rows, ended = fit(folder / kind, data, module, *callbacks, **options)
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in module.state_dict().items()}
    result = {"weights": whole, "rollbacks": rollbacks(module), "scales": module.lr_scales, "as_saved": check.seen}
    name = "train/loss" if kind == "fsdp" else "train/reconstruction"
    result |= {"ended": str(ended), "losses": [row[name] for row in rows if name in row]}
    torch.save(result, folder / f"{kind}-{module.global_rank}.pt")
    torch.distributed.barrier()


@pytest.mark.slow
def test_all_ranks_go_back_together(tmp_path):
    """Copied weights (DDP), and weights that are split among the ranks (FSDP2)."""
    for split, count in (("train", 48), ("val", 10)):
        tiny.write_images(tmp_path / "images" / split, count, 0)
        tiny.write_codes(tmp_path / "codes" / split, count, 0)
    codes, output = run_ranks(both_kinds, tmp_path)
    assert codes == [0, 0], output
    for kind, scales in (("ddp", {1: 0.5}), ("fsdp", {0: 0.5})):
        one, two = (torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert one["ended"] == two["ended"] == "None"
        assert one["rollbacks"] == two["rollbacks"] == [(28, 24)]
        assert one["scales"] == two["scales"] == scales
        assert len(one["as_saved"]) > 20 and all(one["as_saved"]) and all(two["as_saved"])
        assert all(torch.equal(one["weights"][name], value) for name, value in two["weights"].items())
        assert one["losses"] == two["losses"] and len(one["losses"]) == 32
        assert max(one["losses"][-4:]) < 1.5 * max(one["losses"][:5])
