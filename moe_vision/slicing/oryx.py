"""Oryx's native resolution (Liu et al., 2024): a small copy of the whole image, then the image at its own size.

After Oryx-mllm/Oryx, oryx/mm_utils.py, with the settings of scripts/train_oryx_7b.sh. Sizes are rounded down to the
stride, so that very thin images have no rows or columns left and are refused.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moe_vision.registry import SLICING
from moe_vision.slicing.base import SlicingPolicy, TokensOf, check_image_size, raster
from moe_vision.slicing.plan import Marker, Plan, PlanError, Resize, Segment, Size, View

BEGIN, NEWLINE, SEPARATOR, END = (Marker(f"image_{name}") for name in ("begin", "newline", "separator", "end"))
SMALL = 32
"""Sides below this many pixels are enlarged to twice as many first."""


@SLICING.register("oryx")
@dataclass(frozen=True, kw_only=True)
class OryxSlicing(SlicingPolicy):
    """low_size: side in pixels of the square whose area the small copy fills. max_size, min_size: the same of the
    image itself. stride: sides of images are multiples of it. patch_size: pixels along one side of a token.

    video_max_size, video_min_size: as max_size and min_size, of a frame. video_compression: cells along the side of
    the square that one token of a video stands for, 2 (a quarter of the tokens) or, for long ones, 4 (a sixteenth);
    sides of frames are multiples of 32 times it.
    """

    low_size: int = 384
    max_size: int = 1536
    min_size: int = 0
    stride: int = 32
    patch_size: int = 16
    video_max_size: int = 480
    video_min_size: int = 288
    video_compression: Literal[2, 4] = 2

    def __post_init__(self) -> None:
        self.check_positive("low_size", "max_size", "stride", "patch_size", "video_max_size")
        if self.stride % self.patch_size:
            raise ValueError(f"stride {self.stride} of slicing 'oryx' is no multiple of patch_size {self.patch_size}")
        if self.min_size > self.max_size or self.video_min_size > self.video_max_size:
            raise ValueError("slicing 'oryx': min_size and video_min_size must not be above their maxima")

    def plan_image(self, size: Size, images: int) -> Plan:
        steps: tuple[Resize, ...] = ()
        if min(size) < SMALL:
            steps = (Resize(enlarged(size)),)
        enlarged_size = steps[-1].size if steps else size
        high = self.limited(enlarged_size, self.min_size, self.max_size, self.stride, size)
        steps += (Resize(high),)
        low = self.limited(high, self.low_size, self.low_size, self.stride, size)
        segments = [
            Segment((view,), (1, 1), self.cells(view.size), row_end=NEWLINE)
            for view in (View("overview", (*steps, Resize(low))), View("slice", steps))
        ]
        return Plan(self.type_name, size, (BEGIN, segments[0], SEPARATOR, segments[1], END))

    def plan_video(self, size: Size, frames: int) -> Plan:
        """Every frame at its own size, its tokens compressed."""
        check_image_size(size)
        if frames < 1:
            raise PlanError(f"a video of {frames} frames has nothing to see")
        factor = self.video_compression
        resized = self.limited(size, self.video_min_size, self.video_max_size, 32 * factor, size)
        rows, columns = self.cells(resized)
        pieces: list[Segment | Marker] = [BEGIN]
        for frame in range(frames):
            view = View("overview", (Resize(resized),), frame)
            grid = (rows // factor, columns // factor)
            pieces += [Segment((view,), (1, 1), grid, row_end=NEWLINE), SEPARATOR]
        return Plan(self.type_name, size, (*pieces, END))

    def cells(self, size: Size) -> Size:
        return (size[0] // self.patch_size, size[1] // self.patch_size)

    def limited(self, size: Size, least: int, most: int, stride: int, image: Size) -> Size:
        """Size within the squares of `least` and `most`, rounded down to the stride.

        Raises PlanError, naming the size of the image, where nothing is left.
        """
        height, width = size
        scale = 1.0
        if height * width > most**2:
            scale = math.sqrt(most**2 / (height * width))
        elif height * width < least**2:
            scale = math.sqrt(least**2 / (height * width))
        result = (int(height * scale / stride) * stride, int(width * scale / stride) * stride)
        if min(result) < 1:
            raise PlanError(
                f"an image of {image[0]}x{image[1]} pixels is too thin for slicing 'oryx': at {height * scale:.0f}x"
                f"{width * scale:.0f} a side is below the stride of {stride}; pad it, or choose another policy"
            )
        return result

    def markers(self) -> tuple[Marker, ...]:
        return (BEGIN, NEWLINE, SEPARATOR, END)

    def fitted(self, tokens_of: TokensOf) -> SlicingPolicy:
        for cells in ((4, 6), (8, 2)):
            size = (cells[0] * self.patch_size, cells[1] * self.patch_size)
            for role in ("overview", "slice"):
                grid = raster(tokens_of(role, size), "slicing 'oryx'")
                if grid != cells:
                    raise ValueError(
                        f"slicing 'oryx' with patch_size {self.patch_size} promises {list(cells)} tokens of a view of "
                        f"{list(size)} pixels; this model makes {list(grid)}: set patch_size to the pixels along one "
                        "side of a token, and take experts with `sizing: native` and a mixer with `grid: null`"
                    )
        return self


def enlarged(size: Size) -> Size:
    """A size whose sides below SMALL grow to twice SMALL, its shape kept; of two small sides, the smaller one."""
    height, width = size
    short = min(size) if max(size) < SMALL else (width if width < SMALL else height)
    ratio = 2 * SMALL / short
    return (int(height * ratio), int(width * ratio))
