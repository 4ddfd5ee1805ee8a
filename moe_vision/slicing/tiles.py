"""InternVL 1.5's dynamic tiles (Chen et al., 2024): the grid of tiles whose shape is nearest, then a thumbnail.

After OpenGVLab/InternVL, internvl_chat/internvl/train/dataset.py.
"""

from dataclasses import dataclass

from moe_vision.registry import SLICING
from moe_vision.slicing.base import SlicingPolicy, TokensOf, check_image_size
from moe_vision.slicing.plan import Marker, Plan, PlanError, Resize, Segment, Size, View, slices_of


@SLICING.register("tiles")
@dataclass(frozen=True, kw_only=True)
class TileSlicing(SlicingPolicy):
    """min_tiles, max_tiles: of one image; several images in a prompt share max_tiles. tile_size: side in pixels.

    thumbnail: the whole image as one more tile, last, where there is more than one. start, end: tokens around the
    image, none if null.
    """

    min_tiles: int = 1
    max_tiles: int = 12
    tile_size: int = 448
    thumbnail: bool = True
    tokens_per_tile: int | None = None
    start: str | None = "<img>"
    end: str | None = "</img>"

    def __post_init__(self) -> None:
        self.check_view_limit("max_tiles")
        self.check_positive("min_tiles", "tile_size", "tokens_per_tile")
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} of slicing 'tiles' is above max_tiles {self.max_tiles}")

    def plan_image(self, size: Size, images: int) -> Plan:
        most = max(1, self.max_tiles // images)
        rows, columns = layout = self.layout(size, min(self.min_tiles, most), most)
        side = self.tile_size
        resized = Resize((side * rows, side * columns))
        views = slices_of((resized,), layout, (side, side))
        if self.thumbnail and len(views) > 1:
            views += (View("thumbnail", (Resize((side, side)),)),)
        segments = tuple(self.segment(view) for view in views)
        return Plan(self.type_name, size, self.framed(segments), layout)

    def plan_video(self, size: Size, frames: int) -> Plan:
        """Every frame is one tile; the words between them are the prompt's business."""
        check_image_size(size)
        if frames < 1:
            raise PlanError(f"a video of {frames} frames has nothing to see")
        resized = Resize((self.tile_size, self.tile_size))
        pieces = (self.framed((self.segment(View("slice", (resized,), frame)),)) for frame in range(frames))
        return Plan(self.type_name, size, tuple(piece for framed in pieces for piece in framed))

    def segment(self, view: View) -> Segment:
        return Segment((view,), (1, 1), (1, self.tokens_per_tile or 256))

    def framed(self, segments: tuple[Segment, ...]) -> tuple[Segment | Marker, ...]:
        start, end = Marker("image_start", self.start), Marker("image_end", self.end)
        return (*((start,) if self.start else ()), *segments, *((end,) if self.end else ()))

    def markers(self) -> tuple[Marker, ...]:
        return tuple(piece for piece in self.framed(()) if isinstance(piece, Marker))

    def layout(self, size: Size, least: int, most: int) -> Size:
        """(rows, columns) nearest to the image's shape; of shapes equally near, the larger grid if the image has the
        pixels for it."""
        height, width = size
        grids = sorted(
            (
                (columns, rows)
                for columns in range(1, most + 1)
                for rows in range(1, most // columns + 1)
                if columns * rows >= least
            ),
            key=lambda grid: (grid[0] * grid[1], grid[0]),
        )
        best, nearest = (1, 1), float("inf")
        for columns, rows in grids:
            difference = abs(width / height - columns / rows)
            enough = width * height > 0.5 * self.tile_size**2 * columns * rows
            if difference < nearest or (difference == nearest and enough):
                best, nearest = (rows, columns), difference
        return best

    def fitted(self, tokens_of: TokensOf) -> SlicingPolicy:
        tile = (self.tile_size, self.tile_size)
        counts = {role: tokens_of(role, tile).num_tokens for role in ("slice", "thumbnail")}
        if len(set(counts.values())) > 1:
            raise ValueError(f"slicing 'tiles' needs as many tokens of a tile as of the thumbnail, not {counts}")
        return self.with_tokens("tokens_per_tile", counts["slice"])
