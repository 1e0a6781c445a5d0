"""`tokgen tokenize` on video shards: ragged codes of clips, which a generator that ends by itself trains on and draws."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tokgen.cli import main
from tokgen.data.datamodule import ShardsDataModule
from tokgen.data.shards import Manifest, ShardWriter
from tokgen.errors import ConfigError, DataError, InputError
from tokgen.generators.llama import LlamaGenerator
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.images import read_settings
from tokgen.precompute import tokenize_shards
from tokgen.tokenizers.base import TOKENIZERS
from tokgen.training.callbacks import SampleGrid
from tokgen.trajectories.picture import mp4_bytes

pytest.importorskip("av")
SIZE, FRAMES, COUNT = 16, 8, 7
COLOURS = np.array([[230, 40, 40], [40, 200, 60], [50, 60, 230], [230, 220, 50], [200, 60, 200]], np.uint8)


def clip_of(i):
    """Frames and labels of 1 + i % 4 bars on grey: each a trajectory, and the grey another."""
    frames = np.full((FRAMES + i % 3, SIZE, SIZE, 3), 90, np.uint8)
    labels = np.ones(frames.shape[:3], np.uint8)  # label + 1
    for bar in range(1 + i % 4):
        for t in range(len(frames)):
            left = (t + 3 * bar) % (SIZE - 4)
            frames[t, 4 * bar : 4 * bar + 3, left : left + 4] = COLOURS[(bar + i) % 5]
            labels[t, 4 * bar : 4 * bar + 3, left : left + 4] = bar + 2
    return frames, labels


def write_videos(folder, trajectories=True, fps=None, count=COUNT):
    made = {"source": {"type": "truth"}, "size": SIZE, "resize": "crop", "grid": [SIZE, SIZE], "fps": fps}
    with ShardWriter(
        folder, kind="videos", max_samples=3, meta={"trajectories": made} if trajectories else {}
    ) as writer:
        for i in range(count):
            frames, labels = clip_of(i)
            planes = {"traj.npy": labels} if trajectories else {}
            about = json.dumps({"length": 1.5, "i": i})  # seconds, and not a number of codes
            video = mp4_bytes(frames, 8.0, crf=0)
            writer.write(f"v{i}", {"mp4": video, "txt": f"{1 + i % 4} bars", "json": about, **planes})
    return folder


def build(name, example):
    torch.manual_seed(0)
    cls = TOKENIZERS[name]
    return cls(cls.example_configs()[example]).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return build("trajectory", "plain")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def codes(tmp_path_factory, tokenizer, videos):
    out = tmp_path_factory.mktemp("codes") / "codes"
    tokenize_shards(tokenizer, videos, out, size=SIZE, frames=FRAMES, batch_size=3, max_samples=3, progress=False)
    return out


def batches(folder, **options):
    data = ShardsDataModule(val=str(folder), **options)
    data.setup("validate")
    return list(data.val_dataloader())


# -- shards -------------------------------------------------------------------------------------------------------------


def test_codes_are_those_of_each_clip_with_its_trajectories(codes, videos, tokenizer):
    manifest = Manifest.load(codes)
    assert (manifest.kind, manifest.samples) == ("codes", COUNT)
    about = {"folder": videos.name, "size": SIZE, "resize": "crop", "frames": FRAMES, "fps": None, "frame_stride": 1}
    assert manifest.meta["source"] == {**about, "trajectories": Manifest.load(videos).meta["trajectories"]}
    assert manifest.meta["layout"] == {"kind": "Trajectories", "t": FRAMES, "h": 4, "w": 4, "n": 12}
    (clips,) = batches(videos, batch_size=COUNT, image_size=SIZE, frames=FRAMES)
    (batch,) = batches(codes, batch_size=COUNT)
    expected = tokenizer.encode(clips["pixels"], trajectories=clips["trajectories"])
    assert len(set(expected.lengths.tolist())) > 2  # ragged
    longest = int(expected.lengths.max())
    assert batch["ids"].shape == (COUNT, longest, len(tokenizer.codebook_sizes))
    assert torch.equal(batch["ids"], expected.ids[:, :longest]) and torch.equal(
        batch["mask"], expected.mask[:, :longest]
    )
    assert batch["key"] == clips["key"] and batch["caption"] == clips["caption"]


def test_an_interrupted_run_goes_on(codes, videos, tokenizer, tmp_path, monkeypatch):
    encode, calls = type(tokenizer).encode, []

    def dies(self, pixels, **options):
        calls.append(len(pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, pixels, **options)

    settings = {"size": SIZE, "frames": FRAMES, "batch_size": 3, "max_samples": 3, "progress": False}
    monkeypatch.setattr(type(tokenizer), "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        tokenize_shards(tokenizer, videos, tmp_path / "codes", **settings)
    monkeypatch.setattr(type(tokenizer), "encode", encode)
    report = tokenize_shards(tokenizer, videos, tmp_path / "codes", **settings)
    assert (report.kept, report.written) == (6, 1)
    assert Manifest.load(tmp_path / "codes") == Manifest.load(codes)
    with pytest.raises(DataError, match="another meta"):
        tokenize_shards(tokenizer, videos, tmp_path / "codes", **{**settings, "frames": 4})


def test_a_grid_tokenizer_of_clips_and_what_cannot_be_read(tmp_path):
    with ShardWriter(tmp_path / "videos", kind="videos") as writer:
        writer.write("bad", {"mp4": b"no video", "txt": "?"})
        writer.write("good", {"mp4": mp4_bytes(clip_of(2)[0], 8.0), "txt": "3 bars"})
    tokenizer = build("emu3", "folded")
    report = tokenize_shards(tokenizer, tmp_path / "videos", tmp_path / "codes", size=SIZE, frames=4, progress=False)
    assert report.written == 1 and sum(report.skipped.values()) == 1
    (batch,) = batches(tmp_path / "codes", batch_size=1)
    clips = batches(tmp_path / "videos", batch_size=1, image_size=SIZE, frames=4, max_bad_fraction=1.0)[0]
    assert torch.equal(batch["ids"], tokenizer.encode(clips["pixels"]).ids) and batch["mask"].all()


def test_motion_maps_become_codes(tmp_path, tokenizer):
    motion = build("video-lavit-motion", "published")
    maps = motion.example_pixels(5)
    with ShardWriter(tmp_path / "motion", kind="motion", meta={"shape": list(maps.shape[1:])}) as writer:
        for i, one in enumerate(maps.numpy()):
            writer.write(f"m{i}", {"npy": one, "txt": f"motion {i}"})
    report = tokenize_shards(motion, tmp_path / "motion", tmp_path / "codes", batch_size=2, progress=False)
    (batch,) = batches(tmp_path / "codes", batch_size=5)
    assert report.written == 5 and batch["caption"] == [f"motion {i}" for i in range(5)]
    assert torch.equal(batch["ids"], motion.encode(maps.half().float()).ids)
    with pytest.raises(InputError, match="tokenizes no motion"):
        tokenize_shards(tokenizer, tmp_path / "motion", tmp_path / "more")
    with pytest.raises(InputError, match="size of their shards"):
        tokenize_shards(motion, tmp_path / "motion", tmp_path / "more", size=16)
    with pytest.raises(InputError, match="none for the motion of"):
        tokenize_shards(motion, tmp_path / "motion", tmp_path / "more", encoder=torch.nn.Identity())
    assert not (tmp_path / "more").exists()


def test_what_does_not_fit_is_named(tmp_path, videos, tokenizer):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="give frames"):
        tokenize_shards(tokenizer, videos, out, size=SIZE)
    with pytest.raises(InputError, match="tokenizes no clips"):
        tokenize_shards(build("vqgan", "fsq"), videos, out, frames=8)
    with pytest.raises(InputError, match="leave the encoder out"):
        tokenize_shards(tokenizer, videos, out, frames=8, encoder=torch.nn.Identity())
    with pytest.raises(ConfigError, match="fps None"):  # the trajectories are of every frame
        tokenize_shards(tokenizer, videos, out, size=SIZE, frames=8, fps=4.0)
    with pytest.raises(InputError, match="beside its ids"):
        tokenize_shards(build("trajectory", "grid"), videos, out, size=SIZE, frames=8)
    assert not out.exists()


# -- training on them ---------------------------------------------------------------------------------------------------


def module_of(total_steps, **settings):
    from tokgen.training.base import Schedule
    from tokgen.training.captions import Text
    from tokgen.training.generator import GeneratorModule

    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "max_text": 8, "multiple_of": 16, "ends": True}
    return GeneratorModule(
        config={**sizes, **settings.pop("config", {})},
        text=Text(vocab_size=280),
        schedule=Schedule(total_steps, kind="constant"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
        **settings,
    )


def fit(module, data, run, *callbacks, **options):
    import lightning as L

    from tokgen.training.checkpoint import AtomicCheckpointIO

    trainer = L.Trainer(
        callbacks=list(callbacks), accelerator="cpu", devices=1, default_root_dir=str(run), logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, enable_checkpointing=False,
        check_val_every_n_epoch=None, max_epochs=-1, plugins=[AtomicCheckpointIO()], **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


def test_a_generator_learns_them_and_a_clip_is_drawn(codes, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    module = module_of(6, visual_tokenizer=str(tmp_path / "tokenizer"))
    data = ShardsDataModule(train=str(codes), val=str(codes), batch_size=3)
    grid = SampleGrid(prompts=["1 bars", "4 bars"], columns=2)
    trainer = fit(module, data, tmp_path, grid, max_steps=6, val_check_interval=6)
    with Image.open(tmp_path / "images" / "samples-0000006.png") as drawn:  # a frame of each clip
        assert drawn.size == (2 * (SIZE + 2) + 2, SIZE + 4)
    (whole,) = batches(codes, batch_size=COUNT)
    module.eval()
    with torch.no_grad():  # over all codes and all ends, though batches have different numbers of both
        expected = module.generator.loss(whole).losses["ce"]
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(expected), rel=1e-4)
    module.export(tmp_path / "generator", True)

    pipeline = TextToImagePipeline.from_pretrained(tmp_path / "generator")
    out = pipeline(["2 bars", "3 bars"], generator=0, output_type="pt")
    assert out.images.shape == (2, FRAMES, 3, SIZE, SIZE)
    for i in range(2):  # what is drawn beyond an end is not in the clip
        n = int(out.tokens.lengths[i])
        alone = tokenizer.decode(
            type(out.tokens)(out.tokens.ids[i : i + 1, :n], out.tokens.layout, out.tokens.codebook_sizes)
        )
        assert torch.allclose(alone[0], out.images[i], atol=1e-5)
    assert [len(frames) for frames in pipeline(["2 bars"], generator=0).images] == [FRAMES]

    words = ["sample", "2 bars", "3 bars", "--model", str(tmp_path / "generator"), "--device", "cpu", "--out"]
    assert main([*words, str(tmp_path / "clips.gif"), "--fps", "5"]) == 0
    with Image.open(tmp_path / "clips.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (FRAMES, (2 * (SIZE + 2) + 2, SIZE + 4), 200)
    assert main([*words, str(tmp_path / "clips.mp4")]) == 0
    from tokgen.data.video import open_video

    with open_video(tmp_path / "clips.mp4") as video:
        assert (len(video), video.fps) == (FRAMES, 8.0)
    assert main([*words, str(tmp_path / "clips.png")]) == 0
    with Image.open(tmp_path / "clips.png") as png:
        assert png.size == (FRAMES * (SIZE + 2) + 2, 2 * (SIZE + 2) + 2)
    assert read_settings(tmp_path / "clips.png")["prompts"] == ["2 bars", "3 bars"]
    capsys.readouterr()
    assert main([*words, str(tmp_path / "clips.webm")]) == 2
    assert ".png, .gif or .mp4" in capsys.readouterr().err


def test_clips_are_tokenized_in_training(videos, codes, tokenizer, tmp_path):
    """Of the clip in the middle, as validation takes it, the same codes as in shards, and so the same loss."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    losses = []
    for folder, options in ((codes, {}), (videos, {"image_size": SIZE, "frames": FRAMES})):
        module = module_of(1, visual_tokenizer=str(tmp_path / "tokenizer"))
        data = ShardsDataModule(train=str(folder), val=str(folder), batch_size=COUNT, **options)
        fit(module, data, tmp_path, max_steps=1)
        assert module.generator.layout.to_dict() == Manifest.load(codes).meta["layout"]
        module.eval()
        with torch.no_grad():
            batch = next(iter(data.val_dataloader()))
            torch.manual_seed(0)
            module.generator.load_state_dict(fresh(module.generator))
            losses.append(module.loss(module.with_codes(batch)).losses["ce"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def fresh(generator):
    return LlamaGenerator(generator.config).state_dict()


def test_videos_without_a_number_of_frames_are_refused(videos, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    module = module_of(1, visual_tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ConfigError, match=r"data\.frames"):
        fit(module, ShardsDataModule(train=str(videos), batch_size=3, image_size=SIZE), tmp_path, max_steps=1)


# -- the command --------------------------------------------------------------------------------------------------------


def test_the_command_tokenizes_clips(videos, codes, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ["tokenize", str(videos), "--model", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "codes")]
    options = {"size": SIZE, "frames": FRAMES, "batch_size": 3, "max_samples": 3, "device": "cpu"}
    assert main([*words, *(f"--{name}={value}" for name, value in options.items())]) == 0
    assert Manifest.load(tmp_path / "codes") == Manifest.load(codes)


# -- beside the loss ----------------------------------------------------------------------------------------------------


def test_alignment_leaves_ends_and_padding_out(tmp_path):
    """ARRA on ragged codes: the term is the mean over items of the cosine of the steps that predict their codes."""
    from tokgen.training.alignment import Alignment

    meta = {
        "tokenizer": "f" * 16,
        "layout": {"kind": "Sequence", "n": 6},
        "codebook_sizes": [7, 5],
        "embedding": {"encoder": "eye", "name": "eye", "dim": 4},
    }
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "codes", kind="codes", meta=meta) as writer:
        for n in (2, 5, 3, 1):
            vector = rng.normal(size=4).astype(np.float16)
            writer.write(f"{n}", {"npy": rng.integers(0, 5, (n, 2)), "emb.npy": vector, "txt": f"{n} things"})
    module = module_of(1, alignment=Alignment(block=1), config={"n_layers": 3})
    fit(module, ShardsDataModule(train=str(tmp_path / "codes"), batch_size=4), tmp_path / "run", max_steps=1)
    module.eval()
    (batch,) = batches(tmp_path / "codes", batch_size=4)
    with torch.no_grad():
        together = module.loss(batch).losses["alignment"]
        alone = []
        for i, n in enumerate(batch["mask"].sum(1).tolist()):
            item = {
                "ids": batch["ids"][i : i + 1, :n],
                "mask": batch["mask"][i : i + 1, :n],
                "caption": [batch["caption"][i]],
            }
            hidden = module.generator.loss(item, hidden_of=1).hidden[:, : 2 * n]
            aligned = module.projector(hidden)
            target = batch["embedding"][i].view(1, 1, -1).expand_as(aligned)
            alone.append(1 - torch.nn.functional.cosine_similarity(aligned, target, dim=-1)[0])
    assert [len(a) for a in alone] == [4, 10, 6, 2]
    assert together.item() == pytest.approx(torch.stack([a.mean() for a in alone]).mean().item(), rel=1e-4)
