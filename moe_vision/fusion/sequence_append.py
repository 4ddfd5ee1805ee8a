"""Eagle's baseline of a longer sequence (Shi et al., 2024, section 2): every expert's tokens, one expert after another.

Eagle published no code of it. Here each expert has a projector of its own to a common width, and keeps its own grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from moe_vision.fusion.base import Mixer, MixerConfig
from moe_vision.fusion.base_expert import cells
from moe_vision.fusion.grid import adapt_grid
from moe_vision.registry import MIXERS, suggest
from moe_vision.types import FeatureMap, MapShape, TokenShape, VisualTokens


@MIXERS.register("sequence_append")
@dataclass(frozen=True, kw_only=True)
class SequenceAppendConfig(MixerConfig):
    """hidden_size: the common width, that of the widest expert if null.

    grids: (height, width) in cells that an expert's map is brought to bilinearly, its own where it is not named.
    """

    hidden_size: int | None = None
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.hidden_size is not None and self.hidden_size < 1:
            raise ValueError(f"hidden_size {self.hidden_size} of sequence_append: must be at least 1")
        object.__setattr__(self, "grids", {name: (grid[0], grid[1]) for name, grid in self.grids.items()})
        for name, grid in self.grids.items():
            if min(grid) < 1:
                raise ValueError(f"grid {list(grid)} of expert '{name}': both sides must be at least 1 cell")

    def width(self, inputs: Mapping[str, MapShape]) -> int:
        return self.hidden_size or max(shape.channels for shape in inputs.values())

    def shape(self, inputs: Mapping[str, MapShape]) -> TokenShape:
        for name in self.grids:
            if name not in inputs:
                raise ValueError(f"grids names an expert that is not mixed, '{name}': {suggest(name, list(inputs))}")
        grids = [self.grids.get(name, shape.grid) for name, shape in inputs.items()]
        only = grids[0] if len(grids) == 1 else None
        return TokenShape(sum(height * width for height, width in grids), self.width(inputs), only)

    def build(self, inputs: Mapping[str, MapShape]) -> "SequenceAppend":
        self.shape(inputs)
        return SequenceAppend(self, inputs)


class SequenceAppend(Mixer):
    def __init__(self, config: SequenceAppendConfig, inputs: Mapping[str, MapShape]) -> None:
        super().__init__()
        self.config = config
        width = config.width(inputs)
        self.projectors = nn.ModuleDict({name: nn.Linear(shape.channels, width) for name, shape in inputs.items()})

    def forward(self, maps: Mapping[str, FeatureMap]) -> VisualTokens:
        """Maps [V, C_i, h_i, w_i] in the order of the config → tokens [V, sum of h_i * w_i, width]."""
        parts = []
        for name, feature_map in maps.items():
            grid = self.config.grids.get(name, feature_map.shape.grid)
            parts.append(self.projectors[name](cells(FeatureMap(adapt_grid(feature_map.data, grid)))))
        return VisualTokens(torch.cat(parts, dim=1), grid if len(parts) == 1 else None)
