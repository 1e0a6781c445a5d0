"""Training in stages: each trains its own parts from a fresh start, and a run that breaks off goes on as if it had not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import ranks
import tiny
import torch

import tokgen
from tokgen.data.datamodule import ShardsDataModule
from tokgen.encoders.base import build_encoder
from tokgen.errors import CheckpointError, ConfigError
from tokgen.precompute import feature_shards
from tokgen.text import TextTokenizer
from tokgen.tokenizers.semantic import parameters_of
from tokgen.training.base import Schedule
from tokgen.training.callbacks import CodebookMonitor, ImageGrid
from tokgen.training.checkpoint import Checkpoint, read_checkpoint
from tokgen.training.ema import EMA
from tokgen.training.muon import MuonAdamW
from tokgen.training.staged import Stage, StagedSchedule

FIRST = {"seed": "contrastive", "lavit": "features"}


@pytest.fixture(scope="module")
def eye(tmp_path_factory) -> Path:
    return tiny.eyes(tmp_path_factory.mktemp("eye") / "eye")


def stages(kind: str, *steps: int, **options) -> list[Stage]:
    return [Stage(name, n, **options) for name, n in zip((FIRST[kind], "codebook", "pixels"), steps)]


def fit(run: Path, module, images, *callbacks, ckpt_path=None, data=None, **options) -> tiny.Record:
    record = tiny.Record()
    trainer = tiny.trainer(run, *callbacks, record, **{"max_steps": module.schedule.total_steps, **options})
    trainer.fit(module, datamodule=data or tiny.shards(images), ckpt_path=ckpt_path)
    record.trainer = trainer
    return record


class Each(tiny.L.Callback):
    """Calls a function after each batch."""

    def __init__(self, call) -> None:
        self.call = call

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.call(trainer, pl_module)


class KilledError(Exception):
    pass


def kill_after(step: int) -> Each:
    """Raises in the step after, before its checkpoint."""

    def call(trainer, module) -> None:
        if module.step == step + 1:
            raise KilledError

    return Each(call)


def rows(record: tiny.Record) -> list[dict[str, str]]:
    """Every logged figure, to the bit."""
    return [{k: float(v).hex() for k, v in row.items() if k != "train/samples_per_second"} for row in record.rows]


# -- what a stage trains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seed", "lavit"])
def test_a_stage_trains_its_modules_and_nothing_else(tmp_path, image_shards, eye, kind):
    """After each stage of two steps, all that it trains has moved, and all else is what it was, to the bit."""
    module = tiny.staged(kind, eye, stages(kind, 2, 2, 2))
    tokenizer = module.tokenizer
    names = {id(p): name for name, p in tokenizer.named_parameters()}
    before = {k: v.clone() for k, v in tokenizer.state_dict().items()}
    moved = []

    def look(trainer, pl_module) -> None:
        if pl_module.step % 2 == 0:
            now = tokenizer.state_dict()
            moved.append({k for k in now if not torch.equal(now[k], before[k])})
            before.update({k: v.clone() for k, v in now.items()})

    fit(tmp_path, module, image_shards, Each(look))
    for name, changed in zip(tokenizer.stages, moved, strict=True):
        trained = tokenizer.stage_modules(name)
        parameters = {names[id(p)] for p in parameters_of(trained)}
        own = {id(b) for m in trained if isinstance(m, torch.nn.Module) for b in m.buffers()}
        buffers = {k for k, b in tokenizer.named_buffers() if id(b) in own}
        assert parameters <= changed, f"{name} leaves {sorted(parameters - changed)}"
        assert changed <= parameters | buffers, f"{name} also changes {sorted(changed - parameters - buffers)}"
    assert not any(k.startswith("encoder.") for k in set().union(*moved))


def test_what_is_frozen_stays_in_weights_and_averages(tmp_path, image_shards, eye):
    """Selector and EMA codebook frozen while merger and decoder go on learning through them."""
    module = tiny.staged("lavit", eye, [Stage("codebook", 4, freeze=("selector", "quantizer"))])
    module.tokenizer.quantizer.codebook.started.fill_(True)
    before = {k: v.clone() for k, v in module.tokenizer.state_dict().items()}
    fit(tmp_path, module, image_shards)
    changed = {k.split(".")[0] for k, v in module.tokenizer.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"merger", "bottleneck", "decoder"}
    with pytest.raises(ConfigError, match=r"freeze names 'seletor', which is none of .*selector"):
        tiny.staged("lavit", eye, [Stage("codebook", 4, freeze=("seletor",))])
    with pytest.raises(ConfigError, match="stage pixels trains nothing"):
        tiny.staged("lavit", eye, [Stage("pixels", 4, freeze=("pixel_decoder",))])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stage_starts_with_a_fresh_optimizer(tmp_path, image_shards, eye, optimizer):
    """Moments belong to parameters of the current stage and count its steps; the optimizer takes a stage's first step as it
    would take its first ever."""
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "muon": lambda p: MuonAdamW(p, lr=1e-3, muon_lr=0.01),
    }[optimizer]
    twice = [Stage("features", 3, kind="constant"), Stage("features", 3, kind="constant")]
    module = tiny.staged("lavit", eye, [*twice, Stage("pixels", 2)], optimizer=make)
    seen = []

    def look(trainer, pl_module) -> None:
        state = trainer.optimizers[0].state
        index = pl_module.schedule.at(pl_module.step - 1)[0]
        assert set(state) == set(module.trained[index])
        seen.append({float(s["step"]) for s in state.values() if "step" in s})

    fit(tmp_path, module, image_shards, Each(look))
    assert seen == [{1.0}, {2.0}, {3.0}, {1.0}, {2.0}, {3.0}, {1.0}, {2.0}]


def test_schedules_follow_each_other(tmp_path, image_shards, eye):
    parts = [
        Stage("contrastive", 4, lr=0.5, warmup_steps=2, final=0.2),
        Stage("codebook", 3, lr=2.0, kind="linear", final=0.0),
        Stage("pixels", 2, kind="constant"),
    ]
    record = fit(tmp_path, tiny.staged("seed", eye, parts), image_shards)
    cosine = Schedule(4, 2, "cosine", 0.2)
    expected = [0.5 * cosine.factor(i) for i in range(4)] + [2.0, 2 * 2 / 3, 2 * 1 / 3] + [1.0, 1.0]
    assert expected[:3] == [0.25, 0.5, 0.5]
    assert record.column("train/lr") == pytest.approx([1e-3 * f for f in expected])
    assert record.column("train/stage") == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    schedule = StagedSchedule(parts)
    assert (schedule.total_steps, schedule.at(6), schedule.at(9), schedule.at(50)) == (9, (1, 2), (2, 2), (2, 2))
    for wrong, message in (([], "stages is empty"), ([Stage("pixels", 0)], "stage pixels: steps 0 must be at least 1"), ([Stage("pixels", 2, warmup_steps=3)], "stage pixels: .*warmup_steps 3")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            StagedSchedule(wrong)


def test_accumulation_takes_whole_steps_within_a_stage(tmp_path, image_shards, eye):
    """Two batches of 4 a step are one batch of 8, over a boundary between stages, where no loss looks across the batch."""
    one, two = (tiny.staged("lavit", eye, stages("lavit", 1, 1, 2)[2:], accumulate=n, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)) for n in (1, 2))  # fmt: skip
    whole = ShardsDataModule(train=str(image_shards / "train"), batch_size=8, image_size=tiny.SIZE, shuffle_buffer=0)
    halves = ShardsDataModule(train=str(image_shards / "train"), batch_size=4, image_size=tiny.SIZE, shuffle_buffer=0)
    fit(tmp_path, one, image_shards, data=whole)
    fit(tmp_path, two, image_shards, data=halves)
    assert one.step == two.step == 2
    for name, value in one.tokenizer.state_dict().items():
        torch.testing.assert_close(two.tokenizer.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_learning_lowers_the_loss_of_a_stage(tmp_path, image_shards, eye):
    adamw = lambda p: torch.optim.AdamW(p, lr=3e-3)  # noqa: E731
    module = tiny.staged("seed", eye, stages("seed", 0, 60, 60, final=1.0)[1:], optimizer=adamw)
    record = fit(tmp_path, module, image_shards)
    for name in ("target", "sequence", "reconstruction"):
        losses = record.column(f"train/{name}")
        assert len(losses) == 60
        assert sum(losses[-8:]) < 0.95 * sum(losses[:8]), name


# -- breaking off and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seed", "lavit"])
def test_killed_anywhere_equals_uninterrupted_bit_for_bit(tmp_path, image_shards, eye, kind):
    """Killed within a stage, exactly between two, and again; dropout, Gumbel noise, EMA codebook with k-means, Muon, a
    learned vocabulary, an epoch's end (12 batches) on the way: weights, optimizer and figures are the same."""

    def module():
        return tiny.staged(kind, eye, stages(kind, 5, 5, 5, warmup_steps=2), optimizer=lambda p: MuonAdamW(p, lr=1e-3))

    options = {"val_check_interval": 4}
    straight = fit(tmp_path / "straight", module(), image_shards, Checkpoint(every_n_steps=1), **options)
    run, found = tmp_path / "killed", []
    for stop in (3, 5, 10, 13, None):
        last = run / "checkpoints" / "last.ckpt"
        trained, record = module(), tiny.Record()
        callbacks = [Checkpoint(every_n_steps=1, save_on_exception=False), record]
        trainer = tiny.trainer(run, *callbacks, *([kill_after(stop)] if stop else []), max_steps=15, **options)
        if stop is None:
            trainer.fit(trained, datamodule=tiny.shards(image_shards), ckpt_path=last)
        else:
            with pytest.raises(KilledError):
                trainer.fit(trained, datamodule=tiny.shards(image_shards), ckpt_path=last if found else None)
            assert read_checkpoint(last)["global_step"] == stop
        record.rows = [row for row in record.rows if row["step"] <= (stop or 15)]
        found += rows(record)
    assert [row["step"] for row in found if "train/lr" in row] == [float(i).hex() for i in range(1, 16)]
    assert found == rows(straight)
    one, other = (read_checkpoint(r / "checkpoints" / "last.ckpt") for r in (tmp_path / "straight", run))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    states = [c["optimizer_states"][0] for c in (one, other)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1]["state"][index][name])), (index, name)
    published = [tokgen.load(r / "tokenizer") for r in (tmp_path / "straight", run)]
    assert published[0].fingerprint == published[1].fingerprint


def test_a_resumed_run_reads_captions_as_before(tmp_path, image_shards, eye):
    """The vocabulary comes from the checkpoint, not from what the shards would give now."""
    fit(tmp_path, tiny.staged("seed", eye, stages("seed", 4)), image_shards, Checkpoint(every_n_steps=2), max_steps=2)
    other = tmp_path / "images"
    tiny.write_images(other / "train", 12, 3)
    tiny.write_images(other / "val", 4, 4)
    module = tiny.staged("seed", eye, stages("seed", 4), text=tiny.Text(vocab_size=262))
    fit(tmp_path, module, other, Checkpoint(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    first = TextTokenizer.load(tmp_path / "tokenizer")
    assert first.vocab_size > 262
    assert first.encode(["square 3, flat style"], 12)[0].tolist() == module.tokenizer.text.encode(["square 3, flat style"], 12)[0].tolist()  # fmt: skip


# -- settings ------------------------------------------------------------------------------------------------------------


def test_teachers_missing_or_superfluous_are_named(tmp_path, eye):
    with pytest.raises(ConfigError, match="seed learns from 'image_embedding', and teachers names none") as error:
        tiny.staged("seed", eye, stages("seed", 1, 1, 1), teachers={})
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no stage of seed learns from a teacher 'image_embedding'"):
        tiny.staged("seed", eye, stages("seed", 1), teachers={"image_embedding": str(eye)})
    with pytest.raises(ConfigError, match="no stage of lavit learns from a teacher 'text_states'"):
        tiny.staged("lavit", eye, stages("lavit", 1, 1, 1), teachers={"text_states": str(eye)})
    with pytest.raises(CheckpointError, match="nowhere"):
        tiny.staged("seed", eye, stages("seed", 1, 1), teachers={"image_embedding": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match="no stage 'reading'; expected one of contrastive, codebook, pixels"):
        tiny.staged("seed", eye, [Stage("reading", 1)])


def test_pictures_of_another_size_are_said(tmp_path, image_shards, eye):
    data = ShardsDataModule(train=str(image_shards / "train"), batch_size=4, image_size=12)
    with pytest.raises(ConfigError, match=r"data\.image_size is 12, and the tokenizer takes pictures of 16 x 16"):
        fit(tmp_path, tiny.staged("lavit", eye, stages("lavit", 1)), image_shards, data=data)


def test_a_published_tokenizer_is_trained_on(tmp_path, image_shards, eye):
    """A second run takes the weights and the vocabulary of the first, and leaves alone what its stages do not train."""
    fit(tmp_path / "one", tiny.staged("seed", eye, stages("seed", 3)), image_shards, Checkpoint())
    before = tokgen.load(tmp_path / "one" / "tokenizer")
    later = stages("seed", 0, 2, 2)[1:]
    module = tiny.staged("seed", eye, later, {"dropout": 0.0}, init_from=str(tmp_path / "one" / "tokenizer"))
    fit(tmp_path / "two", module, image_shards, Checkpoint())
    after = tokgen.load(tmp_path / "two" / "tokenizer")
    for name, value in before.state_dict().items():
        if name.startswith(("encoder.", "ln_vision.", "qformer.", "text_projection.", "temperature")):
            assert torch.equal(after.state_dict()[name], value), name
    assert torch.equal(after.encode_text(["square 3, flat style"]), before.encode_text(["square 3, flat style"]))


# -- validation, publication ---------------------------------------------------------------------------------------------


def test_validation_measures_the_stage_that_was_just_trained(tmp_path, image_shards, eye):
    """At a boundary too; the best checkpoint is of the latest stage; callbacks of every run work."""
    callbacks = (Checkpoint(), ImageGrid(), CodebookMonitor(2), EMA())
    record = fit(tmp_path, tiny.staged("seed", eye, stages("seed", 4, 4, 4)), image_shards, *callbacks, val_check_interval=2)  # fmt: skip
    validations = [row for row in record.rows if "val/score" in row]
    assert [(row["step"], row["val/stage"]) for row in validations] == [
        (2, 0),
        (4, 0),
        (6, 1),
        (8, 1),
        (10, 2),
        (12, 2),
    ]
    for row in validations:
        assert row["val/score"] == pytest.approx(row["val/stage"] + 1 / (1 + row["val/loss"]))
    first, second, third = validations[1], validations[3], validations[5]
    assert {"val/contrastive", "val/temperature", "val/image_to_text"} <= set(first) and "val/usage" not in first
    assert first["val/pairs"] == 10
    assert {"val/sequence", "val/target", "val/cosine_target", "val/usage", "val/perplexity"} <= set(second)
    assert {"val/reconstruction", "val/psnr", "val/usage"} <= set(third)
    assert all(math.isfinite(v) for row in record.rows for v in row.values())
    assert read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["global_step"] in (10, 12)
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["reconstruction-0000010.png", "reconstruction-0000012.png"]  # fmt: skip


@torch.no_grad()
def test_validation_averages_over_pictures(tmp_path, image_shards, eye):
    """10 pictures in batches of 4, 4 and 2; retrieval among all ten, the usage of the whole set."""
    module = tiny.staged("seed", eye, stages("seed", 0, 1, 1)[1:])
    record = fit(tmp_path, module, image_shards, val_check_interval=2, max_steps=2)
    (row,) = [row for row in record.rows if "val/psnr" in row]
    whole = ShardsDataModule(val=str(image_shards / "val"), batch_size=10, image_size=tiny.SIZE)
    (batch,) = whole.val_dataloader()
    pixels, tokenizer = batch["pixels"].float() / 255, module.tokenizer.eval()
    output = tokenizer(pixels)
    errors = (output.reconstruction - pixels).square().flatten(1).mean(1)
    assert row["val/psnr"] == pytest.approx((-10 * errors.log10()).mean().item(), rel=1e-4)
    raw = tokenizer.detokenize(output.tokens)
    assert row["val/reconstruction"] == pytest.approx((raw - pixels).square().mean().item(), rel=1e-4)
    assert row["val/usage"] == pytest.approx(len(output.tokens.ids.unique()) / tokenizer.codebook_sizes[0])


@pytest.mark.parametrize("kind", ["seed", "lavit"])
def test_the_export_is_a_tokenizer_of_its_own(tmp_path, image_shards, eye, kind):
    module = tiny.staged(kind, eye, stages(kind, 2, 2, 2))
    fit(tmp_path, module, image_shards, Checkpoint())
    published = tokgen.load(tmp_path / "tokenizer")
    trained = module.tokenizer.eval()
    assert published.fingerprint == trained.fingerprint
    assert str(eye) not in (tmp_path / "tokenizer" / "config.json").read_text()
    pixels = trained.example_pixels()
    tokens = published.encode(pixels)
    assert torch.equal(tokens.ids, trained.encode(pixels).ids)
    assert torch.equal(published.decode(tokens), trained.decode(trained.encode(pixels)))
    if kind == "seed":
        assert torch.equal(published.encode_text(["square 3"]), trained.encode_text(["square 3"]))
    module = tiny.staged(kind, eye, stages(kind, 2, 2, 2))
    trainer = tiny.trainer(tmp_path / "more")
    data = ShardsDataModule(test=str(image_shards / "val"), batch_size=4, image_size=tiny.SIZE)
    options = {"datamodule": data, "ckpt_path": tmp_path / "checkpoints" / "last.ckpt", "weights_only": True}
    trainer.test(module, verbose=False, **options)
    figures = trainer.callback_metrics
    assert figures["val/stage"] == 2 and math.isfinite(figures["val/psnr"])
    predicted = tokgen.Tokens.cat(trainer.predict(module, **options))
    assert len(predicted) == 10 and predicted.tokenizer == published.fingerprint


# -- precomputed features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seed", "lavit"])
def test_precomputed_features_train_as_pixels_do(tmp_path, image_shards, eye, kind, monkeypatch):
    """To the precision of float16; the encoder is not called."""
    encoder = build_encoder({"pretrained": str(eye)})
    for split in ("train", "val"):
        feature_shards(encoder, image_shards / split, tmp_path / "images" / split, encoder_from=str(eye), size=tiny.SIZE, resize="crop", max_samples=12, progress=False)  # fmt: skip
    changes = {"dropout": 0.0} if kind == "seed" else {"fixed_keep": 16, "threshold": None}
    parts = [Stage(stage.name, stage.steps, kind="constant") for stage in stages(kind, 3, 3, 3)]
    sgd = lambda p: torch.optim.SGD(p, lr=0.02)  # noqa: E731
    on_pixels, on_features = (tiny.staged(kind, eye, parts, changes, optimizer=sgd) for _ in range(2))
    one = fit(tmp_path / "one", on_pixels, image_shards, val_check_interval=3)
    called = []
    for name in ("features", "embed"):
        original = getattr(type(encoder), name)
        monkeypatch.setattr(type(encoder), name, lambda self, x, n=name, f=original: called.append((n, self)) or f(self, x))  # fmt: skip
    two = fit(tmp_path / "two", on_features, image_shards, data=tiny.shards(tmp_path / "images", features=True), val_check_interval=3)  # fmt: skip
    assert not any(caller is on_features.tokenizer.encoder for _, caller in called)
    for name in one.rows[0]:
        if name != "train/samples_per_second":
            assert two.rows[0][name] == pytest.approx(one.rows[0][name], rel=2e-3, abs=2e-3), name
    moved = 0.0
    start = tiny.staged(kind, eye, parts, changes).tokenizer.state_dict()
    for name, value in on_pixels.tokenizer.state_dict().items():
        if value.is_floating_point() and not name.startswith(("encoder", "quantizer")):
            moved += float((value - start[name]).norm() ** 2)
            torch.testing.assert_close(on_features.tokenizer.state_dict()[name], value, rtol=0.02, atol=2e-3)
    assert moved > 1e-3


def test_features_of_another_encoder_are_refused(tmp_path, image_shards, eye):
    other = build_encoder({"pretrained": str(tiny.eyes(tmp_path / "other", seed=6))})
    feature_shards(other, image_shards / "train", tmp_path / "images", size=tiny.SIZE, resize="crop", progress=False)
    data = ShardsDataModule(train=str(tmp_path / "images"), batch_size=4, image_size=tiny.SIZE)
    module = tiny.staged("lavit", eye, stages("lavit", 1))
    with pytest.raises(
        ConfigError, match="the features in these shards are those of contrastive encoder other"
    ) as error:
        fit(tmp_path, module, image_shards, data=data)
    message = str(error.value)
    assert "\n" not in message and other.fingerprint in message and module.tokenizer.encoder.fingerprint in message
    data = ShardsDataModule(train=str(tmp_path / "images"), batch_size=4, image_size=tiny.SIZE, random_flip=True)
    fit(tmp_path, module, image_shards, data=data)  # they are not read: no matter whose they are
    assert module.step == 1


# -- ranks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["contrast", "seed", "lavit"])
def test_ddp_equals_one_process(tmp_path, eye, name):
    """Contrast over all ranks, EMA codebook, frozen parts, unused parameters of other stages; a validation set of three
    pictures, or of one, of which one rank has nothing but a repeat."""
    tiny.write_images(tmp_path / "images" / "train", 48, 0)
    tiny.write_images(tmp_path / "images" / "val", 3 if name == "lavit" else 1, 1)
    (tmp_path / "eye").symlink_to(eye)
    ranks.both(name, tmp_path, tmp_path)
    one, two = (torch.load(tmp_path / f"{name}{n}.pt", weights_only=True) for n in (1, 2))
    assert len(one["rows"]) == len(two["rows"]) > 4
    for a, b in zip(one["rows"], two["rows"]):
        assert a.keys() == b.keys()
        if name != "contrast" or (a["step"] == 1 and "train/lr" in a):
            for key in a.keys() - ({"train/grad_norm"} if name == "contrast" else set()):
                assert b[key] == pytest.approx(a[key], rel=2e-2, abs=1e-4), key
    if name != "contrast":  # there, as published, other ranks' embeddings have no gradient
        for key, value in one["weights"].items():
            torch.testing.assert_close(two["weights"][key], value, rtol=1e-3, atol=1e-5)
