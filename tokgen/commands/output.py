"""Pictures and clips that commands write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tokgen.errors import InputError


def check_output(out: str, clips: bool, what: str) -> None:
    """Raises InputError unless pictures (.png) or clips (.png, .gif, .mp4) can be written to `out`; known before the work is done."""
    if Path(out).suffix.lower() not in ((".png", ".gif", ".mp4") if clips else (".png",)):
        kinds = ".png, .gif or .mp4" if clips else ".png"
        raise InputError(f"{what} is written as {kinds}; give --out a name that ends so instead of {out!r}")


def write_pixels(
    pixels: Tensor, out: str, settings: dict[str, Any], columns: int | None = None, fps: float = 8.0
) -> None:
    """Pictures (B, 3, H, W) or clips (B, T, 3, H, W) in [0, 1]; several become a grid, and clips in a .png a row of frames each.

    Args:
        settings: plain data that a .png keeps.
        columns: of the grid; None chooses.
    """
    from tokgen.images import image_grid, write_png

    if pixels.ndim == 4:
        write_png(pixels[0] if len(pixels) == 1 else image_grid(pixels, columns), out, settings)
    elif Path(out).suffix.lower() == ".png":
        write_png(image_grid(pixels.flatten(0, 1), pixels.shape[1]), out, settings)
    else:
        import torch

        from tokgen.trajectories.picture import write_video

        grids = [
            at[0] if len(at) == 1 else image_grid(at, columns) for at in pixels.unbind(1)
        ]  # of each moment, all clips
        frames = torch.stack(grids)
        frames = frames if frames.dtype == torch.uint8 else (frames * 255).round().byte()
        write_video(frames.permute(0, 2, 3, 1).cpu().numpy(), out, fps)
