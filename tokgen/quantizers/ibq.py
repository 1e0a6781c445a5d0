"""Index backpropagation quantization: every code is trained at every step (IBQ, arXiv 2412.02692; ETT, arXiv 2505.10562).

A vector's code is the one of the largest inner product, and the softmax over all these products takes its place in the
backward pass. Nothing is passed straight through to the encoder; instead the whole codebook moves with it. Facts that the
papers leave open are those of the published code (SEED-Voken).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.quantizers.base import CodeQuantizer, masked_mean
from tokgen.quantizers.search import nearest
from tokgen.quantizers.vq import (
    entropy_backward,
    entropy_of_mean,
    entropy_slope,
    entropy_sums,
    row_chunks,
    softmax_backward,
)


class IBQ(CodeQuantizer):
    """Code of the largest inner product, with the gradient of the softmax (arXiv 2412.02692, sec. 3.2).

    With p = softmax(y C^T) at temperature 1, hard the one-hot code and C the codebook, codes = (hard + p - sg[p]) C: the
    value of a row of C, and gradients through p to both y and every row of C. This is *not* nearest-neighbour search:
    long codes win. Parameter `codebook.weight` (codebook_size, code_dim), drawn from
    N(0, 1).

    Neither the products nor the probabilities of all vectors are ever held at once: forward searches in tiles
    (`nearest`), backward and the entropy term compute the probabilities again in chunks of rows.

    Losses, means over all elements (y is z, projected if code_dim is given, normalised with metric "cosine"):
        quantization: mean (codes - y)^2, with gradients into y, into the chosen rows, and through p into both.
        commitment: beta * mean (sg[row] - y)^2, row = hard C.
        codebook: codebook_weight * mean (row - sg[y])^2.
        entropy: entropy_weight * (sample_weight * mean of H(p_i) - batch_weight * H(mean of p_i)), where
            p_i = softmax(y_i C^T / entropy_temperature), over this rank's batch; present if entropy_weight > 0.

    Args:
        dim: channels of z.
        codebook_size: number of codes K.
        code_dim: channels of the codes; if it differs from `dim`, linear projections lead in and out.
        metric: "dot"; or "cosine", which normalises vectors and codes at every use, and codes at the start (Emu3.5's
            `l2_normalize`).
        beta: weight of the commitment term.
        codebook_weight: of the codebook term. The defaults are those of the published code, which has the paper's weights
            (eq. 10: beta=0.25, codebook_weight=1.0) the other way round.
        entropy_weight, entropy_temperature, sample_weight, batch_weight: of the entropy term.

    Raises:
        ConfigError: a value outside the above.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        code_dim: int | None = None,
        metric: str = "dot",
        beta: float = 1.0,
        codebook_weight: float = 0.25,
        entropy_weight: float = 0.05,
        entropy_temperature: float = 0.01,
        sample_weight: float = 1.0,
        batch_weight: float = 1.0,
    ) -> None:
        super().__init__(dim, code_dim, (codebook_size,))
        if metric not in ("dot", "cosine"):
            raise ConfigError(f"IBQ: metric {metric!r}; expected 'dot' or 'cosine'")
        if not entropy_temperature > 0:
            raise ConfigError(f"IBQ: entropy_temperature {entropy_temperature}; expected a number above 0")
        self.metric, self.beta, self.codebook_weight = metric, beta, codebook_weight
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.sample_weight, self.batch_weight = sample_weight, batch_weight
        self.codebook = nn.Embedding(codebook_size, self.code_dim)  # N(0, 1)
        with torch.no_grad():
            self.codebook.weight.copy_(self.metric_space(self.codebook.weight))

    @classmethod
    def example_options(cls) -> dict[str, dict[str, Any]]:
        return {
            "dot": {"codebook_size": 48},
            "cosine": {"codebook_size": 64, "metric": "cosine", "entropy_temperature": 0.1},
            "projected": {"codebook_size": 100, "code_dim": 4, "entropy_weight": 0.0},
        }

    def metric_space(self, y: Tensor) -> Tensor:
        return F.normalize(y, dim=-1) if self.metric == "cosine" else y

    def assign(self, y: Tensor) -> Tensor:
        return nearest(self.metric_space(y), self.codebook.weight, self.metric)

    def embed(self, ids: Tensor) -> Tensor:
        return self.metric_space(F.embedding(ids, self.codebook.weight).float())

    def train_step(self, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        ids = self.assign(y)
        y, codebook = self.metric_space(y), self.metric_space(self.codebook.weight.float())
        temperature = self.entropy_temperature if self.entropy_weight else None
        codes, each, mean = index_backpropagation(y, codebook, ids, keep, temperature)  # (n, code_dim)
        rows = F.embedding(ids, codebook)  # the same values; gradients into these rows alone
        losses = {
            "quantization": masked_mean((codes - y).square(), keep),
            "commitment": self.beta * masked_mean((rows.detach() - y).square(), keep),
            "codebook": self.codebook_weight * masked_mean((rows - y.detach()).square(), keep),
        }
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * (self.sample_weight * each - self.batch_weight * mean)
        return codes, ids, losses


def index_backpropagation(
    y: Tensor, codebook: Tensor, ids: Tensor, keep: Tensor | None = None, temperature: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `ids` of the codebook with the gradient of (hard + p - sg[p]) C, p = softmax(y C^T), hard = one-hot of ids.

    With g the gradient of the result, a = g C^T and w = p (a - <p, a>): y gets w C, and the codebook gets w^T y, dense,
    and g in the chosen rows. The entropies of q = softmax(y C^T / temperature) go through the same products, so that both
    share them. p and q are computed in chunks of rows (`row_chunks`), in backward once more. Differentiable once.

    Args:
        y: fp32 (n, d).
        codebook: C, fp32 (K, d).
        ids: int64 (n,).
        keep: bool (n,), whose entropies count; None means all.
        temperature: of q; None leaves the entropies out, which are then 0.

    Returns:
        rows (n, d), mean of H(q_i), H(mean of q_i), in nats.
    """
    return _IndexBackpropagation.apply(y, codebook, ids, keep, temperature)


class _IndexBackpropagation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, codebook: Tensor, ids: Tensor, keep: Tensor | None, temperature: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = y.new_zeros(len(codebook))
        each, of_mean = y.new_zeros(()), y.new_zeros(())
        if temperature is not None:
            kept = y if keep is None else y[keep]
            each, mean = entropy_sums(kept, codebook, lambda rows: (rows @ codebook.T).div_(temperature))
            of_mean = entropy_of_mean(mean)
        ctx.save_for_backward(y, codebook, ids, keep, mean)
        ctx.temperature = temperature
        return F.embedding(ids, codebook), each, of_mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, of_each: Tensor, of_mean: Tensor) -> tuple[Tensor | None, ...]:
        y, codebook, ids, keep, mean = ctx.saved_tensors
        grad_y, grad_codebook = torch.empty_like(y), torch.zeros_like(codebook).index_add_(0, ids, grad)
        counts = y.new_ones(len(y), 1) if keep is None else keep[:, None].to(y.dtype)
        scale = counts / ((ctx.temperature or 1.0) * counts.sum().clamp(min=1))  # (n, 1), of the entropies
        with torch.autocast(y.device.type, enabled=False):  # backward may be called under the trainer's
            slope = of_mean * entropy_slope(mean)  # (K,)
            for rows, g, s, into in zip(*(row_chunks(x, codebook) for x in (y, grad, scale, grad_y))):
                logits = rows @ codebook.T  # (rows, K)
                w = softmax_backward(logits.softmax(-1), g @ codebook.T)
                if ctx.temperature is not None:
                    logits.div_(ctx.temperature)
                    w += entropy_backward(logits, of_each, slope).mul_(s)
                torch.mm(w, codebook, out=into)
                grad_codebook.addmm_(w.T, rows)
        return grad_y, grad_codebook, None, None, None
