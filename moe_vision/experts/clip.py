"""CLIP's vision transformer (Radford et al., 2021), on transformers' `CLIPVisionModel`.

Every patch token of the chosen layer is kept and the class token dropped, as LLaVA does. Layers above the chosen one
are not built: they would be unused parameters.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from moe_vision.experts.base import CLIP_MEAN, CLIP_STD, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.experts.injection import with_injection
from moe_vision.experts.resolution import resize_positions
from moe_vision.registry import EXPERTS
from moe_vision.types import Injection


@EXPERTS.register("clip")
@dataclass(frozen=True, kw_only=True)
class ClipConfig(ExpertConfig):
    """layer: which hidden state to take, counted from the end (-1 is the last layer's output).

    class_token: whether it runs along through the blocks; Eagle takes it out before them. antialias_positions: of the
    interpolation of position embeddings; true in timm, open_clip and Eagle, false in transformers.
    """

    library: ClassVar = CLIPVisionConfig
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
            optional_keys=("embeddings.position_ids",),
        ),
        "vit_large_patch14_224": ExpertSpec(
            hub_id="openai/clip-vit-large-patch14",
            revision="main",
            licence="mit",
            channels=1024,
            stride_px=14,
            image_size=(224, 224),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            pretraining="image-text contrast, 400M pairs",
            architecture={
                "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
                "image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu",
            },
            key_prefix="vision_model.",
            optional_keys=("embeddings.position_ids",),
        ),
        "vit_base_patch16_224": ExpertSpec(
            hub_id="openai/clip-vit-base-patch16",
            revision="main",
            licence="mit",
            channels=768,
            stride_px=16,
            image_size=(224, 224),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            pretraining="image-text contrast, 400M pairs",
            architecture={
                "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
                "image_size": 224, "patch_size": 16, "hidden_act": "quick_gelu",
            },
            key_prefix="vision_model.",
            optional_keys=("embeddings.position_ids",),
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
    class_token: bool = True
    antialias_positions: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        depth = self.settings["num_hidden_layers"]
        if not -depth <= self.layer <= -1:
            raise ValueError(f"layer {self.layer} of clip '{self.variant}': choose from {-depth} to -1")

    @property
    def native_size(self) -> tuple[int, int]:
        return (self.settings["image_size"], self.settings["image_size"])

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
        return ("post_layernorm.", *above, *(() if self.class_token else ("embeddings.class_embedding",)))

    def build(self) -> "ClipExpert":
        return ClipExpert(self)


class PatchesOnly(nn.Module):
    """What is left of CLIP's embeddings without the class token; the library's class insists on one."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.patch_embedding = embeddings.patch_embedding
        self.position_embedding = embeddings.position_embedding


class ClipExpert(Expert):
    config: ClipConfig

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        depth = config.settings["num_hidden_layers"] + 1 + config.layer
        self.model = CLIPVisionModel(CLIPVisionConfig(**{**config.settings, "num_hidden_layers": depth}))
        self.model.post_layernorm = nn.Identity()  # type: ignore[assignment]  # belongs to the pooled output, which nobody reads here
        if not config.class_token:
            self.model.embeddings = PatchesOnly(self.model.embeddings)  # type: ignore[assignment]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / patch, W / patch]."""
        return self.encode_with(pixels, None)

    def encode_with(self, pixels: torch.Tensor, inject: Injection | None) -> torch.Tensor:
        model: Any = self.model
        embeddings, encoder = model.embeddings, model.encoder
        patches = embeddings.patch_embedding(pixels)
        grid = (patches.shape[2], patches.shape[3])
        table = embeddings.position_embedding.weight
        side = self.config.native_size[0] // self.config.stride_px
        places = resize_positions(table[1:].view(1, side, side, -1), grid, self.config.antialias_positions)
        tokens = patches.flatten(2).transpose(1, 2) + places.flatten(1, 2)
        if self.config.class_token:
            first = (embeddings.class_embedding + table[0]).expand(len(tokens), 1, -1)
            tokens = torch.cat([first, tokens], dim=1)
        tokens = model.pre_layrnorm(tokens)
        if inject is None:
            tokens = encoder(inputs_embeds=tokens).last_hidden_state
        else:
            tokens = with_injection(encoder.layers, tokens, grid, inject)
        return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
