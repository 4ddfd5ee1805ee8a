"""Mini-Gemini's patch info mining (Li et al., 2024): each cell of the base asks the finer cells that lie in it.

After dvlab-research/MGM, mgm/model/mgm_arch.py, `unified_resampler`: one head, a norm before each projection. The
published code has one auxiliary map; here every other expert is one, and a cell attends to the windows of all at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from moe_vision.fusion.base import Mixer
from moe_vision.fusion.base_expert import BaseExpertConfig, cells
from moe_vision.fusion.windows import window_attention, window_of, windows
from moe_vision.registry import MIXERS
from moe_vision.types import FeatureMap, MapShape, TokenShape, VisualTokens


@MIXERS.register("patch_mining")
@dataclass(frozen=True, kw_only=True)
class PatchMiningConfig(BaseExpertConfig):
    """As `BaseExpertConfig`. zero_init: begin with the base's own features; the published code does not."""

    zero_init: bool = True

    def shape(self, inputs: Mapping[str, MapShape]) -> TokenShape:
        tokens = super().shape(inputs)
        assert tokens.grid is not None
        for name, shape in self.others(inputs).items():
            try:
                window_of(shape.grid, tokens.grid)
            except ValueError as error:
                raise ValueError(
                    f"patch_mining, expert '{name}': {error}; give it another image_size, or choose deformable"
                ) from None
        return tokens

    def build(self, inputs: Mapping[str, MapShape]) -> "PatchMining":
        self.shape(inputs)
        return PatchMining(self, inputs)


class PatchMining(Mixer):
    def __init__(self, config: PatchMiningConfig, inputs: Mapping[str, MapShape]) -> None:
        super().__init__()
        self.config = config
        self.base = config.base_name(inputs)
        width, others = config.shape(inputs).channels, config.others(inputs)

        def projection(channels: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))

        self.query = projection(width)
        self.keys = nn.ModuleDict({name: projection(shape.channels) for name, shape in others.items()})
        self.values = nn.ModuleDict({name: projection(shape.channels) for name, shape in others.items()})
        self.draw_weights()

    def draw_weights(self) -> None:
        if self.config.zero_init:
            for value in self.values.values():
                last: nn.Linear = value[-1]  # type: ignore[index]
                init.zeros_(last.weight)
                init.zeros_(last.bias)

    def forward(self, maps: Mapping[str, FeatureMap]) -> VisualTokens:
        """Maps [V, C_i, h_i, w_i] → tokens [V, h * w, C] of the base's grid and width."""
        base = maps[self.base]
        own, grid = cells(base), base.shape.grid
        fine = {name: windows(maps[name].data, grid) for name in self.keys}
        keys = torch.cat([self.keys[name](x) for name, x in fine.items()], dim=2)
        values = torch.cat([self.values[name](x) for name, x in fine.items()], dim=2)
        return VisualTokens(own + window_attention(self.query(own), keys, values), grid)
