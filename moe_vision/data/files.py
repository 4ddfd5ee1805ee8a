"""JSON and JSON Lines as people have them: with a byte order mark, under the other's name, or in an object."""

import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_vision.data.faults import DataError
from moe_vision.data.forms import TEXT_KEYS

BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Encodings other than UTF-8, by what a file in them begins with."""


@dataclass(frozen=True)
class BrokenLine:
    """A line of JSON Lines that is not JSON, in the place of its record."""

    id: str
    problem: str


class RepeatedKeys(dict[str, Any]):
    """A JSON object that has `repeated` more than once; JSON leaves open which value counts."""

    repeated: str = ""


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, marked if a key is repeated."""
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    marked = RepeatedKeys(values)
    keys = [key for key, _ in pairs]
    marked.repeated = next(key for key in keys if keys.count(key) > 1)
    return marked


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError with the reason and the place."""
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def read_values(path: Path) -> list[Any]:
    """Plain values of a JSON list or of JSON Lines, whatever the file's name, with a `BrokenLine` for each line that is
    not JSON. An object that holds one list of objects is read as that list.

    Raises DataError where the file as a whole is neither.
    """
    text = read_text(path)
    start = text.lstrip()
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        value = parse_json(text)
    except ValueError as error:
        if path.suffix == ".jsonl" and not start.startswith("["):
            return [parse_line(number, line) for number, line in lines]
        if lines and isinstance(parse_line(*lines[0]), dict):
            return [parse_line(number, line) for number, line in lines]
        if not lines:
            return []
        raise DataError(
            path, [f"is not JSON ({error}): correct its syntax; JSON Lines hold one object a line"]
        ) from None
    return records_in(value, path)


def read_text(path: Path) -> str:
    """Text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Raises DataError."""
    hint = "give a LLaVA-format JSON or JSONL file in UTF-8"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(path, [f"is a folder, pipe or device, not a file: {hint}"])
        with path.open("rb") as file:
            head = file.read(4)
        encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8-sig")
        return path.read_text(encoding=encoding)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(path, ["no such file: give the path of a LLaVA-format JSON or JSONL file"]) from None
    except (OSError, ValueError) as error:
        raise DataError(path, [f"cannot be read ({error}): {hint}"]) from None


def parse_line(number: int, line: str) -> Any:
    """One value of JSON Lines."""
    try:
        return parse_json(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return BrokenLine(f"line {number}", f"line {number} is not JSON ({reason}): correct it, one record a line")


def records_in(value: Any, path: Path) -> list[Any]:
    """The list of records that a JSON value is or holds. Raises DataError if it is not plain which one."""
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping):
        raise DataError(path, [f"holds a JSON {type(value).__name__}, not a list of LLaVA records: wrap it in [ ]"])
    if TEXT_KEYS & value.keys():
        return [value]  # a single record
    lists = {key: own for key, own in value.items() if isinstance(own, list) and all(isinstance(o, dict) for o in own)}
    likely = {key: own for key, own in lists.items() if own and TEXT_KEYS & own[0].keys()}
    found: Sequence[list[Any]] = list((likely or lists).values())
    if len(found) == 1:
        return found[0]
    keys = ", ".join(map(repr, list(value)[:10]))
    raise DataError(
        path,
        [f"holds a JSON object with the keys {keys}, not a list of LLaVA records: keep one list of records"],
    )
