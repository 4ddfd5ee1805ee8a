"""Tell transformers' Auto classes about the installed package, so that its folders load without remote code."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from moe_vision.modeling.bundle import write_bundle
from moe_vision.modeling.configuration_moe_vision import MoeVisionConfig, MoeVisionVisionConfig
from moe_vision.modeling.image_processing_moe_vision import MoeVisionImageProcessor
from moe_vision.modeling.modeling_moe_vision import MoeVisionForConditionalGeneration, MoeVisionModel
from moe_vision.modeling.processing_moe_vision import MoeVisionProcessor


def register_auto_classes() -> None:
    """Idempotent: `exist_ok` lets a module that was imported twice register twice."""
    AutoConfig.register(MoeVisionVisionConfig.model_type, MoeVisionVisionConfig, exist_ok=True)
    AutoConfig.register(MoeVisionConfig.model_type, MoeVisionConfig, exist_ok=True)
    AutoModel.register(MoeVisionConfig, MoeVisionModel, exist_ok=True)
    AutoModelForImageTextToText.register(MoeVisionConfig, MoeVisionForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(MoeVisionConfig, MoeVisionForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(MoeVisionConfig, MoeVisionProcessor, exist_ok=True)
    AutoImageProcessor.register(
        MoeVisionConfig, image_processor_classes={"torchvision": MoeVisionImageProcessor}, exist_ok=True
    )
    for cls in (MoeVisionConfig, MoeVisionImageProcessor, MoeVisionProcessor):
        cls.write_code = write_bundle
