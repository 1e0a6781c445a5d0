"""Kills real training runs at random moments, resumes them, and compares them with runs that were left alone.

    python -m tests.faults.soak --kills 200 --seed 0

Each life of a run is a process that goes through `tokgen fit ... --ckpt_path auto`. It is forked from this one, which has
imported everything and started no thread, so that a life begins within a second. SIGKILL comes at a moment of one of the
kinds in `MOMENTS`. Then, with nothing running, the run directory is looked at: every checkpoint must read wholly, the
published model must load, the newest step must not have gone back. When a run has come to its end, its losses, checkpoints,
published model and batches must be those of the run that was not killed, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # once here, not in every life
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

import tokgen
from tests.training import tiny
from tests.training.test_resume import RECIPE
from tokgen.files import write_json
from tokgen.training import lightning_cli
from tokgen.training.checkpoint import BEST, LAST, PREVIOUS, _point_at_next_batch, find_last, read_checkpoint

STEPS = 20
HANG = 300.0  # seconds after which a life that neither ends nor comes to its moment is called hanging


class Tap(Callback):
    """Writes one line for every training batch, with its number, step, keys and a hash of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch = state["batch"]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        pixels = hashlib.blake2b(batch["pixels"].numpy().tobytes(), digest_size=8).hexdigest()
        row = {"batch": self.batch, "step": module.step, "keys": batch["key"], "pixels": pixels}
        path = Path(trainer.default_root_dir) / f"batches-{trainer.global_rank}.jsonl"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, (json.dumps(row) + "\n").encode())  # one write, so that a kill leaves the line whole
        os.close(file)
        self.batch += 1


@dataclass(frozen=True)
class Variant:
    """What a run is made of, beside the recipe of `tests/training/test_resume.py`."""

    flags: tuple[str, ...] = ()
    ranks: int = 1


VARIANTS = {
    "plain": Variant(("--checkpoint.every_n_steps=3", "--trainer.val_check_interval=5")),
    "worker": Variant(
        ("--data.num_workers=1", "--checkpoint.every_n_steps=2", "--trainer.val_check_interval=4", "--checkpoint.export=best")
    ),
    "accumulate": Variant(
        ("--model.init_args.accumulate=2", "--checkpoint.every_n_steps=2", "--trainer.val_check_interval=8", "--checkpoint.export=best")
    ),
    "ranks": Variant(
        ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2", "--checkpoint.every_n_steps=3", "--trainer.val_check_interval=5"),
        ranks=2,
    ),
}  # fmt: skip


# -- processes --------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], Any], log: Path) -> int:
    """Start `work` in a process and session of its own, which dies with this one; returns its id."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads run; a fork would copy their locks and not them")
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def status(process: int) -> int | None:
    """None while it runs; then 0, or its exit code or signal."""
    result = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if result is None else result.si_status


def end(process: int) -> int:
    """Kill what `fork` started and all it started itself. Returns the exit code, -9 if a kill was its end."""
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)  # its id stays taken until it is reaped
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def join(rank: int, world: int, port: int) -> None:
    """Make this process a rank as torchrun would."""
    os.environ.update(
        TORCHELASTIC_RUN_ID="soak", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def kill_before(operation: int, places: tuple[str, ...]) -> None:
    """Make this process kill itself just before its n-th rename, link or removal of a path that holds one of `places`."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        paths = [os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike))]
        # within rmtree paths are relative to a folder's descriptor
        if any(place in path for place in places for path in paths) or (event != "os.link" and "/" not in paths[0]):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# -- moments ----------------------------------------------------------------------------------------------------------


@dataclass
class Moment:
    """When to kill: once `come()` is true, `delay` seconds later; or in the life itself, before a file operation."""

    come: Callable[[], bool] = lambda: False
    delay: float = 0.0
    operation: int = 0
    places: tuple[str, ...] = ()


def after(seconds: float) -> Callable[[], bool]:
    due = time.monotonic() + seconds
    return lambda: time.monotonic() >= due


def changes(look: Callable[[], Any], count: int) -> Callable[[], bool]:
    """True once what `look` sees has turned into something else, and not into nothing, `count` times."""
    before, left = look(), count

    def come() -> bool:
        nonlocal before, left
        now = look()
        left -= bool(now) and now != before
        before = now
        return left <= 0

    return come


def names(folder: Path, *marks: str) -> list[str]:
    """Of a folder's entries, those that hold one of `marks`."""
    with contextlib.suppress(FileNotFoundError):
        return [name for name in os.listdir(folder) if any(mark in name for mark in marks)]
    return []


MOMENTS: dict[str, Callable[[random.Random, Path, float, float], Moment]] = {
    # (generator, run directory, seconds to the first step, seconds of a whole life)
    "any time": lambda rng, run, start, whole: Moment(after(rng.uniform(0, whole))),
    "start-up": lambda rng, run, start, whole: Moment(after(rng.uniform(0, start))),
    "a step was logged": lambda rng, run, start, whole: Moment(
        changes(lambda: size(run / "metrics.jsonl"), rng.randint(1, 12)), rng.uniform(0, 0.01)
    ),
    "a checkpoint is being written": lambda rng, run, start, whole: Moment(
        changes(lambda: names(run / "checkpoints", ".tmp-"), rng.randint(1, 5)), rng.uniform(0, 0.01)
    ),
    "a checkpoint is being renamed": lambda rng, run, start, whole: Moment(
        operation=rng.randint(1, 16), places=("/checkpoints/",)
    ),
    "the model is being published": lambda rng, run, start, whole: Moment(
        changes(lambda: names(run, "tokenizer.tmp-"), rng.randint(1, 2)), rng.uniform(0, 0.01)
    ),
    "the published folder is being swapped": lambda rng, run, start, whole: Moment(
        operation=rng.randint(1, 8), places=("/tokenizer",)
    ),
}


# -- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a soak did and found."""

    kills: Counter[str] = field(default_factory=Counter)  # by kind of moment
    met: Counter[str] = field(default_factory=Counter)  # kills that left a run in a state, by state
    lives: int = 0
    runs: int = 0  # brought to their end and compared
    batches: int = 0  # trained on, over all lives
    checks: int = 0
    violations: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class Run:
    """One training run through its lives.

    Args:
        folder: made here; holds `run`, the run directory, and the log of all lives.
        tally: where counts and violations go.
    """

    def __init__(self, folder: Path, shards: Path, variant: str, tally: Tally) -> None:
        folder.mkdir(parents=True)
        self.folder, self.run, self.variant, self.tally = folder, folder / "run", variant, tally
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE.format(shards=shards, steps=STEPS))
        self.newest, self.stalled, self.published = -1, 0, False
        self.first = self.seconds = 0.0  # of the last life: until its first logged step, and in all

    def violated(self, what: str) -> None:
        self.tally.violations.append(f"{self.folder.name} ({self.variant}), life {self.tally.lives}: {what}")

    def log(self) -> str:
        return read(self.folder / "log")[-2000:]

    def check(self, holds: bool, what: str) -> None:
        self.tally.checks += 1
        if not holds:
            self.violated(what)

    def live(self, rng: random.Random | None = None, draw: Callable[[], Moment] = Moment) -> bool | None:
        """Start the run, or go on with it, until the moment that `draw` gives.

        Of several ranks one is killed, as the system would, and the others a little later, as a launcher would.

        Returns:
            True when the run came to its end, False when it was killed, None when it failed, which is a violation.
        """
        variant = VARIANTS[self.variant]
        arguments = ["-c", str(self.recipe), "--run_dir", str(self.run), "--ckpt_path", "auto", *variant.flags]
        arguments += ["--trainer.callbacks+", "tests.faults.soak.Tap"]
        port = free_port() if variant.ranks > 1 else 0
        moment = draw()
        # a run that early kills keep from any progress is left alone until its next checkpoint
        alone = self.stalled >= 3
        progress = changes(lambda: inode(self.run / "checkpoints" / LAST), 1)
        logged = changes(lambda: size(self.run / "metrics.jsonl"), 1)

        def work(rank: int) -> None:
            if variant.ranks > 1:
                join(rank, variant.ranks, port)
            if moment.operation and rank == 0:
                kill_before(moment.operation + 8 * alone, moment.places)
            lightning_cli.run("fit", arguments)

        self.tally.lives += 1
        began, self.first = time.monotonic(), 0.0
        ranks = [fork(lambda rank=rank: work(rank), self.folder / "log") for rank in range(variant.ranks)]
        hangs = False
        while True:
            codes = [status(process) for process in ranks]
            hangs = time.monotonic() - began > HANG
            if hangs or any(codes) or None not in codes:
                break
            if not self.first and logged():
                self.first = time.monotonic() - began
            if alone:
                if progress():
                    alone, moment = False, draw() if not moment.operation else moment
            elif moment.come():
                time.sleep(moment.delay)
                if len(ranks) > 1:
                    os.kill(rng.choice(ranks), signal.SIGKILL)
                    time.sleep(rng.uniform(0, 0.3))
                break
            time.sleep(0.0002)
        self.seconds = time.monotonic() - began
        codes = [end(process) for process in ranks]
        if hangs:
            self.violated(f"neither ended nor came to its moment in {HANG:.0f} s\n{self.log()}")
            return None
        if -signal.SIGKILL in codes:
            return False
        if any(codes):
            self.violated(f"exit code {max(codes)}\n{self.log()}")
            return None
        return True

    # -- what must hold -----------------------------------------------------------------------------------------------

    def inspect(self, other: Run) -> None:
        """After a kill, with nothing running; `other` is the run that was not killed."""
        folder, steps = self.run / "checkpoints", {}
        for name in (LAST, PREVIOUS, BEST):
            if (folder / name).exists():
                problem = ""
                try:
                    steps[name] = read_checkpoint(folder / name)["global_step"]
                    with zipfile.ZipFile(folder / name) as archive:  # reading for training compares no checksums
                        problem = archive.testzip()
                except Exception as error:
                    problem = error
                self.check(not problem, f"{name} is damaged: {problem}")
        try:
            found = find_last(folder)
        except Exception as error:
            self.check(False, str(error))
            return
        self.check((found is None) == (not steps.keys() & {LAST, PREVIOUS}), f"of {list(steps)}, {found} is found")
        step = -1 if found is None else steps.get(found.name, -1)
        self.check(step >= self.newest, f"the newest checkpoint went from step {self.newest} back to {step}")
        self.stalled = self.stalled + 1 if step <= self.newest else 0
        self.newest = max(step, self.newest)

        model, old = self.run / "tokenizer", names(self.run, "tokenizer.old-")
        there = model.exists()
        for whole in [model] if there else [self.run / name for name in old]:
            problem = ""
            try:
                tokgen.load(whole)
            except Exception as error:
                problem = error
            self.check(not problem, f"{whole.name} does not load: {problem}")
        self.check(there or bool(old) or not self.published, "the published model is lost")
        self.published |= there

        settings = read(self.run / "config.yaml").replace(str(self.run), str(other.run))
        self.check(settings in ("", read(other.run / "config.yaml")), "config.yaml is cut")
        lines = read(self.run / "metrics.jsonl").split("\n")
        for number, line in enumerate(lines[:-1]):  # what follows the last newline may be cut
            self.check(is_json(line), f"metrics.jsonl: line {number + 1} is no JSON: {line[:80]!r}")

        self.tally.met += Counter(
            {
                "no checkpoint yet": found is None,
                "a checkpoint's temporary file, half-written or whole": bool(names(folder, ".tmp-")),
                "last.ckpt kept as previous.ckpt, the new one not yet renamed": len(steps) > 1
                and inode(folder / LAST) == inode(folder / PREVIOUS),
                "a published folder being written": bool(names(self.run, "tokenizer.tmp-")),
                "no published folder, the one before under another name": bool(old) and not there,
                "a published folder, and the one before not yet removed": bool(old) and there,
                "a last line of metrics.jsonl that is cut": bool(lines[-1]),
            }
        )

    def compare(self, other: Run) -> None:
        """At its end, with the run that was not killed."""
        expected, found = other.logged(), self.logged()
        first = next((pair for pair in zip(expected, found) if pair[0] != pair[1]), None)
        self.check(first is None, f"logged {first and first[1]} instead of {first and first[0]}")
        self.check(len(found) == len(expected), f"{len(found)} rows are logged instead of {len(expected)}")
        for name in (LAST, BEST):
            one, two = (read_checkpoint(each.run / "checkpoints" / name) for each in (other, self))
            for each in (
                one,
                two,
            ):  # Lightning's counters as a resumed run reads them; it reads none of validation batches
                loop = each["loops"]["fit_loop"]
                _point_at_next_batch(loop, None)
                del loop["epoch_loop.val_loop.batch_progress"]
            self.check(not (where := difference(one, two, name)), f"{where} differs")
        one, two = (each.published_model() for each in (other, self))
        self.check(not (where := difference(one, two, "tokenizer")), f"{where} differs")
        for rank in range(VARIANTS[self.variant].ranks):
            one, two = other.batches(rank), self.batches(rank)
            self.check(all(len(set(rows)) == 1 for rows in two.values()), f"rank {rank}: a batch came in two forms")
            self.check(
                {k: set(v) for k, v in one.items()} == {k: set(v) for k, v in two.items()}, f"rank {rank}: batches"
            )
        strays = [str(path.relative_to(self.run)) for mark in ("tmp", "old") for path in self.run.rglob(f"*.{mark}-*")]
        self.check(not strays, f"left behind: {strays}")

    def logged(self) -> list[dict[str, str]]:
        """All that was logged but the speed and what the data skipped, which is said once in every life."""
        rows = []
        for line in read(self.run / "metrics.jsonl").splitlines():
            row = {k: v for k, v in json.loads(line).items() if "per_second" not in k and not k.startswith("data/")}
            if len(row) > 1:
                rows.append({k: float(v).hex() for k, v in row.items()})
        return rows

    def published_model(self) -> dict[str, Any]:
        folder = self.run / "tokenizer"
        return {"config": read(folder / "config.json"), **load_file(folder / "model.safetensors")}

    def batches(self, rank: int) -> dict[int, list[str]]:
        """Of each batch number, the lines that were written."""
        found: dict[int, list[str]] = {}
        for line in read(self.run / f"batches-{rank}.jsonl").splitlines():
            found.setdefault(json.loads(line)["batch"], []).append(line)
        return found


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


ITS_OWN = ("best_model_path", "run")  # what two equal runs hold of their own: where they write, and their name


def difference(one: Any, other: Any, where: str) -> str:
    """Where two checkpoints differ; "" if they are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        return "" if same else where
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return where
        pairs = [(one[key], other[key], f"{where}/{key}") for key in one if key not in ITS_OWN]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = [(a, b, f"{where}/{number}") for number, (a, b) in enumerate(zip(one, other))]
    else:
        return "" if one == other else f"{where} ({one!r}, {other!r})"
    return next((found for pair in pairs if (found := difference(*pair))), "")


# -- the soak ---------------------------------------------------------------------------------------------------------


def lane(folder: Path, shards: Path, variants: list[str], kills: int, seed: str) -> Tally:
    """Kill runs of the variants in turn until `kills` have been made; the count so far is in `folder/tally.json`."""
    torch.set_num_threads(1)
    rng, tally = random.Random(seed), Tally()
    references: dict[str, Run] = {}
    kinds: list[str] = []
    number = 0
    while tally.kills.total() < kills:
        variant = variants[number % len(variants)]
        if variant not in references:
            references[variant] = Run(folder / f"{variant}-unbroken", shards, variant, tally)
            if not references[variant].live():
                break
        reference = references[variant]
        run, number = Run(folder / f"run-{number}", shards, variant, tally), number + 1
        done: bool | None = False
        while done is False:
            if not kinds:
                kinds = rng.sample(list(MOMENTS), len(MOMENTS))
            kind = kinds.pop()
            draw = partial(MOMENTS[kind], rng, run.run, reference.first, reference.seconds)
            done = run.live(rng, draw if tally.kills.total() < kills else Moment)
            if done is False:
                tally.kills[kind] += 1
                run.inspect(reference)
            write_json(vars(tally), folder / "tally.json")
        tally.batches += sum(len(rows) for rank in range(2) for rows in run.batches(rank).values())
        if done:
            tally.runs += 1
            run.compare(reference)
        write_json(vars(tally), folder / "tally.json")
    return tally


def soak(folder: Path, kills: int, seed: int, variants: list[str], lanes: int, progress: Any = None) -> Tally:
    """`kills` kills in `lanes` processes side by side."""
    shards = folder / "shards"
    tiny.write_images(shards / "train", 48, 0)
    tiny.write_images(shards / "val", 10, 1)
    lanes = min(lanes, len(variants), kills)
    processes, folders, began = [], [folder / f"lane-{i}" for i in range(lanes)], time.monotonic()
    total, failed = Tally(), []
    try:
        for i, each in enumerate(folders):
            each.mkdir()
            share = kills // lanes + (i < kills % lanes)
            work = (each, shards, variants[i::lanes], share, f"{seed}/{i}")
            processes.append(fork(lambda work=work: lane(*work), each / "log"))
        while processes:
            codes = [status(process) for process in processes]
            tallies = [json.loads(text) for each in folders if (text := read(each / "tally.json"))]
            total = sum((Tally(**t | {k: Counter(t[k]) for k in ("kills", "met")}) for t in tallies), Tally())
            if progress is not None:
                print(
                    f"\r{total.kills.total()} of {kills} kills, {total.lives} lives, {total.runs} runs compared, {total.checks} "
                    f"checks, {len(total.violations)} violations, {time.monotonic() - began:.0f} s ",
                    end="", flush=True, file=progress,
                )  # fmt: skip
            if None not in codes:
                break
            time.sleep(0.5)
        failed = [f"{each.name} broke off:\n{read(each / 'log')[-1500:]}" for each, code in zip(folders, codes) if code]
    finally:
        for process in processes:
            end(process)
        if progress is not None:
            print(file=progress)
    total.violations += failed
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=list(VARIANTS),
        metavar="NAME",
        help=", ".join(VARIANTS),
    )
    parser.add_argument("--lanes", type=int, default=2, help="runs side by side")
    parser.add_argument("--folder", type=Path, help="kept; a temporary one otherwise")
    parser.add_argument("--json", type=Path, help="write the result there too")
    options = parser.parse_args()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        tally = soak(folder, options.kills, options.seed, options.variants, options.lanes, sys.stderr)
    seconds, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print("\n| killed while | kills |\n|---|---|")
    for kind in MOMENTS:
        print(f"| {kind} | {tally.kills[kind]} |")
    print(f"| all | {tally.kills.total()} |\n\n| what kills left behind | times |\n|---|---|")
    for state, count in tally.met.items():
        print(f"| {state} | {count} |")
    print(
        f"\n{tally.lives} lives, {tally.runs} runs brought to their end and compared, {tally.batches} batches, "
        f"{tally.checks} checks, {seconds:.0f} s ({cpu:.0f} s of processor), {len(tally.violations)} violations"
    )
    for violation in tally.violations:
        print(f"VIOLATION {violation}")
    if options.json:
        write_json(
            {**vars(tally), "seconds": round(seconds, 1), "processor_seconds": round(cpu, 1), "seed": options.seed},
            options.json,
        )
    sys.exit(bool(tally.violations))


if __name__ == "__main__":
    main()
