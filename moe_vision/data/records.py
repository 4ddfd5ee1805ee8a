"""LLaVA-format records, checked in full before any work starts.

A file is a JSON list, or JSON Lines, of `{"id", "image": path or list of paths, "conversations": [{"from": "human" |
"gpt", "value": text}, …], "task": optional}`. Each image has one `<image>` marker in the text.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps

from moe_vision.slicing.pictures import eight_bit

IMAGE_MARKER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
SHOWN_PROBLEMS = 10


class DataError(ValueError):
    """Everything that is wrong with one data file."""

    def __init__(self, source: Path, problems: Sequence[str]) -> None:
        more = len(problems) - SHOWN_PROBLEMS
        lines = [f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
        lines += [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]] + (
            [f"  … and {more} more"] if more > 0 else []
        )
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Turn:
    """One message; `role` is user, assistant or system."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """One conversation over its images. task: what evaluation groups by."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    task: str = "all"


def load_records(path: Path | str, image_root: Path | str | None = None) -> list[Record]:
    """Read a JSON or JSONL file; image paths start at `image_root`, the file's own folder by default.

    Raises DataError with every problem: no LLaVA data, markers that do not match images, images missing or unreadable.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    values = read_values(path)
    problems: list[str] = []
    records = []
    for number, value in enumerate(values):
        try:
            records.append(parse_record(value, number, root))
        except ValueError as error:
            problems.append(str(error))
    for image in dict.fromkeys(image for record in records for image in record.images):
        try:
            check_image(image)
        except ValueError as error:
            problems.append(str(error))
    if not values:
        problems.append("holds no record: add at least one conversation")
    if problems:
        raise DataError(path, problems)
    return records


def read_values(path: Path) -> list[Any]:
    """Plain values of a JSON list or of JSON Lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(path, ["no such file: give the path of a LLaVA-format JSON or JSONL file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, [f"cannot be read ({error}): give a LLaVA-format JSON or JSONL file in UTF-8"]) from None
    if path.suffix == ".jsonl":
        return [parse_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(path, [f"is not JSON ({error}): mend its syntax"]) from None
    if not isinstance(values, list):
        raise DataError(path, [f"holds a JSON {type(values).__name__}, not a list of LLaVA records: wrap it in [ ]"])
    return values


def parse_line(path: Path, number: int, line: str) -> Any:
    """One value of JSON Lines. Raises DataError naming the line."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(path, [f"line {number} is not JSON ({error.msg}): mend it, one record a line"]) from None


def parse_record(value: Any, number: int, root: Path) -> Record:
    """One record. Raises ValueError naming the record, the fault and the cure."""
    if not isinstance(value, dict):
        raise ValueError(
            f"record {number}: is a {type(value).__name__}; a LLaVA record is {{id, image, conversations}}"
        )
    name = f"record {number} (id {value.get('id', number)!r})"
    conversation = value.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        keys = ", ".join(map(str, value)) or "none"
        raise ValueError(f"{name}: has no list 'conversations' (keys: {keys}); write [{{from: human, value: …}}, …]")
    images = value.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{name}: 'image' is {images!r}; write a path or a list of paths")
    turns = tuple(parse_turn(turn, name) for turn in conversation)
    spoken = [turn.role for turn in turns if turn.role != "system"]
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if spoken != expected or not spoken:
        raise ValueError(f"{name}: turns go {spoken}; they must alternate human, gpt and end with gpt")
    if any(IMAGE_MARKER in turn.text for turn in turns if turn.role == "assistant"):
        raise ValueError(f"{name}: an answer has an {IMAGE_MARKER} marker; move it into the question before")
    task = value.get("task", "all")
    if not isinstance(task, str):
        raise ValueError(f"{name}: 'task' is {task!r}; write a name, or leave it out")
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers != len(images):
        cure = "put one marker into the first question for each image" if markers < len(images) else "name each image"
        raise ValueError(f"{name}: {len(images)} images and {markers} {IMAGE_MARKER} markers; {cure}")
    return Record(str(value.get("id", number)), tuple(root / image for image in images), turns, task)


def parse_turn(turn: Any, name: str) -> Turn:
    known = isinstance(turn, dict) and isinstance(turn.get("from"), str) and turn["from"] in ROLES
    if not known or not isinstance(turn.get("value"), str):
        raise ValueError(f"{name}: turn {turn!r} is not {{from: human | gpt, value: text}}")
    return Turn(ROLES[turn["from"]], turn["value"])


def check_image(path: Path) -> None:
    """Raise ValueError if `path` is missing, empty or no picture; reads the header only."""
    if not path.is_file():
        raise ValueError(
            f"image '{path}': no such file; mend the path, or give the folder it starts from as image_root"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"image '{path}': has zero bytes; fetch it again")
    try:
        with opened(path) as picture:
            width, height = picture.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"image '{path}': is too large to decode safely ({error}); make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image '{path}': cannot be read as a picture ({error}); replace it") from None
    if min(width, height) < 1:
        raise ValueError(f"image '{path}': is {height}x{width} pixels, nothing to see; replace it")


TURNED = frozenset({5, 6, 7, 8})
"""Values of the EXIF orientation that swap height and width."""


def image_size(path: Path | str) -> tuple[int, int]:
    """(height, width) of a picture as `load_image` gives it, without decoding it but for PNG files. Raises
    ValueError naming the file.
    """
    path = Path(path)
    check_image(path)
    try:
        with opened(path) as picture:
            width, height = picture.size
            # Pillow turns a TIFF's size by itself. A PNG tells its orientation behind its pixels: it is read to there.
            turns = picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation) in TURNED
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image '{path}': cannot be decoded ({error}); it may be truncated, replace it") from None
    return (width, height) if turns else (height, width)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture's header. Pillow's warning about large pictures is kept back: what is too large is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as picture:
            yield picture


def load_image(path: Path | str) -> Image.Image:
    """Decode a picture upright and as RGB; transparency lies on white. Raises ValueError naming the file."""
    path = Path(path)
    check_image(path)
    try:
        with opened(path) as header:
            picture = eight_bit(ImageOps.exif_transpose(header))
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                layered = picture.convert("RGBA")
                white = Image.new("RGBA", layered.size, "white")
                return Image.alpha_composite(white, layered).convert("RGB")
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image '{path}': cannot be decoded ({error}); it may be truncated, replace it") from None
