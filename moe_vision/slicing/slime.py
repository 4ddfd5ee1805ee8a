"""SliME's views (Zhang et al., 2024): a square global view, and two to seven tiles of a padded canvas.

After yfzhang114/SliME, llava/mm_utils.py. The grid is chosen among LLaVA-UHD's candidates by LLaVA-NeXT's rule.
"""

import math
from dataclasses import dataclass

from moe_vision.registry import SLICING
from moe_vision.slicing.base import SlicingPolicy, TokensOf, raster
from moe_vision.slicing.canvas import best_canvas, centred
from moe_vision.slicing.plan import Marker, Plan, Resize, Segment, Size, View, factor_grids, slices_of


@SLICING.register("slime")
@dataclass(frozen=True, kw_only=True)
class SlimeSlicing(SlicingPolicy):
    """max_tiles: the number about which grids are looked for, so that one more is possible. tile_size: side in pixels.

    tokens_per_tile, tokens_per_overview: null for the published 144 and 576. separator: token between global view and
    tiles.
    """

    max_tiles: int = 6
    tile_size: int = 336
    tokens_per_tile: int | None = None
    tokens_per_overview: int | None = None
    separator: str = ","

    def __post_init__(self) -> None:
        self.check_view_limit("max_tiles")
        self.check_positive("tile_size", "tokens_per_tile", "tokens_per_overview")
        if self.tokens_per_tile is not None and math.isqrt(self.tokens_per_tile) ** 2 != self.tokens_per_tile:
            raise ValueError(f"tokens_per_tile {self.tokens_per_tile} of slicing 'slime': must be a square, as 144")

    def plan_image(self, size: Size, images: int) -> Plan:
        tile = (self.tile_size, self.tile_size)
        side = math.isqrt(self.tokens_per_tile or 144)
        columns, rows = self.grid(size)
        canvas = (rows * self.tile_size, columns * self.tile_size)
        overview = Segment((View("overview", (Resize(tile),)),), (1, 1), (1, self.tokens_per_overview or 576))
        tiles = Segment(slices_of(centred(size, canvas), (rows, columns), tile), (rows, columns), (side, side))
        return Plan(self.type_name, size, (overview, *self.markers(), tiles), (rows, columns))

    def grid(self, size: Size) -> Size:
        """(columns, rows) of the tiles."""
        count = min(math.ceil(size[0] * size[1] / self.tile_size**2), self.max_tiles)
        count = max(count, 2)
        counts = (count, count + 1) if count == 2 else (count - 1, count, count + 1)
        grids = [grid for number in counts for grid in factor_grids(number)]
        canvases = {(rows * self.tile_size, columns * self.tile_size): (columns, rows) for columns, rows in grids}
        return canvases[best_canvas(size, canvases)]

    def markers(self) -> tuple[Marker, ...]:
        return (Marker("separator", self.separator),)

    def fitted(self, tokens_of: TokensOf) -> SlicingPolicy:
        tile = (self.tile_size, self.tile_size)
        rows, columns = raster(tokens_of("slice", tile), "slicing 'slime'")
        if rows != columns:
            raise ValueError(f"slicing 'slime' needs a square raster of tokens; slices give {[rows, columns]}")
        fitted = self.with_tokens("tokens_per_tile", rows * columns)
        return fitted.with_tokens("tokens_per_overview", tokens_of("overview", tile).num_tokens)
