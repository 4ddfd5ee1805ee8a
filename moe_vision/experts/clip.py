"""CLIP's vision transformer (Radford et al., 2021), on transformers' `CLIPVisionModel`.

Every patch token of the chosen layer is kept and the class token dropped, as LLaVA does. Layers above the chosen one
are not built: they would be unused parameters.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from moe_vision.experts.base import CLIP_MEAN, CLIP_STD, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.registry import EXPERTS


@EXPERTS.register("clip")
@dataclass(frozen=True, kw_only=True)
class ClipConfig(ExpertConfig):
    """layer: which hidden state to take, counted from the end (-1 is the last layer's output)."""

    specs: ClassVar = {
        "vit_large_patch14_336": ExpertSpec(
            hub_id="openai/clip-vit-large-patch14-336",
            revision="main",
            licence="mit",
            channels=1024,
            stride_px=14,
            image_size=(336, 336),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            pretraining="image-text contrast, 400M pairs",
            architecture={
                "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
                "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu",
            },
            key_prefix="vision_model.",
            optional_keys=("embeddings.position_ids", "post_layernorm.", "text_model.", "logit_scale",
                           "visual_projection.", "text_projection.", "text_embeds."),
        ),
        "micro": micro_spec(
            "clip", channels=64, stride_px=16, size_px=64, pretraining="image-text contrast on generated scenes",
            architecture={
                "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256,
                "image_size": 64, "patch_size": 16, "hidden_act": "quick_gelu",
            },
        ),
    }  # fmt: skip

    layer: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        depth = self.spec.architecture["num_hidden_layers"]
        if not -depth <= self.layer <= -1:
            raise ValueError(f"layer {self.layer} of clip '{self.variant}': choose from {-depth} to -1")

    def build(self) -> "ClipExpert":
        return ClipExpert(self)


class ClipExpert(Expert):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        architecture = dict(config.spec.architecture)
        architecture["num_hidden_layers"] += 1 + config.layer
        self.model = CLIPVisionModel(CLIPVisionConfig(**architecture))
        self.model.post_layernorm = nn.Identity()  # type: ignore[assignment]  # belongs to the pooled output, which nobody reads here

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / patch, W / patch]; position embeddings are interpolated where the size differs."""
        height, width = self.config.shape.grid
        interpolate = self.config.size != self.config.spec.image_size
        tokens = self.model(pixels, interpolate_pos_encoding=interpolate).last_hidden_state[:, 1:]
        return tokens.transpose(1, 2).unflatten(2, (height, width))
