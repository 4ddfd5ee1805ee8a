"""Qwen2-VL's native resolution (Wang et al., 2024): the image at its own size, rounded to whole tokens.

After transformers, models/qwen2_vl: `smart_resize`, the order of patches, and multimodal rotary positions. Positions
follow the paper's rule: text goes on behind the largest position of an image or video, in any of the three directions.
transformers 5.23 counts past the largest of height and width alone, so that text runs into a long video.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moe_vision.registry import SLICING
from moe_vision.slicing.base import SlicingPolicy, TokensOf, raster
from moe_vision.slicing.plan import Marker, Plan, PlanError, Resize, Segment, Size, View

MAX_ASPECT = 200


@SLICING.register("native")
@dataclass(frozen=True, kw_only=True)
class NativeSlicing(SlicingPolicy):
    """min_pixels, max_pixels: of the view, for each image; transformers' own defaults. factor: pixels along one side of
    a token, a patch of 14 times a merge of 2. start, end: tokens around the image, none if null.
    """

    has_slices: ClassVar[bool] = False

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    factor: int = 28
    start: str | None = "<|vision_start|>"
    end: str | None = "<|vision_end|>"

    def __post_init__(self) -> None:
        self.check_positive("min_pixels", "max_pixels", "factor")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} of slicing 'native' is above max_pixels {self.max_pixels}")

    def plan_image(self, size: Size, images: int) -> Plan:
        resized = self.smart_resize(size)
        grid = (resized[0] // self.factor, resized[1] // self.factor)
        segment = Segment((View("overview", (Resize(resized),)),), (1, 1), grid)
        start, end = Marker("image_start", self.start), Marker("image_end", self.end)
        pieces = (*((start,) if self.start else ()), segment, *((end,) if self.end else ()))
        return Plan(self.type_name, size, pieces)

    def smart_resize(self, size: Size) -> Size:
        """Nearest size in whole tokens within the pixel budget. Raises PlanError for shapes beyond 1:200."""
        height, width = size
        if max(size) / min(size) > MAX_ASPECT:
            raise PlanError(
                f"an image of {height}x{width} pixels is longer than {MAX_ASPECT} times its breadth, which slicing "
                "'native' refuses: crop it, or choose another policy"
            )
        rounded = (round(height / self.factor) * self.factor, round(width / self.factor) * self.factor)
        pixels = rounded[0] * rounded[1]
        if pixels > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            return self.whole(math.floor, height / shrink, width / shrink)
        if pixels < self.min_pixels:  # also where a side rounds to nothing
            grow = math.sqrt(self.min_pixels / (height * width))
            return self.whole(math.ceil, height * grow, width * grow)
        return rounded

    def whole(self, rounding: Callable[[float], int], height: float, width: float) -> Size:
        rows, columns = (max(1, rounding(side / self.factor)) for side in (height, width))
        return (rows * self.factor, columns * self.factor)

    def markers(self) -> tuple[Marker, ...]:
        named = (Marker("image_start", self.start), Marker("image_end", self.end))
        return tuple(marker for marker in named if marker.text)

    def fitted(self, tokens_of: TokensOf) -> SlicingPolicy:
        for cells in ((2, 3), (5, 4)):
            size = (cells[0] * self.factor, cells[1] * self.factor)
            grid = raster(tokens_of("overview", size), "slicing 'native'")
            if grid != cells:
                raise ValueError(
                    f"slicing 'native' with factor {self.factor} promises {list(cells)} tokens of a view of "
                    f"{list(size)} pixels; this model makes {list(grid)}: set factor to the pixels along one side of a "
                    "token, and take experts with `sizing: native` and a mixer with `grid: null`"
                )
        return self


def block_order(grid: Size, merge: int) -> list[Size]:
    """(row, column) of every patch of a grid in Qwen2-VL's order: blocks of merge x merge patches, row by row."""
    rows, columns = grid
    return [
        (row + down, column + across)
        for row in range(0, rows, merge)
        for column in range(0, columns, merge)
        for down in range(merge)
        for across in range(merge)
    ]


def rotary_positions(pieces: Sequence[int | tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Multimodal rotary positions (time, row, column) of a prompt, by the rule of Qwen2-VL's paper.

    pieces: a number of text tokens, or (frames, rows, columns) of an image's or video's tokens.
    """
    positions: list[tuple[int, int, int]] = []
    start = 0
    for piece in pieces:
        if isinstance(piece, int):
            positions += [(start + i, start + i, start + i) for i in range(piece)]
            start += piece
        else:
            frames, rows, columns = piece
            positions += [
                (start + frame, start + row, start + column)
                for frame in range(frames)
                for row in range(rows)
                for column in range(columns)
            ]
            start += max(piece)
    return positions
