"""`QFormer`: who sees whom, and what is there only with a text side. Its numbers are checked in tests/parity."""

from __future__ import annotations

import pytest
import torch

from tokgen.errors import ConfigError, InputError
from tokgen.nn.qformer import QFormer


def build(queries: int = 32, **options) -> QFormer:
    sizes = {"dim": 24, "heads": 4, "hidden": 48, "layers": 3, "causal": True}
    module = QFormer(queries, 10, **{**sizes, **options}).eval()
    with torch.no_grad():
        module.queries.normal_()
    return module


CONTEXT = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("queries", [32, 21, 33])
def test_a_causal_query_changes_none_before_it(queries):
    module = build(queries)
    before = module(CONTEXT)
    module.queries[:, 20].normal_()
    after = module(CONTEXT)
    assert torch.equal(before[:, :20], after[:, :20])
    changed = (before[:, 20:] != after[:, 20:]).flatten(2).any(2).all(0)
    assert changed.all()


@torch.no_grad()
def test_fewer_queries_are_a_prefix():
    module = build()
    assert torch.allclose(module(CONTEXT, module.queries[:, :16]), module(CONTEXT)[:, :16], atol=1e-6)


@torch.no_grad()
def test_without_the_flag_queries_see_both_ways():
    module = build(causal=False)
    before = module(CONTEXT)
    module.queries[:, 20].normal_()
    assert (before != module(CONTEXT)).flatten(2).any(2).all()


@torch.no_grad()
def test_every_second_layer_reads_the_features():
    module = build(layers=5)
    assert [layer.cross is not None for layer in module.layers] == [True, False, True, False, True]
    assert [layer.cross is not None for layer in build(layers=4, cross_attention_freq=3).layers] == [
        True,
        False,
        False,
        True,
    ]
    masked = CONTEXT.clone()
    masked[:, 5:] = 100.0
    mask = torch.arange(7).expand(2, -1) < 5
    assert not torch.allclose(module(masked), module(CONTEXT))
    assert torch.allclose(module(masked, context_mask=mask), module(CONTEXT[:, :5]), atol=1e-6)


@torch.no_grad()
def test_text_passes_through_its_own_feed_forward_and_padding_is_not_seen():
    module = build(text_vocab=50, max_positions=9)
    ids = torch.randint(0, 50, (2, 6))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    states = module.read(ids, mask)
    assert states.shape == (2, 6, 24)
    assert torch.allclose(states[1, :4], module.read(ids[1:, :4], mask[1:, :4])[0], atol=1e-6)
    module.layers[0].query_mlp.fc1.weight.normal_()
    assert torch.equal(module.read(ids, mask), states)
    module.layers[0].text_mlp.fc1.weight.normal_()
    assert not torch.allclose(module.read(ids, mask), states)


@torch.no_grad()
def test_in_one_pass_queries_see_text_and_each_other_causally():
    module = build(6, text_vocab=50)
    ids, mask = torch.randint(0, 50, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    before = module.join(CONTEXT, ids, mask)
    assert before.shape == (2, 11, 24)
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % 50
    assert (module.join(CONTEXT, changed, mask)[:, :6] != before[:, :6]).flatten(2).any(2).all()
    # with the last word masked away, text has no influence of it
    mask[:, 4] = False
    assert torch.equal(module.join(CONTEXT, changed, mask)[:, :10], module.join(CONTEXT, ids, mask)[:, :10])
    # in one layer, a later query reaches an earlier one neither directly nor through text
    single = build(6, text_vocab=50, layers=1)
    first = single.join(CONTEXT, ids, mask)
    single.queries[:, 5].normal_()
    assert torch.equal(single.join(CONTEXT, ids, mask)[:, :5], first[:, :5])


def test_without_a_text_side_there_are_no_text_weights():
    plain, text = build(), build(text_vocab=50)
    assert not [name for name in plain.state_dict() if "text" in name or "words" in name or "places" in name]
    assert len([name for name in text.state_dict() if "text" in name]) == 3 * 6
    with pytest.raises(InputError, match="no text side"):
        plain.read(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="600 text ids for 512 positions"):
        text.read(torch.zeros(1, 600, dtype=torch.int64), torch.ones(1, 600, dtype=torch.bool))


def test_dropout_is_at_work_in_training_only():
    module = build(dropout=0.5)
    assert torch.equal(module(CONTEXT), module(CONTEXT))
    module.train()
    assert not torch.equal(module(CONTEXT), module(CONTEXT))


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="dim 24 must be a multiple of heads 5"):
        build(heads=5)
