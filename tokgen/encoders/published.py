"""Encoders of other projects, by name: timm, transformers, torchvision's MobileNetV2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokgen.encoders.base import ClipEncoder, EncodedClip, ImageEncoder, as_float, clip_frames, resized
from tokgen.errors import CheckpointError, ConfigError, InputError, MissingDependency
from tokgen.pretrained import fingerprint


class TimmEncoder(ImageEncoder):
    """A model of timm without its classifier; size, mean and deviation are those of its pretrained configuration.

    Args:
        name: as timm spells it, such as "vit_base_patch16_224.dino"; "hf-hub:…" and "local-dir:…" work as in timm.
        pretrained: load its weights.
        args: further arguments of timm's model, such as {"img_size": 448}.
        mean, std, side: of the preprocessing, in place of the configuration's; `side` an int or (height, width).
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = True,
        args: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        side: Any = None,
    ) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise MissingDependency(
                f"encoder timm:{name} needs timm; install it with pip install 'tokgen[transformers]'"
            ) from None
        args = dict(args or {})
        try:
            self.model = timm.create_model(name, pretrained=pretrained, num_classes=0, **args)
        except Exception as error:  # timm and the Hub raise many kinds
            raise CheckpointError(f"timm:{name} cannot be loaded: {_first_line(error)}") from None
        # timm >= 1.0.20 says which arguments a "hf-hub:" or "local-dir:" model brought with it
        made_with = {**getattr(self.model, "_model_args", {}), **args}
        self.args = {key: value for key, value in made_with.items() if key != "num_classes"}
        config = timm.data.resolve_model_data_config(self.model)
        self.model_name, self.architecture = _plain_name(name), self.model.pretrained_cfg["architecture"]
        self.name, self.dim = f"timm {self.model_name}", self.model.num_features
        self.side = side or self.args.get("img_size") or config["input_size"][-2:]
        _set_preprocessing(self, mean or config["mean"], std or config["std"])

    def spec(self) -> dict[str, Any]:
        model = {"name": self.model_name, "architecture": self.architecture, "args": self.args}
        return {"type": "timm", **model, **_preprocessing_spec(self)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TimmEncoder:
        spec = _checked(spec, "timm", ("name",), ("architecture", "args", "mean", "std", "side"))
        name = spec.pop("name")
        encoder = cls(spec.pop("architecture", name), pretrained=False, **spec)
        encoder.model_name, encoder.name = name, f"timm {name}"
        return encoder

    @property
    def fingerprint(self) -> str:
        return _unnamed_fingerprint(self)

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
            model = _whole(kind, name)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no vision model with safetensors weights at {name!r}: {_first_line(error)}"
            ) from None
        self._set(model, _plain_name(name), *_preprocessing(name, config))

    def _set(self, model: Any, name: str, mean: Sequence[float], std: Sequence[float], side: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.model_name, self.side = name, side
        self.name = f"{type(model).__name__} {name}"
        _set_preprocessing(self, mean, std)
        with torch.no_grad():
            self.dim = self.eval().embed(torch.zeros(1, 3, 32, 32)).shape[-1]

    def spec(self) -> dict[str, Any]:
        # what differs from the class's defaults, and no paths or versions
        config = _shape_of(self.model.config.to_diff_dict())
        model = {"class": type(self.model).__name__, "model_type": self.model.config.model_type, "config": config}
        return {"type": "transformers", "name": self.model_name, **model, **_preprocessing_spec(self)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TransformersEncoder:
        wanted = ("name", "class", "model_type", "config", "mean", "std", "side")
        spec = _checked(spec, "transformers", wanted)
        auto = _transformers(spec["name"])
        kind = getattr(auto, spec["class"], None)
        if not (isinstance(kind, type) and issubclass(kind, auto.PreTrainedModel)):
            raise ConfigError(f"transformers has no model {spec['class']!r}, which the encoder {spec['name']} needs")
        try:
            config = auto.AutoConfig.for_model(spec["model_type"], **spec["config"])
        except ValueError as error:
            raise ConfigError(f"encoder {spec['name']}: {_first_line(error)}") from None
        encoder = cls.__new__(cls)
        encoder._set(kind(config).float(), spec["name"], spec["mean"], spec["std"], spec["side"])
        return encoder

    @property
    def fingerprint(self) -> str:
        return _unnamed_fingerprint(self)

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
        if hidden.ndim == 4:  # a map (B, C, H, W)
            return hidden.flatten(2).transpose(1, 2)
        patch = getattr(getattr(self.model.config, "vision_config", self.model.config), "patch_size", None)
        if patch is None:
            raise InputError(f"{self.name} gives no features of places: its configuration names no patch_size")
        (height, width), (down, right) = _pair(self.side), _pair(patch)
        places = (height // down) * (width // right)
        return hidden[:, hidden.shape[1] - places :]  # class and register tokens come first


class TransformersClipEncoder(ClipEncoder):
    """A video model of transformers. It sees as many frames as it was made for, evenly spaced in the clip.

    A clip's vector is what the model's own classifier reads: the mean of VideoMAE's tokens (before its norm), the class token of
    ViViT and of TimeSformer.

    Args:
        name: Hub name or folder.
    """

    KINDS = {  # model type -> class, how it is pooled, options
        "videomae": ("VideoMAEModel", "mean", {}),
        "vivit": ("VivitModel", "class token", {"add_pooling_layer": False}),  # classifiers have no weights for it
        "timesformer": ("TimesformerModel", "class token", {}),
    }

    def __init__(self, name: str) -> None:
        super().__init__()
        auto = _transformers(name)
        try:
            config = auto.AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no video model at {name!r}: {_first_line(error)}") from None
        if config.model_type not in self.KINDS:
            raise CheckpointError(
                f"{name!r} is a {config.model_type}; expected a video model: {', '.join(sorted(self.KINDS))}"
            )
        kind, self.pooled, options = self.KINDS[config.model_type]
        try:
            self.model: Any = _whole(getattr(auto, kind), name, **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no {kind} with safetensors weights at {name!r}: {_first_line(error)}") from None
        self.frames, self.dim = int(config.num_frames), int(config.hidden_size)
        mean, std, self.side = _preprocessing(name, config)
        self.name = f"{kind} {_plain_name(name)} ({self.pooled}, {self.frames} frames)"
        _set_preprocessing(self, mean, std)

    def forward(self, pixels: Tensor) -> EncodedClip:
        at = (torch.arange(self.frames) + 0.5) * pixels.shape[1] / self.frames  # the middles of equal parts
        x = (clip_frames(pixels[:, at.long()], self.side) - self.mean) / self.std  # (B, T, 3, S, S)
        tokens = self.model(pixel_values=x).last_hidden_state  # (B, N, D)
        if self.pooled == "mean":
            pooled = tokens.mean(1)
        else:
            pooled, tokens = tokens[:, 0], tokens[:, 1:]
        return EncodedClip(pooled, tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))


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
            self.model: Any = _whole(auto.CLIPTextModel, name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no CLIP text model with its vocabulary at {name!r}: {_first_line(error)}") from None
        vocabulary, wanted = len(self.tokenizer), self.model.config.vocab_size
        if vocabulary != wanted:  # where files are missing, transformers makes an empty one
            raise CheckpointError(
                f"no CLIP text model with its vocabulary at {name!r}: the vocabulary has {vocabulary} ids, the model {wanted}"
            )
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch: dict[str, Any]) -> Tensor:
        """(B, 77, C) of batch["caption"]."""
        length = self.model.config.max_position_embeddings
        ids = self.tokenizer(
            list(batch["caption"]), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.model(input_ids=ids.to(self.model.device)).last_hidden_state


def _whole(kind: Any, name: str, **options: Any) -> Any:
    """A published model in single precision. Raises CheckpointError where weights are missing, which would be random."""
    model, report = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{name!r} holds no weights for {', '.join(missing[:3])}{more} of {kind.__name__}; give a model of that kind"
        )
    return model.float()


_NOT_SHAPE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def _shape_of(config: dict[str, Any], top: bool = True) -> dict[str, Any]:
    """A configuration of transformers without what says nothing about the network; `for_model` gets its type by itself."""
    left_out = (*_NOT_SHAPE, "model_type") if top else _NOT_SHAPE
    return {
        key: _shape_of(value, False) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in left_out
    }


def _checked(
    spec: dict[str, Any], kind: str, wanted: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    for key in spec:
        if key not in (*wanted, *optional):
            raise ConfigError(
                f"encoder of type {kind}: unknown key {key!r}; expected {', '.join((*wanted, *optional))}"
            )
    for key in wanted:
        if key not in spec:
            raise ConfigError(
                f"encoder of type {kind}: {key!r} is missing; to begin with published weights, write "
                f"{{pretrained: {kind}:NAME}} instead"
            )
    return dict(spec)


def _unnamed_fingerprint(encoder: ImageEncoder) -> str:
    # a network may be copied to another folder and stay what it is
    return fingerprint(encoder, {key: value for key, value in encoder.spec().items() if key != "name"})


def _plain_name(name: str) -> str:
    """A folder's own name without the way there, which means nothing on other machines; a Hub name as it is."""
    path = name.removeprefix("local-dir:")
    return Path(path).resolve().name if Path(path).is_dir() else name


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))


def _set_preprocessing(encoder: torch.nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    encoder.pixel_mean, encoder.pixel_std = [float(x) for x in mean], [float(x) for x in std]
    encoder.register_buffer("mean", torch.tensor(encoder.pixel_mean).view(1, 3, 1, 1), persistent=False)
    encoder.register_buffer("std", torch.tensor(encoder.pixel_std).view(1, 3, 1, 1), persistent=False)


def _preprocessing_spec(encoder: Any) -> dict[str, Any]:
    side = encoder.side if isinstance(encoder.side, int) else list(encoder.side)
    return {"mean": encoder.pixel_mean, "std": encoder.pixel_std, "side": side}


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
    device = next(encoder.parameters()).device
    return tuple(encoder.features(torch.zeros(1, 3, *_pair(side), device=device)).shape[1:])


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
