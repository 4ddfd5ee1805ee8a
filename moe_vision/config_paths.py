"""Relative paths in config files: they start at the folder of the file that holds them.

Config classes mark their fields: `Annotated[str, FromFile()]` in pydantic models, `field(metadata={"path": "name"})` in
dataclasses. `absolute` reads the marks, so that a new field needs no list here.
"""

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from moe_vision.files import resolved
from moe_vision.registry import Registry

PACKAGE_SCHEME = "moe_vision:"
EXPLICIT = ("./", "../", "/", "~")


@dataclass(frozen=True)
class FromFile:
    """Mark of a field that holds a path, or a list of paths.

    kind: `path` is always one. `name` is one where it begins with ./ ../ / or ~, or where it exists; otherwise it is a
    name of something else, as of a repository on the Hub. `file` is like `name`, but a folder of that name is no path.
    `plugin` is a path of code.
    content: config class of the mapping that the field may hold in place of a path.
    """

    kind: typing.Literal["path", "name", "file", "plugin"] = "path"
    content: type[BaseModel] | None = None


PluginCheck = Callable[[str, str], str]
"""(name of a plug-in, its key) → its absolute path; raises where it may not run."""


def absolute(cls: Any, values: Any, folder: Path, plugin: PluginCheck, place: str = "") -> Any:
    """A copy of plain values of a config class in which every path is absolute. Values of a wrong type stay.

    folder: where relative paths start. place: key of the values, for messages.
    """
    return _walk(cls, values, folder, plugin, place)


def _walk(kind: Any, value: Any, folder: Path, plugin: PluginCheck, place: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _annotated(typing.get_args(kind), value, folder, plugin, place)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            value = _walk(option, value, folder, plugin, place)
        return value
    if origin in (list, tuple):
        item = typing.get_args(kind)[0] if typing.get_args(kind) else Any
        if isinstance(value, list):
            return [_walk(item, one, folder, plugin, f"{place}.{i}") for i, one in enumerate(value)]
        return _items(item, value, folder, plugin, place)  # an override's `stages.0.data`
    if origin in (dict, Mapping):
        return _items(typing.get_args(kind)[1], value, folder, plugin, place)
    if isinstance(kind, type) and isinstance(value, Mapping):
        return _fields(kind, value, folder, plugin, place)
    return value


def _items(kind: Any, value: Any, folder: Path, plugin: PluginCheck, place: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _walk(kind, item, folder, plugin, joined(place, key)) for key, item in value.items()}


def joined(place: str, key: Any) -> str:
    """A key with those above it."""
    return f"{place}.{key}" if place else str(key)


def _annotated(arguments: tuple[Any, ...], value: Any, folder: Path, plugin: PluginCheck, place: str) -> Any:
    kind, *marks = arguments
    for mark in marks:
        if isinstance(mark, FromFile):
            return _marked(mark, value, folder, plugin, place)
        registry = getattr(mark, "registry", None)
        if isinstance(registry, Registry) and isinstance(value, Mapping):
            # In a file that another one builds upon, the type may be in that one: then the base class's marks do.
            name = value.get("type", place.rsplit(".", 1)[-1])
            kind = registry[name] if isinstance(name, str) and name in registry else kind
    return _walk(kind, value, folder, plugin, place)


def _fields(kind: type, value: Mapping[Any, Any], folder: Path, plugin: PluginCheck, place: str) -> Mapping[Any, Any]:
    copy = dict(value)
    if issubclass(kind, BaseModel):
        for name, info in kind.model_fields.items():
            if name in copy:
                annotation: Any = info.annotation
                for mark in info.metadata:
                    annotation = typing.Annotated[annotation, mark]
                copy[name] = _walk(annotation, copy[name], folder, plugin, joined(place, name))
    elif dataclasses.is_dataclass(kind):
        for entry in dataclasses.fields(kind):
            if entry.name in copy and "path" in entry.metadata:
                mark = FromFile(entry.metadata["path"])
                copy[entry.name] = _marked(mark, copy[entry.name], folder, plugin, joined(place, entry.name))
    return copy


def _marked(mark: FromFile, value: Any, folder: Path, plugin: PluginCheck, place: str) -> Any:
    if isinstance(value, list):
        return [_marked(mark, item, folder, plugin, f"{place}.{i}") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and mark.content is not None:
        return _walk(mark.content, value, folder, plugin, place)
    if not isinstance(value, str) or value.startswith(PACKAGE_SCHEME):
        return value
    if mark.kind == "plugin":
        return plugin(value, place)
    return str(path_of(value, folder)) if mark.kind == "path" or is_path(mark, value, folder) else value


def is_path(mark: FromFile, value: str, folder: Path) -> bool:
    """Whether a value that may be a name is a path: by how it begins, or because it exists."""
    if value.startswith(EXPLICIT) or value in (".", ".."):
        return True
    exists = os.path.isfile if mark.kind == "file" else os.path.exists
    return bool(value) and value != "default" and exists(path_of(value, folder))


def path_of(value: str, folder: Path) -> Path:
    """The absolute path of a value in a config of `folder`."""
    return resolved(folder / os.path.expanduser(value))
