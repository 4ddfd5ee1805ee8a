"""Tables of Hugging Face `datasets` as a user's data would be: LLaVA-format JSON Lines, and pictures by their content.

Faulty rows are written as they are: the check that every file goes through finds and names them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from moe_vision.data.config import ColumnsConfig, SourceConfig
from moe_vision.data.faults import DataError
from moe_vision.data.forms import PART_SOURCES
from moe_vision.registry import suggest

FILE_BUILDERS = {
    ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow",
}  # fmt: skip
SAVED_FILES = ("state.json", "dataset_dict.json")
"""One of them lies in each folder that `save_to_disk` wrote."""


def write_table(data: SourceConfig, folder: Path) -> Path:
    """Bring a dataset below `folder`, whole or not at all, unless it is there; returns its JSON Lines file.

    Raises DataError where it cannot be read, where a column is missing, or where it has no row.
    """
    assert data.columns is not None  # SourceConfig refused it
    what = data.model_dump(include={"dataset", "config", "split", "columns", "image_root"})
    if data.streaming:  # else `records` does not change what is written
        what["records"] = data.records
    target = folder / f"dataset-{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"
    if not target.is_dir():
        table = open_table(data)
        partial = folder / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "pictures").mkdir(parents=True)
        with (partial / "records.jsonl").open("w", encoding="utf-8") as file:
            for row in rows_of(table, data):
                file.write(json.dumps(record_of(row, data.columns, picture_root(data), partial), default=repr) + "\n")
        partial.replace(target)
    return target / "records.jsonl"


def picture_root(data: SourceConfig) -> Path | None:
    """Where relative paths of a table start; None where nothing says so."""
    if data.image_root is not None:
        return Path(data.image_root)
    local = Path(str(data.dataset))
    return (local if local.is_dir() else local.parent).resolve() if local.exists() else None


def open_table(data: SourceConfig) -> Any:
    """A `datasets.Dataset`, or an IterableDataset where it is streamed, whose pictures stay as they are stored."""
    import datasets  # here, because it takes half a second that most commands need not wait for

    source, title = str(data.dataset), data.title
    local = Path(source)
    saved = any((local / name).is_file() for name in SAVED_FILES)
    if (saved or local.is_file()) and data.config is not None:
        raise DataError(
            title, [f"config '{data.config}' picks a part of a data set on the Hub; leave it out of a file"]
        )
    if saved and data.streaming:
        raise DataError(title, ["a folder that datasets has saved is not streamed: leave streaming out"])
    with read_errors_told(title):
        if saved:
            table = split_of(saved_table(source, title), data)
        elif local.is_file():
            builder = FILE_BUILDERS.get(local.suffix)
            if builder is None:
                raise DataError(title, [f"a '{local.suffix}' file is no table: give one of {', '.join(FILE_BUILDERS)}"])
            table = datasets.load_dataset(
                builder, data_files={"train": source}, split=data.split, streaming=data.streaming
            )
        else:
            table = datasets.load_dataset(source, data.config, split=data.split, streaming=data.streaming)
        return undecoded(table, data)


@contextmanager
def read_errors_told(title: str) -> Iterator[None]:
    """Turn what `datasets` raises into a DataError."""
    import datasets

    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(title, [f"datasets cannot read it ({error}): give a folder or file, or a name on the Hub, and "
                                "a split that it has"]) from error  # fmt: skip


def saved_table(source: str, title: str) -> Any:
    """A folder that `save_to_disk` wrote; `datasets` finds no file in one that it saved without a row."""
    import datasets

    try:
        return datasets.load_from_disk(source)
    except IndexError as error:
        raise DataError(title, ["holds no record: add at least one row"]) from error


def split_of(loaded: Any, data: SourceConfig) -> Any:
    """The split of a saved folder, which holds one or several."""
    import datasets

    if not isinstance(loaded, datasets.DatasetDict):
        if data.split not in ("train", str(loaded.split)):
            raise DataError(data.title, [f"holds one table and no split '{data.split}': leave split out"])
        return loaded
    if data.split not in loaded:
        raise DataError(data.title, [f"has no split '{data.split}': {suggest(data.split, list(loaded))}"])
    return loaded[data.split]


def undecoded(table: Any, data: SourceConfig) -> Any:
    """The table with its pictures as bytes or paths, not decoded. Raises DataError naming a column that it lacks."""

    assert data.columns is not None
    known = table.column_names or list(next(iter(table), {}))  # a stream of JSON knows its columns by its first row
    named = data.columns.named()
    missing = [f"columns.{key}: there is no column '{name}'; {suggest(name, known)}"
               for key, name in named.items() if name not in known]  # fmt: skip
    if known and missing:
        raise DataError(data.title, missing)
    features = table.features or {}
    for name in (data.columns.images, data.columns.conversations):
        if name in features and (stored := stored_feature(features[name])) != features[name]:
            table = table.cast_column(name, stored)
    return table


def stored_feature(feature: Any) -> Any:
    """A column's feature with its images, in lists and structures too, as bytes or paths."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(stored_feature(feature.feature))
    if isinstance(feature, dict):
        return {key: stored_feature(own) for key, own in feature.items()}
    return feature


def rows_of(table: Any, data: SourceConfig) -> Iterator[Mapping[str, Any]]:
    """Rows of a table, or the first `records` of a stream."""
    with read_errors_told(data.title):
        yield from islice(table, data.records) if data.streaming else table


def record_of(row: Mapping[str, Any], columns: ColumnsConfig, root: Path | None, folder: Path) -> dict[str, Any]:
    """A row as a LLaVA record, in one of the forms that files have; images in the table are written below `folder`."""
    values = {key: row[column] for key, column in columns.named().items()}
    stored = values.get("images")
    pictures = stored if isinstance(stored, list) else [stored] if stored is not None else []
    record: dict[str, Any] = {"images": [picture_path(picture, root, folder) for picture in pictures]}
    turns = values.get("conversations")
    if columns.conversations is None:
        record |= {key: values[key] for key in ("question", "answer")}
    else:
        record["conversations"] = [file_turn(t, root, folder) for t in turns] if isinstance(turns, list) else turns
    return record | {key: plain(values[key]) for key in ("id", "task") if values.get(key) is not None}


def file_turn(turn: Any, root: Path | None, folder: Path) -> Any:
    """A turn whose parts name their images by path; those in the table are written below `folder`."""
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if not isinstance(content, list):
        return turn
    parts = [
        {key: picture_path(own, root, folder) if is_picture(key, own) else own for key, own in part.items()}
        if isinstance(part, Mapping)
        else part
        for part in content
    ]
    return {**turn, "content": parts}


def is_picture(key: str, value: Any) -> bool:
    """Whether a part's value is an image: by content, by path, or both."""
    return isinstance(value, bytes) or (key in PART_SOURCES and isinstance(value, (str, Mapping)) and bool(value))


def plain(value: Any) -> Any:
    """What JSON can hold of an id or a task."""
    return value if isinstance(value, (str, int, float)) else str(value)


def picture_path(picture: Any, root: Path | None, folder: Path) -> Any:
    """Path of a picture: its own, or that of the file that its bytes are written to, named by their digest.

    What is no picture is given back, for the check of records to name.
    """
    content, path = (picture.get("bytes"), picture.get("path")) if isinstance(picture, Mapping) else (picture, picture)
    if isinstance(content, bytes):
        name = f"pictures/{hashlib.sha256(content).hexdigest()[:32]}"
        if not (folder / name).exists():
            (folder / name).write_bytes(content)
        return name
    if not isinstance(path, (str, os.PathLike)):
        return path if isinstance(picture, Mapping) or path is None else repr(path)
    return str(root / path) if root is not None and path and "://" not in str(path) else str(path)
