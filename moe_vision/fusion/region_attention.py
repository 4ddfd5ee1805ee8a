"""Oryx's compression (Liu et al., 2024): squares of cells become one token, which asks the cells that it stands for.

After Oryx-mllm/Oryx, multimodal_resampler/perceiver.py, `DynamicCompressor`: the mean of a square is the query, its
cells are the values as they are, and the answer is added to the mean. Squares of one cell come out doubled, as
published.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from moe_vision.fusion.base import Adapter, AdapterConfig
from moe_vision.fusion.mlp import MlpConfig
from moe_vision.fusion.windows import window_attention, windows
from moe_vision.registry import ADAPTERS
from moe_vision.types import TokenShape, VisualTokens


@ADAPTERS.register("region_attention")
@dataclass(frozen=True, kw_only=True)
class RegionAttentionConfig(AdapterConfig):
    """side: cells along one side of a square. attention_size: width of queries and keys. depth, inner_size: of the MLP
    that follows, as `mlp` has them.
    """

    side: int = 2
    attention_size: int = 256
    depth: int = 2
    inner_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("side", "attention_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} of region_attention: must be at least 1")

    def projection_channels(self, inputs: TokenShape) -> int | None:
        return inputs.channels

    def shape(self, inputs: TokenShape, hidden_size: int) -> TokenShape:
        if inputs.grid is None:
            raise ValueError("region_attention needs tokens on a raster; this mixer gives none: choose another mixer")
        height, width = inputs.grid
        if height % self.side or width % self.side:
            raise ValueError(f"side {self.side} of region_attention does not divide the grid {list(inputs.grid)}")
        grid = (height // self.side, width // self.side)
        return TokenShape(grid[0] * grid[1], hidden_size, grid)

    def build(self, inputs: TokenShape, hidden_size: int) -> "RegionAttention":
        self.shape(inputs, hidden_size)
        return RegionAttention(self, inputs, hidden_size)


class RegionAttention(Adapter):
    def __init__(self, config: RegionAttentionConfig, inputs: TokenShape, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(inputs.channels, config.attention_size)
        self.key = nn.Linear(inputs.channels, config.attention_size)
        mlp = MlpConfig(depth=config.depth, inner_size=config.inner_size)
        self.projection = mlp.build(TokenShape(inputs.num_tokens, inputs.channels, None), hidden_size)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """[V, h * w, C] → [V, h * w / side², D]."""
        return self.projection(self.compress(tokens))

    def compress(self, tokens: VisualTokens) -> VisualTokens:
        """[V, h * w, C] → [V, h * w / side², C]."""
        assert tokens.grid is not None  # shape() refused a mixer without a raster
        side = self.config.side
        raster = tokens.data.transpose(1, 2).unflatten(2, tokens.grid)
        grid = (tokens.grid[0] // side, tokens.grid[1] // side)
        means = F.avg_pool2d(raster, side).flatten(2).transpose(1, 2)
        cells = windows(raster, grid)
        return VisualTokens(means + window_attention(self.query(means), self.key(cells), cells), grid)
