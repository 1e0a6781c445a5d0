"""How learnable codes are: bits per code of a small autoregressive model after a fixed budget of training.

A better reconstruction can make a worse generator: what counts there is how well a model can predict the codes. Here a plain
decoder (`tokgen.generators.llama`, no condition, rotary positions along the sequence) is trained on nine tenths of the items
and measured on the rest. The figure depends on the budget, which has a name and belongs to the protocol.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tokgen.errors import ConfigError, InputError
from tokgen.tokens import Layout, Tokens

LOGITS = 2**27  # numbers of logits at a time; a larger batch is cut, and its gradients added up


@dataclass(frozen=True)
class Budget:
    """Sizes and training of the model that learns the codes: AdamW, linear warm-up, then a cosine down to a tenth.

    Args:
        dim, n_layers, n_heads: of the decoder.
        steps, batch_size: updates, and items in each; they are drawn with replacement of epochs, in an order of `seed`.
        lr, warmup, weight_decay: peak rate, steps up to it, decay of matrices.
        held_out: share of the items that the figure is measured on.
    """

    dim: int
    n_layers: int
    n_heads: int
    steps: int
    batch_size: int
    lr: float = 6e-4
    warmup: int = 100
    weight_decay: float = 0.05
    held_out: float = 0.1
    seed: int = 0


BUDGETS = {
    "standard": Budget(dim=512, n_layers=8, n_heads=8, steps=5000, batch_size=64),  # minutes on a GPU
    "short": Budget(dim=192, n_layers=4, n_heads=4, steps=300, batch_size=16),  # minutes on a CPU, for 64 codes
}


def budget_of(name: str) -> Budget:
    """Raises ConfigError for an unknown name."""
    if name not in BUDGETS:
        raise ConfigError(f"learnability={name!r}; expected one of none, {', '.join(BUDGETS)}")
    return BUDGETS[name]


def rows_of(tokens: Tokens) -> Tensor:
    """The ids of a batch as int32 (B, N, C), N the layout's length, -1 where there is no code."""
    ids = tokens.ids if tokens.ids.ndim == 3 else tokens.ids[..., None]  # (B, N, C)
    full = ids.new_full((len(ids), tokens.layout.length, ids.shape[2]), -1)
    full[:, : ids.shape[1]] = ids.masked_fill(~tokens.mask[..., None], -1)
    return full.to("cpu", torch.int32)


def bits_of_codes(
    ids: Tensor, layout: Layout, codebook_sizes: Sequence[int], budget: Budget, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Train the budget's model and measure it.

    Args:
        ids: int32 (items, N, C), -1 where there is no code, in an arbitrary order that is always the same.
        layout: of the tokens; its N positions are predicted in their order.

    Returns:
        "ar_bits_per_code": mean over the codes of items that were held out; where items have different numbers of tokens, the
        prediction of their ends is included. "ar_bits": the sum for an item, on average. "training_bits_per_code": that of the
        last tenth of training, whose difference says how much was learned by heart.

    Raises:
        InputError: fewer than ten items.
    """
    from tokgen.generators.llama import LlamaConfig, LlamaGenerator

    held = int(len(ids) * budget.held_out)
    if held < 1 or len(ids) - held < 1:
        raise InputError(f"learnability was asked for, and {len(ids)} items are too few to hold some out; give more")
    ragged = bool((ids < 0).any())
    config = LlamaConfig(
        layout=layout.to_dict(), codebook_sizes=tuple(codebook_sizes), condition="class", num_classes=1, caption_dropout=0.0,
        dim=budget.dim, n_layers=budget.n_layers, n_heads=budget.n_heads, qk_norm=True, ends=ragged,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget.seed)
        model = LlamaGenerator(config).to(device)
    model.train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": budget.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=budget.lr, betas=(0.9, 0.95))
    rows = max(1, LOGITS // (ids.shape[1] * sum(codebook_sizes)))
    training, late = ids[held:], [0.0, 0]
    order = _epochs(len(training), budget)
    for step in range(budget.steps):
        for group in optimizer.param_groups:
            group["lr"] = budget.lr * _rate(step, budget)
        items = training[[next(order) for _ in range(budget.batch_size)]]
        total = sum(int(_counted(model, part)) for part in items.split(rows))
        nats = 0.0
        for part in items.split(rows):
            loss = _sum_of_nats(model, part, device)
            (loss / total).backward()
            nats += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= budget.steps - max(1, budget.steps // 10):
            late[0] += nats
            late[1] += int((items >= 0).sum())
    model.eval()
    with torch.no_grad():
        nats = sum(float(_sum_of_nats(model, part, device)) for part in ids[:held].split(rows))
    codes = int((ids[:held] >= 0).sum())
    return {
        "ar_bits_per_code": nats / math.log(2) / codes,
        "ar_bits": nats / math.log(2) / held,
        "training_bits_per_code": late[0] / math.log(2) / late[1],
    }


def details_of(budget_name: str) -> dict[str, Any]:
    """What the protocol says of a budget."""
    return {"budget": budget_name, **asdict(budget_of(budget_name))}


def _rate(step: int, budget: Budget) -> float:
    if step < budget.warmup:
        return (step + 1) / budget.warmup
    done = (step - budget.warmup) / max(1, budget.steps - budget.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _epochs(items: int, budget: Budget) -> Iterator[int]:
    generator = torch.Generator().manual_seed(budget.seed)
    while True:
        yield from torch.randperm(items, generator=generator).tolist()


def _counted(model: Any, items: Tensor) -> Tensor:
    return model.counted(items[..., 0] >= 0)


def _sum_of_nats(model: Any, items: Tensor, device: torch.device | str) -> Tensor:
    """Summed cross-entropy of items int32 (b, N, C)."""
    items = items.to(device).long()
    mask = items[..., 0] >= 0  # (b, N)
    width = int(mask.sum(1).max()) if model.end is not None else items.shape[1]
    labels = torch.zeros(len(items), 1, dtype=torch.int64, device=items.device)
    ids = items[:, :width].clamp(min=0)
    out = model(labels, torch.ones_like(labels, dtype=torch.bool), ids, mask[:, :width])
    return out.losses["ce"] * model.counted(mask)
