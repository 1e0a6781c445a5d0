"""A step is one update of the tokenizer: what counts them, what follows them, what a bad one leaves behind."""

from __future__ import annotations

import itertools
import math

import pytest
import tiny
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer

from tokgen.errors import ConfigError
from tokgen.quantizers.base import Quantizer
from tokgen.training.base import Schedule, TrainingDiverged, count_only
from tokgen.training.ema import EMA


def run(module, loader, tmp_path, *callbacks, **options):
    trainer = tiny.trainer(tmp_path, *callbacks, **options)
    trainer.fit(module, loader)
    return trainer


def test_global_step_counts_batches_with_two_optimizers(tmp_path):
    module = tiny.autoencoder()
    trainer = run(module, tiny.pixels(), tmp_path, max_epochs=1)
    assert trainer.global_step == module.step == int(module.train_step) == 16
    assert trainer.optimizers[1].state  # the discriminator did step


def test_lightning_still_hooks_its_step_counter_where_we_unhook_it(tmp_path):
    """Without `count_only` both optimizers count; if that changes, `count_only` no longer does what it says."""
    module = tiny.autoencoder()
    import tokgen.training.base as base

    kept, base.count_only = base.count_only, lambda others: None
    try:
        trainer = run(module, tiny.pixels(), tmp_path, max_epochs=1)
    finally:
        base.count_only = kept
    assert trainer.global_step == 32 and module.step == 16
    optimizer = LightningOptimizer(torch.optim.SGD(module.parameters(), 0.1))
    assert {"_on_before_step", "_on_after_step"} <= vars(optimizer).keys()
    count_only([optimizer])


def test_max_steps_are_steps_of_the_tokenizer(tmp_path):
    module = tiny.autoencoder(accumulate=2)
    trainer = run(module, tiny.pixels(), tmp_path, max_steps=5)
    assert (trainer.global_step, module.step) == (5, 5)
    assert trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 10


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ema_updates_once_per_step_and_equals_the_formula(tmp_path, accumulate):
    module, ema = tiny.autoencoder(accumulate=accumulate, tokenizer=tiny.tokenizer(tiny.EMA_VQ)), EMA(0.9)
    name = "tokenizer.decoder.conv_out.weight"
    track = [module.get_parameter(name).detach().clone()]

    class Track(tiny.L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if pl_module.between_steps:
                track.append(pl_module.get_parameter(name).detach().clone())

    run(module, tiny.pixels(), tmp_path, ema, Track(), max_epochs=1)
    steps = 16 // accumulate
    assert ema.updates == module.step == steps == len(track) - 1
    expected = track[0]
    for n, weight in enumerate(track[1:], 1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(ema.average[name], expected)


def test_ema_leaves_buffers_and_restores_the_weights(tmp_path):
    module, ema = tiny.autoencoder(tokenizer=tiny.tokenizer(tiny.EMA_VQ)), EMA(0.9)
    run(module, tiny.pixels(), tmp_path, ema, max_epochs=1)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    buffers = {f"tokenizer.{k}" for k, _ in module.tokenizer.named_buffers()} & before.keys()
    assert buffers and not buffers & ema.average.keys()
    integers = [k for k in buffers if not before[k].is_floating_point()]
    assert integers and any(int(before[k].sum()) for k in integers)  # a counter, in use
    with ema.applied(module):
        inside = module.state_dict()
        assert all(torch.equal(inside[k], before[k]) for k in buffers)
        assert any(not torch.equal(inside[k], before[k]) for k in ema.average)
        assert not any(k.startswith("discriminator") for k in ema.average)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_the_discriminator_trains_before_it_is_used(tmp_path):
    record = tiny.Record()
    module = tiny.autoencoder(disc_start=8, disc_train_from=5, adaptive=True, lecam_weight=0.1)
    first = module.discriminator.main[0].weight.detach().clone()
    still = []

    class Watch(tiny.L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            still.append(torch.equal(first, pl_module.discriminator.main[0].weight))

    run(module, tiny.pixels(), tmp_path, record, Watch(), max_epochs=1)
    assert still == [True] * 5 + [False] * 11
    assert [row["step"] for row in record.rows if "train/disc" in row] == list(range(6, 17))
    assert [row["step"] for row in record.rows if "train/adversarial" in row] == list(range(9, 17))
    statistics = module.discriminator.main[3].num_batches_tracked
    assert int(statistics) == 11 * 2 + 8  # real and fake of its own steps, fake of the tokenizer's


def test_without_weight_there_is_no_discriminator(tmp_path):
    module = tiny.autoencoder(disc_weight=0.0)
    trainer = run(module, tiny.pixels(), tmp_path, max_steps=2)
    assert module.discriminator is None and len(trainer.optimizers) == 1
    assert not any(k.startswith("discriminator") for k in module.state_dict())


def test_the_adaptive_weight_is_clamped(tmp_path):
    record = tiny.Record()
    module = tiny.autoencoder(adaptive=True, adaptive_max=0.25, reconstruction_weight=1e4)
    run(module, tiny.pixels(), tmp_path, record, max_steps=3)
    assert record.column("train/adaptive_weight") == [0.25] * 3


def test_the_surrogate_has_the_gradient_of_the_summed_loss():
    """Differentiating at the picture and going back once equals backward of the written-out loss."""
    module = tiny.autoencoder(disc_weight=0.7, reconstruction="l1", reconstruction_weight=2.0)
    x = torch.rand(4, 3, 16, 16)
    module.generator_terms(x, {"pixels": x}, disc_speaks=True)[-1].backward()
    got = {k: p.grad.clone() for k, p in module.tokenizer.named_parameters()}
    module.zero_grad()
    output = module.tokenizer(x)
    loss = (
        2.0 * (output.reconstruction - x).abs().mean()
        - 0.7 * module.discriminator(output.reconstruction * 2 - 1).mean()
        + sum(output.losses.values())
    )
    loss.backward()
    for name, parameter in module.tokenizer.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_accumulating_equals_one_large_batch(tmp_path):
    """SGD, no BatchNorm, no statistics of the batch in the quantizer: 4 x 2 and 1 x 8 are the same steps."""
    weights = []
    for batch, accumulate in ((8, 1), (2, 4)):
        sgd = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
        module = tiny.autoencoder(
            accumulate=accumulate, disc_norm="group", optimizer=sgd, disc_optimizer=sgd, clip=0.5, adaptive=False
        )
        run(module, tiny.pixels(batch), tmp_path, max_epochs=1)
        assert module.step == 8
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_update_and_logs_the_norm_before_it(tmp_path):
    record = tiny.Record()
    sgd = lambda p: torch.optim.SGD(p, lr=1.0)  # noqa: E731
    module = tiny.autoencoder(disc_weight=0.0, clip=0.01, reconstruction_weight=100.0, optimizer=sgd)
    before = torch.cat([p.detach().flatten() for p in module.tokenizer.parameters()])
    run(module, tiny.pixels(), tmp_path, record, max_steps=1)
    after = torch.cat([p.detach().flatten() for p in module.tokenizer.parameters()])
    assert record.column("train/grad_norm")[0] > 1
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("quantizer", [None, tiny.EMA_VQ], ids=["gradient", "ema"])
def test_a_nan_batch_is_skipped_and_leaves_no_trace(tmp_path, accumulate, quantizer):
    module = tiny.autoencoder(accumulate=accumulate, tokenizer=tiny.tokenizer(quantizer), lecam_weight=0.1)
    states = []

    class Watch(tiny.L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if pl_module.between_steps:
                state = {k: v.clone() for k, v in pl_module.state_dict().items() if k != "skipped_steps"}
                states.append((pl_module.step, state))

    trainer = run(module, tiny.pixels(bad=(9, 26)), tmp_path, Watch(), max_epochs=1)
    total = 16 // accumulate
    assert (int(module.skipped_steps), module.step, trainer.global_step) == (2, total - 2, total - 2)
    for value in module.state_dict().values():
        assert bool(torch.isfinite(value.float()).all())
    same = [all(torch.equal(a[1][k], b[1][k]) for k in a[1]) for a, b in itertools.pairwise(states)]
    assert same.count(True) == 2  # the two skipped ones changed nothing, buffers and codebook included


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    module = tiny.autoencoder(max_bad_steps=3)
    bad = tuple(range(12, 40))
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        run(module, tiny.pixels(bad=bad), tmp_path, max_epochs=1)
    assert module.step == 3 and all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_a_nan_of_the_discriminator_alone_is_skipped(tmp_path):
    module = tiny.autoencoder(disc_start=100, disc_train_from=0)
    module.discriminator.main[0].weight.register_hook(lambda g: g * math.nan if module.step == 4 else g)
    run(module, tiny.pixels(), tmp_path, max_epochs=1)
    assert (module.step, int(module.skipped_steps)) == (16, 1)
    assert all(bool(torch.isfinite(v.float()).all()) for v in module.state_dict().values())


def test_bf16_trains(tmp_path):
    record = tiny.Record()
    module = tiny.autoencoder(adaptive=True, lecam_weight=0.1)
    run(module, tiny.pixels(), tmp_path, record, max_steps=3, precision="bf16-mixed")
    assert module.step == 3 and all(math.isfinite(v) for v in record.column("train/adaptive_weight"))
    assert next(module.parameters()).dtype == torch.float32


@pytest.mark.parametrize("option", [{"precision": "16-mixed"}, {"precision": "bf16-true"}])
def test_unsupported_precision_is_refused(tmp_path, option):
    if option["precision"] == "16-mixed":
        trainer = tiny.trainer(tmp_path, max_steps=1)
        trainer.strategy.precision_plugin.precision = "16-mixed"  # Lightning falls back to bf16 by itself on a CPU
    else:
        trainer = tiny.trainer(tmp_path, max_steps=1, **option)
    with pytest.raises(ConfigError, match="bf16-mixed"):
        trainer.fit(tiny.autoencoder(), tiny.pixels())


def test_schedule():
    schedule = Schedule(total_steps=100, warmup_steps=10, kind="cosine", final=0.1)
    assert schedule.factor(0) == pytest.approx(0.1) and schedule.factor(9) == 1.0 and schedule.factor(10) == 1.0
    assert schedule.factor(55) == pytest.approx(0.55) and schedule.factor(100) == pytest.approx(0.1)
    assert schedule.factor(10_000) == pytest.approx(0.1)
    assert Schedule(100, kind="constant").factor(99) == 1.0
    assert Schedule(100, kind="linear", final=0.0).factor(50) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="warmup_steps"):
        Schedule(total_steps=10, warmup_steps=20)


def test_learning_rate_follows_the_schedule(tmp_path):
    record, seen = tiny.Record(), []
    module = tiny.autoencoder(schedule=Schedule(8, warmup_steps=4))

    class Watch(tiny.L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append([o.param_groups[0]["lr"] for o in trainer.optimizers])

    run(module, tiny.pixels(), tmp_path, record, Watch(), max_steps=8)
    expected = [1e-3 * module.schedule.factor(n) for n in range(8)]
    assert record.column("train/lr") == pytest.approx(expected)
    assert seen == [pytest.approx([lr, lr]) for lr in expected]


def test_validation_counts_valid_rows_only(tmp_path):
    module = tiny.autoencoder(disc_weight=0.0)
    batch = next(iter(tiny.pixels(6)))
    valid = torch.tensor([True, True, True, False, True, False])
    module.eval()
    trainer = tiny.trainer(tmp_path, limit_val_batches=1)
    results = {}
    for name, rows in (("flagged", {**batch, "valid": valid}), ("cut", {"pixels": batch["pixels"][valid]})):
        trainer.validate(module, torch.utils.data.DataLoader([rows], batch_size=None), verbose=False)
        results[name] = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert results["flagged"] == pytest.approx(results["cut"])
    with torch.no_grad():
        x = batch["pixels"][valid].float() / 255
        out = module.tokenizer(x)
    psnr = -10 * (out.reconstruction - x).square().mean((1, 2, 3)).log10()
    assert results["cut"]["val/psnr"] == pytest.approx(float(psnr.mean()), rel=1e-5)
    assert results["cut"]["val/usage"] == pytest.approx(len(out.tokens.ids.unique()) / tiny.CODES)


def test_codebooks_and_norms_are_not_decayed():
    module = tiny.autoencoder()
    *decayed, others = module.configure_optimizers()[0].param_groups
    assert all(g["weight_decay"] > 0 for g in decayed) and others["weight_decay"] == 0
    codebooks = {id(p) for m in module.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    assert codebooks and codebooks <= {id(p) for p in others["params"]}
    assert sum(len(g["params"]) for g in (*decayed, others)) == len(list(module.tokenizer.parameters()))
