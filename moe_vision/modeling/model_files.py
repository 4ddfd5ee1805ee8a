"""Read the JSON files of model folders, with errors that name the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import cached_file


class ModelFilesError(ValueError):
    """A file of a model folder that is missing, broken, or contradicts another one."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelFilesError where the file holds something else."""
    hint = "restore the file from its source"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFilesError(f"'{path}' cannot be read as JSON ({error}): {hint}") from error
    if not isinstance(values, dict):
        raise ModelFilesError(f"'{path}' holds a JSON {type(values).__name__} instead of an object: {hint}")
    return values


def find_file(source: str, name: str) -> Path | None:
    """Path of a file in a local folder or a Hub repository; None if there is no such file, or none in the cache where
    the Hub cannot be reached."""
    if Path(source).is_dir():
        return path if (path := Path(source) / name).is_file() else None
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn any exception of a library that reads `path` into ModelFilesError.

    OSError passes: it names its file, or says that the Hub cannot be reached.
    """
    try:
        yield
    except (ModelFilesError, OSError):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise ModelFilesError(
            f"'{path}' cannot be used ({kind}: {error}): restore the file from its source, or mend the value"
        ) from error
