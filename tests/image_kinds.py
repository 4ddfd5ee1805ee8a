"""Image files of every kind that people have, each with its pixels as 8-bit RGB, computed from what was stored."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 20
UNDO = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""EXIF orientation -> the number of Pillow's transposition that stores an upright image for it."""


def colours() -> np.ndarray:
    """An image [HEIGHT, WIDTH, 3] of 8 bits without symmetry."""
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def greys(largest: int = 255) -> np.ndarray:
    """An image [HEIGHT, WIDTH] of whole numbers from 0 to `largest`."""
    values = np.linspace(0, largest, HEIGHT * WIDTH).round().astype(np.int64)
    return values.reshape(HEIGHT, WIDTH)


def grey_rgb(values: np.ndarray) -> np.ndarray:
    """Grey levels in 0..255, of any type, as 8-bit RGB."""
    return np.repeat(np.rint(values).astype(np.uint8)[..., None], 3, axis=2)


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours over white by their opacity in 0..255."""
    share = alpha[..., None].astype(float) / 255
    return np.rint(rgb * share + 255 * (1 - share)).astype(np.uint8)


def png(values: np.ndarray, depth: int, kind: int, transparent: bytes = b"") -> bytes:
    """A PNG file of big-endian samples as they are: Pillow writes fewer kinds than it reads."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2" if depth == 16 else "u1"))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, kind, 0, 0, 0)
    clear = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IHDR", header) + clear + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def turned(folder: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """The same upright image under every orientation, in every lossless format that has one."""
    for suffix, options in {".png": {}, ".webp": {"lossless": True}, ".tif": {}}.items():
        for orientation in (1, *UNDO):
            exif = Image.Exif()
            exif[274] = orientation
            image = Image.fromarray(colours())
            if orientation > 1:
                image = image.transpose(Image.Transpose(UNDO[orientation]))
            path = folder / f"turned-{orientation}{suffix}"
            image.save(path, exif=exif, **options)
            yield path, colours()


def transparent(folder: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Every way in which an image says what is transparent."""
    alpha = greys().astype(np.uint8)
    rgba = np.dstack([colours(), alpha])
    Image.fromarray(rgba).save(folder / "rgba.png")
    yield folder / "rgba.png", over_white(colours(), alpha)
    Image.fromarray(rgba).save(folder / "rgba.webp", lossless=True, exact=True)
    yield folder / "rgba.webp", over_white(colours(), alpha)
    Image.fromarray(np.dstack([colours()[..., 0], alpha])).save(folder / "la.png")
    yield folder / "la.png", over_white(np.repeat(colours()[..., :1], 3, 2), alpha)
    first = colours()[0, 0]
    hidden = (colours() == first).all(2)
    Image.fromarray(colours()).save(folder / "clear.png", transparency=tuple(map(int, first)))
    yield folder / "clear.png", np.where(hidden[..., None], 255, colours()).astype(np.uint8)
    index = (greys() % 4).astype(np.uint8)
    paletted = Image.fromarray(index, "P")
    palette = np.array([[200, 10, 20], [10, 220, 30], [30, 40, 250], [90, 90, 90]], dtype=np.uint8)
    paletted.putpalette(palette.tobytes())
    paletted.save(folder / "palette.png", transparency=bytes([0, 128, 255, 255]))
    yield folder / "palette.png", over_white(palette[index], np.array([0, 128, 255, 255])[index])
    paletted.save(folder / "palette.gif", transparency=2)
    yield folder / "palette.gif", over_white(palette[index], np.array([255, 255, 0, 255])[index])
    values = greys(65535)
    (folder / "clear16.png").write_bytes(png(values, 16, 0, struct.pack(">H", int(values[1, 0]))))
    yield folder / "clear16.png", grey_rgb(np.where(values == values[1, 0], 255, values / 257))


def deep(folder: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """More than 8 bits, and less."""
    sixteen = greys(65535)
    for name in ("deep.png", "deep.tif", "deep.pgm"):
        Image.fromarray(sixteen.astype(np.uint16)).save(folder / name)
        yield folder / name, grey_rgb(sixteen / 257)
    Image.fromarray(sixteen.astype(">u2")).save(folder / "deep-big.tif")
    yield folder / "deep-big.tif", grey_rgb(sixteen / 257)
    head = f"P5\n{WIDTH} {HEIGHT}\n1000\n".encode()
    (folder / "thousand.pgm").write_bytes(head + greys(1000).astype(">u2").tobytes())
    yield folder / "thousand.pgm", grey_rgb(greys(1000) * 0.255)
    black = Image.fromarray(sixteen.astype(np.uint16))
    black.save(folder / "inverted.tif", tiffinfo={262: 0})
    yield folder / "inverted.tif", 255 - grey_rgb(sixteen / 257)
    Image.fromarray(greys().astype(np.int32)).save(folder / "whole.tif")
    yield folder / "whole.tif", grey_rgb(greys())
    Image.fromarray(greys(7).astype(np.int32)).save(folder / "small.tif")
    yield folder / "small.tif", grey_rgb(greys(7))
    shares = greys().astype(np.float32) / 255
    for name, factor in {"unit.tif": 1, "levels.tif": 255, "half.tif": 0.5}.items():
        Image.fromarray(shares * np.float32(factor)).save(folder / name)
        yield folder / name, grey_rgb(shares * np.float32(255 if factor == 1 else 127.5 if factor == 0.5 else factor))
    bits = greys() % 3 == 0
    Image.fromarray(bits).save(folder / "bits.png")
    yield folder / "bits.png", grey_rgb(bits * 255)


def image_kinds(folder: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Writes files below `folder`; yields each with its pixels [HEIGHT, WIDTH, 3]."""
    yield from turned(folder)
    yield from transparent(folder)
    yield from deep(folder)
