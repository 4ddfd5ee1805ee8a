"""EVA-02's detection backbone (Fang et al., 2023; ViTDet of Li et al., 2022), which no library has.

Windowed and global blocks, no class token, pre-norm, SwiGLU with an inner norm, rotary positions in two dimensions.
Module names are those of the public checkpoint `eva02_L_coco_det_sys_o365`, so that its keys fit after a prefix.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moe_vision.experts.base import CLIP_MEAN, CLIP_STD, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.registry import EXPERTS


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
            architecture={"hidden_size": 1024, "depth": 24, "num_heads": 16, "window_size": 16, "global_every": 3,
                          "position_grid": 14, "rope_reference": 16},
            filename="eva02/det/eva02_L_coco_det_sys_o365.pth",
            key_prefix="backbone.net.",
            optional_keys=("rope_win.", "rope_glb.", "blocks.*.attn.rope."),
        ),
        "micro": micro_spec(
            "eva02", channels=64, stride_px=16, size_px=128, pretraining="objects of generated scenes, cell by cell",
            architecture={"hidden_size": 64, "depth": 3, "num_heads": 4, "window_size": 4, "global_every": 3,
                          "position_grid": 8, "rope_reference": 4},
        ),
    }  # fmt: skip

    def build(self) -> "Eva02Expert":
        return Eva02Expert(self)


def rotary_angles(height: int, width: int, head_dim: int, reference: int, like: torch.Tensor) -> torch.Tensor:
    """Angles [height * width, head_dim] of a 2-D rotary embedding, rows then columns, squeezed into 0..reference."""
    frequencies = 10000.0 ** -(torch.arange(0, head_dim // 2, 2, device=like.device).float() / (head_dim // 2))
    rows = torch.arange(height, device=like.device).float() / height * reference
    columns = torch.arange(width, device=like.device).float() / width * reference
    row_angles = (rows[:, None] * frequencies).repeat_interleave(2, dim=-1)[:, None].expand(-1, width, -1)
    column_angles = (columns[:, None] * frequencies).repeat_interleave(2, dim=-1)[None].expand(height, -1, -1)
    return torch.cat([row_angles, column_angles], dim=-1).flatten(0, 1)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of the last axis of x [..., tokens, head_dim] by `angles` [tokens, head_dim]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


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

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """[windows, tokens, C] → [windows, tokens, C]."""
        query, key, value = self.q_proj(x) + self.q_bias, self.k_proj(x), self.v_proj(x) + self.v_bias
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(rotate(query, angles), rotate(key, angles), value)
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
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Eva02Block(nn.Module):
    """One pre-norm block; `window_size` in cells, 0 for a global block."""

    def __init__(self, hidden_size: int, num_heads: int, window_size: int, rope_reference: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.rope_reference = rope_reference
        self.head_dim = hidden_size // num_heads
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Eva02SelfMixing(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Eva02FeedForward(hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[V, h, w, C] → [V, h, w, C]."""
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """Attention inside windows (zero-padded at the lower and right edge) or over the whole grid."""
        _, height, width, _ = x.shape
        window_h, window_w = (self.window_size or height), (self.window_size or width)
        padded = F.pad(x, (0, 0, 0, -width % window_w, 0, -height % window_h))
        rows = padded.shape[1] // window_h
        columns = padded.shape[2] // window_w
        tiles = padded.unflatten(2, (columns, window_w)).unflatten(1, (rows, window_h)).transpose(2, 3)
        windows = tiles.flatten(3, 4).flatten(0, 2)  # [V * rows * columns, cells of a window, C]
        angles = rotary_angles(window_h, window_w, self.head_dim, self.rope_reference, x)
        mixed = self.attn(windows, angles)
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
        self, *, hidden_size: int, depth: int, num_heads: int, window_size: int, global_every: int, position_grid: int,
        rope_reference: int, patch_size: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.position_grid = position_grid
        # One position more than the grid has: the checkpoint keeps a class token's place, which is never read.
        self.pos_embed = nn.Parameter(torch.zeros(1, position_grid**2 + 1, hidden_size))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = Eva02PatchEmbedding(hidden_size, patch_size)
        self.blocks = nn.ModuleList(
            Eva02Block(hidden_size, num_heads, 0 if (i + 1) % global_every == 0 else window_size, rope_reference)
            for i in range(depth)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, h, w]."""
        x = self.patch_embed(pixels)
        x = x + self.positions(x.shape[1], x.shape[2]).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings [1, height, width, C]: bicubic, corners not aligned, no antialias, in fp32."""
        side = self.position_grid
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        if (height, width) != (side, side):
            table = F.interpolate(table.float(), (height, width), mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1)


class Eva02Expert(Expert):
    def __init__(self, config: Eva02Config) -> None:
        super().__init__(config)
        self.model = Eva02Backbone(patch_size=config.stride_px, **config.spec.architecture)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / 16, W / 16]."""
        return self.model(pixels)
