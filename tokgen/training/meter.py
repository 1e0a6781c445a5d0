"""Bytes and floating-point operations of whatever runs, counted as it runs; works on tensors without memory too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tokgen.errors import ConfigError
from tokgen.training.muon import MuonAdamW


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# what torch's own table leaves out: the CPU's kernels of the same attention
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, their peak, and floating-point operations (two for a multiply-add).

    Values that a program reads have to be made up: False of an `any`, which looks for what is wrong, else True; `integer`; 0.5. What selects by value selects everything.
    """

    def __init__(self, integer: int = 1) -> None:
        super().__init__()
        self.integer = integer
        self.alive = self.peak = self.flops = 0
        self._known: dict[int, Any] = {}

    def watch(self, value: Any) -> None:
        """Count the storages of the tensors in `value` until they are freed."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = id(storage)
                if key not in self._known:
                    size = storage.nbytes()
                    self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._freed(key, size))
                    self.alive += size
        self.peak = max(self.peak, self.alive)

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._overloadpacket
        aten = torch.ops.aten
        if name is aten._local_scalar_dense:
            dtype = args[0].dtype
            if dtype == torch.bool:
                return not getattr(args[0], "any_of", False)
            return 0.5 if dtype.is_floating_point else self.integer
        if name is aten.nonzero:
            out = args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        elif name is aten.masked_select:
            out = args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
        elif name in (aten._unique2, aten.unique_dim, aten.unique_consecutive):
            ids = args[0].flatten()
            out = (torch.empty_like(ids), torch.empty_like(ids), torch.empty_like(ids))
        elif name is aten.bincount:
            count = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            out = args[0].new_empty(max(count, 1))
        elif name is aten.index and any(i is not None and i.dtype == torch.bool for i in args[1]):
            out = _select_everything(args[0], args[1])
        else:
            out = func(*args, **kwargs)
        if name is aten.any:
            out.any_of = True
        count = _CPU_ATTENTION.get(name)
        if count is not None:
            shapes = [a.shape if isinstance(a, Tensor) else a for a in args]
            self.flops += count(*shapes)
        elif name in flop_registry:
            self.flops += flop_registry[name](*args, **kwargs, out_val=out)
        self.watch(out)
        return out


def _select_everything(x: Tensor, indices: Iterable[Tensor | None]) -> Tensor:
    """x[indices] as if all masks were True."""
    whole: list[Tensor | None] = []
    for i in indices:
        if i is not None and i.dtype == torch.bool:
            whole += [i.new_empty(i.numel(), dtype=torch.int64) for _ in range(i.ndim)]
        else:
            whole.append(i)
    return torch.ops.aten.index(x, whole)


def state_bytes(optimizer: Any, trained: set[int]) -> int:
    """Bytes of an optimizer's states of the parameters with these `id`s, by its kind.

    Raises ConfigError for a kind whose states are not known.
    """
    if isinstance(optimizer, MuonAdamW):
        return sum(state_bytes(part, trained) for part in optimizer.parts)
    total = 0
    for group in optimizer.param_groups:
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):  # two moments; the greatest second one
            copies = 3 if group["amsgrad"] else 2
        elif isinstance(optimizer, (torch.optim.Muon, torch.optim.SGD)):
            copies = 1 if group["momentum"] else 0
        else:
            raise ConfigError(
                f"the states of {type(optimizer).__name__} are not known; plan with AdamW, Adam, SGD, Muon or MuonAdamW"
            )
        total += copies * bytes_of(p for p in group["params"] if id(p) in trained)
    return total


def bytes_of(tensors: Iterable[Any]) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)}.values())
