"""Grid adapters: from an expert's native grid to the common one."""

from typing import Literal

import torch
import torch.nn.functional as F

from moe_vision.types import MapShape

GridMethod = Literal["bilinear", "pixel_unshuffle", "pool"]


def adapted_shape(shape: MapShape, grid: tuple[int, int], method: GridMethod) -> MapShape:
    """Shape after `adapt_grid`, before any weight exists. Raises ValueError where the grids do not fit."""
    if method == "bilinear":
        return MapShape(shape.channels, grid)
    factor = shape.grid[0] // grid[0]
    if factor < 1 or shape.grid != (grid[0] * factor, grid[1] * factor):
        fits = [list(side) for side in divided_grids(shape.grid)]
        raise ValueError(
            f"{method} cannot bring a grid of {list(shape.grid)} to {list(grid)}; grids that fit: {fits}, "
            "or choose bilinear"
        )
    return MapShape(shape.channels * (factor**2 if method == "pixel_unshuffle" else 1), grid)


def divided_grids(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Every grid that divides `grid` by one factor in both directions."""
    height, width = grid
    return [(height // f, width // f) for f in range(1, min(grid) + 1) if height % f == 0 and width % f == 0]


def adapt_grid(
    data: torch.Tensor, grid: tuple[int, int], method: GridMethod = "bilinear", align_corners: bool = False
) -> torch.Tensor:
    """Bring a map [V, C, h, w] to `grid`: [V, C, *grid], or [V, C * f * f, *grid] with pixel_unshuffle.

    pixel_unshuffle stacks the f x f cells that become one, pool averages them; both raise ValueError where the grids
    do not nest. align_corners is true in Eagle and LLaVA-HR and false elsewhere; it concerns bilinear only.
    """
    if tuple(data.shape[-2:]) == tuple(grid):
        return data
    if method != "bilinear":
        adapted_shape(MapShape(data.shape[1], (data.shape[2], data.shape[3])), grid, method)
        factor = data.shape[-2] // grid[0]
        return F.pixel_unshuffle(data, factor) if method == "pixel_unshuffle" else F.avg_pool2d(data, factor)
    return F.interpolate(data, size=grid, mode="bilinear", align_corners=align_corners)
