"""What every vision expert shares: facts of its checkpoints, one run's choices, the way from views to a feature map.

A family is one file: a table of `ExpertSpec`s, an `ExpertConfig` registered under the family's name, and an `Expert`
that writes only `encode`. Views come un-normalised in [0, 1], because each expert has its own size, mean and std.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from moe_vision.experts.resolution import nearest_multiple
from moe_vision.registry import suggest
from moe_vision.types import FeatureMap, Injection, MapShape


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """Frozen facts of one checkpoint, with their source.

    `architecture` holds the arguments of the library's own config class; `filename` the file of the Hub repository
    that holds the weights, where it is not the only one. `key_prefix` is what the source's state dict puts before the
    keys of our module, `optional_keys` the keys (or their beginnings) that it has too many, `may_miss` those of our
    module that it may lack.
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
    may_miss: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """One run's choices for one expert.

    variant: a name from the family's table of checkpoints. pretrained: `default` for that checkpoint's own weights;
    a Hub id, a local folder or file; `timm:…`, `open_clip:…`, `segment_anything:…` for a library's own name; null
    initialises at random.
    image_size: input size (height, width) in pixels, the checkpoint's own if null. sizing: what happens to a view of
    another size: `fixed` resizes it to image_size, `multiple_of` to the nearest multiples of the stride, `native`
    takes it as it is. resize: bilinear with antialias, plain bilinear, or with aligned corners as Eagle does.
    mean, std: in place of the checkpoint's own statistics. architecture: values in place of the checkpoint's own.
    compile: run this expert through torch.compile; a choice of the run, which no saved model remembers.
    packages: what this family imports beside torch, torchvision and transformers; an export's card lists it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    type_name: ClassVar[str] = ""
    specs: ClassVar[Mapping[str, ExpertSpec]] = {}
    library: ClassVar[Any] = None
    run_choices: ClassVar[frozenset[str]] = frozenset({"pretrained", "compile"})
    packages: ClassVar[tuple[str, ...]] = ()

    variant: str
    pretrained: str | None = field(default="default", metadata={"path": "name"})
    image_size: tuple[int, int] | None = None
    sizing: Literal["fixed", "multiple_of", "native"] = "fixed"
    resize: Literal["antialias", "bilinear", "align_corners"] = "antialias"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)
    compile: bool = False

    def __post_init__(self) -> None:
        self.check_variant()
        self.check_architecture()
        for name in ("image_size", "mean", "std"):  # tuples come back from JSON as lists
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {list(self.std)} of {self.type_name}: must be above 0")
        self.check_size(self.size)

    @property
    def num_blocks(self) -> int | None:
        """Blocks behind which a mixer may speak, null where it cannot."""
        return None

    def check_variant(self) -> None:
        """Raises ValueError for a variant that the family's table does not have."""
        if self.variant not in self.specs:
            raise ValueError(
                f"unknown variant '{self.variant}' of {self.type_name}: {suggest(self.variant, list(self.specs))}"
            )

    def architecture_names(self) -> set[str]:
        """Names that `architecture` may hold: those of the library's config class, or else the spec's own."""
        return set(self.library().to_dict() if self.library is not None else self.spec.architecture)

    def check_architecture(self) -> None:
        """Raises ValueError for a name or a value of `architecture` that the library's config does not take."""
        known = self.architecture_names() if self.architecture else set()
        for name in self.architecture:
            if name not in known:
                raise ValueError(
                    f"unknown architecture value '{name}' of {self.type_name}: {suggest(name, sorted(known))}"
                )
        if self.architecture and self.library is not None:
            try:
                self.library(**self.settings)
            except Exception as error:  # each library has its own kinds
                raise ValueError(f"architecture of {self.type_name} '{self.variant}' is refused ({error})") from error

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError, naming the nearest size that fits, where `size` is no whole number of grid cells."""
        stride = self.stride_px
        if min(size) < stride or size[0] % stride or size[1] % stride:
            raise ValueError(
                f"image_size {list(size)} of {self.type_name} '{self.variant}' is not a multiple of its stride "
                f"of {stride} px; the nearest that fits is {list(nearest_multiple(size, stride))}"
            )

    @property
    def spec(self) -> ExpertSpec:
        return self.specs[self.variant]

    @property
    def settings(self) -> dict[str, Any]:
        """The architecture: the checkpoint's values with this config's on top."""
        return {**self.spec.architecture, **self.architecture}

    @property
    def native_size(self) -> tuple[int, int]:
        """Input size (height, width) that the weights were trained at."""
        return self.spec.image_size

    @property
    def size(self) -> tuple[int, int]:
        """Input size (height, width) in pixels that `fixed` brings every view to."""
        return self.image_size or self.native_size

    @property
    def channels(self) -> int:
        return self.spec.channels

    @property
    def stride_px(self) -> int:
        return self.spec.stride_px

    @property
    def statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation per channel, of pixels in [0, 1]."""
        return self.mean or self.spec.mean, self.std or self.spec.std

    @property
    def shape(self) -> MapShape:
        """Shape of the feature map of a view of `size`, known before any weight exists."""
        return self.shape_at(self.size)

    def size_at(self, view: tuple[int, int]) -> tuple[int, int]:
        """Input size (height, width) that a view of this size is encoded at. Raises ValueError if `native` cannot."""
        if self.sizing == "fixed":
            return self.size
        size = nearest_multiple(view, self.stride_px) if self.sizing == "multiple_of" else view
        self.check_size(size)
        return size

    def shape_at(self, size: tuple[int, int]) -> MapShape:
        """Shape of the feature map of an input of `size`."""
        return MapShape(self.channels, (size[0] // self.stride_px, size[1] // self.stride_px))

    def left_out(self) -> tuple[str, ...]:
        """Beginnings of keys of the library's module that this config does not build, though checkpoints hold them."""
        return ()

    def build(self) -> "Expert":
        """Make the module with random weights, on the current default device."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the choices of one run: a saved model carries its own weights."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key not in self.run_choices
        }
        return {"type": self.type_name, **values}


CACHED_PIXELS = 2**18
"""Pixels that are encoded at a time on a CPU where no gradient is needed: their activations stay in its cache."""


class Expert(nn.Module):
    """A vision encoder as a function from views to one feature map; `model` is the library's own module."""

    model: nn.Module

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, views: torch.Tensor, inject: Injection | None = None) -> FeatureMap:
        """Encode views [V, 3, H, W] in [0, 1] of any size into a FeatureMap [V, C, h, w].

        inject: what others say behind each block, for experts that have `num_blocks`.
        """
        promised = self.config.shape_at(self.config.size_at((views.shape[-2], views.shape[-1])))
        # Frozen weights and plain pictures need no graph, and encoders save memory where they know that.
        learns = views.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        learns = learns or inject is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            pixels = self.pixels(views)
            feature_map = FeatureMap(self.in_pieces(pixels) if inject is None else self.encode_with(pixels, inject))
        if feature_map.shape != promised:
            raise RuntimeError(f"{self.config.type_name} promised {promised} and gave {feature_map.shape}")
        return feature_map

    def in_pieces(self, pixels: torch.Tensor) -> torch.Tensor:
        """`encode`, on a CPU without a graph a few views at a time."""
        if torch.is_grad_enabled() or pixels.device.type != "cpu":
            return self.encode(pixels)
        pieces = pixels.split(max(1, CACHED_PIXELS // (pixels.shape[-2] * pixels.shape[-1])))
        return torch.cat([self.encode(piece) for piece in pieces])

    def pixels(self, views: torch.Tensor) -> torch.Tensor:
        """Views in [0, 1] → what `encode` takes: resized and normalised."""
        return self.normalise(self.resize(views))

    def resize(self, views: torch.Tensor) -> torch.Tensor:
        """Bring views to this expert's own input size: bilinear, in the way that the config says."""
        size = self.config.size_at((views.shape[-2], views.shape[-1]))
        if tuple(views.shape[-2:]) == size:
            return views
        antialias, align_corners = self.config.resize == "antialias", self.config.resize == "align_corners"
        # In fp32: the antialiased kernel has no half precision on the CPU.
        resized = F.interpolate(
            views.float(), size=size, mode="bilinear", antialias=antialias, align_corners=align_corners
        )
        return resized.to(views.dtype)

    def normalise(self, views: torch.Tensor) -> torch.Tensor:
        """Subtract the mean and divide by the standard deviation, per channel."""
        # Built here and not kept as buffers: non-persistent buffers are lost when transformers loads from meta.
        mean, std = (views.new_tensor(values).view(3, 1, 1) for values in self.config.statistics)
        return (views - mean) / std

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode normalised pixels [V, 3, H, W] of a size that fits the stride into [V, C, h, w]."""
        raise NotImplementedError(f"{type(self).__name__} must define encode()")

    def encode_with(self, pixels: torch.Tensor, inject: Injection | None) -> torch.Tensor:
        """As `encode`, with what others say behind each block."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_with(), or have no num_blocks")


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
