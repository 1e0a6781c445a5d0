"""Work shared by units: how samples are cut, what is continued and what is refused, and disks that are full."""

from __future__ import annotations

import json
import os
import resource

import pytest

from tokgen.data import units
from tokgen.data.shards import MANIFEST, PARTIAL, Manifest, ShardWriter, build_manifest
from tokgen.data.units import begun_meta, share_units, units_of
from tokgen.errors import DataError

META = {"made": "here", "shape": (2, 3)}


def write_source(folder, count=23, max_samples=5):
    with ShardWriter(folder, kind="images", max_samples=max_samples) as writer:
        for i in range(count):
            writer.write(f"k{i}", {"txt": f"text {i}", "json": {"i": i}})
    return folder


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


def shout(samples, writer, skipped):
    for raw in samples:
        if raw.key == "k7":
            skipped["seven"] += 1
        else:
            writer.write(raw.key, {"txt": raw.members["txt"].upper()})


def share(source, out, work=shout, **options):
    options = {"kind": "codes", "meta": META, "extensions": ("txt",), "max_samples": 4, "done": "made", **options}
    return share_units(source, out, work, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupted_at(key):
    def work(samples, writer, skipped):
        for raw in samples:
            if raw.key == key:
                raise KeyboardInterrupt
            shout(iter([raw]), writer, skipped)

    return work


@pytest.mark.parametrize("max_samples", [1, 3, 4, 5, 7, 10, 22, 23, 100])
def test_units_are_all_samples_once_and_in_order(source, max_samples):
    cut = units_of(Manifest.load(source), max_samples)
    keys = [[raw.key for raw in unit.samples(source, ("txt",))] for unit in cut]
    assert [key for unit in keys for key in unit] == [f"k{i}" for i in range(23)]
    assert {len(unit) for unit in keys[:-1]} <= {max_samples} and 0 < len(keys[-1]) <= max_samples


def test_samples_that_the_manifest_does_not_know_are_not_lost(source):
    manifest = json.loads((source / MANIFEST).read_text())
    manifest["shards"][1]["samples"] = 3  # it holds 5
    (source / MANIFEST).write_text(json.dumps(manifest))
    keys = [raw.key for unit in units_of(Manifest.load(source), 4) for raw in unit.samples(source, ("txt",))]
    assert keys == [f"k{i}" for i in range(23)]


def test_a_folder_is_complete_and_left_as_it_is(source, tmp_path):
    report = share(source, tmp_path / "out")
    assert str(report) == "22 samples made, skipped: 1 (seven)" and report.whole
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.kind, manifest.samples, manifest.meta) == ("codes", 22, {"made": "here", "shape": [2, 3]})
    assert [shard.samples for shard in manifest.shards] == [4, 3, 4, 4, 4, 3]
    assert begun_meta(tmp_path / "out") == manifest.meta
    before = contents(tmp_path / "out")
    report = share(source, tmp_path / "out", work=None, max_samples=9)
    assert (report.written, report.kept) == (0, 22) and contents(tmp_path / "out") == before


def test_large_units_become_several_shards(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ShardWriter.__init__, "__kwdefaults__", {**ShardWriter.__init__.__kwdefaults__, "max_bytes": 10_240}
    )
    share(source, tmp_path / "out", max_samples=15)
    manifest = Manifest.load(tmp_path / "out")
    assert [shard.name for shard in manifest.shards] == [f"{i:05d}.tar" for i in range(len(manifest.shards))]
    assert manifest.samples == 22 and len(manifest.shards) > 2
    assert build_manifest(tmp_path / "out", "codes", manifest.meta) == manifest


def test_what_was_interrupted_or_lost_is_made_again_and_no_more(source, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    share(source, whole)
    with pytest.raises(KeyboardInterrupt):
        share(source, cut, interrupted_at("k14"))
    assert sorted(path.name for path in cut.iterdir()) == [".units"]
    assert not list(cut.glob(".units/*.tmp-*")) and begun_meta(cut)["made"] == "here"
    with pytest.raises(FileNotFoundError, match="interrupted run"):
        Manifest.load(cut)

    os.truncate(cut / ".units" / "00001" / "00000.tar", 600)
    (cut / ".units" / "00003.tmp-0123").mkdir()  # of a process that was killed
    whole_is, calls = units._is_whole, []

    def dies(path, entry):  # while shards are moved to their places
        calls.append(path.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole_is(path, entry)

    monkeypatch.setattr(units, "_is_whole", dies)
    made = []

    def counted(samples, writer, skipped):
        samples = list(samples)
        made.append(samples[0].key)
        shout(iter(samples), writer, skipped)

    with pytest.raises(KeyboardInterrupt):
        share(source, cut, counted)
    assert not (cut / MANIFEST).exists() and (cut / "00000.tar").exists()
    report = share(source, cut, counted)
    assert made == ["k12", "k16", "k20", "k4"]
    assert (report.written, report.kept, report.skipped) == (0, 22, {"seven": 1})
    assert contents(cut) == contents(whole)


def test_a_process_that_comes_between_manifest_and_end_removes_what_is_left(source, tmp_path, monkeypatch):
    share(source, tmp_path / "whole")
    out, end = tmp_path / "out", units._Sharing.end
    monkeypatch.setattr(units._Sharing, "end", lambda self: None)
    share(source, out)
    assert (out / ".units").is_dir() and (out / MANIFEST).is_file()
    monkeypatch.setattr(units._Sharing, "end", end)
    report = share(source, out, work=None)
    assert (report.written, report.others) == (0, 22) and contents(out) == contents(tmp_path / "whole")


def test_what_does_not_belong_together_is_not_mixed(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        share(source, out, interrupted_at("k14"))
    for options, reason in (
        ({"meta": {"made": "elsewhere"}}, "another meta"),
        ({"kind": "images"}, "another kind"),
        ({"max_samples": 5}, "max_samples 4 and not 5"),
    ):
        with pytest.raises(DataError, match=f"begun with {reason}"):
            share(source, out, **options)
    with pytest.raises(DataError, match="other source shards"):
        share(write_source(tmp_path / "more", 30), out)
    share(source, out)
    with pytest.raises(DataError, match="another meta"):
        share(source, out, meta={"made": "elsewhere"})
    os.truncate(out / "00002.tar", 100)
    with pytest.raises(DataError, match=r"00002\.tar is missing or not as long"):
        share(source, out)
    for left in (PARTIAL, "00000.tar"):
        (tmp_path / left.replace(".", "-")).mkdir()
        (tmp_path / left.replace(".", "-") / left).write_text("{}")
        with pytest.raises(DataError, match=f"holds {left} and no {MANIFEST}"):
            share(source, tmp_path / left.replace(".", "-"))


def test_new_source_shards_are_not_silently_left_out(source, tmp_path, caplog):
    share(source, tmp_path / "out")
    share(write_source(tmp_path / "more", 30), tmp_path / "out", work=None)
    assert "complete with 22 samples" in caplog.text and "has 30" in caplog.text


def test_no_sample_that_can_be_used_is_an_error(source, tmp_path):
    def none(samples, writer, skipped):
        skipped["useless"] += len(list(samples))

    with pytest.raises(DataError, match=r"no sample of .* can be used: 23 \(useless\)"):
        share(source, tmp_path / "out", none)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_more_ranks_than_units_are_told(source, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    share(source, tmp_path / "out")
    assert "8 processes, and 23 samples are 6 units of max_samples=4" in caplog.text


def test_a_full_disk_leaves_no_half_written_shard(source, tmp_path):
    share(source, tmp_path / "whole")
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    large = []

    def work(samples, writer, skipped):
        large.append(len(large) == 3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if large[-1] else limits[0], limits[1]))
        shout(samples, writer, skipped)

    try:
        with pytest.raises(DataError, match=r"out cannot be written: .*repeat the command"):
            share(source, out, work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.glob("*.tar")) and not list(out.glob(".units/*.tmp-*"))
    report = share(source, out)
    assert (report.kept, report.written) == (11, 11) and contents(out) == contents(tmp_path / "whole")
