"""The commands, run as users run them: what they write, and the one line they end with after a mistake."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokgen
from tokgen.cli import COMMANDS, main
from tokgen.data.batches import resize_image
from tokgen.data.shards import Manifest, ShardWriter
from tokgen.encoders.base import load_encoder
from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.images import image_grid, read_image, read_settings, write_png
from tokgen.precompute import tokenize_shards
from tokgen.tokenizers.lavit import LAVIT
from tokgen.tokenizers.seed import SEED
from tokgen.tokenizers.video_lavit_motion import MotionTokenizer
from tokgen.tokenizers.vqgan import VQGAN, VQGANConfig


@pytest.fixture
def model(tmp_path) -> Path:
    config = VQGANConfig(32, (1, 2), 1, 32, 4, quantizer={"type": "vq", "codebook_size": 32})
    return VQGAN(config).save_pretrained(tmp_path / "model")


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in ("a", "b")]
    for path in paths:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 21, 3), dtype=np.uint8)).save(path)
    return paths


def shards(folder: Path, n: int = 10) -> Path:
    with ShardWriter(folder, max_samples=4) as writer:
        for i in range(n):
            file = io.BytesIO()
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
            writer.write(f"k{i}", {"png": file.getvalue(), "txt": f"noise {i}", "json": {"i": i}})
    return folder


def run(*words) -> int:
    return main([str(w) for w in words])


def test_encode_then_decode_gives_the_reconstruction(tmp_path, model, pictures):
    assert run("encode", *pictures, "--model", model, "--out", tmp_path / "t.safetensors", "--device", "cpu") == 0
    assert (
        run("decode", tmp_path / "t.safetensors", "--model", model, "--out", tmp_path / "o.png", "--device", "cpu") == 0
    )
    tokenizer = tokgen.load(model)
    pixels = torch.stack([read_image(p, multiple_of=2) for p in pictures])
    assert pixels.shape == (2, 3, 16, 20)
    expected = image_grid(tokenizer(pixels / 255).reconstruction)
    assert torch.equal(torch.from_numpy(np.array(Image.open(tmp_path / "o.png"))).permute(2, 0, 1), expected)
    assert read_settings(tmp_path / "o.png")["tokenizer"] == tokenizer.fingerprint


def test_tokenize_writes_every_id_with_its_caption(tmp_path, model):
    source = shards(tmp_path / "shards")
    assert run("tokenize", source, "--model", model, "--out", tmp_path / "codes", "--device", "cpu") == 0
    manifest = Manifest.load(tmp_path / "codes")
    tokenizer = tokgen.load(model)
    assert (manifest.kind, manifest.samples) == ("codes", 10)
    assert manifest.meta["tokenizer"] == tokenizer.fingerprint and manifest.meta["codebook_sizes"] == [32]

    from tokgen.data.datamodule import ShardsDataModule

    data = ShardsDataModule(val=str(tmp_path / "codes"), batch_size=5)
    data.setup("validate")
    for batch in data.val_dataloader():
        for key, caption, ids in zip(batch["key"], batch["caption"], batch["ids"]):
            pixels = np.random.default_rng(int(key[1:])).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            expected = tokenizer.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).ids[0]
            assert torch.equal(ids, expected) and caption == f"noise {key[1:]}"


def test_tokenize_embeds_the_pixels_it_tokenizes(tmp_path, model, capsys):
    source, teacher = shards(tmp_path / "shards"), tmp_path / "teacher"
    ContrastiveEncoder(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 6, 8, 4)).save_pretrained(teacher)
    words = ["tokenize", source, "--model", model, "--out", tmp_path / "codes", "--size", 8, "--device", "cpu"]
    assert run(*words, "--embed", teacher) == 0
    embedding = Manifest.load(tmp_path / "codes").meta["embedding"]
    assert embedding == {"encoder": str(teacher), "name": "contrastive encoder teacher", "dim": 6}

    from tokgen.data.datamodule import ShardsDataModule

    data = ShardsDataModule(val=str(tmp_path / "codes"), batch_size=10)
    (batch,) = data.val_dataloader()
    pixels = [np.random.default_rng(int(key[1:])).integers(0, 255, (16, 16, 3), dtype=np.uint8) for key in batch["key"]]
    small = torch.stack([resize_image(torch.from_numpy(p).permute(2, 0, 1), 8) for p in pixels])
    expected = load_encoder(teacher).embed(small)
    assert batch["ids"].shape == (10, 16) and expected.std(0).min() > 1e-3
    torch.testing.assert_close(batch["embedding"], expected, rtol=1e-3, atol=1e-4)

    assert run(*words) == 2  # the same folder without embeddings
    assert "another meta" in capsys.readouterr().err
    words[5] = tmp_path / "other"
    assert run(*words, "--embed", model) == 2
    assert "expected an image encoder" in capsys.readouterr().err


def test_an_embedding_beyond_float16_is_named(tmp_path, model):
    encoder = ContrastiveEncoder(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 6, 8, 4))
    encoder.image_projection.weight.data *= 1e8
    with pytest.raises(tokgen.errors.DataError, match="contrastive encoder gives embeddings that float16 cannot hold"):
        tokenize_shards(
            tokgen.load(model), shards(tmp_path / "shards"), tmp_path / "codes", encoder=encoder, progress=False
        )
    assert not (tmp_path / "codes" / "manifest.json").exists()


def test_tokenize_continues_where_it_was_interrupted(tmp_path, model, monkeypatch):
    source, tokenizer = shards(tmp_path / "shards"), tokgen.load(model)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tokenize_shards(tokenizer, source, whole, batch_size=2, max_samples=3, progress=False)
    encode, calls = VQGAN.encode, []

    def dies(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(VQGAN, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        tokenize_shards(tokenizer, source, cut, batch_size=2, max_samples=3, progress=False)
    assert not (cut / "manifest.json").exists()
    monkeypatch.setattr(VQGAN, "encode", encode)
    report = tokenize_shards(tokenizer, source, cut, batch_size=2, max_samples=3, progress=False)
    assert report.kept == 3 and report.written == 7  # the one whole shard is kept
    assert Manifest.load(cut) == Manifest.load(whole)


def test_tokenize_counts_what_it_cannot_read(tmp_path, model):
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("bad", {"png": b"no picture", "txt": "?"})
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "PNG")
        writer.write("good", {"png": file.getvalue(), "txt": "black"})
    report = tokenize_shards(tokgen.load(model), tmp_path / "shards", tmp_path / "codes", progress=False)
    assert report.written == 1 and report.skipped == {"unreadable image": 1}


def test_check_finds_a_damaged_shard(tmp_path, capsys):
    folder = shards(tmp_path / "shards")
    assert run("check", folder) == 0
    data = bytearray((folder / "00001.tar").read_bytes())
    data[600] ^= 255
    (folder / "00001.tar").write_bytes(data)
    assert run("check", folder) == 2
    assert "00001.tar" in capsys.readouterr().err


def test_check_runs_the_laws(model, capsys):
    assert run("check", model) == 0
    assert "17 of 17 checks hold" in capsys.readouterr().out
    assert run("check", "fsq") == 0


def test_convert_writes_a_model_folder(tmp_path, capsys):
    import sys

    sys.path.insert(0, str(Path(__file__).parent / "parity"))
    import reference

    from tokgen.importers.llamagen import VQ_KEYS, vq_from_state_dict

    case, _ = reference.load(Path(__file__).parent / "parity/cases/llamagen_vq16.json")
    torch.save({"model": reference.state_dict(case), "steps": 3}, tmp_path / "vq.pt")
    assert run("convert", "llamagen-vq", tmp_path / "vq.pt", "--out", tmp_path / "out") == 0
    assert "343 tensors mapped, 1 ignored" in capsys.readouterr().out
    assert (
        VQ_KEYS
        and vq_from_state_dict(reference.state_dict(case))[0].fingerprint == tokgen.load(tmp_path / "out").fingerprint
    )


# -- semantic tokenizers: one size of pictures, tokens of unequal number, encoders, importers ---------------------------


@pytest.fixture(params=["seed", "lavit"])
def semantic(request, tmp_path) -> Path:
    """A small random SEED (28 px, 8 tokens) or LaVIT (32 px, up to 64 tokens) with a pixel decoder."""
    cls, name = {"seed": (SEED, "mlp"), "lavit": (LAVIT, "eva")}[request.param]
    torch.manual_seed(1)
    return cls(cls.example_configs()[name]).save_pretrained(tmp_path / request.param)


def test_semantic_tokenizers_encode_and_decode_pictures_of_any_size(tmp_path, semantic):
    tokenizer = tokgen.load(semantic)
    side, paths = tokenizer.image_size[0], []
    for i, size in enumerate([(40, 33), (21, 60), (side, side)]):
        paths.append(tmp_path / f"{i}.png")
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    words = ["encode", *paths, "--model", semantic, "--out", tmp_path / "t.safetensors", "--device", "cpu"]
    for resize in ("crop", "squash"):
        assert run(*words, "--resize", resize) == 0
        whole = [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in paths]
        pictures = [resize_image(x, side, "squash") if resize == "squash" else read_image(p, side) for p, x in zip(paths, whole)]  # fmt: skip
        tokens, expected = tokgen.Tokens.load(tmp_path / "t.safetensors"), tokenizer.encode(torch.stack(pictures))
        assert torch.equal(tokens.ids, expected.ids) and torch.equal(tokens.mask, expected.mask)
    assert run("decode", tmp_path / "t.safetensors", "--model", semantic, "--out", tmp_path / "o.png", "--device", "cpu") == 0  # fmt: skip
    shown = torch.from_numpy(np.array(Image.open(tmp_path / "o.png"))).permute(2, 0, 1)
    assert torch.equal(shown, image_grid(tokenizer.decode(tokens)))


def test_check_runs_the_laws_of_semantic_tokenizers(semantic, capsys):
    assert run("check", semantic) == 0
    assert "9 of 9 checks hold" in capsys.readouterr().out


def test_a_budget_of_tokens(tmp_path, pictures, model, capsys):
    torch.manual_seed(1)
    lavit = LAVIT(LAVIT.example_configs()["eva"]).save_pretrained(tmp_path / "lavit")
    for keep, count in ((5, 5), ("0.25", 16), (64, 64), ("1.0", 64)):
        words = ["--model", lavit, "--out", tmp_path / "t.safetensors", "--device", "cpu", "--keep", keep]
        assert run("encode", *pictures, *words) == 0
        assert f"{count} tokens, {6 * count} bits each" in capsys.readouterr().out
        assert tokgen.Tokens.load(tmp_path / "t.safetensors").lengths.tolist() == [count, count]
    assert run("encode", pictures[0], *words[:-1], 65) == 2
    assert "expected 1 to 64 places" in capsys.readouterr().err
    assert run("encode", pictures[0], "--model", model, "--out", tmp_path / "t.safetensors", "--keep", 5) == 2
    assert "--keep says nothing about a vqgan tokenizer" in capsys.readouterr().err
    source = shards(tmp_path / "shards")
    assert run("tokenize", source, "--model", model, "--out", tmp_path / "codes", "--keep", 5) == 2
    assert "--keep says nothing about a vqgan tokenizer" in capsys.readouterr().err


def test_tokenize_writes_as_many_ids_as_each_picture_has(tmp_path, capsys):
    """Tokens of unequal number, of pictures brought to the tokenizer's size; and a budget, which is not mixed in."""
    noise = [np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8) for i in range(10)]
    pictures = [resize_image(torch.from_numpy(pixels).permute(2, 0, 1), 32) for pixels in noise]
    tokenizer = LAVIT(LAVIT.example_configs()["eva"]).eval()
    with torch.no_grad():
        scores = tokenizer.selector(tokenizer.encoder.features(torch.stack(pictures))).softmax(-1)[..., 0]
    tokenizer.config = dataclasses.replace(tokenizer.config, threshold=scores.median().item())
    lavit, source = tokenizer.save_pretrained(tmp_path / "lavit"), shards(tmp_path / "shards")
    words = ["tokenize", source, "--model", lavit, "--device", "cpu", "--batch_size", 4]
    assert run(*words, "--out", tmp_path / "codes") == 0
    assert run(*words, "--out", tmp_path / "few", "--keep", 7) == 0
    assert Manifest.load(tmp_path / "few").meta["source"] == {
        "folder": "shards",
        "size": 32,
        "resize": "crop",
        "keep": 7,
    }

    from tokgen.data.datamodule import ShardsDataModule

    lengths = set()
    for batch in ShardsDataModule(val=str(tmp_path / "codes"), batch_size=5).val_dataloader():
        for key, ids, mask in zip(batch["key"], batch["ids"], batch["mask"]):
            assert torch.equal(ids[mask], tokenizer.encode(pictures[int(key[1:])][None]).ids[0])
            lengths.add(int(mask.sum()))
    assert len(lengths) > 1
    (batch,) = ShardsDataModule(val=str(tmp_path / "few"), batch_size=10).val_dataloader()
    assert batch["ids"].shape == (10, 7) and batch["mask"].all()
    capsys.readouterr()
    assert run(*words, "--out", tmp_path / "few") == 2
    assert "another meta" in capsys.readouterr().err


def test_features_are_written_once(tmp_path, model, capsys):
    eye = tmp_path / "eye"
    encoder = ContrastiveEncoder(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 6, 8, 4))
    encoder.save_pretrained(eye)
    words = ["features", shards(tmp_path / "shards"), "--out", tmp_path / "out", "--device", "cpu"]
    assert run(*words, "--encoder", eye, "--size", 12, "--batch_size", 3) == 0
    assert "10 samples given features; image shards with features of contrastive encoder eye" in capsys.readouterr().out
    made = Manifest.load(tmp_path / "out").meta["features"]
    assert made["encoder"] == str(eye) and made["fingerprint"] == load_encoder(eye).fingerprint
    assert (made["shape"], made["size"], made["resize"]) == ([4, 16], 12, "squash")
    assert run(*words, "--encoder", eye, "--size", 12) == 0
    assert "0 samples given features, 10 kept from an earlier run" in capsys.readouterr().out
    assert run("check", tmp_path / "out") == 0
    ContrastiveEncoder(encoder.config).save_pretrained(tmp_path / "other")
    for other, message in ((tmp_path / "other", "their fingerprint differs"), (model, "expected an image encoder")):
        capsys.readouterr()
        assert run(*words, "--encoder", other, "--size", 12) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1


def test_motion_of_videos_becomes_shards(tmp_path, capsys):
    av = pytest.importorskip("av")
    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 255, (48, 64 + 60, 3), dtype=np.uint8)
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[:, 2 * i : 2 * i + 64]), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    (tmp_path / "videos" / "a.txt").write_text("noise moves left")
    assert run("motion", tmp_path / "videos", "--out", tmp_path / "motion", "--method", "match") == 0
    assert f"motion shards are in {tmp_path / 'motion'}" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "motion")
    assert (manifest.kind, manifest.samples) == ("motion", 1)
    assert run("motion", tmp_path / "nowhere", "--out", tmp_path / "other") == 2
    assert "nowhere" in capsys.readouterr().err


def test_tokens_of_motion_are_no_pictures(tmp_path, pictures, capsys):
    config = next(iter(MotionTokenizer.example_configs().values()))
    model = MotionTokenizer(config).save_pretrained(tmp_path / "motion")
    assert run("encode", pictures[0], "--model", model, "--out", tmp_path / "t.safetensors", "--device", "cpu") == 2
    assert "stand for motion and not for pictures" in capsys.readouterr().err
    tokenizer = tokgen.load(model)
    tokenizer.encode(tokenizer.example_pixels(1)).save(tmp_path / "t.safetensors")
    assert run("decode", tmp_path / "t.safetensors", "--model", model, "--out", tmp_path / "o.png", "--device", "cpu") == 2  # fmt: skip
    assert "stand for motion and not for pictures" in capsys.readouterr().err
    words = ["--model", model, "--out", tmp_path / "codes", "--device", "cpu"]
    assert run("tokenize", shards(tmp_path / "shards"), *words) == 2
    assert "tokenizes no pictures" in capsys.readouterr().err
    assert run("check", model) == 0


@pytest.fixture
def published(monkeypatch) -> Path:
    """Makers of checkpoints as they are published, of the importers' own tests."""
    for folder in ("parity", "importers"):
        monkeypatch.syspath_prepend(str(Path(__file__).parent / folder))


def test_convert_eva_and_seed(tmp_path, capsys, published):
    import test_seed_import

    quantizer, tower = test_seed_import.published()
    torch.save(quantizer, tmp_path / "seed_quantizer.pt")
    torch.save(tower, tmp_path / "eva_vit_g.pth")
    words = ["convert", "eva", tmp_path / "eva_vit_g.pth", "--out", tmp_path / "eva"]
    assert run(*words) == 2
    assert "eva also needs --form" in capsys.readouterr().err
    assert run(*words, "--form", "seed") == 0
    assert "tensors mapped" in capsys.readouterr().out
    words = ["convert", "seed", tmp_path / "seed_quantizer.pt", "--out", tmp_path / "seed"]
    assert run(*words, "--vit", tmp_path / "eva_vit_g.pth") == 0
    assert "tensors mapped" in capsys.readouterr().out
    seed, eva = tokgen.load(tmp_path / "seed"), load_encoder(tmp_path / "eva")
    assert seed.encoder.fingerprint == eva.fingerprint  # so that its features can be made before
    assert run(*words, "--decoder", tmp_path / "seed_quantizer.pt") == 2
    assert "--decoder says nothing about seed" in capsys.readouterr().err
    assert run("check", tmp_path / "eva") == 2
    assert "is an image encoder" in capsys.readouterr().err
    assert run("tokenize", "nowhere", "--model", tmp_path / "eva", "--out", tmp_path / "codes") == 2
    assert "is an image encoder (EVA-CLIP" in capsys.readouterr().err
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(picture)
    assert run("encode", picture, "--model", tmp_path / "seed", "--out", tmp_path / "t.safetensors", "--device", "cpu") == 0  # fmt: skip
    words = ["decode", tmp_path / "t.safetensors", "--model", tmp_path / "seed", "--out", tmp_path / "o.png"]
    assert run(*words, "--device", "cpu") == 2
    assert "has no pixel decoder" in capsys.readouterr().err


def test_convert_lavit(tmp_path, capsys, published):
    import test_lavit_import

    paths = {}
    for part, state in test_lavit_import.published().items():
        paths[part] = tmp_path / f"{part}.bin"
        torch.save(state, paths[part])
    words = ["convert", "lavit", paths["tokenizer"], "--out", tmp_path / "lavit", "--decoder", paths["decoder"]]
    assert run(*words) == 2
    assert "lavit also needs --vit" in capsys.readouterr().err
    words += ["--vit", paths["encoder"], "--heads", test_lavit_import.HEADS]
    assert run(*words) == 0
    lavit = tokgen.load(tmp_path / "lavit")
    assert lavit.understanding is None and lavit.config.condition == "lowres"
    assert run(*words, "--visual_weight", paths["visual_weight"]) == 0
    assert tokgen.load(tmp_path / "lavit").config.understanding_dim == 40
    assert run(*words, "--form", "lavit") == 2
    assert "--form says nothing about lavit" in capsys.readouterr().err


def test_convert_motion(tmp_path, capsys, published):
    import reference

    cases = Path(__file__).parent / "parity/cases"
    case, _ = reference.load(cases / "video_lavit_motion.json")
    torch.save(reference.state_dict(case), tmp_path / "motion_tokenizer.bin")
    words = ["convert", "video-lavit-motion", tmp_path / "motion_tokenizer.bin", "--out", tmp_path / "motion"]
    code, error = run(*words), capsys.readouterr()
    assert code == 0, error.err
    assert isinstance(tokgen.load(tmp_path / "motion"), MotionTokenizer) and "tensors mapped" in error.out


def test_config_file_and_flags_mean_the_same(tmp_path, model, pictures):
    (tmp_path / "encode.yaml").write_text(f"model: {model}\nout: {tmp_path / 'a.safetensors'}\nsize: 8\ndevice: cpu\n")
    assert run("encode", "-c", tmp_path / "encode.yaml", pictures[0]) == 0
    assert tokgen.Tokens.load(tmp_path / "a.safetensors").layout == tokgen.Grid(4, 4)


@pytest.mark.parametrize(
    "words, message",
    [
        (["paint", "x"], "unknown command 'paint'"),
        (["encode", "nowhere.png", "--model", "{model}", "--out", "t.safetensors"], "no image at nowhere.png"),
        (["encode", "{picture}", "--model", "nowhere", "--out", "t.safetensors"], "no model folder at 'nowhere'"),
        (["encode", "{picture}", "--model", "{model}", "--out", "t.bin"], "ends in .safetensors"),
        (["decode", "nowhere.safetensors", "--model", "{model}", "--out", "o.png"], "no token file at nowhere"),
        (["tokenize", "nowhere", "--model", "{model}", "--out", "codes"], "No such shard folder: nowhere"),
        (["sample", " ", "--model", "{model}"], "a prompt is empty"),
        (["sample", "cat", "--model", "{model}"], "not a generator"),
        (["check", "nowhere"], "no model folder at 'nowhere'"),
        (["fit", "-c", "nowhere.yaml"], "no configuration file at nowhere.yaml"),
    ],
)
def test_a_mistake_ends_with_one_line_and_code_2(tmp_path, monkeypatch, capsys, model, pictures, words, message):
    monkeypatch.chdir(tmp_path)
    filled = [w.format(model=model, picture=pictures[0]) for w in words]
    assert run(*filled) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert list(tmp_path.glob("*.tmp-*")) == [] and not (tmp_path / "o.png").exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(tokgen.TokgenError):
        main(["check", str(tmp_path / "nowhere"), "--debug"])


def test_every_command_has_help(capsys):
    assert run() == 0
    overview = capsys.readouterr().out
    for name in COMMANDS:
        assert name in overview
        with pytest.raises(SystemExit) as done:
            run(name, "--help")
        assert done.value.code == 0
        assert "usage: tokgen " + name in capsys.readouterr().out


def test_settings_travel_in_the_png(tmp_path):
    write_png(torch.rand(3, 4, 4), tmp_path / "x.png", {"prompt": "ein Stück", "seed": 3})
    assert read_settings(tmp_path / "x.png") == {"prompt": "ein Stück", "seed": 3}
    assert json.loads(Image.open(tmp_path / "x.png").text["tokgen"])["seed"] == 3
