"""MuonAdamW is two optimizers behind one face."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim._muon import _zeropower_via_newtonschulz

from tokgen.training import muon
from tokgen.training.base import decay_groups
from tokgen.training.checkpoint import Checkpoint
from tokgen.training.muon import MuonAdamW, orthogonalize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(7, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.inner, self.norm, self.output = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 7, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return nn.functional.cross_entropy(self.output(self.norm(self.inner(x))).flatten(0, 1), ids.flatten())


def train(net: Net, *optimizers: torch.optim.Optimizer, steps: int = 4, start: int = 0) -> None:
    for step in range(start, start + steps):
        net(torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(step))).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_groups_part_hidden_matrices_from_the_rest():
    net = Net()
    hidden, decayed, vectors = decay_groups(net, [net.output])
    assert [id(p) for p in hidden["params"]] == [id(net.inner.weight)] and hidden["hidden"]
    assert {id(p) for p in decayed["params"]} == {id(m.weight) for m in (net.embed, net.conv, net.output)}
    assert all(p.ndim == 1 for p in vectors["params"]) and vectors["weight_decay"] == 0
    assert sum(len(g["params"]) for g in (hidden, decayed, vectors)) == len(list(net.parameters()))


def test_steps_are_those_of_the_two_optimizers():
    torch.manual_seed(0)
    ours = Net()
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}
    train(ours, MuonAdamW(decay_groups(ours, [ours.output]), muon_lr=0.03, momentum=0.9, **settings))
    hidden, *rest = decay_groups(theirs, [theirs.output])
    hidden.pop("hidden")
    peer = Muon([hidden], lr=0.03, weight_decay=0.1, momentum=0.9)
    train(theirs, peer, AdamW(rest, **settings))
    inner = id(ours.inner.weight)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        # torch orthogonalizes in bfloat16 on every CPU, and the rest of the net feels the difference from the second step on
        torch.testing.assert_close(a, b, rtol=0.02, atol=4e-3 if id(a) == inner else 2e-3, msg=name)


def test_the_first_step_of_everything_but_hidden_matrices_is_torchs_bit_for_bit():
    torch.manual_seed(0)
    ours = Net()
    theirs = copy.deepcopy(ours)
    train(ours, MuonAdamW(decay_groups(ours, [ours.output]), lr=0.01), steps=1)
    rest = decay_groups(theirs, [theirs.output])[1:]
    train(theirs, AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.01), steps=1)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(a, b) == (name != "inner.weight"), name


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
@pytest.mark.parametrize("half", [False, True])
def test_orthogonalized_matrices(shape, half, monkeypatch):
    """Torch's result up to bfloat16, singular values near one, and the directions of the matrix; on CPUs of either kind."""
    monkeypatch.setattr(muon, "_cpu_multiplies_bfloat16", lambda: half)
    matrix = torch.randn(shape)
    settings = ((3.4445, -4.775, 2.0315), 5, 1e-7)
    found = orthogonalize(matrix, *settings)
    assert found.dtype == (torch.bfloat16 if half else torch.float32)
    found = found.float()
    torch.testing.assert_close(found, _zeropower_via_newtonschulz(matrix, *settings).float(), rtol=0.05, atol=0.02)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ found @ v.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < (0.05 if half else 1e-4)
    if shape != (32, 32):  # the smallest singular values of a square may need more steps
        assert 0.5 < inner.diagonal().min() and inner.diagonal().max() < 1.5


def test_a_saved_run_goes_on_bit_for_bit():
    torch.manual_seed(0)
    whole = Net()
    optimizer = MuonAdamW(decay_groups(whole, [whole.output]), lr=0.01)
    train(whole, optimizer, steps=2)
    again = copy.deepcopy(whole)
    fresh = MuonAdamW(decay_groups(again, [again.output]), lr=0.5, muon_lr=0.5)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [g["lr"] for g in fresh.param_groups] == [0.02, 0.01, 0.01]
    train(whole, optimizer, start=2)
    train(again, fresh, start=2)
    for (name, a), b in zip(whole.named_parameters(), again.parameters()):
        assert torch.equal(a, b), name


def test_a_schedule_moves_every_part():
    net = Net()
    optimizer = MuonAdamW(decay_groups(net, [net.output]), lr=0.01)
    before = copy.deepcopy(net.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    train(net, optimizer, steps=1)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_generator_trains_and_resumes_with_it(code_shards, tmp_path):
    def fit(folder: str, steps: int, **options):
        module = tiny.generator(optimizer=lambda p: MuonAdamW(p, lr=1e-3))
        trainer = tiny.trainer(tmp_path / folder, Checkpoint(), max_steps=steps)
        trainer.fit(module, datamodule=tiny.shards(code_shards), **options)
        return module.generator.state_dict()

    whole = fit("whole", 6)
    fit("half", 3)
    resumed = fit("resumed", 6, ckpt_path=tmp_path / "half/checkpoints/last.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
