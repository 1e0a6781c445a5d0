"""The command line: recipe and machine merged, a stable run directory, one line for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml
from test_resume import RECIPE

from tokgen.cli import main
from tokgen.tokens import Tokens
from tokgen.training.lightning_cli import JsonLinesLogger, run

FLAG = "--model.init_args."


@pytest.fixture
def recipe(tmp_path, image_shards) -> Path:
    path = tmp_path / "tiny-recipe.yaml"
    path.write_text(RECIPE.format(shards=image_shards, steps=4))
    return path


def test_fit_validate_predict_and_fit_on(tmp_path, recipe, image_shards, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    machine = tmp_path / "machine.yaml"
    machine.write_text("trainer: {val_check_interval: 2}\ncheckpoint: {every_n_steps: 3}\n")
    cli = run("fit", ["-c", str(recipe), "-c", str(machine), "--ema.decay", "0.5"])
    folder = Path("runs/tiny-recipe")  # named after the recipe
    assert cli.trainer.global_step == 4  # the schedule's total_steps
    found = {p.name for p in folder.iterdir() if not p.name.startswith("events.")}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "images", "tokenizer"} <= found
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["trainer"]["val_check_interval"], saved["ema"]["decay"], saved["checkpoint"]["every_n_steps"]) == (
        2, 0.5, 3,
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "train/lr" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in rows if "val/psnr" in r] == [2, 4]

    result = run("validate", ["-c", str(recipe), "--ckpt_path", "last"]).trainer.callback_metrics
    assert float(result["val/psnr"]) == pytest.approx(rows[-1]["val/psnr"])  # the EMA weights again
    assert run("validate", ["-c", str(recipe), "--ckpt_path", "best"]).trainer.callback_metrics

    run("predict", ["-c", str(recipe), "--data.test", str(image_shards / "val"), "--ckpt_path", "last"])
    tokens = Tokens.load(folder / "predictions.safetensors")
    assert len(tokens) == 10
    assert tokens.tokenizer == tiny.VQGAN.from_pretrained(folder / "tokenizer").fingerprint

    # the saved settings run again, and flags after files rule
    again = ["-c", str(folder / "config.yaml"), "--ckpt_path", "auto", FLAG + "schedule.total_steps", "6"]
    again += [FLAG + "optimizer.init_args.lr", "0.0003", FLAG + "schedule.kind", "constant"]
    assert run("fit", again).trainer.global_step == 6
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "train/lr" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["train/lr"] for r in rows if "train/lr" in r][4:] == pytest.approx([0.0003] * 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.max_step", "3"], ["--trainer.max_step"]),
        ([FLAG + "los.x", "3"], ["los.x"]),
        ([FLAG + "tokenizer.init_args.config.channels", "x"], ["model.tokenizer.config.channels", "int"]),
        ([FLAG + "tokenizer.init_args.config.quantizer", "{type: nope}"], ["'nope'", "vq"]),
        ([FLAG + "loss.perceptual", "foo"], ["model.loss.perceptual", "lpips"]),
        ([FLAG + "schedule.total_steps", "0"], ["total_steps 0"]),
        (["--model.class_path", "Nope"], ["Nope"]),
        (["--data.train", "/nowhere"], ["/nowhere"]),
        (["--ckpt_path", "/no/x.ckpt"], ["/no/x.ckpt"]),
        (["--ckpt_path", "last"], ["no checkpoint"]),
        (["--trainer.gradient_clip_val", "1"], ["init_args.clip"]),
        (["--trainer.accumulate_grad_batches", "2"], ["init_args.accumulate"]),
        (["-c", "nope.yaml"], ["nope.yaml"]),
    ],
    ids=lambda v: v[0].rpartition(".")[2] if isinstance(v, list) and v[0].startswith("-") else "",
)
def test_a_mistake_is_one_line_and_code_2(tmp_path, recipe, capsys, arguments, words):
    code = main(["fit", "-c", str(recipe), "--run_dir", str(tmp_path / "run"), *arguments])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokgen")]
    assert code == 2 and len(error) == 1 and len(error[0]) < 400
    for word in words:
        assert word in error[0]


def test_metrics_rewind_at_the_first_write_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 3.0}\n{"step": 4, "a"')
    logger = JsonLinesLogger(tmp_path, resumed_step=2)
    assert path.read_text().count("\n") == 3  # untouched until there is something to say
    logger.log_metrics({"a": float("nan")}, step=3)
    logger.log_metrics({"a": 0.1}, step=4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 3, "a": "nan"}, {"step": 4, "a": 0.1}]


def test_the_list_of_callbacks_in_a_file_replaces_none_of_ours(recipe, tmp_path):
    extra = tmp_path / "extra.yaml"
    extra.write_text("trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback}]}\n")
    names = {type(c).__name__ for c in run_only(["-c", str(recipe), "-c", str(extra)], tmp_path).trainer.callbacks}
    assert {
        "LambdaCallback",
        "Checkpoint",
        "EMA",
        "ImageGrid",
        "CodebookMonitor",
        "StepSeed",
        "SignalCheckpoint",
    } <= names


def run_only(arguments: list[str], tmp_path: Path):
    return run("fit", [*arguments, "--run_dir", str(tmp_path / "r"), "--trainer.max_steps", "1"])
