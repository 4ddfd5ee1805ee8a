"""EVA-02's detection backbone (Fang et al., 2023; ViTDet of Li et al., 2022), which no library has.

Windowed and global blocks, no class token, pre-norm, SwiGLU with an inner norm, rotary positions in two dimensions.
Module names are those of the public checkpoint `eva02_L_coco_det_sys_o365`, so that its keys fit after a prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_vision.experts.base import CLIP_MEAN, CLIP_STD, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.experts.resolution import resize_positions
from moe_vision.registry import EXPERTS
from moe_vision.types import Injection


@EXPERTS.register("eva02")
@dataclass(frozen=True, kw_only=True)
class Eva02Config(ExpertConfig):
    specs: ClassVar = {
        "large_coco_det": ExpertSpec(
            hub_id="Yuxin-CV/EVA-02",
            revision="main",
            licence="mit",
            channels=1024,
            stride_px=16,
            image_size=(1024, 1024),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            pretraining="detection, Objects365 and COCO",
            architecture={"hidden_size": 1024, "depth": 24, "num_heads": 16, "window_size": 16,
                          "global_blocks": [2, 5, 8, 11, 14, 17, 20, 23], "position_grid": 14, "rope_reference": 16},
            filename="eva02/det/eva02_L_coco_det_sys_o365.pth",
            key_prefix="backbone.net.",
        ),
        "micro": micro_spec(
            "eva02", channels=64, stride_px=16, size_px=128, pretraining="objects of generated scenes, cell by cell",
            architecture={"hidden_size": 64, "depth": 3, "num_heads": 4, "window_size": 4, "global_blocks": [2],
                          "position_grid": 8, "rope_reference": 4},
        ),
    }  # fmt: skip

    def architecture_names(self) -> set[str]:
        return {"hidden_size", "depth", "num_heads", "window_size", "global_blocks", "position_grid", "rope_reference"}

    def left_out(self) -> tuple[str, ...]:
        """Tables of the rotary positions, which are made anew; published checkpoints hold them in every block."""
        return ("rope_win.", "rope_glb.", *(f"blocks.{i}.attn.rope." for i in range(self.settings["depth"])))

    @property
    def channels(self) -> int:
        return self.settings["hidden_size"]

    @property
    def num_blocks(self) -> int:
        return self.settings["depth"]

    def build(self) -> "Eva02Expert":
        return Eva02Expert(self)


Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [tokens, head_dim] of a rotary embedding."""


def rotation(window: tuple[int, int], head_dim: int, reference: int, like: torch.Tensor) -> Rotation:
    """A 2-D rotary embedding of a window (height, width): rows in the first half of a head, columns in the second.

    Coordinates are squeezed into 0..reference, so that windows and the whole grid share one range.
    """
    height, width = window
    frequencies = 10000.0 ** -(torch.arange(0, head_dim // 2, 2, device=like.device).float() / (head_dim // 2))
    rows = torch.arange(height, device=like.device).float() / height * reference
    columns = torch.arange(width, device=like.device).float() / width * reference
    row_angles = (rows[:, None] * frequencies).repeat_interleave(2, dim=-1)[:, None].expand(-1, width, -1)
    column_angles = (columns[:, None] * frequencies).repeat_interleave(2, dim=-1)[None].expand(height, -1, -1)
    angles = torch.cat([row_angles, column_angles], dim=-1).flatten(0, 1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Rotate neighbouring pairs of the last axis of x [..., tokens, head_dim]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * by[0] + turned * by[1]


class Eva02SelfMixing(nn.Module):
    """Multi-head self-attention with rotary positions; query and value have a bias, the key has none."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(hidden_size))
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, by: Rotation) -> torch.Tensor:
        """[windows, tokens, C] → [windows, tokens, C]."""
        query, key = F.linear(x, self.q_proj.weight, self.q_bias), self.k_proj(x)
        value = F.linear(x, self.v_proj.weight, self.v_bias)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(rotate(query, by), rotate(key, by), value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Eva02FeedForward(nn.Module):
    """SwiGLU with a norm between gate and output (`sub-LN`)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        inner = int(hidden_size * 8 / 3)
        self.w1 = nn.Linear(hidden_size, inner)
        self.w2 = nn.Linear(hidden_size, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=1e-6)
        self.w3 = nn.Linear(inner, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w3(self.ffn_ln(F.silu(aligned(self.w1, x)) * aligned(self.w2, x)))


def aligned(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, computed with a multiple of 16 features: 2730 of them cost matrix kernels a third of their speed."""
    width = layer.weight.shape[0]  # vLLM puts layers of its own in place, which have no out_features
    spare = -width % 16
    wide = F.linear(x, F.pad(layer.weight, (0, 0, 0, spare)), F.pad(layer.bias, (0, spare)))
    return wide[..., :width]


class Eva02Block(GradientCheckpointingLayer):
    """One pre-norm block; `window_size` in cells, 0 for a global block."""

    def __init__(self, hidden_size: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Eva02SelfMixing(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Eva02FeedForward(hidden_size)

    def window(self, height: int, width: int) -> tuple[int, int]:
        """Cells (rows, columns) that attend to each other on a grid of this size."""
        return (self.window_size, self.window_size) if self.window_size else (height, width)

    def forward(self, x: torch.Tensor, by: Rotation) -> torch.Tensor:
        """[V, h, w, C] → [V, h, w, C]; `by`: rotation of the tokens of one window."""
        x = x + self.mix(self.norm1(x), by)
        return x + self.mlp(self.norm2(x))

    def mix(self, x: torch.Tensor, by: Rotation) -> torch.Tensor:
        """Attention inside windows (zero-padded at the lower and right edge) or over the whole grid."""
        _, height, width, _ = x.shape
        window_h, window_w = self.window(height, width)
        padded = F.pad(x, (0, 0, 0, -width % window_w, 0, -height % window_h))
        rows = padded.shape[1] // window_h
        columns = padded.shape[2] // window_w
        tiles = padded.unflatten(2, (columns, window_w)).unflatten(1, (rows, window_h)).transpose(2, 3)
        windows = tiles.flatten(3, 4).flatten(0, 2)  # [V * rows * columns, cells of a window, C]
        mixed = self.attn(windows, by)
        tiles = mixed.unflatten(1, (window_h, window_w)).unflatten(0, (len(x), rows, columns)).transpose(2, 3)
        whole = tiles.flatten(3, 4).flatten(1, 2)
        return whole[:, :height, :width]


class Eva02PatchEmbedding(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, hidden_size, patch_size, stride=patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, h, w, C]."""
        return self.proj(pixels).permute(0, 2, 3, 1)


class Eva02Backbone(nn.Module):
    """Patches and positions, then windowed and global blocks; no final norm."""

    def __init__(
        self, *, hidden_size: int, depth: int, num_heads: int, window_size: int,
        global_blocks: Sequence[int], position_grid: int, rope_reference: int, patch_size: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.position_grid = position_grid
        self.rope_reference = rope_reference
        self.head_dim = hidden_size // num_heads
        # One position more than the grid has: the checkpoint keeps a class token's place, which is never read.
        self.pos_embed = nn.Parameter(torch.zeros(1, position_grid**2 + 1, hidden_size))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = Eva02PatchEmbedding(hidden_size, patch_size)
        self.blocks = nn.ModuleList(
            Eva02Block(hidden_size, num_heads, 0 if i in global_blocks else window_size) for i in range(depth)
        )

    def forward(self, pixels: torch.Tensor, inject: Injection | None = None) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, h, w]."""
        x = self.patch_embed(pixels)
        side, grid = self.position_grid, (x.shape[1], x.shape[2])
        x = x + resize_positions(self.pos_embed[:, 1:].unflatten(1, (side, side)), grid, antialias=False)
        rotations: dict[tuple[int, int], Rotation] = {}
        for done, block in enumerate(self.blocks, 1):
            assert isinstance(block, Eva02Block)
            window = block.window(*grid)
            if window not in rotations:
                rotations[window] = rotation(window, self.head_dim, self.rope_reference, x)
            x = block(x, rotations[window])
            if inject is not None:
                x = inject(done, len(self.blocks), x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x.permute(0, 3, 1, 2)


class Eva02Expert(Expert):
    def __init__(self, config: Eva02Config) -> None:
        super().__init__(config)
        self.model = Eva02Backbone(patch_size=config.stride_px, **config.settings)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / 16, W / 16]."""
        return self.model(pixels)

    def encode_with(self, pixels: torch.Tensor, inject: Injection | None) -> torch.Tensor:
        return self.model(pixels, inject)
