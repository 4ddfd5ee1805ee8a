"""Sizes that fit a grid, and position embeddings at sizes other than their own."""

from typing import Literal

import torch
import torch.nn.functional as F


def nearest_multiple(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """The nearest (height, width) whose sides are whole multiples of `stride`, at least one."""
    return (max(1, round(size[0] / stride)) * stride, max(1, round(size[1] / stride)) * stride)


PositionFilter = Literal["bicubic", "bilinear"]


def resize_positions(
    table: torch.Tensor, grid: tuple[int, int], antialias: bool, filter: PositionFilter = "bicubic"
) -> torch.Tensor:
    """Position embeddings [1, h, w, C] on another grid: corners not aligned, in fp32; in their own dtype.

    timm, open_clip and Eagle's CLIP interpolate with antialias, transformers and EVA-02's detector without; OryxViT
    bilinearly.
    """
    if tuple(table.shape[1:3]) == tuple(grid):
        return table
    channels_first = table.permute(0, 3, 1, 2).float()
    resized = F.interpolate(channels_first, grid, mode=filter, antialias=antialias, align_corners=False)
    return resized.permute(0, 2, 3, 1).to(table.dtype)
