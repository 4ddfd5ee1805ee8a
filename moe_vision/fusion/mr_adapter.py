"""LLaVA-HR's mixture-of-resolution adapter (Luo et al., 2024): other experts speak up between the base's own blocks.

After luogen1996/LLaVA-HR, multimodal_encoder/multipath_encoder_wapper.py: `S2FStitchAlignModuleV2` at even distances
within the base, `MultiPathAlignModule` behind it. The published code has one other expert; several are stacked along
the channels here, on the first one's grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from moe_vision.fusion.base import Mixer
from moe_vision.fusion.base_expert import BaseExpertConfig, cells
from moe_vision.fusion.grid import adapt_grid
from moe_vision.registry import MIXERS
from moe_vision.types import FeatureMap, Injection, MapShape, TokenShape, VisualTokens


@MIXERS.register("mr_adapter")
@dataclass(frozen=True, kw_only=True)
class MrAdapterConfig(BaseExpertConfig):
    """As `BaseExpertConfig`. num_adapters: places within the base, at even distances: 3 are behind each quarter but the
    last. zero_init: begin with the base's own features.
    """

    num_adapters: int = 3
    zero_init: bool = True

    def __post_init__(self) -> None:
        if self.num_adapters < 0:
            raise ValueError(f"num_adapters {self.num_adapters} of mr_adapter: must be at least 0")

    def injected(self, inputs: Mapping[str, Any]) -> str | None:
        return self.base_name(inputs)

    def places(self, blocks: int) -> list[int]:
        """After how many of so many blocks each adapter speaks."""
        return [blocks * i // (self.num_adapters + 1) for i in range(1, self.num_adapters + 1)]

    def check_blocks(self, blocks: int) -> None:
        places = self.places(blocks)
        if 0 in places or len(set(places)) < len(places):
            raise ValueError(
                f"num_adapters {self.num_adapters} of mr_adapter: the base has {blocks} blocks, between which at most "
                f"{blocks - 1} can speak: choose fewer"
            )

    def shape(self, inputs: Mapping[str, MapShape]) -> TokenShape:
        tokens = super().shape(inputs)
        assert tokens.grid is not None
        name, slow = next(iter(self.others(inputs).items()))
        if not nests(slow.grid, tokens.grid):
            raise ValueError(
                f"mr_adapter, expert '{name}': a grid of {list(slow.grid)} and the base's of {list(tokens.grid)} do "
                "not nest, either way: give one another image_size"
            )
        return tokens

    def build(self, inputs: Mapping[str, MapShape]) -> "MrAdapter":
        self.shape(inputs)
        return MrAdapter(self, inputs)


def nests(slow: tuple[int, int], fast: tuple[int, int]) -> bool:
    """Whether one grid is the other with every cell split into equal ones."""
    fine, coarse = (slow, fast) if slow[0] >= fast[0] else (fast, slow)
    return fine[0] % coarse[0] == 0 and fine[1] == coarse[1] * (fine[0] // coarse[0])


def brought_to(slow: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[V, C, H, W] → [V, C, *grid]: averaged down, or interpolated up with aligned corners, as published."""
    if slow.shape[2] > grid[0]:
        return F.avg_pool2d(slow, slow.shape[2] // grid[0])
    return adapt_grid(slow, grid, align_corners=True)


class GatedInjection(nn.Module):
    """One adapter between two blocks."""

    def __init__(self, channels: int, slow_channels: int, zero_init: bool) -> None:
        super().__init__()
        self.slow_conv = nn.Conv2d(slow_channels, slow_channels, 1)
        self.slow_proj = nn.Conv2d(slow_channels, channels, 1)
        self.fast_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.fast_proj = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Sequential(nn.Linear(2 * channels, channels // 2), nn.GELU(), nn.Linear(channels // 2, 1))
        self.zero_init = zero_init
        self.draw_weights()

    def draw_weights(self) -> None:
        if not self.zero_init:
            return
        for projection in (self.slow_proj, self.fast_proj):
            init.zeros_(projection.weight)
            if projection.bias is not None:
                init.zeros_(projection.bias)

    def forward(self, fast: torch.Tensor, slow: torch.Tensor) -> torch.Tensor:
        """fast [V, C, h, w], slow [V, C', H, W] → [V, C, h, w]."""
        added = brought_to(self.slow_proj(F.gelu(self.slow_conv(slow))), (fast.shape[2], fast.shape[3]))
        fast = fast + self.fast_proj(F.gelu(self.fast_conv(fast)))
        gate = torch.tanh(self.gate(torch.cat([fast, added], dim=1).mean((2, 3))))
        return fast + added * gate[:, :, None, None]


class MrAdapter(Mixer):
    def __init__(self, config: MrAdapterConfig, inputs: Mapping[str, MapShape]) -> None:
        super().__init__()
        self.config = config
        self.injected = self.base = config.base_name(inputs)
        self.others = list(config.others(inputs))
        channels = config.shape(inputs).channels
        slow_channels = sum(shape.channels for shape in config.others(inputs).values())
        self.adapters = nn.ModuleList(
            GatedInjection(channels, slow_channels, config.zero_init) for _ in range(config.num_adapters)
        )
        self.fast_proj, self.slow_proj = nn.Linear(channels, channels), nn.Linear(slow_channels, channels)
        self.draw_weights()

    def draw_weights(self) -> None:
        if self.config.zero_init:
            init.eye_(self.fast_proj.weight)
            for values in (self.fast_proj.bias, self.slow_proj.weight, self.slow_proj.bias):
                init.zeros_(values)

    def injection(self, maps: Mapping[str, FeatureMap]) -> Injection:
        """What happens behind the base's blocks, given the other experts' maps."""
        slow = self.slow(maps)

        def inject(done: int, blocks: int, fast: torch.Tensor) -> torch.Tensor:
            places = self.config.places(blocks)
            return self.adapters[places.index(done)](fast, slow) if done in places else fast

        return inject

    def slow(self, maps: Mapping[str, FeatureMap]) -> torch.Tensor:
        """Maps of the other experts, stacked along the channels on the first one's grid: [V, C', H, W]."""
        others = [maps[name].data for name in self.others]
        grid = (others[0].shape[2], others[0].shape[3])
        return torch.cat([adapt_grid(other, grid, align_corners=True) for other in others], dim=1)

    def forward(self, maps: Mapping[str, FeatureMap]) -> VisualTokens:
        """Maps [V, C_i, h_i, w_i], the base's with what was injected → tokens [V, h * w, C] of its grid and width."""
        base = maps[self.base]
        slow = brought_to(self.slow(maps), base.shape.grid).flatten(2).transpose(1, 2)
        return VisualTokens(self.fast_proj(cells(base)) + self.slow_proj(slow), base.shape.grid)
