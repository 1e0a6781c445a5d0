from __future__ import annotations

import pytest
import torch

from tokgen.errors import ConfigError
from tokgen.generators.token_shuffle import from_windows, to_windows, window_order
from tokgen.tokens import Grid, Scales, Sequence, Tokens


def test_windows_and_their_tokens_are_in_raster_order():
    order = window_order(Grid(4, 6), 2)
    assert order.shape == (6, 4)
    assert order[0].tolist() == [0, 1, 6, 7]
    assert order[1].tolist() == [2, 3, 8, 9]
    assert order[3].tolist() == [12, 13, 18, 19]


def test_video_windows_stay_within_a_frame():
    order = window_order(Grid(3, 4, 2), 2)
    assert order.shape == (6, 4)
    assert (order // 8 == order[:, :1] // 8).all()
    assert torch.equal(order[2:4], order[:2] + 8)


@pytest.mark.parametrize("layout", [Grid(4, 8), Grid(2, 4, 4)])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("codebooks", [1, 3])
def test_window_layout_round_trips(layout, window, codebooks):
    ids = torch.randint(99, (2, layout.length, codebooks))
    order = window_order(layout, window)
    steps = to_windows(ids if codebooks > 1 else ids[..., 0], order)
    assert steps.shape == (2, layout.length // window**2 * codebooks, window**2)
    assert torch.equal(from_windows(steps, order, codebooks), ids)
    features = torch.randn(*steps.shape, 5)
    inside = from_windows(features, order, codebooks)
    assert torch.equal(inside[..., 0], from_windows(features[..., 0], order, codebooks))


def test_window_one_is_the_order_of_to_sequence():
    ids = torch.stack([torch.randint(7, (2, 12)), torch.randint(5, (2, 12))], -1)
    tokens = Tokens(ids, Grid(3, 4), (7, 5))
    steps = to_windows(ids, window_order(tokens.layout, 1))[..., 0]
    offsets = torch.tensor([0, 7]).repeat(12)
    assert torch.equal(steps + offsets, tokens.to_sequence()[0])


@pytest.mark.parametrize(
    ("layout", "window", "word"),
    [
        (Grid(4, 6), 4, "multiples"),
        (Sequence(16), 2, "grid"),
        (Scales((1, 2)), 2, "grid"),
        (Grid(4, 4), 0, "window is 0"),
    ],
)
def test_a_window_that_does_not_fit_is_a_clear_error(layout, window, word):
    with pytest.raises(ConfigError, match=word):
        window_order(layout, window)


def test_every_layout_has_window_one():
    for layout in (Sequence(5), Scales((1, 2)), Grid(2, 3)):
        assert window_order(layout, 1)[:, 0].tolist() == list(range(layout.length))


def test_a_width_the_window_does_not_divide_is_a_clear_error(make):
    with pytest.raises(ConfigError, match=r"window\^2=16"):
        make(window=4, dim=24, n_heads=2)


@pytest.mark.parametrize("window", [2, 4])
def test_changing_a_window_changes_later_windows_only(make, captions, window):
    model = make(grid=(4, 8), window=window)
    text = model.encode_prompts(captions[:1])
    ids = torch.randint(24, (1, 32))
    logits = model(*text, ids).logits
    windows = len(model.order)
    for k in range(windows):
        other = ids.clone()
        other[:, model.order[k]] = (ids[:, model.order[k]] + 1) % 24
        changed = (model(*text, other).logits != logits).any(-1)[0]
        by_window = changed[model.order]  # (windows, slots)
        assert not by_window[: k + 1].any()
        assert by_window[k + 1 :].all()


def test_folded_head_is_expand_then_head(make):
    model = make(window=2)
    slots = torch.randn(2, 3, 4, 16)
    weight, bias = model.head()
    assert torch.allclose(slots @ weight.T + bias, model.output(model.unshuffle.expand(slots)), atol=1e-4)
