"""Scenes as pictures, drawn with Pillow."""

import math
import random

from PIL import Image, ImageDraw, ImageFont

from moe_vision.data.synthetic.scene import (
    BARS,
    CELL_PX,
    IMAGE_PX,
    MAX_BAR,
    Blob,
    Chart,
    Item,
    Label,
    Scene,
    Shape,
    Texture,
)  # fmt: skip

RGB = {
    "red": (220, 40, 40), "green": (40, 165, 60), "blue": (45, 85, 220), "yellow": (235, 205, 40),
    "purple": (150, 60, 180), "orange": (240, 135, 30),
}  # fmt: skip
FONT_PX = 14


def render(scene: Scene, spread: int = 1) -> Image.Image:
    """Draw a scene as an RGB picture of 128 x 128 pixels; colours, sizes and places vary a little with its seed.

    spread: make the picture so many times as high and wide, with items as large as ever, each somewhere in its cell:
    what is small print in such a picture is lost where the whole is shrunk to 128 pixels.
    """
    rng = random.Random(~scene.seed)
    grey = rng.randint(232, 248)
    picture = Image.new("RGB", (IMAGE_PX * spread, IMAGE_PX * spread), (grey, grey, grey))
    draw = ImageDraw.Draw(picture)
    for (row, column), item in scene.cells.items():
        top, left = (CELL_PX * (spread * n + (rng.randrange(spread) if spread > 1 else 0)) for n in (row, column))
        draw_item(draw, item, left=left, top=top, grey=grey, rng=rng)
    return picture


def draw_item(draw: ImageDraw.ImageDraw, item: Item, *, left: int, top: int, grey: int, rng: random.Random) -> None:
    """Draw one item into the cell whose corner is (left, top)."""
    match item:
        case Shape():
            radius = rng.randint(9, 12)
            centre = (left + 16 + rng.randint(-2, 2), top + 16 + rng.randint(-2, 2))
            draw_shape(draw, item.shape, centre, radius, jitter(RGB[item.colour], rng))
        case Label():
            # One font and one size, a little moved: small print that has to be read, not found.
            font = ImageFont.load_default(size=FONT_PX)
            corner = (left + 2 + rng.randint(0, 3), top + 6 + rng.randint(0, 3))
            draw.text(corner, item.digits, fill=(20, 20, 20), font=font)
        case Chart():
            for i, value in enumerate(item.values):
                x, height = left + 4 + 9 * i, round(value * 26 / MAX_BAR)
                draw.rectangle([x, top + 29 - height, x + 5, top + 29], fill=RGB[BARS[i]])
            draw.line([left + 2, top + 30, left + 29, top + 30], fill=(60, 60, 60))
        case Texture():
            draw_texture(draw, item.name, left, top)
        case Blob():
            radius, tone = 2 + 2 * item.size, grey - 26
            centre_x, centre_y = left + 16, top + 16
            box = [centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius]
            draw.ellipse(box, fill=(tone, tone, tone))


def jitter(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    """A colour, moved a little in every channel."""
    return tuple(max(0, min(255, channel + rng.randint(-14, 14))) for channel in colour)


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[int, int], radius: int, colour: tuple[int, ...]
) -> None:
    """Draw one of `SHAPES` inside the circle of `radius` around `centre`."""
    x, y = centre
    if shape == "circle":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    elif shape == "square":
        side = round(radius * 0.8)
        draw.rectangle([x - side, y - side, x + side, y + side], fill=colour)
    elif shape == "cross":
        arm = max(2, radius // 3)
        draw.rectangle([x - radius, y - arm, x + radius, y + arm], fill=colour)
        draw.rectangle([x - arm, y - radius, x + arm, y + radius], fill=colour)
    else:
        corners, inner = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (5, 0.4)}[shape]
        draw.polygon(polygon(centre, radius, corners, inner), fill=colour)


def polygon(centre: tuple[int, int], radius: int, corners: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a regular polygon with one on top; `inner` < 1 draws every second corner in, for a star."""
    steps = corners if inner == 1.0 else 2 * corners
    points = []
    for i in range(steps):
        length = radius if inner == 1.0 or i % 2 == 0 else radius * inner
        angle = 2 * math.pi * i / steps
        points.append((centre[0] + length * math.sin(angle), centre[1] - length * math.cos(angle)))
    return points


def draw_texture(draw: ImageDraw.ImageDraw, name: str, left: int, top: int) -> None:
    """Fill a cell but for its edge with black on white, in a pattern that repeats every 4 pixels."""
    draw.rectangle([left + 2, top + 2, left + 29, top + 29], fill=(255, 255, 255))
    for y in range(28):
        for x in range(28):
            dark = {
                "rows": y % 4 < 2,
                "columns": x % 4 < 2,
                "slants": (x + y) % 4 < 2,
                "checks": (x % 4 < 2) == (y % 4 < 2),
                "dots": x % 4 < 2 and y % 4 < 2,
                "mesh": x % 4 == 0 or y % 4 == 0,
            }[name]
            if dark:
                draw.point((left + 2 + x, top + 2 + y), fill=(60, 60, 60))
