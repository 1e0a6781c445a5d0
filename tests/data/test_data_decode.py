"""The decoder whitelist: pictures of every kind become RGB, and nothing in a shard can do harm."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_makers import image_bytes, write_images

from tokgen.data.batches import Captions, ImageSamples, resize_image
from tokgen.data.decode import (
    BadSample,
    decode_image,
    decode_json,
    decode_member,
    decode_npy,
    decode_text,
    image_header,
)
from tokgen.data.shard_set import ShardSet
from tokgen.data.shards import MANIFEST, build_manifest
from tokgen.data.stream import ShardLoader
from tokgen.data.tar import RawSample, iter_samples
from tokgen.errors import DataError


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_every_mode_decodes_to_the_rgb_that_pil_gives(mode, format):
    image = Image.open(io.BytesIO(image_bytes(0, (23, 17)))).convert(mode)
    if format != "PNG" and mode in ("P", "1"):
        image = image.convert("RGB")
    data = encoded(image, format)
    x = decode_image(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert x.dtype == torch.uint8 and x.shape == (3, 17, 23)
    tolerance = 3 if format == "JPEG" else 0  # two builds of libjpeg
    assert np.abs(x.permute(1, 2, 0).numpy().astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("mode, format", [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_transparency_is_composited_on_white(mode, format):
    pixels = np.zeros((4, 6, 4), dtype=np.uint8)
    pixels[:, :2, 3], pixels[:, 2:4, 3], pixels[:, 4:, 3] = 0, 51, 255  # black at 0, 20 and 100 %
    image = Image.fromarray(pixels).convert(mode)
    x = decode_image(encoded(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {})))
    assert x.shape == (3, 4, 6)
    assert x[:, 0].unique(dim=0).tolist() == [[255, 255, 204, 204, 0, 0]]


def test_transparent_palette_is_composited_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    x = decode_image(encoded(image, "PNG", transparency=0))
    assert x[:, 0, 0].tolist() == [200, 100, 50] and x[:, 3, 3].tolist() == [255, 255, 255]


def test_sixteen_bits_become_eight_by_value():
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    assert decode_image(encoded(Image.fromarray(values), "PNG"))[0, 0].tolist() == [0, 1, 128, 255]


def test_exif_orientation_is_ignored():
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode_image(encoded(image, "JPEG", exif=exif)).shape == (3, 4, 8)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.8])
def test_cut_pictures_are_bad_samples(format, part):
    data = image_bytes(0, (40, 40), format)
    with pytest.raises(BadSample, match="unreadable image"):
        decode_image(data[: int(len(data) * part)])


def test_other_formats_are_refused_whatever_they_are_called():
    for format in ("GIF", "BMP", "TIFF", "PPM"):
        with pytest.raises(BadSample, match="unreadable image"):
            decode_image(encoded(Image.new("RGB", (4, 4)), format))


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "mode, options",
    [("RGB", {}), ("L", {}), ("RGBA", {}), ("RGB", {"lossless": True}), ("RGBA", {"lossless": True}), ("RGB", {"progressive": True}),
     ("RGB", {"exif": b"Exif\0\0" + bytes(300), "icc_profile": bytes(500)})],
)  # fmt: skip
def test_headers_say_what_pil_says(format, mode, options):
    image = Image.open(io.BytesIO(image_bytes(0, (301, 17)))).convert(mode)
    if format == "JPEG":
        image = image.convert("L" if mode == "L" else "RGB")
    if image.mode == "RGBA":
        image.putalpha(100)
    data = encoded(image, format, **options)
    kind, width, height, transparent, deep = image_header(data)
    assert (kind, width, height, deep) == ({"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[format], 301, 17, False)
    assert transparent == (Image.open(io.BytesIO(data)).mode == "RGBA")


@pytest.mark.parametrize("width, height", [(13_000, 13_000), (10_000, 7_000), (2**31 - 1, 2**31 - 1)])
def test_pixel_bombs_are_refused_from_their_header(width, height, monkeypatch):
    import torchvision.io

    def never(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(torchvision.io, "decode_png", never)
    with pytest.raises(BadSample, match="too many pixels") as caught:
        decode_image(png_claiming(width, height))
    assert caught.value.reason == "too many pixels"


def test_max_pixels_is_the_callers_to_set():
    assert decode_image(image_bytes(0, (10, 10)), max_pixels=100).shape == (3, 10, 10)
    with pytest.raises(BadSample, match="too many pixels"):
        decode_image(image_bytes(0, (10, 10)), max_pixels=99)


@pytest.mark.parametrize("mode", ["crop", "random_crop", "squash"])
def test_resize_modes(mode):
    x = torch.zeros(3, 20, 40, dtype=torch.uint8)
    x[:, :, 10:30] = 200  # the central square
    y = resize_image(x, 8, mode, random.Random(0) if mode == "random_crop" else None)
    assert y.shape == (3, 8, 8) and y.dtype == torch.uint8
    if mode == "crop":
        assert (y == 200).all()
    if mode == "squash":
        assert (y[:, :, 0] == 0).all() and (y[:, :, 4] >= 200).all()  # bicubic overshoots a little
    if mode == "random_crop":
        crops = {resize_image(x, 20, mode, random.Random(i)).float().mean().item() for i in range(20)}
        assert len(crops) > 5
        assert torch.equal(resize_image(x, 8, mode), resize_image(x, 8, "crop"))  # without a generator: the middle


# ----------------------------------------------------------------------------------------------------- text, JSON, arrays


def test_text_is_utf8_without_mark_and_stripped():
    assert decode_text("\ufeff red heart \n".encode()) == "red heart"
    with pytest.raises(BadSample, match="not UTF-8"):
        decode_text(b"\xff\xfe")


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[1]",
        b'"x"',
        b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}",
        b"[" * 200_000,
        b'{"a": "' + b"x" * (1 << 20) + b'"}',
    ],
)
def test_json_is_bounded_in_size_and_depth(data):
    with pytest.raises(BadSample, match="bad JSON"):
        decode_json(data)


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.eye(3)),
        np.float32(2),
        np.zeros((0, 3)),
    ],
)
def test_arrays_read_as_numpy_reads_them(array):
    x = decode_npy(npy(array))
    assert x.dtype == array.dtype and x.shape == np.shape(array) and np.array_equal(x, array)


def test_arrays_that_lie_or_pickle_are_refused(tmp_path):
    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    for data in (
        npy(np.array([Boom()], dtype=object), allow_pickle=True),
        npy(np.zeros(4)).replace(b"(4,)", b"(9,)"),
        npy(np.zeros(4)).replace(b"(4,), }    ", b"(10**15,), }"),
        npy(np.zeros(4))[:-1],
        b"",
        b"\x93NUMPY\x01\x00\xff\xff",
        npy(np.zeros(2, dtype=[("a", "i4")])),
    ):
        with pytest.raises(BadSample, match="bad array"):
            decode_npy(data)
    assert not (tmp_path / "boom").exists()


def test_extensions_off_the_whitelist_have_no_decoder():
    for extension in ("pyd", "pkl", "pickle", "pth", "pt", "txt.gz", "exe", "mask.npy"):
        with pytest.raises(KeyError):
            decode_member(extension, b"")
    assert decode_member("mp4", b"bytes stay bytes") == b"bytes stay bytes"
    assert decode_member("cls", b"7\n") == 7
    assert decode_member("emb.npy", npy(np.array([0.5], np.float16))) == 0.5


# -------------------------------------------------------------------------------------------------------- hostile shards


def test_pickles_in_a_shard_are_inert(tmp_path):
    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    attack = pickle.dumps(Boom())
    torch_file = io.BytesIO()
    torch.save(Boom(), torch_file)
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "00000.tar", "w") as tar:
        for i in range(4):
            members = {
                "png": image_bytes(i), "txt": b"t", "json": b"{}", "pyd": attack, "pkl": attack, "pickle": attack,
                "pth": torch_file.getvalue(), "txt.pyd.gz": gzip.compress(attack), "txt.gz": gzip.compress(b"x" * 10**7),
                "npy": npy(np.array([Boom()], dtype=object), allow_pickle=True),
            }  # fmt: skip
            for extension, data in members.items():
                info = tarfile.TarInfo(f"k{i}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    build_manifest(tmp_path / "s", "images")
    shards = ShardSet.open(tmp_path / "s")
    data = ShardLoader(shards, ImageSamples(Captions(variants=1.0), 8), batch_size=2)
    batches = list(data)
    assert [len(b["key"]) for b in batches] == [2, 2] and data.stats.bad == 0
    assert all(set(b) == {"pixels", "caption", "key"} for b in batches)
    assert not (tmp_path / "boom").exists()


def test_large_members_are_not_read(tmp_path):
    write_images(tmp_path / "s", [8])
    with open(tmp_path / "s" / "00000.tar", "rb") as file:
        samples = [s for _, s in iter_samples(file, extensions=("png", "txt"), max_member_bytes=100)]
    assert all(s.problem == "file too large" and "png" not in s.members for s in samples)


def test_links_and_devices_in_a_shard_are_nothing(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (
            ("a.txt", tarfile.SYMTYPE),
            ("b.txt", tarfile.LNKTYPE),
            ("c.txt", tarfile.CHRTYPE),
            ("d", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("real.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"ok"))
    with open(tmp_path / "x.tar", "rb") as file:
        assert [s.key for _, s in iter_samples(file, extensions=("txt",), max_member_bytes=9)] == ["real"]


def test_shell_locations_are_refused_unless_allowed(images, tmp_path):
    for location in (f"pipe:touch {tmp_path}/ran; cat {images}/{{}}", f"pipe:touch {tmp_path}/ran"):
        with pytest.raises(DataError, match="would run a shell command"):
            ShardSet.open(location)
    for location in ("ftp://host/x", "file:///etc", "simplecache::http://host/x"):
        with pytest.raises(DataError, match="scheme"):
            ShardSet.open(location)
    assert not (tmp_path / "ran").exists()
    allowed = ShardSet.open(f"pipe:cat {images}/{{}}", allow_shell_urls=True)
    data = ShardLoader(allowed, ImageSamples(size=8), batch_size=4)
    assert sorted(k for b in data for k in b["key"]) == [f"k{i:03d}" for i in range(48)]


@pytest.mark.parametrize("ranges", [True, False])
def test_http_folders_stream(images, ranges):
    pytest.importorskip("aiohttp")
    import http.server
    import threading

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(images))

        def log_message(self, *args):
            pass

        def do_GET(self):
            wanted = self.headers.get("Range")
            if not (ranges and wanted):
                return super().do_GET()
            data = (Path(images) / self.path.strip("/")).read_bytes()
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            part = data[int(low) : int(high) + 1 if high else len(data)]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {low}-{int(low) + len(part) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def end_headers(self):
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            super().end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        data = ShardLoader(ShardSet.open(url), ImageSamples(size=8), batch_size=4)
        local = ShardLoader(ShardSet.open(images), ImageSamples(size=8), batch_size=4)
        for a, b in zip(data, local, strict=True):
            assert a["key"] == b["key"] and torch.equal(a["pixels"], b["pixels"])
        with pytest.raises(FileNotFoundError, match=MANIFEST):
            ShardSet.open(url + "/nowhere")
    finally:
        server.shutdown()
        server.server_close()


# -------------------------------------------------------------------------------------------------------------- captions


def raw(caption: str, **metadata) -> RawSample:
    return RawSample("k", {"txt": caption.encode(), "json": json.dumps(metadata).encode()})


def test_a_caption_may_live_in_the_json():
    rng, sample = random.Random(0), RawSample("k", {"json": b'{"caption": " a cat ", "captions": ["cat"]}'})
    assert Captions()(sample, rng) == "a cat"
    assert Captions(variants=1.0)(sample, rng) == "cat"
    both = RawSample("k", {"txt": b"the text wins", "json": b'{"caption": "a cat"}'})
    assert Captions()(both, rng) == "the text wins"
    for members, reason in (
        ({"json": b'{"captions": ["cat"]}'}, "no caption"),
        ({"json": b'{"caption": ""}'}, "empty caption"),
    ):
        with pytest.raises(BadSample, match=reason):
            Captions()(RawSample("k", members), rng)
        assert Captions(required=False)(RawSample("k", members), rng) == ""


def test_caption_variants_are_drawn_with_their_probability():
    sample = raw("main", captions=["one", "two", "", 7])
    rng = random.Random(0)
    drawn = [Captions(variants=0.5)(sample, rng) for _ in range(2000)]
    assert set(drawn) == {"main", "one", "two"}
    assert abs(drawn.count("main") / 2000 - 0.5) < 0.05 and abs(drawn.count("one") / 2000 - 0.25) < 0.05
    assert {Captions()(sample, rng) for _ in range(20)} == {"main"}
    assert Captions(variants=1.0)(raw("main"), rng) == "main"


def test_word_dropout_spares_the_style_and_one_word():
    rng = random.Random(0)
    some = [Captions(word_dropout=0.5)(raw("big red heart, shiny, flat style"), rng) for _ in range(400)]
    assert all(caption.endswith(", flat style") and not caption.startswith(",") for caption in some)
    words = [caption.removesuffix(", flat style").replace(",", "").split() for caption in some]
    assert 1.8 < sum(map(len, words)) / 400 < 2.3 and min(map(len, words)) == 1
    assert Captions(word_dropout=1.0)(raw("heart"), rng) == "heart"
    assert Captions()(raw("a, b"), rng) == "a, b"
