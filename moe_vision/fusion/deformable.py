"""Deformable attention (Zhu et al., 2020) as a mixer: each cell of the base samples the other experts where it wants.

Eagle names such a fusion and published none. The attention is that of transformers' Deformable DETR, with one value
projection for each expert, because their widths differ; the residual and the zero-initialised output are ours.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from moe_vision.fusion.base import Mixer
from moe_vision.fusion.base_expert import BaseExpertConfig, cells
from moe_vision.registry import MIXERS
from moe_vision.types import FeatureMap, MapShape, TokenShape, VisualTokens


@MIXERS.register("deformable")
@dataclass(frozen=True, kw_only=True)
class DeformableConfig(BaseExpertConfig):
    """As `BaseExpertConfig`. hidden_size: width of the sampled values, the base's if null. num_heads, num_points:
    how many heads, and how many points each samples of each level. num_levels: scales of every other expert, each half
    as fine as the one before. zero_init: begin with the base's own features.
    """

    hidden_size: int | None = None
    num_heads: int = 8
    num_points: int = 4
    num_levels: int = 1
    zero_init: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_points", "num_levels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} of deformable: must be at least 1")

    def shape(self, inputs: Mapping[str, MapShape]) -> TokenShape:
        tokens = super().shape(inputs)
        width = self.hidden_size or tokens.channels
        if width % self.num_heads:
            fits = [heads for heads in range(1, width + 1) if width % heads == 0 and heads <= 64]
            raise ValueError(
                f"num_heads {self.num_heads} of deformable does not divide its width {width}; these do: {fits}"
            )
        for name, shape in self.others(inputs).items():
            if min(shape.grid) >> (self.num_levels - 1) < 1:
                raise ValueError(
                    f"num_levels {self.num_levels} of deformable leaves nothing of the grid {list(shape.grid)} of "
                    f"expert '{name}': choose fewer"
                )
        return tokens

    def build(self, inputs: Mapping[str, MapShape]) -> "Deformable":
        self.shape(inputs)
        return Deformable(self, inputs)


class Deformable(Mixer):
    def __init__(self, config: DeformableConfig, inputs: Mapping[str, MapShape]) -> None:
        super().__init__()
        self.config = config
        self.base = config.base_name(inputs)
        channels, others = config.shape(inputs).channels, config.others(inputs)
        width = config.hidden_size or channels
        self.levels = len(others) * config.num_levels
        samples = config.num_heads * self.levels * config.num_points
        self.value_proj = nn.ModuleDict({name: nn.Linear(shape.channels, width) for name, shape in others.items()})
        self.sampling_offsets = nn.Linear(channels, samples * 2)
        self.attention_weights = nn.Linear(channels, samples)
        self.output_proj = nn.Linear(width, channels)
        self.draw_weights()

    def draw_weights(self) -> None:
        """As the paper: heads look into directions of their own, points ever further out, all weighed alike."""
        config = self.config
        angles = torch.arange(config.num_heads, dtype=torch.float32) * (2 * math.pi / config.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, config.num_points + 1, dtype=torch.float32)
        offsets = (directions[:, None, None] * steps[:, None]).expand(-1, self.levels, -1, -1)
        init.copy_(self.sampling_offsets.bias, offsets.flatten().to(self.sampling_offsets.bias.device))
        for values in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            init.zeros_(values)
        if config.zero_init:
            init.zeros_(self.output_proj.weight)
            init.zeros_(self.output_proj.bias)

    def forward(self, maps: Mapping[str, FeatureMap]) -> VisualTokens:
        """Maps [V, C_i, h_i, w_i] → tokens [V, h * w, C] of the base's grid and width."""
        base = maps[self.base]
        own, grid = cells(base), base.shape.grid
        return VisualTokens(own + self.output_proj(self.sample(own, grid, maps)), grid)

    def sample(self, query: torch.Tensor, grid: tuple[int, int], maps: Mapping[str, FeatureMap]) -> torch.Tensor:
        """What queries [V, h * w, C] gather from all levels: [V, h * w, width]."""
        heads, points = self.config.num_heads, self.config.num_points
        split = (heads, self.levels, points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*split, 2))
        weights = self.attention_weights(query).unflatten(-1, (heads, self.levels * points))
        weights = weights.softmax(-1).unflatten(-1, (self.levels, points))
        centres = cell_centres(grid, query)[:, None, None]  # [h * w, 1, 1, 2]
        gathered: torch.Tensor | float = 0.0
        for level, values in enumerate(self.value_levels(maps)):
            size = query.new_tensor([values.shape[3], values.shape[2]])
            places = 2 * (centres + offsets[:, :, :, level] / size) - 1  # [V, n, heads, points, 2], in -1..1
            by_head = values.unflatten(1, (heads, -1)).flatten(0, 1)
            sampled = F.grid_sample(by_head, places.transpose(1, 2).flatten(0, 1), align_corners=False)
            # [V * heads, width / heads, n, points] times weights of the same heads
            weighed = sampled * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
            gathered = gathered + weighed.sum(-1)
        assert isinstance(gathered, torch.Tensor)
        return gathered.unflatten(0, (len(query), heads)).flatten(1, 2).transpose(1, 2)

    def value_levels(self, maps: Mapping[str, FeatureMap]) -> list[torch.Tensor]:
        """Projected values [V, width, h, w] of every expert at every scale."""
        levels = []
        for name, projection in self.value_proj.items():
            values = projection(cells(maps[name])).transpose(1, 2).unflatten(2, maps[name].shape.grid)
            levels.append(values)
            for _ in range(self.config.num_levels - 1):
                levels.append(F.avg_pool2d(levels[-1], 2))
        return levels


def cell_centres(grid: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """(x, y) of the middle of each cell, in 0..1, row by row: [h * w, 2]."""
    rows, columns = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
