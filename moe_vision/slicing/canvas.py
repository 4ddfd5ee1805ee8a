"""Padded canvases: of whole tiles, as LLaVA-NeXT chooses and fills them, and of one view in the shape of its input."""

import math
from collections.abc import Iterable

from moe_vision.slicing.plan import Pad, Resize, Size, Step

LARGEST_CANVAS_PX = 100_000_000
"""Pixels up to which an image is padded before it is made smaller, as published codes do; a strip that needs more is
made smaller first."""


def best_canvas(size: Size, canvases: Iterable[Size]) -> Size:
    """The canvas that keeps most of the image's pixels, then wastes least, then comes first (LLaVA-NeXT's rule)."""
    height, width = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return (kept, kept - canvas[0] * canvas[1])

    return max(canvases, key=merit)


def centred(size: Size, canvas: Size) -> tuple[Resize, Pad]:
    """Steps that fit an image into a canvas, its shape kept, in the middle of black."""
    scale_down, scale_across = canvas[0] / size[0], canvas[1] / size[1]
    if scale_across < scale_down:
        fitted = (min(math.ceil(size[0] * scale_across), canvas[0]), canvas[1])
    else:
        fitted = (canvas[0], min(math.ceil(size[1] * scale_down), canvas[1]))
    return (Resize(fitted), Pad(canvas, ((canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2)))


def padded(size: Size, canvas: Size, colour: tuple[int, int, int]) -> tuple[Step, ...]:
    """Steps that pad an image to the shape of a canvas, itself in the middle, and bring it to the canvas' size."""
    (height, width), (rows, columns) = size, canvas
    around = (max(height, round(width * rows / columns)), max(width, round(height * columns / rows)))
    if around[0] * around[1] > LARGEST_CANVAS_PX:
        scale = min(rows / height, columns / width)
        inner = (max(1, round(height * scale)), max(1, round(width * scale)))
        return (Resize(inner), Pad(canvas, ((rows - inner[0]) // 2, (columns - inner[1]) // 2), colour))
    return (Pad(around, ((around[0] - height) // 2, (around[1] - width) // 2), colour), Resize(canvas))
