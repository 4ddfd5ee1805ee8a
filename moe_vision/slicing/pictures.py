"""Pictures as Pillow opens them, before they are pixels of a view."""

from PIL import Image


def eight_bit(picture: Image.Image) -> Image.Image:
    """A picture of 16-bit grey with 8 bits in place of 16, any other as it is; Pillow would clip it at 255."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return picture.convert("I").point(lambda value: value / 257).convert("L")
    return picture
