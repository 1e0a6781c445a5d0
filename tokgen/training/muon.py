"""Muon for hidden matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim import Muon as TorchMuon


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """U S V' -> about U V' by Newton and Schulz's iteration of degree five, whose singular values end between 0.5 and 1.5.

    In bfloat16, as published; in float32 on CPUs that have no instructions for it, which take many times as long for bfloat16.

    Args:
        matrix: (N, K).
        coefficients, steps, eps: as in `torch.optim.Muon`.
    """
    a, b, c = coefficients
    x = matrix.to(torch.bfloat16 if matrix.device.type != "cpu" or _cpu_multiplies_bfloat16() else torch.float32)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T  # the products of the short side with itself are the small ones
    x = x / x.norm().clamp(min=eps)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    has = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 does not say
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


class Muon(TorchMuon):
    """`torch.optim.Muon` with `orthogonalize` in the place of its own, which is in bfloat16 on every CPU."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(average, momentum)  # Nesterov
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)
        return loss


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) on the groups that `decay_groups` marks with `hidden`,
    `torch.optim.AdamW` on embeddings, heads, kernels and vectors.

    One optimizer to the outside: one state dict, one list of groups, each with its own `lr`, so that schedules, checkpoints
    and callbacks need not know.

    Args:
        params: parameter groups.
        lr, betas, eps, weight_decay: of AdamW. Groups may bring their own weight decay, which holds for both.
        muon_lr: of Muon; the update of a matrix (N, K) is orthogonal, times this and sqrt(max(1, N / K)).
        momentum: of Muon, with Nesterov's step.
        fused: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 3e-4,
        muon_lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        fused: bool | None = None,
    ) -> None:
        groups = [dict(g) for g in params]
        parts: list[Optimizer] = []
        hidden = [g for g in groups if g.get("hidden")]
        if hidden:
            parts.append(Muon(hidden, lr=muon_lr, weight_decay=weight_decay, momentum=momentum))
        others = [g for g in groups if not g.get("hidden")]
        if others:
            parts.append(AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused))
        self.parts = parts
        super().__init__([g for part in parts for g in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        """Make the parts see this optimizer's groups and state, which loading replaces."""
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:stop], self.state
            start = stop

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._join()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
