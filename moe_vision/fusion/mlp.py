"""LLaVA-1.5's projector (Liu et al., 2023) with any depth and width, and two ways to fewer tokens: blocks of cells
merged before it, as Qwen2-VL does (Wang et al., 2024), or averaged behind it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from moe_vision.fusion.base import Adapter, AdapterConfig
from moe_vision.registry import ADAPTERS
from moe_vision.types import TokenShape, VisualTokens

DEEPEST_MLP = 100
"""Most linear layers of a projector. A larger number is a slip of the keyboard, and would take hours to build."""


@ADAPTERS.register("mlp")
@dataclass(frozen=True, kw_only=True)
class MlpConfig(AdapterConfig):
    """depth: linear layers (2 is LLaVA's `mlp2x_gelu`). inner_size: width between them, the language model's if null.

    merge: side of the square of cells whose channels are stacked before projecting, row by row. norm: layer norm of
    each `cell` before that. pool: side of the square of cells that are averaged after projecting; every cell shares the
    projector, so pooling after it keeps the projector small and cuts the tokens by pool². positions: add a learned
    embedding of each token's place, for experts whose features do not say where they are and language models that must
    be told.
    """

    depth: int = 2
    inner_size: int | None = None
    activation: Literal["gelu", "silu", "relu"] = "gelu"
    merge: int = 1
    norm: Literal["cell"] | None = None
    pool: int = 1
    positions: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "merge", "pool", "inner_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} of mlp: must be at least 1")
        if self.depth > DEEPEST_MLP:
            raise ValueError(f"depth {self.depth} of mlp: must be at most {DEEPEST_MLP}")

    @property
    def any_grid(self) -> bool:
        return not self.positions

    def shape(self, inputs: TokenShape, hidden_size: int) -> TokenShape:
        block = self.merge * self.pool
        if block == 1:
            return TokenShape(inputs.num_tokens, hidden_size, inputs.grid)
        name = "pool" if self.merge == 1 else "merge" if self.pool == 1 else "merge times pool"
        if inputs.grid is None:
            raise ValueError(f"{name} {block} of mlp needs tokens on a raster; this mixer gives none: set it to 1")
        height, width = inputs.grid
        if height % block or width % block:
            fits = [side for side in range(1, min(inputs.grid) + 1) if height % side == 0 and width % side == 0]
            raise ValueError(f"{name} {block} of mlp does not divide the grid {list(inputs.grid)}; these do: {fits}")
        grid = (height // block, width // block)
        return TokenShape(grid[0] * grid[1], hidden_size, grid)

    def build(self, inputs: TokenShape, hidden_size: int) -> "Mlp":
        return Mlp(self, inputs.channels, self.shape(inputs, hidden_size))


class Mlp(Adapter):
    def __init__(self, config: MlpConfig, channels: int, output: TokenShape) -> None:
        super().__init__()
        self.config = config
        hidden_size = output.channels
        if config.norm is not None:
            self.norm = nn.LayerNorm(channels, eps=1e-6)
        widths = [channels * config.merge**2, *[config.inner_size or hidden_size] * (config.depth - 1), hidden_size]
        layers: list[nn.Module] = []
        for i in range(config.depth):
            layers += [ACT2FN[config.activation]] if i else []
            layers.append(nn.Linear(widths[i], widths[i + 1]))
        # Indices 0, 2, … are LLaVA's and Eagle's own (`mm_projector.0.weight`).
        self.layers = nn.Sequential(*layers)
        if config.positions:
            self.position_embedding = nn.Parameter(torch.zeros(output.num_tokens, hidden_size))

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """[V, N, C] → [V, N / (merge² pool²), D]."""
        cells, grid, merge = tokens.data, tokens.grid, self.config.merge
        if self.config.norm is not None:
            cells = self.norm(cells)
        if merge > 1:
            assert grid is not None  # build() refused a mixer without a raster
            grid = (grid[0] // merge, grid[1] // merge)
            blocks = cells.unflatten(1, (grid[0], merge, grid[1], merge)).transpose(2, 3)  # [V, h, w, down, across, C]
            cells = blocks.flatten(3).flatten(1, 2)
        projected = self.layers(cells)
        if self.config.pool > 1:
            assert grid is not None
            pooled = F.avg_pool2d(projected.transpose(1, 2).unflatten(2, grid), self.config.pool)
            projected, grid = pooled.flatten(2).transpose(1, 2), (pooled.shape[2], pooled.shape[3])
        if self.config.positions:
            projected = projected + self.position_embedding
        return VisualTokens(projected, grid)
