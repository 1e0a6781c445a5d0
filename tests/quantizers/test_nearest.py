"""`nearest`: the exact answer, the same in any company, in little memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peak_memory import peak_of

from tokgen.errors import InputError
from tokgen.quantizers.search import METRICS, nearest, tile_shape


def distances(z, codebook, metric):
    """float64 (N, K), by the definition."""
    z, codebook = z.double(), codebook.double()
    if metric == "l2":
        return (z[:, None] - codebook[None]).square().sum(-1)
    return -z @ (F.normalize(codebook, dim=-1) if metric == "cosine" else codebook).T


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n, k, d", [(1, 1, 1), (1, 2, 3), (7, 100, 5), (300, 4097, 8), (65, 700, 256), (90, 20000, 2)])
def test_is_the_float64_argmin_away_from_ties(metric, n, k, d):
    z, codebook = torch.randn(n, d), torch.randn(k, d)
    ids = nearest(z, codebook, metric)
    assert ids.dtype == torch.int64 and ids.shape == (n,)
    expected = distances(z, codebook, metric)
    best = expected.min(1).values
    # rounding of fp32 at the size of the numbers involved: no worse code is taken than that explains
    slack = 1e-6 * d**0.5 * (1 + z.double().square().sum(1) + codebook.double().square().sum(1).max())
    assert (expected.gather(1, ids[:, None])[:, 0] - best <= slack).all()
    if k > 1:
        safe = expected.kthvalue(2, 1).values - best > 2 * slack
        assert torch.equal(ids[safe], expected.argmin(1)[safe])


@pytest.mark.parametrize("metric", METRICS)
def test_lowest_id_wins_ties(metric):
    codebook = torch.randint(-2, 3, (9000, 3)).float()  # 125 different codes; exact arithmetic
    codebook[0] = 7.0  # a zero or constant first code would hide the order
    z = codebook[torch.randperm(9000)[:200]]
    if metric == "l2":
        expected = (z[:, None] == codebook).all(-1).int().argmax(1)
        assert torch.equal(nearest(z, codebook, metric), expected)
    if metric == "dot":
        assert torch.equal(nearest(z, codebook, metric), (z @ codebook.T).argmax(1))
    same = torch.ones(20000, 4)
    assert nearest(torch.randn(100, 4), same, metric).eq(0).all()


@pytest.mark.parametrize("d", [1, 3, 8, 18, 256])
def test_result_does_not_depend_on_the_batch(d):
    """Near ties everywhere: 200 copies of each code, moved by a few units in the last place."""
    base = torch.randn(5, d)
    codebook = (base[:, None] * (1 + 2e-7 * torch.randn(5, 200, d))).flatten(0, 1)[torch.randperm(1000)]
    z = base[torch.randint(5, (333,))] + 1e-7 * torch.randn(333, d)
    ids = nearest(z, codebook)
    order = torch.randperm(333)
    assert torch.equal(nearest(z[order], codebook), ids[order])
    for n in (1, 2, 3, 17, 64, 65, 130):
        assert torch.equal(nearest(z[:n], codebook), ids[:n])
        assert torch.equal(nearest(z[-n:], codebook), ids[-n:])
    assert len(ids.unique()) > 5  # the near ties were not decided by chance alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_searched_in_fp32(dtype):
    z, codebook = torch.randn(100, 8).to(dtype), torch.randn(3000, 8)
    expected = nearest(z.float(), codebook)
    assert torch.equal(nearest(z, codebook), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(z, codebook), expected)
        assert torch.equal(nearest(z.float(), codebook), expected)
    assert torch.equal(nearest(z, codebook.to(dtype)), nearest(z.float(), codebook.to(dtype).float()))


def test_matmul_precision_setting_is_overruled_and_restored():
    z, codebook = torch.randn(500, 64), torch.randn(3000, 64)
    expected = nearest(z, codebook)
    try:
        torch.set_float32_matmul_precision("medium")
        settings = (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        assert torch.equal(nearest(z, codebook), expected)
        assert settings == (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_strided_and_empty_input():
    z, codebook = torch.randn(8, 150), torch.randn(16, 1000).T
    assert torch.equal(nearest(z.T, codebook[:, ::2]), nearest(z.T.contiguous(), codebook[:, ::2].contiguous()))
    assert nearest(torch.zeros(0, 8), torch.zeros(5, 8)).shape == (0,)


def test_vectors_that_are_not_numbers_get_a_valid_id():
    z = torch.randn(10, 4)
    expected = nearest(z, codebook := torch.randn(50, 4))
    z[3, 2] = torch.nan
    ids = nearest(z, codebook)
    assert ids[3] == 0
    others = torch.arange(10) != 3
    assert torch.equal(ids[others], expected[others])


def test_needs_no_gradient_and_compiles_whole():
    z, codebook = torch.randn(10, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    assert not nearest(z, codebook).requires_grad
    compiled = torch.compile(lambda z, c: nearest(z * 2, c) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, codebook), nearest(z * 2, codebook) + 1)


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="unknown metric 'manhattan'"):
        nearest(torch.zeros(2, 3), torch.zeros(4, 3), "manhattan")
    with pytest.raises(InputError, match=r"\(2, 3\) and \(4, 5\)"):
        nearest(torch.zeros(2, 3), torch.zeros(4, 5))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("k", [2, 64, 1000, 16384, 1 << 18])
@pytest.mark.parametrize("d", [1, 8, 256, 4096])
def test_tiles_stay_small(device, k, d):
    rows, codes = tile_shape(k, d, device)
    assert rows % 64 == 0 and codes % 64 == 0 and rows >= 64 and codes >= 64
    assert rows * codes * 4 <= (2 << 20 if device == "cpu" else 64 << 20)


@pytest.mark.slow
def test_memory_does_not_hold_all_distances():
    setup = """
from tokgen.quantizers.search import nearest
z, codebook = torch.randn(4096, 8), torch.randn(131072, 8)
nearest(z[:64], codebook[:9000])
"""
    used = peak_of(setup, "nearest(z, codebook)")
    assert used < 32 << 20  # all distances: 2 GiB
