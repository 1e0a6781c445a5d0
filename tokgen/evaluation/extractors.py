"""Networks whose features figures are taken in, each with its name and a hash of its weights.

"FID" is only the distance in the features of one Inception network (Heusel et al. 2017, arXiv 1706.08500): that of December
2015, in the port that torch-fidelity and pytorch-fid share. Any other space gives a Frechet distance of the same form, on another
scale, and is called so.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from tokgen.encoders.base import ClipEncoder, ImageEncoder, load_clip_encoder, load_encoder
from tokgen.errors import CheckpointError, ConfigError, MissingDependency
from tokgen.losses.perceptual import read_tensors
from tokgen.pretrained import fingerprint

STANDARD = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # sha256 of the FID's Inception weights
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILES[0]}"


class Extractor(nn.Module):
    """Base: uint8 pixels (B, 3, H, W) to features by name, float (B, D): "pool", and where the network has them "spatial" (for
    the sFID) and "logits" of classes (for the Inception score).

    Attributes:
        name: how it must be quoted with figures.
        weights: a hash of its weights.
        standard: whether it is the FID's network.
        of_clips: whether it takes clips (B, T, 3, H, W), and no pictures.
    """

    name: str
    weights: str
    standard = False
    of_clips = False

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class EncoderExtractor(Extractor):
    """An image encoder's embeddings, as it gives them, not normalised."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.name, self.weights = f"{encoder.name}, {encoder.dim}-d", fingerprint(encoder, "weights")

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        device = next((t.device for t in (*self.parameters(), *self.buffers())), pixels.device)
        return {"pool": self.encoder.embed(pixels.to(device)).float()}


class ClipExtractor(Extractor):
    """A video encoder's vectors of clips, as it gives them, not normalised.

    With VideoMAE's, the Frechet distance is of the kind that Ge et al. 2024 (arXiv 2404.12391) propose in place of the FVD, whose
    I3D sees the frames more than the motion.

    Raises:
        ConfigError: an encoder that takes more than pixels, which drawn clips do not have.
    """

    of_clips = True

    def __init__(self, encoder: ClipEncoder) -> None:
        super().__init__()
        if encoder.extras:
            raise ConfigError(
                f"{encoder.name} reads {', '.join(encoder.extras)} beside the clips, which are not known of drawn or decoded "
                "ones; take an encoder of pixels alone"
            )
        self.encoder = encoder
        self.name, self.weights = f"{encoder.name}, {encoder.dim}-d", fingerprint(encoder, "weights")

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        device = next((t.device for t in (*self.parameters(), *self.buffers())), pixels.device)
        return {"pool": self.encoder(pixels.to(device)).pooled.float()}


class InceptionExtractor(Extractor):
    """The FID's Inception of torch-fidelity, with its resizing as TensorFlow 1 did it.

    "pool" are the 2048 features after the last average; "logits" those of 1008 classes without their bias, as the Inception
    score takes them; "spatial" the first 7 channels of `mixed_6/conv`, 7 x 17 x 17, for the sFID (Nash et al. 2021, arXiv
    2103.03841), as the evaluation of ADM has them.

    Args:
        path: the weights; None looks for them in torch hub's cache.

    Raises:
        MissingDependency: torch-fidelity is not installed. CheckpointError: no file, or one that does not fit.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        file = find_inception(path)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise MissingDependency(
                "the extractor 'inception' needs torch-fidelity: pip install 'tokgen[metrics]'; or choose 'mobilenet'"
            ) from None
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        # torch-fidelity unpickles the file that it is given: it gets tensors written here, and never the file itself
        copy = io.BytesIO()
        torch.save(read_tensors(file), copy)
        copy.seek(0)
        try:
            with torch.random.fork_rng(devices=[]):
                self.model = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], copy)
        except RuntimeError as error:
            raise CheckpointError(
                f"{file} does not hold the weights of torch-fidelity's Inception ({str(error).splitlines()[-1].strip()}); get {URL}"
            ) from None
        self.weights, self.standard = digest[:16], digest == STANDARD
        self.name = "Inception-v3 2015-12-05, 2048-d" if self.standard else "Inception-v3 of other weights, 2048-d"
        self._spatial: list[Tensor] = []
        conv = self.model.Mixed_6d.branch1x1.conv
        conv.register_forward_hook(lambda module, given, made: self._spatial.append(made))

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        self._spatial.clear()
        pool, logits = self.model(pixels.to(self.model.fc.weight.device))
        return {"pool": pool, "logits": logits, "spatial": self._spatial.pop()[:, :7].flatten(1).float()}


def find_inception(path: str | os.PathLike[str] | None = None) -> Path:
    """The file with Inception's weights: `path`, or the one in torch hub's cache. Raises CheckpointError if there is none."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    places = [folder / name for name in INCEPTION_FILES] if path is None else [Path(path)]
    for place in places:
        if place.is_file():
            return place
    raise CheckpointError(f"no Inception weights at {places[0]}; download {URL}, or choose another extractor")


def load_extractor(name: str, clips: bool = False) -> Extractor | None:
    """An extractor, frozen, in eval mode.

    Args:
        name: "inception" (weights in torch hub's cache) or "inception:PATH"; whatever `tokgen.encoders.base.load_encoder` takes,
            such as "mobilenet" or a folder; "none"; or "auto", the first of inception, mobilenet and none that is at hand.
        clips: of clips: whatever `tokgen.encoders.base.load_clip_encoder` takes; "none", and "auto", which is none.

    Raises:
        CheckpointError, MissingDependency: weights or packages that are missing. ConfigError: "inception:" without a path, or a
            network of pictures for clips.
    """
    if name == "none" or (clips and name == "auto"):
        return None
    if clips:
        if name.partition(":")[0] in ("inception", "mobilenet", "timm"):
            raise ConfigError(
                f"extractor {name!r} is of pictures, and these are clips; give transformers:NAME of a video model (VideoMAE, "
                "ViViT, TimeSformer), the folder of an encoder of clips, or none"
            )
        return ClipExtractor(load_clip_encoder(name)).eval()
    if name == "auto":
        for choice in ("inception", "mobilenet"):
            try:
                return load_extractor(choice)
            except (CheckpointError, MissingDependency):
                continue
        return None
    kind, colon, path = name.partition(":")
    if kind == "inception":
        if colon and not path:
            raise ConfigError("extractor 'inception:' lacks the path of its weights; give inception:PATH or inception")
        return InceptionExtractor(path or None).eval()
    return EncoderExtractor(load_encoder(name)).eval()
