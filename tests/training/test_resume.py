"""Kill and go on: through the command line, a run that was killed twice is the run that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tokgen.training.checkpoint import read_checkpoint

RECIPE = """
model:
  class_path: tokgen.training.autoencoder.AutoencoderModule
  init_args:
    tokenizer:
      class_path: tokgen.tokenizers.vqgan.VQGAN
      init_args:
        config:
          channels: 32
          channel_mult: [1]
          num_res_blocks: 1
          z_channels: 32
          code_dim: 4
          patch: 4
          dropout: 0.1
          quantizer: {{type: vq, codebook_size: 32, update: ema, kmeans_init: true, revive_below: 0.5}}
    schedule: {{total_steps: {steps}, warmup_steps: 3}}
    loss:
      perceptual: none
      disc_start: 7
      disc_train_from: 4
      disc_channels: 8
      disc_layers: 1
      adaptive: true
      lecam_weight: 0.01
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.001, fused: true}}}}
    disc_optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.001, fused: true}}}}
data: {{train: {shards}/train, val: {shards}/val, batch_size: 4, image_size: 16, random_flip: true}}
trainer: {{accelerator: cpu, log_every_n_steps: 1, val_check_interval: 10}}
checkpoint: {{every_n_steps: 5}}
ema: {{decay: 0.9}}
progress: {{every_n_steps: 0}}
seed_everything: 3
"""


def start(recipe: Path, run: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tokgen", "fit", "-c", str(recipe), "--run_dir", str(run), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return output


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    path = run / "metrics.jsonl"
    while not (path.is_file() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def losses(run: Path) -> dict[int, dict[str, str]]:
    rows: dict[int, dict[str, str]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train/reconstruction" in row:
            assert row["step"] not in rows  # a resumed run rewinds its log
            rows[row["step"]] = {k: float(v).hex() for k, v in row.items() if k != "train/samples_per_second"}
    return rows


@pytest.mark.slow
def test_killed_twice_equals_uninterrupted_bit_for_bit(tmp_path, image_shards):
    """12 batches an epoch, killed in the first and the second; discriminator, LeCam, EMA, dropout, EMA codebook with
    k-means and revival, random flips."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(shards=image_shards, steps=30))
    straight = start(recipe, tmp_path / "straight")
    killed = tmp_path / "killed"
    for step in (8, 19):
        process = start(recipe, killed, "--ckpt_path", "auto")
        wait_for_step(process, killed, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(start(recipe, killed, "--ckpt_path", "auto"))
    finish(straight)

    expected, found = losses(tmp_path / "straight"), losses(killed)
    assert sorted(expected) == list(range(1, 31))
    for step, row in expected.items():
        assert row == found[step], f"step {step} differs"
    one, other = (read_checkpoint(r / "checkpoints" / "last.ckpt") for r in (tmp_path / "straight", killed))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for name, value in one["callbacks"]["EMA"]["average"].items():
        assert torch.equal(value, other["callbacks"]["EMA"]["average"][name]), name


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_143(tmp_path, image_shards):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.format(shards=image_shards, steps=100_000))
    process = start(recipe, run, "--checkpoint.every_n_steps", "100000")
    wait_for_step(process, run, 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 143, output
    logged = max(losses(run))
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == logged >= 3
