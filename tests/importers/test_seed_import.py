"""SEED's files as they are found: quantizer and tower apart, leftovers of training, both stages' checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import tokgen
from tokgen.errors import CheckpointError
from tokgen.importers.seed import load_seed, seed_from_state_dict

PARITY = Path(__file__).parent.parent / "parity"
sys.path.insert(0, str(PARITY))

import reference  # noqa: E402

LAYERS, DIM, WORDS = 3, 96, 120


def published(name: str = "seed2_tokenizer") -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The quantizer's tensors and the tower's, apart as they are published."""
    case = reference.load(PARITY / f"cases/{name}.json")[0]
    state = reference.state_dict(case)
    tower = {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
    return {k: v for k, v in state.items() if not k.startswith("visual_encoder.")}, tower


def text_side() -> dict[str, torch.Tensor]:
    bert, out = "Qformer.bert", {"temp": torch.tensor(0.05)}
    out[f"{bert}.embeddings.word_embeddings.weight"] = torch.randn(WORDS, DIM)
    out[f"{bert}.embeddings.position_embeddings.weight"] = torch.randn(512, DIM)
    for i in range(LAYERS):
        layer = f"{bert}.encoder.layer.{i}"
        out |= {f"{layer}.intermediate.dense.weight": torch.randn(384, DIM), f"{layer}.intermediate.dense.bias": torch.randn(384)}  # fmt: skip
        out |= {f"{layer}.output.dense.weight": torch.randn(DIM, 384), f"{layer}.output.dense.bias": torch.randn(DIM)}
        out |= {f"{layer}.output.LayerNorm.weight": torch.ones(DIM), f"{layer}.output.LayerNorm.bias": torch.zeros(DIM)}
    for part in ("vision", "text"):
        out |= {f"{part}_proj.weight": torch.randn(40, DIM), f"{part}_proj.bias": torch.randn(40)}
    return out


LEFTOVERS = {
    "Qformer.cls.predictions.bias": torch.zeros(3),
    "itm_head.weight": torch.zeros(2, DIM),
    "Reverse_Qformer.bert.embeddings.LayerNorm.weight": torch.zeros(DIM),
    "reverse_tokens": torch.zeros(1, 1, DIM),
    "something.else": torch.zeros(1),
}


def test_two_files_make_a_tokenizer_that_can_be_published(tmp_path):
    quantizer, tower = published()
    torch.save({**quantizer, **LEFTOVERS}, tmp_path / "seed_quantizer.pt")
    torch.save({**tower, "norm.weight": torch.zeros(64), "head.weight": torch.zeros(2, 64)}, tmp_path / "vit.pth")
    seed, report = load_seed(tmp_path / "seed_quantizer.pt", vit=tmp_path / "vit.pth")
    assert seed.config.detok_head == "mlp" and seed.config.text_vocab == 0  # the reverse head's keys are leftovers here
    assert len(report.mapped) == len(seed.state_dict())
    assert set(report.ignored) == {
        *LEFTOVERS,
        "Qformer.bert.embeddings.position_ids",
        "visual_encoder.norm.weight",
        "visual_encoder.head.weight",
    }
    assert report.ignored["something.else"] == "not a part of the tokenizer; left over from training"
    again = tokgen.load(seed.save_pretrained(tmp_path / "seed"))
    pixels = again.example_pixels()
    assert torch.equal(again.encode(pixels).ids, seed.encode(pixels).ids)
    assert again.generation_embedding(again.encode(pixels)).shape == (3, 1024)


def test_weights_are_those_of_the_files():
    quantizer, tower = published()
    seed, report = seed_from_state_dict(quantizer, tower)
    ours = seed.state_dict()
    for key, to in report.mapped.items():
        source = tower if to.startswith("encoder.") else quantizer
        assert torch.equal(ours[to], source[key.removeprefix("visual_encoder.")])
    assert len(set(report.mapped.values())) == len(ours)


def test_both_stages_of_a_training_run_are_put_together(tmp_path):
    quantizer, tower = published("seed2_tokenizer_reverse")
    first = {k: v for k, v in quantizer.items() if k.startswith(("query_tokens", "Qformer", "ln_vision"))} | text_side()
    second = {k: v for k, v in quantizer.items() if k not in first}
    torch.save({"model": first, "epoch": 9}, tmp_path / "stage1.pth")
    torch.save({"model": second, "epoch": 3}, tmp_path / "stage2.pth")
    torch.save(tower, tmp_path / "vit.pth")
    seed, _ = load_seed([tmp_path / "stage1.pth", tmp_path / "stage2.pth"], tmp_path / "vit.pth")
    assert seed.config.detok_head == "reverse_qformer" and seed.config.reverse_layers == 4
    assert (seed.config.text_vocab, seed.config.embed_dim, seed.config.text_end) == (WORDS, 40, 102)
    assert seed.temperature.item() == pytest.approx(0.05)
    ids = torch.randint(0, WORDS, (2, 7))
    assert seed.text_embedding(ids, torch.ones_like(ids, dtype=torch.bool)).shape == (2, 40)
    with pytest.raises(
        CheckpointError, match="query_tokens is missing; the checkpoint of stage II needs that of stage I"
    ):
        load_seed(tmp_path / "stage2.pth", tmp_path / "vit.pth")


def test_a_text_side_in_parts_is_left_out():
    quantizer, tower = published()
    parts = text_side()
    del parts["Qformer.bert.encoder.layer.2.intermediate.dense.weight"]
    seed, report = seed_from_state_dict({**quantizer, **parts}, tower)
    assert seed.config.text_vocab == 0 and set(parts) < set(report.ignored)


def test_the_first_version_is_known_by_its_keys():
    quantizer, tower = published("seed2_tokenizer_reverse")
    renames = {
        "pos_embed_image": "pos_embed_text",
        "blocks_image.": "blocks_text.",
        "distill_image_proj": "distill_text_proj",
    }
    state = {}
    for key, value in quantizer.items():
        new = next((key.replace(a, b) for a, b in renames.items() if key.startswith(a)), key)
        state[new] = torch.randn(1, 77, DIM) if key == "reverse_tokens" else value
    state |= {"distill_text_proj.weight": torch.randn(768, DIM), "distill_text_proj.bias": torch.randn(768)}
    seed, _ = seed_from_state_dict(state, tower)
    assert seed.config.target == "text_states" and seed.config.reverse_queries == 77
    assert seed.generation_embedding(seed.encode(seed.example_pixels(2))).shape == (2, 77, 768)


def test_what_is_missing_or_strange_is_named_in_one_line(tmp_path):
    quantizer, tower = published()
    torch.save(quantizer, tmp_path / "q.pt")
    torch.save(tower, tmp_path / "vit.pth")
    without = {k: v for k, v in quantizer.items() if k != "blocks_image.2.norm1.weight"}
    cases = [
        (lambda: load_seed(tmp_path / "q.pt"), "holds no vision tower; give the path of eva_vit_g.pth as `vit`"),
        (lambda: load_seed(tmp_path / "vit.pth"), "it is a vision tower, which goes to `vit`"),
        (lambda: load_seed(tmp_path / "vit.pth", tmp_path / "q.pt"), "it is a vision tower, which goes to `vit`"),
        (lambda: load_seed(tmp_path / "q.pt", tmp_path / "q.pt"), "given as `vit` is no EVA-CLIP vision tower"),
        (lambda: load_seed(tmp_path / "none.pt", tmp_path / "vit.pth"), "no checkpoint file at"),
        (lambda: seed_from_state_dict({"encoder.conv_in.weight": torch.zeros(1)}, tower), "query_tokens is missing"),
        (
            lambda: seed_from_state_dict({"query_tokens": torch.zeros(1, 32, 96)}, tower),
            "holds no whole SEED tokenizer",
        ),
        (lambda: seed_from_state_dict(without, tower), r"missing: generation\.blocks\.2\.norm1\.weight"),
    ]
    for mistake, message in cases:
        with pytest.raises(CheckpointError, match=message) as error:
            mistake()
        assert "\n" not in str(error.value)
