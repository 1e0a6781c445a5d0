"""The adversarial loss of either side, and the discriminator of IBQ's recipe."""

from __future__ import annotations

import math

import pytest
import tiny


@pytest.mark.parametrize(
    "kinds, generator, discriminator",
    [
        ({}, 0.0, 1.0),
        ({"disc_loss": "non-saturating"}, math.log(2), math.log(2)),
        ({"disc_loss": "hinge", "disc_generator_loss": "non-saturating"}, math.log(2), 1.0),
    ],
)
def test_each_side_has_its_loss(tmp_path, kinds, generator, discriminator):
    record = tiny.Record()
    module = tiny.autoencoder(**kinds)
    # logits of 0 tell the losses apart
    module.discriminator.main[-1].weight.data.zero_(), module.discriminator.main[-1].bias.data.zero_()
    tiny.trainer(tmp_path, record, max_steps=1).fit(module, tiny.pixels())
    assert record.column("train/adversarial")[0] == pytest.approx(generator, abs=1e-6)
    assert record.column("train/disc")[0] == pytest.approx(discriminator, abs=1e-6)


def test_an_ibq_tokenizer_trains_in_bf16_with_its_losses(tmp_path):
    """Index backpropagation inside the trainer's autocast, as the trainer calls backward there."""
    record = tiny.Record()
    quantizer = {"type": "ibq", "codebook_size": tiny.CODES}
    module = tiny.autoencoder(
        tokenizer=tiny.tokenizer(quantizer),
        disc_generator_loss="non-saturating",
        reconstruction="l1",
        lecam_weight=0.05,
    )
    before = module.tokenizer.quantizer.codebook.weight.detach().clone()
    tiny.trainer(tmp_path, record, max_steps=3, precision="bf16-mixed").fit(module, tiny.pixels())
    assert (module.tokenizer.quantizer.codebook.weight != before).any(1).all()
    for term in ("quantization", "commitment", "codebook", "entropy", "adversarial", "lecam"):
        assert all(math.isfinite(value) for value in record.column(f"train/{term}"))
    assert int(module.skipped_steps) == 0
