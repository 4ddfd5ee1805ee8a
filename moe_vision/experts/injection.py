"""What a mixer says between the blocks of an encoder whose layers are a library's own."""

import torch
from torch import nn

from moe_vision.types import Injection


def with_injection(
    layers: nn.ModuleList, tokens: torch.Tensor, grid: tuple[int, int], inject: Injection
) -> torch.Tensor:
    """Run a library's layers on tokens [V, prefix + h * w, C], what is injected behind each on the raster alone."""
    cells = grid[0] * grid[1]
    for done, layer in enumerate(layers, 1):
        tokens = layer(tokens, None)
        prefix, raster = tokens[:, :-cells], tokens[:, -cells:]
        said = inject(done, len(layers), raster.transpose(1, 2).unflatten(2, grid))
        tokens = torch.cat([prefix, said.flatten(2).transpose(1, 2)], dim=1)
    return tokens
