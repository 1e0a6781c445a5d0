"""Multi-scale residual quantization against its definition, and what a run asks of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_on_ranks
from tokgen.errors import ConfigError, InputError
from tokgen.quantizers.base import build_quantizer
from tokgen.quantizers.multiscale import MultiScale

SCALES, DIM = (1, 2, 3, 6), 8
N = sum(s * s for s in SCALES)
INNER = {
    "shared": {"type": "dual-vq", "codebook_size": 50, "semantic_dim": 5},
    "separate": {"type": "dual-vq", "codebook_size": 50, "semantic_dim": 5, "index": "separate"},
    "vq": {"type": "vq", "codebook_size": 50},
    "fsq": {"type": "fsq", "levels": [5, 5, 5]},
}


def build(name: str = "shared", dropout: float = 0.0, **options) -> MultiScale:
    torch.manual_seed(0)
    return MultiScale(build_quantizer({**INNER[name], **options}, DIM), SCALES, dropout)


def plain(quantizer: MultiScale, z: torch.Tensor):
    """The published loop, written out, on (B, d, S, S)."""
    residual, total, ids, losses = z.permute(0, 3, 1, 2), 0, [], []
    for s in quantizer.scales:
        out = quantizer.quantizer(F.interpolate(residual, size=(s, s), mode="area").permute(0, 2, 3, 1))
        up = F.interpolate(out.codes.permute(0, 3, 1, 2), size=z.shape[1:3], mode="bicubic")
        total, residual = total + up, residual - up.detach()
        ids.append(out.ids.flatten(1, 2))
        losses.append(out.losses)
    return total.permute(0, 2, 3, 1), torch.cat(ids, 1), losses


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_published_loop(name, training):
    quantizer = build(name).train(training)
    z = torch.randn(3, 6, 6, DIM, requires_grad=True)
    out, (codes, ids, losses) = quantizer(z), plain(quantizer, z)
    assert torch.equal(out.ids, ids) and out.mask.all() and out.ids.shape[1] == N
    torch.testing.assert_close(out.codes, codes)
    assert out.losses.keys() == losses[0].keys()
    for key in out.losses:
        torch.testing.assert_close(out.losses[key], sum(terms[key] for terms in losses) / len(SCALES))
    if training:
        weights = torch.randn_like(codes)
        gradients = [torch.autograd.grad((x * weights).sum(), z, retain_graph=True)[0] for x in (out.codes, codes)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_codes_are_lookup_bit_for_bit_and_independent_of_the_batch(name, dtype):
    quantizer = build(name, dropout=0.5).eval()
    z = torch.randn(5, 6, 6, DIM).to(dtype)
    out = quantizer(z)
    assert out.codes.dtype == dtype and out.mask.all()
    assert torch.equal(out.codes, quantizer.lookup(out.ids).to(dtype))
    for i in range(5):
        alone = quantizer(z[i : i + 1])
        assert torch.equal(alone.ids[0], out.ids[i]) and torch.equal(alone.codes[0], out.codes[i])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z).ids, out.ids) and torch.equal(quantizer(z).codes, out.codes)


def test_the_map_grows_scale_by_scale():
    quantizer = build().eval()
    z = torch.randn(2, 6, 6, DIM)
    out = quantizer(z)
    maps = list(quantizer.progressive(out.ids))
    assert len(maps) == len(SCALES) and torch.equal(maps[-1], out.codes)
    for codes, n in zip(maps, quantizer.layout.prefixes()):
        assert torch.equal(codes, quantizer.lookup(out.ids[:, :n]))
    one = quantizer.quantizer.lookup(out.ids[:, 0])  # (B, d): the first scale is one vector everywhere
    torch.testing.assert_close(maps[0], one[:, None, None].expand_as(maps[0]))


def test_more_scales_come_closer():
    quantizer = build("vq").eval()
    with torch.no_grad():
        quantizer.quantizer.codebook.weight.normal_(std=0.7)
    z = torch.randn(8, 6, 6, DIM)
    with torch.no_grad():
        errors = [float((codes - z).square().mean()) for codes in quantizer.progressive(quantizer(z).ids)]
    assert errors[-1] < errors[0]


def test_usage_is_told_by_scale_and_together():
    quantizer = build().train()
    out = quantizer(torch.randn(4, 6, 6, DIM))
    start = 0
    for i, s in enumerate(SCALES):
        ids = out.ids[:, start : start + s * s]
        start += s * s
        assert out.stats[f"usage_scale_{i}"].item() == pytest.approx(ids.unique().numel() / 50)
    assert out.stats["usage"].item() == pytest.approx(out.ids.unique().numel() / 50)


@pytest.mark.parametrize("name", ["shared", "separate"])
def test_one_scale_is_dropped_at_the_rate_asked_for_and_never_the_first(name):
    quantizer = build(name, dropout=0.3).train()
    z = torch.randn(1, 6, 6, DIM)
    starts = [0, *quantizer.layout.prefixes()]
    dropped = []
    for _ in range(300):
        out = quantizer(z)
        missing = [i for i in range(len(SCALES)) if not out.mask[0, starts[i]]]
        assert len(missing) <= 1 and 0 not in missing
        for i in missing:
            span = slice(starts[i], starts[i + 1])
            assert not out.mask[:, span].any() and not out.ids[:, span].any()
            assert out.mask.sum() == N - SCALES[i] ** 2 and f"usage_scale_{i}" not in out.stats
        dropped += missing
    assert 0.2 < len(dropped) / 300 < 0.4
    assert {1, 2, 3} == set(dropped)


def test_the_dropped_scale_is_left_out_of_the_sum():
    quantizer = build(dropout=0.9).train()
    z = torch.randn(2, 6, 6, DIM)
    starts = [0, *quantizer.layout.prefixes()]
    while (out := quantizer(z)).mask.all():
        pass
    left = [i for i in range(len(SCALES)) if out.mask[0, starts[i]]]
    total = sum(
        F.interpolate(
            quantizer.quantizer.lookup(out.ids[:, starts[i] : starts[i + 1]].unflatten(1, (SCALES[i],) * 2)).permute(0, 3, 1, 2),
            (6, 6), mode="bicubic",
        )
        for i in left
    )  # fmt: skip
    assert len(left) == len(SCALES) - 1
    torch.testing.assert_close(out.codes, total.permute(0, 2, 3, 1))


def test_a_resumed_run_drops_the_same_scales():
    one = build(dropout=0.5).train()
    z = torch.randn(1, 6, 6, DIM)
    for _ in range(7):
        one(z)
    two = build(dropout=0.5).train()
    torch.manual_seed(99)
    two.load_state_dict(one.state_dict())
    masks = [[q(z).mask for _ in range(30)] for q in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*masks)) and not torch.stack(masks[0]).all()


@pytest.mark.parametrize("shape", [(2, 5, 5, DIM), (2, 7, 7, DIM), (2, 6, 3, DIM), (2, 36, DIM)])
def test_maps_of_another_size_are_refused(shape):
    with pytest.raises(InputError, match=r"takes maps \(B, 6, 6, d\)"):
        build()(torch.zeros(shape))


@pytest.mark.parametrize("n", [0, 2, N - 1, N + 1])
def test_ids_that_do_not_end_with_a_scale_are_refused(n):
    with pytest.raises(InputError, match="1, 5, 14, 50 ids"):
        build().lookup(torch.zeros(2, n, dtype=torch.int64))


@pytest.mark.parametrize("scales, dropout", [((), 0.1), ((2, 1), 0.1), ((1, 1), 0.1), ((0, 1), 0.1), ((1, 2), 1.0)])
def test_settings_that_cannot_work_are_named(scales, dropout):
    with pytest.raises(ConfigError, match="MultiScale"):
        MultiScale(build_quantizer(INNER["vq"], DIM), scales, dropout)


# -- ranks ------------------------------------------------------------------------------------------------------------


def _work(rank: int, folder: str) -> None:
    quantizer = build("shared", dropout=0.5, revive_below=0.5, decay=0.6).train()
    masks, stats = [], []
    for step in range(8):
        generator = torch.Generator().manual_seed(10 * step + rank)
        out = quantizer(torch.randn(2 + rank, 6, 6, DIM, generator=generator))
        masks.append(out.mask[0])
        stats.append(out.stats)
    torch.save((quantizer.state_dict(), torch.stack(masks), stats), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_ranks_drop_the_same_scales_and_keep_one_codebook(tmp_path):
    run_on_ranks(_work, tmp_path)
    (state, masks, stats), (other, same, of_other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(masks, same) and not masks.all()
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(stats, of_other) for key in a)
    start = build("shared", revive_below=0.5).state_dict()["quantizer.codebooks.0.weight"]
    assert not torch.equal(state["quantizer.codebooks.0.weight"], start)  # codes were revived
