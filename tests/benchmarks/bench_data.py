"""Reading pictures: our shards against torchvision's ImageFolder, both decoding with `torchvision.io.decode_jpeg`."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchvision

from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.pack import pack

IMAGES, SIZE, BATCH, ROUNDS = 1024, 256, 32, 5


def _pictures(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    (folder / "all").mkdir(parents=True)
    for i in range(IMAGES):
        coarse = torch.rand(1, 3, 24, 24, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")[0].clamp(0, 1)
        torchvision.io.write_jpeg((pixels * 255).to(torch.uint8), str(folder / "all" / f"{i:05d}.jpg"), quality=90)
        (folder / "all" / f"{i:05d}.txt").write_text(f"picture {i}")


def _folder_loader(folder: Path) -> torch.utils.data.DataLoader:
    read = lambda path: torchvision.io.decode_jpeg(torchvision.io.read_file(path))  # noqa: E731
    data = torchvision.datasets.DatasetFolder(str(folder), loader=read, extensions=("jpg",))
    return torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=2, drop_last=True)


def _rate(loader) -> float:
    started, n = time.perf_counter(), 0
    for batch in loader:
        n += len(batch["pixels"] if isinstance(batch, dict) else batch[0])
    return n / (time.perf_counter() - started)


def run() -> list[dict]:
    """Images per second of one epoch of 1,024 JPEGs of 256 px with two workers; medians of alternating rounds."""
    ours, peer = [], []
    with tempfile.TemporaryDirectory() as root:
        _pictures(Path(root) / "folder")
        pack(Path(root) / "folder" / "all", Path(root) / "shards", max_samples=256)
        data = ShardsDataModule(
            train=str(Path(root) / "shards"), batch_size=BATCH, num_workers=2, resize="none", image_size=None
        )
        data.setup("fit")
        loaders = data.train_dataloader(), _folder_loader(Path(root) / "folder")
        for _ in range(ROUNDS):
            ours.append(_rate(loaders[0]))
            peer.append(_rate(loaders[1]))
    a, b = statistics.median(ours), statistics.median(peer)
    note = f"{IMAGES} JPEGs of {SIZE} px, shuffled, 2 workers; peer: torchvision DatasetFolder; higher is better"
    return [{"name": "shards", "ours": a, "peer": b, "ratio": a / b, "unit": "img/s", "note": note}]


if __name__ == "__main__":
    print(run())
