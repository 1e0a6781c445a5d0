"""Tuning a tokenizer through a language model: what the caption's gradient reaches, what stays, and what a run leaves behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
import torch.nn.functional as F
from test_staged import Each, KilledError, kill_after, rows

import tokgen
from tokgen.errors import CheckpointError, ConfigError
from tokgen.generators.image_reader import ImageReader, VisualInput
from tokgen.generators.language_model import OwnLM, load_language_model
from tokgen.generators.llama import LlamaGenerator
from tokgen.training.autoencoder import AutoencoderLoss
from tokgen.training.callbacks import CodebookMonitor, ImageGrid
from tokgen.training.checkpoint import Checkpoint, read_checkpoint
from tokgen.training.ema import EMA
from tokgen.training.end_to_end import EndToEndModule, TuningStage
from tokgen.training.muon import MuonAdamW

IBQ = {"type": "ibq", "codebook_size": tiny.CODES}
VQ = {"type": "vq", "codebook_size": tiny.CODES}
FSQ = {"type": "fsq", "levels": [8, 8, 8, 8]}
SMALL = {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16}
ALIGN = ("projector", "lm")


def tokenflow() -> Any:
    from tokgen.tokenizers.base import TOKENIZERS

    if "tokenflow" not in TOKENIZERS:
        pytest.skip("there is no TokenFlow tokenizer")
    cls = TOKENIZERS["tokenflow"]
    return cls(next(iter(cls.example_configs().values())))


def module(*stages: TuningStage, quantizer: dict | None = None, seed: int = 0, **settings: Any) -> EndToEndModule:
    torch.manual_seed(seed)
    terms = {"perceptual": "none", "disc_channels": 8, "disc_layers": 1, "disc_start": 0, "lecam_weight": 0.1}
    for name in list(settings):
        if name in AutoencoderLoss.__dataclass_fields__:
            terms[name] = settings.pop(name)
    settings.setdefault("tokenizer", tiny.tokenizer(quantizer or IBQ, dropout=settings.pop("dropout", 0.0)))
    settings.setdefault("language_model", SMALL)
    settings.setdefault("text", tiny.Text(vocab_size=290))
    settings.setdefault("max_text", 16)
    settings.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=2e-3))
    settings.setdefault("disc_optimizer", lambda p: torch.optim.AdamW(p, lr=1e-3))
    return EndToEndModule(stages=list(stages), loss=AutoencoderLoss(**terms), **settings)


def fit(run: Path, trained: EndToEndModule, images: Path, *callbacks: Any, **options: Any) -> tiny.Record:
    record, ckpt_path, data = tiny.Record(), options.pop("ckpt_path", None), options.pop("data", None)
    trainer = tiny.trainer(run, *callbacks, record, **{"max_steps": trained.schedule.total_steps, **options})
    trainer.fit(trained, datamodule=data or tiny.shards(images), ckpt_path=ckpt_path)
    return record


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A random Qwen2 of 300 ids on disk, as transformers writes one, with a tokenizer that has an end and no begin."""
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from tokgen.text import TextTokenizer

    folder = tmp_path_factory.mktemp("qwen2")
    words = TextTokenizer.train([f"square {i}, flat style" for i in range(7)], 290)
    PreTrainedTokenizerFast(tokenizer_object=words.tokenizer, eos_token="⟨bos⟩", pad_token="⟨pad⟩").save_pretrained(
        folder
    )
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 128}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=300, **sizes, **more)).save_pretrained(folder)
    return folder


# -- where gradients go ----------------------------------------------------------------------------------------------------


class Reached(tiny.L.Callback):
    """The gradients of the first step."""

    gradients: dict[str, torch.Tensor] | None = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def moved(self, *parts: str) -> bool:
        """Whether something below these names has a gradient that is not zero."""
        return any(n.startswith(parts) and bool(g.abs().max() > 0) for n, g in self.gradients.items())


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["ibq", "vq", "tokenflow"])
def test_what_the_losses_reach(tmp_path, image_shards, kind, alpha):
    """The caption alone reaches projector, encoder and, with IBQ, every row of the codebook; the decoder learns by alpha."""
    tokenizer = tokenflow() if kind == "tokenflow" else tiny.tokenizer({"ibq": IBQ, "vq": VQ}[kind])
    size = (tokenizer.image_size or (tiny.SIZE, tiny.SIZE))[0]
    data = tiny.ShardsDataModule(train=str(image_shards / "train"), batch_size=4, image_size=size)
    look = Reached()
    fit(
        tmp_path,
        module(TuningStage("tune", 1, alpha=alpha), tokenizer=tokenizer, disc_weight=0.0),
        image_shards,
        look,
        data=data,
    )
    assert look.moved("reader.visual.projector.") and look.moved("reader.lm.")
    encoders = [name for name, _ in tokenizer.named_children() if "encoder" in name]
    assert encoders and all(look.moved(f"tokenizer.{name}.") for name in encoders)
    decoders = [name for name, _ in tokenizer.named_children() if "decoder" in name]
    for name in decoders:
        gradients = [g for n, g in look.gradients.items() if n.startswith(f"tokenizer.{name}.")]
        assert bool(gradients) == (alpha > 0 and name != "semantic_decoder"), name  # that one has no target here
    if kind == "ibq":
        gradient = look.gradients["tokenizer.quantizer.codebook.weight"]
        assert bool((gradient.abs().amax(1) > 0).all())
    if kind == "vq":  # the straight-through estimator passes the codebook by; it learns from its own loss
        assert look.moved("tokenizer.quantizer.codebook.") == (alpha > 0)


def test_the_gradient_is_that_of_the_caption_plus_alpha_times_the_tokenizers(tmp_path, image_shards):
    """Against one autograd pass over both losses, written out."""
    look = Reached()
    trained = module(TuningStage("tune", 1, alpha=0.3), disc_weight=0.0, clip=None, reconstruction="l1")
    kept: dict[str, Any] = {}

    def before(self, batch, batch_idx, *rest):
        kept.update(batch=batch, state={k: v.clone() for k, v in trained.state_dict().items()})

    trained.on_train_batch_start = before.__get__(trained)
    fit(tmp_path, trained, image_shards, look)

    trained.load_state_dict(kept["state"])
    trained.tokenizer.train(), trained.reader.train()
    for p in trained.parameters():
        p.grad = None
    pixels = kept["batch"]["pixels"].float() / 255
    output = trained.tokenizer(pixels)
    l_vq = (output.reconstruction - pixels).abs().mean() + sum(output.losses.values())

    lm, captions = trained.reader.lm, kept["batch"]["caption"]
    total, count = torch.zeros(()), 0
    for codes, caption in zip(output.codes, captions):  # one caption at a time: no padding
        ids = [*lm.text.encode([caption], 100)[0][0, 1:].tolist(), lm.text.bos_id]
        x = [lm.embed(torch.tensor([[lm.text.bos_id]])), trained.reader.visual.projector(codes)[None]]
        x = torch.cat([*x, lm.embed(torch.tensor([ids[:-1]]))], 1)
        total = total + F.cross_entropy(lm(x, len(ids), (1, 16))[0], torch.tensor(ids), reduction="sum")
        count += len(ids)
    (total / count + 0.3 * l_vq).backward()
    expected = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
    assert expected.keys() == look.gradients.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(look.gradients[name], gradient, rtol=1e-3, atol=1e-6)


# -- stages ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [IBQ, tiny.EMA_VQ], ids=["ibq", "vq-ema"])
def test_a_stage_trains_its_parts_and_nothing_else(tmp_path, image_shards, quantizer):
    """Buffers too: an EMA codebook, its counters, and dropout that would blur a frozen tokenizer."""
    stages = [
        TuningStage("alignment", 2, train=("projector",)),
        TuningStage("language", 2, train=("projector", "lm")),
        TuningStage("semantic", 2),
        TuningStage("caption only", 2, alpha=0.0),
        TuningStage("encoder", 2, train=("tokenizer",), freeze=("quantizer", "decoder")),
        TuningStage("chat", 2, train=("projector", "lm")),
    ]
    trained = module(*stages, quantizer=quantizer, dropout=0.1)
    moved, before = [], {}

    def look(trainer, pl_module) -> None:
        now = {k: v for k, v in pl_module.state_dict().items() if k.startswith(("tokenizer.", "reader.", "disc"))}
        if pl_module.step % 2 == 0:
            moved.append({k for k in now if not torch.equal(now[k], before[k])})
            before.update({k: v.clone() for k, v in now.items()})

    class Start(tiny.L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            before.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    fit(tmp_path, trained, image_shards, Start(), Each(look))
    parts = [{k.split(".")[0] if k.startswith("disc") else ".".join(k.split(".")[:2]) for k in m} for m in moved]
    tokenizer = {f"tokenizer.{part}" for part in ("encoder", "pre_quant", "quantizer", "post_quant", "decoder")}
    visual, lm = "reader.visual", "reader.lm"
    assert parts[0] == {visual}
    assert parts[1] == parts[5] == {visual, lm}
    assert parts[2] == {visual, lm, "discriminator"} | tokenizer
    assert parts[3] == {visual, lm} | tokenizer - {"tokenizer.post_quant", "tokenizer.decoder"}
    assert parts[4] == {"discriminator", "tokenizer.encoder", "tokenizer.pre_quant", "tokenizer.post_quant"}
    reading = {f"reader.lm.generator.{n}" for n, p in trained.reader.lm.generator.named_parameters() if p.requires_grad}
    assert reading <= moved[1], reading - moved[1]
    drawing = ("boi", "tok_embeddings", "output")
    assert not any(word in name for names in moved for name in names if name.startswith(lm) for word in drawing)


def test_learning_rates_and_fresh_optimizers(tmp_path, image_shards):
    """A stage's schedule and factor, the tokenizer's own factor, and moments that count the stage's steps."""
    stages = [
        TuningStage("alignment", 3, lr=0.5, warmup_steps=2, kind="linear", final=0.0, train=ALIGN),
        TuningStage("semantic", 3, kind="constant", tokenizer_lr=0.1),
    ]
    trained, seen = module(*stages), []

    def look(trainer, pl_module) -> None:
        main, disc = trainer.optimizers
        rates = (
            [g["lr"] for g in main.param_groups if "part" not in g],
            [g["lr"] for g in main.param_groups if "part" in g],
        )
        seen.append((*rates, {int(s["step"]) for s in main.state.values()}, len(disc.state)))

    record = fit(tmp_path, trained, image_shards, Each(look))
    assert record.column("train/stage") == [0, 0, 0, 1, 1, 1]
    assert record.column("train/lr") == pytest.approx([5e-4, 1e-3, 1e-3, 2e-3, 2e-3, 2e-3])
    for own, tokenizer, _, _ in seen[3:]:
        assert own == pytest.approx([2e-3] * len(own)) and tokenizer == pytest.approx([2e-4] * len(tokenizer))
    assert [s[2] for s in seen] == [{1}, {2}, {3}, {1}, {2}, {3}]
    assert [s[3] > 0 for s in seen] == [False] * 3 + [True] * 3  # the discriminator waits for the tokenizer


def test_captions_and_reconstruction_are_learned(tmp_path, image_shards):
    adamw = lambda p: torch.optim.AdamW(p, lr=5e-3)  # noqa: E731
    stages = [TuningStage("alignment", 40, train=ALIGN), TuningStage("semantic", 80)]
    record = fit(tmp_path, module(*stages, optimizer=adamw, disc_weight=0.0, quantizer=FSQ), image_shards)
    caption, reconstruction = record.column("train/caption"), record.column("train/reconstruction")
    assert caption[0] == pytest.approx(math.log(290), rel=0.05)
    assert sum(caption[-5:]) < 0.25 * sum(caption[:5])
    assert sum(reconstruction[-12:]) < 0.6 * sum(reconstruction[:12])  # an epoch each


# -- breaking off and going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "published"])
def test_killed_anywhere_equals_uninterrupted_bit_for_bit(tmp_path, image_shards, published, kind):
    """Killed within stages and exactly between them; dropout, EMA codebook with k-means and revival, discriminator, LeCam,
    Muon, an epoch's end (12 batches) on the way."""

    def trained() -> EndToEndModule:
        stages = [
            TuningStage("alignment", 5, train=ALIGN, warmup_steps=2),
            TuningStage("semantic", 5, warmup_steps=2),
            TuningStage("chat", 5, train=ALIGN),
        ]
        lm = {**SMALL, "ffn_dropout": 0.1} if kind == "own" else str(published)
        optimizer = lambda p: MuonAdamW(p, lr=1e-3)  # noqa: E731
        return module(*stages, quantizer=tiny.EMA_VQ, dropout=0.1, language_model=lm, optimizer=optimizer)

    options = {"val_check_interval": 4}
    straight = fit(tmp_path / "straight", trained(), image_shards, Checkpoint(every_n_steps=1), **options)
    run, found = tmp_path / "killed", []
    for stop in (3, 5, 8, 10, None):
        last, record = run / "checkpoints" / "last.ckpt", tiny.Record()
        callbacks = [
            Checkpoint(every_n_steps=1, save_on_exception=False),
            record,
            *([kill_after(stop)] if stop else []),
        ]
        trainer = tiny.trainer(run, *callbacks, max_steps=15, **options)
        arguments = {"datamodule": tiny.shards(image_shards), "ckpt_path": last if found else None}
        if stop is None:
            trainer.fit(trained(), **arguments)
        else:
            with pytest.raises(KilledError):
                trainer.fit(trained(), **arguments)
            assert read_checkpoint(last)["global_step"] == stop
        record.rows = [row for row in record.rows if row["step"] <= (stop or 15)]
        # a validation after the last checkpoint is made again on the way on, and must be the same
        found += [row for row in rows(record) if row not in found]
    assert [row["step"] for row in found if "train/lr" in row] == [float(i).hex() for i in range(1, 16)]
    assert found == rows(straight)
    one, other = (read_checkpoint(r / "checkpoints" / "last.ckpt") for r in (tmp_path / "straight", run))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for mine, theirs in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        assert mine["state"].keys() == theirs["state"].keys()
        for index, state in mine["state"].items():
            for name, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][index][name])), (index, name)
    fingerprints = [tokgen.load(r / "tokenizer").fingerprint for r in (tmp_path / "straight", run)]
    assert fingerprints[0] == fingerprints[1]


def test_a_discriminator_goes_on(tmp_path, image_shards):
    tokenizer = tiny.autoencoder(tokenizer=tiny.tokenizer(IBQ), lecam_weight=0.1)
    trainer = tiny.trainer(tmp_path / "one", Checkpoint(), max_steps=3)
    trainer.fit(tokenizer, datamodule=tiny.shards(image_shards))
    checkpoint = tmp_path / "one" / "checkpoints" / "last.ckpt"
    settings = {"init_from": str(tmp_path / "one" / "tokenizer"), "discriminator_from": str(checkpoint)}
    tuned = module(TuningStage("semantic", 1), **settings)
    for name in ("discriminator", "lecam", "tokenizer"):
        for key, value in getattr(tokenizer, name).state_dict().items():
            assert torch.equal(getattr(tuned, name).state_dict()[key], value), (name, key)
    with pytest.raises(ConfigError, match="no stage has a discriminator"):
        module(TuningStage("alignment", 1, train=ALIGN), **settings)
    with pytest.raises(CheckpointError, match=r"the discriminator in .* does not fit PatchGAN"):
        module(TuningStage("semantic", 1), disc_channels=16, **settings)


# -- language models ---------------------------------------------------------------------------------------------------------


def test_a_published_language_model_reads(tmp_path, image_shards, published):
    """Its logits with padded captions are its own, one caption at a time; it is tuned and saved in its own format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = load_language_model(published)
    assert lm.begin is None and lm.end == 1 and lm.dim == 32
    tokenizer = tiny.tokenizer(IBQ).eval()
    reader = ImageReader(lm, VisualInput.of(tokenizer, lm.dim, layers=3), prompt="say: ", max_text=20).eval()
    tokens = tokenizer.encode(torch.rand(3, 3, 16, 16))
    codes = tokenizer.embeddings(tokens).detach()
    captions = ["square 1", "square 3, flat style", ""]
    reading = reader(tokens, codes, captions)
    model, words = AutoModelForCausalLM.from_pretrained(published), AutoTokenizer.from_pretrained(published)
    total, count = 0.0, 0
    for row, caption in zip(codes, captions):
        said = words(caption, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([*words("say:", add_special_tokens=False)["input_ids"], *said, words.eos_token_id])
        x = torch.cat([reader.visual.projector(row), model.get_input_embeddings()(ids)])[None]
        labels = torch.cat([torch.full((16,), -100), ids])
        labels[16 : -len(said) - 1] = -100  # the prompt is not learned
        total += float(model(inputs_embeds=x, labels=labels[None]).loss) * (len(said) + 1)
        count += len(said) + 1
    assert int(reading.count) == count
    assert float(reading.loss) == pytest.approx(total / count, rel=1e-4)

    stages = [TuningStage("alignment", 2, train=("projector",)), TuningStage("semantic", 3)]
    before = {k: v.clone() for k, v in AutoModelForCausalLM.from_pretrained(published).state_dict().items()}
    record = fit(
        tmp_path, module(*stages, language_model=str(published)), image_shards, Checkpoint(), val_check_interval=3
    )
    assert all(math.isfinite(v) for row in record.rows for v in row.values())
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    again = load_language_model(tmp_path / "lm")
    assert (
        again.end == 1 and again.text.encode(["square 1"], 9)[0].tolist() == lm.text.encode(["square 1"], 9)[0].tolist()
    )


def test_what_is_no_language_model_is_said(tmp_path, published):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_language_model(tmp_path / "nowhere")
    tiny.tokenizer(IBQ).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="no text tokenizer"):
        load_language_model(tmp_path / "tokenizer")


def test_a_caption_is_drawn_from_what_was_learned(tmp_path, image_shards):
    """Two pictures, two captions, learned by heart; then each is said of its picture."""
    adamw = lambda p: torch.optim.AdamW(p, lr=5e-3)  # noqa: E731
    for split in ("train", "val"):
        tiny.write_images(tmp_path / "images" / split, 2, 3)
    stages = [TuningStage("all", 120, kind="constant")]
    trained = module(*stages, optimizer=adamw, disc_weight=0.0, prompt="what")
    data = tiny.ShardsDataModule(train=str(tmp_path / "images" / "train"), batch_size=2, image_size=tiny.SIZE)
    fit(tmp_path, trained, tmp_path, data=data)
    whole = tiny.ShardsDataModule(val=str(tmp_path / "images" / "val"), batch_size=2, image_size=tiny.SIZE)
    (batch,) = whole.val_dataloader()
    tokenizer = trained.tokenizer.eval()
    tokens = tokenizer.encode(batch["pixels"])
    assert trained.reader.caption(tokens, tokenizer.embeddings(tokens)) == batch["caption"]
    one = tokens[torch.tensor([True, False])]  # alone, and with fewer steps
    trained.reader.max_text = 2
    assert len(trained.reader.caption(one, tokenizer.embeddings(one))[0]) < len(batch["caption"][0])


# -- the baseline of ids -----------------------------------------------------------------------------------------------------


def test_indices_are_read_by_embeddings_of_their_own(tmp_path, image_shards):
    trained = module(TuningStage("alignment", 4, train=ALIGN), visual="indices")
    assert trained.discriminator is None
    before = {k: v.clone() for k, v in trained.tokenizer.state_dict().items()}
    record = fit(tmp_path, trained, image_shards, Checkpoint(), val_check_interval=4)
    for name, value in before.items():
        assert torch.equal(trained.tokenizer.state_dict()[name], value), name
    assert len(record.column("val/caption_loss")) == 1
    table = VisualInput.from_pretrained(tmp_path / "projector")
    tokens = trained.tokenizer.eval().encode(torch.rand(2, 3, 16, 16))
    assert torch.equal(table(tokens, None), trained.reader.visual.table.weight[tokens.ids])
    residual = tiny.tokenizer({"type": "residual-vq", "codebook_size": 8, "num_quantizers": 2}).eval()
    tokens, table = residual.encode(torch.rand(2, 3, 16, 16)), VisualInput.of(residual, 32, "indices")
    expected = table.table.weight[tokens.ids[..., 0]] + table.table.weight[8 + tokens.ids[..., 1]]
    assert torch.equal(table(tokens, None), expected)
    with pytest.raises(ConfigError, match="'indices' gives the tokenizer no gradient"):
        module(TuningStage("tune", 4), visual="indices")


# -- validation, publication -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_validation_averages_over_ids_and_pictures(tmp_path, image_shards):
    """10 pictures in batches of 4, 4 and 2, against all ten at once; callbacks of every run work."""
    trained = module(TuningStage("tune", 2), dropout=0.1)
    callbacks = (Checkpoint(), ImageGrid(), CodebookMonitor(2), EMA())
    record = fit(tmp_path, trained, image_shards, *callbacks, val_check_interval=2)
    (row,) = [row for row in record.rows if "val/psnr" in row]
    whole = tiny.ShardsDataModule(val=str(image_shards / "val"), batch_size=10, image_size=tiny.SIZE)
    (batch,) = whole.val_dataloader()
    trained.eval()
    output = trained.tokenizer(batch["pixels"].float() / 255)
    reading = trained.reader(output.tokens, output.codes, batch["caption"])
    assert row["val/caption_loss"] == pytest.approx(float(reading.loss), rel=1e-5)
    assert row["val/caption_accuracy"] == pytest.approx(int(reading.correct) / int(reading.count))
    assert {"val/psnr", "val/usage", "val/l1"} <= set(row)
    assert (tmp_path / "images" / "reconstruction-0000002.png").is_file()

    data = tiny.ShardsDataModule(test=str(image_shards / "val"), batch_size=4, image_size=tiny.SIZE)
    trainer = tiny.trainer(tmp_path / "more")
    last = {"ckpt_path": tmp_path / "checkpoints" / "last.ckpt", "datamodule": data, "weights_only": True}
    again = module(TuningStage("tune", 2), dropout=0.1)
    trainer.test(again, verbose=False, **last)
    assert float(trainer.callback_metrics["val/caption_loss"]) == pytest.approx(row["val/caption_loss"], rel=1e-5)
    predicted = tokgen.Tokens.cat(trainer.predict(again, **last))
    assert len(predicted) == 10 and predicted.tokenizer == tokgen.load(tmp_path / "tokenizer").fingerprint


def test_a_run_leaves_a_tokenizer_a_language_model_and_a_projector(tmp_path, image_shards):
    """The next run goes on from them, reading as before; the generator knows the tuned codebook, and draws."""
    lm = {**SMALL, "code_embedding": "codebook", "code_head": "codebook"}
    stages = [TuningStage("alignment", 2, train=ALIGN), TuningStage("semantic", 3)]
    trained = module(*stages, language_model=lm)
    fit(tmp_path / "one", trained, image_shards, Checkpoint())
    assert not list((tmp_path / "one").glob("*.tmp-*"))
    tokenizer, generator = (tokgen.load(tmp_path / "one" / name) for name in ("tokenizer", "lm"))
    assert tokenizer.fingerprint == trained.tokenizer.eval().fingerprint == generator.tokenizer_fingerprint
    assert isinstance(generator, LlamaGenerator) and torch.equal(generator.codes.codebook, tokenizer.codebook_table())
    ids = torch.arange(5)
    projected = trained.reader.visual.projector(tokenizer.codebook_table()[ids])
    assert torch.equal(generator.embed_codes(ids), projected)
    assert generator.generate(["square 3"], temperature=0).ids.shape == (1, 16)
    with pytest.raises(CheckpointError, match="visual-input"):
        tokgen.load(tmp_path / "one" / "projector")

    go_on = {
        "language_model": str(tmp_path / "one" / "lm"),
        "projector_from": str(tmp_path / "one" / "projector"),
        "init_from": str(tmp_path / "one" / "tokenizer"),
    }
    chat = module(TuningStage("chat", 1, lr=0.0, train=ALIGN), seed=7, **go_on)
    fit(tmp_path / "two", chat, image_shards, Checkpoint())
    assert isinstance(chat.reader.lm, OwnLM)
    for name, value in trained.reader.state_dict().items():
        if "generator.codes" not in name:
            assert torch.equal(chat.reader.state_dict()[name], value), name
    with pytest.raises(ConfigError, match=r"projector_from .* this run needs"):
        fit(tmp_path / "three", module(TuningStage("chat", 1, train=ALIGN), projector_layers=1, **go_on), image_shards)


@pytest.mark.parametrize("kind", ["own", "published"])
def test_a_generator_goes_on_from_a_run(tmp_path, image_shards, published, kind):
    """Stage 3: the language model that has learned to read the tuned codes draws with them, frozen tokenizer, its projector
    taken over."""
    by_vector = {"code_embedding": "codebook", "code_head": "codebook"}
    lm = {**SMALL, **by_vector} if kind == "own" else str(published)
    trained = module(TuningStage("semantic", 2), language_model=lm)
    fit(tmp_path / "one", trained, image_shards, Checkpoint())
    run = {name: str(tmp_path / "one" / name) for name in ("tokenizer", "lm", "projector")}
    common = {"visual_tokenizer": run["tokenizer"], "optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3)}
    common["schedule"] = tiny.Schedule(30, kind="constant")
    if kind == "own":
        generator = tiny.GeneratorModule(init_from=run["lm"], **common)
    else:
        settings = {"init_from_lm": run["lm"], "projector": run["projector"]}
        generator = tiny.GeneratorModule(config={**by_vector, "max_text": 16}, text=tiny.Text(lowercase=False), **settings, **common)  # fmt: skip
    starts = {}

    class Start(tiny.L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            starts.update({k: v.clone() for k, v in pl_module.generator.state_dict().items()})

    record, callbacks = tiny.Record(), [Start(), Checkpoint()]
    trainer = tiny.trainer(tmp_path / "two", *callbacks, record, max_steps=30, val_check_interval=30)
    trainer.fit(generator, datamodule=tiny.shards(image_shards))
    for name, value in trained.reader.visual.projector.state_dict().items():
        assert torch.equal(starts[f"codes.projector.{name}"], value), name
    tokenizer = tokgen.load(run["tokenizer"])
    assert torch.equal(starts["codes.codebook"], tokenizer.codebook_table())
    lm = trained.reader.lm
    words = lm.generator.condition.embeddings if kind == "own" else lm.model.get_input_embeddings()
    assert torch.equal(starts["condition.embeddings.weight"], words.weight)
    loss = record.column("train/ce")
    assert loss[0] == pytest.approx(math.log(tiny.CODES), abs=1e-3) and sum(loss[-5:]) / 5 < 0.92 * loss[0]
    drawn = tokgen.load(tmp_path / "two" / "generator")
    assert torch.equal(drawn.codes.codebook, tokenizer.codebook_table())
    assert tokenizer.decode(drawn.generate(["square 3"], temperature=0)).shape == (1, 3, tiny.SIZE, tiny.SIZE)


def test_generators_that_read_codes_by_vectors_say_what_they_need(tmp_path, image_shards, code_shards):
    by_vector = {"code_embedding": "codebook"}
    trainer = tiny.trainer(tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match=r"reads codes by their vectors: give model\.init_args\.visual_tokenizer"):
        trainer.fit(tiny.generator(config=by_vector), datamodule=tiny.shards(code_shards))
    tokenizer = tiny.tokenizer(IBQ)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = {"visual_tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(ConfigError, match=r"codebook is \(32, 4\), the generator reads one of \(32, 7\)"):
        trainer.fit(tiny.generator(config={**by_vector, "code_dim": 7}, **given), datamodule=tiny.shards(image_shards))
    for kind, words in (("embeddings", "does not fit Projector"), ("indices", "it has no projector")):
        VisualInput.of(tokenizer, 48, kind).save_pretrained(tmp_path / kind)
        with pytest.raises((CheckpointError, ConfigError), match=words):
            wrong = tiny.generator(config=by_vector, projector=str(tmp_path / kind), **given)
            trainer.fit(wrong, datamodule=tiny.shards(image_shards))
    with pytest.raises(ConfigError, match=r"set config\.code_embedding: codebook"):
        wrong = tiny.generator(projector=str(tmp_path / "embeddings"), **given)
        trainer.fit(wrong, datamodule=tiny.shards(image_shards))


# -- settings ----------------------------------------------------------------------------------------------------------------


def test_wrong_settings_are_named(tmp_path, image_shards, code_shards):
    with pytest.raises(ConfigError, match=r"stage tune: train \['eye'\]; expected some of projector, lm, tokenizer"):
        TuningStage("tune", 3, train=("eye",))
    with pytest.raises(ConfigError, match="stage tune: alpha -1"):
        TuningStage("tune", 3, alpha=-1.0)
    with pytest.raises(ConfigError, match="freeze names 'quantiser', which is none of encoder"):
        module(TuningStage("tune", 3, freeze=("quantiser",)))
    every = ("encoder", "pre_quant", "quantizer", "post_quant", "decoder")
    with pytest.raises(ConfigError, match="stage tune trains nothing"):
        fit(tmp_path, module(TuningStage("tune", 3, train=("tokenizer",), freeze=every)), image_shards)
    with pytest.raises(ConfigError, match=r"language_model\.text_vocab follows from"):
        fit(tmp_path, module(TuningStage("tune", 3), language_model={**SMALL, "text_vocab": 9}), image_shards)
    with pytest.raises(ConfigError, match="language_model: unknown key 'width'"):
        fit(tmp_path, module(TuningStage("tune", 3), language_model={"width": 9}), image_shards)
    with pytest.raises(ConfigError, match="trains on image shards with captions and was given codes"):
        fit(tmp_path, module(TuningStage("tune", 3)), code_shards, data=tiny.shards(code_shards))
    with pytest.raises(ConfigError, match="seed gives no code vectors"):
        module(TuningStage("tune", 3), tokenizer=tiny.semantic("seed", tiny.eyes(tmp_path / "eye")))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_start_whatever_the_losses(tmp_path, image_shards, precision):
    """Language model and projector of the arms of a comparison start alike, also under autocast; accumulation keeps the step."""
    starts = []

    class Start(tiny.L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            starts.append({k: v.clone() for k, v in pl_module.reader.state_dict().items()})

    for i, (stage, weight) in enumerate([(TuningStage("a", 1), 0.5), (TuningStage("b", 1, train=ALIGN), 0.0)]):
        fit(tmp_path / str(i), module(stage, disc_weight=weight), image_shards, Start(), precision=precision)
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


def test_accumulated_batches_are_one_step(tmp_path, image_shards):
    sgd = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    same = {"optimizer": sgd, "disc_weight": 0.0, "quantizer": {**IBQ, "entropy_weight": 0.0}, "clip": None}
    weights = []
    for accumulate, size in ((1, 8), (2, 4)):
        trained = module(TuningStage("tune", 2, kind="constant"), accumulate=accumulate, **same)
        data = tiny.ShardsDataModule(
            train=str(image_shards / "train"), batch_size=size, image_size=tiny.SIZE, shuffle_buffer=0
        )
        fit(tmp_path / str(accumulate), trained, image_shards, data=data)
        assert trained.step == 2
        weights.append(trained.state_dict())
    # captions of seven lengths: means of halves differ a little from the mean of the whole
    for name, value in weights[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[1][name], value, rtol=0.05, atol=2e-3)


# -- ranks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ddp_equals_one_process(tmp_path):
    """Two stages, IBQ, discriminator, parameters of other stages unused; a validation set of three pictures."""
    tiny.write_images(tmp_path / "images" / "train", 48, 0)
    tiny.write_images(tmp_path / "images" / "val", 3, 1)
    ranks.both("end_to_end", tmp_path, tmp_path)
    one, two = (torch.load(tmp_path / f"end_to_end{n}.pt", weights_only=True) for n in (1, 2))
    assert len(one["rows"]) == len(two["rows"]) > 4
    for a, b in zip(one["rows"], two["rows"]):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=2e-2, abs=1e-4), key
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, rtol=1e-3, atol=1e-5)
