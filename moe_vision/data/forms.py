"""The forms in which people write a conversation over images, read as one: paths of images, and turns of text.

Turns are LLaVA's {from, value} or the {role, content} of chat templates, with text or a list of parts as TRL writes
them; or a question and an answer. docs/training.md has the table of what is read and what is a fault.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePath
from reprlib import Repr
from typing import Any

from moe_vision.data.faults import Reason, RecordFault

IMAGE_MARKER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
IMAGE_KEYS = ("image", "images", "image_path", "image_paths")
TURN_KEYS = ("conversations", "messages")
PAIRS = (("question", "answer"), ("prompt", "completion"))
TEXT_KEYS = {*TURN_KEYS, *(key for pair in PAIRS for key in pair)}
RECORD_KEYS = {*IMAGE_KEYS, *TEXT_KEYS, "id", "task"}
PART_SOURCES = ("image", "image_url", "path", "url")
"""Keys of an image part that say which file it is."""

MEDIA_KEY = re.compile(
    r"(image|img|picture|pic|photo|pixel_value|video|audio)s?(_?(path|file|url|uri|byte|data|b64|base64)s?)?_?\d*", re.I
)
"""Keys that say that their value is an image, a video or audio."""

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}
LONGEST_PATH = 4096


@dataclass
class Conversation:
    """images: paths as they are written, one for each marker. turns: (role, text) with image markers."""

    images: list[str] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)


def shown(value: Any) -> str:
    """A value for a message: its beginning, in ASCII where it cannot be printed."""
    if isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= 80):
        return repr(value)
    short = Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxstring, short.maxother = 4, 6, 6, 80, 80
    return short.repr(value)


def problem(name: str, text: str, reason: Reason = "format") -> RecordFault:
    return RecordFault(f"{name}: {text}", reason)


def parse_conversation(value: Mapping[str, Any], name: str) -> Conversation:
    """A record's images and turns. name: what errors call the record. Raises RecordFault."""
    raw = raw_turns(value, name)
    listed = listed_images(value, name)
    parts: list[str | None] = []
    turns = [parse_turn(turn, parts, name) for turn in raw]
    check_media(value, RECORD_KEYS, [*listed, *(p for p in parts if p)], name)
    if any(IMAGE_MARKER in text for role, text in turns if role == "assistant"):
        raise problem(name, f"an answer has an {IMAGE_MARKER} marker; move it into the question before", "markers")
    turns = without_greeting(turns)
    if parts:
        return Conversation(filled(parts, listed, name), turns)
    return Conversation(listed, with_markers(turns, len(listed)))


def raw_turns(value: Mapping[str, Any], name: str) -> Sequence[Any]:
    """A record's turns as they are written."""
    given = [key for key in TURN_KEYS if value.get(key)]
    if len(given) > 1:
        raise problem(name, f"has both {' and '.join(map(repr, given))}; keep one of them")
    if given:
        turns = value[given[0]]
        if not isinstance(turns, list):
            raise problem(name, f"has no list '{given[0]}', it is {shown(turns)}; write [{{from: human, value: …}}, …]")
        return turns
    for question, answer in PAIRS:
        if question not in value or answer not in value:
            continue
        asked, answered = value[question], value[answer]
        if isinstance(asked, list) and isinstance(answered, list):
            return [*asked, *answered]
        for key in (question, answer):
            if not isinstance(value[key], str):
                raise problem(name, f"the value of '{key}' is {shown(value[key])}; write a text")
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    keys = ", ".join(map(repr, list(value)[:20])) or "none"
    raise problem(
        name,
        f"has no list 'conversations' or 'messages' (keys: {keys}); write [{{from: human, value: …}}, …], or a "
        "question and an answer",
    )


def listed_images(value: Mapping[str, Any], name: str) -> list[str]:
    """Images that the record names in one of IMAGE_KEYS, whichever it is."""
    found = {key: images for key in IMAGE_KEYS if key in value and (images := image_list(value[key], key, name))}
    lists = list(found.values())
    if any(images != lists[0] for images in lists):
        raise problem(name, f"{' and '.join(map(repr, found))} name different images; keep one of them")
    return lists[0] if lists else []


def image_list(value: Any, key: str, name: str) -> list[str]:
    """Paths in a value that is a path, an object with one, or a list of these; none where it is null or empty."""
    items = value if isinstance(value, list) else [value]
    if all(item is None or item == "" for item in items):
        return []
    paths = [source_path(item) for item in items]
    wrong = next((item for item, path in zip(items, paths, strict=True) if path is None), None)
    if None in paths:
        raise problem(name, f"'{key}' is {shown(value)}, with {shown(wrong)}; write a path or a list of paths")
    return [checked_path(path, key, name) for path in paths if path is not None]


def source_path(item: Any) -> str | None:
    """The path in an image's value, which may be an object such as {path: …, bytes: null}; None if there is none."""
    if isinstance(item, str):
        return item or None
    if not isinstance(item, Mapping):
        return None
    paths = [own for key, own in item.items() if key != "type" and own is not None]
    known = [own for key, own in item.items() if key in PART_SOURCES and isinstance(own, str) and own]
    return known[0] if len(paths) == len(known) == 1 else None


def checked_path(path: str, key: str, name: str) -> str:
    """A path, unless it is an address or an image's content."""
    if path.startswith(("http://", "https://", "file://", "data:")) or len(path) > LONGEST_PATH:
        raise problem(name, f"'{key}' is {shown(path)}, not a path; save the image as a file, and write its path")
    return path


def parse_turn(turn: Any, images: list[str | None], name: str) -> tuple[str, str]:
    """Role and text of a turn. Images of its parts are added to `images`: their paths, or None where they have none."""
    role, content = (
        (one_of(turn, "from", "role"), one_of(turn, "value", "content")) if isinstance(turn, dict) else (None, None)
    )
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, (str, list)):
        raise problem(
            name,
            f"turn {shown(turn)} is not {{from: human | gpt, value: text}}, or {{role: user | assistant | system, "
            "content: text or parts}",
        )
    if len(turn) > 2:
        check_media(turn, {"from", "role", "value", "content"}, [], f"{name}: turn {shown(turn)}")
    return ROLES[role], content if isinstance(content, str) else parts_text(content, images, name)


def one_of(values: Mapping[str, Any], key: str, other: str) -> Any:
    """The value of one of two keys; None where neither or both have one."""
    first, second = values.get(key), values.get(other)
    return first if second is None else second if first is None else None


def parts_text(parts: Iterable[Any], images: list[str | None], name: str) -> str:
    """Text of a turn's parts, with a marker for each image and, as in LLaVA, a newline between a marker and text."""
    text, marked = "", False
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        fields = {key: own for key, own in part.items() if key != "type" and own is not None} if kind else {}
        if kind in ("image", "image_url", "input_image"):
            images.append(part_image(part, fields, name))
            text, marked = text + IMAGE_MARKER, True
        elif kind in ("text", "input_text", "output_text") and isinstance(fields.get("text"), str):
            if len(fields) > 1:
                check_media(fields, {"text"}, [], f"{name}: part {shown(part)}")
            text += "\n" + fields["text"] if marked and fields["text"] else fields["text"]
            marked = marked and not fields["text"]
        elif kind in ("video", "video_url", "audio", "input_audio"):
            raise problem(name, f"part {shown(part)} is {kind}, which is not supported yet; remove it, or give images")
        else:
            raise problem(
                name, f"part {shown(part)} is not {{type: text, text: …}} or {{type: image, image: path}}; correct it"
            )
    return text


def part_image(part: Any, fields: Mapping[str, Any], name: str) -> str | None:
    """Path of an image part; None where it stands for the next of the record's images."""
    sources = [own for key, own in fields.items() if key in PART_SOURCES and own != ""]
    if not sources and not any(MEDIA_KEY.fullmatch(key) and fields[key] != "" for key in fields):
        return None
    path = source_path(sources[0]) if len(sources) == 1 else None
    if path is None:
        raise problem(name, f"part {shown(part)} names no path of an image; write {{type: image, image: path}}")
    return checked_path(path, "image", name)


def filled(parts: Sequence[str | None], listed: Sequence[str], name: str) -> list[str]:
    """Images of parts, those without a path taken from the record's in order, as TRL does."""
    open_parts = parts.count(None)
    if open_parts != len(listed) and not (open_parts == 0 and list(parts) == list(listed)):
        raise problem(
            name,
            f"{open_parts} image parts have no path, and the record lists {len(listed)} images; list one for each of "
            "them, in their order",
            "markers",
        )
    rest = iter(listed)
    return [next(rest) if part is None else part for part in parts]


def without_greeting(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns without an answer before the first question, which LLaVA leaves out too."""
    first = next((i for i, (role, _) in enumerate(turns) if role != "system"), None)
    if first is None or turns[first][0] != "assistant":
        return turns
    return turns[:first] + turns[first + 1 :]


def with_markers(turns: list[tuple[str, str]], images: int) -> list[tuple[str, str]]:
    """The turns with markers before the first question, if they have none and it is plain where the images belong:
    there is one image, or one question."""
    questions = [i for i, (role, _) in enumerate(turns) if role == "user"]
    marked = any(IMAGE_MARKER in text for _, text in turns)
    if marked or not questions or not images or (images > 1 and len(questions) > 1):
        return turns
    first = questions[0]
    return [*turns[:first], ("user", f"{IMAGE_MARKER}\n" * images + turns[first][1]), *turns[first + 1 :]]


def check_media(values: Mapping[str, Any], known: Container[str], images: Sequence[str], name: str) -> None:
    """Raise RecordFault where an unknown key holds an image, video or audio, which would be ignored. Another name of a
    file in `images`, as of where it came from, is not one."""
    for key, value in values.items():
        if key in known or not value or isinstance(value, (bool, int, float)):
            continue
        items = value if isinstance(value, list) else [value]
        paths = [path for item in items[:100] if (path := source_path(item))]
        suffixes = {suffix for path in paths if (suffix := media_suffix(path))}
        named = is_media_key(key)
        if not named and not suffixes:
            continue
        if paths and {PurePath(path).name for path in paths} <= {PurePath(image).name for image in images}:
            continue
        if suffixes & VIDEO_SUFFIXES or (named and key.lower().startswith(("video", "audio"))):
            raise problem(
                name, f"{key!r} is {shown(value)}: video and audio are not supported yet; remove it, or give images"
            )
        raise problem(
            name, f"{key!r} is {shown(value)} and would be ignored; name images in 'image' or 'images', or remove it"
        )


@cache
def is_media_key(key: str) -> bool:
    return MEDIA_KEY.fullmatch(key) is not None


def media_suffix(path: str) -> str | None:
    """The suffix of a path to an image or a video, None of other texts."""
    if len(path) > LONGEST_PATH or "." not in path[-6:] or any(letter.isspace() for letter in path):
        return None
    suffix = PurePath(path).suffix.lower()
    return suffix if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES else None
