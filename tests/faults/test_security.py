"""Files of strangers: nothing in them runs, escapes, or takes more memory or time than it may, and each is refused in one clear line.

What single decoders do with hostile bytes is in `tests/data/test_data_decode.py`; broken videos are in `test_broken_videos.py`.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import tokgen
from tokgen.cli import main
from tokgen.commands.convert import convert
from tokgen.data.batches import CodeSamples, ImageSamples
from tokgen.data.decode import BadSample, decode_member
from tokgen.data.shard_set import ShardSet
from tokgen.data.shards import Manifest, ShardWriter, build_manifest
from tokgen.data.stream import ShardLoader
from tokgen.data.tar import Damage, iter_samples
from tokgen.errors import CheckpointError, DataError, TokgenError
from tokgen.importers.base import read_state_dict
from tokgen.importers.sharded import weight_files
from tokgen.pretrained import read_config
from tokgen.tokens import Grid, Tokens

ROOT = Path(__file__).parent.parent.parent
FUZZ = settings(
    max_examples=100, deadline=2000, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


# ---------------------------------------------------------------------------------------------------------- checkpoints


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(params=["torch", "legacy", "pickle"])
def attack(request, tmp_path):
    """(a malicious checkpoint, the folder that it makes when it is unpickled)."""
    ran, path = tmp_path / "ran", tmp_path / f"{request.param}.pt"
    data = {"state_dict": {"weight": torch.zeros(2)}, "x": Attack(ran)}
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=request.param == "torch")
    yield path, ran
    assert not ran.exists()


def test_the_attack_works_where_it_is_let(tmp_path):
    torch.save(Attack(tmp_path / "ran"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()


FAMILIES = inspect.signature(convert, eval_str=True).parameters["family"].annotation.__args__


@pytest.mark.parametrize("family", FAMILIES)
def test_no_importer_unpickles(attack, family, tmp_path, capsys):
    path, _ = attack
    source = path
    if family == "tokenflow-t2i":  # takes a folder
        source = tmp_path / "model"
        source.mkdir()
        (source / "config.json").write_text('{"model_type": "llama"}')
        path.rename(source / "pytorch_model.bin")
    options = ["--form", "lavit"] if family == "eva" else ["--form", "clip"] if family == "clip" else []
    if family == "tokenflow-t2i":
        options = ["--tokenizer", str(ROOT / "assets/demo/tokenizer")]
    code = main(["convert", family, str(source), "--out", str(tmp_path / "out"), *options])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_from_pretrained_reads_no_pickle(attack, tmp_path):
    """Neither beside the weights, nor under their name, nor when they are all there is."""
    path, _ = attack
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / "config.json").write_text((ROOT / "assets/demo/tokenizer/config.json").read_text())
        (folder / name).write_bytes(path.read_bytes())
        with pytest.raises(CheckpointError, match=r"damaged|no model\.safetensors"):
            tokgen.load(folder)


def test_fit_resumes_from_no_pickle(tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "global_step": 1, "x": Attack(tmp_path / "ran")}, path)
    arguments = ["-c", str(ROOT / "tokenizers/vqgan-tiny.yaml"), "-c", str(ROOT / "train/cpu.yaml")]
    shards = str(ROOT / "assets/demo/shards/val")
    arguments += ["--data.train", shards, "--data.val", shards, "--run_dir", str(tmp_path / "run")]
    assert main(["fit", *arguments, "--ckpt_path", str(path)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("tokgen fit: ") and path.name in last
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "ran").exists()


def test_perceptual_weights_are_not_unpickled(attack):
    from tokgen.losses.perceptual import VGG16Features

    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        VGG16Features(attack[0])


def test_a_cut_safetensors_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    for data in (b"", b"\xff" * 8, struct.pack("<Q", 1 << 40) + b"{}"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_state_dict(path)


def test_an_index_names_files_of_its_own_folder_only(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    outside = tmp_path / "secret.safetensors"
    outside.write_bytes(b"")
    for name in ("../secret.safetensors", str(outside), 7):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="index"):
            weight_files(folder)
    for index in ("[]", '{"weight_map": []}', "{", "[" * 100_000):
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match="index"):
            weight_files(folder)


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, '{"type": ["vqgan"]}', '{"type": "vqgan", "config": []}'])
def test_a_config_that_is_none_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TokgenError):
        tokgen.load(tmp_path)


# --------------------------------------------------------------------------------------------------------------- shards


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data) if data else None)


def picture(size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (9, 8, 7)).save(file, "PNG")
    return file.getvalue()


def test_paths_in_a_shard_lead_nowhere(tmp_path):
    """Names with ../ or / are names; links, pipes and devices are nothing: no file is written, none is read."""
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    folder = tmp_path / "s"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name in ("../up", "/etc/absolute", "a/../../b", "plain"):
            add(tar, f"{name}.png", picture())
            add(tar, f"{name}.txt", b"caption")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
            add(tar, "stolen.png", picture() if kind == tarfile.REGTYPE else b"", kind, str(outside))
            add(tar, "stolen.txt", b"", kind, str(outside))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    build_manifest(folder, "images")
    loader = ShardLoader(ShardSet.open(folder), ImageSamples(size=8), batch_size=4, train=False)
    batches = list(loader)
    keys = [k for b in batches for k in b["key"]]
    assert len(keys) == 4 and "stolen" not in keys
    assert {c for b in batches for c in b["caption"]} == {"caption"}
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != "manifest.json"}
    assert {k: v for k, v in after.items() if k != folder} == {k: v for k, v in before.items() if k != folder}


def test_shards_behind_links_out_of_the_folder_are_only_read(tmp_path):
    """A shard's name cannot leave the folder; see also tests/data/test_data_shards.py."""
    for name in ("../x.tar", "/x.tar", "a/b.tar", "x;touch y.tar", "$(id).tar"):
        shard = {"name": name, "samples": 1, "bytes": 1, "sha256": ""}
        text = json.dumps({"format": json.loads(Manifest("images").to_json())["format"], "version": 1, "kind": "images", "shards": [shard]})  # fmt: skip
        with pytest.raises(DataError, match="named"):
            Manifest.from_json(text)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side: int = 20_000) -> bytes:
    """A whole and valid picture of side x side black pixels (1 bit each): 50 KB that would become 1.2 GB."""
    row = bytes(1 + (side + 7) // 8)
    deflate = zlib.compressobj(9)
    body = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [8, 16])
def test_a_png_with_a_damaged_stream_ends_no_process(depth):
    """torchvision's decoder meets libpng's error with a segmentation fault; each kind of damage here has right checksums."""
    rows = bytes(1 + 8 * 3 * depth // 8) * 8
    whole = zlib.compress(rows)
    header = struct.pack(">IIBBBBB", 8, 8, depth, 2, 0, 0, 0)
    damaged = (
        whole[:-1] + b"\0",  # the stream's checksum
        whole[:6],
        whole[:2] + b"\xff" * 20,
        zlib.compress(rows.replace(b"\0", b"\x09", 1)),  # a filter that does not exist
        zlib.compress(rows[:40]),
    )
    sound = None
    for stream in (whole, *damaged):
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")
        for cut in (data, data.replace(b"IDAT", b"IDAU"), data[:-20]):
            try:
                x = decode_member("png", cut)
                assert x.shape == (3, 8, 8) and x.dtype == torch.uint8
                sound = x if sound is None else sound
            except BadSample as error:
                assert error.reason == "unreadable image"
    assert sound is not None and not sound.any()


def npy_claiming(shape: str) -> bytes:
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


BOMBS = {
    "picture": ("png", png_bomb),
    "array of 10^12": ("npy", lambda: npy_claiming("(1000000000000,)")),
    "array of 10^5000": ("npy", lambda: npy_claiming(f"({'9' * 5000},)")),
    "array of a power": ("npy", lambda: npy_claiming("(9**9**9,)")),
    "array of many axes": ("npy", lambda: npy_claiming("(" + "1," * 4000 + ")")),
    "nested header": ("npy", lambda: npy_claiming("(" * 4000 + ")" * 4000)),
    "long JSON": ("json", lambda: b'{"a": "' + b"x" * (8 << 20) + b'"}'),
    "nested JSON": ("json", lambda: b'{"a": ' * 100_000 + b"1" + b"}" * 100_000),
    "number in JSON": ("json", lambda: b'{"a": ' + b"9" * 900_000 + b"}"),
    "class of many digits": ("cls", lambda: b"9" * 10_000_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_neither_memory_nor_time(name):
    extension, make = BOMBS[name]
    data = make()
    tracemalloc.start()
    began = time.process_time()
    try:
        if extension == "cls":  # the first 32 digits are the number
            assert decode_member(extension, data) == int("9" * 32)
        else:
            with pytest.raises(BadSample):
                decode_member(extension, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 5 and peak < 64 << 20


def test_a_size_beyond_the_file_is_damage(tmp_path):
    """A header may claim 2^90 bytes; nothing is read or allocated, and a stream ends too."""
    info = tarfile.TarInfo("a.txt")
    info.size = 5
    for octal in (b"\x80" + (1 << 80).to_bytes(11, "big"), b"\x80" + (1 << 62).to_bytes(11, "big"), b"77777777777\0"):
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
        block[124:136] = octal
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        for wanted in (True, False):
            damage = Damage()
            found = iter_samples(
                io.BytesIO(bytes(block) + b"hello".ljust(512, b"\0")), extensions=("txt",), max_member_bytes=1 << 20,
                wanted=lambda index, wanted=wanted: wanted, damage=damage,
            )  # fmt: skip
            samples = [s for _, s in found]
            assert len(samples) <= 1 and all(not s.members for s in samples) and damage.notes


def test_a_size_record_of_many_digits_is_nothing():
    record = b"size=" + b"9" * 6000 + b"\n"
    length = len(record) + 5
    body = f"{length} ".encode() + record
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(body)
        tar.addfile(info, io.BytesIO(body))
        add(tar, "a.txt", b"hello")
    file.seek(0)
    samples = [s for _, s in iter_samples(file, extensions=("txt",), max_member_bytes=1 << 20, damage=Damage())]
    assert [s.key for s in samples] in ([], ["a"])


@pytest.mark.parametrize("command", ["fit", "tokenize", "check"])
def test_commands_run_no_shell_from_a_location(command, tmp_path, capsys):
    location = f"pipe:touch {tmp_path}/ran; cat {{}}"
    demo = str(ROOT / "assets/demo/tokenizer")
    arguments = {
        "fit": ["-c", str(ROOT / "tokenizers/vqgan-tiny.yaml"), "-c", str(ROOT / "train/cpu.yaml"), "--data.train", location,
                "--run_dir", str(tmp_path / "run")],
        "tokenize": [location, "--model", demo, "--out", str(tmp_path / "out")],
        "check": [location],
    }[command]  # fmt: skip
    assert main([command, *arguments]) == 2
    assert f"tokgen {command}: " in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------------------------- fuzz


def mutated(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of a file with some of them changed, a piece cut out or put in twice, or its end missing."""
    place = st.integers(0, len(whole) - 1)
    change = st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=12))
    cut = st.tuples(st.just("cut"), place, st.integers(1, 2000))
    twice = st.tuples(st.just("twice"), place, st.integers(1, 2000))

    def apply(edits: list) -> bytes:
        data = bytearray(whole)
        for kind, at, what in edits:
            if kind == "set":
                data[at : at + len(what)] = what
            elif kind == "cut":
                del data[at : at + what]
            else:
                data[at:at] = data[at : at + what]
        return bytes(data)

    return st.lists(st.one_of(change, change, cut, twice), min_size=1, max_size=6).map(apply)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def _shard(kind: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as where:
        meta = {"tokenizer": "t", "codebook_sizes": [64]} if kind == "codes" else {}
        with ShardWriter(Path(where) / "s", kind=kind, meta=meta) as writer:
            for i in range(3):
                content = {"npy": np.arange(6)} if kind == "codes" else {"png": picture(), "json": {"captions": ["b"]}}
                writer.write(f"k{i}", {"txt": f"a {i}", **content})
        return (Path(where) / "s" / "00000.tar").read_bytes()


def _fix_sums(data: bytes) -> bytes:
    """Make the checksums of all headers right, so that what they say is looked at."""
    data = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()
    return bytes(data)


def read_shard(kind: str, data: bytes) -> None:
    """As a loader does: samples or damage, then values or bad samples."""
    import random

    samples = ImageSamples(size=8) if kind == "images" else CodeSamples(codebook_sizes=(64,))
    good = []
    for _, raw in iter_samples(io.BytesIO(data), extensions=samples.extensions, max_member_bytes=1 << 20):
        if raw.problem is None:
            try:
                good.append(samples(raw, random.Random(0)))
            except BadSample:
                continue
    if good:
        samples.collate(good)


@pytest.mark.parametrize("kind", ["images", "codes"])
def test_mutated_shards_give_samples_or_named_errors(kind):
    whole = _shard(kind)
    read_shard(kind, whole)

    @FUZZ
    @given(mutated(whole), st.booleans())
    def run(data: bytes, sums: bool) -> None:
        read_shard(kind, _fix_sums(data) if sums else data)

    run()


def test_mutated_token_files_give_tokens_or_named_errors(folder):
    path = folder / "x.safetensors"
    side = {"grid": torch.zeros(2, 3, dtype=torch.int64)}
    Tokens(torch.arange(32).view(2, 16), Grid(4, 4), (64,), None, "t", side, {"grid": 8}).save(path)
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]

    @FUZZ
    @given(st.one_of(mutated(whole), mutated(whole[8 : 8 + size]).map(lambda h: struct.pack("<Q", len(h)) + h + whole[8 + size :])))  # fmt: skip
    def run(data: bytes) -> None:
        path.write_bytes(data)
        try:
            assert isinstance(Tokens.load(path), Tokens)
        except TokgenError as error:
            assert str(error)

    run()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@example(name="tokenizer", value="t")
@given(name=st.sampled_from(["layout", "codebook_sizes", "tokenizer", "side_sizes"]), value=JSON)
def test_what_a_token_file_says_of_itself_is_checked(folder, name, value):
    about = {"layout": {"kind": "Grid", "h": 4, "w": 4}, "codebook_sizes": [64], "tokenizer": "t", "side_sizes": {}}
    tokens = json.dumps({**about, name: value})
    header = {
        "__metadata__": {"format": "tokgen-tokens", "tokens": tokens},
        "ids": {"dtype": "I64", "shape": [1, 16], "data_offsets": [0, 128]},
        "mask": {"dtype": "BOOL", "shape": [1, 16], "data_offsets": [128, 144]},
    }
    head = json.dumps(header).encode()
    path = folder / "about.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(128) + b"\x01" * 16)
    try:
        assert isinstance(Tokens.load(path), Tokens)
        loaded = True
    except TokgenError as error:
        assert str(error)
        loaded = False
    assert loaded or tokens != json.dumps(about)


def test_mutated_manifests_give_manifests_or_named_errors():
    import tempfile

    with tempfile.TemporaryDirectory() as where:
        with ShardWriter(Path(where) / "s", kind="codes", meta={"tokenizer": "t", "codebook_sizes": [64]}) as writer:
            writer.write("k", {"npy": np.arange(6), "txt": "a"})
        whole = (Path(where) / "s" / "manifest.json").read_bytes()
    fields = json.loads(whole)

    def replaced(pair: tuple) -> bytes:
        return json.dumps({**fields, pair[0]: pair[1]}).encode()

    @FUZZ
    @given(st.one_of(mutated(whole), st.tuples(st.sampled_from(sorted(fields)), JSON).map(replaced)))
    def run(data: bytes) -> None:
        try:
            assert isinstance(Manifest.from_json(data.decode("utf-8", "replace")), Manifest)
        except TokgenError as error:
            assert str(error)

    run()


def test_mutated_configs_give_settings_or_named_errors(folder):
    whole = (ROOT / "assets/demo/tokenizer/config.json").read_bytes()

    @FUZZ
    @given(mutated(whole))
    def run(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        try:
            assert isinstance(read_config(folder), dict)
        except TokgenError as error:
            assert str(error)

    run()
