"""Opening images: only formats on a list, only regular files, and every fault as an ImageError that names the file."""

import base64
import io
import os
import stat
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image

from moe_vision.slicing.pixels import ImageError, to_rgb

IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are opened, by contents and not by the name of the file. Some others run programs or fetch files."""

URL_SECONDS = 60


@cache
def readable_formats() -> list[str]:
    """The formats of the list that this Pillow reads."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


@contextmanager
def opened_image(file: Path | IO[bytes], name: str) -> Iterator[Image.Image]:
    """An image's header; its pixels are decoded when they are needed. name: how errors call it.

    Raises ImageError for whatever Pillow raises, here and inside of the block. Pillow's warning of large images is not
    shown, because too large ones are refused.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=readable_formats())
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name}: is too large to decode safely ({error}); make it smaller") from error
        except Image.UnidentifiedImageError as error:
            formats = ", ".join(readable_formats())
            raise ImageError(
                f"{name}: cannot be read as an image of a known format ({formats}); replace or convert it"
            ) from error
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            raise ImageError(f"{name}: cannot be read as an image ({reason(error)}); replace it") from error
        with image:
            try:
                yield image
            except ImageError as error:
                raise ImageError(f"{name}: {error}", error.missing) from error
            except Exception as error:
                raise ImageError(
                    f"{name}: cannot be decoded ({reason(error)}); it may be truncated, replace it"
                ) from error


def reason(error: Exception) -> str:
    """An error in a few words; some of Pillow's have no text."""
    return str(error) or type(error).__name__


def check_regular_file(path: Path, name: str) -> None:
    """Raise ImageError unless `path` is a file with contents that can be opened without waiting for them."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(f"{name}: no such file; correct the path, or the folder that it starts from", True) from error
    except PermissionError as error:
        raise ImageError(f"{name}: cannot be opened ({reason(error)}); make it readable") from error
    except (OSError, ValueError) as error:  # too long, or a loop of links; ValueError: a zero byte
        raise ImageError(f"{name}: is no path of a file ({reason(error)}); correct it", True) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, device or socket"
        raise ImageError(f"{name}: is {kind}, not a file; give the path of an image file")
    if status.st_size == 0:
        raise ImageError(f"{name}: has zero bytes; fetch it again")


@contextmanager
def opened_file(path: Path) -> Iterator[Image.Image]:
    """`opened_image` of a file. Raises ImageError that names it."""
    name = f"image {str(path)!r}" if not str(path).isprintable() else f"image '{path}'"
    check_regular_file(path, name)
    with opened_image(path, name) as image:
        yield image


def read_image(source: str | os.PathLike[str]) -> Image.Image:
    """Decode an image from a path, a URL, a data URI or a base64 string, as `to_rgb` makes it. Raises ImageError."""
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        request = urllib.request.Request(text, headers={"User-Agent": "moe-vision"})
        try:
            with urllib.request.urlopen(request, timeout=URL_SECONDS) as response:
                content = response.read()
        except (OSError, ValueError) as error:
            raise ImageError(f"image '{text}': cannot be fetched ({reason(error)}); check the address") from error
        with opened_image(io.BytesIO(content), f"image '{text}'") as image:
            return to_rgb(image)
    if not isinstance(source, str) or os.path.lexists(text):
        with opened_file(Path(text)) as image:
            return to_rgb(image)
    name = f"image {text if len(text) <= 80 else text[:77] + '...'!r}, which is no file or URL, as base64"
    try:
        content = base64.b64decode(text.split(",", 1)[1] if text.startswith("data:image/") else text)
    except (ValueError, IndexError) as error:
        raise ImageError(f"{name}: cannot be read ({reason(error)}); correct the path", True) from error
    with opened_image(io.BytesIO(content), name) as image:
        return to_rgb(image)
