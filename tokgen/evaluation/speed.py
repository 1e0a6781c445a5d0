"""How long it takes: milliseconds for a sample, and the machine that they were measured on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Watch:
    """Mean milliseconds for a sample; the first batch of each kind counts only where there is no other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, Tensor] = {}  # seconds and samples of the first batch, and of the others

    def __call__(self, name: str, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        made = work(*arguments, **named)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        spent = torch.tensor([time.perf_counter() - started, len(made)], dtype=torch.float64)
        if name in self.times:
            self.times[name][1] += spent
        else:
            self.times[name] = torch.stack([spent, torch.zeros_like(spent)])
        return made

    def state(self) -> dict[str, Tensor]:
        return self.times

    def merge(self, state: Mapping[str, Tensor]) -> None:
        for name, times in state.items():
            self.times[name] = self.times.get(name, 0) + times

    def result(self) -> dict[str, float]:
        found = {}
        for name in ("encode_ms", "decode_ms"):
            if name in self.times:
                seconds, samples = next(row for row in self.times[name].flip(0).tolist() if row[1])
                found[name] = 1000 * seconds / samples
        return found


def machine(device: torch.device, batch_size: int) -> dict[str, Any]:
    """What times depend on, for their protocol."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    return {"device": name, "batch size": batch_size}
