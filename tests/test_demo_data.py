"""The shipped demo shards: whole, within their size, and with splits that hold out what they say."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from tokgen.data.shards import Manifest, verify
from tokgen.data.tar import iter_samples

SHARDS = Path(__file__).parents[1] / "assets" / "demo" / "shards"
SPLITS = ("train", "val", "heldout", "photos")


@pytest.fixture(scope="module")
def samples() -> dict[str, list[tuple[bytes, dict]]]:
    found = defaultdict(list)
    for split in SPLITS:
        for path in sorted((SHARDS / split).glob("*.tar")):
            with open(path, "rb") as file:
                for _, raw in iter_samples(file, extensions=("webp", "json"), max_member_bytes=1 << 20):
                    found[split].append((raw.members["webp"], json.loads(raw.members["json"])))
    return found


def test_shards_are_whole_and_small():
    assert [problem for split in SPLITS for problem in verify(SHARDS / split)] == []
    assert sum(Manifest.load(SHARDS / split).bytes for split in SPLITS) <= 15_000_000


def test_val_holds_out_one_style_of_a_known_emoji_and_heldout_whole_emoji(samples):
    splits = defaultdict(list)
    for split in SPLITS[:3]:
        for _, record in samples[split]:
            splits[record["hexcode"]].append(split)
    held = [where for where in splits.values() if set(where) != {"train"}]
    assert all(sorted(where) in (["train", "train", "val"], ["heldout"] * 3) for where in held)
    assert len(held) == len(samples["val"]) + len(samples["heldout"]) / 3


def test_no_picture_is_in_two_splits(samples):
    pictures = {split: {picture for picture, _ in samples[split]} for split in SPLITS}
    for i, split in enumerate(SPLITS):
        for other in SPLITS[i + 1 :]:
            assert not pictures[split] & pictures[other]


def test_a_caption_or_variant_asks_for_one_picture(samples):
    asked = defaultdict(set)
    for split in SPLITS[:3]:
        for _, record in samples[split]:
            assert record["caption"] == f"{record['label']}, {record['style']} style"
            assert 4 <= len(record["captions"]) <= 8
            for text in (record["caption"], *record["captions"]):
                asked[text.lower()].add((record["hexcode"], record["style"]))
    assert all(len(pictures) == 1 for pictures in asked.values())


def test_photographs_name_author_and_licence(samples):
    licences = (SHARDS.parent / "LICENSES.md").read_text(encoding="utf-8")
    for _, record in samples["photos"]:
        assert record["author"] in licences and record["license"] in (
            "public domain",
            "CC0-1.0",
            "CC-BY-4.0",
            "CC-BY-2.0",
        )
    assert {record["split"] for _, record in samples["photos"]} == {"train", "val"}
