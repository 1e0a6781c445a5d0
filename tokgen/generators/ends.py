"""Items that end by themselves: as many positions as the picture or clip needs, and then an end.

LaVIT keeps as many places of a picture as it needs (Jin et al. 2024, arXiv 2309.04669, section 3.1), a tokenizer of
trajectories as many as a clip has. A generator of such codes draws positions until it draws the end, which is one class more
of the first codebook: a position begins with its first code, and there an end may stand in its place. Of an item of three
positions of two codebooks, a0 b0 … a2 b2, in a layout of at most N:

    step      0    1    2    3    4    5    6    7 …
    codebook  a    b    a    b    a    b    a    b …
    target    a0   b0   a1   b1   a2   b2   end  nothing counts

An item of all N positions has no end: nothing else could follow. An item has at least one position. The other codebooks, and the
order of codebooks in a position, are as they are without ends, so nothing malformed can be drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokgen.generators.llama import LlamaGenerator

IGNORED = -100  # a target that counts nothing
DRAW = -1  # of a given id: this one is drawn
DRAW_OR_END = -2  # likewise, and the item may end here
COMPILED_CODEBOOKS = 8  # as many versions of one function as torch.compile keeps


class End(nn.Module):
    """The end's row of the first codebook's head.

    A parameter of its own, so that weights of a generator without ends fit all the rest.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, slots: Tensor) -> Tensor:
        """float32 logits (..., 1) of what the codes are predicted from (..., channels)."""
        return F.linear(slots, self.weight[None].to(slots.dtype)).float()


# -- training -----------------------------------------------------------------------------------------------------------


def with_room(ids: Tensor, keep: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Ids (B, N, C) and mask (B, N) of a batch with one position more for the end of its longest item, if `most` leaves one.

    Raises:
        InputError: no position, more than `most`, or a real one after one that is none.
    """
    n = ids.shape[1]
    if not 1 <= n <= most:
        raise InputError(f"code_ids have {n} positions; expected 1 to {most}")
    if bool((keep[:, 1:] & ~keep[:, :-1]).any()):
        raise InputError("the mask has a real position after one that is none; with ends the real ones come first")
    return (F.pad(ids, (0, 0, 0, 1)), F.pad(keep, (0, 1))) if n < most else (ids, keep)


def code_targets(ids: Tensor, keep: Tensor, end: int | None) -> list[Tensor]:
    """What each position shall predict: int64 (B, N) for each codebook, `IGNORED` where nothing counts.

    Args:
        ids: int64 (B, N, C).
        keep: bool (B, N), True where ids count.
        end: class of the end, in the first codebook's target after the last real position; None for none. An item without
            any position counts nothing.
    """
    targets = [column.masked_fill(~keep, IGNORED) for column in ids.unbind(-1)]
    if end is not None:
        after = F.pad(keep, (1, 0))[:, :-1] & ~keep
        targets[0] = targets[0].masked_fill(after, end)
    return targets


def code_losses(
    logits: Sequence[Tensor], targets: Sequence[Tensor], label_smoothing: float, z_loss: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Cross-entropy and z-loss, means over all that counts, and the share of it that is predicted right.

    Args:
        logits: float32 (B, N, K) of each codebook.
        targets: see `code_targets`.
    """
    count = sum((t != IGNORED).sum() for t in targets)
    losses = {
        "ce": sum(
            F.cross_entropy(l.flatten(0, 1), t.flatten(), reduction="sum", label_smoothing=label_smoothing)
            for l, t in zip(logits, targets)
        )
        / count
    }
    if z_loss:
        squares = sum((l.logsumexp(-1).square() * (t != IGNORED)).sum() for l, t in zip(logits, targets))
        losses["z_loss"] = z_loss * squares / count
    with torch.no_grad():
        accuracy = sum((l.argmax(-1) == t).sum() for l, t in zip(logits, targets)) / count
    return losses, accuracy


def together(logits: Sequence[Tensor]) -> Tensor:
    """Logits (B, N, K) of each codebook as (B, N, C, max K), -inf beyond a codebook's; those of one as they are."""
    widest = max(l.shape[-1] for l in logits)
    padded = [F.pad(l, (0, widest - l.shape[-1]), value=-math.inf) for l in logits]
    return torch.stack(padded, 2) if len(logits) > 1 else logits[0]


# -- drawing ------------------------------------------------------------------------------------------------------------


def check_drawing(model: LlamaGenerator, speculative: int, compile: bool) -> None:
    """Raise ConfigError for ways of drawing that items of different lengths do not have."""
    if speculative > 1:
        raise ConfigError(
            f"speculative={speculative} draws items of one length; this generator's end by themselves, leave it at 1"
        )
    codebooks = len(model.codebook_sizes)
    if compile and codebooks > COMPILED_CODEBOOKS:
        raise ConfigError(
            f"compile=True would make one graph for each of {codebooks} codebooks, and {COMPILED_CODEBOOKS} is the most; "
            "leave compile off"
        )


def open_ends(ids: Tensor) -> Tensor:
    """Given ids (B, N, C), `DRAW` where one is drawn, with `DRAW_OR_END` where the item may end instead.

    That is after its first position, and not before its last given one.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    last = ((ids != DRAW).any(-1) * (place + 1)).amax(1).clamp(min=1)  # (B,), positions that it has in any case
    first_code = torch.arange(ids.shape[2], device=ids.device) == 0
    return ids.masked_fill((place >= last[:, None])[..., None] & first_code, DRAW_OR_END)


class Endings:
    """Which items of a batch have ended, as they are drawn; of a generator without ends, none.

    Attributes:
        lengths: int64 (B,), positions of each item; all of the layout's until its end was drawn.
        over: whether all have ended.
    """

    def __init__(self, model: LlamaGenerator, items: int, device: torch.device) -> None:
        self.end = None if model.end is None else model.codebook_sizes[0]
        self.codebooks = len(model.codebook_sizes)
        self.lengths = torch.full((items,), model.layout.length, device=device)
        self.over = False

    def take(self, drawn: Tensor, step: int) -> Tensor:
        """Note the ends among the ids (B, 1, 1) of a step; gives the ids that stay, 0 where an item has ended.

        Without ends these are the ids (B, steps, slots) themselves.
        """
        if self.end is None:
            return drawn
        position, codebook = divmod(step, self.codebooks)
        if codebook == 0:
            ends = drawn[:, 0, 0] == self.end
            self.lengths = torch.where(ends, self.lengths.clamp(max=position), self.lengths)
            self.over = bool((self.lengths <= position).all())
        return drawn.masked_fill((self.lengths <= position)[:, None, None], 0)

    def cut(self, ids: Tensor) -> Tensor:
        """Ids (B, N, C) with `DRAW` after each item's end."""
        if self.end is None:
            return ids
        after = torch.arange(ids.shape[1], device=ids.device) >= self.lengths[:, None]
        return ids.masked_fill(after[..., None], DRAW)
