"""TrajViT's published layout: every tensor is mapped or named, and the network computes what the release does, step by step."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import tokgen
from tokgen.cli import main
from tokgen.encoders.trajvit import TrajViT, TrajViTConfig
from tokgen.errors import CheckpointError
from tokgen.importers.base import rename
from tokgen.importers.trajvit import (
    TRAJVIT_IGNORED,
    TRAJVIT_KEYS,
    load_trajvit,
    trajvit_config,
    trajvit_from_state_dict,
)

PUBLISHED = TrajViTConfig.released()
SMALL = {"widths": (8, 12, 16, 24), "layers": (2, 1, 1, 1), "dim": 48, "heads": 3, "hidden": 96, "depth": 2}
SMALL |= {"appearance_depth": 2, "position_depth": 1}


def shapes(c: dict, patch: int = 16, places: int = 197) -> dict[str, tuple[int, ...]]:
    """The release's state dict: keys and shapes, written from what it registers and not from our modules."""
    d, h, out = c["dim"], c["hidden"], {}

    def add(name: str, weight: tuple[int, ...], bias: bool = True) -> None:
        out[f"{name}.weight"] = weight
        if bias:
            out[f"{name}.bias"] = weight[:1]

    def conv(name: str, i: int, o: int, size: int) -> None:
        add(f"{name}.convolution", (o, i, size, size), False)
        add(f"{name}.normalization", (o,))
        for key, shape in (("running_mean", (o,)), ("running_var", (o,)), ("num_batches_tracked", ())):
            out[f"{name}.normalization.{key}"] = shape

    out["vision_encoder.cls_token"] = (1, 1, d)
    out |= {"vision_encoder.vit.embeddings.cls_token": (1, 1, d)}
    out |= {"vision_encoder.vit.embeddings.position_embeddings": (1, places, d)}
    add("vision_encoder.vit.embeddings.patch_embeddings.projection", (d, 3, patch, patch))
    for i in range(c["depth"]):
        layer = f"vision_encoder.vit.encoder.layer.{i}"
        for part in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            add(f"{layer}.{part}", (d, d))
        add(f"{layer}.attention.output.dense", (d, d))
        add(f"{layer}.intermediate.dense", (h, d))
        add(f"{layer}.output.dense", (d, h))
        add(f"{layer}.layernorm_before", (d,))
        add(f"{layer}.layernorm_after", (d,))
    add("vision_encoder.vit.layernorm", (d,))
    add("vision_encoder.vit.pooler.dense", (d, d))
    net = "appearance_tokenizer"
    conv(f"{net}.resnet.embedder.embedder", 3, c["widths"][0], 7)
    before = c["widths"][0]
    for i, (width, count) in enumerate(zip(c["widths"], c["layers"])):
        for j in range(count):
            layer = f"{net}.resnet.encoder.stages.{i}.layers.{j}"
            if before != width:
                conv(f"{layer}.shortcut", before, width, 1)
            conv(f"{layer}.layer.0", before, width, 3)
            conv(f"{layer}.layer.1", width, width, 3)
            before = width
        add(f"{net}.linear_layers.{i}", (d, width))
    add(f"{net}.layer_norm", (d,))
    for name, depth in (
        ("appearance_token_mapper", c["appearance_depth"]),
        ("pos_encoder.motion_token_mapper", c["position_depth"]),
    ):
        out[f"{name}.latents"] = (1, d)
        for i in range(depth):
            layer = f"{name}.layers.{i}.0"
            add(f"{layer}.norm_media", (d,))
            add(f"{layer}.norm_latents", (d,))
            for part, rows in (("to_q", d), ("to_kv", 2 * d), ("to_out", d)):
                add(f"{layer}.{part}", (rows, d), False)
            out[f"{layer}.rotary_emb.freqs"] = (d // c["heads"] // 4,)
        add(f"{name}.norm", (d,))
    return out


def published(prefix: str = "") -> dict[str, torch.Tensor]:
    """A small state dict in the release's layout, with weights that matter."""
    torch.manual_seed(0)
    state = {}
    for key, shape in shapes(SMALL).items():
        if key.endswith("num_batches_tracked"):
            value = torch.tensor(7)
        elif key.endswith("rotary_emb.freqs"):
            value = 10_000 ** (-torch.arange(shape[0]) / shape[0])
        elif key.endswith("running_var"):
            value = 0.5 + torch.rand(shape)
        elif len(shape) > 1 and key.endswith("weight"):
            value = torch.randn(shape) * (2 / math.prod(shape[1:])) ** 0.5
        else:
            value = (1.0 if key.endswith("weight") else 0.0) + 0.2 * torch.randn(shape)
        state[prefix + key] = value
    return state


def test_the_published_encoder_has_577_tensors_of_which_every_one_is_known():
    """94.4 M values: encoder 76.4 M with its dead weights, ResNet and projections 11.7 M, resamplers 4.2 M and 2.1 M."""
    manifest = shapes({name: getattr(PUBLISHED, name) for name in SMALL})
    assert len(manifest) == 577
    size = lambda *starts: sum(math.prod(s) for k, s in manifest.items() if k.startswith(starts)) / 1e6  # noqa: E731
    parts = [size("vision_encoder"), size("appearance_tokenizer"), size("appearance_token_mapper"), size("pos_encoder")]
    assert [round(p, 1) for p in parts] == [76.4, 11.7, 4.2, 2.1] and round(size(""), 1) == 94.4

    state = {key: torch.empty(shape, device="meta") for key, shape in manifest.items()}
    assert trajvit_config(state) == PUBLISHED
    _, report = rename(state, TRAJVIT_KEYS, TRAJVIT_IGNORED, "meta")
    assert len(report.mapped) + len(report.ignored) == 577
    dead = sum(math.prod(manifest[key]) for key in report.ignored)
    with torch.device("meta"):
        ours = TrajViT(PUBLISHED).state_dict()
    joined = {to.replace("attn.query", "attn.qkv").replace("attn.key", "attn.qkv").replace("attn.value", "attn.qkv") for to in report.mapped.values()}  # fmt: skip
    assert joined == set(ours)
    assert sum(v.numel() for v in ours.values()) == sum(map(math.prod, manifest.values())) - dead
    assert {key.split(".")[2] for key in report.ignored if key.startswith("vision_encoder")} == {
        "embeddings", "layernorm", "pooler",
    }  # fmt: skip


# -- what the release computes, one thing after the other -------------------------------------------------------------


def resnet(state: dict[str, torch.Tensor], frames: torch.Tensor) -> list[torch.Tensor]:
    """The maps of transformers' ResNet."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(
        embedding_size=SMALL["widths"][0], hidden_sizes=list(SMALL["widths"]), depths=list(SMALL["layers"]), layer_type="basic",
    )  # fmt: skip
    model = ResNetModel(config).eval()
    start = "appearance_tokenizer.resnet."
    model.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
    return list(model(frames, output_hidden_states=True).hidden_states[1:])


def layer_norm(state: dict[str, torch.Tensor], name: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def dense(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One head after the other, queries (L, dim), keys and values (N, dim)."""
    width = SMALL["dim"] // SMALL["heads"]
    parts = [slice(i * width, (i + 1) * width) for i in range(SMALL["heads"])]
    return torch.cat([(q[:, p] @ k[:, p].T / width**0.5).softmax(-1) @ v[:, p] for p in parts], -1)


def rotate(state: dict[str, torch.Tensor], layer: str, x: torch.Tensor) -> torch.Tensor:
    """Position p of x (L, dim) turned by p: in each head the first half, channels 2i and 2i + 1 together."""
    freqs, width, x = state[f"{layer}.rotary_emb.freqs"], SMALL["dim"] // SMALL["heads"], x.clone()
    for p in range(len(x)):
        for head in range(SMALL["heads"]):
            for i, f in enumerate(freqs):
                at = head * width + 2 * i
                a, b, angle = x[p, at].clone(), x[p, at + 1].clone(), p * f
                x[p, at] = a * angle.cos() - b * angle.sin()
                x[p, at + 1] = b * angle.cos() + a * angle.sin()
    return x


def resample(
    state: dict[str, torch.Tensor], name: str, depth: int, rows: torch.Tensor, seen: list[bool]
) -> torch.Tensor:
    """One trajectory: rows (T, dim), those that are seen."""
    latent = state[f"{name}.latents"]
    for i in range(depth):
        layer = f"{name}.layers.{i}.0"
        media, own = layer_norm(state, f"{layer}.norm_media", rows), layer_norm(state, f"{layer}.norm_latents", latent)
        k, v = dense(state, f"{layer}.to_kv", torch.cat([own, media])).chunk(2, -1)
        q, k = (rotate(state, layer, x) for x in (dense(state, f"{layer}.to_q", own), k))
        keep = torch.tensor([True, *seen])
        latent = dense(state, f"{layer}.to_out", attend(q, k[keep], v[keep])) + latent
    return layer_norm(state, f"{name}.norm", latent)[0]


def release(state: dict[str, torch.Tensor], pixels: torch.Tensor, labels: torch.Tensor, rows: int) -> torch.Tensor:
    """The encoder's output (1 + rows, dim) for one clip (T, 3, H, W) with trajectories (T, side, side), padded to `rows`."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    side, dim, frames = labels.shape[-1], SMALL["dim"], len(labels)
    total = torch.zeros(frames, dim, side, side)
    for i, map_ in enumerate(resnet(state, x)):
        map_ = layer_norm(state, "appearance_tokenizer.layer_norm", dense(state, f"appearance_tokenizer.linear_layers.{i}", map_.permute(0, 2, 3, 1)))  # fmt: skip
        total += F.interpolate(map_.permute(0, 3, 1, 2), (side, side), mode="bilinear", align_corners=False)
    tokens = []
    for m in range(rows):
        looks, places, seen = [], [], []
        for t in range(frames):
            y, x = (labels[t] == m).nonzero(as_tuple=True)
            seen.append(len(y) > 0)
            looks.append(total[t][:, y, x].mean(1) if len(y) else torch.zeros(dim))
            box = [y.min(), x.min(), y.max(), x.max()] if len(y) else [side, side, -1, -1]
            code = torch.zeros(dim)
            for channel in range(dim):
                angle = box[channel * 4 // dim] / side * 10_000 ** (-channel / dim)
                code[channel] = math.cos(angle) if channel % 2 else math.sin(angle)
            places.append(code)
        if not any(seen):
            seen = [t < 10 for t in range(frames)]
        look = resample(state, "appearance_token_mapper", SMALL["appearance_depth"], torch.stack(looks), seen)
        place = resample(state, "pos_encoder.motion_token_mapper", SMALL["position_depth"], torch.stack(places), seen)
        tokens.append(look + place)
    x = torch.cat([state["vision_encoder.cls_token"][0], torch.stack(tokens)])
    for _ in range(2):  # twice, and all tokens see all, padding too
        for i in range(SMALL["depth"]):
            layer = f"vision_encoder.vit.encoder.layer.{i}"
            y = layer_norm(state, f"{layer}.layernorm_before", x, 1e-12)
            q, k, v = (dense(state, f"{layer}.attention.attention.{n}", y) for n in ("query", "key", "value"))
            x = x + dense(state, f"{layer}.attention.output.dense", attend(q, k, v))
            y = layer_norm(state, f"{layer}.layernorm_after", x, 1e-12)
            x = x + dense(state, f"{layer}.output.dense", F.gelu(dense(state, f"{layer}.intermediate.dense", y)))
    return x


@torch.no_grad()
def test_the_network_computes_what_the_release_does():
    state = published()
    encoder, report = trajvit_from_state_dict(state)
    assert set(report.mapped) | set(report.ignored) == set(state)
    assert {n: getattr(encoder.config, n) for n in SMALL} == SMALL
    assert encoder.config.legacy_double_pass and encoder.config.legacy_ignore_mask and encoder.config.legacy_position
    pixels, labels = torch.rand(2, 12, 3, 224, 224), torch.full((2, 12, 56, 56), -1)
    labels[0, :, 5:30, 10:40] = 0
    labels[0, 2:9, 20:50, 30:56] = 1  # before the other one, and not in all frames
    labels[1, :, :20] = 0
    labels[1, 4:, 30:33, 7:9] = 1
    labels[1, :, 40:] = 3  # the first clip has two rows of padding
    labels[1, 1, 55, 55] = 2
    out = encoder(pixels, labels)
    for i, count in enumerate((2, 4)):
        wanted = release(state, pixels[i], labels[i], 4)
        torch.testing.assert_close(out.pooled[i], wanted[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.tokens[i, :count], wanted[1 : 1 + count], rtol=1e-4, atol=1e-4)
        assert out.mask[i].tolist() == [m < count for m in range(4)]


# -- files ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_whole_model_s_checkpoint_and_the_encoder_alone_are_the_same(tmp_path):
    whole = published("module.vision_encoder.")
    whole |= {f"module.text_encoder.{k}": torch.zeros(2) for k in ("embeddings.weight", "encoder.layer.0.x.bias")}
    whole |= {
        f"module.{k}": torch.zeros(2) for k in ("vision_proj.weight", "text_proj.bias", "itm_head.weight", "temp")
    }
    torch.save({"model": whole, "epoch": 3, "config": {"embed_dim": 256}}, tmp_path / "ckpt.pth")
    save_file(published(), tmp_path / "encoder.safetensors")
    encoder, report = load_trajvit(tmp_path / "ckpt.pth")
    alone, _ = load_trajvit(tmp_path / "encoder.safetensors")
    assert set(report.mapped) | set(report.ignored) == set(whole)
    assert report.ignored["module.temp"] == "of the space shared with the text tower"
    assert "patches" in report.ignored["module.vision_encoder.vision_encoder.vit.embeddings.cls_token"]
    assert all(torch.equal(v, alone.state_dict()[k]) for k, v in encoder.state_dict().items())
    again = tokgen.load(encoder.save_pretrained(tmp_path / "trajvit"))
    clip = torch.rand(1, 2, 3, 64, 64), torch.randint(-1, 3, (1, 2, 7, 7))
    assert torch.equal(again.embed(*clip), alone.embed(*clip))


def test_convert_writes_an_encoder_folder(tmp_path, capsys):
    save_file(published("vision_encoder."), tmp_path / "encoder.safetensors")
    assert main(["convert", "trajvit", str(tmp_path / "encoder.safetensors"), "--out", str(tmp_path / "out")]) == 0
    assert "tensors mapped" in capsys.readouterr().out
    expected, _ = load_trajvit(tmp_path / "encoder.safetensors")
    clip = torch.rand(1, 2, 3, 64, 64), torch.randint(-1, 3, (1, 2, 7, 7))
    assert torch.equal(tokgen.load(tmp_path / "out").embed(*clip), expected.embed(*clip))
    assert main(["convert", "trajvit", str(tmp_path / "encoder.safetensors"), "--out", "out", "--heads", "3"]) == 2
    assert "--heads says nothing about trajvit" in capsys.readouterr().err


def test_what_is_no_trajvit_is_refused():
    state = published()
    with pytest.raises(CheckpointError, match="no TrajViT encoder"):
        trajvit_from_state_dict({"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no TrajViT encoder with resamplers: 'appearance_token_mapper"):
        trajvit_from_state_dict({k: v for k, v in state.items() if "token_mapper" not in k})  # mean pooling
    with pytest.raises(CheckpointError, match="does not know: something"):
        trajvit_from_state_dict({**state, "something": torch.zeros(1)})
    fewer = dict(state)
    del fewer["vision_encoder.vit.encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(CheckpointError, match=r"missing: transformer.blocks.1.attn.qkv.bias"):
        trajvit_from_state_dict(fewer)
    wrong = {**state, "appearance_tokenizer.layer_norm.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"wrong shape: stage_norm.bias \(3,\)"):
        trajvit_from_state_dict(wrong)
