"""Four maps of a picture, from fine to coarse, of a published network or a small one of one's own."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from tokgen.errors import CheckpointError, ConfigError, MissingDependency
from tokgen.nn.conv import ResBlock
from tokgen.trajectories.keyframes import first_line, load_whole, transformers

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = 4


class Pyramid(nn.Module):
    """Base: pixels float (B, 3, H, W) in [0, 1] -> four maps (B, C_i, H / s_i, W / s_i), finest first.

    Attributes:
        channels: C_i.
    """

    channels: tuple[int, ...]

    def __init__(self, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def spec(self) -> dict[str, Any]:
        """Plain data from which `build_pyramid` makes this network again, without its weights."""
        raise NotImplementedError

    def maps(self, x: Tensor) -> list[Tensor]:
        """The four maps of normalised pixels."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.maps((pixels - self.mean) / self.std)


class ConvPyramid(Pyramid):
    """Residual blocks at strides 4, 8, 16, 32, trained from nothing.

    Args:
        channels: of the four stages, multiples of 32.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        if len(channels) != STAGES:
            raise ConfigError(f"pyramid channels {list(channels)}: expected {STAGES} numbers")
        self.channels = tuple(channels)
        self.stem = nn.Conv2d(3, channels[0], 4, stride=4)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in itertools.pairwise(channels))
        self.stages = nn.ModuleList(ResBlock(c, c) for c in channels)

    def spec(self) -> dict[str, Any]:
        return {"type": "conv", "channels": list(self.channels)}

    def maps(self, x: Tensor) -> list[Tensor]:
        out = []
        for i, stage in enumerate(self.stages):
            x = stage(self.down[i - 1](x) if i else self.stem(x))
            out.append(x)
        return out


class TimmPyramid(Pyramid):
    """The last four stages of a model of timm.

    Args:
        name: as timm spells it, such as "convnext_small.dinov3_lvd1689m".
        pretrained: load its weights.
    """

    def __init__(self, name: str, pretrained: bool = True) -> None:
        if ":" in name:
            raise ConfigError(
                f"backbone timm:{name}: expected a name that timm itself knows; for a folder or a Hub name, write "
                "transformers:NAME_OR_FOLDER"
            )
        try:
            import timm
        except ImportError:
            raise MissingDependency(
                f"backbone timm:{name} needs timm; install it with pip install 'tokgen[transformers]'"
            ) from None
        try:
            model = timm.create_model(name, pretrained=pretrained, features_only=True)
        except Exception as error:  # timm and the Hub raise many kinds
            raise CheckpointError(f"timm:{name} cannot be loaded as four maps: {first_line(error)}") from None
        config = timm.data.resolve_model_data_config(model)
        super().__init__(config["mean"], config["std"])
        self.model, self.name = model, name
        self.channels = tuple(model.feature_info.channels()[-STAGES:])
        if len(self.channels) != STAGES:
            raise ConfigError(f"timm:{name} has {len(self.channels)} stages; a backbone needs {STAGES}")

    def spec(self) -> dict[str, Any]:
        return {"type": "timm", "name": self.name}

    def maps(self, x: Tensor) -> list[Tensor]:
        out = self.model(x)[-STAGES:]
        if out[0].shape[1] != self.channels[0]:  # (B, H, W, C) of some families
            out = [m.movedim(-1, 1) for m in out]
        return out


class TransformersPyramid(Pyramid):
    """The last four stages of a backbone of transformers: ConvNeXt, DINOv3 ConvNeXt, Swin, ResNet, ...

    Args:
        model: with `feature_maps` and `channels`.
        mean, std: of its preprocessing.
    """

    def __init__(self, model: Any, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD) -> None:
        super().__init__(mean, std)
        self.model, self.channels = model, tuple(model.channels)
        if len(self.channels) != STAGES:
            raise ConfigError(f"{type(model).__name__} gives {len(self.channels)} maps; a backbone needs {STAGES}")

    @classmethod
    def load(cls, name: str) -> TransformersPyramid:
        """With its published weights, from a Hub name or folder."""
        auto = transformers()
        try:
            config = auto.AutoConfig.from_pretrained(name)
            config.out_features = list(config.stage_names[-STAGES:])
            with torch.device("meta"):  # AutoBackbone's own from_pretrained asks the Hub, also for a folder
                kind = type(auto.AutoBackbone.from_config(config))
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"no backbone with stages at {name!r} ({first_line(error)})") from None
        return cls(load_whole(kind, name, "backbone", config=config).float().requires_grad_(True))

    def spec(self) -> dict[str, Any]:
        config = self.model.config
        left_out = ("_name_or_path", "architectures", "dtype", "transformers_version", "model_type")
        settings = {k: v for k, v in config.to_diff_dict().items() if k not in left_out}
        return {"type": "transformers", "model_type": config.model_type, "config": settings}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TransformersPyramid:
        auto = transformers()
        try:
            config = auto.AutoConfig.for_model(spec["model_type"], **spec["config"])
            return cls(auto.AutoBackbone.from_config(config))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"backbone {spec}: {first_line(error)}") from None

    def maps(self, x: Tensor) -> list[Tensor]:
        return list(self.model(x).feature_maps)


def build_pyramid(spec: dict[str, Any]) -> Pyramid:
    """The network of a configuration.

    Args:
        spec: {"pretrained": "timm:NAME" or "transformers:NAME_OR_FOLDER"}, or what `Pyramid.spec` gave, whose weights are
            random until they are loaded: {"type": "timm", "name": ...}, {"type": "transformers", "model_type", "config"},
            {"type": "conv", "channels": four numbers}.

    Raises:
        ConfigError: no such type or option. CheckpointError, MissingDependency: the network cannot be loaded.
    """
    wanted = {"timm": {"name"}, "transformers": {"model_type", "config"}, "conv": {"channels"}}
    kind = spec.get("type")
    if set(spec) == {"pretrained"}:
        source, _, name = str(spec["pretrained"]).partition(":")
        if source == "timm" and name:
            return TimmPyramid(name)
        if source == "transformers" and name:
            return TransformersPyramid.load(name)
    elif kind in wanted and set(spec) == {"type", *wanted[kind]}:
        if kind == "timm":
            return TimmPyramid(spec["name"], pretrained=False)
        return TransformersPyramid.from_spec(spec) if kind == "transformers" else ConvPyramid(tuple(spec["channels"]))
    raise ConfigError(
        f"backbone {spec}: expected {{pretrained: timm:NAME}}, {{pretrained: transformers:NAME_OR_FOLDER}}, "
        "{type: timm, name: ...} or {type: conv, channels: [four numbers]}"
    )
