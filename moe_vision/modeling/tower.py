"""The experts that see a view, and the mixer that brings their maps to one grid.

views [V, 3, H, W] ─ each expert ─ its FeatureMap ─ mixer ─ VisualTokens [V, N, C]
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_vision.fusion.base import Mixer
from moe_vision.modeling.configuration_moe_vision import MoeVisionVisionConfig
from moe_vision.types import FeatureMap, VisualTokens


class MoeVisionTower(nn.Module):
    """The experts of a branch on views of one size, then its mixer."""

    def __init__(self, config: MoeVisionVisionConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({name: expert.build() for name, expert in config.expert_configs().items()})
        self.mixers = nn.ModuleDict(
            {branch: config.mixer(branch).build(config.map_shapes(branch)) for branch in config.branches}
        )
        self.branch_experts = {branch: config.branch_experts(branch) for branch in config.branches}

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating parameter: quantised language models leave the tower's as it was."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        branch: str = "overview",
        feature_maps: Mapping[str, torch.Tensor] | None = None,
    ) -> VisualTokens:
        """Views [V, 3, H, W] in [0, 1] → VisualTokens [V, N, C]. feature_maps: as `mix` takes them."""
        mixer: Any = self.mixers[branch]
        views = None if pixel_values is None else pixel_values.to(self.dtype)
        mixed = mix({name: self.experts[name] for name in self.branch_experts[branch]}, mixer, views, feature_maps)
        # Matrix products round by the layout of what they read: tokens that were kept must be as those that are made.
        return replace(mixed, data=mixed.data.contiguous())


def mix(
    experts: Mapping[str, nn.Module],
    mixer: Mixer,
    views: torch.Tensor | None,
    feature_maps: Mapping[str, torch.Tensor] | None = None,
) -> VisualTokens:
    """Views [V, 3, H, W] → VisualTokens [V, N, C]; an expert between whose blocks others speak runs last.

    feature_maps: what experts made of the views before, [V, C, h, w] by name; those do not run. Raises ValueError where
    an expert has to run and there are no views, or where others speak between the blocks of one that has a map.
    """
    known = feature_maps or {}
    running = [name for name in experts if name not in known]
    if mixer.injected in known:
        raise ValueError(f"feature_maps has '{mixer.injected}', between whose blocks the others speak: give it pixels")
    if unknown := [name for name in known if name not in experts]:
        raise ValueError(f"feature_maps has {unknown}, which are no experts of this branch ({', '.join(experts)})")
    if running and views is None:
        raise ValueError(f"experts {running} have no map in feature_maps: give pixel_values too")
    maps = {
        name: FeatureMap(known[name]) if name in known else expert(views)
        for name, expert in experts.items()
        if name != mixer.injected
    }
    if mixer.injected is not None:
        maps[mixer.injected] = experts[mixer.injected](views, mixer.injection(maps))
    return mixer(maps)
