"""A plan: which views of an image a model sees, and the exact order of its tokens. Integers only, before any pixel.

(height, width) ─ SlicingPolicy.plan ─ Plan ┬ render(image, view) ─ one encoder input for each view
                                            └ pack(plan, features) ─ [num_tokens, D]
"""

from dataclasses import dataclass
from typing import Any, Literal

Size = tuple[int, int]
"""(height, width); in pixels for images and views, in cells for grids."""

Role = Literal["overview", "slice", "thumbnail"]
Filter = Literal["bicubic", "bilinear"]


class PlanError(ValueError):
    """A size that a policy refuses; the message names the size, the cause and the cure."""


@dataclass(frozen=True)
class Resize:
    """Bring the picture to `size` (height, width) pixels, whatever its shape."""

    size: Size
    filter: Filter = "bicubic"


@dataclass(frozen=True)
class Pad:
    """Lay the picture on a canvas of `size`, its corner at `offset` (top, left). colour: red, green, blue in 0..255."""

    size: Size
    offset: Size
    colour: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Crop:
    """Cut `size` pixels out of the picture, from `offset` (top, left) on."""

    size: Size
    offset: Size


Step = Resize | Pad | Crop


@dataclass(frozen=True)
class View:
    """One encoder input: the steps that make it of the image. frame: which picture of a video it is made of."""

    role: Role
    steps: tuple[Step, ...]
    frame: int = 0

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.steps[-1].size

    @property
    def region(self) -> tuple[float, float, float, float]:
        """(top, left, height, width) of what it shows, as shares of the picture that its last crop was cut from."""
        last = self.steps[-1]
        if not isinstance(last, Crop) or len(self.steps) < 2:
            return (0.0, 0.0, 1.0, 1.0)
        (height, width), (top, left) = self.steps[-2].size, last.offset
        return (top / height, left / width, last.size[0] / height, last.size[1] / width)


@dataclass(frozen=True)
class Marker:
    """A token that says where a part of the image begins or ends.

    text: a token of the tokenizer in use, found by that text; None for an embedding that the model learns. follows:
    text before it that decides which of several tokens with that text is meant.
    """

    name: str
    text: str | None = None
    follows: str = ""


@dataclass(frozen=True)
class Segment:
    """One block of visual tokens: the grids of its views stitched in rows and columns, cropped, resized, laid out.

    layout: (rows, columns) of views. grid: cells of one view. keep: (top, left, height, width) of the stitched cells
    that are no padding, all if None. out: (height, width) that these are brought to, bilinearly, if not their own.
    row_end: marker behind each row.
    """

    views: tuple[View, ...]
    layout: Size
    grid: Size
    keep: tuple[int, int, int, int] | None = None
    out: Size | None = None
    row_end: Marker | None = None

    @property
    def stitched(self) -> Size:
        """Cells of all views together."""
        return (self.layout[0] * self.grid[0], self.layout[1] * self.grid[1])

    @property
    def shape(self) -> Size:
        """(rows, tokens in a row) without row ends."""
        return self.out or (self.keep[2:] if self.keep else self.stitched)


@dataclass(frozen=True)
class Plan:
    """What a model sees of one image of `size`. grid: (rows, columns) of slices, None where there are none."""

    policy: str
    size: Size
    pieces: tuple[Segment | Marker, ...]
    grid: Size | None = None

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(piece for piece in self.pieces if isinstance(piece, Segment))

    @property
    def views(self) -> tuple[View, ...]:
        """Every view, in the order in which its tokens first appear."""
        return tuple(view for segment in self.segments for view in segment.views)

    @property
    def num_visual_tokens(self) -> int:
        return sum(segment.shape[0] * segment.shape[1] for segment in self.segments)

    @property
    def num_marker_tokens(self) -> int:
        row_ends = sum(segment.shape[0] for segment in self.segments if segment.row_end is not None)
        return row_ends + sum(isinstance(piece, Marker) for piece in self.pieces)

    @property
    def num_tokens(self) -> int:
        """Tokens that the language model gets for the image."""
        return self.num_visual_tokens + self.num_marker_tokens

    @property
    def local_tokens(self) -> tuple[bool, ...]:
        """For each of `num_tokens`, whether it is of a slice: not a marker, nor of the whole image."""
        local: list[bool] = []
        for piece in self.pieces:
            if isinstance(piece, Marker):
                local.append(False)
                continue
            row = [piece.views[0].role == "slice"] * piece.shape[1] + [False] * (piece.row_end is not None)
            local += row * piece.shape[0]
        return tuple(local)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `moe-vision plan --json` prints them."""
        return {
            "policy": self.policy,
            "size_hw": list(self.size),
            "grid_rows_cols": list(self.grid) if self.grid is not None else None,
            "views": [{"role": view.role, "size_hw": list(view.size)} for view in self.views],
            "num_visual_tokens": self.num_visual_tokens,
            "num_marker_tokens": self.num_marker_tokens,
        }


def slices_of(steps: tuple[Step, ...], layout: Size, tile: Size, role: Role = "slice") -> tuple[View, ...]:
    """Views that cut what `steps` made into rows and columns of equal tiles, row by row."""
    rows, columns = layout
    return tuple(
        View(role, (*steps, Crop(tile, (row * tile[0], column * tile[1]))))
        for row in range(rows)
        for column in range(columns)
    )


def factor_grids(count: int) -> list[Size]:
    """Every (columns, rows) with `count` cells, by ascending columns: published codes break ties by this order."""
    return [(columns, count // columns) for columns in range(1, count + 1) if count % columns == 0]
