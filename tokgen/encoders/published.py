"""Encoders of other projects, by name: timm, transformers, torchvision's MobileNetV2."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokgen.encoders.base import ImageEncoder, as_float, resized
from tokgen.errors import CheckpointError, ConfigError, MissingDependency


class TimmEncoder(ImageEncoder):
    """A model of timm without its classifier; size, mean and deviation are those of its pretrained configuration.

    Args:
        name: as timm spells it, such as "vit_base_patch16_224.dino"; "hf-hub:…" and "local-dir:…" work as in timm.
        pretrained: load its weights.
    """

    def __init__(self, name: str, pretrained: bool = True) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise MissingDependency(
                f"encoder timm:{name} needs timm; install it with pip install 'tokgen[transformers]'"
            ) from None
        try:
            self.model = timm.create_model(name, pretrained=pretrained, num_classes=0)
        except Exception as error:  # timm and the Hub raise many kinds
            raise CheckpointError(f"timm:{name} cannot be loaded: {str(error).splitlines()[0]}") from None
        config = timm.data.resolve_model_data_config(self.model)
        self.model_name = name
        self.name, self.dim, self.side = f"timm {name}", self.model.num_features, config["input_size"][-2:]
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)

    def spec(self) -> dict[str, Any]:
        return {"type": "timm", "name": self.model_name}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TimmEncoder:
        return cls(spec["name"], pretrained=False)

    @cached_property
    def feature_shape(self) -> tuple[int, int]:
        return _feature_shape(self, self.side)

    def _prepared(self, pixels: Tensor) -> Tensor:
        return (resized(as_float(pixels), self.side) - self.mean) / self.std

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model(self._prepared(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        x = self.model.forward_features(self._prepared(pixels))
        if x.ndim == 4:  # a map: (B, C, H, W), or (B, H, W, C) of some families
            return (x.movedim(1, -1) if x.shape[1] == self.model.num_features else x).flatten(1, 2)
        return x[:, getattr(self.model, "num_prefix_tokens", 0) :]


class TransformersEncoder(ImageEncoder):
    """A vision model of transformers.

    The embedding is `get_image_features` where the model has it (CLIP, SigLIP and BiomedCLIP-like: after the visual
    projection, as ARRA uses it), else `image_embeds`, else the pooled output, else the first token.

    Args:
        name: Hub name or folder.
    """

    def __init__(self, name: str) -> None:
        auto = _transformers(name)
        try:
            config = auto.AutoConfig.from_pretrained(name)
            projected = "CLIPVisionModelWithProjection" in (config.architectures or [])
            kind = auto.CLIPVisionModelWithProjection if projected else auto.AutoModel
            model = kind.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no vision model with safetensors weights at {name!r}: {str(error).splitlines()[0]}"
            ) from None
        self._set(model, name, *_preprocessing(name, config))

    def _set(self, model: Any, name: str, mean: list[float], std: list[float], side: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.model_name, self.side = name, side
        self.name = f"{type(model).__name__} {name}"
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        with torch.no_grad():
            self.dim = self.eval().embed(torch.zeros(1, 3, 32, 32)).shape[-1]

    def spec(self) -> dict[str, Any]:
        side = self.side if isinstance(self.side, int) else list(self.side)
        preprocessing = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist(), "side": side}
        # what differs from the class's defaults, and no paths or versions
        config = {k: v for k, v in self.model.config.to_diff_dict().items() if k not in _NOT_SHAPE}
        model = {"class": type(self.model).__name__, "model_type": self.model.config.model_type, "config": config}
        return {"type": "transformers", "name": self.model_name, **model, **preprocessing}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TransformersEncoder:
        auto = _transformers(spec["name"])
        config = auto.AutoConfig.for_model(spec["model_type"], **spec["config"])
        kind = getattr(auto, spec["class"], None)
        if not (isinstance(kind, type) and issubclass(kind, auto.PreTrainedModel)):
            raise ConfigError(f"transformers has no model {spec['class']!r}, which this tokenizer's encoder needs")
        encoder = cls.__new__(cls)
        encoder._set(kind(config), spec["name"], spec["mean"], spec["std"], spec["side"])
        return encoder

    @cached_property
    def feature_shape(self) -> tuple[int, int]:
        return _feature_shape(self, self.side)

    def _prepared(self, pixels: Tensor) -> Tensor:
        return (resized(as_float(pixels), self.side) - self.mean) / self.std

    def embed(self, pixels: Tensor) -> Tensor:
        x = self._prepared(pixels)
        if hasattr(self.model, "get_image_features"):
            out = self.model.get_image_features(pixel_values=x)
            return out if isinstance(out, Tensor) else out.pooler_output  # transformers >= 5 gives the whole output
        out = self.model(pixel_values=x)
        for key in ("image_embeds", "pooler_output"):
            if getattr(out, key, None) is not None:
                return getattr(out, key)
        return out.last_hidden_state[:, 0]

    def features(self, pixels: Tensor) -> Tensor:
        vision = getattr(self.model, "vision_model", self.model)
        hidden = vision(pixel_values=self._prepared(pixels)).last_hidden_state
        side = self.side if isinstance(self.side, int) else self.side[0]
        config = getattr(self.model.config, "vision_config", self.model.config)
        places = (side // config.patch_size) ** 2
        return hidden[:, hidden.shape[1] - places :]  # class and register tokens come first


class ClipTextStates(torch.nn.Module):
    """The last hidden states of a CLIP text model, padded to its full length, as Stable Diffusion 1 is conditioned on.

    Args:
        name: Hub name or folder of a CLIP text model with its vocabulary.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        auto = _transformers(name)
        try:
            self.tokenizer = auto.AutoTokenizer.from_pretrained(name)
            self.model: Any = auto.CLIPTextModel.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no CLIP text model at {name!r}: {str(error).splitlines()[0]}") from None
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch: dict[str, Any]) -> Tensor:
        """(B, 77, C) of batch["caption"]."""
        length = self.model.config.max_position_embeddings
        ids = self.tokenizer(
            list(batch["caption"]), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.model(input_ids=ids.to(self.model.device)).last_hidden_state


_NOT_SHAPE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "model_type")


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependency(
            f"encoder transformers:{name} needs transformers; install it with pip install 'tokgen[transformers]'"
        ) from None
    return transformers


@torch.no_grad()
def _feature_shape(encoder: ImageEncoder, side: Any) -> tuple[int, int]:
    """(N, C), found out with an empty picture."""
    size = (side, side) if isinstance(side, int) else tuple(side)
    device = next(encoder.parameters()).device
    return tuple(encoder.features(torch.zeros(1, 3, *size, device=device)).shape[1:])


def _preprocessing(name: str, config: Any) -> tuple[list[float], list[float], Any]:
    """Mean, deviation and side of a published model's own image processor; half and half where it has none."""
    from transformers import AutoImageProcessor

    vision = getattr(config, "vision_config", config)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        return [0.5] * 3, [0.5] * 3, vision.image_size
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = crop or processor.size
    side = (size["height"], size["width"]) if "height" in size else size["shortest_edge"]
    return list(processor.image_mean), list(processor.image_std), side


class MobileNetEncoder(ImageEncoder):
    """ImageNet MobileNetV2, features pooled before the classifier (see `tokgen.losses.mobilenet`)."""

    def __init__(self) -> None:
        super().__init__()
        from tokgen.losses.mobilenet import MobileNetFeatures

        self.model = MobileNetFeatures()
        self.name, self.dim = "ImageNet MobileNetV2 pooled features", 1280

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model.embed(as_float(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        return self.model(as_float(pixels))[-1].flatten(2).transpose(1, 2)
