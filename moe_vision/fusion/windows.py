"""Attention over windows: each cell of a grid attends to the cells of a finer map that lie in it.

Mini-Gemini's mining, Oryx's compression and Cambrian's aggregator differ only in what they ask with and project.
"""

import torch
import torch.nn.functional as F


def window_of(fine: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the window of a fine grid that lies in one cell of `grid`. Raises ValueError if none does."""
    window = (fine[0] // grid[0], fine[1] // grid[1])
    if min(window) < 1 or (grid[0] * window[0], grid[1] * window[1]) != fine:
        raise ValueError(f"a grid of {list(fine)} does not nest in one of {list(grid)}: its sides must be multiples")
    return window


def windows(fine: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[V, C, H, W] → [V, h * w, cells of a window, C], windows row by row and their cells row by row."""
    height, width = window_of((fine.shape[2], fine.shape[3]), grid)
    blocks = fine.unflatten(3, (grid[1], width)).unflatten(2, (grid[0], height))  # [V, C, h, down, w, across]
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def window_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One head: query [V, n, C] on its own window's keys [V, n, k, C] and values [V, n, k, C'] → [V, n, C']."""
    return F.scaled_dot_product_attention(query[:, :, None], keys, values)[:, :, 0]
