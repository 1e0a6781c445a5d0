"""`pack` makes shards of every documented source, and says what it left out."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from shard_makers import image_bytes
from video_makers import video

from tokgen.data import pack as pack_module
from tokgen.data.pack import pack
from tokgen.data.shards import Manifest, verify
from tokgen.data.tar import iter_samples
from tokgen.errors import ConfigError, DataError


def samples_in(folder: Path) -> dict[str, dict[str, bytes]]:
    out = {}
    for shard in Manifest.load(folder).shards:
        with open(folder / shard.name, "rb") as file:
            extensions = ("png", "jpg", "webp", "mp4", "webm", "txt", "json")
            for _, sample in iter_samples(file, extensions=extensions, max_member_bytes=1 << 24):
                out[sample.key] = sample.members
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Captions beside pictures, in .txt, in .json, in both, and in a subfolder."""
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for i, (name, format) in enumerate(
        [("a.png", "PNG"), ("b.v2.JPG", "JPEG"), ("deep/c.webp", "WEBP"), ("d.jpeg", "JPEG")]
    ):
        (source / name).write_bytes(image_bytes(i, format=format))
    (source / "a.txt").write_text("a cat\n")
    (source / "b.v2.json").write_text(json.dumps({"text": "a dog", "captions": ["dog", "hound"], "style": "noto"}))
    (source / "deep" / "c.json").write_text(json.dumps({"captions": ["a bird"], "group": "animals"}))
    (source / "d.txt").write_text("a fish")
    (source / "d.json").write_text(json.dumps({"caption": "not this", "style": "flat"}))
    (source / "notes.md").write_text("not a picture")
    return source


def test_pack_folder_keeps_bytes_captions_and_metadata(folder, tmp_path):
    report = pack(folder, tmp_path / "out", progress=False)
    assert (report.written, report.skipped) == (4, {})
    assert Manifest.load(tmp_path / "out").kind == "images" and verify(tmp_path / "out") == []
    samples = samples_in(tmp_path / "out")
    assert set(samples) == {"a", "b_v2", "deep_c", "d"}
    assert samples["a"] == {"png": (folder / "a.png").read_bytes(), "txt": b"a cat"}
    assert samples["b_v2"]["jpg"] == (folder / "b.v2.JPG").read_bytes() and samples["b_v2"]["txt"] == b"a dog"
    assert json.loads(samples["b_v2"]["json"]) == {"captions": ["dog", "hound"], "style": "noto"}
    assert samples["deep_c"]["txt"] == b"a bird"
    assert samples["d"]["txt"] == b"a fish" and json.loads(samples["d"]["json"]) == {"style": "flat"}


def rows_of(folder: Path) -> list[dict]:
    return [
        {"path": "a.png", "caption": "a cat", "group": "animals", "year": 2020},
        {"path": "deep/c.webp", "caption": "a bird", "group": "animals", "year": 2021},
        {"path": str(folder / "d.jpeg"), "caption": "a fish", "group": "", "year": 2022},
    ]


@pytest.mark.parametrize("names", [("path", "caption"), ("image", "text"), ("Filename", "Caption"), ("file", "text")])
def test_pack_csv_finds_its_columns(folder, tmp_path, names):
    table = folder / "table.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "group", "year"])
        writer.writerows([list(row.values()) for row in rows_of(folder)])
    report = pack(table, tmp_path / "out", progress=False, seed=None)
    assert report.written == 3
    samples = list(samples_in(tmp_path / "out").values())
    assert [s["txt"] for s in samples] == [b"a cat", b"a bird", b"a fish"]
    assert json.loads(samples[0]["json"]) == {"group": "animals", "year": "2020"}
    assert samples[2]["jpg"] == (folder / "d.jpeg").read_bytes()


def test_pack_parquet_with_paths_and_with_pictures_inside(folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows_of(folder)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "paths.parquet")
    assert pack(tmp_path / "paths.parquet", tmp_path / "a", root=folder, progress=False).written == 3
    inside = [
        {"image": {"bytes": image_bytes(i), "path": f"p{i}.png" if i % 2 else None}, "text": f"t{i}", "n": i}
        for i in range(7)
    ]
    pq.write_table(pa.Table.from_pylist(inside), tmp_path / "inside.parquet", row_group_size=3)
    assert pack(tmp_path / "inside.parquet", tmp_path / "b", progress=False).written == 7
    by_text = {s["txt"].decode(): s for s in samples_in(tmp_path / "b").values()}
    assert {t: s["png"] for t, s in by_text.items()} == {f"t{i}": image_bytes(i) for i in range(7)}
    assert json.loads(by_text["t3"]["json"]) == {"n": 3}


def test_columns_can_be_named(folder, tmp_path):
    table = folder / "table.tsv"
    table.write_text("where\tsays\tcaption\na.png\tthis\tnot this\n")
    report = pack(table, tmp_path / "out", path_column="where", caption_column="says", progress=False)
    assert report.written == 1 and samples_in(tmp_path / "out")["a"]["txt"] == b"this"
    with pytest.raises(ConfigError, match="no column 'nope'; its columns are where, says, caption"):
        pack(table, tmp_path / "x", path_column="nope", progress=False)
    with pytest.raises(ConfigError, match="path_column"):
        pack(table, tmp_path / "x", progress=False)
    table.write_text("path\tlabel\na.png\tx\n")
    with pytest.raises(ConfigError, match="caption_column"):
        pack(table, tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


def test_pack_videos_stay_bytes(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    clips = {
        "a.mp4": video(4),
        "b.webm": video(4, codec="libvpx-vp9", format="webm"),
        "c.mp4": b"not a video",
        "d.mp4": b"\0\0\0\x18ftypmp42" + bytes(50),
    }
    for name, data in clips.items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text(f"clip {name}")
    report = pack(source, tmp_path / "out", progress=False)
    assert (report.written, report.skipped) == (2, {"not a video file": 1, "unreadable video": 1})
    assert Manifest.load(tmp_path / "out").kind == "videos"
    samples = samples_in(tmp_path / "out")
    assert samples["a"]["mp4"] == clips["a.mp4"] and samples["b"]["webm"] == clips["b.webm"]
    with pytest.raises(ConfigError, match="holds videos, which keep their bytes; leave size and format out"):
        pack(source, tmp_path / "smaller", size=32, progress=False)


def test_what_is_left_out_is_reported_by_reason(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n garbage")
    (folder / "cut.jpg").write_bytes(image_bytes(9, (64, 64), "JPEG")[:800])
    (folder / "none.png").write_bytes(image_bytes(9))
    (folder / "blank.png").write_bytes(image_bytes(9))
    (folder / "odd.png").write_bytes(image_bytes(9))
    (folder / "void.png").write_bytes(b"")
    for name in ("bad", "cut", "void"):
        (folder / f"{name}.txt").write_text("x")
    (folder / "blank.txt").write_text(" \n")
    (folder / "odd.json").write_text("{not json")
    report = pack(folder, tmp_path / "out", progress=False)
    assert report.written == 4
    assert report.skipped == {
        "unreadable image": 2, "no caption": 1, "empty caption": 1, "bad JSON": 1, "empty file": 1,
    }  # fmt: skip
    assert sorted(report.examples["unreadable image"]) == ["bad.png", "cut.jpg"]
    assert "1 left out, empty caption: blank.png" in str(report)
    table = folder / "t.csv"
    table.write_text("path,caption\na.png,ok\nmissing.png,x\n,x\n")
    assert pack(table, tmp_path / "t", progress=False).skipped == {"file not found": 1, "no path": 1}


def test_captions_can_be_optional_and_the_manifest_says_so(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.png").write_bytes(image_bytes(i))
    with pytest.raises(DataError, match="captions=False"):
        pack(source, tmp_path / "x", progress=False)
    assert pack(source, tmp_path / "out", captions=False, progress=False).written == 3
    assert Manifest.load(tmp_path / "out").meta == {"captions": False}


def test_size_shrinks_and_format_converts_keeping_the_aspect(folder, tmp_path):
    pack(folder, tmp_path / "out", size=8, format="webp", progress=False)
    for members in samples_in(tmp_path / "out").values():
        with Image.open(io.BytesIO(members["webp"])) as image:
            assert (image.format, image.size) == ("WEBP", (10, 8))  # from 20 x 16
    pack(folder, tmp_path / "same", size=64, progress=False)
    assert samples_in(tmp_path / "same")["a"]["png"] == (folder / "a.png").read_bytes()  # never enlarged
    pack(folder, tmp_path / "lossless", format="webp", quality=100, progress=False)
    original, packed = (
        Image.open(io.BytesIO(b))
        for b in ((folder / "a.png").read_bytes(), samples_in(tmp_path / "lossless")["a"]["webp"])
    )
    assert original.tobytes() == packed.convert("RGB").tobytes()


def test_names_that_clash_stay_apart(tmp_path):
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    for i, name in enumerate(["a/b.png", "a_b.png", "a.b.png", "a_b-1.png"]):
        (source / name).write_bytes(image_bytes(i))
        (source / name).with_suffix(".txt").write_text(name)
    pack(source, tmp_path / "out", progress=False)
    samples = samples_in(tmp_path / "out")
    assert len(samples) == 4
    assert {s["txt"].decode(): s["png"] for s in samples.values()} == {
        name: image_bytes(i) for i, name in enumerate(["a/b.png", "a_b.png", "a.b.png", "a_b-1.png"])
    }


def test_interrupted_pack_continues_to_the_same_bytes(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(11):
        (source / f"{i}.png").write_bytes(image_bytes(i))
        (source / f"{i}.txt").write_text("" if i == 4 else f"t{i}")
    options = {"max_samples": 3, "progress": False}
    pack(source, tmp_path / "whole", **options)
    real, calls = pack_module._members, []

    def stop_at_nine(*args):
        calls.append(args[0].name)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(pack_module, "_members", stop_at_nine)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "cut", **options)
    monkeypatch.setattr(pack_module, "_members", lambda *a: calls.append(a[0].name) or real(*a))
    calls.clear()
    with pytest.raises(FileExistsError, match="interrupted run"):
        pack(source, tmp_path / "cut", **options)
    report = pack(source, tmp_path / "cut", resume=True, **options)
    assert report.written == 10 and len(calls) < 9  # what was packed is not read again
    hashes = [
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / n).iterdir()} for n in ("whole", "cut")
    ]
    assert hashes[0] == hashes[1]


def test_order_is_drawn_from_the_seed(folder, tmp_path):
    for i in range(10):
        (folder / f"x{i}.png").write_bytes(image_bytes(i))
        (folder / f"x{i}.txt").write_text("x")
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", None)):
        pack(folder, tmp_path / name, seed=seed, progress=False)
    a, b, c, d = (list(samples_in(tmp_path / name)) for name in "abcd")
    assert a == b and a != c and sorted(a) == sorted(c)
    assert d[:3] == ["a", "b_v2", "d"]


@pytest.mark.parametrize(
    "options, words",
    [({"kind": "codes"}, "kind"), ({"format": "gif"}, "format"), ({"size": 0}, "size"), ({"quality": 0}, "quality")],
)
def test_wrong_options_are_named(folder, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        pack(folder, tmp_path / "out", progress=False, **options)


def test_wrong_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        pack(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        pack(tmp_path / "x.parquet", tmp_path / "out")
    (tmp_path / "x.zip").write_text("no")
    with pytest.raises(ConfigError, match="neither a folder nor"):
        pack(tmp_path / "x.zip", tmp_path / "out")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.png").write_bytes(b"x")
    (tmp_path / "both" / "a.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match="say which"):
        pack(tmp_path / "both", tmp_path / "out")
