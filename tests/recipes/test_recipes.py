"""Every recipe parses with every machine, and builds what its card says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from tokgen.encoders.contrastive import VideoContrastiveConfig, VideoContrastiveEncoder
from tokgen.generators.base import GENERATORS, Generator
from tokgen.training.end_to_end import PARTS
from tokgen.training.lightning_cli import TokgenLightningCLI

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted([*ROOT.glob("tokenizers/*.yaml"), *ROOT.glob("generators/*.yaml")])
TEACHER = ROOT / "assets/demo/teacher.yaml"
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


def steps_of(settings: dict) -> list[int]:
    """Steps of the run, or of each of its stages."""
    arguments = settings["model"]["init_args"]
    if "stages" in arguments:
        return [stage["steps"] for stage in arguments["stages"]]
    return [arguments["schedule"]["total_steps"]]


def test_there_are_recipes():
    assert len(RECIPES) >= 5 and len(MACHINES) >= 4


@pytest.mark.parametrize("machine", MACHINES, ids=lambda f: f.stem)
@pytest.mark.parametrize("recipe", [*RECIPES, TEACHER], ids=lambda f: f.stem)
def test_recipe_parses_with_machine(recipe, machine):
    printed = parse(recipe, machine)
    assert "Unable to serialize" not in printed  # the config.yaml of a run starts another
    settings = yaml.safe_load(printed)
    wanted = yaml.safe_load(machine.read_text())["trainer"]
    assert settings["trainer"]["precision"] == wanted["precision"]
    assert steps_of(settings) == steps_of(yaml.safe_load(recipe.read_text()))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.stem)
def test_recipe_has_a_card(recipe):
    # one card for all sizes and stages: token-shuffle-512.yaml is described in token-shuffle.md
    cards = [f for f in recipe.parent.glob("*.md") if f"{recipe.stem}-".startswith(f"{f.stem}-")]
    assert any(f"`{recipe.name}`" in card.read_text() for card in cards)


def test_the_shipped_teacher_is_that_of_its_recipe():
    asked = yaml.safe_load(TEACHER.read_text())["model"]["init_args"]["config"]
    shipped = json.loads((TEACHER.parent / "teacher/config.json").read_text())["config"]
    assert asked.items() <= shipped.items()


# parameters at paper size; what these recipes add to the publication, beside the encoder that comes from a folder
TOKENIZER_SIZES = {
    "vqgan": (71_883_403, ()),
    "ibq": (140_342_147, ()),
    "ett": (140_342_147, ()),
    "emu3": (270_740_287, ("quantizer",)),
    "seed": (1_307_888_321, ("pixel_decoder", "text_vocab", "text_end")),
    "lavit": (1_819_112_450, ()),
    "tokenflow": (181_902_251, ("semantic_encoder",)),
    "video-lavit-motion": (158_443_554, ()),
    "trajectory": (131_245_195, ()),
}


def has_tokenizer(recipe: Path) -> bool:
    """Others train what tokenizers see with: an encoder, a segmenter."""
    return "tokenizer" in yaml.safe_load(recipe.read_text())["model"]["init_args"]


@pytest.mark.parametrize(
    "recipe", [*filter(has_tokenizer, sorted(ROOT.glob("tokenizers/*.yaml")))], ids=lambda f: f.stem
)
def test_tokenizer_recipe_builds(recipe):
    settings = yaml.safe_load(recipe.read_text())["model"]["init_args"]["tokenizer"]
    module, _, name = settings["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    arguments = settings["init_args"]["config"]
    if recipe.stem in TOKENIZER_SIZES:
        for name in ("encoder", "semantic_encoder"):
            arguments.pop(name, None)  # published weights; the default is that network
    with torch.device("meta"):
        tokenizer = cls(cls.config_class(**arguments))
    if recipe.stem in TOKENIZER_SIZES:
        parameters, added = TOKENIZER_SIZES[recipe.stem]
        assert sum(p.numel() for p in tokenizer.parameters()) == parameters
        default = cls.config_class.ibq() if recipe.stem in ("ibq", "ett") else cls.config_class()
        assert {k for k, v in vars(tokenizer.config).items() if v != getattr(default, k)} <= {*added, "encoder"}


@pytest.mark.parametrize("name", ["trajvit", "trajvit-tiny"])
def test_video_encoder_recipe_builds(name):
    arguments = yaml.safe_load((ROOT / f"tokenizers/{name}.yaml").read_text())["model"]["init_args"]["config"]
    with torch.device("meta"):
        encoder = VideoContrastiveEncoder(VideoContrastiveConfig(**arguments))
    if name == "trajvit":  # every size is the default, which is the publication's
        with torch.device("meta"):
            assert encoder.config == VideoContrastiveEncoder(VideoContrastiveConfig()).config
    else:
        assert sum(p.numel() for p in encoder.parameters()) < 10e6


# side of the grid of codes, and parameters from … to; others are tiny
SIZES = {
    "arra-base": (16, 342_910_976, 342_910_976),  # LlamaGen's GPT-L
    "llama": (16, 0.77e9, 0.85e9),
    "llamagen-b-c2i": (16, 110_888_448, 110_888_448),
    "llamagen-t2i": (16, 777.6e6, 777.8e6),
    "token-shuffle-512": (32, 2.6e9, 2.9e9),
    "token-shuffle-1024": (64, 2.6e9, 2.9e9),
    "token-shuffle-2048": (128, 2.6e9, 2.9e9),
}


def build(recipe: Path) -> Generator:
    """The recipe's generator without memory, with classes and text encoder as the paper has them."""
    side = SIZES.get(recipe.stem, (8,))[0]
    arguments = yaml.safe_load(recipe.read_text())["model"]["init_args"]
    vocabulary = arguments.get("text", {}).get("vocab_size", 128_256)
    layout = {"kind": "Grid", "h": side, "w": side}
    if arguments["generator"] == "tokenflow-t2i":
        layout = {"kind": "Scales", "sizes": [2**i for i in range(side.bit_length())]}
    cls = GENERATORS[arguments["generator"]]
    with torch.device("meta"):
        return cls(
            cls.config_class(layout=layout, codebook_sizes=(16384,), text_vocab=vocabulary, **arguments["config"])
        )


def arguments_of(recipe: Path) -> dict:
    return yaml.safe_load(recipe.read_text())["model"]["init_args"]


# others take their size from the model that they start from
SIZED = [f for f in sorted(ROOT.glob("generators/*.yaml")) if "dim" in arguments_of(f).get("config", {})]


@pytest.mark.parametrize("recipe", SIZED, ids=lambda f: f.stem)
def test_generator_recipe_has_its_size(recipe):
    parameters = sum(p.numel() for p in build(recipe).parameters())
    low, high = SIZES.get(recipe.stem, (8, 2e6, 2e7))[1:]
    assert low <= parameters <= high, f"{parameters:,}"


def test_each_stage_of_token_shuffle_starts_from_the_one_before():
    stages = [ROOT / f"generators/token-shuffle-{size}.yaml" for size in (512, 1024, 2048)]
    windows = {"shuffle", "unshuffle"}
    for before, stage, new in zip(stages, stages[1:], (windows, set())):
        arguments = yaml.safe_load(stage.read_text())["model"]["init_args"]
        assert arguments["init_from"] == f"runs/{before.stem}/generator"  # where that recipe's run publishes
        fresh = build(stage).start_from(build(before))
        assert {name.split(".")[0] for name in fresh} == new
    settings = [yaml.safe_load(f.read_text())["model"]["init_args"] for f in stages]
    assert [s.get("z_loss", 0.0) for s in settings] == [0.0, 0.0, 1e-5]
    assert [s["config"]["window"] for s in settings] == [1, 2, 2]


def test_the_tiny_arra_is_the_tiny_token_shuffle_with_one_more_term():
    arra, plain = (yaml.safe_load((ROOT / f"generators/{n}-tiny.yaml").read_text()) for n in ("arra", "token-shuffle"))
    assert arra["model"]["init_args"].pop("alignment") == {"encoder": "assets/demo/teacher", "block": 1, "weight": 1.0}
    for settings in (arra, plain):
        del settings["data"]["train"], settings["data"]["val"]
    assert arra == plain


def test_each_variant_of_arra_has_its_start():
    base, lm, adapt = (arguments_of(ROOT / f"generators/arra-{n}.yaml") for n in ("base", "lm", "adapt"))
    starts = [{k for k in ("init_from", "init_from_lm") if k in a} for a in (base, lm, adapt)]
    assert starts == [set(), {"init_from_lm"}, {"init_from"}]
    assert "config" not in adapt  # the generator is trained on as it is
    for arguments in (base, lm, adapt):
        assert (arguments["alignment"]["block"], arguments["alignment"]["weight"]) == (1, 1.0)


@pytest.mark.parametrize("size", ["", "-tiny"])
def test_ett_tunes_the_tokenizer_of_ibq(size):
    """Of the same configuration and with the same loss; the projector comes first, and the frozen tokenizer has no say."""
    ett, ibq = (arguments_of(ROOT / f"tokenizers/{name}{size}.yaml") for name in ("ett", "ibq"))
    assert ett["tokenizer"] == ibq["tokenizer"] and ett["loss"] == ibq["loss"]
    assert ett["init_from"] == f"runs/ibq{size}/tokenizer"  # where that recipe's run publishes
    first, second = ett["stages"]
    assert "tokenizer" not in first["train"]
    assert set(second.get("train", PARTS)) == set(PARTS) and second["alpha"] == 0.25


def test_the_tiny_language_model_of_ett_is_small():
    arguments = arguments_of(ROOT / "tokenizers/ett-tiny.yaml")
    layout = {"kind": "Grid", "h": 8, "w": 8}
    facts = {"code_dim": 32, "text_vocab": arguments["text"]["vocab_size"], "max_text": arguments["max_text"]}
    cls = GENERATORS["llama"]
    with torch.device("meta"):
        model = cls(cls.config_class(layout, (1024,), **facts, **arguments["language_model"]))
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 5e6
