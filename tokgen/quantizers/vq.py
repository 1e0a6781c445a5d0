"""Vector quantization: a learned codebook and the nearest code (van den Oord et al. 2017, arXiv 1711.00937).

The codebook is trained by gradient (sec. 3.2) or by exponential moving averages (appendix A.1). `metric="cosine"` is the
quantizer of ViT-VQGAN (arXiv 2110.04627, sec. 3.2) and LlamaGen (arXiv 2406.06525): vectors and codes are l2-normalised
at every use while the weights stay un-normalised. `metric="sphere"` is the quantizer of BEiT v2 (arXiv 2208.06366, sec. 3.1)
and LaVIT (arXiv 2309.04669, eq. 3): the codes themselves are kept on the unit sphere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError
from tokgen.quantizers.base import (
    CodeQuantizer,
    gather_over_ranks,
    masked_mean,
    rank_sizes,
    straight_through,
    sum_over_ranks,
    world_size,
)
from tokgen.quantizers.search import nearest

ENTROPY_CHUNK = 1 << 21  # entries of one block of code probabilities (8 MiB), at least
KMEANS_VECTORS = 256  # vectors per code that the k-means start looks at, at most


class VQ(CodeQuantizer):
    """Nearest code of a learned codebook.

    The codebook is `codebook.weight` (codebook_size, code_dim) in every mode: a parameter with update="gradient", a
    buffer with update="ema". Statistics are over all ranks and replacements are drawn by one rule, so the codebook is
    the same on all ranks by construction. Random draws are seeded by the persistent buffer `codebook.step`; a resumed
    run repeats them.

    Losses, means over all elements (y is z, projected if code_dim is given, normalised unless metric is "l2"):
        codebook: codebook_weight * mean (sg[y] - code)^2; with update="gradient" only.
        commitment: beta * mean (y - sg[code])^2.
        entropy: entropy_weight * (mean of H(p_i) - H(mean of p_i)), p_i = softmax(-|y_i - codes|^2 / entropy_temperature)
            (arXiv 2310.05737, eq. 7, as in LlamaGen), over this rank's batch; present if entropy_weight > 0. Computed in
            chunks, in backward too: memory does not grow with N x K.

    Args:
        dim: channels of z.
        codebook_size: number of codes K.
        code_dim: channels of the codes; if it differs from `dim`, linear projections lead in and out.
        metric: "l2"; "cosine", which normalises vectors and codes at every use; "sphere", which normalises vectors, and codes
            when they are written (start, moving averages, revival), so that stored rows are compared and looked up as they
            are. Only update="ema" writes codes itself: "sphere" needs it. (BEiT v2 averages the normalised means of
            batches; here a code is the normalised average of sums and counts, as with the other metrics.)
        update: "gradient" or "ema".
        beta: weight of the commitment term.
        codebook_weight: of the codebook term. SEED, as taming-transformers' `legacy`, has the paper's weights the other way
            round: beta=1.0, codebook_weight=0.25.
        decay: of the moving averages (codes with update="ema", counts for revival).
        eps: Laplace smoothing of the counts (arXiv 1711.00937, appendix A.1, as in Sonnet). A code without a vector in a
            step keeps its place instead of shrinking towards 0.
        kmeans_init: start the codebook by k-means of the first training batch of all ranks.
        revive_below: at the start of a step, codes whose moving average of vectors per step lies below this move to
            vectors of the batch, and their statistics start again. 0 is off. Uniform use gives N / K, N vectors per
            step over all ranks; 1 % of that is a good value. At most N codes move in one step. With
            update="gradient" the optimizer's moments of these rows stay.
        rotation_trick: gradients pass by rotating and scaling z onto its code (arXiv 2410.06424, sec. 4) instead of
            straight through.
        entropy_weight, entropy_temperature: of the entropy term.

    Raises:
        ConfigError: a value outside the above.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        code_dim: int | None = None,
        metric: str = "l2",
        update: str = "gradient",
        beta: float = 0.25,
        decay: float = 0.99,
        eps: float = 1e-5,
        kmeans_init: bool = False,
        revive_below: float = 0.0,
        rotation_trick: bool = False,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        codebook_weight: float = 1.0,
    ) -> None:
        super().__init__(dim, code_dim, (codebook_size,))
        if metric not in ("l2", "cosine", "sphere") or (metric == "sphere" and update != "ema"):
            raise ConfigError(
                f"VQ: metric {metric!r} with update {update!r}; expected 'l2' or 'cosine', or 'sphere' with update 'ema'"
            )
        if not entropy_temperature > 0:
            raise ConfigError(f"VQ: entropy_temperature {entropy_temperature}; expected a number above 0")
        self.metric, self.beta, self.codebook_weight = metric, beta, codebook_weight
        self.rotation_trick = rotation_trick
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.search = "cosine" if metric == "cosine" else "l2"
        self.codebook = Codebook(codebook_size, self.code_dim, metric, update, decay, eps, kmeans_init, revive_below)

    @classmethod
    def example_options(cls) -> dict[str, dict[str, Any]]:
        small = {"codebook_size": 48}
        return {
            "gradient": small,
            "ema": {**small, "update": "ema", "kmeans_init": True, "revive_below": 0.05},
            "cosine": {"codebook_size": 64, "metric": "cosine", "entropy_weight": 0.1},
            "cosine-ema": {**small, "metric": "cosine", "update": "ema"},
            "sphere": {
                "codebook_size": 40,
                "metric": "sphere",
                "update": "ema",
                "kmeans_init": True,
                "revive_below": 0.05,
            },
            "projected": {"codebook_size": 100, "code_dim": 4, "rotation_trick": True, "revive_below": 0.01},
        }

    def metric_space(self, y: Tensor) -> Tensor:
        return y if self.metric == "l2" else F.normalize(y, dim=-1)

    def assign(self, y: Tensor) -> Tensor:
        return nearest(self.metric_space(y), self.codebook.weight, self.search)

    def embed(self, ids: Tensor) -> Tensor:
        codes = F.embedding(ids, self.codebook.weight).float()
        return self.metric_space(codes) if self.metric == "cosine" else codes

    def train_step(self, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        y = self.metric_space(y)
        codes, ids, losses = self.fit(y, keep)
        return (rotate_to(y, codes) if self.rotation_trick else straight_through(y, codes)), ids, losses

    def fit(self, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A step of training without the estimator: (codes (n, code_dim) detached, ids, losses) of y in metric space."""
        kept = y if keep is None else y[keep]
        self.codebook.prepare(kept)
        ids = nearest(y, self.codebook.weight, self.search)
        codes = self.embed(ids)  # (n, code_dim)

        losses = {"commitment": self.beta * masked_mean((y - codes.detach()).square(), keep)}
        if self.codebook.update == "gradient":
            losses["codebook"] = self.codebook_weight * masked_mean((codes - y.detach()).square(), keep)
        if self.entropy_weight:
            # a copy: the codebook may change in place before backward needs what it was
            weight = self.metric_space(self.codebook.weight.float().clone())
            each, mean = assignment_entropies(kept, weight, self.entropy_temperature)
            losses["entropy"] = self.entropy_weight * (each - mean)

        self.codebook.observe(kept, ids if keep is None else ids[keep])
        return codes.detach(), ids, losses


class Codebook(nn.Module):
    """The codes of `VQ` and what keeps them alive: moving averages, k-means start, revival.

    Attributes:
        weight: (K, d), parameter or (update="ema") buffer.
        ema_count, ema_sum: fp32 (K,), (K, d) moving averages of the number and the sum of the vectors of each code
            (ema_sum with update="ema" only, ema_count with revival too). fp32 even if the module is cast to bf16.
        step: int64, training steps so far; seeds the draws. started: bool, k-means has run.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        metric: str,
        update: str,
        decay: float,
        eps: float,
        kmeans_init: bool,
        revive_below: float,
    ) -> None:
        super().__init__()
        if update not in ("gradient", "ema"):
            raise ConfigError(f"VQ: update {update!r}; expected 'gradient' or 'ema'")
        if not 0 <= decay < 1 or not eps > 0 or revive_below < 0:
            raise ConfigError(
                f"VQ: decay {decay}, eps {eps}, revive_below {revive_below}; expected 0 <= decay < 1, eps > 0, revive_below >= 0"
            )
        self.metric, self.update, self.decay, self.eps = metric, update, decay, eps
        self.kmeans_init, self.revive_below = kmeans_init, revive_below
        # the count of a code that starts, at first or again: it takes log(2) / (1 - decay) unused steps, at least,
        # to fall below the threshold
        self.start_count = max(1.0, 2 * revive_below)

        if metric != "l2":
            weight = F.normalize(torch.randn(size, dim), dim=-1)
        else:
            weight = torch.empty(size, dim).uniform_(-1 / size, 1 / size)
        if update == "gradient":
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("ema_sum", weight * self.start_count)
        if update == "ema" or revive_below:
            self.register_buffer("ema_count", torch.full((size,), self.start_count))
        if kmeans_init or revive_below:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        if kmeans_init:
            self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def _apply(self, fn: Any, recurse: bool = True) -> Codebook:
        # averages that move by 1 % of a step do not move at all in bf16: keep them, and codes made of them, in fp32
        before = {name: buffer for name, buffer in self._buffers.items() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    @torch.no_grad()
    def prepare(self, y: Tensor) -> None:
        """Before the search of a training step: k-means at the first, revival at any. y (n, d): this rank's batch."""
        if not (self.kmeans_init or self.revive_below):
            return
        self.step += 1
        if self.kmeans_init and not self.started:
            if self.start(y):
                return
        if self.revive_below:
            self.revive(y)

    def start(self, y: Tensor) -> bool:
        """Put the codes on the k-means centers of y of all ranks; False if there are no vectors."""
        limit = -(-KMEANS_VECTORS * len(self.weight) // world_size())
        y = gather_over_ranks(y[_draw(len(y), limit, self.generator())] if len(y) > limit else y)
        if not len(y):
            return False
        centers = torch.empty(self.weight.shape, dtype=torch.float32, device=y.device)
        # one rank computes: others may round differently
        if world_size() == 1 or torch.distributed.get_rank() == 0:
            centers = kmeans(y, len(self.weight), self.generator(), "l2" if self.metric == "l2" else "cosine")
        if world_size() > 1:
            torch.distributed.broadcast(centers, 0)
        self.replace(slice(None), centers)
        self.started.fill_(True)
        return True

    def revive(self, y: Tensor) -> None:
        """Move codes that are hardly used to vectors drawn from y of all ranks."""
        dead = (self.ema_count < self.revive_below).nonzero()[:, 0]
        sizes = rank_sizes(len(y), y.device)
        dead = dead[: sum(sizes)]
        if not len(dead):
            return
        drawn = _draw(sum(sizes), len(dead), self.generator()).to(y.device)  # positions in the batch of all ranks
        if world_size() > 1:
            # each rank fills in the vectors it holds; a sum with zeros is exact
            drawn -= sum(sizes[: torch.distributed.get_rank()])
            here = (drawn >= 0) & (drawn < len(y))
            vectors = y.new_zeros(len(dead), y.shape[1])
            vectors[here] = y[drawn[here]]
            vectors = sum_over_ranks(vectors)
        else:
            vectors = y[drawn]
        self.replace(dead, vectors)

    def replace(self, which: Tensor | slice, vectors: Tensor) -> None:
        """Set codes, and let their statistics start again."""
        vectors = self.written(vectors)
        self.weight[which] = vectors.to(self.weight.dtype)
        if self.update == "ema":
            self.ema_sum[which] = vectors * self.start_count
        if self.update == "ema" or self.revive_below:
            self.ema_count[which] = self.start_count

    @torch.no_grad()
    def observe(self, y: Tensor, ids: Tensor) -> None:
        """After the search: moving averages, and with update="ema" the codes, from y (n, d) and ids (n,)."""
        if self.update == "gradient" and not self.revive_below:
            return
        k = len(self.weight)
        counts = torch.bincount(ids, minlength=k).float()  # (K,)
        if self.update == "gradient":
            self.ema_count.lerp_(sum_over_ranks(counts), 1 - self.decay)
            return
        sums = torch.zeros_like(self.ema_sum).index_add_(0, ids, y)  # (K, d)
        both = sum_over_ranks(torch.cat([counts[:, None], sums], 1))
        counts, sums = both[:, 0], both[:, 1:]
        self.ema_count.lerp_(counts, 1 - self.decay)
        self.ema_sum.lerp_(sums, 1 - self.decay)
        total = self.ema_count.sum()
        smoothed = (self.ema_count + self.eps) / (total + k * self.eps) * total
        used = (counts > 0)[:, None]
        self.weight.copy_(torch.where(used, self.written(self.ema_sum / smoothed[:, None]), self.weight))

    def written(self, codes: Tensor) -> Tensor:
        """Codes as they are stored."""
        return F.normalize(codes, dim=-1) if self.metric == "sphere" else codes

    def generator(self) -> torch.Generator:
        """The draws of this step."""
        return torch.Generator().manual_seed(0x746F6B67656E + int(self.step))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}, metric={self.metric}, update={self.update}"


def _draw(n: int, k: int, generator: torch.Generator) -> Tensor:
    """k different numbers below n."""
    return torch.randperm(n, generator=generator)[:k]


def kmeans(y: Tensor, k: int, generator: torch.Generator, metric: str = "l2", iterations: int = 10) -> Tensor:
    """k centers (k, d) of vectors y (n, d), fp32, by Lloyd's algorithm; metric "cosine" gives unit centers.

    A center that loses all its vectors moves to one of the vectors farthest from their centers. With n < k, the centers
    beyond n are vectors with a little noise (1 % of the spread).
    """
    n = len(y)
    centers = y[_draw(n, k, generator).to(y.device)]
    if n < k:
        more = y[torch.randint(n, (k - n,), generator=generator).to(y.device)]
        noise = torch.randn(k - n, y.shape[1], generator=generator).to(y.device)
        spread = (y - y.mean(0)).square().mean().sqrt()
        return torch.cat([centers, more + 0.01 * spread * noise])
    for _ in range(iterations):
        ids = nearest(y, centers, metric)
        counts = torch.bincount(ids, minlength=k)
        sums = torch.zeros_like(centers).index_add_(0, ids, y)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            error = (y - centers[ids]).square().sum(1)
            sums[empty] = y[error.topk(len(empty)).indices]
        centers = sums / counts.clamp(min=1)[:, None]
        if metric == "cosine":
            centers = F.normalize(centers, dim=-1)
    return centers


def assignment_entropies(y: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(mean of H(p_i), H(mean of p_i)) in nats, p_i = softmax(-|y_i - codes|^2 / temperature); fp32 y (n, d), codes (K, d).

    The probabilities are computed in chunks of rows (`row_chunks`), in backward once more: a few blocks exist at a time.
    Differentiable once.
    """
    return _AssignmentEntropies.apply(y, codes, temperature)


class _AssignmentEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        each, mean = entropy_sums(y, codes, lambda rows: _logits(rows, codes, temperature))
        ctx.save_for_backward(y, codes, mean)
        ctx.temperature = temperature
        return each, entropy_of_mean(mean)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_each: Tensor, of_mean: Tensor) -> tuple[Tensor, Tensor, None]:
        y, codes, mean = ctx.saved_tensors
        grad_y, grad_codes = torch.empty_like(y), torch.zeros_like(codes)
        scale = 2 / (ctx.temperature * max(len(y), 1))
        with torch.autocast(y.device.type, enabled=False):  # backward may be called under the trainer's
            slope = of_mean * entropy_slope(mean)
            for rows, into in zip(row_chunks(y, codes), row_chunks(grad_y, codes)):
                grad = entropy_backward(_logits(rows, codes, ctx.temperature), of_each, slope)
                torch.mm(grad, codes, out=into)  # |y|^2 is the same for all codes, and rows of grad sum to 0
                grad_codes.addmm_(grad.T, rows).addcmul_(codes, grad.sum(0)[:, None], value=-1)
        return grad_y.mul_(scale), grad_codes.mul_(scale), None


def _logits(y: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """-|y_i - codes|^2 / temperature, (n, K)."""
    norms = y.square().sum(1, keepdim=True) + codes.square().sum(1)
    return norms.addmm_(y, codes.T, alpha=-2).div_(-temperature)


def row_chunks(y: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    """y (n, d) in views of some rows each, whose probabilities over codes (K, d) may be held at once.

    A block has ENTROPY_CHUNK entries, or a quarter of the codebook's if that is more: thin products are slow, and a
    codebook in training exists four times over.
    """
    return y.split(max(1, ENTROPY_CHUNK // len(codes), codes.shape[1] // 4)) if len(y) else ()


def entropy_sums(y: Tensor, codes: Tensor, logits_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(mean of H(p_i), mean of p_i (K,)) of p_i = softmax(logits_of(rows of y)), in chunks."""
    each, mean = y.new_zeros(()), y.new_zeros(len(codes))
    for rows in row_chunks(y, codes):
        logits = logits_of(rows)  # (rows, K)
        logits.sub_(logits.amax(1, keepdim=True))
        p = logits.softmax(-1)
        mean += p.sum(0)
        # H(p) = log Z - <p, logits>, and the largest p is 1 / Z
        each -= p.amax(1).log().sum() + logits.mul_(p).sum()
    return each / max(len(y), 1), mean / max(len(y), 1)


def entropy_of_mean(mean: Tensor) -> Tensor:
    """H(mean) of probabilities (K,); 1e-5 inside the logarithm as published: codes of probability 0 get a finite gradient."""
    return -(mean * (mean + 1e-5).log()).sum()


def entropy_slope(mean: Tensor) -> Tensor:
    """The derivative of `entropy_of_mean`, (K,)."""
    return -((mean + 1e-5).log() + mean / (mean + 1e-5))


def entropy_backward(logits: Tensor, of_each: Tensor, slope: Tensor) -> Tensor:
    """The gradient of of_each * sum of H(p_i) + <slope, sum of p_i>, p = softmax of logits (n, K), which are overwritten."""
    logits.sub_(logits.amax(1, keepdim=True))
    return softmax_backward(logits.softmax(-1), logits.mul_(-of_each).add_(slope))


def softmax_backward(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient at the logits, p (grad - <p, grad>), of that at p, (n, K); grad is overwritten."""
    return grad.sub_(torch.einsum("nk,nk->n", p, grad)[:, None]).mul_(p)


def rotate_to(y: Tensor, codes: Tensor) -> Tensor:
    """The value of codes with the gradient of the rotation and scaling that carries y to it (arXiv 2410.06424, eq. 4).

    y, codes (n, d). With e = y/|y|, q = codes/|codes|, r = (e+q)/|e+q|: |codes|/|y| * (y - 2 r r'y + 2 q e'y), where all
    but y counts as constant.
    """
    with torch.no_grad():
        tiny = math.sqrt(torch.finfo(y.dtype).tiny)
        norm_y, norm_q = y.norm(dim=1, keepdim=True).clamp(min=1e-6), codes.norm(dim=1, keepdim=True)
        e, q = y / norm_y, codes / norm_q.clamp(min=tiny)
        r = F.normalize(e + q, dim=1)
        scale = norm_q / norm_y
    dot = lambda a: (a * y).sum(1, keepdim=True)  # noqa: E731
    rotated = scale * (y - 2 * r * dot(r) + 2 * q * dot(e))
    return straight_through(rotated, codes)
