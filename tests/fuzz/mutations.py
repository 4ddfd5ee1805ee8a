"""Seeded mutations of plain values, of text and of bytes."""

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 10**6, 10**12, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e-300, 1e300,
    float("inf"), float("-inf"), float("nan"), "", " ", "x", "[/x]", "[bold]x", ":smile:", "../..", "/", "~",
    "/dev/zero", "a" * 5000, "\n", "é", "日本", "\u202e", "null", "1", "1e5", "<image>", "{{ x }}", "{% for %}",
    "org/name", "./missing", "moe_vision:nothing", "timm:nothing", [], {}, [[]], [1], [None], ["x"], [0, 0], [-1, 3],
    [10**9, 10**9], [1.5, 2], {"x": 1}, {"type": "x"}, {"type": None}, {"": ""}, {"1": {}}, [[[[[[]]]]]],
]  # fmt: skip
"""Values that some field does not expect."""

ODD_TEXT = [
    "\x00", "\ufeff", "\t", "*a", "&a ", "!!python/name:os.system ", "!!set ", "<<: ", "? ", "---\n", "...\n", "{",
    "}", "[", "]", ": ", "- ", "'", '"', "\\", "%", "@", "`", "|", ">", "#", "\r", "\u2028", '"\\ud800"', "0x",
    "1_000", "2020-01-01", "=", "NaN", "Infinity", "\U0001f600", "//", "/*", "\x1b[31m",
]  # fmt: skip
"""Pieces of text that some parser does not expect."""


def paths(value: Any, walked: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value inside a value is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*walked, key)
        yield from paths(item, (*walked, key))


def mutated(value: Any, random_: random.Random) -> tuple[Any, tuple[Any, ...]]:
    """A copy with one value replaced, removed, renamed, wrapped or doubled, and where it was."""
    value = copy.deepcopy(value)
    places = list(paths(value))
    if not places:
        return copy.deepcopy(random_.choice(ODD)), ()
    path = random_.choice(places)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, way = path[-1], random_.randrange(8)
    if way < 5:
        holder[key] = copy.deepcopy(random_.choice(ODD))
    elif way == 5:
        del holder[key]
    elif way == 6 and isinstance(holder, dict):
        holder[random_.choice(["", "x", "type", str(key)[:-1], f"{key}s", "[/x]"])] = holder.pop(key)
    else:
        holder[key] = [holder[key], holder[key]]
    return value, path


def odd_text(text: str, random_: random.Random) -> str:
    """A text with a piece put in, cut out, doubled or replaced."""
    lines = text.splitlines(keepends=True)
    for _ in range(random_.choice([1, 1, 2, 4])):
        way, at = random_.randrange(6), random_.randrange(len(lines)) if lines else 0
        if way == 0 and lines:
            lines.insert(at, lines[at])
        elif way == 1 and lines:
            del lines[at]
        elif way == 2 and lines:
            lines[at] = " " + lines[at]
        else:
            joined = "".join(lines)
            place = random_.randrange(len(joined) + 1)
            piece = random_.choice(ODD_TEXT) * random_.choice([1, 1, 1, 300])
            lines = (joined[:place] + piece + joined[place + random_.choice([0, 0, 1, 20]) :]).splitlines(keepends=True)
    return "".join(lines)


def odd_bytes(content: bytes, random_: random.Random) -> bytes:
    """Bytes with some flipped, cut off, put in or taken out."""
    way, at = random_.randrange(5), random_.randrange(len(content) + 1)
    if way == 0:
        return content[:at]
    if way == 1:
        return content[:at] + random_.randbytes(random_.choice([1, 4, 64])) + content[at:]
    if way == 2:
        return content[:at] + content[at + random_.choice([1, 4, 64]) :]
    changed = bytearray(content)
    for _ in range(random_.choice([1, 3, 30])):
        if changed:
            changed[random_.randrange(min(len(changed), 512 if way == 3 else len(changed)))] = random_.randrange(256)
    return bytes(changed)


def odd_file(path: Path, random_: random.Random) -> str:
    """Put something else in place of a file: another kind, other bytes, other JSON. Returns what."""
    kinds = ["missing", "folder", "pipe", "loop", "empty", "bytes", "text", "json", "json", "json value"]
    kind = random_.choice(kinds)
    content = path.read_bytes()
    if kind.startswith("json") and path.suffix != ".json":
        kind = "bytes"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "empty":
        path.touch()
    elif kind == "bytes":
        path.write_bytes(odd_bytes(content, random_))
    elif kind == "text":
        path.write_text(
            random_.choice(["null", "[]", "{}", "3", '"x"', "[" * 9000, '{"a": ' * 9000, "{", "\ufeff{}", "9" * 5000])
        )
    elif kind == "json":
        path.write_text(json.dumps(mutated(json.loads(content), random_)[0]))
    elif kind == "json value":
        path.write_text(json.dumps(random_.choice(ODD)))
    return kind


def clear(folder: Path) -> None:
    """Remove what a case has made."""
    shutil.rmtree(folder, ignore_errors=True)
