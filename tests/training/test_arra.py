"""ARRA's alignment in training: which states, which gradients, what is kept and what is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from tokgen.encoders.base import load_encoder
from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.errors import CheckpointError, ConfigError
from tokgen.generators.llama import LlamaGenerator
from tokgen.losses.alignment import alignment_loss
from tokgen.precompute import tokenize_shards
from tokgen.training.alignment import Alignment
from tokgen.training.checkpoint import Checkpoint, read_checkpoint
from tokgen.training.ema import EMA

DIM = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Folders `images` and `codes` (ids and embeddings of the same pictures), each with train and val, and the tokenizer
    `visual` and the encoder `teacher` that made them."""
    folder = tmp_path_factory.mktemp("arra")
    torch.manual_seed(0)
    visual = tiny.tokenizer().eval()
    visual.save_pretrained(folder / "visual")
    teacher = ContrastiveEncoder(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, DIM, 8, 4))
    teacher.save_pretrained(folder / "teacher")
    teacher = load_encoder(folder / "teacher")
    for split, count in (("train", 16), ("val", 6)):
        tiny.write_images(folder / "images" / split, count, count)
        source, out = folder / "images" / split, folder / "codes" / split
        options = {"max_samples": 12, "progress": False}  # shards of the same sizes: the same order of samples
        tokenize_shards(visual, source, out, encoder=teacher, encoder_from=str(folder / "teacher"), **options)
    return folder


def fitted(run: Path, shards: Path, steps: int = 1, callbacks=(), ckpt_path=None, data=None, **settings):
    """A module after `steps` steps on the code shards."""
    settings.setdefault("alignment", Alignment())
    settings["config"] = {"token_dropout": 0.0, "caption_dropout": 0.0, "n_layers": 3, **settings.get("config", {})}
    module = tiny.generator(**settings)
    trainer = tiny.trainer(run, *callbacks, max_steps=steps)
    trainer.fit(module, datamodule=data or tiny.shards(shards / "codes"), ckpt_path=ckpt_path)
    return module


def batch_of(module, count: int = 3) -> dict:
    """A batch whose captions have different lengths."""
    ids = torch.randint(0, tiny.CODES, (count, tiny.LAYOUT.length))
    captions = ["a", "square 3, flat style", "square 4, flat"][:count]
    return {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "caption": captions,
            "embedding": torch.randn(count, DIM)}  # fmt: skip


def aligned(module, batch, **weights) -> torch.Tensor:
    return module.loss(batch, **weights).losses["alignment"]


# -- the term -----------------------------------------------------------------------------------------------------------


def test_alignment_depends_on_no_other_term(tmp_path, shards):
    module = fitted(tmp_path, shards)
    batch, found = batch_of(module), []
    for weights in ({}, {"z_loss": 1e-2}, {"text_loss": 0.5, "label_smoothing": 0.1}):
        output = module.loss(batch, **weights)
        gradient = torch.autograd.grad(output.losses["alignment"], list(module.projector.parameters()))
        found.append([output.losses["alignment"], *gradient])
        torch.testing.assert_close(output.loss, sum(output.losses.values()))
    assert float(found[0][1].abs().max()) > 0
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_the_weighted_term_is_logged_and_enters_the_loss(tmp_path, shards):
    record = tiny.Record()
    fitted(tmp_path, shards, steps=2, callbacks=[record], alignment=Alignment(weight=0.25), z_loss=1e-3)
    for row in (r for r in record.rows if "train/loss" in r):
        assert row["train/alignment"] == pytest.approx(0.25 * (1 - row["train/alignment_cosine"]), rel=1e-5)
        parts = row["train/ce"] + row["train/z_loss"] + row["train/alignment"]
        assert row["train/loss"] == pytest.approx(parts, rel=1e-5)


def test_it_learns_the_direction_and_validation_stays_cross_entropy(tmp_path, shards):
    record = tiny.Record()
    module = fitted(tmp_path, shards, steps=60, callbacks=[record])
    cosine = record.column("train/alignment_cosine")
    assert sum(cosine[-4:]) / 4 > 0.3 > 0.1 > cosine[0]
    trainer = tiny.trainer(tmp_path)
    data = tiny.shards(shards / "codes", batch_size=4)  # 6 items: 4 + 2
    data.setup("validate")
    batches = list(data.val_dataloader())
    batches[0]["valid"][1] = False
    trainer.validate(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    keep = torch.tensor([0, 2, 3, 4, 5])
    whole = {k: torch.cat([b[k] for b in batches])[keep] for k in ("ids", "mask", "embedding")}
    whole["caption"] = [c for b in batches for c in b["caption"]][:1] + [c for b in batches for c in b["caption"]][2:]
    module.eval()
    with torch.no_grad():
        expected = module.loss(whole)
    assert found["val/loss"] == pytest.approx(float(expected.losses["ce"]), rel=1e-5)
    assert found["val/alignment"] == pytest.approx(float(expected.losses["alignment"]), rel=1e-5)
    assert found["val/alignment_cosine"] == pytest.approx(1 - found["val/alignment"], rel=1e-5)


# -- which states -------------------------------------------------------------------------------------------------------


def by_hand(module, batch, row: int, block: int) -> torch.Tensor:
    """States (S, dim) of one picture after `block` blocks: its own prompt without padding, block by block."""
    generator = module.generator
    ids, mask = generator.encode_prompts(batch["caption"])
    words = generator.condition.embeddings(ids[row][mask[row]])
    prefix = torch.cat(
        [words, generator.condition.boi[None], *([generator.rep[None]] if generator.rep is not None else [])]
    )
    codes = generator.tok_embeddings(batch["ids"][row])
    if generator.config.window > 1:
        codes = generator.shuffle(codes[generator.order][None])[0]
    x = torch.cat([prefix, codes[:-1]])[None]  # begin, words, begin-of-image, codes but the last
    rope = generator.rope(torch.ones(1, len(prefix), dtype=torch.bool))
    rope = tuple(r[:, : x.shape[1]] for r in rope)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
    for layer in list(generator.layers)[:block]:
        x = layer(x, rope, causal)
    return x[0, len(prefix) - 1 :]  # the last of the prefix predicts the first code


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("block", [1, 3])
def test_exactly_the_predicting_positions_are_aligned_at_any_padding(tmp_path, shards, window, block):
    module = fitted(tmp_path, shards, config={"window": window}, alignment=Alignment(block=block)).eval()
    batch = batch_of(module)
    lengths = module.generator.encode_prompts(batch["caption"])[1].sum(1)
    assert len(set(lengths.tolist())) == 3
    states = torch.stack([by_hand(module, batch, row, block) for row in range(3)])
    assert states.shape == (3, 16 // window**2, 32)
    expected = alignment_loss(module.projector(states), batch["embedding"])
    torch.testing.assert_close(aligned(module, batch), expected, rtol=1e-5, atol=1e-6)
    if block == 3:  # of the last block: the very states that the code logits are made of
        logits = module.generator.loss(batch).logits
        slots = module.generator.to_slots(states).flatten(1, 2)  # (B, N, channels), window by window
        own = module.generator.code_logits(slots, 0, module.generator.head())
        order = module.generator.order.flatten()
        torch.testing.assert_close(own, logits[:, order], rtol=1e-4, atol=1e-5)


def test_padding_is_not_seen_and_words_are(tmp_path, shards):
    module = fitted(tmp_path, shards).eval()
    with torch.no_grad():
        module.generator.condition.embeddings.weight *= 50  # words matter little at the start
    batch = batch_of(module)
    prompt, mask = module.generator.encode_prompts(batch.pop("caption"))
    before = aligned(module, {**batch, "prompt": prompt, "prompt_mask": mask})
    padded = torch.where(mask, prompt, 7)
    wider = {"prompt": nn.functional.pad(padded, (0, 2), value=5), "prompt_mask": nn.functional.pad(mask, (0, 2))}
    torch.testing.assert_close(aligned(module, {**batch, **wider}), before)
    prompt[0, 1] += 1
    assert (aligned(module, {**batch, "prompt": prompt, "prompt_mask": mask}) - before).abs().item() > 1e-5


def test_positions_without_codes_do_not_count(tmp_path, shards):
    module = fitted(tmp_path, shards, config={"window": 2}).eval()
    batch = batch_of(module)
    whole = aligned(module, batch)
    batch["mask"][0, -1] = False  # the last window still predicts three codes
    torch.testing.assert_close(aligned(module, batch), whole)
    batch["mask"][0, 8:] = False  # the lower two windows predict none
    states = module.generator.loss(batch, hidden_of=1).hidden
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:] = False
    expected = alignment_loss(module.projector(states), batch["embedding"], mask)
    torch.testing.assert_close(aligned(module, batch), expected)
    assert (expected - whole).abs().item() > 1e-6


def test_rep_aligns_the_one_token_before_the_codes(tmp_path, shards):
    module = fitted(tmp_path, shards, config={"rep_token": True}, alignment=Alignment(target="rep")).eval()
    batch = batch_of(module)
    state = torch.stack([by_hand(module, batch, row, 1)[:1] for row in range(3)])
    expected = alignment_loss(module.projector(state), batch["embedding"])
    torch.testing.assert_close(aligned(module, batch), expected, rtol=1e-5, atol=1e-6)
    batch["ids"] = (batch["ids"] + 1) % tiny.CODES  # <REP> stands before the codes
    torch.testing.assert_close(aligned(module, batch), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="rep_token: true"):
        fitted(tmp_path, shards, alignment=Alignment(target="rep"))


@pytest.mark.parametrize("block", [1, 2, 3])
def test_its_gradient_ends_at_its_block(tmp_path, shards, block):
    module = fitted(tmp_path, shards, alignment=Alignment(block=block))
    module.zero_grad()
    aligned(module, batch_of(module)).backward()
    size = lambda part: sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)  # noqa: E731
    reached = [size(layer) > 0 for layer in module.generator.layers]
    assert reached == [i < block for i in range(3)]
    assert size(module.generator.norm) == size(module.generator.output) == 0
    assert size(module.generator.tok_embeddings) > 0 and size(module.generator.condition) > 0


# -- what is kept and what is left behind ----------------------------------------------------------------------------------


def test_the_published_generator_has_no_projector(tmp_path, shards):
    ema = EMA(0.5)
    module = fitted(tmp_path, shards, steps=2, callbacks=[ema, Checkpoint()])
    assert not any(name.startswith("projector") for name in ema.average) and len(ema.average) > 10
    kept = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert {k for k in kept["state_dict"] if k.startswith("projector.")} == {
        f"projector.{name}" for name in module.projector.state_dict()
    }
    about = kept["tokgen"]["config"]["alignment"]
    assert (about["name"], about["dim"], about["block"]) == ("contrastive encoder teacher", DIM, 1)
    published = LlamaGenerator.from_pretrained(tmp_path / "generator")  # strict
    assert published.state_dict().keys() == module.generator.state_dict().keys()
    plain = fitted(tmp_path / "plain", shards, alignment=None)
    assert published.state_dict().keys() == plain.generator.state_dict().keys()


def test_resume_is_bitwise_with_the_projector(tmp_path, shards):
    settings = {"config": {"token_dropout": 0.1, "caption_dropout": 0.1}, "accumulate": 2}
    straight = fitted(tmp_path / "a", shards, 6, [EMA(0.5), Checkpoint()], **settings)
    fitted(tmp_path / "b", shards, 3, [EMA(0.5), Checkpoint()], **settings)
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    resumed = fitted(tmp_path / "b", shards, 6, [EMA(0.5), Checkpoint()], last, **settings)
    assert resumed.step == straight.step == 6
    one, two = (read_checkpoint(tmp_path / r / "checkpoints" / "last.ckpt") for r in "ab")
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    states = [c["optimizer_states"][0]["state"] for c in (one, two)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == len(list(resumed.parameters()))
    for index, moments in states[0].items():
        assert torch.equal(moments["exp_avg"], states[1][index]["exp_avg"]), index


def test_a_checkpoint_without_or_of_another_alignment_is_named(tmp_path, shards, caplog):
    fitted(tmp_path / "with", shards, callbacks=[Checkpoint()])
    fitted(tmp_path / "without", shards, callbacks=[Checkpoint()], alignment=None)
    paths = {k: tmp_path / k / "checkpoints" / "last.ckpt" for k in ("with", "without")}
    with pytest.raises(CheckpointError, match="trained with alignment and this run is without"):
        fitted(tmp_path, shards, 2, ckpt_path=paths["with"], alignment=None)
    with pytest.raises(CheckpointError, match="trained without alignment and this run is with it"):
        fitted(tmp_path, shards, 2, ckpt_path=paths["without"])


def test_the_projector_neither_changes_the_start_nor_the_first_step_of_the_rest(tmp_path, shards):
    """Blocks above the aligned one step as without alignment; the generator itself starts the same."""
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "clip": None}
    plain = fitted(tmp_path, shards, alignment=None, **sgd).generator.state_dict()
    with_it = fitted(tmp_path, shards, **sgd).generator.state_dict()
    for name, value in plain.items():
        above = name.startswith(("layers.1", "layers.2", "norm", "output"))
        assert torch.equal(value, with_it[name]) == above, name


# -- where embeddings come from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weight": 0.0}, "weight 0.0 must be above 0"),
        ({"block": 0}, "block 0 at least 1"),
        ({"source": "file"}, "source 'file'; expected one of shard, online"),
        ({"target": "all"}, "target 'all'; expected one of every, rep"),
        ({"source": "online"}, "needs alignment.encoder"),
    ],
)
def test_wrong_settings_are_named(settings, match):
    with pytest.raises(ConfigError, match=match):
        Alignment(**settings)


def test_embeddings_that_are_missing_or_of_another_encoder_are_named(tmp_path, shards, code_shards):
    with pytest.raises(ConfigError, match=r"train shards hold no embeddings.*tokgen tokenize … --embed clip"):
        fitted(tmp_path, shards, alignment=Alignment(encoder="clip"), data=tiny.shards(code_shards))
    with pytest.raises(ConfigError, match=r"embeddings of encoder '.*/teacher', and alignment\.encoder is 'clip'"):
        fitted(tmp_path, shards, alignment=Alignment(encoder="clip"))
    for name in (str(shards / "teacher"), "contrastive encoder teacher"):  # as it was loaded, and as it is quoted
        fitted(tmp_path, shards, alignment=Alignment(encoder=name))
    with pytest.raises(ConfigError, match="block 4; the generator has 3 blocks"):
        fitted(tmp_path, shards, alignment=Alignment(block=4))


def test_splits_of_two_encoders_are_named(tmp_path, shards):
    other = load_encoder(shards / "teacher")
    other.name = "another"
    visual = tiny.VQGAN.from_pretrained(shards / "visual")
    tokenize_shards(visual, shards / "images" / "val", tmp_path / "val", encoder=other, progress=False)
    data = tiny.ShardsDataModule(train=str(shards / "codes" / "train"), val=str(tmp_path / "val"), batch_size=4)
    with pytest.raises(ConfigError, match=r"val shards hold embeddings of encoder 'another', and others those of"):
        fitted(tmp_path, shards, data=data)


def online(shards: Path, **settings) -> dict:
    alignment = Alignment(source="online", encoder=str(shards / "teacher"))
    data = tiny.shards(shards / "images", seed=3, **settings)
    return {"alignment": alignment, "visual_tokenizer": str(shards / "visual"), "data": data}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_pixels_give_the_ids_and_embeddings_of_the_shards(tmp_path, shards, precision):
    """Also where the generator runs in bfloat16: tokenizer and encoder do not."""
    settings = online(shards)
    data = settings.pop("data")
    module = tiny.generator(config={"token_dropout": 0.0, "caption_dropout": 0.0}, **settings)
    seen = []
    loss = module.loss
    module.loss = lambda batch, **weights: (seen.append(batch), loss(batch, **weights))[1]
    tiny.trainer(tmp_path, max_steps=4, precision=precision).fit(module, datamodule=data)
    codes = tiny.shards(shards / "codes", batch_size=16)
    codes.setup("fit")
    (stored,) = codes.train_dataloader()
    rows = {key: i for i, key in enumerate(stored["key"])}
    assert sorted(key for batch in seen for key in batch["key"]) == sorted(rows)
    for batch in seen:
        at = [rows[key] for key in batch["key"]]
        assert torch.equal(batch["ids"], stored["ids"][at]) and bool(batch["mask"].all())
        assert batch["embedding"].dtype == torch.float32
        torch.testing.assert_close(batch["embedding"], stored["embedding"][at], rtol=1e-3, atol=1e-4)
    assert stored["embedding"].std(0).min() > 1e-3  # tolerances that tell pictures apart


def test_a_run_on_images_is_the_run_on_their_codes(tmp_path, shards):
    records, images = (tiny.Record(), tiny.Record()), online(shards)
    codes = {**images, "alignment": Alignment(), "data": tiny.shards(shards / "codes", seed=3)}
    for run, record, settings in zip("01", records, (images, codes)):
        fitted(tmp_path / run, shards, 4, [record, Checkpoint(), EMA(0.5)], **settings)
    assert records[0].column("train/ce")[0] == records[1].column("train/ce")[0]
    for name in ("train/loss", "train/alignment"):
        assert records[0].column(name) == pytest.approx(records[1].column(name), rel=1e-3)
    published = [LlamaGenerator.from_pretrained(tmp_path / n / "generator") for n in "01"]
    assert published[0].config == published[1].config
    assert published[0].tokenizer_fingerprint == published[1].tokenizer_fingerprint != ""
    assert "tokenizer" in [p.name for p in (tmp_path / "0" / "generator").iterdir()]


def test_images_can_be_trained_on_without_alignment_and_augmented(tmp_path, shards):
    record = tiny.Record()
    settings = {**online(shards, random_shift=2), "alignment": None}
    module = fitted(tmp_path, shards, 3, [record], **settings)
    assert module.projector is None and len(record.column("train/loss")) == 3
    trainer = tiny.trainer(tmp_path)
    trainer.validate(module, datamodule=settings["data"], verbose=False)
    plain = {k: float(v) for k, v in trainer.callback_metrics.items()}
    trainer.validate(module, datamodule=tiny.shards(shards / "codes"), verbose=False)
    assert plain["val/loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]), rel=1e-6)
    assert "val/alignment" not in plain


def test_source_and_kind_of_shards_must_agree(tmp_path, shards):
    images = online(shards)
    with pytest.raises(ConfigError, match=r"'shard' reads embeddings of code shards and was given images; .*'online'"):
        fitted(tmp_path, shards, **{**images, "alignment": Alignment()})
    with pytest.raises(ConfigError, match=r"'online' embeds pixels and was given codes; .*--embed"):
        fitted(tmp_path, shards, **{**images, "data": tiny.shards(shards / "codes")})
    with pytest.raises(ConfigError, match=r"given images; .*tokgen tokenize.*visual_tokenizer"):
        fitted(tmp_path, shards, **{**images, "visual_tokenizer": None})
    images["data"].image_size = 18
    with pytest.raises(ConfigError, match=r"data\.image_size is 18; .* multiple of 4"):
        fitted(tmp_path, shards, **images)


def test_a_checkpoint_of_another_width_is_named(tmp_path, shards, caplog):
    fitted(tmp_path, shards, callbacks=[Checkpoint()])
    last = tmp_path / "checkpoints" / "last.ckpt"
    teacher = ContrastiveEncoder(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 8, 8, 4))
    for name, encoder in (("wide", teacher), ("same", load_encoder(shards / "teacher"))):
        encoder.save_pretrained(tmp_path / name)
    settings = online(shards)
    settings["alignment"] = Alignment(source="online", encoder=str(tmp_path / "wide"))
    with pytest.raises(CheckpointError, match="projector gives 12 channels, the embeddings have 8"):
        fitted(tmp_path, shards, 2, ckpt_path=last, **settings)
    settings = {**online(shards), "alignment": Alignment(source="online", encoder=str(tmp_path / "same"))}
    fitted(tmp_path, shards, 2, ckpt_path=last, **settings)
    assert "aligned to contrastive encoder teacher, this run is to contrastive encoder same" in caplog.text
