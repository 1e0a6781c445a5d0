"""Label volumes: what they refuse, their numbers, and the published sidecar that they are written to and read from."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch

from tokgen.errors import ConfigError, DataError, InputError
from tokgen.trajectories.base import Trajectories, TrajectorySource, as_frames, build_source


def volume(t: int = 3, h: int = 4, w: int = 5, most: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, most, (t, h, w)).astype(np.int32)


# -- the volume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, said",
    [
        (np.zeros((4, 5), int), "(4, 5)"),
        (np.zeros((2, 4, 5)), "float64"),
        (np.zeros((0, 4, 5), int), "(0, 4, 5)"),
        (np.full((2, 4, 5), -2), "-2"),
        (np.full((2, 4, 5), 2**40), str(2**40)),
    ],
)
def test_what_is_no_volume_is_refused(labels, said):
    with pytest.raises(InputError) as error:
        Trajectories(labels)
    assert said in str(error.value)


def test_count_volumes_and_panoptic():
    labels = np.array([[[0, 0, 2]], [[2, -1, 2]]])
    found = Trajectories(labels.astype(np.int16))
    assert found.labels.dtype == np.int32 and found.shape == (2, 1, 3) and found.count == 3
    assert found.volumes().tolist() == [[2, 0], [0, 0], [1, 2]]
    assert not found.panoptic and Trajectories(labels.clip(0)).panoptic
    nothing = Trajectories(np.full((2, 3, 3), -1))
    assert nothing.count == 0 and nothing.volumes().shape == (0, 2) and nothing.compact().count == 0


def test_compact_numbers_by_first_appearance_and_keeps_every_border():
    found = Trajectories(np.array([[[7, 7, -1, 3]], [[5, 3, 3, 7]]]))
    assert found.compact().labels.tolist() == [[[0, 0, -1, 1]], [[2, 1, 1, 0]]]
    labels = volume(most=40)
    compact = Trajectories(labels).compact()
    pairs = set(zip(labels.ravel().tolist(), compact.labels.ravel().tolist()))
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)  # one to one
    assert (compact.volumes().sum(1) > 0).all() and compact.count == len(np.unique(labels[labels >= 0]))
    assert np.array_equal(compact.compact().labels, compact.labels)


def test_resized_takes_the_middle_of_each_cell():
    labels = np.arange(36).reshape(1, 6, 6)
    assert Trajectories(labels).resized(2, 2).labels.tolist() == [[[7, 10], [25, 28]]]
    larger = Trajectories(labels).resized(12, 18)
    assert np.array_equal(larger.labels, labels.repeat(2, 1).repeat(3, 2))
    assert np.array_equal(larger.resized(6, 6).labels, labels)


# -- the sidecar -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most, dtype", [(6, np.uint8), (300, np.uint16), (70_000, np.int32)])
def test_a_sidecar_comes_back(tmp_path, most, dtype):
    labels = volume(3, 20, 20, 6)
    labels[-1, -1, -1] = most - 1
    paths = Trajectories(labels).save(tmp_path / "deep" / "clip")
    assert [p.name for p in paths] == ["clip_mask.npz", "clip_graph.npz"]
    with np.load(paths[0]) as mask, np.load(paths[1]) as graph:  # as the published loader finds them
        assert mask["arr_0"].dtype == dtype and graph["tensor"].dtype == np.int64
        assert graph["tensor"].shape == (most, 3) and (mask["arr_0"] == 0).sum() == (labels == -1).sum()
        for m in range(6):
            for t in range(3):
                number = graph["tensor"][m, t]
                assert ((mask["arr_0"][t] == number) & (number > 0)).sum() == (labels[t] == m).sum()
    assert np.array_equal(Trajectories.load(tmp_path / "deep" / "clip").labels, labels)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["clip_graph.npz", "clip_mask.npz"]


def test_published_numbering_each_frame_by_itself():
    """Segments are numbered anew in each frame; the graph says which trajectory each belongs to."""
    labels = volume(5, 8, 8, 7, seed=1)
    rng = np.random.default_rng(0)
    mask, graph = np.zeros_like(labels), np.zeros((7, 5), np.int64)
    for t in range(5):
        numbers = 1 + rng.permutation(7)
        for m in range(7):
            if (labels[t] == m).any():
                mask[t][labels[t] == m] = graph[m, t] = numbers[m]
    assert not np.array_equal(mask - 1, labels)
    assert np.array_equal(Trajectories.from_sidecar(mask, graph).labels, labels)
    assert np.array_equal(Trajectories.from_sidecar(mask.astype(np.uint8), graph.astype(np.int16)).labels, labels)


def test_segments_of_no_trajectory_or_of_several():
    mask = np.array([[[1, 2, 3, 0]], [[3, 1, 1, 9]]])
    graph = np.array([[0, 1], [2, 1], [2, 3], [77, 0]])  # 77 is nowhere; in frame 1, segments 1 and 3
    found = Trajectories.from_sidecar(mask, graph)
    assert found.labels.tolist() == [[[-1, 1, -1, -1]], [[2, 0, 0, -1]]]
    assert Trajectories.from_sidecar(mask, graph[:0]).count == 0


@pytest.mark.parametrize(
    "mask, graph",
    [
        (np.zeros((2, 3, 3), int), np.zeros((4, 3), int)),
        (np.zeros((3, 3), int), np.zeros((4, 3), int)),
        (np.zeros((2, 3, 3)), np.zeros((4, 2), int)),
        (np.zeros((2, 3, 3), int), np.zeros((4, 2))),
        (np.full((2, 3, 3), -1), np.zeros((4, 2), int)),
        (np.zeros((2, 3, 3), int), np.full((4, 2), -1)),
    ],
)
def test_arrays_that_are_no_sidecar_are_refused(mask, graph):
    with pytest.raises(InputError):
        Trajectories.from_sidecar(mask, graph)


def damage(path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no archive")
    elif kind == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        start = data.index(b"NUMPY") if b"NUMPY" in data else 60
        path.write_bytes(data[: start + 5] + bytes(255 - b for b in data[start + 5 : start + 45]) + data[start + 45 :])
    elif kind == "encrypted":  # says its flags, here and in the list at the end
        there = data.index(b"PK\x01\x02") + 8
        path.write_bytes(data[:6] + b"\x01" + data[7:there] + b"\x01" + data[there + 1 :])
    elif kind == "other name":
        np.savez(open(path, "wb"), wrong=np.zeros((3, 4, 5), np.uint8))
    elif kind == "objects":
        np.savez(open(path, "wb"), arr_0=np.array([{}, {}]), tensor=np.array([{}, {}]))
    elif kind == "lies":  # a header that claims more than there is
        with zipfile.ZipFile(path, "w") as archive:
            head = b"{'descr': '<i8', 'fortran_order': False, 'shape': (900000, 900000), }\n"
            for name in ("arr_0.npy", "tensor.npy"):
                archive.writestr(name, b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(64))


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "text", "cut off", "flipped", "encrypted", "other name", "objects", "lies"]
)
@pytest.mark.parametrize("which", ["mask", "graph"])
def test_damaged_files_are_named(tmp_path, which, kind):
    Trajectories(volume()).save(tmp_path / "clip")
    damage(tmp_path / f"clip_{which}.npz", kind)
    with pytest.raises(DataError) as error:
        Trajectories.load(tmp_path / "clip")
    assert f"clip_{which}.npz" in str(error.value)


def test_an_array_that_would_fill_the_memory_is_not_unpacked(tmp_path, monkeypatch):
    Trajectories(volume()).save(tmp_path / "clip")
    monkeypatch.setattr("tokgen.trajectories.base.MAX_BYTES", 100)
    with pytest.raises(DataError, match="at most 100"):
        Trajectories.load(tmp_path / "clip")


# -- sources -----------------------------------------------------------------------------------------------------------


class Bright(TrajectorySource):
    """Two trajectories: what is dark, and what is bright."""

    name = "bright"

    def __init__(self, threshold: int = 128) -> None:
        self.threshold = threshold

    def track(self, video: np.ndarray) -> Trajectories:
        return Trajectories((video.mean(-1) > self.threshold).astype(np.int32))

    def settings(self) -> dict:
        return {"threshold": self.threshold}


def test_sources_are_built_from_their_settings(monkeypatch):
    from tokgen.trajectories.base import SOURCES

    monkeypatch.setitem(SOURCES, "bright", f"{__name__}:Bright")
    source = build_source({"type": "bright", "threshold": 7})
    assert source.settings() == {"threshold": 7}
    for settings, said in (({"type": "nothing"}, "voting"), ({}, "None"), ({"type": "bright", "wrong": 1}, "wrong")):
        with pytest.raises(ConfigError, match=said):
            build_source(settings)


def test_a_source_takes_arrays_and_tensors_alike():
    video = np.random.default_rng(0).integers(0, 256, (3, 6, 7, 3), np.uint8)
    tensor = torch.from_numpy(video).permute(0, 3, 1, 2)  # (T, 3, H, W)
    wanted = Bright()(video).labels
    assert 0 < wanted.mean() < 1
    for same in (tensor, tensor.float() / 255, tensor.double() / 255):
        assert np.array_equal(Bright()(same).labels, wanted)


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((3, 6, 7), np.uint8),
        np.zeros((3, 6, 7, 3), np.float32),
        np.zeros((0, 6, 7, 3), np.uint8),
        np.zeros((3, 3, 6, 7), np.uint8),
        torch.zeros(3, 6, 7, 3),
        torch.full((3, 3, 6, 7), 255.0),
        torch.zeros(3, 3, 6, 7) - 1,
        torch.zeros(3, 6, 7),
    ],
)
def test_what_is_no_clip_is_refused(video):
    with pytest.raises(InputError, match="clip"):
        as_frames(video)
