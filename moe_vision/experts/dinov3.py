"""DINOv3 (Siméoni et al., 2025), self-supervised, on transformers' `DINOv3ViTModel`, at any size."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from moe_vision.experts.base import IMAGENET_MEAN, IMAGENET_STD, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.registry import EXPERTS


def dinov3_spec(name: str, **architecture: Any) -> ExpertSpec:
    """Facts of one checkpoint of facebook/dinov3-NAME-pretrain-lvd1689m."""
    return ExpertSpec(
        hub_id=f"facebook/dinov3-{name}-pretrain-lvd1689m",
        revision="main",
        licence="dinov3-license",
        channels=architecture["hidden_size"],
        stride_px=16,
        image_size=(512, 512),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        pretraining="self-distillation, 1.7G web images",
        # Pre-training rescaled positions at random, an augmentation that the library repeats in training mode.
        architecture={"patch_size": 16, "num_register_tokens": 4, "pos_embed_rescale": None, **architecture},
        # Rotary frequencies are made anew.
        optional_keys=("rope_embeddings.",),
    )


@EXPERTS.register("dinov3")
@dataclass(frozen=True, kw_only=True)
class DinoV3Config(ExpertConfig):
    """Class and register tokens run along and are dropped at the end; the final norm is applied."""

    library: ClassVar = DINOv3ViTConfig
    specs: ClassVar = {
        "vits16": dinov3_spec(
            "vits16", hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
        ),
        "vitb16": dinov3_spec(
            "vitb16", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
        ),
        "vitl16": dinov3_spec(
            "vitl16", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ),
        "vith16plus": dinov3_spec(
            "vith16plus", hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, intermediate_size=5120,
            hidden_act="silu", use_gated_mlp=True,
        ),
        "micro": micro_spec(
            "dinov3", channels=64, stride_px=16, size_px=128, pretraining="self-distillation on generated scenes",
            architecture={
                "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256,
                "patch_size": 16, "num_register_tokens": 4, "pos_embed_rescale": None, "layerscale_value": 1.0,
            },
        ),
    }  # fmt: skip

    @property
    def channels(self) -> int:
        return self.settings["hidden_size"]

    @property
    def stride_px(self) -> int:
        return self.settings["patch_size"]

    def left_out(self) -> tuple[str, ...]:
        return ("embeddings.mask_token",)

    def build(self) -> "DinoV3Expert":
        return DinoV3Expert(self)


class DinoV3Tokens(nn.Module):
    """DINOv3's embeddings without the token for masked pixels, which only pre-training reads."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.cls_token, self.register_tokens = embeddings.cls_token, embeddings.register_tokens
        self.patch_embeddings = embeddings.patch_embeddings

    def forward(self, pixels: torch.Tensor, bool_masked_pos: None = None) -> torch.Tensor:
        """[V, 3, H, W] → [V, 1 + registers + h * w, C]."""
        patches = self.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        first = torch.cat([self.cls_token, self.register_tokens], dim=1).expand(len(pixels), -1, -1)
        return torch.cat([first, patches], dim=1)


class DinoV3Expert(Expert):
    def __init__(self, config: DinoV3Config) -> None:
        super().__init__(config)
        self.model = DINOv3ViTModel(DINOv3ViTConfig(**config.settings))
        self.model.embeddings = DinoV3Tokens(self.model.embeddings)  # type: ignore[assignment]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / 16, W / 16]."""
        grid = (pixels.shape[2] // self.config.stride_px, pixels.shape[3] // self.config.stride_px)
        tokens = self.model(pixels).last_hidden_state[:, -grid[0] * grid[1] :]
        return tokens.transpose(1, 2).unflatten(2, grid)
