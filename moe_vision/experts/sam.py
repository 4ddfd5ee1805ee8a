"""SAM's image encoder with its neck (Kirillov et al., 2023), on transformers' `SamVisionModel` at a fixed size."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import SamVisionConfig, SamVisionModel

from moe_vision.experts.base import IMAGENET_MEAN, IMAGENET_STD, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.registry import EXPERTS


@EXPERTS.register("sam")
@dataclass(frozen=True, kw_only=True)
class SamConfig(ExpertConfig):
    specs: ClassVar = {
        "vit_large": ExpertSpec(
            hub_id="facebook/sam-vit-large",
            revision="main",
            licence="apache-2.0",
            channels=256,
            stride_px=16,
            image_size=(1024, 1024),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            pretraining="promptable segmentation, SA-1B",
            architecture={
                "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_dim": 4096,
                "image_size": 1024, "window_size": 14, "global_attn_indexes": [5, 11, 17, 23],
            },
            optional_keys=("shared_image_embedding.", "prompt_encoder.", "mask_decoder."),
        ),
        "micro": micro_spec(
            "sam", channels=64, stride_px=16, size_px=128, pretraining="foreground masks of generated scenes",
            architecture={
                "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_dim": 256, "image_size": 128,
                "window_size": 4, "global_attn_indexes": [2], "output_channels": 64,
            },
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size != self.spec.image_size:
            raise ValueError(
                f"image_size {list(self.size)} of sam '{self.variant}': its relative positions fit "
                f"{list(self.spec.image_size)} only; leave image_size out"
            )

    def build(self) -> "SamExpert":
        return SamExpert(self)


class SamExpert(Expert):
    def __init__(self, config: SamConfig) -> None:
        super().__init__(config)
        self.model = SamVisionModel(SamVisionConfig(**config.spec.architecture))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / 16, W / 16], after the neck."""
        return self.model(pixels).last_hidden_state
