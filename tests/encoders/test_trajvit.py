"""TrajViT and its peer: what a clip means depends on nothing but the clip, and each switch brings one defect of the release back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tokgen
from tokgen.encoders.base import load_encoder
from tokgen.encoders.contrastive import VideoContrastiveConfig, VideoContrastiveEncoder
from tokgen.encoders.trajvit import Segments, TrajViT, TrajViTConfig, position_features, ramp_code
from tokgen.encoders.video_vit import VideoViT, VideoViTConfig
from tokgen.errors import CheckpointError, ConfigError, InputError
from tokgen.text import TextTokenizer

SMALL = TrajViTConfig(
    image_size=32, mask_stride=2, widths=(8, 12, 16, 24), layers=(1, 1, 1, 1), dim=32, heads=4, hidden=48, depth=3,
    appearance_depth=2, position_depth=1, octaves=6,
)  # fmt: skip
PATCHES = VideoViTConfig(image_size=32, frames=4, patch=8, tubelet=2, dim=32, heads=4, hidden=48, depth=2)


def weighty(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for p in module.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    return module


def build(config: TrajViTConfig = SMALL) -> TrajViT:
    """In eval mode, with weights that matter and running statistics that differ from their start."""
    encoder = weighty(TrajViT(config))
    with torch.no_grad():
        encoder(torch.rand(4, 3, 3, 32, 32), torch.randint(-1, 5, (4, 3, 16, 16)))
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder() -> TrajViT:
    return build()


def clip(count: int = 5, frames: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (1, T, 3, 32, 32) and trajectories (1, T, 16, 16): rectangles that move, `count` of them, over nothing."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(1, frames, 3, 32, 32, generator=generator)
    labels = torch.full((1, frames, 16, 16), -1)
    for m in range(count):
        top, left, down, right = torch.randint(0, 10, (4,), generator=generator).tolist()
        for t in range(frames):
            y, x = (top + t * (down - 5) // 4) % 13, (left + t * (right - 5) // 4) % 13
            labels[0, t, y : y + 3, x : x + 3] = m
    present = labels.unique()
    return pixels, torch.searchsorted(present, labels) - 1  # compact


@torch.no_grad()
def close(encoder: TrajViT, one: tuple, other: tuple, atol: float = 1e-5) -> None:
    torch.testing.assert_close(encoder.embed(*one), encoder.embed(*other), rtol=0, atol=atol)


# -- the laws ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_numbering_changes_nothing_and_moves_the_rows(encoder):
    pixels, labels = clip()
    count = int(labels.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    renumbered = torch.where(labels >= 0, order[labels.clamp(min=0)], -1)
    assert not torch.equal(renumbered, labels)
    close(encoder, (pixels, labels), (pixels, renumbered))
    (tokens, mask), (again, mask_again) = encoder.features(pixels, labels), encoder.features(pixels, renumbered)
    assert tokens.shape == (1, count, 32) and mask.all() and mask_again.all()
    torch.testing.assert_close(again[:, order], tokens, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_of_padding_and_absent_trajectories_change_nothing(encoder):
    pixels, labels = clip(4)
    many_pixels, many = clip(9, seed=3)
    assert many.max() > labels.max()
    alone = encoder.features(pixels, labels)
    pair = torch.cat([pixels, many_pixels]), torch.cat([labels, many])
    together = encoder.features(*pair)
    count = int(labels.max()) + 1
    assert together[1].sum(1).tolist() == [count, int(many.max()) + 1]
    torch.testing.assert_close(together[0][:1, :count], alone[0], rtol=0, atol=1e-5)
    assert not together[0][0, count:].any()
    torch.testing.assert_close(encoder.embed(*pair)[:1], encoder.embed(pixels, labels), rtol=0, atol=1e-5)
    gaps = torch.where(labels >= 1, labels + 7, labels)  # 1 to 7 do not occur
    close(encoder, (pixels, labels), (pixels, gaps))
    assert encoder.features(pixels, gaps)[1][0].nonzero().flatten().tolist() == [0, *range(8, count + 7)]


@torch.no_grad()
def test_a_trajectory_is_read_only_where_it_is_visible(encoder):
    pixels, labels = clip(5)
    labels[0, 3:][labels[0, 3:] == 0] = -1  # number 0 leaves
    before = encoder.trajectory_tokens(pixels, labels)
    changed = pixels.clone()
    changed[0, 3:] = 1 - changed[0, 3:]
    after = encoder.trajectory_tokens(changed, labels)
    torch.testing.assert_close(after.appearance[0, 0], before.appearance[0, 0], rtol=0, atol=1e-6)
    assert (after.appearance[0, 1:] - before.appearance[0, 1:]).norm(dim=-1).min() > 0.01
    assert torch.equal(after.position, before.position)


@torch.no_grad()
def test_it_sees_colour_movement_and_time(encoder):
    pixels, labels = clip(3)
    base = encoder.embed(pixels, labels)
    for other in (
        (pixels.flip(2), labels),
        (pixels, labels.flip(3)),
        (pixels, labels.flip(1)),
        (pixels, labels.flip(2)),
    ):
        assert (encoder.embed(*other) - base).norm() > 0.01


@torch.no_grad()
def test_a_clip_without_trajectories_and_one_frame_alone(encoder):
    pixels, labels = clip()
    nothing = encoder.embed(pixels, torch.full_like(labels, -1))
    assert nothing.isfinite().all() and not encoder.features(pixels, torch.full_like(labels, -1))[1].any()
    assert encoder.embed(pixels[:, :1], labels[:, :1]).isfinite().all()
    # beside a clip that has some
    pair = encoder.embed(pixels.repeat(2, 1, 1, 1, 1), torch.cat([torch.full_like(labels, -1), labels]))
    torch.testing.assert_close(pair, torch.cat([nothing, encoder.embed(pixels, labels)]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_sizes_and_dtypes_of_the_input(encoder):
    pixels, labels = clip()
    large = labels.repeat_interleave(3, 2).repeat_interleave(5, 3)  # its cells' centres have the same numbers
    close(encoder, (pixels, labels), (pixels, large.int()), atol=0)
    bytes_ = (pixels * 255).round().byte()
    close(encoder, (bytes_, labels), (bytes_.float() / 255, labels), atol=1e-6)
    assert encoder.embed(torch.rand(1, 6, 3, 20, 48), labels).shape == (1, 32)
    with torch.autocast("cpu", torch.bfloat16):
        halved = encoder.embed(pixels, labels)
    assert halved.dtype == torch.float32 and F.cosine_similarity(halved, encoder.embed(pixels, labels)) > 0.99


def test_every_parameter_learns():
    encoder = build().train()
    pixels, labels = clip(6)
    encoder.embed(pixels.repeat(2, 1, 1, 1, 1), labels.repeat(2, 1, 1, 1))[:, 0].sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("coarse", [12, 6, 3, 5, 1, 24])
def test_means_are_those_of_enlarged_maps(coarse):
    labels = torch.randint(-1, 7, (2, 3, 9, 13))
    segments, maps = Segments.of(labels, 12), torch.randn(2, 3, coarse, coarse, 5)
    enlarged = F.interpolate(maps.flatten(0, 1).permute(0, 3, 1, 2), (12, 12), mode="bilinear").unflatten(0, (2, 3))
    grid = labels[:, :, (torch.arange(12) * 9 + 4) // 12][..., (torch.arange(12) * 13 + 6) // 12]
    found = segments.mean(maps)
    assert found.shape == (2, 7, 3, 5)
    for m in range(7):
        inside = grid == m
        assert torch.equal(segments.area[:, m], inside.sum((2, 3)))
        wanted = (enlarged * inside[:, :, None]).sum((3, 4)) / inside.sum((2, 3)).clamp(min=1)[..., None]
        torch.testing.assert_close(found[:, m], wanted)


# -- the defects ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_legacy_mask_makes_a_clip_depend_on_its_batch():
    pixels, labels = clip(4)
    pair = torch.cat([pixels, clip(9, seed=3)[0]]), torch.cat([labels, clip(9, seed=3)[1] + 16])
    mended = build()
    legacy = TrajViT(replace(SMALL, legacy_ignore_mask=True)).eval()
    legacy.load_state_dict(mended.state_dict())
    moved = [(e(*pair).pooled[0] - e(pixels, labels).pooled[0]).norm() for e in (mended, legacy)]
    assert moved[0] < 1e-4 and moved[1] > 0.05 * legacy(pixels, labels).pooled[0].norm()


@torch.no_grad()
def test_legacy_double_pass_runs_every_block_twice():
    pixels, labels = clip()
    mended = build(replace(SMALL, final_norm=False))
    legacy = TrajViT(replace(SMALL, final_norm=False, legacy_double_pass=True)).eval()
    legacy.load_state_dict(mended.state_dict())
    counts = []
    for e in (mended, legacy):
        calls: list[int] = []
        hook = e.transformer.blocks[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        out = e(pixels, labels)
        hook.remove()
        counts.append(len(calls))
    x = torch.cat([out.pooled[:, None], out.tokens], 1)
    tokens = mended.trajectory_tokens(pixels, labels)
    y = torch.cat([mended.transformer.class_token.expand(1, 1, -1), tokens.appearance + tokens.position], 1)
    for block in [*mended.transformer.blocks, *mended.transformer.blocks]:
        y = block(y)
    assert counts == [1, 2]
    torch.testing.assert_close(x, y)


def test_legacy_position_is_nearly_blind_to_all_but_one_edge():
    box = torch.tensor([0.25, 0.25, 0.5, 0.5])
    moved = [float((ramp_code(box + 0.25 * edge, 512) - ramp_code(box, 512)).norm()) for edge in torch.eye(4)]
    assert moved == pytest.approx([0.94, 0.094, 0.0094, 0.00094], rel=0.01)


def test_positions_tell_every_coordinate():
    """A box of 8 x 8 cells on 32 x 32, moved or enlarged by a quarter of the picture."""

    def features(top: int, left: int, height: int, width: int) -> torch.Tensor:
        labels = torch.full((1, 1, 32, 32), -1)
        labels[0, 0, top : top + height, left : left + width] = 0
        return position_features(Segments.of(labels, 32), 8)[0, 0, 0]

    base = features(8, 8, 8, 8)
    moved = [(features(*box) - base).norm() for box in ((16, 8, 8, 8), (8, 16, 8, 8), (8, 8, 16, 8), (8, 8, 8, 16))]
    assert base.shape == (88,) and min(moved) > 1.5 and max(moved) < 2 * min(moved)
    # the values themselves: centre and sides, time, share of the picture
    torch.testing.assert_close(base[:5], torch.tensor([0.375, 0.375, 0.25, 0.25, 0.5]))
    assert float(base[-3]) == pytest.approx(-0.4)  # log(1 / 16) / log(1024)


def test_appearing_and_vanishing_are_told():
    labels = torch.full((1, 5, 4, 4), -1)
    labels[0, 1:4, 0, 0] = 0
    labels[0, :, 1, 1] = 1
    absent = position_features(Segments.of(labels, 4), 1)[0, ..., -2:]
    assert absent[0, 1:4].tolist() == [[1, 0], [0, 0], [0, 1]]  # before, after
    assert not absent[1].any()  # what comes before and after the clip is unknown


# -- sizes, files, errors ---------------------------------------------------------------------------------------------


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_published_sizes():
    with torch.device("meta"):
        released, ours, peer = TrajViT(TrajViTConfig.released()), TrajViT(TrajViTConfig()), VideoViT(VideoViTConfig())
        text = VideoContrastiveEncoder(VideoContrastiveConfig())
    # 94.4 M with dead weights (see the importer's test): encoder 76.4 with them, ResNet 11.7, resamplers 4.2 and 2.1
    parts = [released.transformer, released.appearance, released.position]
    assert [parameters(p) for p in parts] == [75_657_728, 4_204_032, 2_102_784]
    assert parameters(released) - sum(map(parameters, parts)) == 11_671_104
    assert parameters(ours) - parameters(released) == 88 * 512 + 512 + 2 * 512  # positions' projection, final norm
    assert peer.config.grid == (8, 14) and peer.positions.shape[:2].numel() == 1568
    assert parameters(peer) == 305_491_968
    assert parameters(text.tower) == parameters(ours) and text.projection.weight.shape == (256, 512)


@torch.no_grad()
def test_the_peer_sees_all_tubelets_and_other_lengths():
    peer = weighty(VideoViT(PATCHES)).eval()
    pixels = torch.rand(2, 4, 3, 32, 32)
    tokens, mask = peer.features(pixels)
    assert tokens.shape == (2, 32, 32) and mask.all() and mask.shape == (2, 32)
    torch.testing.assert_close(peer.embed(pixels)[1:], peer.embed(pixels[1:]), rtol=0, atol=1e-5)
    for other in (pixels.flip(1), pixels.flip(3), pixels.flip(4)):
        assert (peer.embed(other) - peer.embed(pixels)).norm(dim=1).min() > 0.01
    assert peer.features(pixels.repeat(1, 2, 1, 1, 1))[0].shape == (2, 64, 32)  # twice as long
    assert peer.features(pixels[:, :2])[0].shape == (2, 16, 32)
    with pytest.raises(InputError, match="multiples of 2"):
        peer.embed(pixels[:, :3])


@torch.no_grad()
def test_published_encoders_load_again(encoder, tmp_path):
    pixels, labels = clip()
    again = tokgen.load(encoder.save_pretrained(tmp_path / "trajvit"))
    assert isinstance(again, TrajViT) and again.config == SMALL
    assert torch.equal(again.embed(pixels, labels), encoder.embed(pixels, labels))
    peer = VideoViT(PATCHES).eval()
    assert torch.equal(
        tokgen.load(peer.save_pretrained(tmp_path / "peer")).embed(pixels[:, :4]), peer.embed(pixels[:, :4])
    )
    with pytest.raises(CheckpointError, match="holds a TrajViT; expected an image encoder"):
        load_encoder(tmp_path / "trajvit")


@torch.no_grad()
def test_a_video_text_encoder_loads_again_with_its_words(tmp_path):
    captions = ["red heart moves left", "blue fish moves up"]
    config = VideoContrastiveConfig(
        {"type": "video-vit", "config": {"image_size": 32, "frames": 4, "patch": 8, "dim": 32, "heads": 4, "depth": 1}},
        dim=32, n_heads=2, hidden=32, text_layers=1, embed_dim=16, text_vocab=270, max_text=30,
    )  # fmt: skip
    encoder = VideoContrastiveEncoder(config, TextTokenizer.train(captions, 270)).eval()
    assert encoder.config.tower["config"]["tubelet"] == 2 and encoder.extras == ()  # written down
    assert float(encoder.scale) == pytest.approx(1 / 0.07)
    encoder.log_scale.fill_(20)
    assert float(encoder.scale) == pytest.approx(1000)
    encoder.log_scale.fill_(-5)
    assert float(encoder.scale) == pytest.approx(2)
    again = tokgen.load(encoder.save_pretrained(tmp_path / "both"))
    pixels = torch.rand(2, 4, 3, 32, 32)
    torch.testing.assert_close(encoder.embed(pixels).norm(dim=1), torch.ones(2))
    assert torch.equal(again.embed(pixels), encoder.embed(pixels))
    assert torch.equal(again.encode_text(captions), encoder.encode_text(captions))
    assert again.fingerprint == encoder.fingerprint and again.name == "video contrastive encoder both"


def test_bad_input_is_named(encoder):
    pixels, labels = clip()
    for bad, message in (
        ((pixels[0], labels), r"clips are \(6, 3, 32, 32\)"),
        ((pixels.long(), labels), "int64; expected"),
        ((pixels, labels[:, :4]), r"trajectories are \(1, 4, 16, 16\) torch.int64; expected integers"),
        ((pixels, labels.float()), "float32"),
        ((pixels, labels - 1), "reach -2"),
        ((pixels, labels + 9000), "below 8192"),
    ):
        with pytest.raises(InputError, match=message):
            encoder.embed(*bad)
    for change, message in (
        ({"heads": 3}, "dim 32 over heads 3"),
        ({"mask_stride": 3}, "mask_stride 3"),
        ({"layers": (1, 1)}, "4 widths and 2 layers"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(SMALL, **change)
    with pytest.raises(ConfigError, match="patch 5"):
        replace(PATCHES, patch=5)
    for tower in ({"type": "eva"}, {"type": "video-contrastive"}, {"type": "trajvit", "sizes": {}}):
        with pytest.raises(ConfigError, match="expected type: one of trajvit, video-vit"):
            VideoContrastiveEncoder(VideoContrastiveConfig(tower))
    with pytest.raises(ConfigError, match="tower 'trajvit': unknown key 'dims'"):
        VideoContrastiveEncoder(VideoContrastiveConfig({"type": "trajvit", "config": {"dims": 3}}))
    with pytest.raises(ConfigError, match="max_temperature"):
        VideoContrastiveEncoder(VideoContrastiveConfig(max_temperature=0.05))
