"""Report cards of small models: what they hold, that ranks do not change it, and reports side by side."""

from __future__ import annotations

import io
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import run_on_ranks
from tokgen.cli import main
from tokgen.data.shards import ShardWriter
from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.errors import DataError, InputError
from tokgen.evaluation.card import evaluate_tokenizer, seed_of
from tokgen.evaluation.extractors import EncoderExtractor
from tokgen.evaluation.learnability import Budget, bits_of_codes
from tokgen.evaluation.metrics import pixel_errors
from tokgen.evaluation.report import Report, compare
from tokgen.evaluation.samples import EvaluationSet
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.generators.pipeline import TextToImagePipeline
from tokgen.images import read_settings, to_uint8
from tokgen.tokenizers.trajectory import TrajectoryTokenizer
from tokgen.tokenizers.vqgan import VQGAN
from tokgen.tokens import Grid, Sequence
from tokgen.trajectories.picture import write_video


def run(*words: object) -> int:
    return main([str(w) for w in words])


def tokenizer() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(next(iter(VQGAN.example_configs().values()))).eval()


def encoder(text=None) -> ContrastiveEncoder:
    torch.manual_seed(1)
    vocabulary = 16 if text is None else text.vocab_size
    return ContrastiveEncoder(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 6, vocabulary, 16), text).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text):
    """Shards of 24 smooth pictures of 16 x 16, a tokenizer, a generator of its codes and an encoder of pictures and captions."""
    folder = tmp_path_factory.mktemp("cards")
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "shards", max_samples=9) as writer:
        for i in range(24):
            file = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((16, 16), Image.Resampling.BICUBIC).save(file, "PNG")
            writer.write(
                f"k{i:02d}", {"png": file.getvalue(), "txt": ["red heart, 3d style", "blue fish, flat style"][i % 2]}
            )
    model = tokenizer()
    model.save_pretrained(folder / "tokenizer")
    encoder(text).save_pretrained(folder / "encoder")
    layout = model.encode(torch.zeros(1, 3, 16, 16)).layout
    config = LlamaConfig(
        layout.to_dict(), model.codebook_sizes, text_vocab=text.vocab_size, max_text=16, dim=16, n_layers=1, n_heads=2
    )
    made = LlamaGenerator(config, text=text, tokenizer_fingerprint=model.fingerprint)
    made.save_pretrained(folder / "generator", tokenizer=model)
    return folder


@pytest.fixture(scope="module")
def card(folder) -> Report:
    words = ["evaluate", "tokenizer", folder / "tokenizer", "--data", folder / "shards", "--device", "cpu"]
    assert run(*words, "--out", folder / "card", "--learnability", "none", "--extractor", folder / "encoder") == 0
    return Report.load(folder / "card")


def test_a_tokenizer_card_holds_what_can_be_computed_by_hand(folder, card):
    data, model = EvaluationSet(folder / "shards", resize="none", batch_size=24), tokenizer()
    (batch,) = data.batches()
    tokens = model.encode(batch["pixels"])
    made = to_uint8(model.decode(tokens))
    expected = {name: float(value.mean()) for name, value in pixel_errors(made, batch["pixels"]).items()}
    assert card.figures["pixels"] == pytest.approx(expected, rel=1e-9)
    codes = card.figures["codes"]
    assert codes["tokens"] == tokens.layout.length and codes["bits"] == pytest.approx(float(tokens.bits[0]))
    assert codes["bits_per_pixel"] == pytest.approx(codes["bits"] / 256)
    assert codes["usage"] == [pytest.approx(len(tokens.ids.unique()) / model.codebook_sizes[0])]
    assert card.figures["distribution"].keys() == {"frechet"}, "no FID without its network"
    protocol = card.protocols["pixels"]
    assert (protocol.samples, protocol.size, protocol.selection) == (24, "16 x 16", "every one of 24")
    page = (folder / "card" / "report.md").read_text()
    assert protocol.hash in page and "it is no FID" in page and "![pictures](pictures.png)" in page
    assert Image.open(folder / "card" / "pictures.png").size == (8 * 18 + 2, 6 * 18 + 2)


def test_how_well_reconstructions_agree_with_their_captions(folder):
    words = ["evaluate", "tokenizer", folder / "tokenizer", "--data", folder / "shards", "--learnability", "none"]
    words += ["--extractor", "none", "--device", "cpu", "--batch_size", 7, "--out", folder / "agreement"]
    assert run(*words, "--text_encoder", folder / "encoder") == 0
    card, model = Report.load(folder / "agreement"), tokenizer()
    reads = ContrastiveEncoder.from_pretrained(folder / "encoder")
    (batch,) = EvaluationSet(folder / "shards", resize="none", batch_size=24).batches()
    texts, found = reads.encode_text(batch["caption"]), card.figures["text"]
    for ending, pictures in (
        ("", to_uint8(model.decode(model.encode(batch["pixels"])))),
        ("_of_references", batch["pixels"]),
    ):
        cosines = torch.nn.functional.cosine_similarity(reads.embed(pictures)[:, None], texts[None], dim=2)
        assert found[f"text_score{ending}"] == pytest.approx(
            float(100 * cosines.diagonal().clamp(min=0).mean()), rel=1e-4
        )
        own = [batch["caption"][j] == batch["caption"][i] for i, j in enumerate(cosines.argmax(1))]
        assert found[f"image_to_text{ending}"] == pytest.approx(sum(own) / 24)
    assert card.protocols["text"].extractor_hash and "retrieval" not in card.figures
    assert "own caption is nearest, of the references" in (folder / "agreement" / "report.md").read_text()


def test_a_generator_card(folder, capsys):
    words = ["evaluate", "generator", folder / "generator", "--data", folder / "shards", "--device", "cpu"]
    words += ["--samples", 12, "--extractor", folder / "encoder", "--text_encoder", folder / "encoder"]
    assert run(*words, "--batch_size", 5, "--out", folder / "a") == 0
    assert run(*words, "--batch_size", 12, "--out", folder / "b") == 0, "what is drawn does not depend on batches"
    a, b = Report.load(folder / "a"), Report.load(folder / "b")
    assert a.figures["distribution"].keys() == {"frechet", "precision", "recall"}
    for group in ("distribution", "text"):
        assert a.protocols[group] == b.protocols[group]
        assert a.figures[group] == pytest.approx(b.figures[group], rel=1e-5)
    assert a.subject["sampling"]["guidance_scale"] == 1.0 and a.figures["speed"]["seconds"] > 0
    assert not (folder / "a" / "partial").exists(), "what was kept while measuring is gone"
    again = shlex.split(a.about["command"])
    assert again[:4] == ["tokgen", "evaluate", "generator", str(folder / "generator")] and a.about["processes"] == 1
    assert run(*again[1:], "--out", folder / "repeated") == 0, "the command is in the report"
    assert Report.load(folder / "repeated").figures["likelihood"] == a.figures["likelihood"]
    assert run(*words, "--seed", 1, "--out", folder / "c") == 0
    c = Report.load(folder / "c")
    assert "seeds" in a.protocols["distribution"].differences(c.protocols["distribution"])
    assert c.figures["distribution"]["frechet"] != a.figures["distribution"]["frechet"]
    (batch, *_) = EvaluationSet(folder / "shards", 12, image_size=16, batch_size=5).batches()
    pipeline = TextToImagePipeline.from_pretrained(folder / "generator")
    again = pipeline(batch["caption"][:1], generator=[seed_of(0, batch["key"][0])], output_type="pt").images[0]
    shown = torch.from_numpy(np.array(Image.open(folder / "a" / "pictures.png"))).permute(2, 0, 1)[:, 2:18, 2:18]
    assert torch.equal(shown, to_uint8(again)), "the settings in the report draw the pictures again"


def test_clips(tmp_path):
    frames = np.full((10, 32, 32, 3), 90, np.uint8)
    with ShardWriter(tmp_path / "videos", kind="videos") as writer:
        for i in range(3):
            for t in range(10):
                frames[t] = 90
                frames[t, 10:20, 2 * t + i : 2 * t + i + 10] = (220, 40, 40)
            write_video(frames, tmp_path / "clip.mp4", fps=8)
            writer.write(f"c{i}", {"mp4": (tmp_path / "clip.mp4").read_bytes(), "txt": "a square"})
    torch.manual_seed(0)
    TrajectoryTokenizer(TrajectoryTokenizer.example_configs()["plain"]).save_pretrained(tmp_path / "model")
    words = ["evaluate", "tokenizer", tmp_path / "model", "--data", tmp_path / "videos", "--out", tmp_path / "card"]
    assert run(*words, "--size", 32, "--learnability", "none", "--device", "cpu", "--batch_size", 2) == 0
    card = Report.load(tmp_path / "card")
    assert card.protocols["pixels"].details["frames"] == 8 and card.protocols["pixels"].details["mean over"] == "frames"
    assert card.figures["codes"]["bits_per_pixel"] == pytest.approx(card.figures["codes"]["bits"] / (8 * 32 * 32))
    assert "distribution" not in card.figures and any("No Frechet distance" in note for note in card.notes)


def _evaluate(rank: int, folder: str) -> None:
    extractor = EncoderExtractor(encoder())
    data = EvaluationSet(f"{folder}/shards", 23, resize="none", batch_size=3)
    reads = ContrastiveEncoder.from_pretrained(f"{folder}/encoder")
    report, _ = evaluate_tokenizer(tokenizer(), data, extractor=extractor, text_encoder=reads, learnability="none")
    Path(folder, f"{rank}.json").write_text(json.dumps(report.figures))


@pytest.mark.slow
def test_two_ranks_report_what_one_does(folder):
    run_on_ranks(_evaluate, folder)
    extractor = EncoderExtractor(encoder())
    data = EvaluationSet(folder / "shards", 23, resize="none", batch_size=3)
    reads = ContrastiveEncoder.from_pretrained(folder / "encoder")
    whole, _ = evaluate_tokenizer(tokenizer(), data, extractor=extractor, text_encoder=reads, learnability="none")
    assert whole.protocols["pixels"].samples == 23
    found = json.loads((folder / "0.json").read_text())
    assert {"pixels", "codes", "distribution", "text"} <= whole.figures.keys()
    for group in whole.figures.keys() - {"speed"}:
        for name, value in whole.figures[group].items():
            assert found[group][name] == pytest.approx(value, rel=1e-6), name
    assert json.loads((folder / "1.json").read_text()) == {}


def test_cards_of_equal_names_are_told_apart_by_their_paths(folder, card, tmp_path, capsys):
    names = [tmp_path / run / "card" for run in "ab"]
    for name in names:
        card.save(name)
    assert run("compare", *names, "--only", "pixels") == 0
    assert f"| Pixels | {names[0]} | {names[1]} |" in capsys.readouterr().out
    assert run("compare", names[0], folder / "card", "--only", "pixels") == 0
    assert run("compare", names[0], names[0]) != 0
    assert "is given twice" in capsys.readouterr().err


# -- learnability -------------------------------------------------------------------------------------------------------------

BUDGET = Budget(dim=32, n_layers=1, n_heads=2, steps=80, batch_size=16, lr=1e-2, warmup=5)


def test_rules_are_learned_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(8, (200, 1), generator=generator)
    counting = (first + torch.arange(6)) % 8  # one free code of 3 bits, then five that follow
    noise = torch.randint(8, (200, 6), generator=generator)
    learned, random = (bits_of_codes(x[..., None].int(), Sequence(6), (8,), BUDGET) for x in (counting, noise))
    assert learned["ar_bits"] == pytest.approx(3, abs=0.6) and learned["ar_bits_per_code"] < 0.6
    assert random["ar_bits_per_code"] == pytest.approx(3, abs=0.4)
    again = bits_of_codes(counting[..., None].int(), Sequence(6), (8,), BUDGET)
    assert again == learned, "the figure follows from codes and budget"


def test_several_codebooks_and_unequal_lengths():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, (60, 5, 2), generator=generator).int()
    ids[::2, 3:] = -1
    found = bits_of_codes(ids, Sequence(5), (4, 4), Budget(32, 1, 2, steps=20, batch_size=8, warmup=2))
    codes = float((ids[:6] >= 0).sum()) / 6
    assert found["ar_bits"] == pytest.approx(found["ar_bits_per_code"] * codes)
    assert 1.5 < found["ar_bits_per_code"] < 3.5  # 2 bits of a code, and its share of the ends
    with pytest.raises(InputError, match="too few to hold some out"):
        bits_of_codes(ids[:5], Sequence(5), (4, 4), BUDGET)


def test_a_batch_that_is_cut_learns_the_same(monkeypatch):
    ids = torch.randint(8, (60, 4, 1)).int()
    budget = Budget(16, 1, 2, steps=6, batch_size=8, warmup=2)
    whole = bits_of_codes(ids, Grid(2, 2), (8,), budget)
    monkeypatch.setattr("tokgen.evaluation.learnability.LOGITS", 3 * 4 * 8)
    assert bits_of_codes(ids, Grid(2, 2), (8,), budget) == pytest.approx(whole, rel=1e-4)


# -- side by side -------------------------------------------------------------------------------------------------------------


def test_unlike_protocols_are_refused_with_the_field_that_differs(folder, card, capsys):
    words = ["evaluate", "tokenizer", folder / "tokenizer", "--data", folder / "shards", "--device", "cpu"]
    assert run(*words, "--out", folder / "few", "--samples", 20, "--learnability", "none", "--extractor", "none") == 0
    capsys.readouterr()
    assert run("compare", folder / "card", folder / "few") == 2
    error = capsys.readouterr().err
    assert "card and few measured 'pixels' by unlike protocols" in error and "samples (24 and 20)" in error
    assert "distribution" not in error.partition(". ")[0], "what one report alone measured is not unlike"
    assert run("compare", folder / "card", folder / "few", "--force") == 0
    apart = capsys.readouterr().out
    assert apart.count("| Pixels |") == 2 and "Not to be compared" in apart
    assert run("compare", folder / "card", folder / "card" / "report.json") == 0
    table = capsys.readouterr().out
    psnr = f"{card.figures['pixels']['psnr']:.4g}"
    assert f"| PSNR (dB) ↑ | {psnr} | {psnr} |" in table
    assert run("compare", folder / "card") == 2 and "at least two" in capsys.readouterr().err


def test_only_what_agrees(card):
    other = Report(card.task, card.subject)
    other.add(card.protocols["pixels"], {"psnr": 99.0, "l1": 0.5})
    slow = card.protocols["speed"].to_dict() | {"details": {"device": "another"}}
    slow.pop("hash")
    other.add(type(card.protocols["speed"])(**slow), {"encode_ms": 1.0})
    with pytest.raises(InputError, match=r"details\.device .*--only pixels .*codes compares"):
        compare({"a": card, "b": other})
    table = compare({"a": card, "b": other}, ["pixels"])
    assert "| 99 |" in table and "| SSIM ↑ |" in table and "| – |" in table
    with pytest.raises(InputError, match="no report has figures of beauty"):
        compare({"a": card, "b": other}, ["beauty"])
    with pytest.raises(InputError, match="different things"):
        compare({"a": card, "b": Report("generator", {})})


def test_reports_that_are_none_are_refused(tmp_path, folder, card):
    with pytest.raises(DataError, match="make one with `tokgen evaluate`"):
        Report.load(tmp_path)
    data = json.loads((folder / "card" / "report.json").read_text())
    data["protocols"]["pixels"]["samples"] = 50_000
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="changed by hand"):
        Report.load(tmp_path)
    for text, message in (
        ("[1]", "not a report"),
        ("{", "cannot be read"),
        ('{"format": "tokgen-report"}', "another version"),
    ):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(DataError, match=message):
            Report.load(tmp_path)
    del data["protocols"]["pixels"]
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="without their protocols"):
        Report.load(tmp_path)


# -- benchmarks ---------------------------------------------------------------------------------------------------------------


def test_geneval_and_genai_folders(tmp_path, folder, capsys):
    lines = [{"tag": "single_object", "include": [{"class": "fish", "count": 1}], "prompt": "blue fish, flat style"}]
    lines.append({"tag": "counting", "prompt": "red heart, 3d style"})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    words = ["evaluate", "generator", folder / "generator", "--device", "cpu", "--batch_size", 3]
    assert run(*words, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "eval", "--images_per_prompt", 2) == 0
    files = sorted(str(f.relative_to(tmp_path / "eval")) for f in (tmp_path / "eval").rglob("*") if f.is_file())
    assert files == [
        f"0000{i}/{n}" for i in range(2) for n in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert json.loads((tmp_path / "eval/00001/metadata.jsonl").read_text()) == lines[1]
    settings = read_settings(tmp_path / "eval/00001/samples/0001.png")
    assert settings["prompts"] == ["red heart, 3d style"] and settings["seeds"] == [3]
    picture = np.array(Image.open(tmp_path / "eval/00001/samples/0001.png"))
    (tmp_path / "eval/00001/samples/0001.png").unlink()
    assert run(*words, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "eval", "--images_per_prompt", 2) == 0
    assert np.array_equal(np.array(Image.open(tmp_path / "eval/00001/samples/0001.png")), picture)

    (tmp_path / "p.json").write_text(json.dumps({"00007": {"id": "00007", "prompt": "cat, 3d style", "models": {}}}))
    assert run(*words, "--prompts", tmp_path / "p.json", "--layout", "genai", "--out", tmp_path / "genai") == 0
    assert [f.name for f in (tmp_path / "genai").iterdir()] == ["00007.jpeg"]
    assert Image.open(tmp_path / "genai/00007.jpeg").size == (16, 16)
    for name, text, message in (
        ("x.json", '{"../up": {"prompt": "cat"}}', "names a prompt '../up'"),
        ("x.jsonl", '{"text": "cat"}', "holds no prompts"),
        ("x.txt", "\n", "holds no prompts"),
    ):
        (tmp_path / name).write_text(text)
        capsys.readouterr()
        assert run(*words, "--prompts", tmp_path / name, "--out", tmp_path / "no") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["tokenizer", "{f}/tokenizer", "--data", "{f}/shards", "--temperature", "1"], "--temperature is of evaluating a generator"),
        (["generator", "{f}/generator", "--data", "{f}/shards", "--keep", "4"], "--keep is of evaluating a tokenizer"),
        (["tokenizer", "{f}/tokenizer"], "give --data"),
        (["tokenizer", "{f}/generator", "--data", "{f}/shards"], "a tokenizer is needed here"),
        (["tokenizer", "{f}/tokenizer", "--data", "{f}/shards", "--samples", "25"], "holds 24"),
        (["tokenizer", "{f}/tokenizer", "--data", "{f}/shards", "--frames", "4"], "holds pictures"),
        (["generator", "{f}/generator", "--data", "{f}/shards", "--layout", "genai"], "give --prompts too"),
        (["generator", "{f}/generator", "--data", "{f}/shards", "--size", "8", "--extractor", "none"], "give size=16"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line(folder, tmp_path, capsys, words, message):
    assert run("evaluate", *(w.format(f=folder) for w in words), "--out", tmp_path / "out", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_perfect_tokenizer_has_frechet_distance_zero(folder):
    class Perfect(VQGAN):
        """Gives back what it was shown last."""

        def encode(self, pixels, **options):
            self.seen = pixels
            return super().encode(pixels, **options)

        def decode(self, tokens, check=True):
            return self.seen.float() / 255

    torch.manual_seed(0)
    model = Perfect(next(iter(VQGAN.example_configs().values()))).eval()
    data = EvaluationSet(folder / "shards", resize="none", batch_size=5)
    report, _ = evaluate_tokenizer(model, data, extractor=EncoderExtractor(encoder()), learnability="none")
    assert report.figures["distribution"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert (
        report.figures["pixels"]["psnr"] == pytest.approx(20 * math.log10(510))
        and report.figures["pixels"]["ssim"] == 1
    )
