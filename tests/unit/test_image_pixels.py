"""An image has the same pixels however it comes in, and what has no known range or format is refused by name."""

import base64
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image as library_image

from moe_vision.data.collate import views_of
from moe_vision.data.faults import RecordFault
from moe_vision.data.records import check_image, image_size, load_image
from moe_vision.modeling import MoeVisionProcessor
from moe_vision.slicing.image_files import read_image
from moe_vision.slicing.pixels import ImageError, to_rgb
from tests.image_kinds import HEIGHT, WIDTH, colours, greys, image_kinds
from tests.tiny import tiny_model

PHONE = Path(__file__).parents[1] / "cases" / "exif_6.jpg"
CHAT = "{% for m in messages %}{% for part in m.content %}<image>{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def processor() -> MoeVisionProcessor:
    return tiny_model()[1]


def pixels(processor: MoeVisionProcessor, image: Any, **options: Any) -> torch.Tensor:
    """What the processor makes of an image."""
    found: torch.Tensor = processor.image_processor([image], return_tensors="pt", **options)["pixel_values"]
    return found


def test_every_kind_of_file_has_its_pixels_in_training_and_processor(
    processor: MoeVisionProcessor, tmp_path: Path
) -> None:
    kinds = list(image_kinds(tmp_path))
    assert len(kinds) > 40
    for path, expected in kinds:
        assert image_size(path) == (HEIGHT, WIDTH), path.name
        assert np.array_equal(np.asarray(load_image(path)), expected), path.name
        trained = views_of([path], processor)["pixel_values"]
        assert torch.equal(trained, pixels(processor, expected)), path.name
        with Image.open(path) as image:
            assert torch.equal(trained, pixels(processor, image)), path.name
            assert np.array_equal(np.asarray(to_rgb(to_rgb(image))), expected), path.name
        assert torch.equal(trained, pixels(processor, str(path))), path.name


def test_a_phone_photo_is_upright_for_every_consumer(processor: MoeVisionProcessor) -> None:
    expected = np.asarray(library_image(str(PHONE)))  # transformers turns it too
    assert expected.shape == (64, 32, 3) and expected[0, 0].argmax() == 0
    assert np.array_equal(np.asarray(load_image(PHONE)), expected) and image_size(PHONE) == (64, 32)
    views = views_of([PHONE], processor)["pixel_values"]
    encoded = base64.b64encode(PHONE.read_bytes()).decode()
    with Image.open(PHONE) as image:
        parts = [{"image": image}, {"image": library_image(str(PHONE))}, {"path": str(PHONE)}, {"url": str(PHONE)},
                 {"base64": encoded}, {"url": f"data:image/jpeg;base64,{encoded}"}]  # fmt: skip
        for part in parts:
            turns = [{"role": "user", "content": [{"type": "image", **part}]}]
            inputs = processor.apply_chat_template(
                turns, chat_template=CHAT, tokenize=True, return_dict=True, return_tensors="pt"
            )
            assert torch.equal(inputs["pixel_values"], views), part
        for given in (image, [image], PHONE, [[str(PHONE)]]):
            inputs = processor(images=given, text=["<image>"], return_tensors="pt")
            assert torch.equal(inputs["pixel_values"], views)


def test_opaque_images_are_those_of_transformers(tmp_path: Path) -> None:
    """And transparent Pillow images as its processors lay them on white."""
    for path, _ in image_kinds(tmp_path):
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                continue  # transformers cuts these off at 255
            assert np.array_equal(np.asarray(to_rgb(image)), convert_to_rgb(upright(image), return_numpy=True)), path


def upright(image: Image.Image) -> Image.Image:
    found = ImageOps.exif_transpose(image)
    assert found is not None
    return found


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address of a server of files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_an_image_at_an_address(processor: MoeVisionProcessor, tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(PHONE.read_bytes())
    (tmp_path / "page").write_text("<html>")
    with served(tmp_path) as address:
        assert torch.equal(pixels(processor, f"{address}/photo"), views_of([PHONE], processor)["pixel_values"])
        with pytest.raises(ImageError, match=r"/page': cannot be read as an image of a known format"):
            read_image(f"{address}/page")
        with pytest.raises(ImageError, match=r"/none': cannot be fetched .*404"):
            read_image(f"{address}/none")


ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "bytes": lambda rgb: rgb,
    "channels first": lambda rgb: rgb.transpose(2, 0, 1),
    "flipped twice": lambda rgb: rgb[::-1].copy()[::-1],
    "floats in 0..1": lambda rgb: rgb / 255,
    "float32 in 0..1": lambda rgb: rgb.astype(np.float32) / 255,
    "floats in 0..255": lambda rgb: rgb.astype(np.float32),
    "long integers": lambda rgb: rgb.astype(np.int64),
    "16 bits": lambda rgb: rgb.astype(np.uint16) * 257,
    "opaque": lambda rgb: np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]),
    "tensor": lambda rgb: torch.from_numpy(rgb),
    "tensor, channels first": lambda rgb: torch.from_numpy(rgb).permute(2, 0, 1),
    "tensor in 0..1": lambda rgb: torch.from_numpy(rgb).permute(2, 0, 1) / 255,
    "bfloat16 in 0..1": lambda rgb: (torch.from_numpy(rgb).permute(2, 0, 1).float() / 255).bfloat16(),
    "overshoot of resizing": lambda rgb: np.where(rgb == rgb.max(), 1.0005, rgb / 255),
}


@pytest.mark.parametrize("form", list(ARRAYS))
def test_arrays_of_every_form_are_the_image(processor: MoeVisionProcessor, form: str) -> None:
    expected = pixels(processor, Image.fromarray(colours()))
    found = pixels(processor, ARRAYS[form](colours()))
    tolerance = 1 / 255 if "bfloat16" in form else 1e-6
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert 0.9 < found.max() <= 1


def test_transformers_processors_make_the_same_of_arrays(processor: MoeVisionProcessor) -> None:
    """CLIP's, without resizing and normalising: the outside reference for layouts, scales and `do_rescale`."""
    reference = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False)
    side = int(pixels(processor, colours()).shape[-1])
    rgb = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (rgb, {}), (Image.fromarray(rgb), {}), (rgb[..., :1], {}), (rgb.transpose(2, 0, 1), {}),
        (rgb.astype(np.float32), {}), (torch.from_numpy(rgb), {"input_data_format": "channels_last"}),
        (rgb.astype(np.float32) / 255, {"do_rescale": False}),
        (np.dstack([rgb, rgb[..., 0]]), {}),
    ]  # fmt: skip
    for image, options in cases:
        expected = reference([image], return_tensors="pt", do_convert_rgb=True, **options)["pixel_values"]
        found = pixels(processor, image, **options)
        torch.testing.assert_close(found, expected, atol=1.01 / 255, rtol=0)  # transparency is rounded in another way
    assert torch.equal(pixels(processor, rgb), reference([rgb], return_tensors="pt")["pixel_values"])


UNKNOWN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "not a number": (np.full((4, 4, 3), np.nan, np.float32), {}, "floats go from nan"),
    "one value is infinite": (np.where(greys() == 7, np.inf, 0.5)[..., None].repeat(3, 2), {}, "floats go from .* inf"),
    "negative": (greys()[..., None] / 127.5 - 1, {}, "floats go from -1 to 1.*scale them to 0..1"),
    "normalised": (np.random.default_rng(0).normal(size=(3, 9, 9)), {}, "floats go from -"),
    "too large": (greys()[..., None] * 2.0, {}, "floats go from 0 to 510"),
    "between the scales": (greys()[..., None] / 170, {}, "floats go from 0 to 1.5"),
    "long integers": (greys(65535)[..., None], {}, "integers go from 0 to 65535"),
    "negative integers": (greys()[..., None] - 9, {}, "integers go from -9"),
    "bytes said to be shares": (colours(), {"do_rescale": False}, "do_rescale=False"),
    "an image said to be shares": (Image.fromarray(colours()), {"do_rescale": False}, "do_rescale=False"),
    "a gradient": (torch.rand(3, 4, 4, requires_grad=True), {}, "no gradient"),
    "wide integers": (Image.fromarray(greys(99999).astype(np.int32)), {}, "integers go from 0 to 99999"),
    "depth in metres": (Image.fromarray(greys(900).astype(np.float32)), {}, "floats go from 0 to 900"),
}


@pytest.mark.parametrize("name", list(UNKNOWN))
def test_values_without_a_known_range_are_refused(processor: MoeVisionProcessor, name: str, tmp_path: Path) -> None:
    image, options, said = UNKNOWN[name]
    with pytest.raises(ImageError, match=said):
        pixels(processor, image, **options)
    if isinstance(image, Image.Image) and not options:
        image.save(tmp_path / "measured.tif")
        with pytest.raises(RecordFault, match=rf"measured\.tif': .*{said}"):
            load_image(tmp_path / "measured.tif")


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """An error where a call would wait for ever."""

    def late(*_: Any) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def odd_file(kind: str, folder: Path) -> Path:
    """A path that is not an image file."""
    path = folder / "photo.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "long":
        path = folder / ("x" * 300 + ".jpg")
    elif kind == "long folder":
        path = folder / ("x/" * 3000 + "y.jpg")
    elif kind == "zero byte":
        path = folder / "a\0.jpg"
    elif kind == "below a file":
        (folder / "a.png").write_bytes(b"x")
        path = folder / "a.png" / "b.png"
    elif kind == "empty":
        path.touch()
    elif kind == "postscript":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    elif kind == "icon":
        Image.new("RGB", (16, 16)).save(path, "ICO")
    elif kind == "page":
        path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    else:
        path.write_bytes(DAMAGED[kind])
    return path


DAMAGED = {
    "PNG without a header": b"\x89PNG\r\n\x1a\n" + b"\0\0\0\2IHDR\0\0\0\0\0\0",
    "GIF cut": b"GIF89a\x05\0",
    "BMP of no size": b"BM" + bytes(60),
    "JPEG cut in a marker": b"\xff\xd8\xff\xe1\0",
    "WEBP of zeros": b"RIFF\x10\0\0\0WEBPVP8 " + bytes(12),
    "PPM of letters": b"P6 a b c",
    "PPM with a huge number": b"P5 " + b"9" * 5000 + b" 1 255\n",
}

MISSING = ("loop", "long", "long folder", "zero byte", "below a file")


@pytest.mark.parametrize(
    "kind", ["pipe", "device", "folder", "empty", "postscript", "icon", "page", *MISSING, *DAMAGED]
)
def test_what_is_not_an_image_is_a_fault_of_its_name(kind: str, processor: MoeVisionProcessor, tmp_path: Path) -> None:
    path = odd_file(kind, tmp_path)
    reads: list[Callable[[Path], Any]] = [check_image, image_size, load_image, lambda p: views_of([p], processor)]
    for read in reads:
        with at_most(20), pytest.raises(RecordFault, match=r"^image .*(jpg|png)'") as caught:
            read(path)
        assert caught.value.reason == ("image_missing" if kind in MISSING else "image_broken")
        assert ";" in str(caught.value)  # a hint
    with at_most(20), pytest.raises(ImageError, match=r"^image '"):
        pixels(processor, path)


def test_all_faults_of_a_decoder_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for error in (MemoryError(), ZeroDivisionError("x"), KeyError(3), RecursionError("deep"), TypeError("y")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(Image.Image, "convert", fail)
            patched.setattr("PIL.ImageOps.exif_transpose", fail)
            with pytest.raises(RecordFault, match=r"a\.png': cannot be decoded"):
                load_image(tmp_path / "a.png")
