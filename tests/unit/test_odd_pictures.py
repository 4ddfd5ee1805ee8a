"""Files that people have: each is seen as a person would see it, or refused by its name and the cause.

Every one goes the way of a training picture: decoded, planned, cut and packed, by a tiny model that slices.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moe_vision.data.collate import views_of
from moe_vision.data.records import image_size, load_image
from moe_vision.evaluation import answer
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.image_processing_moe_vision import join_views
from moe_vision.slicing import SLICING, Pad, PlanError, Resize
from moe_vision.slicing.render import render
from tests.sliced import COMPOSITIONS
from tests.tiny import tiny_model

Tiny = tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor]
SIZE = (90, 140)
TOP, BOTTOM = (200, 40, 60), (30, 160, 90)
"""Colours of the upper and the lower half of the picture below, in red, green and blue."""


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return tiny_model(**COMPOSITIONS["uhd, two experts, all views through one branch"])


def flag() -> Image.Image:
    """A picture of SIZE whose upper half has one colour and whose lower half has another."""
    pixels = np.empty((*SIZE, 3), dtype=np.uint8)
    pixels[: SIZE[0] // 2], pixels[SIZE[0] // 2 :] = TOP, BOTTOM
    return Image.fromarray(pixels)


def grey(colour: tuple[int, int, int]) -> int:
    return Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))  # type: ignore[return-value]


def cmyk(path: Path) -> Path:
    flag().convert("CMYK").save(path.with_suffix(".jpg"), quality=95)
    return path.with_suffix(".jpg")


def sixteen_bit(path: Path) -> Path:
    values = np.asarray(flag().convert("L")).astype(np.uint16) * 257
    Image.fromarray(values).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def palette(path: Path) -> Path:
    flag().quantize(4).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by a quarter, clockwise
    flag().transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".jpg"), exif=exif, quality=95)
    return path.with_suffix(".jpg")


def turned_tiff(path: Path) -> Path:
    exif = Image.Exif()
    exif[274] = 6
    flag().transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".tif"), exif=exif)
    return path.with_suffix(".tif")


def animated(path: Path) -> Path:
    others = [Image.new("RGB", (SIZE[1], SIZE[0]), colour) for colour in ("black", "white")]
    flag().save(path.with_suffix(".gif"), save_all=True, append_images=others)
    return path.with_suffix(".gif")


@pytest.mark.parametrize("write", [cmyk, sixteen_bit, palette, turned, turned_tiff, animated])
def test_files_of_every_kind_are_seen_upright_and_in_their_colours(
    write: Callable[[Path], Path], tiny: Tiny, tmp_path: Path
) -> None:
    model, processor = tiny
    path = write(tmp_path / "picture")
    assert image_size(path) == SIZE  # what the plan is made of, from the header
    views = views_of([path], processor)
    plan = model.model.policy.plan(SIZE)
    assert plan.grid == (2, 2) and views["image_sizes"].tolist() == [[*SIZE, 1]] * 5
    height, width = plan.views[-1].size
    overview = views["pixel_values"][-1, :, :height, :width] * 255
    expected = [(grey(c),) * 3 for c in (TOP, BOTTOM)] if write is sixteen_bit else [TOP, BOTTOM]
    for rows, colour in zip((overview[:, : height // 3], overview[:, -height // 3 :]), expected, strict=True):
        assert (rows - torch.tensor(colour)[:, None, None]).abs().max() < 12  # JPEG and palettes are not exact
    assert isinstance(answer(model, processor, "which colour", [path], 2), str)


def test_the_processor_takes_16_bits_from_pillow(tiny: Tiny, tmp_path: Path) -> None:
    _, processor = tiny
    path = sixteen_bit(tmp_path / "picture")
    with Image.open(path) as opened:
        found = processor.image_processor([opened], return_tensors="pt")["pixel_values"]
    assert torch.equal(found, views_of([path], processor)["pixel_values"])


@pytest.mark.parametrize("size", [(60_000, 40), (40, 60_000), (1, 1)])
def test_a_strip_and_a_dot(size: tuple[int, int], tiny: Tiny, tmp_path: Path) -> None:
    model, processor = tiny
    path = tmp_path / "picture.png"
    Image.new("L", (size[1], size[0]), 90).save(path)
    plan, views = model.model.policy.plan(size), views_of([path], processor)
    assert len(views["pixel_values"]) == len(plan.views)
    for view, pixels in zip(plan.views, views["pixel_values"], strict=True):
        height, width = view.size
        torch.testing.assert_close(pixels[:, :height, :width], torch.full((3, height, width), 90 / 255))
    assert isinstance(answer(model, processor, "which colour", [path], 2), str)


@pytest.mark.parametrize("size", [(60_000, 40), (40, 60_000)])
def test_a_strip_is_made_smaller_before_it_is_padded(size: tuple[int, int]) -> None:
    image = torch.full((3, *size), 200, dtype=torch.uint8)
    for name, canvas in (("none", (336, 336)), ("anyres", (384, 384))):  # the second pads one of several images
        policy = SLICING[name]()
        (view,) = policy.plan(size, 2).views
        assert view.size == canvas and all(a * b < 1e8 for a, b in (step.size for step in view.steps))
        (pixels,) = render(image, [view])
        long = size.index(60_000)
        middle = pixels.select(2 - long, (canvas[0] - 1) // 2)
        assert pixels.shape == (3, *canvas) and (middle == 200).all() and (pixels == 127).float().mean() > 0.99
    photo = SLICING["none"]().plan((3000, 4000)).views[0].steps
    assert [type(step) for step in photo] == [Pad, Resize]  # in the published order


def test_views_that_would_be_nearly_all_padding_are_refused() -> None:
    wide, tall = torch.zeros(1, 1, 1).expand(3, 14, 13_006), torch.zeros(1, 1, 1).expand(3, 11_998, 14)
    with pytest.raises(ValueError, match=r"views of 11998x14 and of 14x13006 pixels in one batch would take 26 GB"):
        join_views([wide] * 7 + [tall] * 7)


@pytest.mark.parametrize("name", list(SLICING))
def test_every_policy_plans_the_strip_and_the_dot_or_says_why_not(name: str) -> None:
    policy = SLICING[name]()
    assert policy.plan((1, 1)).num_tokens > 0
    for size in ((60_000, 40), (40, 60_000)):
        if name in ("native", "oryx"):
            with pytest.raises(PlanError, match=f"an image of {size[0]}x{size[1]} pixels is .* '{name}'"):
                policy.plan(size)
        else:
            assert 0 < policy.plan(size).num_tokens < 10_000


def test_a_picture_of_300_megapixels_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "poster.png"
    Image.new("1", (20_000, 15_000)).save(path)
    for read in (image_size, load_image):
        with pytest.raises(ValueError, match=r"poster\.png': is too large to decode safely .*300000000 pixels"):
            read(path)


def test_a_truncated_jpeg_is_refused_when_it_is_decoded(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.effect_noise((200, 200), 80).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg': cannot be decoded .*truncated, replace it"):
        views_of([path], tiny[1])
    plain = tmp_path / "cut.png"
    Image.effect_noise((200, 200), 80).save(plain)
    plain.write_bytes(plain.read_bytes()[:9000])
    for read in (image_size, load_image):
        with pytest.raises(ValueError, match=r"cut\.png': cannot be decoded .*truncated, replace it"):
            read(plain)
    path.write_bytes(content[:40])
    with pytest.raises(ValueError, match=r"cut\.jpg': cannot be read as an image"):
        image_size(path)
