"""Any model of timm, by its own name, through transformers' `TimmWrapperModel`; EVA-02's classification and CLIP models
among them.

timm stays a dependency of a model that is exported with such an expert.
"""

import inspect
import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModel

from moe_vision.experts.base import CLIP_MEAN, CLIP_STD, HALF, Expert, ExpertConfig, ExpertSpec
from moe_vision.experts.resolution import nearest_multiple
from moe_vision.registry import EXPERTS, suggest
from moe_vision.types import MapShape


def timm_library() -> Any:
    """The package itself, imported when it is first needed. Raises ImportError with the cure."""
    try:
        import timm
    except ImportError as error:
        raise ImportError("an expert of type `timm` needs the package timm: pip install timm") from error
    return timm


def timm_spec(
    name: str, channels: int, stride_px: int, side: int, licence: str, pretraining: str, mean: Any, std: Any
) -> ExpertSpec:
    """Facts of one checkpoint, from timm's own table of pre-trained models."""
    return ExpertSpec(
        hub_id=f"timm:{name}", revision=None, licence=licence, channels=channels, stride_px=stride_px,
        image_size=(side, side), mean=mean, std=std, pretraining=pretraining,
    )  # fmt: skip


@lru_cache
def spec_from_timm(name: str) -> ExpertSpec:
    """Facts of any of timm's models. Raises ValueError for a name that timm does not have."""
    timm = timm_library()
    base = name.split(".")[0]
    if not timm.is_model(name):
        known = timm.list_models(f"{base[:4]}*", pretrained=True) or timm.list_models(pretrained=True)
        raise ValueError(f"timm has no model '{name}': {suggest(name, known[:400])}")
    facts = timm.get_pretrained_cfg(name)
    side = facts.input_size[-1]
    channels, stride, _ = timm_facts(name, "{}")
    return timm_spec(
        name, channels, stride, timm_side(name, "{}", side), facts.license or "see the model card",
        facts.tag or "see the model card", tuple(facts.mean), tuple(facts.std),
    )  # fmt: skip


@lru_cache(maxsize=4)
def meta_model(name: str, arguments: str) -> tuple[Any, tuple[str, ...]]:
    """A model without weights, on the meta device, and the keys that only its heads have.

    arguments: of `timm.create_model`, as JSON. Raises ValueError for a model that gives no feature maps.
    """
    timm = timm_library()
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name, pretrained=False, **timm_arguments(name, json.loads(arguments))).eval()
    whole = set(model.state_dict())
    prune(model, name, final_norm=False)
    return model, tuple(sorted(whole - set(model.state_dict())))


@lru_cache(maxsize=4096)
def timm_map(name: str, arguments: str, size: tuple[int, int]) -> tuple[int, int, int] | str:
    """Channels, rows and columns of the last map of an input of `size`, or why the model refuses that size.

    A model pads, crops or resizes in its own ways (Inception's map of 299 pixels has 8 cells, ResNet's of 176 has 6),
    so that it runs once on the meta device, without memory or arithmetic.
    """
    model, _ = meta_model(name, arguments)
    try:
        with torch.no_grad():
            found = last_map(model, torch.empty(1, 3, *size, device="meta"), final_norm=False)
    except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    if found.ndim != 4 or min(found.shape) < 1:
        return f"its last map has the shape {list(found.shape)}"
    return found.shape[1], found.shape[2], found.shape[3]


def timm_side(name: str, arguments: str, side: int) -> int:
    """The side of the input that a model was trained at, less what its patches leave over: 378 of 384 for 14 px."""
    stride = timm_reduction(name, arguments) or 1
    fits = not isinstance(timm_map(name, arguments, (side, side)), str)
    return side if fits else side // stride * stride


def timm_reduction(name: str, arguments: str) -> int | None:
    """Pixels from one cell of the last map to the next, as timm's own table has it; None if it has none."""
    levels = getattr(meta_model(name, arguments)[0], "feature_info", None)
    reduction = levels[-1].get("reduction") if isinstance(levels, list) and levels else None
    return int(reduction) if isinstance(reduction, int) and reduction > 0 else None


def timm_facts(name: str, arguments: str) -> tuple[int, int, tuple[str, ...]]:
    """Channels and stride of the last feature map, and the keys that only heads have.

    Raises ValueError for a model that has no map at the size that it was trained at.
    """
    given = json.loads(arguments).get("img_size", timm_library().get_pretrained_cfg(name).input_size[-1])
    side = timm_side(name, arguments, given if isinstance(given, int) else given[0])
    found = timm_map(name, arguments, (side, side))
    if isinstance(found, str):
        raise ValueError(f"timm '{name}' gives no feature map at {side}x{side} px ({found}): choose another variant")
    stride = timm_reduction(name, arguments) or max(round(side / found[1]), 1)
    return found[0], stride, meta_model(name, arguments)[1]


def timm_arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `timm.create_model`: a model whose classes have `dynamic_img_size` takes any size with it."""
    module = sys.modules[timm_library().models._registry._model_entrypoints[name.split(".")[0]].__module__]
    classes = [
        value for value in vars(module).values() if isinstance(value, type) and issubclass(value, torch.nn.Module)
    ]
    flexible = any("dynamic_img_size" in inspect.signature(cls.__init__).parameters for cls in classes)
    return {**({"dynamic_img_size": True} if flexible else {}), **given}


def prune(model: Any, name: str, final_norm: bool) -> None:
    """Take off what no feature map needs. Raises ValueError for a model that gives no feature maps."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"timm '{name}' gives no feature maps (its {type(model).__name__} has no forward_intermediates): choose "
            "another variant"
        )
    model.prune_intermediate_layers([-1], prune_norm=not final_norm, prune_head=True)


def last_map(model: Any, pixels: torch.Tensor, final_norm: bool) -> torch.Tensor:
    """[V, 3, H, W] → [V, C, h, w]."""
    maps = model.forward_intermediates(
        pixels, indices=1, norm=final_norm, intermediates_only=True, output_fmt="NCHW"
    )  # fmt: skip
    return maps[-1]


@EXPERTS.register("timm")
@dataclass(frozen=True, kw_only=True)
class TimmConfig(ExpertConfig):
    """variant: any name that timm knows, with its tag. final_norm: apply the norm after the last layer.

    architecture: arguments of `timm.create_model` on top of the model's own.
    """

    specs: ClassVar = {
        "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k": timm_spec(
            "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", 1024, 14, 448, "mit",
            "masked images (38M); classification, ImageNet-22k and 1k", CLIP_MEAN, CLIP_STD,
        ),
        "eva02_large_patch14_clip_336.merged2b": timm_spec(
            "eva02_large_patch14_clip_336.merged2b", 1024, 14, 336, "mit", "image-text contrast, Merged-2B", CLIP_MEAN,
            CLIP_STD,
        ),
        "vit_so400m_patch14_siglip_384.webli": timm_spec(
            "vit_so400m_patch14_siglip_384.webli", 1152, 14, 378, "apache-2.0", "image-text sigmoid loss, WebLI", HALF,
            HALF,
        ),
        "convnext_large_mlp.clip_laion2b_ft_soup_320": timm_spec(
            "convnext_large_mlp.clip_laion2b_ft_soup_320", 1536, 32, 320, "apache-2.0", "image-text contrast, LAION-2B",
            CLIP_MEAN, CLIP_STD,
        ),
    }  # fmt: skip

    packages: ClassVar = ("timm",)

    final_norm: bool = False

    def check_variant(self) -> None:
        if self.variant not in self.specs:
            spec_from_timm(self.variant)

    def check_architecture(self) -> None:
        if self.architecture:
            try:
                _ = self.shape_facts
            except (TypeError, RuntimeError, AssertionError) as error:
                raise ValueError(f"architecture of timm '{self.variant}' is refused ({error})") from error

    @property
    def spec(self) -> ExpertSpec:
        return self.specs[self.variant] if self.variant in self.specs else spec_from_timm(self.variant)

    @property
    def arguments(self) -> str:
        """`architecture` as JSON."""
        return json.dumps(self.architecture, sort_keys=True)

    @property
    def shape_facts(self) -> tuple[int, int, tuple[str, ...]]:
        """Channels, stride and the keys of heads, with this config's architecture."""
        return timm_facts(self.variant, self.arguments)

    @property
    def native_size(self) -> tuple[int, int]:
        if not self.architecture:
            return self.spec.image_size
        given = self.architecture.get("img_size", self.spec.image_size)
        height, width = (given, given) if isinstance(given, int) else given
        return (timm_side(self.variant, self.arguments, height), timm_side(self.variant, self.arguments, width))

    @property
    def channels(self) -> int:
        return self.shape_facts[0] if self.architecture else self.spec.channels

    @property
    def stride_px(self) -> int:
        return self.shape_facts[1] if self.architecture else self.spec.stride_px

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError, naming a size that fits, where the model itself refuses `size`."""
        found = self.map_at(size) if min(size) > 0 else "there is no such size"
        if not isinstance(found, str):
            return
        near = nearest_multiple(size, self.stride_px)
        fits = next((s for s in (near, self.native_size) if not isinstance(self.map_at(s), str)), None)
        hint = (
            f"the nearest that fits is {list(fits)}" if fits == near else f"it takes {list(fits or self.native_size)}"
        )
        raise ValueError(f"image_size {list(size)} of timm '{self.variant}' is refused by the model ({found}); {hint}")

    def map_at(self, size: tuple[int, int]) -> tuple[int, int, int] | str:
        """Channels, rows and columns of the map of an input of `size`, or why the model refuses that size."""
        return timm_map(self.variant, self.arguments, size)

    def shape_at(self, size: tuple[int, int]) -> MapShape:
        self.check_size(size)
        found = self.map_at(size)
        assert not isinstance(found, str)  # check_size refused it
        return MapShape(found[0], (found[1], found[2]))

    def left_out(self) -> tuple[str, ...]:
        return tuple(f"timm_model.{key}" for key in self.shape_facts[2])

    def build(self) -> "TimmExpert":
        return TimmExpert(self)


class TimmExpert(Expert):
    config: TimmConfig

    def __init__(self, config: TimmConfig) -> None:
        super().__init__(config)
        arguments = timm_arguments(config.variant, dict(config.architecture))
        # By way of the Auto classes: importing the wrapper's own imports timm, which only this family needs.
        library = AutoConfig.for_model("timm_wrapper", architecture=config.variant, model_args=arguments)
        self.model = AutoModel.from_config(library)
        prune(self.model.timm_model, config.variant, config.final_norm)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, h, w], the grid that `shape_at` says."""
        return last_map(self.model.timm_model, pixels, self.config.final_norm)
