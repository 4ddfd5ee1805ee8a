"""What mixers share that have a base expert: its cells become the tokens, the other experts add to them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe_vision.fusion.base import MixerConfig
from moe_vision.registry import suggest
from moe_vision.types import FeatureMap, MapShape, TokenShape


@dataclass(frozen=True, kw_only=True)
class BaseExpertConfig(MixerConfig):
    """base: name of the expert whose cells become the tokens, the first one if null."""

    base: str | None = None

    def base_name(self, inputs: Mapping[str, object]) -> str:
        """The base expert. Raises ValueError where it is not among the experts, or is the only one."""
        name = self.base or next(iter(inputs))
        if name not in inputs:
            raise ValueError(
                f"base '{name}' of {self.type_name} is no expert of this branch: {suggest(name, [*inputs])}"
            )
        if len(inputs) < 2:
            raise ValueError(
                f"{self.type_name} adds other experts to '{name}', and this branch has no other: add one, or choose "
                "channel_concat"
            )
        return name

    def others(self, inputs: Mapping[str, MapShape]) -> dict[str, MapShape]:
        """Shapes of the experts that are not the base, in their order."""
        base = self.base_name(inputs)
        return {name: shape for name, shape in inputs.items() if name != base}

    def shape(self, inputs: Mapping[str, MapShape]) -> TokenShape:
        base = inputs[self.base_name(inputs)]
        return TokenShape(base.grid[0] * base.grid[1], base.channels, base.grid)


def cells(feature_map: FeatureMap) -> torch.Tensor:
    """[V, C, h, w] → [V, h * w, C], row by row."""
    return feature_map.data.flatten(2).transpose(1, 2)
