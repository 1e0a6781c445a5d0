"""Multi-scale residual quantization of a map (VAR, arXiv 2404.02905, algorithm 1; TokenFlow, arXiv 2412.03069, section 3.2).

A map is described from coarse to fine. At every scale what is left of it is averaged down to s x s, quantized, brought up to
the full size and subtracted; the codes of all scales add up to the map. One codebook serves all scales. TokenFlow has no
convolutions after the upsampling, unlike VAR.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokgen.errors import ConfigError, InputError
from tokgen.quantizers.base import CodeQuantizer, Quantized
from tokgen.tokens import Scales


@dataclass
class ScaledCodes(Quantized):
    """A `Quantized` map.

    Attributes:
        codes: (B, s, s, d), s the last scale: the sum over scales.
        ids: (B, N) or (B, N, C), N the sum of s^2, scale after scale, each in raster order; 0 at a scale that was dropped.
        mask: bool (B, N), False at a scale that was dropped.
    """

    mask: Tensor | None = None


class MultiScale(nn.Module):
    """Any quantizer of vectors, as one of square maps. The last scale is the map's own size.

    Losses are means over the scales. Statistics are the quantizer's own over the ids of all scales together, and
    "usage_scale_0", "usage_scale_1", … of each. Resizing is done in fp32 under any autocast: down by area, up by bicubic
    interpolation (align_corners=False), always to the last scale.

    Args:
        quantizer: of vectors (..., d).
        scales: ascending sides.
        dropout: in training, the probability that one scale, never the first, is left out of the batch. The draws are seeded
            by the persistent buffer `step`, so that they are the same on all ranks, which must quantize the same scales
            together, and a resumed run repeats them.

    Raises:
        ConfigError: scales that do not ascend, or a dropout outside [0, 1).
    """

    def __init__(self, quantizer: CodeQuantizer, scales: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        if not scales or list(scales) != sorted(set(scales)) or scales[0] < 1:
            raise ConfigError(f"MultiScale: scales {list(scales)}; expected ascending sides of at least 1")
        if not 0 <= dropout < 1:
            raise ConfigError(f"MultiScale: dropout {dropout}; expected 0 <= dropout < 1")
        self.quantizer, self.scales, self.dropout = quantizer, tuple(scales), dropout
        self.layout = Scales(self.scales)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(self.quantizer.codebook_sizes)

    def forward(self, z: Tensor) -> ScaledCodes:
        """Quantize z (B, s, s, d), s the last scale. In training every rank must call it in every step.

        Raises InputError for a map of another size.
        """
        side = self.scales[-1]
        if z.ndim != 4 or tuple(z.shape[1:3]) != (side, side):
            raise InputError(
                f"MultiScale takes maps (B, {side}, {side}, d), of the side of the last of its scales {list(self.scales)}; "
                f"got {tuple(z.shape)}"
            )
        dropped, columns = self._draw(), (len(self.codebook_sizes),) if len(self.codebook_sizes) > 1 else ()
        ids, mask, losses, stats = [], [], [], {}
        with torch.autocast(z.device.type, enabled=False):
            residual = z.float().permute(0, 3, 1, 2).contiguous()  # (B, d, s, s)
            total = torch.zeros_like(residual)
            for i, s in enumerate(self.scales):
                mask.append(torch.full((len(z), s * s), i != dropped, device=z.device))
                if i == dropped:
                    ids.append(torch.zeros(len(z), s * s, *columns, dtype=torch.int64, device=z.device))
                    continue
                coarse = F.interpolate(residual, (s, s), mode="area").permute(0, 2, 3, 1)  # (B, s, s, d)
                out = self.quantizer(coarse)
                up = self._raised(out.codes)
                total, residual = total + up, residual - up.detach()
                ids.append(out.ids.flatten(1, 2))
                losses.append(out.losses)
                stats[f"usage_scale_{i}"] = out.stats["usage"]
        means = {name: torch.stack([terms[name] for terms in losses]).mean() for name in losses[0]}
        found = ScaledCodes(total.permute(0, 2, 3, 1).to(z.dtype), torch.cat(ids, 1), means, {}, torch.cat(mask, 1))
        found.stats = self.quantizer.usage(found.ids[found.mask]) | stats
        return found

    def _draw(self) -> int | None:
        """The scale that this step leaves out."""
        if not (self.training and self.dropout and len(self.scales) > 1):
            return None
        self.step += 1
        generator = torch.Generator().manual_seed(0x7363616C65 + int(self.step))
        if float(torch.rand((), generator=generator)) >= self.dropout:
            return None
        return int(torch.randint(1, len(self.scales), (), generator=generator))

    def _raised(self, codes: Tensor) -> Tensor:
        """fp32 (B, d, S, S), S the last scale, of codes (B, s, s, d)."""
        codes = codes.float().permute(0, 3, 1, 2).contiguous()
        # always of one memory layout: a map of 1 x 1 comes out in another, and convolutions then round otherwise
        return F.interpolate(codes, (self.scales[-1],) * 2, mode="bicubic", align_corners=False).contiguous()

    def lookup(self, ids: Tensor) -> Tensor:
        """The map (B, S, S, d) of ids (B, n) or (B, n, C) of the first scales, one or more, all at most.

        Raises InputError if n is not the length of a prefix of whole scales.
        """
        return deque(self.progressive(ids), maxlen=1)[0]

    def progressive(self, ids: Tensor) -> Iterator[Tensor]:
        """The maps (B, S, S, d) that the first scale gives, the first two, and so on; see `lookup`."""
        n = ids.shape[1] if ids.ndim > 1 else 0
        if n not in self.layout.prefixes():
            raise InputError(
                f"ids {tuple(ids.shape)} do not end with a scale; whole scales of {list(self.scales)} have "
                f"{', '.join(map(str, self.layout.prefixes()))} ids"
            )
        return self._progressive(ids)

    def _progressive(self, ids: Tensor) -> Iterator[Tensor]:
        total, start = None, 0
        for s, stop in zip(self.scales, self.layout.prefixes()):
            if stop > ids.shape[1]:
                return
            codes = self.quantizer.lookup(ids[:, start:stop].unflatten(1, (s, s)))  # (B, s, s, d)
            with torch.autocast(ids.device.type, enabled=False):
                up = self._raised(codes)
            total, start = up if total is None else total + up, stop
            yield total.permute(0, 2, 3, 1).to(codes.dtype)

    def extra_repr(self) -> str:
        return f"scales={list(self.scales)}, dropout={self.dropout}"
