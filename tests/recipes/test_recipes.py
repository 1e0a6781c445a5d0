"""Every recipe parses with every machine, and builds what its card says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tokgen.tokenizers.vqgan import VQGAN, VQGANConfig
from tokgen.training.lightning_cli import TokgenLightningCLI

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted([*ROOT.glob("tokenizers/*.yaml"), *ROOT.glob("generators/*.yaml")])
MACHINES = sorted(ROOT.glob("train/*.yaml"))


def parse(*files: Path) -> str:
    """What `tokgen fit -c A -c B --print_config` prints."""
    import contextlib
    import io

    out = io.StringIO()
    arguments = [word for f in files for word in ("-c", str(f))]
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as done:
        TokgenLightningCLI(["fit", *arguments, "--print_config"])
    assert done.value.code in (0, None)
    return out.getvalue()


def test_there_are_recipes():
    assert len(RECIPES) >= 5 and len(MACHINES) >= 4


@pytest.mark.parametrize("machine", MACHINES, ids=lambda f: f.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.stem)
def test_recipe_parses_with_machine(recipe, machine):
    settings = yaml.safe_load(parse(recipe, machine))
    wanted = yaml.safe_load(machine.read_text())["trainer"]
    assert settings["trainer"]["precision"] == wanted["precision"]
    asked = yaml.safe_load(recipe.read_text())["model"]["init_args"]["schedule"]["total_steps"]
    assert settings["model"]["init_args"]["schedule"]["total_steps"] == asked


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.stem)
def test_recipe_has_a_card(recipe):
    card = recipe.with_name(recipe.stem.removesuffix("-tiny") + ".md")
    assert f"`{recipe.name}`" in card.read_text()


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("tokenizers/vqgan*.yaml")), ids=lambda f: f.stem)
def test_tokenizer_recipe_builds(recipe):
    arguments = yaml.safe_load(recipe.read_text())["model"]["init_args"]["tokenizer"]["init_args"]["config"]
    with torch.device("meta"):
        tokenizer = VQGAN(VQGANConfig(**arguments))
    if recipe.stem == "vqgan":
        assert tokenizer.config == VQGANConfig()


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("generators/*.yaml")), ids=lambda f: f.stem)
def test_generator_recipe_has_its_size(recipe):
    from tokgen.generators.llama import LlamaConfig, LlamaGenerator

    sizes = {"llama": (0.77e9, 0.85e9), "token-shuffle": (2.6e9, 3.2e9)}.get(recipe.stem, (2e6, 2e7))
    side = {"token-shuffle": 64, "llama": 16}.get(recipe.stem, 8)
    arguments = yaml.safe_load(recipe.read_text())["model"]["init_args"]
    vocabulary = arguments["text"].get("vocab_size", 128_256)
    layout = {"kind": "Grid", "h": side, "w": side}
    with torch.device("meta"):
        generator = LlamaGenerator(
            LlamaConfig(layout=layout, codebook_sizes=(16384,), text_vocab=vocabulary, **arguments["config"])
        )
    parameters = sum(p.numel() for p in generator.parameters())
    assert sizes[0] < parameters < sizes[1], f"{parameters:,}"
