from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from shard_makers import image_bytes, write_images

from tokgen.data.shards import MANIFEST, PARTIAL, Manifest, ShardWriter, build_manifest, safe_key, verify
from tokgen.data.tar import Damage, iter_samples
from tokgen.errors import DataError


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def read_back(path: Path, extensions=("png", "txt", "json", "npy")) -> list:
    with open(path, "rb") as file:
        return [s for _, s in iter_samples(file, extensions=extensions, max_member_bytes=1 << 20)]


def test_written_samples_read_back_byte_for_byte(tmp_path):
    picture, array = image_bytes(1), np.arange(6, dtype=np.int32).reshape(3, 2)
    with ShardWriter(tmp_path / "s", kind="images", meta={"source": "here"}) as writer:
        writer.write("a", {"png": picture, "txt": "über", "json": {"x": [1]}, "npy": array})
    (sample,) = read_back(tmp_path / "s" / "00000.tar")
    assert sample.members["png"] == picture
    assert sample.members["txt"].decode() == "über"
    assert json.loads(sample.members["json"]) == {"x": [1]}
    manifest = Manifest.load(tmp_path / "s")
    path = tmp_path / "s" / "00000.tar"
    assert (manifest.samples, manifest.bytes, manifest.meta) == (1, path.stat().st_size, {"source": "here"})
    assert manifest.shards[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_manifest_json_has_the_documented_fields(images):
    data = json.loads((images / MANIFEST).read_text())
    assert (data["format"], data["version"], data["kind"], data["samples"]) == ("tokgen-shards", 1, "images", 48)
    assert data["bytes"] == sum(s["bytes"] for s in data["shards"])
    assert [set(s) for s in data["shards"]] == [{"name", "samples", "bytes", "sha256"}] * 4


def test_webdataset_reads_what_we_write(images):
    import webdataset as wds

    dataset = wds.WebDataset(str(images / "{00000..00003}.tar"), shardshuffle=False, empty_check=False)
    keys = [sample["__key__"] for sample in dataset]
    assert keys == [f"k{i:03d}" for i in range(48)]


def test_we_read_what_webdataset_and_tarfile_write(tmp_path):
    import webdataset as wds

    with wds.TarWriter(str(tmp_path / "00000.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"dir/s{i}", "txt": f"t{i}", "png": image_bytes(i)})
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"long{format}.tar"
        with tarfile.open(path, "w", format=format) as tar:
            for name in ("é" * 60 + "x" * 200 + ".txt", "plain.txt"):
                source = tmp_path / "text"
                source.write_text(name)
                tar.add(source, name)
        long, plain = read_back(path)
        assert (long.members["txt"].decode(), plain.key) == ("é" * 60 + "x" * 200 + ".txt", "plain")
    assert [(s.key, s.members["txt"]) for s in read_back(tmp_path / "00000.tar")] == [
        (f"dir/s{i}", f"t{i}".encode()) for i in range(3)
    ]


def test_shards_close_at_either_limit(tmp_path):
    with ShardWriter(tmp_path / "n", max_samples=3) as writer:
        for i in range(7):
            writer.write(f"{i}", {"txt": "x"})
    assert [s.samples for s in writer.manifest.shards] == [3, 3, 1]
    with ShardWriter(tmp_path / "b", max_bytes=20_480) as writer:
        for i in range(6):
            writer.write(f"{i}", {"png": bytes(8000)})
    assert [s.samples for s in writer.manifest.shards] == [2, 2, 2]
    assert all(s.bytes <= 20_480 for s in writer.manifest.shards)


def test_keys_are_safe_and_distinct(tmp_path):
    names = ["../../etc/passwd", "a.b", "a/b", "a b", "", "x" * 300, "x" * 299 + "y", "照片", "$(rm -rf)"]
    with ShardWriter(tmp_path / "s") as writer:
        keys = [writer.write(name, {"txt": "x"}) for name in names]
    assert len(set(keys)) == len(names)
    assert all(set(k) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for k in keys)
    assert [s.key for s in read_back(tmp_path / "s" / "00000.tar")] == keys
    assert safe_key(keys[0]) == keys[0]


def write_ten(folder: Path, resume: bool, stop: int | None = None) -> ShardWriter:
    with ShardWriter(folder, kind="images", meta={"v": 1}, max_samples=3, resume=resume) as writer:
        for i in range(10):
            if f"k{i}" in writer:
                continue
            if i == stop:
                raise KeyboardInterrupt
            writer.write(f"k{i}", {"txt": f"text {i}"})
    return writer


def test_interrupted_writer_continues_to_the_same_bytes(tmp_path):
    write_ten(tmp_path / "whole", resume=False)
    with pytest.raises(KeyboardInterrupt):
        write_ten(tmp_path / "cut", resume=False, stop=8)
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["00000.tar", "00001.tar", PARTIAL]
    assert [s.samples for s in ShardWriter(tmp_path / "cut", meta={"v": 1}, resume=True)._shards] == [3, 3]
    writer = ShardWriter(tmp_path / "cut", meta={"v": 1}, resume=True)
    assert (writer.samples, writer.keys) == (6, {f"k{i}" for i in range(6)})
    write_ten(tmp_path / "cut", resume=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def _killed(folder: Path) -> None:
    with ShardWriter(folder, kind="images", meta={"v": 1}, max_samples=3) as writer:
        for i in range(8):
            writer.write(f"k{i}", {"txt": f"text {i}"})
        os.kill(os.getpid(), 9)


def test_killed_writer_continues_to_the_same_bytes(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path / "cut",))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert not (tmp_path / "cut" / MANIFEST).exists()
    write_ten(tmp_path / "cut", resume=True)
    write_ten(tmp_path / "whole", resume=False)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_resume_writes_again_what_was_damaged_since(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_ten(tmp_path / "cut", resume=False, stop=8)
    os.truncate(tmp_path / "cut" / "00001.tar", 1024)
    write_ten(tmp_path / "cut", resume=True)
    write_ten(tmp_path / "whole", resume=False)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_existing_shards_are_not_overwritten(images, tmp_path):
    with pytest.raises(FileExistsError, match="resume=True"):
        ShardWriter(images)
    with pytest.raises(DataError, match="another kind"):
        ShardWriter(images, kind="codes", resume=True)
    assert verify(images) == []


def test_verify_names_each_damage(images):
    assert verify(images) == []
    assert verify(images, hashes=False) == []
    data = bytearray((images / "00000.tar").read_bytes())
    os.truncate(images / "00000.tar", len(data) // 2)
    flipped = bytearray((images / "00001.tar").read_bytes())
    flipped[3 * 512 : 4 * 512] = b"\xff" * 512
    (images / "00001.tar").write_bytes(flipped)
    (images / "00002.tar").unlink()
    (images / "junk.tar").write_bytes(b"x")
    problems = verify(images)
    assert len(problems) == 4
    assert "of 12 samples found" in problems[0] and "bytes" in problems[0]
    assert "00001.tar differs" in problems[1]
    assert "00002.tar is missing (12 samples)" in problems[2]
    assert "junk.tar" in problems[3] and "not in the manifest" in problems[3]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: None, "No such shard folder"),
        (lambda p: p.mkdir(), "holds nothing"),
        (lambda p: p.write_text("x"), "is a file"),
        (lambda p: (p.mkdir(), (p / "a.txt").write_text("x")), "no manifest.json and no shards"),
        (lambda p: (p.mkdir(), (p / "0.tar").write_text("x")), "build_manifest"),
        (lambda p: (p.mkdir(), (p / PARTIAL).write_text("{}")), "interrupted run"),
        (lambda p: write_images(p / "train", [1]), "holds splits"),
        (lambda p: (p.mkdir(), (p / MANIFEST).write_text("{")), "cannot be read as a shard manifest"),
        (lambda p: (p.mkdir(), (p / MANIFEST).write_text('{"format": "other"}')), "is not a shard manifest"),
    ],
)
def test_a_wrong_folder_gets_one_clear_sentence(tmp_path, make, words):
    folder = tmp_path / "here"
    make(folder)
    with pytest.raises((FileNotFoundError, DataError), match=words) as caught:
        Manifest.load(folder)
    assert "here" in str(caught.value) and "\n" not in str(caught.value)


def test_manifest_names_cannot_leave_the_folder(images):
    data = json.loads((images / MANIFEST).read_text())
    for name in ("../x.tar", "/etc/passwd", "a;rm.tar", ".hidden.tar", "a b.tar"):
        data["shards"][0]["name"] = name
        (images / MANIFEST).write_text(json.dumps(data))
        with pytest.raises(DataError, match="names are letters"):
            Manifest.load(images)


def _as_nobody(folder: Path, queue) -> None:
    os.setuid(65534)
    try:
        Manifest.load(folder)
        queue.put("no error")
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")


def test_unreadable_folder_is_said_before_reading(images):
    os.chmod(images, 0)
    try:
        if os.getuid():
            with pytest.raises(DataError, match="permission denied"):
                Manifest.load(images)
            return
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        for parent in images.parents:
            if str(parent).startswith("/tmp/"):
                os.chmod(parent, 0o755)
        process = context.Process(target=_as_nobody, args=(images, queue))
        process.start()
        said = queue.get(timeout=30)
        process.join()
        assert said.startswith("DataError") and "permission denied" in said
    finally:
        os.chmod(images, 0o755)


def test_build_manifest_adopts_tar_files_of_another_tool(images):
    before = Manifest.load(images)
    (images / MANIFEST).unlink()
    manifest = build_manifest(images, "images")
    assert manifest.shards == before.shards
    assert verify(images) == []
    os.truncate(images / "00001.tar", 2000)
    with pytest.raises(DataError, match=r"00001\.tar cannot be listed"):
        build_manifest(images, "images")


def test_scanner_finds_the_samples_after_a_damaged_header(images):
    path = images / "00000.tar"
    for damage_bytes in (b"\xff" * 512, b"\0" * 512):
        data = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            header = next(m.offset for m in tar if m.name == "k004.png")
        data[header : header + 512] = damage_bytes
        (images / "x.tar").write_bytes(data)
        damage = Damage()
        with open(images / "x.tar", "rb") as file:
            found = [
                s for _, s in iter_samples(file, extensions=("png", "txt"), max_member_bytes=1 << 20, damage=damage)
            ]
        assert len(found) == 12  # k004 still has its caption
        assert [s.key for s in found if "png" not in s.members] == ["k004"]
        assert damage.notes == ["a damaged header"]
