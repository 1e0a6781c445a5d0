"""What the tests run in two processes, and in one to compare: `both`, and `on_ranks` for any work."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch

from tokgen.training.alignment import Alignment
from tokgen.training.base import Schedule
from tokgen.training.callbacks import SampleGrid
from tokgen.training.checkpoint import Checkpoint
from tokgen.training.ema import EMA
from tokgen.training.sharding import FullyShardedStrategy


def autoencoder(world: int, folder: Path, out: Path) -> None:
    """The same 8 pictures a step, in any number of processes; SGD, so that differences stay differences."""
    sgd = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    module = tiny.autoencoder(
        tokenizer=tiny.tokenizer({**tiny.EMA_VQ, "kmeans_init": False, "revive_below": 0.0}),
        disc_start=3, disc_train_from=2, disc_norm="group", adaptive=True, adaptive_max=10.0, lecam_weight=0.1,
        optimizer=sgd, disc_optimizer=sgd, clip=0.5, accumulate=1,
    )  # fmt: skip

    class Data(tiny.L.LightningDataModule):
        def train_dataloader(self):
            rank = self.trainer.global_rank
            subset = torch.utils.data.Subset(tiny.Pixels(64), range(rank, 64, world))
            return torch.utils.data.DataLoader(subset, 8 // world, shuffle=False)

    strategy = "auto" if world == 1 else "ddp"
    trainer = tiny.trainer(out, EMA(0.9), devices=world, strategy=strategy, max_epochs=1)
    trainer.fit(module, datamodule=Data())
    flat = torch.cat([v.detach().double().flatten() for v in module.state_dict().values()])
    if world > 1:
        both = [torch.zeros_like(flat) for _ in range(world)]
        torch.distributed.all_gather(both, flat)
        assert torch.equal(both[0], both[1]), "ranks differ"
    if trainer.is_global_zero:
        torch.save(flat, out / f"autoencoder{world}.pt")


def generator(world: int, folder: Path, out: Path) -> None:
    """Split over two processes (FSDP2) against one process with the double batch; pictures are drawn at validation."""
    data = FixedBatches(folder, world)
    settings = {"token_dropout": 0.0, "caption_dropout": 0.0}

    def fit(steps: int, ckpt_path: Path | None) -> None:
        module = tiny.generator(
            config=settings, schedule=Schedule(50, kind="constant"),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), visual_tokenizer=str(folder.parent / "visual"),
        )  # fmt: skip
        trainer = tiny.trainer(
            out / f"generator{world}", EMA(0.5), SampleGrid(prompts=["count from 1"]), Checkpoint(), devices=world,
            strategy="auto" if world == 1 else FullyShardedStrategy(), max_steps=steps, val_check_interval=3,
        )  # fmt: skip
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)

    fit(4, None)
    fit(6, out / f"generator{world}" / "checkpoints" / "last.ckpt")


def aligned(world: int, folder: Path, out: Path) -> None:
    """With a projector beside the generator: split (FSDP2), or copied (DDP), against one process; saved, and resumed."""
    sgd = lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)  # noqa: E731
    for name in ("one",) if world == 1 else ("ddp", "fsdp"):
        for steps, ckpt_path in ((2, None), (4, out / name / "checkpoints" / "last.ckpt")):
            module = tiny.generator(
                config={"token_dropout": 0.0, "caption_dropout": 0.0}, optimizer=sgd, alignment=Alignment(weight=0.5)
            )
            strategy = FullyShardedStrategy() if name == "fsdp" else "auto" if name == "one" else name
            options = {"devices": world, "strategy": strategy, "max_steps": steps, "val_check_interval": 2}
            trainer = tiny.trainer(out / name, EMA(0.5), Checkpoint(), **options)
            trainer.fit(module, datamodule=FixedBatches(folder, world), ckpt_path=ckpt_path)


def staged(name: str, world: int, folder: Path, out: Path) -> None:
    """The stages of a SEED or of a LaVIT; each rank has a half of the batch, and validates its part of 3 pictures."""
    # draws differ between ranks by design: no dropout, all 16 places are kept, and no k-means
    codebook = {"type": "vq", "codebook_size": 64, "metric": "sphere", "update": "ema"}
    lavit = [tiny.Stage("features", 2, freeze=("selector",)), tiny.Stage("codebook", 3, freeze=("selector",))]
    kind, plain, stages = {
        "contrast": ("seed", {"dropout": 0.0}, [tiny.Stage("contrastive", 3), tiny.Stage("pixels", 1)]),
        "seed": ("seed", {"dropout": 0.0}, [tiny.Stage("codebook", 3), tiny.Stage("pixels", 3)]),
        "lavit": (
            "lavit",
            {"fixed_keep": 16, "threshold": None, "quantizer": codebook},
            [*lavit, tiny.Stage("pixels", 1)],
        ),
    }[name]
    sgd = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)  # noqa: E731
    module, record = tiny.staged(kind, folder / "eye", stages, plain, optimizer=sgd), tiny.Record()
    trainer = tiny.trainer(
        out / f"{name}{world}", Checkpoint(), record, devices=world, strategy="auto" if world == 1 else "ddp",
        max_steps=module.schedule.total_steps, val_check_interval=2,
    )  # fmt: skip
    trainer.fit(module, datamodule=FixedPictures(folder, world))
    flat = torch.cat([v.detach().double().flatten() for v in module.state_dict().values()])
    if world > 1:
        both = [torch.zeros_like(flat) for _ in range(world)]
        torch.distributed.all_gather(both, flat)
        assert torch.equal(both[0], both[1]), "ranks differ"
    if trainer.is_global_zero:
        rows = [{k: v for k, v in row.items() if "per_second" not in k} for row in record.rows]
        torch.save({"weights": module.state_dict(), "rows": rows}, out / f"{name}{world}.pt")


def end_to_end(world: int, folder: Path, out: Path) -> None:
    """A tokenizer tuned by a language model: the projector first, then all parts; each rank has a half of the batch."""
    from tokgen.training.autoencoder import AutoencoderLoss
    from tokgen.training.end_to_end import EndToEndModule, TuningStage

    sgd = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)  # noqa: E731
    terms = {"perceptual": "none", "disc_channels": 8, "disc_layers": 1, "disc_norm": "group", "disc_start": 0}
    torch.manual_seed(0)
    module, record = EndToEndModule(
        # entropies of halves of a batch are not those of the whole
        tiny.tokenizer({"type": "ibq", "codebook_size": 32, "entropy_weight": 0.0}),
        [TuningStage("alignment", 2, train=("projector", "lm")), TuningStage("semantic", 3)],
        {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16}, tiny.Text(vocab_size=290), max_text=16,
        loss=AutoencoderLoss(**terms), optimizer=sgd, disc_optimizer=sgd,
    ), tiny.Record()  # fmt: skip
    trainer = tiny.trainer(
        out / f"end_to_end{world}", Checkpoint(), record, devices=world, strategy="auto" if world == 1 else "ddp",
        max_steps=5, val_check_interval=2,
    )  # fmt: skip
    trainer.fit(module, datamodule=FixedPictures(folder, world))
    flat = torch.cat([v.detach().double().flatten() for v in module.state_dict().values()])
    if world > 1:
        both = [torch.zeros_like(flat) for _ in range(world)]
        torch.distributed.all_gather(both, flat)
        assert torch.equal(both[0], both[1]), "ranks differ"
    if trainer.is_global_zero:
        rows = [{k: v for k, v in row.items() if "per_second" not in k} for row in record.rows]
        torch.save({"weights": module.state_dict(), "rows": rows}, out / f"end_to_end{world}.pt")


class FixedPictures(tiny.ShardsDataModule):
    """8 pictures a step in the order of the shards, whatever the number of processes."""

    def __init__(self, folder: Path, world: int) -> None:
        pictures = {"image_size": tiny.SIZE, "batch_size": 8}
        super().__init__(train=str(folder / "images" / "train"), val=str(folder / "images" / "val"), **pictures)
        self.folder, self.processes = folder, world

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        whole = tiny.ShardsDataModule(val=str(self.folder / "images" / "train"), batch_size=48, image_size=tiny.SIZE)
        batch = next(iter(whole.val_dataloader()))
        samples = [{k: batch[k][i] for k in ("pixels", "caption")} for i in range(48)]
        mine = samples[self.trainer.global_rank :: self.processes]
        return torch.utils.data.DataLoader(mine, 8 // self.processes, shuffle=False)


class FixedBatches(tiny.ShardsDataModule):
    """8 samples a step in the order of the shards, whatever the number of processes."""

    def __init__(self, folder: Path, world: int) -> None:
        super().__init__(train=str(folder / "train"), val=str(folder / "val"), batch_size=5)
        self.folder, self.processes = folder, world

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        whole = tiny.ShardsDataModule(val=str(self.folder / "train"), batch_size=48)
        whole.setup("validate")
        batch = next(iter(whole.val_dataloader()))
        samples = [
            {k: v[i] for k, v in batch.items() if k in ("ids", "mask", "caption", "embedding")} for i in range(48)
        ]
        mine = samples[self.trainer.global_rank :: self.processes]
        return torch.utils.data.DataLoader(mine, 8 // self.processes, shuffle=False)


class FixedSamples(tiny.ShardsDataModule):
    """8 samples a step in the order of the shards, 24 in all, whatever the number of processes; of any kind of shards."""

    def __init__(self, folder: Path, world: int, **options: Any) -> None:
        super().__init__(train=str(folder / "train"), val=str(folder / "val"), batch_size=3, **options)
        self.folder, self.processes, self.options = folder, world, options

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        whole = tiny.ShardsDataModule(val=str(self.folder / "train"), batch_size=24, **self.options)
        batch = next(iter(whole.val_dataloader()))
        samples = [{k: v[i] for k, v in batch.items() if k != "valid"} for i in range(24)]
        mine = samples[self.trainer.global_rank :: self.processes]
        return torch.utils.data.DataLoader(mine, 8 // self.processes, shuffle=False)


def outcome(trainer: Any, record: tiny.Record, path: Path) -> None:
    """Write weights and log to `path`; the weights must be the same on all ranks."""
    module = trainer.lightning_module
    flat = torch.cat([v.detach().double().flatten() for v in module.state_dict().values()])
    if trainer.world_size > 1:
        each = [torch.zeros_like(flat) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(each, flat)
        assert all(torch.equal(each[0], other) for other in each), "ranks differ"
    if trainer.is_global_zero:
        rows = [{k: v for k, v in row.items() if "per_second" not in k} for row in record.rows]
        torch.save({"weights": module.state_dict(), "rows": rows}, path)


def on_ranks(work: Callable[..., None], world: int, folder: Path, *args: Any) -> None:
    """Call `work(world, folder, *args)` in `world` processes that Lightning takes for those of torchrun.

    They are forked from a server that has imported everything and trained nothing: after a backward pass a process cannot
    be forked. Raises AssertionError with what a rank raised.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mark = folder / f"ranks-{time.time_ns()}"
    mark.mkdir(parents=True)
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["tokgen.training.lightning_cli"])
    ranks = [fork.Process(target=_rank, args=(r, world, port, mark, work, folder, args)) for r in range(world)]
    try:
        for rank in ranks:
            rank.start()
        end = time.monotonic() + 500
        while any(rank.is_alive() for rank in ranks) and not any(mark.glob("failed-*")):
            assert time.monotonic() < end, "ranks hang"
            time.sleep(0.05)
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()
    failures = [path.read_text() for path in mark.glob("failed-*")]
    assert not failures, "\n".join(failures)
    assert len(list(mark.glob("done-*"))) == world, [rank.exitcode for rank in ranks]


def _rank(rank: int, world: int, port: int, mark: Path, work: Callable[..., None], folder: Path, args: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in names.items()} | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    os.environ.pop("PL_GLOBAL_SEED", None)  # of a run before: with it Lightning seeds two processes anew, and one not
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        work(world, folder, *args)
        (mark / f"done-{rank}").touch()
        while not all((mark / f"done-{other}").exists() for other in range(world)):
            time.sleep(0.01)  # a rank that leaves first breaks the connections of the others
    except BaseException:
        (mark / f"failed-{rank}").write_text(f"rank {rank}: {traceback.format_exc()[-4000:]}")
    finally:
        os._exit(0)  # gloo's threads may outlive its group


def both(kind: str, folder: Path, out: Path) -> None:
    """Run a kind of training in one process, and then in two."""
    kinds = {"autoencoder": autoencoder, "generator": generator, "aligned": aligned, "end_to_end": end_to_end}
    for world in (1, 2):
        on_ranks(kinds.get(kind, partial(staged, kind)), world, folder, out)
