"""TokenFlow in the training of autoencoders: the teacher, the decoder alone, a larger decoder, and a run that is resumed."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from tokgen.errors import CheckpointError, ConfigError
from tokgen.tokenizers.tokenflow import TokenFlow
from tokgen.training.base import decay_groups
from tokgen.training.checkpoint import Checkpoint


def flow(example: str = "shared", **changes) -> TokenFlow:
    """The example at the size of `tiny.write_images`: features of a 4 x 4 grid."""
    config = TokenFlow.example_configs()[example]
    tower = config.semantic_encoder["config"] | {"image_size": 16, "patch": 4}
    small = {"image_size": 16, "patch": 4, "channel_mult": (1,), "target_dim": 32}
    small["semantic_encoder"] = {"type": "contrastive", "config": tower}
    small["quantizer"] = {"type": "dual-vq", "codebook_size": 32, "revive_below": 0.2, "decay": 0.9}
    torch.manual_seed(0)
    return TokenFlow(dataclasses.replace(config, **{**small, **changes}))


def module(tokenizer: TokenFlow, eye, **settings):
    settings.setdefault("disc_weight", 0.0)
    return tiny.autoencoder(tokenizer=tokenizer, teacher=str(eye), **settings)


@pytest.fixture(scope="module")
def eye(tmp_path_factory):
    return tiny.eyes(tmp_path_factory.mktemp("eye") / "teacher")


@pytest.mark.parametrize("example", ["shared", "pixel", "semantic"])
def test_it_learns_pixels_and_the_teachers_features(eye, image_shards, tmp_path, example):
    record = tiny.Record()
    training = module(flow(example), eye, disc_weight=0.5, disc_start=20)
    trainer = tiny.trainer(tmp_path, record, max_steps=60, val_check_interval=30)
    trainer.fit(training, tiny.shards(image_shards))
    semantic = record.column("train/semantic")
    assert sum(semantic[-10:]) < 0.95 * sum(semantic[:10])
    assert record.column("val/semantic_cosine")[-1] > record.column("val/semantic_cosine")[0]
    assert record.column("val/psnr")[-1] > record.column("val/psnr")[0]
    assert record.column("train/usage_scale_0") and record.column("train/adversarial")
    assert 0 < record.column("val/usage")[-1] <= 1


def test_the_decoder_alone_is_trained(eye, image_shards, tmp_path):
    training = module(flow(), eye, train_only=["decoder"], disc_weight=0.5)
    before = {name: value.clone() for name, value in training.tokenizer.state_dict().items()}
    record = tiny.Record()
    tiny.trainer(tmp_path, record, max_steps=3).fit(training, tiny.shards(image_shards))
    changed = {name for name, value in training.tokenizer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and {name.partition(".")[0] for name in changed} == {"decoder"}
    assert record.column("train/semantic")  # the release computes the whole loss, too
    assert not record.column("train/codebook")  # a frozen codebook has none to say


def test_a_larger_decoder_starts_from_nothing_and_all_else_from_the_run_before(eye, image_shards, tmp_path):
    first = flow()
    first.save_pretrained(tmp_path / "first")
    enhanced = {"decoder_channels": 64, "decoder_res_blocks": 2}
    with pytest.raises(CheckpointError, match=r"unexpected|missing|wrong shape"):
        module(flow(**enhanced), eye, init_from=str(tmp_path / "first"))
    torch.manual_seed(1)
    start = flow(**enhanced)
    with torch.no_grad():
        for p in start.parameters():
            p.add_(1.0)
    decoder = {name: value.clone() for name, value in start.decoder.state_dict().items()}
    training = module(start, eye, init_from=str(tmp_path / "first"), init_without=["decoder"], train_only=["decoder"])
    state = training.tokenizer.state_dict()
    assert all(torch.equal(state[f"decoder.{name}"], value) for name, value in decoder.items())
    for name, value in first.state_dict().items():
        assert name.startswith("decoder.") or torch.equal(state[name], value), name
    tiny.trainer(tmp_path, max_steps=2).fit(training, tiny.shards(image_shards))
    assert not torch.equal(training.tokenizer.decoder.conv_in.weight, decoder["conv_in.weight"])
    assert torch.equal(training.tokenizer.pre_quant.weight, first.pre_quant.weight)


def test_settings_that_cannot_work_are_named(eye, tmp_path):
    flow().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"init_without names 'decodr', which tokenflow lacks; it has .*decoder"):
        module(flow(), eye, init_from=str(tmp_path), init_without=["decodr"])
    with pytest.raises(ConfigError, match="init_from, which is not given"):
        module(flow(), eye, init_without=["decoder"])
    with pytest.raises(ConfigError, match="train_only names 'encodr'"):
        module(flow(), eye, train_only=["encodr"])


def test_codes_are_not_decayed_and_what_is_not_trained_has_no_optimizer():
    tokenizer = flow()
    groups = decay_groups(tokenizer)
    inside = {id(p) for group in groups for p in group["params"]}
    codes = tokenizer.quantizer.quantizer.codebooks[0].weight
    (group,) = [g for g in groups if any(p is codes for p in g["params"])]
    assert group["weight_decay"] == 0.0
    assert inside == {id(p) for p in tokenizer.parameters() if p.requires_grad}


def test_a_resumed_run_is_the_run_that_was_not_stopped(eye, image_shards, tmp_path):
    """Scales that are dropped and codes that are revived included."""
    weights = []
    for name, stops in (("whole", [12]), ("parts", [5, 12])):
        path = None
        for stop in stops:
            training = module(flow(scale_dropout=0.6), eye)
            keep = Checkpoint(every_n_steps=1)
            trainer = tiny.trainer(tmp_path / name, keep, max_steps=stop)
            trainer.fit(training, tiny.shards(image_shards), ckpt_path=path)
            path = str(tmp_path / name / "checkpoints" / "last.ckpt")
        weights.append(training.tokenizer.state_dict())
    assert int(weights[0]["quantizer.step"]) == 12
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
