"""Muon for hidden matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024, kellerjordan.github.io/posts/muon) on the groups that `decay_groups` marks with
    `hidden`, `torch.optim.AdamW` on embeddings, heads, kernels and vectors.

    One optimizer to the outside: one state dict, one list of groups, each with its own `lr`, so that schedules, checkpoints
    and callbacks need not know. The steps themselves are torch's.

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
