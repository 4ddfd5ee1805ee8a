"""LLaVA-UHD's slices (Guo et al., 2024): as many as the image fills, in the grid nearest to its shape, none padded.

After thunlp/LLaVA-UHD, branch LLaVA-UHD-v1, llava/slice_process.py; `edition: first` after the release of March 2024,
which yfzhang114/SliME keeps in llava/process_image.py.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moe_vision.registry import SLICING
from moe_vision.slicing.base import SlicingPolicy, TokensOf
from moe_vision.slicing.plan import Crop, Marker, Plan, Resize, Segment, Size, View, factor_grids


@SLICING.register("uhd")
@dataclass(frozen=True, kw_only=True)
class UhdSlicing(SlicingPolicy):
    """max_slices: 6 in the paper, 7 in the published code; any number. scale_resolution: side in pixels of the square
    whose area a slice fills. patch_size: both sides of a view are multiples of it. tokens_per_view: 64 in the paper,
    144 in the published code. slice_end, row_end: tokens behind a slice, and behind the last one of a row.

    A view has at most (scale_resolution / patch_size)² patches, but never less than one row or column of them.
    """

    max_slices: int = 6
    scale_resolution: int = 336
    patch_size: int = 14
    tokens_per_view: int | None = None
    slice_end: str = ","
    row_end: str = "\n"
    edition: Literal["published", "first"] = "published"

    def __post_init__(self) -> None:
        self.check_view_limit("max_slices")
        self.check_positive("scale_resolution", "patch_size", "tokens_per_view")
        if self.scale_resolution < self.patch_size:
            raise ValueError(
                f"scale_resolution {self.scale_resolution} of slicing 'uhd' is below patch_size {self.patch_size}"
            )

    def plan_image(self, size: Size, images: int) -> Plan:
        layout = self.layout(size)
        if layout is None:
            overview = View("overview", (Resize(self.view_size(size, enlarge=True)),))
            return Plan(self.type_name, size, (self.segment(overview),))
        rows, columns = layout
        cell = (max(size[0] // rows, 1), max(size[1] // columns, 1))
        height, width = self.view_size(cell, enlarge=True)
        refined = Resize((height * rows, width * columns))
        pieces: list[Segment | Marker] = []
        slice_end, row_end = self.markers()
        for row in range(rows):
            for column in range(columns):
                crop = Crop((height, width), (row * height, column * width))
                pieces.append(self.segment(View("slice", (refined, crop))))
                pieces.append(row_end if column == columns - 1 else slice_end)
        pieces.append(self.segment(View("overview", (Resize(self.view_size(size, enlarge=False)),))))
        return Plan(self.type_name, size, tuple(pieces), layout)

    def segment(self, view: View) -> Segment:
        return Segment((view,), (1, 1), (1, self.tokens_per_view or 64))

    def markers(self) -> tuple[Marker, ...]:
        # Behind a letter, so that it is the comma within a text that is meant and not one that begins a text.
        return (Marker("slice_end", self.slice_end, follows="a"), Marker("row_end", self.row_end, follows="a"))

    def layout(self, size: Size) -> Size | None:
        """(rows, columns) whose shape is nearest to the image's, by the logarithm; None where one view will do."""
        height, width = size
        count = min(math.ceil(height * width / self.scale_resolution**2), self.max_slices)
        if self.edition == "published":
            if count <= 1:
                return None
            counts = [n for n in (count - 1, count, count + 1) if 1 < n <= self.max_slices]
        else:
            counts = [n for n in (count - 1, count, count + 1) if n >= count or count > 2]
        log_ratio = math.log(width / height)
        # min() keeps the first of equals, as published; float rounding decides between mirrored grids.
        columns, rows = min(
            (grid for n in counts for grid in factor_grids(n)),
            key=lambda grid: abs(log_ratio - math.log(grid[0] / grid[1])),
        )
        return (rows, columns)

    def view_size(self, size: Size, *, enlarge: bool) -> Size:
        """Nearest size within the patch budget, in whole patches: smaller images grow to it only if `enlarge`."""
        height, width = size
        patch, budget = self.patch_size, self.scale_resolution
        if self.edition == "first":
            most = (budget // patch) ** 2
            scale = math.sqrt(most * (patch / height) * (patch / width))
            patches = (max(min(math.floor(scale * side / patch), most), 1) for side in size)
            return (next(patches) * patch, next(patches) * patch)
        if enlarge or height * width > budget**2:
            ratio = width / height
            height = int(budget / math.sqrt(ratio))
            width = int(height * ratio)
        return (max(height // patch, 1) * patch, max(width // patch, 1) * patch)

    def fitted(self, tokens_of: TokensOf) -> SlicingPolicy:
        patch, side = self.patch_size, self.scale_resolution // self.patch_size
        sizes = [(side, side), (side // 2 or 1, side * 2), (side * 2, side // 2 or 1), (1, side * side)]
        counts = {
            tokens_of(role, (rows * patch, columns * patch)).num_tokens
            for rows, columns in sizes
            for role in ("overview", "slice")
        }
        if len(counts) > 1:
            raise ValueError(
                f"slicing 'uhd' needs as many tokens of every view, whatever its shape; this model makes "
                f"{sorted(counts)}: choose the adapter perceiver or cell, or a fixed grid, for both branches"
            )
        return self.with_tokens("tokens_per_view", counts.pop())
