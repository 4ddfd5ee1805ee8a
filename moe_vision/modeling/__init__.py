"""The fused model as transformers knows models: config, processor, image processor and model.

The classes are resolved on first use, and transformers' Auto classes are told about them then: validating a config and
counting its cost need neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_vision.modeling.configuration_moe_vision import MoeVisionConfig, MoeVisionVisionConfig
    from moe_vision.modeling.image_processing_moe_vision import MoeVisionImageProcessor
    from moe_vision.modeling.modeling_moe_vision import MoeVisionForConditionalGeneration, MoeVisionModel
    from moe_vision.modeling.processing_moe_vision import MoeVisionProcessor

_HOMES = {
    "MoeVisionConfig": "configuration_moe_vision",
    "MoeVisionForConditionalGeneration": "modeling_moe_vision",
    "MoeVisionImageProcessor": "image_processing_moe_vision",
    "MoeVisionModel": "modeling_moe_vision",
    "MoeVisionProcessor": "processing_moe_vision",
    "MoeVisionVisionConfig": "configuration_moe_vision",
}

__all__ = [
    "MoeVisionConfig", "MoeVisionForConditionalGeneration", "MoeVisionImageProcessor", "MoeVisionModel",
    "MoeVisionProcessor", "MoeVisionVisionConfig",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_vision.modeling' has no attribute '{name}'")
    importlib.import_module("moe_vision.modeling.register").register_auto_classes()
    return getattr(importlib.import_module(f"moe_vision.modeling.{_HOMES[name]}"), name)
