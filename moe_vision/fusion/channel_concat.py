"""Eagle's fusion (Shi et al., 2024): every expert's map on one grid, stacked along the channels."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moe_vision.fusion.base import Mixer, MixerConfig
from moe_vision.fusion.grid import GridMethod, adapt_grid, adapted_shape
from moe_vision.registry import MIXERS, suggest
from moe_vision.types import FeatureMap, MapShape, TokenShape, VisualTokens


@MIXERS.register("channel_concat")
@dataclass(frozen=True, kw_only=True)
class ChannelConcatConfig(MixerConfig):
    """grid: the common grid (height, width) in cells; null for the first expert's own, which follows the view's size.

    resample: per expert, `bilinear` where it is not named; `pixel_unshuffle` and `pool` need a grid that nests.

    align_corners: of the bilinear resampling; Eagle's published code aligns them.
    """

    grid: tuple[int, int] | None
    resample: Mapping[str, GridMethod] = field(default_factory=dict)
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(self.grid))
            if min(self.grid) < 1:
                raise ValueError(f"grid {list(self.grid)} of channel_concat: both sides must be at least 1 cell")

    def common_grid(self, inputs: Mapping[str, MapShape]) -> tuple[int, int]:
        """(height, width) that every map is brought to."""
        return self.grid or next(iter(inputs.values())).grid

    def adapted(self, inputs: Mapping[str, MapShape]) -> dict[str, MapShape]:
        """Each expert's shape on the common grid."""
        for name in self.resample:
            if name not in inputs:
                raise ValueError(f"resample names an expert that is not mixed, '{name}': {suggest(name, list(inputs))}")
        shapes, grid = {}, self.common_grid(inputs)
        for name, shape in inputs.items():
            try:
                shapes[name] = adapted_shape(shape, grid, self.resample.get(name, "bilinear"))
            except ValueError as error:
                raise ValueError(f"expert '{name}': {error}") from None
        return shapes

    def shape(self, inputs: Mapping[str, MapShape]) -> TokenShape:
        channels = sum(shape.channels for shape in self.adapted(inputs).values())
        grid = self.common_grid(inputs)
        return TokenShape(grid[0] * grid[1], channels, grid)

    def build(self, inputs: Mapping[str, MapShape]) -> "ChannelConcat":
        self.shape(inputs)
        return ChannelConcat(self)


class ChannelConcat(Mixer):
    def __init__(self, config: ChannelConcatConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, maps: Mapping[str, FeatureMap]) -> VisualTokens:
        """Maps [V, C_i, h_i, w_i] in the order of the config → tokens [V, h * w, sum of C_i], row by row."""
        config = self.config
        grid = config.common_grid({name: map_.shape for name, map_ in maps.items()})
        adapted = [
            adapt_grid(map_.data, grid, config.resample.get(name, "bilinear"), config.align_corners)
            for name, map_ in maps.items()
        ]
        return VisualTokens(torch.cat(adapted, dim=1).flatten(2).transpose(1, 2), grid)
