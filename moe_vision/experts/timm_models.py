"""Any model of timm, by its own name, through transformers' `TimmWrapperModel`; EVA-02's classification and CLIP models
among them.

timm stays a dependency of a model that is exported with such an expert.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModel

from moe_vision.experts.base import CLIP_MEAN, CLIP_STD, HALF, Expert, ExpertConfig, ExpertSpec
from moe_vision.registry import EXPERTS, suggest


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
    channels, stride, _ = timm_shape(name, "{}", side)
    return timm_spec(
        name, channels, stride, side // stride * stride, facts.license or "see the model card",
        facts.tag or "see the model card", tuple(facts.mean), tuple(facts.std),
    )  # fmt: skip


@lru_cache
def timm_shape(name: str, arguments: str, side: int) -> tuple[int, int, tuple[str, ...]]:
    """Channels and stride of the last feature map, and the keys that only heads have; built on the meta device."""
    timm = timm_library()
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name, pretrained=False, **timm_arguments(name, json.loads(arguments)))
        whole = set(model.state_dict())
        prune(model, final_norm=False)
        patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))[0]
        side = side // patch_size * patch_size  # 384 is no multiple of 14
        feature_map = last_map(model, torch.empty(1, 3, side, side), final_norm=False)
    return feature_map.shape[1], round(side / feature_map.shape[2]), tuple(sorted(whole - set(model.state_dict())))


def timm_arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `timm.create_model`: transformers that can are told to take any size."""
    module = timm_library().models._registry._model_entrypoints[name.split(".")[0]].__module__
    flexible = module.rsplit(".", 1)[-1] in ("vision_transformer", "eva", "deit", "beit")
    return {**({"dynamic_img_size": True} if flexible else {}), **given}


def prune(model: Any, final_norm: bool) -> None:
    """Take off what no feature map needs."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"timm's {type(model).__name__} gives no feature maps (it has no forward_intermediates)")
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
    def shape_facts(self) -> tuple[int, int, tuple[str, ...]]:
        """Channels, stride and the keys of heads, with this config's architecture."""
        return timm_shape(self.variant, json.dumps(self.architecture, sort_keys=True), self.trained_at)

    @property
    def trained_at(self) -> int:
        return self.architecture.get("img_size", self.spec.image_size[0])

    @property
    def native_size(self) -> tuple[int, int]:
        side = self.trained_at // self.stride_px * self.stride_px
        return (side, side)

    @property
    def channels(self) -> int:
        return self.shape_facts[0] if self.architecture else self.spec.channels

    @property
    def stride_px(self) -> int:
        return self.shape_facts[1] if self.architecture else self.spec.stride_px

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
        prune(self.model.timm_model, config.final_norm)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / stride, W / stride]."""
        return last_map(self.model.timm_model, pixels, self.config.final_norm)
