"""What flows from pixels to language: views → feature maps → visual tokens.

Shape letters, used everywhere:

| letter | meaning                          | letter | meaning                    |
|--------|----------------------------------|--------|----------------------------|
| `B`    | samples                          | `h w`  | grid cells                 |
| `V`    | views of the whole batch         | `N`    | visual tokens of one view  |
| `C`    | channels                         | `D`    | language model width       |
| `H W`  | pixels                           | `T`    | text length                |

Sizes are always (height, width); units are in the names (`stride_px`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Injection = Callable[[int, int, torch.Tensor], torch.Tensor]
"""(blocks done, blocks in all, map [V, C, h, w]) → map [V, C, h, w]: what is said behind a block of an encoder."""


@dataclass(frozen=True)
class MapShape:
    """Shape of a feature map before any weight exists."""

    channels: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class TokenShape:
    """Shape of the visual tokens of one view before any weight exists; `grid` is None where order is no raster."""

    num_tokens: int
    channels: int
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class FeatureMap:
    """One expert's view of V images. data: [V, C, h, w], channels first, never flattened."""

    data: torch.Tensor

    def __post_init__(self) -> None:
        if self.data.ndim != 4:
            raise ValueError(f"a feature map is [V, C, h, w]; got a tensor of shape {tuple(self.data.shape)}")

    @property
    def shape(self) -> MapShape:
        return MapShape(self.data.shape[1], (self.data.shape[2], self.data.shape[3]))


@dataclass(frozen=True)
class VisualTokens:
    """Tokens of V views. data: [V, N, C]; `grid` (h, w) with h * w = N where the tokens are a raster, row by row.

    gates: [V, N, adapters], what each adapter of a mixture contributed, where they come from one; rows sum to one.
    """

    data: torch.Tensor
    grid: tuple[int, int] | None = None
    gates: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.data.ndim != 3:
            raise ValueError(f"visual tokens are [V, N, C]; got a tensor of shape {tuple(self.data.shape)}")
        if self.grid is not None and self.grid[0] * self.grid[1] != self.data.shape[1]:
            raise ValueError(
                f"a grid of {self.grid} has {self.grid[0] * self.grid[1]} cells; got {self.data.shape[1]} tokens"
            )

    @property
    def shape(self) -> TokenShape:
        return TokenShape(self.data.shape[1], self.data.shape[2], self.grid)
