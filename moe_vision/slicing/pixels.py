"""Images of every kind as 8-bit RGB, by one rule for files, Pillow images, arrays and tensors.

8-bit values stay as they are, 16-bit ones are scaled from 0..65535. Wider integers have to be in 0..255. Floats have to
be in 0..1 or in 0..255. Anything else has no known white, and is refused.
"""

import numpy as np
import torch
from PIL import Image, ImageOps

ROUNDING = 1e-3
"""How far a float may be outside of 0..1: resizing overshoots."""

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
"""Tags of a TIFF file. Photometric 0: the largest value is black."""


class ImageError(ValueError):
    """An image that cannot be used. missing: there is no such file."""

    def __init__(self, problem: str, missing: bool = False) -> None:
        super().__init__(problem)
        self.missing = missing


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image turned upright as its EXIF data says, without transparency (over white), as 8-bit RGB. Doing it
    twice changes nothing. Raises ImageError if the range of its values is not known.
    """
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        grey = Image.fromarray(wide_grey(image, np.asarray(upright)))
        return grey.convert("RGB")
    if upright.mode in ("La", "RGBa"):  # colours that are multiplied by their transparency
        upright = upright.convert({"La": "LA", "RGBa": "RGBA"}[upright.mode])
    if "A" in upright.getbands() or "transparency" in upright.info:
        layered = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def wide_grey(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """Values [H, W] of an image with more than 8 bits, as bytes. image: the one that they are from, with its tags."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and image.format == "PPM":  # Pillow has scaled these to 16 bits
        values = values.astype(np.uint16)
    if image.mode.startswith("I;16"):
        values = values.astype(np.uint16)  # from either byte order
        if tags.get(BITS_PER_SAMPLE) == (12,):
            values = values << 4 | values >> 8
    grey = to_bytes(torch.from_numpy(np.array(values))).numpy()
    if tags.get(PHOTOMETRIC) == 0:
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):  # the one value that is transparent
        grey = np.where(values == clear, np.uint8(255), grey)
    return grey


def to_bytes(values: torch.Tensor) -> torch.Tensor:
    """Pixel values of any type as uint8, of the same shape. Raises ImageError if their range is not known."""
    if values.dtype == torch.uint8 or values.numel() == 0:
        return values.to(torch.uint8)
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    if values.dtype == torch.uint16:
        return scaled(values.to(torch.float32), 65535)
    if values.requires_grad:
        raise ImageError("pixel values are rounded to bytes, which has no gradient: give image.detach()")
    low, high = values.min().item(), values.max().item()
    if not values.is_floating_point():
        if values.is_complex() or not 0 <= low <= high <= 255:
            raise ImageError(
                f"its integers go from {low} to {high}, of a range that is not known: give 8 bits (0..255), 16 bits "
                "without sign (0..65535), or floats in 0..1"
            )
        return values.to(torch.uint8)
    if -ROUNDING <= low <= high <= 1 + ROUNDING:
        return scaled(values.to(torch.float32), 1)
    if low >= 0 and 2 <= high <= 255:
        return scaled(values.to(torch.float32), 255)
    raise ImageError(
        f"its floats go from {low:.6g} to {high:.6g}, of a range that is not known: scale them to 0..1, or to 0..255"
    )


def scaled(values: torch.Tensor, white: int) -> torch.Tensor:
    """Floats in 0..white as bytes."""
    return (values * (255 / white)).round().clamp(0, 255).to(torch.uint8)
