"""Records are checked in full before work starts, and every picture becomes upright RGB."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moe_vision.data.records import DataError, load_image, load_records


def good(**values: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]
    return {"id": "a", "image": "a.png", "conversations": turns, **values}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write(folder: Path, values: Any, name: str = "data.json") -> Path:
    Image.new("RGB", (4, 3), "red").save(folder / "a.png")
    (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder / name


def test_json_and_json_lines_give_the_same_records(tmp_path: Path) -> None:
    values = [
        good(task="ocr"),
        good(id="b", image=["a.png", "a.png"], conversations=turns("<image><image>x\u2028", "y")),
    ]
    records = load_records(write(tmp_path, values))
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(json.dumps(value, ensure_ascii=False) for value in values), encoding="utf-8")
    assert load_records(lines) == records
    assert [record.task for record in records] == ["ocr", "all"]
    assert records[1].images == (tmp_path / "a.png", tmp_path / "a.png")


def test_image_root_moves_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "pictures" / "b.png")
    path = write(tmp_path, [good(image="b.png")])
    assert load_records(path, tmp_path / "pictures")[0].images == (tmp_path / "pictures" / "b.png",)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "no record"),
        ({"a": 1}, "not a list"),
        ([3], "record 0"),
        ([{"id": "a", "text": "x"}], "conversations"),
        ([good(image=["a.png"] * 2, conversations=turns("what", "red", "and", "b"))], "2 images and 0 <image> markers"),
        ([good(image=[])], "0 images and 1 <image> markers"),
        ([good(image="none.png")], "no such file"),
        ([good(image=3)], "'image' is 3"),
        ([good(task=3)], "'task' is 3"),
        ([good(conversations=turns("<image>what"))], "alternate"),
        ([good(conversations=turns("what", "<image>"))], "answer has"),
        ([good(conversations=[{"from": ["human"], "value": "<image>"}])], "turn"),
    ],
)
def test_wrong_records_are_named(tmp_path: Path, values: Any, said: str) -> None:
    with pytest.raises(DataError, match=said.replace("(", "\\(")):
        load_records(write(tmp_path, values))


def test_all_problems_come_at_once_and_ten_are_shown(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_records(write(tmp_path, [good(id=f"r{i}", image=f"{i}.png") for i in range(12)]))
    assert "12 problems" in str(caught.value) and "and 2 more" in str(caught.value)


@pytest.mark.parametrize(("content", "said"), [(b"", "zero bytes"), (b"no picture", "cannot be read")])
def test_files_that_are_no_pictures_are_found_up_front(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_records(write(tmp_path, [good(image="b.png")]))


def test_a_broken_line_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1}\n{oops\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        load_records(path)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "YCbCr", "F", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    if mode == "I;16":
        Image.fromarray(np.full((3, 4), 128 * 257, dtype=np.uint16)).save(path)
    else:
        picture = Image.new("RGB", (4, 3), (128, 128, 128)).convert("RGBA" if mode == "LA" else "RGB")
        if mode == "YCbCr":
            path = tmp_path / "picture.jpg"
        # Pillow would dither to a palette of its own.
        (picture.quantize(4) if mode == "P" else picture.convert(mode)).save(path)
    loaded = load_image(path)
    assert (loaded.mode, loaded.size) == ("RGB", (4, 3))
    if mode != "1":
        assert np.abs(np.asarray(loaded).astype(int) - 128).max() <= 2


def test_pictures_are_turned_upright_and_laid_on_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (2, 4)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_truncated_and_huge_pictures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.png.*cannot be decoded"):
        load_image(path)
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"cut\.png.*too large"):
        load_image(path)
