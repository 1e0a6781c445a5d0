"""Small but whole: shards, tokenizer, modules and trainers that the training tests run."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image

from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.shards import ShardWriter
from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.tokenizers.lavit import LAVIT
from tokgen.tokenizers.seed import SEED
from tokgen.tokenizers.semantic import SemanticTokenizer
from tokgen.tokenizers.vqgan import VQGAN, VQGANConfig
from tokgen.tokens import Grid
from tokgen.training.autoencoder import AutoencoderLoss, AutoencoderModule
from tokgen.training.base import Schedule
from tokgen.training.callbacks import StepSeed
from tokgen.training.captions import Text
from tokgen.training.checkpoint import AtomicCheckpointIO
from tokgen.training.generator import GeneratorModule
from tokgen.training.staged import Stage, StagedModule

SIZE = 16
LAYOUT, CODES = Grid(4, 4), 32


def write_images(folder: Path, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, kind="images", max_samples=12) as writer:
        for i in range(count):
            image = np.full((SIZE, SIZE, 3), rng.integers(0, 255, 3), np.uint8)
            y, x = rng.integers(0, SIZE - 6, 2)
            image[y : y + 6, x : x + 6] = rng.integers(0, 255, 3)
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            writer.write(f"{i:05d}", {"png": buffer.getvalue(), "txt": f"square {i % 7}, flat style"})
    return folder


def write_codes(folder: Path, count: int, seed: int, fingerprint: str = "f" * 16, layout: Grid = LAYOUT) -> Path:
    rng = np.random.default_rng(seed)
    meta = {"tokenizer": fingerprint, "layout": layout.to_dict(), "codebook_sizes": [CODES]}
    with ShardWriter(folder, kind="codes", max_samples=12, meta=meta) as writer:
        for i in range(count):
            ids = (rng.integers(0, 4) + np.arange(layout.length)) % CODES  # each caption's ids can be learned
            buffer = io.BytesIO()
            np.save(buffer, ids)
            variants = json.dumps({"captions": [f"number {i}"]}).encode()
            writer.write(f"{i:05d}", {"npy": buffer.getvalue(), "txt": f"count from {ids[0]}", "json": variants})
    return folder


def tokenizer(quantizer: dict[str, Any] | None = None, dropout: float = 0.0) -> VQGAN:
    quantizer = quantizer or {"type": "vq", "codebook_size": CODES}
    config = VQGANConfig(
        channels=32, channel_mult=(1,), num_res_blocks=1, z_channels=32, code_dim=4, patch=4, dropout=dropout,
        quantizer=quantizer,
    )  # fmt: skip
    return VQGAN(config)


EMA_VQ = {"type": "vq", "codebook_size": CODES, "update": "ema", "kmeans_init": True, "revive_below": 0.5}


def autoencoder(total_steps: int = 100, disc_start: int = 0, seed: int = 0, **settings: Any) -> AutoencoderModule:
    """A module with a discriminator; keyword arguments of `AutoencoderLoss` and `AutoencoderModule` alike."""
    torch.manual_seed(seed)
    terms = {"perceptual": "none", "disc_channels": 8, "disc_layers": 1, "disc_start": disc_start}
    for name in list(settings):
        if name in AutoencoderLoss.__dataclass_fields__:
            terms[name] = settings.pop(name)
    settings.setdefault("tokenizer", tokenizer())
    settings.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))
    settings.setdefault("disc_optimizer", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))
    schedule = settings.pop("schedule", Schedule(total_steps, kind="constant"))
    return AutoencoderModule(schedule=schedule, loss=AutoencoderLoss(**terms), **settings)


def generator(total_steps: int = 100, seed: int = 0, **settings: Any) -> GeneratorModule:
    torch.manual_seed(seed)
    config = {"dim": 32, "n_layers": 2, "n_heads": 2, "max_text": 8, "token_dropout": 0.1, "multiple_of": 16}
    settings.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True))
    settings.setdefault("schedule", Schedule(total_steps, kind="constant"))
    settings.setdefault("text", Text(vocab_size=300))
    return GeneratorModule(config={**config, **settings.pop("config", {})}, **settings)


def eyes(folder: Path, embed_dim: int = 16, seed: int = 5) -> Path:
    """A published contrastive encoder of random weights: the eye of semantic tokenizers, or their teacher."""
    torch.manual_seed(seed)
    encoder = ContrastiveEncoder(ContrastiveConfig(SIZE, 4, 32, 2, 48, 1, 1, embed_dim, 8, 4))
    for p in encoder.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return encoder.save_pretrained(folder)


def semantic(kind: str, encoder: Path, seed: int = 0, **changes: Any) -> SemanticTokenizer:
    """A SEED ("contrastive", "codebook", "pixels") or a LaVIT ("features", "codebook", "pixels") for `write_images`."""
    cls, example = {"seed": (SEED, "text"), "lavit": (LAVIT, "eva")}[kind]
    config = asdict(cls.example_configs()[example])
    painter = {"dim": 32, "heads": 2, "hidden": 64, "depth": 1, "patch": 8}
    config |= {"image_size": SIZE, "encoder": {"pretrained": str(encoder)}, "pixel_decoder": painter, **changes}
    torch.manual_seed(seed)
    return cls(cls.config_class(**config))


def staged(kind: str, encoder: Path, stages: list[Stage], changes: dict[str, Any] | None = None, **settings: Any):
    """A module for `semantic`; the teacher and the vocabulary that a SEED's stages ask for are given."""
    names = {stage.name for stage in stages}
    if kind == "seed" and "codebook" in names:
        settings.setdefault("teachers", {"image_embedding": str(encoder)})
    if kind == "seed" and "init_from" not in settings:
        settings.setdefault("text", Text(vocab_size=280))
    settings.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))
    return StagedModule(semantic(kind, encoder, **(changes or {})), stages, **settings)


class Pixels(torch.utils.data.Dataset):
    """uint8 pictures from their index alone; `bad` of them become NaN."""

    def __init__(self, count: int = 64, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        pixels = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        if i in self.bad:
            return {"pixels": torch.full((3, SIZE, SIZE), float("nan"))}
        return {"pixels": pixels.float() / 255 if self.bad else pixels}


def pixels(batch: int = 4, count: int = 64, bad: tuple[int, ...] = ()) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Pixels(count, bad), batch, shuffle=False)


def shards(folder: Path, batch_size: int = 4, **options: Any) -> ShardsDataModule:
    image_size = SIZE if "images" in str(folder) else None
    return ShardsDataModule(
        train=str(folder / "train"), val=str(folder / "val"), batch_size=batch_size, image_size=image_size, **options
    )


def trainer(run: Path, *callbacks: Any, **options: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(run),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 10**9,
        "plugins": [AtomicCheckpointIO()],
    }
    from tokgen.training.checkpoint import Checkpoint

    options = {**defaults, "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks), **options}
    return L.Trainer(callbacks=[StepSeed(0), *callbacks], **options)


class Record(L.Callback):
    """What was logged, step by step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_record(self, trainer: Any, pl_module: Any, values: dict[str, float]) -> None:
        self.rows.append({"step": pl_module.step, **values})

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]
