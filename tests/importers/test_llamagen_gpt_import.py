"""LlamaGen's decoder files as they are found: containers, sizes, names, and what the command writes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

import tokgen
from tokgen.cli import main
from tokgen.errors import CheckpointError, ConfigError
from tokgen.images import read_settings
from tokgen.importers.llamagen_gpt import GPT_SIZES, gpt_config, gpt_from_state_dict, load_gpt, read_class_names
from tokgen.tokenizers.vqgan import VQGAN, VQGANConfig

PARITY = Path(__file__).parent.parent / "parity"
sys.path.insert(0, str(PARITY))

import reference  # noqa: E402


def published(kind: str) -> dict[str, torch.Tensor]:
    return reference.state_dict(reference.load(PARITY / f"cases/llamagen_gpt_{kind}.json")[0])


@pytest.fixture
def visual(tmp_path) -> Path:
    config = VQGANConfig(32, (1, 2), 1, 32, 4, quantizer={"type": "vq", "codebook_size": 64})
    return VQGAN(config).save_pretrained(tmp_path / "models/visual")


def run(*words) -> int:
    return main([str(w) for w in words])


def test_a_converted_class_model_draws_with_its_tokenizer(tmp_path, visual, capsys):
    file, out = tmp_path / "c2i_B_64.pt", tmp_path / "models/gpt"
    torch.save({"model": published("c2i"), "steps": 3, "args": argparse.Namespace(dim=96)}, file)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {i}" for i in range(10)) + "\n")
    options = ["--out", out, "--heads", "6", "--class_names", names, "--tokenizer", visual]
    assert run("convert", "llamagen-gpt", file, *options) == 0
    assert "25 tensors mapped, 0 ignored" in capsys.readouterr().out
    generator = tokgen.load(out)
    assert generator.layout == tokgen.Grid(4, 4)  # 64 px / 16
    assert (generator.visual_tokenizer, generator.generation) == ("../visual", {"guidance_scale": 4.0, "top_k": 2000})
    assert generator.tokenizer_fingerprint == tokgen.load(visual).fingerprint
    assert torch.equal(generator.generate([7], generator=1).ids, generator.generate(["thing 7"], generator=1).ids)
    assert run("sample", "thing 7", "--model", out, "--out", tmp_path / "x.png", "--device", "cpu") == 0
    assert read_settings(tmp_path / "x.png")["guidance_scale"] == 4.0


def test_a_text_model_names_its_encoder_without_loading_it(tmp_path):
    torch.save(published("t2i"), tmp_path / "t2i_XL_stage1_64.pt")  # a flat state dict, as of FSDP
    options = ["--heads", "6", "--text_encoder", "no/such-encoder"]
    assert run("convert", "llamagen-gpt", tmp_path / "t2i_XL_stage1_64.pt", "--out", tmp_path / "t2i", *options) == 0
    generator = tokgen.load(tmp_path / "t2i")
    assert (generator.text.name, generator.text.length) == ("no/such-encoder", 120)
    assert (generator.config.feature_dim, generator.config.max_text, generator.visual_tokenizer) == (32, 120, None)
    assert generator.generation == {"guidance_scale": 7.5, "top_k": 1000}
    assert gpt_from_state_dict(published("t2i"), grid=4, heads=6)[0].text.name == "google/flan-t5-xl"


def test_grid_and_heads_come_from_the_table_of_rotations_where_there_is_one(tmp_path):
    state = {**published("c2i"), "freqs_cis": torch.zeros(1 + 9, 8, 2)}
    generator, report = gpt_from_state_dict(state)
    assert (generator.layout, generator.config.n_heads) == (tokgen.Grid(3, 3), 6)
    assert list(report.ignored) == ["freqs_cis"]
    torch.save(state, tmp_path / "any.pt")
    assert load_gpt(tmp_path / "any.pt")[0].layout == tokgen.Grid(3, 3)
    assert load_gpt(tmp_path / "any.pt", grid=5)[0].layout == tokgen.Grid(5, 5)


def test_grouped_queries_are_seen_in_the_tensors():
    state = {k: v[: 96 + 2 * 2 * 16] if "wqkv" in k else v for k, v in published("c2i").items()}
    assert gpt_config(state, grid=4, heads=6).n_kv_heads == 2
    generator, _ = gpt_from_state_dict(state, grid=4, heads=6)
    assert generator.generate([1]).ids.shape == (1, 16)


@pytest.mark.parametrize("name", GPT_SIZES)
def test_heads_of_published_sizes_are_known(name):
    (dim, layers), heads = GPT_SIZES[name]
    with torch.device("meta"):
        state = {
            "cls_embedding.embedding_table.weight": torch.empty(1001, dim),
            "tok_embeddings.weight": torch.empty(16384, dim),
            "layers.0.attention.wqkv.weight": torch.empty(3 * dim, dim),
            "layers.0.feed_forward.w1.weight": torch.empty(4, dim),
            f"layers.{layers - 1}.attention.wqkv.weight": torch.empty(3 * dim, dim),
        }
    config = gpt_config(state, grid=16)
    assert (config.n_heads, config.n_layers, config.num_classes, config.n_kv_heads) == (heads, layers, 1000, None)
    assert dim // heads == {"3B": 100, "7B": 128}.get(name, 64)


def test_what_is_missing_or_strange_is_named(tmp_path):
    state = published("c2i")
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="give --grid"):
        load_gpt(tmp_path / "model.pt", heads=6)
    with pytest.raises(ConfigError, match="how many heads"):
        gpt_from_state_dict(state, grid=4)
    with pytest.raises(CheckpointError, match="does not know: surprise"):
        gpt_from_state_dict({**state, "surprise": torch.zeros(1)}, grid=4, heads=6)
    with pytest.raises(CheckpointError, match=r"missing: layers\.1\.attention\.wo\.weight"):
        gpt_from_state_dict({k: v for k, v in state.items() if "1.attention.wo" not in k}, grid=4, heads=6)
    with pytest.raises(CheckpointError, match="not a LlamaGen GPT"):
        gpt_from_state_dict({"norm.weight": torch.zeros(4)})
    with pytest.raises(ConfigError, match="2 class names for 10 classes"):
        gpt_from_state_dict(state, grid=4, heads=6, class_names=["a", "b"])
    with pytest.raises(ConfigError, match="no text encoder"):
        gpt_from_state_dict(state, grid=4, heads=6, text_encoder="t5")
    with pytest.raises(ConfigError, match="no class names"):
        gpt_from_state_dict(published("t2i"), grid=4, heads=6, class_names=["a"])


def test_two_cranes_are_named_with_their_lines(tmp_path):
    (tmp_path / "names.txt").write_text("crane\nheron\ncrane\n")
    with pytest.raises(ConfigError, match=r"'crane' stands in lines 1 and 3"):
        read_class_names(tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("crane\n\nheron\n")
    with pytest.raises(ConfigError, match="line 2 is empty"):
        read_class_names(tmp_path / "names.txt")


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("llamagen-vq", ["--grid", "4"], "--grid says nothing about llamagen-vq"),
        ("llamagen-gpt", ["--tokenizer", "nowhere"], "no tokenizer folder at nowhere"),
        ("llamagen-gpt", ["--tokenizer", "{visual}", "--grid", "4", "--heads", "6"], "the tokenizer has (32,)"),
        ("llamagen-gpt", ["--class_names", "nowhere.txt", "--grid", "4"], "nowhere.txt: No such file"),
    ],
)
def test_a_mistake_writes_nothing(tmp_path, capsys, family, options, message):
    config = VQGANConfig(32, (1,), 1, 32, 4, quantizer={"type": "vq", "codebook_size": 32})
    visual = VQGAN(config).save_pretrained(tmp_path / "visual")
    torch.save(published("c2i"), tmp_path / "model.pt")
    words = [w.format(visual=visual) for w in options]
    assert run("convert", family, tmp_path / "model.pt", "--out", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
