"""Two ranks keep one codebook: equal to each other bit for bit, and to one process with the joint batch."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_on_ranks
from tokgen.quantizers.base import build_quantizer, gather_over_ranks

STEPS, DIM = 8, 4
SPECS = {
    "ema": {"type": "vq", "codebook_size": 48, "update": "ema", "decay": 0.7, "kmeans_init": True, "revive_below": 0.6},
    "gradient": {"type": "vq", "codebook_size": 48, "decay": 0.7, "kmeans_init": True, "revive_below": 0.6},
    "cosine": {
        "type": "vq",
        "codebook_size": 48,
        "metric": "cosine",
        "update": "ema",
        "decay": 0.7,
        "revive_below": 0.6,
    },
    "residual": {"type": "residual-vq", "codebook_size": 12, "num_quantizers": 3, "decay": 0.7, "revive_below": 0.6},
    "lfq": {"type": "lfq", "bits": 30},
}


def batch(step: int, rank: int) -> torch.Tensor:
    """Ranks hold different numbers of different vectors, which drift so that codes die."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(60 - 17 * rank, DIM, generator=generator) + step


def train(name: str, batches) -> tuple[dict, list]:
    torch.manual_seed(0)  # as a trainer does on every rank
    quantizer = build_quantizer(SPECS[name], DIM).train()
    history, stats = [], []
    for z in batches:
        history.append({key: value.clone() for key, value in quantizer.state_dict().items()})
        stats.append(quantizer(z).stats)
    return quantizer.state_dict(), [history, stats]


def work(rank: int, folder: str) -> None:
    gathered = gather_over_ranks(torch.full((2 + rank, 3), float(rank)))
    results = {name: train(name, [batch(step, rank) for step in range(STEPS)]) for name in SPECS}
    # one rank alone may evaluate
    if rank == 0:
        quantizer = build_quantizer(SPECS["ema"], DIM).eval()
        quantizer(batch(0, 0))
    torch.save((gathered, results), f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_ranks_agree_bit_for_bit(ranks, name):
    (one, (history, stats)), (two, (_, other)) = (results[name] for _, results in ranks)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(stats, other) for key in a)
    if name != "lfq":
        weights = [key for key in one if key.endswith("codebook.weight")]
        assert all(not torch.equal(history[0][key], one[key]) for key in weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_two_ranks_equal_one_process_with_the_joint_batch(ranks, name):
    state, (_, stats) = ranks[0][1][name]
    joint, (history, expected) = train(
        name, [torch.cat([batch(step, rank) for rank in (0, 1)]) for step in range(STEPS)]
    )
    for key in joint:
        torch.testing.assert_close(state[key], joint[key], rtol=1e-5, atol=1e-5)
    for a, b in zip(stats, expected):
        for key in b:
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6)
    if "ema_count" in "".join(joint):  # codes did die and were revived
        before = torch.cat([v for h in history for k, v in h.items() if k.endswith("ema_count")])
        assert (before < 0.6).any()


@pytest.mark.slow
def test_gathering_keeps_the_order_of_ranks(ranks):
    for gathered, _ in ranks:
        assert torch.equal(gathered, torch.tensor([0.0, 0, 1, 1, 1])[:, None].expand(5, 3))
