"""Token-Shuffle (Ma et al. 2025, arXiv 2504.17789): s x s neighbouring image tokens as one position of the transformer.

Between embeddings and blocks, `TokenShuffle` compresses each token from d to d / s^2 channels, lays the tokens of a
window side by side in channels, and fuses them with residual MLP blocks. Between blocks and head, `TokenUnshuffle` does
the mirror image. The transformer then sees s^2 times fewer image positions; the ids of one window are predicted in
parallel, each given all earlier windows.

The paper states neither norm, activation nor hidden width of the fusion blocks; here they are RMSNorm, GELU and d.

Beyond the paper: it draws the ids of a window independently of one another. `WindowHead` draws them one after the other,
each given those before it in its window, at the price of a narrow causal block per id.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.nn.attention import Attention, DecoderBlock, RMSNorm, SwiGLU
from tokgen.nn.linear import Linear
from tokgen.tokens import Grid, Layout


def window_order(layout: Layout, window: int) -> Tensor:
    """Which token positions each window holds, int64 (windows, window^2).

    Windows are in raster order (per frame for video), tokens in raster order inside a window. `window=1` is the identity
    for every layout.

    Raises:
        ConfigError: a window above 1 on a layout that is no grid, or whose height or width it does not divide.
    """
    if window == 1:
        return torch.arange(layout.length)[:, None]
    if window < 1:
        raise ConfigError(f"window is {window}; expected 1 (plain) or a divisor of the grid's height and width")
    if not isinstance(layout, Grid):
        raise ConfigError(f"window={window} needs tokens on a grid, not {layout}; set window to 1")
    if layout.h % window or layout.w % window:
        raise ConfigError(
            f"window={window} does not divide {layout}: its height and width must both be multiples of the window"
        )
    t, h, w = layout.t or 1, layout.h // window, layout.w // window
    order = torch.arange(layout.length).view(t, h, window, w, window)
    return order.permute(0, 1, 3, 2, 4).reshape(t * h * w, window * window)


def to_windows(ids: Tensor, order: Tensor) -> Tensor:
    """Ids (B, N) or (B, N, C) as decoding steps, (B, windows * C, window^2).

    One step holds one codebook of one window; the C codebooks of a window are consecutive steps, so with `window=1` this
    is the order of `Tokens.to_sequence`.
    """
    b, (windows, slots) = ids.shape[0], order.shape
    ids = ids[:, order.flatten()].view(b, windows, slots, -1)
    return ids.transpose(2, 3).reshape(b, -1, slots)


def from_windows(steps: Tensor, order: Tensor, codebooks: int) -> Tensor:
    """The inverse of `to_windows`, always with a codebook dimension; trailing dimensions are kept.

    Args:
        steps: (B, windows * C, window^2, ...).

    Returns:
        (B, N, C, ...) in the layout's own order.
    """
    b, (windows, slots), rest = steps.shape[0], order.shape, steps.shape[3:]
    steps = steps.view(b, windows, codebooks, slots, *rest).transpose(2, 3)  # (B, windows, slots, C, ...)
    return steps.reshape(b, windows * slots, codebooks, *rest)[:, order.flatten().argsort()]


class FusionBlock(nn.Module):
    """f + fc2(GELU(fc1(norm(f)))) at width d."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps)
        self.fc1 = Linear(dim, dim)
        self.fc2 = Linear(dim, dim)

    def forward(self, f: Tensor) -> Tensor:
        return f + self.fc2(F.gelu(self.fc1(self.norm(f))))


class TokenShuffle(nn.Module):
    """(B, S, s^2, d) embeddings of S windows to (B, S, d): compress, concatenate, fuse.

    Args:
        dim: transformer width d, a multiple of window^2.
        window: s.
        blocks: residual MLP blocks n.
        eps: of their norms.
    """

    def __init__(self, dim: int, window: int, blocks: int = 2, eps: float = 1e-5) -> None:
        super().__init__()
        self.compress = Linear(dim, dim // window**2)
        self.fusion = nn.ModuleList(FusionBlock(dim, eps) for _ in range(blocks))

    def forward(self, tokens: Tensor) -> Tensor:
        f = self.compress(tokens).flatten(-2)  # (B, S, s^2, d/s^2) -> (B, S, d)
        for block in self.fusion:
            f = block(f)
        return f


class TokenUnshuffle(nn.Module):
    """(B, S, d) hidden states to the s^2 slots of each window: fuse, split; `expand` then maps each slot back to d.

    `forward` stops before `expand`, because `expand` and the code head are both linear and are cheaper applied as one
    map from d / s^2 channels (see `folded`).
    """

    def __init__(self, dim: int, window: int, blocks: int = 2, eps: float = 1e-5, expand: bool = True) -> None:
        super().__init__()
        self.slots = window**2
        self.fusion = nn.ModuleList(FusionBlock(dim, eps) for _ in range(blocks))
        self.expand = Linear(dim // window**2, dim) if expand else None  # a `WindowHead` has its own

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.fusion:
            hidden = block(hidden)
        return hidden.unflatten(-1, (self.slots, -1))  # (B, S, s^2, d/s^2)

    def folded(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (V, d/s^2) and bias (V,) of head(expand(slot)), for a head weight (V, d)."""
        return head @ self.expand.weight, head @ self.expand.bias


class WindowHead(nn.Module):
    """The ids of one window in order: slot k is predicted from its own state, and from the ids and states before it.

    Args:
        dim: transformer width d.
        window: s.
        width: of the causal blocks over the s^2 slots, a multiple of 16.
        layers: how many.
        eps: of their norms.
    """

    def __init__(self, dim: int, window: int, width: int, layers: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        if width % 16:
            raise ConfigError(f"the window head's width {width} is not a multiple of 16; set window_head_dim")
        heads = max(width // 64, 1)
        if width % heads:
            raise ConfigError(f"the window head's width {width} does not divide into {heads} heads of 64 channels")
        self.slot = Linear(dim // window**2, width)
        self.previous = Linear(dim, width, bias=False)
        self.position = nn.Parameter(torch.zeros(window**2, width))
        self.layers = nn.ModuleList(
            DecoderBlock(Attention(width, heads, eps=eps), SwiGLU(width, 4 * width), width, eps) for _ in range(layers)
        )
        self.norm = RMSNorm(width, eps)
        self.expand = Linear(width, dim)
        self.head_dim = width // heads

    def forward(self, slots: Tensor, previous: Tensor) -> Tensor:
        """What each id is predicted from.

        Args:
            slots: (B, S, k, d / s^2), the first k slots of each window.
            previous: embeddings (B, S, k - 1, d) of the ids of all but the last of them.

        Returns:
            (B, S, k, width).
        """
        b, s, k, _ = slots.shape
        x = self.slot(slots) + self.position[:k]
        x = x + F.pad(self.previous(previous), (0, 0, 1, 0))  # slot 0 has no id before it
        x = x.flatten(0, 1)  # (B S, k, width)
        # slots have learned positions and are not rotated
        still = (
            torch.ones(1, k, self.head_dim // 2, device=x.device),
            torch.zeros(1, k, self.head_dim // 2, device=x.device),
        )
        for layer in self.layers:
            x = layer(x, still)
        return self.norm(x).view(b, s, k, -1)

    def folded(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """As `TokenUnshuffle.folded`."""
        return head @ self.expand.weight, head @ self.expand.bias
