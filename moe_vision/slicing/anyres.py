"""LLaVA-OneVision's higher AnyRes (Li et al., 2024): the whole image, then tiles of a padded canvas whose padding is
cut off again and whose tokens are thinned out where they are too many.

After LLaVA-VL/LLaVA-NeXT, llava/mm_utils.py and llava/model/llava_arch.py.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moe_vision.registry import SLICING
from moe_vision.slicing.base import SlicingPolicy, TokensOf, check_image_size, square
from moe_vision.slicing.canvas import best_canvas, centred, padded
from moe_vision.slicing.plan import Marker, Plan, PlanError, Resize, Segment, Size, View, slices_of

NEWLINE = Marker("image_newline")
ENLARGEMENT = 1.1
"""How far the side of a token grid may exceed its budget before it is resized."""


@SLICING.register("anyres")
@dataclass(frozen=True, kw_only=True)
class AnyresSlicing(SlicingPolicy):
    """max_grid: tiles along one side, at most. tile_size: side in pixels. max_views: tiles' worth of tokens that are
    kept of all tiles. tokens_per_side: of a tile's token raster. padding_colour: around an image that is one of
    several in a prompt, where each is a single square view. video_newline: where a video's frames get newlines.
    """

    max_grid: int = 6
    tile_size: int = 384
    max_views: int = 9
    tokens_per_side: int | None = None
    padding_colour: tuple[int, int, int] = (127, 127, 127)
    video_newline: Literal["one_token", "grid", "frame", "no_token"] = "one_token"

    def __post_init__(self) -> None:
        self.check_positive("max_grid", "tile_size", "max_views", "tokens_per_side")
        object.__setattr__(self, "padding_colour", tuple(self.padding_colour))

    @property
    def side(self) -> int:
        return self.tokens_per_side or 27

    def plan_image(self, size: Size, images: int) -> Plan:
        tile, grid = (self.tile_size, self.tile_size), (self.side, self.side)
        if images > 1:
            view = View("overview", padded(size, tile, self.padding_colour))
            return Plan(self.type_name, size, (Segment((view,), (1, 1), grid), NEWLINE))
        canvases = [
            (rows * self.tile_size, columns * self.tile_size)
            for columns in range(1, self.max_grid + 1)
            for rows in range(1, self.max_grid + 1)
        ]
        canvas = best_canvas(size, canvases)
        layout = (canvas[0] // self.tile_size, canvas[1] // self.tile_size)
        overview = Segment((View("overview", (Resize(tile),)),), (1, 1), grid)
        views = slices_of(centred(size, canvas), layout, tile)
        keep = unpadded(size, (layout[0] * self.side, layout[1] * self.side))
        tiles = Segment(views, layout, grid, keep, self.thinned(keep[2:]), NEWLINE)
        return Plan(self.type_name, size, (overview, tiles), layout)

    def thinned(self, grid: Size) -> Size | None:
        """Size that a token raster is resized to, None if it is within its budget of max_views tiles."""
        times = math.sqrt(grid[0] * grid[1] / (self.max_views * self.side**2))
        return (int(grid[0] // times), int(grid[1] // times)) if times > ENLARGEMENT else None

    def plan_video(self, size: Size, frames: int) -> Plan:
        """Every frame in one view, its tokens brought to half the side, newlines as `video_newline` says."""
        check_image_size(size)
        if frames < 1:
            raise PlanError(f"a video of {frames} frames has nothing to see")
        resized, half = Resize((self.tile_size, self.tile_size)), math.ceil(self.side / 2)
        row_end = NEWLINE if self.video_newline == "grid" else None
        pieces: list[Segment | Marker] = []
        for frame in range(frames):
            view = View("overview", (resized,), frame)
            pieces.append(Segment((view,), (1, 1), (self.side, self.side), None, (half, half), row_end))
            if self.video_newline == "frame" or (self.video_newline == "one_token" and frame == frames - 1):
                pieces.append(NEWLINE)
        return Plan(self.type_name, size, tuple(pieces))

    def markers(self) -> tuple[Marker, ...]:
        return (NEWLINE,)

    def fitted(self, tokens_of: TokensOf) -> SlicingPolicy:
        tile = (self.tile_size, self.tile_size)
        sides = {role: square(tokens_of(role, tile), "slicing 'anyres'") for role in ("overview", "slice")}
        if len(set(sides.values())) > 1:
            raise ValueError(f"slicing 'anyres' needs equal rasters of the overview and of a tile; this model: {sides}")
        return self.with_tokens("tokens_per_side", sides["slice"])


def unpadded(size: Size, cells: Size) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the cells that are no padding; an odd remainder stays on."""
    (height, width), (rows, columns) = size, cells
    if width / height > columns / rows:
        pad = (rows - int(height * (columns / width))) // 2
        return (pad, 0, rows - 2 * pad, columns)
    pad = (columns - int(width * (rows / height))) // 2
    return (0, pad, rows, columns - 2 * pad)
