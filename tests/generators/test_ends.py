"""Generators whose items end by themselves: what is counted in training, and that drawing follows it."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F

from tokgen.errors import ConfigError, InputError
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.tokens import Sequence, Tokens, Trajectories

SIZES = (5, 9, 7)  # of the first codebook there is one class more, the end
CLIP = {"kind": "Trajectories", "t": 8, "h": 32, "w": 32, "n": 6}
ENDS = {"layout": CLIP, "codebook_sizes": SIZES, "ends": True}
VARIANTS = {
    "three codebooks": {},
    "one codebook": {"layout": {"kind": "Sequence", "n": 7}, "codebook_sizes": (24,)},
    "fields": {"field_embedding": True},
    "rep token": {"rep_token": True, "n_kv_heads": 2, "qk_norm": True},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def batch_of(model, lengths):
    """Random ids and mask, as a batch of code shards has them: as many positions as the longest."""
    n = max(lengths)
    ids = torch.stack([torch.randint(k, (len(lengths), n)) for k in model.codebook_sizes], -1)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    ids = ids * mask[..., None]
    return (ids if ids.shape[-1] > 1 else ids[..., 0]), mask


# -- training -----------------------------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("lengths", [[1, 3, 2], [2, 2, 2], [6, 1, 4]], ids=str)
def test_loss_is_that_of_every_code_and_every_end(make, captions, options, lengths):
    model = make(**{**ENDS, **options})
    most, books, end = model.layout.length, len(model.codebook_sizes), model.codebook_sizes[0]
    prompt, prompt_mask = model.encode_prompts(captions[:3])
    ids, mask = batch_of(model, lengths)
    out = model(prompt, prompt_mask, ids, mask, z_loss=0.1, label_smoothing=0.1)
    terms, squares, right = [], [], []
    for row, length in enumerate(lengths):
        # each item by itself and at its own length: what is read of its logits is what it is
        alone = model(prompt[row : row + 1], prompt_mask[row : row + 1], ids[row : row + 1, :length])
        logits = alone.logits.view(1, -1, books, alone.logits.shape[-1])[0]
        assert logits.shape[0] == min(length + 1, most)
        item = ids[row, :length].view(length, books)
        wanted = [(n, c, int(item[n, c])) for n, c in itertools.product(range(length), range(books))]
        wanted += [(length, 0, end)] if length < most else []
        for n, c, target in wanted:
            own = logits[n, c, : model.codebook_sizes[c] + (c == 0)]
            terms.append(F.cross_entropy(own[None], torch.tensor([target]), label_smoothing=0.1))
            squares.append(own.logsumexp(0).square())
            right.append(float(own.argmax() == target))
    assert len(terms) == sum(lengths) * books + sum(n < most for n in lengths) == int(model.counted(mask))
    assert out.losses["ce"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert out.losses["z_loss"].item() == pytest.approx(0.1 * torch.stack(squares).mean().item(), rel=1e-5)
    assert out.stats["accuracy"].item() == pytest.approx(sum(right) / len(right))


def test_padding_changes_nothing(make, captions):
    model = make(**ENDS)
    prompt = model.encode_prompts(captions[:2])
    ids, mask = batch_of(model, [2, 3])
    wide, wide_mask = F.pad(ids, (0, 0, 0, 3)), F.pad(mask, (0, 3))
    some, all_ = model(*prompt, ids, mask), model(*prompt, wide, wide_mask)
    assert all_.logits.shape == (2, 6, 3, 9) and some.logits.shape == (2, 4, 3, 9)
    assert torch.allclose(all_.logits[:, :4], some.logits, atol=1e-5)
    assert all_.loss.item() == pytest.approx(some.loss.item(), rel=1e-5)
    wide[~wide_mask] = 4  # nor does what stands there
    assert torch.equal(model(*prompt, wide, wide_mask).loss, all_.loss)


def test_rows_that_are_left_out_count_nothing(make, captions):
    """A validation batch of repeats alone has no real position in them, and hence no end either."""
    model = make(**ENDS)
    prompt, prompt_mask = model.encode_prompts(captions[:2])
    ids, mask = batch_of(model, [2, 3])
    mask[1] = False
    loss = model(prompt, prompt_mask, ids, mask).loss
    assert loss.item() == pytest.approx(model(prompt[:1], prompt_mask[:1], ids[:1], mask[:1]).loss.item(), rel=1e-5)
    assert int(model.counted(mask)) == 2 * 3 + 1


def test_wrong_input_is_named(make, captions):
    model = make(**ENDS)
    prompt = model.encode_prompts(captions[:1])
    ids = torch.zeros(1, 3, 3, dtype=torch.int64)
    with pytest.raises(InputError, match="real ones come first"):
        model(*prompt, ids, torch.tensor([[True, False, True]]))
    with pytest.raises(InputError, match="7 positions; expected 1 to 6"):
        model(*prompt, torch.zeros(1, 7, 3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"\(1, 3, 2\)"):
        model(*prompt, ids[..., :2])
    with pytest.raises(InputError, match="set ends"):
        make(layout=CLIP, codebook_sizes=SIZES)(*prompt, ids)
    with pytest.raises(ConfigError, match="window=1"):
        make(ends=True, window=2)


# -- weights --------------------------------------------------------------------------------------------------------------


def test_the_end_is_one_vector_beside_the_plain_weights(make, tmp_path):
    plain, ends = make(layout=CLIP, codebook_sizes=SIZES), make(**ENDS)
    assert ends.state_dict().keys() - plain.state_dict().keys() == {"end.weight"}
    assert ends.start_from(plain) == ["end.weight"]
    assert sorted(make(**ENDS, field_embedding=True).start_from(ends)) == ["fields.weight"]
    assert torch.equal(ends.output.weight, plain.output.weight)
    ends.save_pretrained(tmp_path)
    again = LlamaGenerator.from_pretrained(tmp_path)
    assert again.config == ends.config and torch.equal(again.end.weight, ends.end.weight)


# -- drawing ------------------------------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("options_of_drawing", [{}, {"guidance_scale": 2.0, "top_k": 6, "schedule": "linear"}], ids=str)
def test_an_item_is_the_same_in_any_batch(make, captions, options, options_of_drawing):
    model = make(**{**ENDS, **options})
    with torch.no_grad():
        torch.nn.init.normal_(model.end.weight, std=0.5)
    together = model.generate(captions * 3, generator=10, **options_of_drawing)
    assert len(set(together.lengths.tolist())) >= 3  # ragged, or this shows nothing
    assert together.validate().lengths.min() >= 1 and not together.ids[~together.mask].any()
    assert not (together.mask[:, 1:] & ~together.mask[:, :-1]).any()
    for i in range(0, 12, 2):
        alone, report = model.sample([(captions * 3)[i]], generator=[10 + i], **options_of_drawing)
        assert torch.equal(alone.ids[0], together.ids[i]) and torch.equal(alone.mask[0], together.mask[i])
        length, books = int(alone.lengths), len(model.codebook_sizes)
        assert report.ids == length * books
        assert report.calls == report.steps == min(length * books + 1, model.steps)  # it stops at its end


def test_the_distribution_is_the_models(make):
    """Chi-square against the exact probabilities of every item of one to three of two codes."""
    model = make(layout={"kind": "Sequence", "n": 3}, codebook_sizes=(2,), ends=True)
    with torch.no_grad():
        torch.nn.init.normal_(model.end.weight, std=0.05)
    items = [list(i) for n in (1, 2, 3) for i in itertools.product(range(2), repeat=n)]
    full = torch.tensor([i + [0] * (3 - len(i)) for i in items])
    mask = torch.arange(3) < torch.tensor([len(i) for i in items])[:, None]
    prompt = model.encode_prompts(["cat"] * len(items))
    logits = model(*prompt, full, mask).logits
    logits[:, 0, 2] = -torch.inf  # an item has at least one position
    p = logits.log_softmax(-1)
    target = torch.where(mask, full, 2)
    counts_in = torch.cat(
        [torch.ones(len(items), 1, dtype=torch.bool), mask[:, :-1]], 1
    )  # codes, and the end after them
    p = (p.gather(-1, target[..., None])[..., 0] * counts_in).sum(1).exp()
    assert abs(p.sum().item() - 1) < 1e-5 and p.max() > 1.5 / len(p) and p.min() > 0.0015
    draws = 4000
    drawn = model.generate(["cat"] * draws, generator=0)
    names = {tuple(i): k for k, i in enumerate(items)}
    found = torch.tensor([names[tuple(row[m].tolist())] for row, m in zip(drawn.ids, drawn.mask)]).bincount(
        minlength=14
    )
    assert ((found - draws * p).square() / (draws * p)).sum().item() < 34.5  # 13 degrees of freedom, 0.1 %


@pytest.mark.parametrize("weight, length", [(1000.0, 1), (-1000.0, 6)], ids=["always", "never"])
def test_an_end_comes_after_the_first_position_at_the_earliest(make, captions, weight, length):
    model = make(**ENDS)
    with torch.no_grad():  # the last norm gives ones: the end's logit is the sum of its weights
        model.norm.weight.zero_()
        model.norm.register_forward_hook(lambda module, inputs, out: out + 1)
        model.end.weight.fill_(weight / 64)
    for settings in ({"temperature": 0.0}, {"guidance_scale": 3.0, "top_p": 0.9}, {"min_p": 0.1, "top_k": 2}):
        tokens, report = model.sample(captions, generator=0, **settings)
        assert tokens.lengths.tolist() == [length] * 4
        assert report.steps == (4 if length == 1 else 18)


def test_given_positions_stay_and_the_rest_ends_after_them(make, captions):
    model = make(**ENDS)
    with torch.no_grad():
        model.end.weight.normal_(std=0.5)
    ids, mask = batch_of(model, [1, 4, 2, 3])
    given = Tokens(ids, Trajectories(8, 32, 32, 6), SIZES, mask)
    tokens = model.generate(captions, generator=0, given=given)
    assert (tokens.lengths >= mask.sum(1)).all() and len(set(tokens.lengths.tolist())) > 1
    assert torch.equal(tokens.ids[:, :4][mask], ids[mask])
    for i in range(4):
        alone = model.generate(captions[i : i + 1], generator=[i], given=given[i])
        assert torch.equal(alone.ids[0], tokens.ids[i]) and torch.equal(alone.mask[0], tokens.mask[i])
    # a gap is filled: the item does not end before its last given position
    keep = torch.tensor([[False, False, False, True]])
    filled = model.generate(captions[:1] * 8, generator=0, given=given[1], keep=keep)
    assert filled.lengths.min() >= 4 and torch.equal(filled.ids[:, 3], ids[1, 3].expand(8, -1))


def test_ways_of_drawing_that_need_one_length_are_refused(make, captions):
    model = make(**ENDS)
    with pytest.raises(ConfigError, match="speculative=4"):
        model.generate(captions, speculative=4)
    with pytest.raises(ConfigError, match="speculative=4"):
        model.generate(captions, speculative=4, draft=model.int8())
    with pytest.raises(ConfigError, match="one graph for each of 9 codebooks"):
        make(**{**ENDS, "codebook_sizes": (3,) * 9}).generate(captions, compile=True)


def test_int8_draws_items_that_end(make, captions):
    model = make(**ENDS)
    with torch.no_grad():
        model.end.weight.normal_(std=0.5)
    exact, rounded = model.generate(captions * 8, generator=0), model.int8().generate(captions * 8, generator=0)
    assert (exact.lengths == rounded.lengths).float().mean() > 0.5
    assert (exact.ids[:, 0, 0] == rounded.ids[:, 0, 0]).float().mean() > 0.75


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_draws_the_same(make, captions):
    model = make(**{**ENDS, "layout": {"kind": "Sequence", "n": 4}, "codebook_sizes": (24,), "n_layers": 1})
    with torch.no_grad():
        model.end.weight.normal_(std=0.5)
    plain, compiled = (model.generate(captions, generator=0, compile=c) for c in (False, True))
    assert len(set(plain.lengths.tolist())) > 1
    assert torch.equal(plain.ids, compiled.ids) and torch.equal(plain.mask, compiled.mask)


# -- learning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Trajectories(8, 32, 32, 6), Sequence(6)], ids=str)
def test_it_learns_the_right_ids_and_lengths(text, layout):
    """Twelve captions, items of one to six positions: after training each is drawn exactly, and ends where it should."""
    sizes = SIZES if isinstance(layout, Trajectories) else (24,)
    captions = [f"{colour} {thing}" for colour in ("red", "blue") for thing in "heart fish cat dog face style".split()]
    config = LlamaConfig(
        layout.to_dict(), sizes, text_vocab=280, max_text=16, dim=64, n_layers=2, n_heads=4, multiple_of=32, qk_norm=True,
        ends=True, caption_dropout=0.1,
    )  # fmt: skip
    model = LlamaGenerator(config, text)
    lengths = [1 + i % 6 for i in range(12)]
    ids, mask = batch_of(model, lengths)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    steps = 150
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        order = torch.randperm(12)
        longest = int(mask[order[:8]].sum(1).max())  # batches are as long as their longest item
        for part, width in ((order[:8], longest), (order[8:], 6)):
            batch = {"ids": ids[part, :width], "mask": mask[part, :width], "caption": [captions[i] for i in part]}
            model.loss(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    drawn = model.generate(captions, temperature=0.0)
    assert drawn.lengths.tolist() == lengths
    assert torch.equal(drawn.ids[:, : ids.shape[1]], ids) and drawn.layout == layout
