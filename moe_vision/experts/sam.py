"""SAM's image encoder with its neck (Kirillov et al., 2023), on transformers' `SamVisionModel`, at any size.

Layers and weights are the library's; its attention is replaced by an equal one that makes no relative-position bias.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import SamVisionConfig, SamVisionModel
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionNeck

from moe_vision.experts.base import IMAGENET_MEAN, IMAGENET_STD, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.experts.resolution import resize_positions
from moe_vision.registry import EXPERTS


@EXPERTS.register("sam")
@dataclass(frozen=True, kw_only=True)
class SamConfig(ExpertConfig):
    """neck: SAM's own, or Eagle's short one. antialias_positions: of absolute positions at another size, as in timm."""

    library: ClassVar = SamVisionConfig
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
        "vit_base": ExpertSpec(
            hub_id="facebook/sam-vit-base",
            revision="main",
            licence="apache-2.0",
            channels=256,
            stride_px=16,
            image_size=(1024, 1024),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            pretraining="promptable segmentation, SA-1B",
            architecture={
                "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_dim": 3072,
                "image_size": 1024, "window_size": 14, "global_attn_indexes": [2, 5, 8, 11],
            },
            optional_keys=("shared_image_embedding.", "prompt_encoder.", "mask_decoder."),
        ),
        "vit_huge": ExpertSpec(
            hub_id="facebook/sam-vit-huge",
            revision="main",
            licence="apache-2.0",
            channels=256,
            stride_px=16,
            image_size=(1024, 1024),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            pretraining="promptable segmentation, SA-1B",
            architecture={
                "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120,
                "image_size": 1024, "window_size": 14, "global_attn_indexes": [7, 15, 23, 31],
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

    neck: Literal["full", "short"] = "full"
    antialias_positions: bool = True

    @property
    def native_size(self) -> tuple[int, int]:
        return (self.settings["image_size"], self.settings["image_size"])

    @property
    def channels(self) -> int:
        return self.settings.get("output_channels", 256)

    def left_out(self) -> tuple[str, ...]:
        neck = "vision_encoder.neck."
        return (f"{neck}conv2.", f"{neck}layer_norm2.") if self.neck == "short" else ()

    def build(self) -> "SamExpert":
        return SamExpert(self)


CACHED_BIAS, BIAS = 2**22, 2**27
"""Elements of relative-position bias that are held at a time: what a CPU's cache keeps, what keeps a GPU busy."""


class SamAttention(SamVisionAttention):
    """SAM's attention in pieces, each with a fused kernel and its own part of the relative-position bias.

    The library makes the bias of all queries at once, gigabytes at 1024 pixels. With gradients each piece is
    recomputed in the backward pass, for the same reason.
    """

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool | None = None) -> tuple[torch.Tensor, Any]:
        """[windows, h, w, C] → [windows, h, w, C]."""
        windows, height, width, _ = hidden_states.shape
        tokens = height * width
        qkv = self.qkv(hidden_states).view(windows, tokens, 3, self.num_attention_heads, -1)
        # [windows * heads, 1, tokens, head_dim] each: pieces may cut between heads, whose keys then stay in the cache.
        query, key, value = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).unsqueeze(2).unbind(0)
        at = query.squeeze(1).unflatten(1, (height, width))
        rows = torch.einsum("nhwc,hkc->nhwk", at, self.relative(self.rel_pos_h, height)).flatten(1, 2).unsqueeze(1)
        columns = torch.einsum("nhwc,wkc->nhwk", at, self.relative(self.rel_pos_w, width)).flatten(1, 2).unsqueeze(1)
        queries = max(1, self.bias_elements(query.device) // tokens)
        together = max(1, queries // tokens)  # heads in one piece
        mixed = []
        for i in range(0, len(query), together):
            some = slice(i, i + together)
            parts = [
                self.piece(query[some, :, j], rows[some, :, j], columns[some, :, j], key[some], value[some])
                for j in (slice(start, start + queries) for start in range(0, tokens, queries))
            ]
            mixed.append(torch.cat(parts, dim=2))
        joined = torch.cat(mixed).view(windows, self.num_attention_heads, tokens, -1).transpose(1, 2).flatten(2)
        return self.proj(joined.unflatten(1, (height, width))), None

    @staticmethod
    def bias_elements(device: torch.device) -> int:
        return CACHED_BIAS if device.type == "cpu" else BIAS

    def piece(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Attention of some queries on all keys of their windows; inputs as `attend` takes them."""
        if torch.is_grad_enabled() and inputs[0].requires_grad:
            recomputed: torch.Tensor = checkpoint(attend, *inputs, use_reentrant=False)
            return recomputed
        return attend(*inputs)

    def relative(self, table: torch.Tensor, side: int) -> torch.Tensor:
        """Embeddings [side, side, head_dim] of the distance from each query to each key, interpolated if need be."""
        length = 2 * side - 1
        if len(table) != length:
            table = F.interpolate(table.float().t()[None], size=length, mode="linear")[0].t().to(table.dtype)
        places = torch.arange(side, device=table.device)
        return table[places[:, None] - places[None, :] + side - 1]


def attend(
    query: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Attention [..., queries, head_dim] with the bias rows [..., queries, h] + columns [..., queries, w]."""
    bias = (rows[..., :, None] + columns[..., None, :]).flatten(-2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


class ShortNeck(nn.Module):
    """Eagle's cut of SAM's neck: the 1x1 convolution and its norm, without the 3x3 convolution after it."""

    def __init__(self, neck: SamVisionNeck) -> None:
        super().__init__()
        self.conv1, self.layer_norm1 = neck.conv1, neck.layer_norm1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[V, h, w, C] → [V, C', h, w]."""
        return self.layer_norm1(self.conv1(x.permute(0, 3, 1, 2)))


class SamExpert(Expert):
    config: SamConfig

    def __init__(self, config: SamConfig) -> None:
        super().__init__(config)
        library = SamVisionConfig(**config.settings)
        self.model = SamVisionModel(library)
        encoder: Any = self.model.vision_encoder
        for layer in encoder.layers:
            attention = SamAttention(library, layer.window_size)
            attention.load_state_dict(layer.attn.state_dict(), assign=True)
            layer.attn = attention
        if config.neck == "short":
            encoder.neck = ShortNeck(encoder.neck)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / 16, W / 16], after the neck."""
        encoder: Any = self.model.vision_encoder
        # The convolution itself: the library's own patch embedding refuses every size but one.
        x = encoder.patch_embed.projection(pixels).permute(0, 2, 3, 1)
        x = x + resize_positions(encoder.pos_embed, (x.shape[1], x.shape[2]), self.config.antialias_positions)
        for layer in encoder.layers:
            x = layer(x)
        return encoder.neck(x)
