"""Padded canvases of whole tiles, as LLaVA-NeXT chooses and fills them; `anyres` and `slime` cut tiles from one."""

import math
from collections.abc import Iterable

from moe_vision.slicing.plan import Pad, Resize, Size


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
