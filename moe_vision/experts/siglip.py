"""SigLIP and SigLIP 2 (Zhai et al., 2023; Tschannen et al., 2025), on transformers' `SiglipVisionModel`.

There is no class token. The pooling head is not built; layers above the chosen one are not built either.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from moe_vision.experts.base import HALF, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.experts.injection import with_injection
from moe_vision.experts.resolution import PositionFilter, resize_positions
from moe_vision.registry import EXPERTS
from moe_vision.types import Injection

SIGLIP_SIZES: dict[str, dict[str, Any]] = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "so400m": {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304},
}


def siglip_spec(generation: str, size: str, patch_size: int, trained_at: int) -> ExpertSpec:
    """Facts of one checkpoint of google/siglip…-SIZE-patchP-RESOLUTION."""
    # 384 is no multiple of 14: the patching drops the last 6 pixels, and 378 gives the same grid without.
    side = trained_at // patch_size * patch_size
    return ExpertSpec(
        hub_id=f"google/{generation}-{size}-patch{patch_size}-{trained_at}",
        revision="main",
        licence="apache-2.0",
        channels=SIGLIP_SIZES[size]["hidden_size"],
        stride_px=patch_size,
        image_size=(side, side),
        mean=HALF,
        std=HALF,
        pretraining="image-text sigmoid loss, WebLI"
        + ("; captions, self-distillation" if generation[-1] == "2" else ""),
        architecture={**SIGLIP_SIZES[size], "image_size": trained_at, "patch_size": patch_size},
        key_prefix="vision_model.",
        optional_keys=("embeddings.position_ids",),
    )


@EXPERTS.register("siglip")
@dataclass(frozen=True, kw_only=True)
class SiglipConfig(ExpertConfig):
    """layer: which hidden state to take, counted from the end. final_norm: apply the norm after the last layer to it.

    antialias_positions, position_filter: of the interpolation of position embeddings. OryxViT (Liu et al., 2024), whose
    weights continue SigLIP's, has no final norm and interpolates bilinearly without antialias.
    """

    library: ClassVar = SiglipVisionConfig
    specs: ClassVar = {
        "v2_so400m_patch14_384": siglip_spec("siglip2", "so400m", 14, 384),
        "v2_so400m_patch16_512": siglip_spec("siglip2", "so400m", 16, 512),
        "v2_large_patch16_512": siglip_spec("siglip2", "large", 16, 512),
        "v2_base_patch16_512": siglip_spec("siglip2", "base", 16, 512),
        "so400m_patch14_384": siglip_spec("siglip", "so400m", 14, 384),
        "micro": micro_spec(
            "siglip", channels=64, stride_px=16, size_px=128, pretraining="image-text sigmoid loss on generated scenes",
            architecture={
                "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256,
                "image_size": 128, "patch_size": 16,
            },
        ),
    }  # fmt: skip

    layer: int = -1
    final_norm: bool = True
    antialias_positions: bool = True
    position_filter: PositionFilter = "bicubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        depth = self.settings["num_hidden_layers"]
        if not -depth <= self.layer <= -1:
            raise ValueError(f"layer {self.layer} of siglip '{self.variant}': choose from {-depth} to -1")

    @property
    def native_size(self) -> tuple[int, int]:
        side = self.settings["image_size"] // self.stride_px * self.stride_px
        return (side, side)

    @property
    def channels(self) -> int:
        return self.settings["hidden_size"]

    @property
    def stride_px(self) -> int:
        return self.settings["patch_size"]

    @property
    def num_blocks(self) -> int:
        return self.settings["num_hidden_layers"] + 1 + self.layer

    def left_out(self) -> tuple[str, ...]:
        depth = self.settings["num_hidden_layers"]
        above = tuple(f"encoder.layers.{i}." for i in range(depth + 1 + self.layer, depth))
        return ("head.", *above, *(() if self.final_norm else ("post_layernorm.",)))

    def build(self) -> "SiglipExpert":
        return SiglipExpert(self)


class SiglipExpert(Expert):
    config: SiglipConfig

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__(config)
        depth = config.settings["num_hidden_layers"] + 1 + config.layer
        settings = {**config.settings, "num_hidden_layers": depth, "vision_use_head": False}
        self.model = SiglipVisionModel(SiglipVisionConfig(**settings))
        if not config.final_norm:
            self.model.post_layernorm = nn.Identity()  # type: ignore[assignment]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / patch, W / patch]."""
        return self.encode_with(pixels, None)

    def encode_with(self, pixels: torch.Tensor, inject: Injection | None) -> torch.Tensor:
        model: Any = self.model
        patches = model.embeddings.patch_embedding(pixels)
        grid = (patches.shape[2], patches.shape[3])
        side = self.config.native_size[0] // self.config.stride_px
        table = model.embeddings.position_embedding.weight.view(1, side, side, -1)
        places = resize_positions(table, grid, self.config.antialias_positions, self.config.position_filter)
        tokens = patches.flatten(2).transpose(1, 2) + places.flatten(1, 2)
        if inject is None:
            tokens = model.encoder(inputs_embeds=tokens).last_hidden_state
        else:
            tokens = with_injection(model.encoder.layers, tokens, grid, inject)
        return model.post_layernorm(tokens).transpose(1, 2).unflatten(2, grid)
