"""Pix2Struct's encoder (Lee et al., 2023), trained to parse screenshots, on transformers' `Pix2StructVisionModel`.

Patching happens here and not in a numpy processor: statistics of the whole image first, then resize, then patches with
their 1-based row and column before the pixels, equal to the published processor on unpadded input.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import Pix2StructVisionConfig, Pix2StructVisionModel

from moe_vision.experts.base import HALF, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.registry import EXPERTS


@EXPERTS.register("pix2struct")
@dataclass(frozen=True, kw_only=True)
class Pix2StructConfig(ExpertConfig):
    library: ClassVar = Pix2StructVisionConfig
    specs: ClassVar = {
        "large": ExpertSpec(
            hub_id="google/pix2struct-large",
            revision="main",
            licence="apache-2.0",
            channels=1536,
            stride_px=16,
            image_size=(720, 720),
            mean=HALF,
            std=HALF,
            pretraining="screenshot parsing",
            architecture={
                "hidden_size": 1536, "num_hidden_layers": 18, "num_attention_heads": 24, "d_kv": 64, "d_ff": 3968,
                "patch_embed_hidden_size": 768, "seq_len": 4096,
            },
            key_prefix="encoder.",
            optional_keys=("decoder.",),
        ),
        "base": ExpertSpec(
            hub_id="google/pix2struct-base",
            revision="main",
            licence="apache-2.0",
            channels=768,
            stride_px=16,
            image_size=(720, 720),
            mean=HALF,
            std=HALF,
            pretraining="screenshot parsing",
            architecture={
                "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "d_kv": 64, "d_ff": 2048,
                "patch_embed_hidden_size": 768, "seq_len": 4096,
            },
            key_prefix="encoder.",
            optional_keys=("decoder.",),
        ),
        "micro": micro_spec(
            "pix2struct", channels=96, stride_px=16, size_px=128, pretraining="digits and bars of generated scenes",
            architecture={
                "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "d_kv": 24, "d_ff": 192,
                "patch_embed_hidden_size": 768, "seq_len": 64, "initializer_range": 0.02,
            },
        ),
    }  # fmt: skip

    def check_size(self, size: tuple[int, int]) -> None:
        super().check_size(size)
        longest = (self.settings["seq_len"] - 1) * self.stride_px  # place 0 stands for padding
        if max(size) > longest:
            raise ValueError(
                f"image_size {list(size)} of pix2struct '{self.variant}' has more rows or columns than it has "
                f"embeddings for: at most {longest} px a side"
            )

    @property
    def channels(self) -> int:
        return self.settings["hidden_size"]

    def build(self) -> "Pix2StructExpert":
        return Pix2StructExpert(self)


class Pix2StructExpert(Expert):
    model: Pix2StructVisionModel

    def __init__(self, config: Pix2StructConfig) -> None:
        super().__init__(config)
        self.model = Pix2StructVisionModel(Pix2StructVisionConfig(**config.settings))

    def pixels(self, views: torch.Tensor) -> torch.Tensor:
        """Statistics per image come before the resize, as the published processor has it."""
        return self.resize(self.normalise(views))

    def normalise(self, views: torch.Tensor) -> torch.Tensor:
        """Standardise each image over all its pixels and channels; flat images divide by 1 / sqrt(pixels)."""
        dims = (1, 2, 3)
        mean = views.mean(dims, keepdim=True)
        # The floor is defined on 0..255 pixels, ours are in 0..1.
        floor = 1.0 / (views[0].numel() ** 0.5 * 255.0)
        std = views.std(dims, keepdim=True, unbiased=False).clamp(min=floor)
        return (views - mean) / std

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / 16, W / 16]."""
        patch = self.config.stride_px
        height, width = pixels.shape[2] // patch, pixels.shape[3] // patch
        blocks = pixels.unflatten(3, (width, patch)).unflatten(2, (height, patch))  # [V, 3, h, patch, w, patch]
        patches = blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # pixels row by row, channels last
        rows = torch.arange(1, height + 1, device=pixels.device).repeat_interleave(width)
        columns = torch.arange(1, width + 1, device=pixels.device).repeat(height)
        positions = torch.stack([rows, columns], dim=-1).to(pixels.dtype).expand(len(pixels), -1, -1)
        flattened = torch.cat([positions, patches], dim=-1)
        # No patch is padding, so the model's own forward, which builds a mask from the pixels, has nothing to add.
        hidden = self.model.encoder(self.model.embeddings(flattened), attention_mask=None).last_hidden_state
        tokens = self.model.layernorm(hidden)
        return tokens.transpose(1, 2).unflatten(2, (height, width))
