"""PatchGAN (Isola et al., arXiv 1611.07004): a convolutional discriminator with one logit per patch."""

from __future__ import annotations

from torch import Tensor, nn

from tokgen.errors import ConfigError


class PatchGAN(nn.Module):
    """Convolutions of kernel 4: `layers` of stride 2, one of stride 1, and one to the logits.

    The keys are `main.{i}.weight`, as in pix2pix, VQGAN and LlamaGen. Normalisation is none on the first layer. Weights
    start at N(0, 0.02), the scales of the normalisation at N(1, 0.02).

    With "batch" under several processes each rank normalises by its own batch; convert with
    `nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)` (the trainer's `sync_batchnorm: true` does) when the batch
    of one rank is small. "group" needs nothing of the kind, and gives the same gradients however a batch is split.

    Args:
        channels: width of the first layer (ndf); doubled at each layer up to 8 times.
        layers: number of stride-2 layers; 3 gives a receptive field of 70 pixels.
        norm: "batch" or "group" (32 groups, or as many as divide the width).
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "batch", in_channels: int = 3) -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise ConfigError(f"unknown normalisation {norm!r} of the discriminator; expected 'batch' or 'group'")
        if layers < 1 or channels < 1:
            raise ConfigError(f"PatchGAN takes at least 1 channel and 1 layer; got {channels} and {layers}")

        def normalise(width: int) -> nn.Module:
            if norm == "batch":
                return nn.BatchNorm2d(width)
            return nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if width % g == 0), width)

        main: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            out = channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            main += [nn.Conv2d(width, out, 4, stride, 1, bias=False), normalise(out), nn.LeakyReLU(0.2)]
            width = out
        main.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*main)
        self.minimum = 3 * 2**layers  # the two stride-1 layers need 3 x 3
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> logits (B, 1, h, w)."""
        if min(pixels.shape[-2:]) < self.minimum:
            raise ConfigError(
                f"a picture of {pixels.shape[-2]} x {pixels.shape[-1]} is too small for this discriminator; it needs "
                f"{self.minimum} x {self.minimum}: use fewer layers"
            )
        return self.main(pixels)
