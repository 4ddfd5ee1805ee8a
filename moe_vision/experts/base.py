"""What every vision expert shares: facts of its checkpoints, one run's choices, the way from views to a feature map.

A family is one file: a table of `ExpertSpec`s, an `ExpertConfig` registered under the family's name, and an `Expert`
that writes only `encode`. Views come un-normalised in [0, 1], because each expert has its own size, mean and std.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moe_vision.registry import suggest
from moe_vision.types import FeatureMap, MapShape


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """Frozen facts of one checkpoint, with their source.

    `architecture` holds the arguments of the library's own config class; `key_prefix` is what the source's state dict
    puts before the keys of our module, `optional_keys` the prefixes of keys that the source may lack or have too many.
    """

    hub_id: str | None
    revision: str | None
    licence: str
    channels: int
    stride_px: int
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pretraining: str
    architecture: Mapping[str, Any] = field(default_factory=dict)
    filename: str | None = None
    key_prefix: str = ""
    optional_keys: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """One run's choices for one expert.

    variant: a name from the family's table of checkpoints. pretrained: `default` for that checkpoint's own weights,
    a Hub id, a local folder or a file; null initialises at random. trainable: false keeps it frozen in every stage.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    type_name: ClassVar[str] = ""
    specs: ClassVar[Mapping[str, ExpertSpec]] = {}
    size_multiple: ClassVar[bool] = True

    variant: str
    pretrained: str | None = "default"
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.variant not in self.specs:
            raise ValueError(
                f"unknown variant '{self.variant}' of {self.type_name}: {suggest(self.variant, list(self.specs))}"
            )
        if self.image_size is not None:
            object.__setattr__(self, "image_size", tuple(self.image_size))
        height, width = self.size
        stride = self.stride_px
        if min(height, width) < stride or height % stride or width % stride:
            near = [max(stride, round(side / stride) * stride) for side in (height, width)]
            raise ValueError(
                f"image_size {[height, width]} of {self.type_name} '{self.variant}' is not a multiple of its stride "
                f"of {stride} px; the nearest that fits is {near}"
            )

    @property
    def spec(self) -> ExpertSpec:
        return self.specs[self.variant]

    @property
    def size(self) -> tuple[int, int]:
        """Input size (height, width) in pixels."""
        return self.image_size or self.spec.image_size

    @property
    def channels(self) -> int:
        return self.spec.channels

    @property
    def stride_px(self) -> int:
        return self.spec.stride_px

    @property
    def shape(self) -> MapShape:
        """Shape of the feature map, known before any weight exists."""
        return MapShape(self.channels, (self.size[0] // self.stride_px, self.size[1] // self.stride_px))

    def build(self) -> "Expert":
        """Make the module with random weights, on the current default device."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `pretrained` is left out, because a saved model carries its own weights."""
        values = {key: value for key, value in asdict(self).items() if key != "pretrained"}
        if self.image_size is not None:
            values["image_size"] = list(self.image_size)
        return {"type": self.type_name, **values}


class Expert(nn.Module):
    """A vision encoder as a function from views to one feature map; `model` is the library's own module."""

    model: nn.Module

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, views: torch.Tensor) -> FeatureMap:
        """Encode views [V, 3, H, W] in [0, 1] of any size into a FeatureMap [V, C, h, w]."""
        feature_map = FeatureMap(self.encode(self.normalise(self.resize(views))))
        if feature_map.shape != self.config.shape:
            raise RuntimeError(f"{self.config.type_name} promised {self.config.shape} and gave {feature_map.shape}")
        return feature_map

    def resize(self, views: torch.Tensor) -> torch.Tensor:
        """Bring views to this expert's own input size: bilinear with antialias, corners not aligned."""
        if tuple(views.shape[-2:]) == self.config.size:
            return views
        # In fp32: the antialiased kernel has no half precision on the CPU.
        resized = F.interpolate(
            views.float(), size=self.config.size, mode="bilinear", antialias=True, align_corners=False
        )
        return resized.to(views.dtype)

    def normalise(self, views: torch.Tensor) -> torch.Tensor:
        """Subtract this checkpoint's mean and divide by its standard deviation, per channel."""
        # Built here and not kept as buffers: non-persistent buffers are lost when transformers loads from meta.
        mean = views.new_tensor(self.config.spec.mean).view(3, 1, 1)
        std = views.new_tensor(self.config.spec.std).view(3, 1, 1)
        return (views - mean) / std

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode normalised pixels [V, 3, H, W] of exactly `config.size` into [V, C, h, w]."""
        raise NotImplementedError(f"{type(self).__name__} must define encode()")


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


def micro_spec(
    name: str,
    *,
    channels: int,
    stride_px: int,
    size_px: int,
    pretraining: str,
    architecture: Mapping[str, Any],
) -> ExpertSpec:
    """Facts that all miniature checkpoints share: they ship with this package and were made by its recipes."""
    return ExpertSpec(
        hub_id=None,
        revision=None,
        licence="apache-2.0",
        channels=channels,
        stride_px=stride_px,
        image_size=(size_px, size_px),
        mean=HALF,
        std=HALF,
        pretraining=pretraining,
        architecture=architecture,
        filename=f"micro/{name}.safetensors",
        key_prefix="model.",
    )
