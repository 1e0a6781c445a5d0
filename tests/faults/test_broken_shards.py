"""Broken shards under `tokgen fit`: what can be read is trained on, the rest is counted by reason and said, and a resume is exact."""

from __future__ import annotations

import http.server
import json
import logging
import os
import re
import socket
import struct
import tarfile
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.training import tiny
from tests.training.test_resume import RECIPE, losses
from tokgen.cli import main
from tokgen.data import tar
from tokgen.data.batches import ImageSamples
from tokgen.data.shard_set import ShardSet
from tokgen.data.stream import ShardLoader
from tokgen.training.checkpoint import read_checkpoint

torch.set_num_threads(1)  # the tensors are tiny: threads would wait for each other
EACH, SHARDS = 12, 20  # samples of a shard, shards


class Keys(tiny.L.Callback):
    """The samples of each training batch, and something done before one of them."""

    batches: list[list[str]] = []
    before: dict[int, object] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(list(batch["key"]))
        self.before.pop(len(self.batches), lambda: None)()


@pytest.fixture(autouse=True)
def fresh():
    Keys.batches, Keys.before = [], {}


def fit(folder: Path, train: Path | str, steps: int, *more: str) -> int:
    """`tokgen fit` of a tiny tokenizer; its exit code."""
    recipe = folder / "recipe.yaml"
    text = RECIPE.format(shards="SHARDS", steps=1000).replace("train: SHARDS/train, val: SHARDS/val", f"train: {train}")
    text = text.replace("trainer: {", f"trainer: {{callbacks: [{__name__}.Keys], logger: false, ").replace("every_n_steps: 5", "every_n_steps: 7")  # fmt: skip
    recipe.write_text(text.replace("batch_size: 4", "batch_size: 10, shuffle_buffer: 25"))
    return main(["fit", "-c", str(recipe), "--run_dir", str(folder / "run"), "--trainer.max_steps", str(steps), *more])


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("sound") / "train", EACH * SHARDS, 0)


@pytest.fixture
def shards(sound, tmp_path) -> Path:
    """A copy to break."""
    (tmp_path / "train").mkdir()
    for path in sound.iterdir():
        (tmp_path / "train" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "train"


# -- damage ---------------------------------------------------------------------------------------------------------------


def member(path: Path, sample: int) -> int:
    """Where the header of the shard's n-th picture begins."""
    with tarfile.open(path) as file:
        return [m.offset for m in file if m.name.endswith(".png")][sample]


def removed(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def fails_when_read(path: Path) -> None:
    path.unlink()
    path.symlink_to("/proc/self/mem")  # opens like a file


def closed(path: Path) -> None:
    path.chmod(0)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_a_picture(path: Path) -> None:
    os.truncate(path, member(path, 5) + 512 + 40)


def cut_in_a_header(path: Path) -> None:
    os.truncate(path, member(path, 5) + 100)


def garbled(path: Path) -> None:
    """Two pictures and the header of a third."""
    data = bytearray(path.read_bytes())
    for sample in (3, 8):
        at = member(path, sample) + 512
        data[at : at + 60] = bytes(range(60))
    at = member(path, 10)
    data[at : at + 512] = b"\x55" * 512
    path.write_bytes(data)


def fewer(path: Path) -> None:
    """Another shard, of 7 samples."""
    first = tiny.write_images(path.parent.parent / "fewer", 7, 5)
    path.write_bytes((first / "00000.tar").read_bytes())


def more(path: Path) -> None:
    """Half as many samples again; those that the manifest does not know are not read."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 512 * 512].rstrip(b"\0").ljust(-(-len(data) // 512) * 512, b"\0"))
    first = tiny.write_images(path.parent.parent / "more", 6, 6)
    with open(path, "ab") as file:
        file.write((first / "00000.tar").read_bytes())


DAMAGE = {  # what happens to a shard: samples missing, samples skipped by reason
    removed: (12, {}), folder: (12, {}), pipe: (12, {}), fails_when_read: (12, {}), emptied: (12, {}),
    cut_in_a_picture: (6, {"cut_off": 1}), cut_in_a_header: (7, {}),
    garbled: (0, {"unreadable_image": 2, "no_image": 1}), fewer: (5, {}), more: (0, {}),
}  # fmt: skip
if os.geteuid():
    DAMAGE[closed] = (12, {})


def test_what_can_be_read_is_trained_on_and_the_rest_is_counted(shards, tmp_path, caplog):
    for number, harm in enumerate(DAMAGE):
        harm(shards / f"{2 * number:05d}.tar")
    caplog.set_level(logging.WARNING, "tokgen")
    (tmp_path / "a").mkdir()
    missing, skipped = sum(m for m, _ in DAMAGE.values()), sum((Counter(s) for _, s in DAMAGE.values()), Counter())
    assert missing < EACH * SHARDS // 2
    steps = EACH * SHARDS // 10
    assert fit(tmp_path / "a", shards, steps, "--trainer.logger", "true", "--data.max_bad_fraction", "0.1") == 0
    straight = Keys.batches

    # one epoch: each sample that can be read is there, and stand-ins fill the batches up
    assert [len(batch) for batch in straight] == [10] * steps
    seen = {key for batch in straight for key in batch}
    assert len(seen) >= EACH * SHARDS - missing - skipped.total() - 7  # those of `fewer` have names of other samples
    rows = [json.loads(line) for line in (tmp_path / "a/run/metrics.jsonl").read_text().splitlines()]
    counts: dict[str, float] = {}
    for row in rows:
        counts |= {k.removeprefix("data/"): v for k, v in row.items() if k.startswith("data/")}
    expected = {f"skipped/{reason}": count for reason, count in skipped.items()}
    assert counts == {"missing": missing, "skipped": skipped.total(), **expected}
    for words in (
        "1 of 20 shards of the manifest are missing", r"\d of 20 shards cannot be read \(no permission, or not a file\)",
        "could not be read", "Skipped a sample: unreadable image", "holds fewer samples than its manifest lists", "Data so far",
    ):  # fmt: skip
        assert re.search(words, caplog.text), words
    for number, harm in enumerate(DAMAGE):
        if DAMAGE[harm][0]:
            assert f"{2 * number:05d}.tar" in caplog.text, harm

    # the same on each of two ranks: as many steps, and no sample on both
    ranks = [
        list(ShardLoader(ShardSet.open(shards), ImageSamples(size=16), batch_size=4, rank=rank, world=2, max_bad_fraction=1))
        for rank in range(2)
    ]  # fmt: skip
    assert len(ranks[0]) == len(ranks[1]) == EACH * SHARDS // 8

    # stopped in the middle and resumed
    (tmp_path / "b").mkdir()
    Keys.batches = []
    more = ("--data.max_bad_fraction", "0.1", "--ckpt_path", "auto", "--trainer.logger", "true")
    assert fit(tmp_path / "b", shards, steps // 2, *more) == 0 and fit(tmp_path / "b", shards, steps, *more) == 0
    assert Keys.batches == straight
    assert losses(tmp_path / "a/run") == losses(tmp_path / "b/run")
    one, other = (read_checkpoint(tmp_path / n / "run/checkpoints/last.ckpt")["state_dict"] for n in "ab")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_shards_that_change_while_they_are_read(shards, tmp_path):
    """One is cut off in place, one replaced by a shorter one, one removed: each sample is read or counted, and none comes twice."""

    def change() -> None:
        for path in sorted(shards.glob("*.tar"))[::4]:
            os.truncate(path, member(path, 4) + 512 + 10)
        for path in sorted(shards.glob("*.tar"))[1::4]:
            other = path.with_suffix(".new")
            other.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
            os.replace(other, path)
        for path in sorted(shards.glob("*.tar"))[2::4]:
            path.unlink()

    Keys.before = {6: change}
    steps = EACH * SHARDS // 10
    more = ("--data.max_bad_fraction", "0.1", "--trainer.logger", "true")
    assert fit(tmp_path, shards, steps, *more) == 0
    assert [len(batch) for batch in Keys.batches] == [10] * steps
    counts: dict[str, int] = {}
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        counts |= {k: v for k, v in json.loads(line).items() if k.startswith("data/")}
    lost = counts["data/missing"] + counts["data/skipped"]
    assert 40 < lost < 120
    assert len({key for batch in Keys.batches for key in batch}) == EACH * SHARDS - lost


@pytest.mark.parametrize("harm", [removed, fails_when_read, emptied], ids=lambda harm: harm.__name__)
def test_a_set_with_nothing_to_read_is_one_clear_error(shards, tmp_path, harm, capsys):
    for path in sorted(shards.glob("*.tar")):
        harm(path)
    assert fit(tmp_path, shards, 4) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokgen fit:")]
    assert re.search(r"\d{5}\.tar", line), line


# -- object stores ----------------------------------------------------------------------------------------------------------


class Store(http.server.BaseHTTPRequestHandler):
    """Files of a folder; each fails in the ways listed for it before it is served."""

    folder: Path
    faults: dict[str, list[str]] = {}
    met: list[str] = []

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.strip("/")
        data = (self.folder / name).read_bytes()
        fault = self.faults[name].pop(0) if self.command == "GET" and self.faults.get(name) else ""
        if fault:
            self.met.append(fault)
        if fault.isdigit():
            self.send_error(int(fault))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if fault else data)
        if fault == "reset":  # instead of an orderly end
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_HEAD = do_GET


def test_a_store_that_fails_for_a_moment_loses_nothing(sound, tmp_path, monkeypatch):
    """The manifest and each shard answer 500 twice, or break off in the middle, once by a reset and once by an early end."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(tar, "_FIRST_PAUSE", 0.01)
    Store.folder, Store.met = sound, []
    kinds = [["500", "503"], ["reset", "500"], ["short", "reset"]]
    names = sorted(path.name for path in sound.iterdir())
    Store.faults = {name: list(kinds[i % 3]) for i, name in enumerate(names)}
    Store.faults["manifest.json"] = ["500", "reset"]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name, train in (("near", sound), ("far", f"http://127.0.0.1:{server.server_port}")):
            (tmp_path / name).mkdir()
            assert fit(tmp_path / name, train, 12, "--trainer.logger", "true") == 0
    finally:
        server.shutdown()
        server.server_close()
    assert len(Store.met) >= 20 and {"500", "503", "reset", "short"} <= set(Store.met)
    assert Keys.batches[:12] == Keys.batches[12:]
    assert losses(tmp_path / "near/run") == losses(tmp_path / "far/run")
    assert "data/missing" not in (tmp_path / "far/run/metrics.jsonl").read_text().replace('"data/missing": 0.0', "")
