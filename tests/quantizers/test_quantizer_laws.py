"""The promises of `Quantizer`, for every registered quantizer with every set of example options."""

from __future__ import annotations

import copy

import pytest
import torch

from tokgen.errors import ConfigError, InputError
from tokgen.quantizers.base import QUANTIZERS, build_quantizer

DIM = 8
EXAMPLES = [(name, label) for name in QUANTIZERS.names() for label in QUANTIZERS[name].example_options()]
SHAPES = [(5, DIM), (3, 7, DIM), (2, 3, 5, DIM)]


@pytest.fixture(params=EXAMPLES, ids="/".join)
def trained(request):
    """A quantizer after a few steps of training, in training mode."""
    name, label = request.param
    quantizer = build_quantizer({"type": name, **QUANTIZERS[name].example_options()[label]}, DIM).train()
    for _ in range(3):
        quantizer(torch.randn(4, 40, DIM))
    return quantizer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_types_and_ranges(trained, shape, training):
    z = torch.randn(shape)
    out = trained.train(training)(z)
    several = len(trained.codebook_sizes) > 1
    assert out.ids.dtype == torch.int64 and out.codes.shape == z.shape and out.codes.dtype == z.dtype
    assert out.ids.shape == (*shape[:-1], len(trained.codebook_sizes)) if several else out.ids.shape == shape[:-1]
    ids = out.ids if several else out.ids[..., None]
    assert all(0 <= ids[..., c].min() and ids[..., c].max() < k for c, k in enumerate(trained.codebook_sizes))
    assert all(loss.ndim == 0 and loss.isfinite() for loss in out.losses.values())
    assert training or not out.losses
    for stat in out.stats.values():
        assert stat.ndim == 0 and not stat.requires_grad and stat.isfinite()
    distinct = sum(ids[..., c].unique().numel() / k for c, k in enumerate(trained.codebook_sizes))
    assert out.stats["usage"].item() == pytest.approx(distinct / len(trained.codebook_sizes), rel=1e-5)
    assert 1 - 1e-5 <= out.stats["perplexity"] <= z[..., 0].numel() + 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_codes_are_lookup_bit_for_bit(trained, shape, dtype):
    out = trained.eval()(torch.randn(shape).to(dtype))
    assert torch.equal(out.codes, trained.lookup(out.ids).to(dtype))


def test_eval_changes_nothing_and_repeats(trained):
    z = torch.randn(3, 20, DIM)
    before = copy.deepcopy(trained.eval().state_dict())
    first, second = trained(z), trained(z)
    assert torch.equal(first.ids, second.ids) and torch.equal(first.codes, second.codes)
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())


def test_ids_do_not_depend_on_the_batch(trained):
    z = torch.randn(9, 30, DIM)
    ids = trained.eval()(z).ids
    order = torch.randperm(9)
    assert torch.equal(trained(z[order]).ids, ids[order])
    assert torch.equal(torch.stack([trained(item).ids for item in z]), ids)


@pytest.mark.parametrize("training", [True, False])
def test_ids_of_bf16_values_are_those_of_fp32(trained, training):
    trained.train(training)
    z = torch.randn(4, 50, DIM).bfloat16()
    twin, other = copy.deepcopy(trained), copy.deepcopy(trained)
    ids = trained(z.float()).ids
    assert torch.equal(twin(z).ids, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(other(z).ids, ids)
        assert torch.equal(other.eval()(z.float()).ids, trained.eval()(z.float()).ids)


def test_module_cast_to_bf16_works(trained):
    """As in training with precision "bf16-true"."""
    trained.bfloat16()
    z = torch.randn(4, 50, DIM, dtype=torch.bfloat16, requires_grad=True)
    out = trained(z)
    assert out.codes.dtype == torch.bfloat16
    (out.codes.sum() + sum(out.losses.values())).backward()
    assert z.grad.isfinite().all()
    for name, buffer in trained.named_buffers():
        if name.split(".")[-1].startswith("ema"):
            assert buffer.dtype == torch.float32
    out = trained.eval()(z.detach())
    codes = trained.lookup(out.ids)
    assert codes.dtype == torch.bfloat16 and torch.equal(codes, out.codes)


def test_gradient_reaches_z_and_every_parameter(trained):
    z = torch.randn(4, 50, DIM, requires_grad=True)
    out = trained(z)
    weights = torch.randn_like(out.codes)
    ((out.codes * weights).sum() + sum(out.losses.values())).backward()
    assert z.grad.isfinite().all() and (z.grad.abs().sum(-1) > 0).all()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_masked_positions_do_not_count(trained):
    """A batch with padding gives what the real positions alone give: losses, statistics, state and gradients."""
    twin = copy.deepcopy(trained)
    mask = torch.rand(4, 30) < 0.6
    z = torch.randn(4, 30, DIM)
    z[~mask] = 100 * torch.randn(int((~mask).sum()), DIM)
    real = z[mask].requires_grad_()
    z.requires_grad_()
    out, expected = trained(z, mask), twin(real)
    assert torch.equal(out.ids[mask], expected.ids)
    assert out.losses.keys() == expected.losses.keys() and out.stats.keys() == expected.stats.keys()
    for name, value in {**expected.losses, **expected.stats}.items():
        torch.testing.assert_close({**out.losses, **out.stats}[name], value, rtol=1e-5, atol=1e-6)
    state = twin.state_dict()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)
    if out.losses:
        sum(out.losses.values()).backward()
        sum(expected.losses.values()).backward()
        torch.testing.assert_close(z.grad[mask], real.grad, rtol=1e-4, atol=1e-6)
        assert not z.grad[~mask].any()


def test_a_batch_of_padding_alone_is_harmless(trained):
    before = copy.deepcopy(trained.state_dict())
    z = torch.randn(2, 5, DIM, requires_grad=True)
    out = trained(z, torch.zeros(2, 5, dtype=torch.bool))
    assert all(v.isfinite() for v in {**out.losses, **out.stats}.values())
    (out.codes.sum() + sum(out.losses.values())).backward()
    assert z.grad.isfinite().all()
    state = trained.state_dict()
    assert all(v.isfinite().all() for v in state.values())
    for name in before:
        if name.endswith("weight"):
            assert torch.equal(state[name], before[name]), name


def test_training_resumes_exactly_from_a_state_dict(trained):
    name = next(n for n in QUANTIZERS.names() if type(trained) is QUANTIZERS[n])
    labels = QUANTIZERS[name].example_options()
    batches = [torch.randn(4, 40, DIM) for _ in range(4)]
    state = copy.deepcopy(trained.state_dict())
    for options in labels.values():
        torch.manual_seed(12345)
        twin = build_quantizer({"type": name, **options}, DIM).train()
        if {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in state.items()}:
            break
    twin.load_state_dict(state, strict=True)
    for z in batches:
        one, two = trained(z), twin(z)
        assert torch.equal(one.ids, two.ids) and torch.equal(one.codes, two.codes)
    end = twin.state_dict()
    assert all(torch.equal(value, end[key]) for key, value in trained.state_dict().items())


def test_two_forwards_before_backward(trained):
    """Gradient accumulation: state that changes in place must not break an earlier graph."""
    inputs, total = [torch.randn(4, 30, DIM, requires_grad=True) for _ in range(2)], 0
    for z in inputs:
        out = trained(z)
        total = total + out.codes.sum() + sum(out.losses.values())
    total.backward()
    for z in inputs:
        assert torch.isfinite(z.grad).all() and z.grad.any()


def test_wrong_input_is_named(trained):
    with pytest.raises(InputError, match=r"\(\.\.\., 8\), channels last"):
        trained(torch.zeros(2, 5, DIM + 1))
    with pytest.raises(InputError, match="mask must be bool"):
        trained(torch.zeros(2, 5, DIM), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="int64"):
        trained.lookup(trained(torch.zeros(2, 5, DIM)).ids.int())


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"codebook_size": 8}, "names no type"),
        ({"type": "vqq"}, "vqq"),
        ({"type": "vq", "codebook_size": 8, "betta": 1.0}, "no option 'betta'"),
        ({"type": "vq", "codebook_size": 1}, "at least 2"),
        ({"type": "vq", "codebook_size": 8, "metric": "dot"}, "'l2' or 'cosine'"),
        ({"type": "vq", "codebook_size": 8, "update": "adam"}, "'gradient' or 'ema'"),
        ({"type": "vq", "codebook_size": 8, "update": "ema", "decay": 1.0}, "0 <= decay < 1"),
        ({"type": "vq", "codebook_size": 8, "code_dim": 0}, "code_dim 0"),
        ({"type": "fsq", "levels": [8, 2]}, "at least 3"),
        ({"type": "fsq", "levels": []}, "at least 3"),
        ({"type": "fsq", "levels": [1000] * 21}, "64-bit"),
        ({"type": "lfq", "bits": 63}, "1 to 62"),
        ({"type": "bsq", "bits": 18, "group_bits": 18}, "1 to 12"),
        ({"type": "lfq", "bits": 4, "temperature": 0.0}, "above 0"),
        ({"type": "residual-vq", "codebook_size": 8, "num_quantizers": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_quantizer(spec, DIM)
