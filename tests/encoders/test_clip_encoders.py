"""Video models of transformers as encoders of clips: what their own classifiers read, of as many frames as they take."""

from __future__ import annotations

import pytest
import torch

from tokgen.encoders.base import load_clip_encoder
from tokgen.encoders.contrastive import ContrastiveConfig, ContrastiveEncoder
from tokgen.encoders.video_vit import VideoViT, VideoViTConfig
from tokgen.errors import CheckpointError, InputError
from tokgen.evaluation.extractors import load_extractor

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}
KINDS = {
    "videomae": ("VideoMAE", "VideoMAEImageProcessor", {"patch_size": 16, "num_frames": 4}),
    "vivit": ("Vivit", "VivitImageProcessor", {"tubelet_size": [2, 16, 16], "num_frames": 4}),
    "timesformer": ("Timesformer", "VideoMAEImageProcessor", {"patch_size": 16, "num_frames": 4}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A classifier of each kind with random weights, as the Hub has them, and its processor."""
    made = {}
    for kind, (name, processor, more) in KINDS.items():
        made[kind] = tmp_path_factory.mktemp("clips") / kind
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES, **more)
        getattr(transformers, f"{name}ForVideoClassification")(config).save_pretrained(made[kind])
        options = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        means = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
        getattr(transformers, processor)(**options, **means).save_pretrained(made[kind])
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_becomes_what_the_model_says_of_it(folders, kind):
    encoder = load_clip_encoder(folders[kind])
    assert "4 frames" in encoder.name and kind in encoder.name and str(folders[kind].parent) not in encoder.name
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training
    pixels = torch.rand(2, 4, 3, 32, 32)
    model = getattr(transformers, f"{KINDS[kind][0]}Model").from_pretrained(folders[kind]).eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    with torch.no_grad():
        hidden = model(pixel_values=(pixels - mean) / std).last_hidden_state
        found = encoder(pixels)
    torch.testing.assert_close(found.pooled, hidden.mean(1) if kind == "videomae" else hidden[:, 0])
    assert found.pooled.shape == (2, encoder.dim) and found.tokens.shape[:2] == found.mask.shape
    torch.testing.assert_close(encoder.embed(pixels).norm(dim=1), torch.ones(2))


def test_it_sees_frames_of_the_whole_clip_whatever_its_length(folders):
    encoder = load_clip_encoder(f"transformers:{folders['videomae']}")
    pixels = (torch.rand(1, 9, 3, 48, 64) * 255).to(torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels).pooled, encoder(pixels[:, [1, 3, 5, 7]]).pooled)
        torch.testing.assert_close(encoder(pixels[:, :2]).pooled, encoder(pixels[:, [0, 0, 1, 1]]).pooled)


def test_what_is_no_encoder_of_clips(folders, tmp_path):
    bert = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="is a bert; expected a video model: timesformer, videomae, vivit"):
        load_clip_encoder(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="no video model"):
        load_clip_encoder(f"transformers:{tmp_path / 'nothing'}")
    ContrastiveEncoder(ContrastiveConfig(16, 8, 16, 2, 16, 1, 1, 12, 8, 4)).save_pretrained(tmp_path / "pictures")
    with pytest.raises(CheckpointError, match="holds a ContrastiveEncoder; expected an encoder of clips"):
        load_clip_encoder(tmp_path / "pictures")
    with pytest.raises(InputError, match=r"expected \(B, T, 3, H, W\)"):
        load_clip_encoder(folders["vivit"])(torch.rand(4, 3, 32, 32))


def test_one_of_this_package(tmp_path):
    torch.manual_seed(0)
    vit = VideoViT(VideoViTConfig(32, 4, 8, 2, 32, 4, 48, 2)).eval()
    vit.save_pretrained(tmp_path / "vit")
    extractor, pixels = load_extractor(str(tmp_path / "vit"), clips=True), torch.rand(2, 4, 3, 32, 32)
    torch.testing.assert_close(extractor(pixels)["pool"], vit(pixels).pooled.detach())
    assert extractor.of_clips and vit.name in extractor.name and load_extractor("auto", clips=True) is None
