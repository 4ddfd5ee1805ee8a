"""LLaVA-format records, checked in full before any work starts.

A file is a JSON list, or JSON Lines, of `{"id", "image": path or list of paths, "conversations": [{"from": "human" |
"gpt", "value": text}, …], "task": optional}`. Each image has one `<image>` marker in the text. `files` and `forms` read
the other forms that people have.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from moe_vision.data.faults import DataError, Fault, RecordFault, problems_of
from moe_vision.data.files import BrokenLine, RepeatedKeys, read_values
from moe_vision.data.forms import IMAGE_MARKER, parse_conversation, shown
from moe_vision.slicing.image_files import opened_file
from moe_vision.slicing.pixels import ImageError, to_rgb


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


def record_id(value: Any, number: int) -> str:
    """A record's label in reports: its id, else its index or line."""
    if isinstance(value, BrokenLine):
        return value.id
    own = value.get("id") if isinstance(value, dict) else None
    if own is None:
        return str(number)
    return str(own) if isinstance(own, (str, int, float)) else shown(own)


def parse_record(value: Any, number: int, root: Path) -> Record:
    """One record. Raises RecordFault naming the record, the fault and a hint, whatever is wrong with it."""
    try:
        return checked_record(value, number, root)
    except RecordFault:
        raise
    except Exception as error:
        raise RecordFault(
            f"record {number}: cannot be read ({type(error).__name__}: {error}); correct or remove it", "format"
        ) from error


def checked_record(value: Any, number: int, root: Path) -> Record:
    """One record; `parse_record` turns errors that are no RecordFault into one."""
    if isinstance(value, BrokenLine):
        raise RecordFault(value.problem, "format")
    if not isinstance(value, dict):
        raise RecordFault(
            f"record {number}: is a {type(value).__name__}; a LLaVA record is {{id, image, conversations}}", "format"
        )
    name = f"record {number} (id {shown(value.get('id', number))})"
    check_keys(value, name)
    found = parse_conversation(value, name)
    images, turns = found.images, tuple(Turn(role, text) for role, text in found.turns)
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise RecordFault(f"{name}: turns go {spoken}; they must alternate human, gpt and end with gpt", "format")
    task = value.get("task")
    if task is not None and not isinstance(task, str):
        raise RecordFault(f"{name}: 'task' is {shown(task)}; write a name, or leave it out", "format")
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers != len(images):
        hint = (
            "put one marker into a question for each image"
            if markers < len(images)
            else "name each image in 'image' or 'images'"
        )
        raise RecordFault(f"{name}: {len(images)} images and {markers} {IMAGE_MARKER} markers; {hint}", "markers")
    record = Record(record_id(value, number), tuple(root / image for image in images), turns, task or "all")
    check_text((record.id, record.task, *images, *(turn.text for turn in turns)), name)
    return record


def check_keys(value: Any, name: str) -> None:
    """Raise RecordFault where an object of a record repeats a key."""
    if isinstance(value, RepeatedKeys):
        raise RecordFault(f"{name}: the key {value.repeated!r} is there more than once; keep one of them", "format")
    for own in value.values() if isinstance(value, dict) else value:
        if isinstance(own, (dict, list)):
            check_keys(own, name)


def check_text(texts: Sequence[str], name: str) -> None:
    """Raise RecordFault if a text holds half of a surrogate pair, which no tokenizer takes."""
    if "".join(texts).isascii():
        return
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise RecordFault(
                f"{name}: the text {shown(text)} holds {half!a}, half of a character; write the whole one", "format"
            ) from None


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
