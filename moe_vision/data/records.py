"""LLaVA-format records, checked in full before any work starts.

A file is a JSON list, or JSON Lines, of `{"id", "image": path or list of paths, "conversations": [{"from": "human" |
"gpt", "value": text}, …], "task": optional}`. Each image has one `<image>` marker in the text.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from moe_vision.data.faults import DataError, Fault, RecordFault, problems_of
from moe_vision.slicing.image_files import opened_file
from moe_vision.slicing.pixels import ImageError, to_rgb

IMAGE_MARKER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


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
    records, faults = read_records(path, Path(image_root) if image_root is not None else path.parent)
    if faults:
        raise DataError(path, problems_of(faults))
    return records


def read_records(path: Path, root: Path, *, verify: bool = False, workers: int = 1) -> tuple[list[Record], list[Fault]]:
    """Records of a JSON or JSONL file without a fault, in the file's order, and the faults of all others.

    verify: decode every picture to its end, in so many threads, so that cut-off ones are found too; else their headers
    are read. Raises DataError where the file as a whole is no LLaVA data, or holds no record.
    """
    values = read_values(path)
    if not values:
        raise DataError(path, ["holds no record: add at least one conversation"])
    records, faults = [], []
    for number, value in enumerate(values):
        try:
            records.append(parse_record(value, number, root))
        except RecordFault as fault:
            faults.append(Fault(record_id(value, number), fault.reason, str(fault)))
    broken = broken_images(dict.fromkeys(image for record in records for image in record.images), verify, workers)
    whole = []
    for record in records:
        found = [broken[image] for image in dict.fromkeys(record.images) if image in broken]
        if found:
            faults.append(Fault(record.id, found[0].reason, "; ".join(map(str, found))))
        else:
            whole.append(record)
    return whole, faults


def broken_images(images: Iterable[Path], verify: bool, workers: int) -> dict[Path, RecordFault]:
    """What is wrong with each picture that something is wrong with; `verify` decodes them, in so many threads."""

    def fault(image: Path) -> RecordFault | None:
        try:
            if verify:
                load_image(image)
            else:
                check_image(image)
        except RecordFault as error:
            return error
        return None

    images = list(images)
    # Filters of warnings belong to the process: threads would leave them changed if this did not put them back.
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as threads:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return {image: error for image, error in zip(images, threads.map(fault, images), strict=True) if error}


@dataclass(frozen=True)
class BrokenLine:
    """A line of JSON Lines that is no JSON; it stands where its record would."""

    id: str
    problem: str


def read_values(path: Path) -> list[Any]:
    """Plain values of a JSON list or of JSON Lines, with a `BrokenLine` for each line that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(path, ["no such file: give the path of a LLaVA-format JSON or JSONL file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, [f"cannot be read ({error}): give a LLaVA-format JSON or JSONL file in UTF-8"]) from None
    if path.suffix == ".jsonl":
        return [parse_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(path, [f"is not JSON ({error}): mend its syntax"]) from None
    if not isinstance(values, list):
        raise DataError(path, [f"holds a JSON {type(values).__name__}, not a list of LLaVA records: wrap it in [ ]"])
    return values


def parse_line(number: int, line: str) -> Any:
    """One value of JSON Lines."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BrokenLine(f"line {number}", f"line {number} is not JSON ({error.msg}): mend it, one record a line")


def record_id(value: Any, number: int) -> str:
    """What a record is called in reports: its id, or where it stands."""
    if isinstance(value, BrokenLine):
        return value.id
    return str(value.get("id", number)) if isinstance(value, dict) else str(number)


def parse_record(value: Any, number: int, root: Path) -> Record:
    """One record. Raises RecordFault naming the record, the fault and the cure."""
    if isinstance(value, BrokenLine):
        raise RecordFault(value.problem, "format")
    if not isinstance(value, dict):
        raise RecordFault(
            f"record {number}: is a {type(value).__name__}; a LLaVA record is {{id, image, conversations}}", "format"
        )
    name = f"record {number} (id {value.get('id', number)!r})"
    conversation = value.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        keys = ", ".join(map(str, value)) or "none"
        raise RecordFault(
            f"{name}: has no list 'conversations' (keys: {keys}); write [{{from: human, value: …}}, …]", "format"
        )
    images = value.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise RecordFault(f"{name}: 'image' is {images!r}; write a path or a list of paths", "format")
    turns = tuple(parse_turn(turn, name) for turn in conversation)
    spoken = [turn.role for turn in turns if turn.role != "system"]
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if spoken != expected or not spoken:
        raise RecordFault(f"{name}: turns go {spoken}; they must alternate human, gpt and end with gpt", "format")
    task = value.get("task", "all")
    if not isinstance(task, str):
        raise RecordFault(f"{name}: 'task' is {task!r}; write a name, or leave it out", "format")
    if any(IMAGE_MARKER in turn.text for turn in turns if turn.role == "assistant"):
        raise RecordFault(
            f"{name}: an answer has an {IMAGE_MARKER} marker; move it into the question before", "markers"
        )
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers != len(images):
        cure = "put one marker into the first question for each image" if markers < len(images) else "name each image"
        raise RecordFault(f"{name}: {len(images)} images and {markers} {IMAGE_MARKER} markers; {cure}", "markers")
    return Record(record_id(value, number), tuple(root / image for image in images), turns, task)


def parse_turn(turn: Any, name: str) -> Turn:
    known = isinstance(turn, dict) and isinstance(turn.get("from"), str) and turn["from"] in ROLES
    if not known or not isinstance(turn.get("value"), str):
        raise RecordFault(f"{name}: turn {turn!r} is not {{from: human | gpt, value: text}}", "format")
    return Turn(ROLES[turn["from"]], turn["value"])


@contextmanager
def image_of_record(path: Path | str) -> Iterator[Image.Image]:
    """An image file's header. Raises RecordFault naming the file for every fault, in the block too."""
    try:
        with opened_file(Path(path)) as image:
            if min(image.size) < 1:
                raise ImageError(f"is {image.height}x{image.width} pixels, nothing to see; replace it")
            yield image
    except ImageError as error:
        if error.missing:
            raise RecordFault(f"{error} (image_root)", "image_missing") from error
        raise RecordFault(str(error), "image_broken") from error


def check_image(path: Path) -> None:
    """Raise RecordFault if `path` is missing, empty or no image; reads the header only."""
    with image_of_record(path):
        pass


TURNED = frozenset({5, 6, 7, 8})
"""Values of the EXIF orientation that swap height and width."""


def image_size(path: Path | str) -> tuple[int, int]:
    """(height, width) of an image as `load_image` gives it, without decoding it but for PNG files. Raises
    RecordFault naming the file.
    """
    with image_of_record(path) as image:
        width, height = image.size
        # Pillow turns a TIFF's size itself. A PNG has its orientation after its pixels: it is read to there.
        turns = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in TURNED
    return (width, height) if turns else (height, width)


def load_image(path: Path | str) -> Image.Image:
    """Decode an image upright and as RGB, over white where it is transparent. Raises RecordFault naming the file."""
    with image_of_record(path) as image:
        return to_rgb(image)
