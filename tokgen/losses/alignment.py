"""Global visual alignment of a generator's hidden states (ARRA, Xie et al. 2025, arXiv 2503.07334, section 3.3).

Every position that predicts a code gets a second objective beside cross-entropy: its state in one block, projected, shall
point where a frozen image encoder's embedding z* of the whole picture points,

    f_t = A(h_t),  A = Linear(d -> D), GELU, Linear(D -> D)
    L = 1 - 1/|S| sum over t in S of cos(f_t, z*)          (mean over the batch)

The paper calls these positions <HYBNEXT>, which is no token: nothing is added to the sequence, and projector and encoder
are left behind after training. The form 1 - cos and the mean over positions are those of the authors' code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import InputError


class AlignmentProjector(nn.Module):
    """Hidden states (..., dim) to the space of the encoder's embeddings, (..., target_dim).

    Args:
        dim: width of the generator.
        target_dim: D, a property of the encoder (768 for CLIP ViT-L/14 after its projection).
        hidden: width between the two maps; None is D.
    """

    def __init__(self, dim: int, target_dim: int, hidden: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden or target_dim)
        self.fc2 = nn.Linear(hidden or target_dim, target_dim)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(states)))


def alignment_loss(projected: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cosine, averaged over each picture's positions, then over the pictures; scalar float32 under any autocast.

    A vector of length zero has no direction: its cosine counts as 0, and no gradient comes from it.

    Args:
        projected: float (B, S, D), one projected state per position.
        target: float (B, D), one embedding per picture; no gradient goes to it.
        mask: bool (B, S), True where a position counts; None means all. Pictures without any are left out, and
            without any picture the loss is 0.

    Raises:
        InputError: shapes that do not fit together.
    """
    b, s, width = projected.shape
    if target.shape != (b, width):
        raise InputError(f"embeddings have shape {tuple(target.shape)}; expected {(b, width)}, one for each picture")
    if mask is not None and mask.shape != (b, s):
        raise InputError(f"the mask has shape {tuple(mask.shape)}; expected {(b, s)}, one entry for each position")
    with torch.autocast(projected.device.type, enabled=False):
        cosine = (_unit(projected.float()) * _unit(target.detach().float())[:, None]).sum(-1)  # (B, S)
        if mask is None:
            return 1 - cosine.mean()
        count = mask.sum(1)  # (B,)
        of_picture = 1 - (cosine * mask).sum(1) / count.clamp(min=1)
        return (of_picture * (count > 0)).sum() / (count > 0).sum().clamp(min=1)


def _unit(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x / |x| along the last dimension, and 0 with gradient 0 where |x| is at most `eps`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    zero = norm <= eps
    return (x / norm.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
