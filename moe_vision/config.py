"""Config files: YAML, typed and validated before anything loads.

`base: other.yaml` deep-merges a file under this one, and an expert that is null here is taken out of it;
`key.sub=value` overrides on the command line; `type:` picks a registered class; `plugins: [my_file.py]` imports files
that register more. All errors come at once, each with its path, value, cause and cure.
"""

import dataclasses
import math
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticKnownError, core_schema

from moe_vision.config_paths import absolute
from moe_vision.errors import ConfigError, Problem
from moe_vision.files import FileError, read_text, resolved
from moe_vision.plugins import checked_plugin, import_plugin
from moe_vision.registry import Registry, suggest
from moe_vision.yaml_reader import parse_yaml

__all__ = [
    "Config", "ConfigError", "Problem", "Registered", "apply_override", "import_plugin", "load_config", "merge",
    "overridden", "read_yaml", "validate",
]  # fmt: skip

MAX_CONFIG_BYTES = 2**20
"""Largest config file."""

MAX_BASES, MAX_KEYS = 32, 32
"""Most files below each other by `base:`; most keys of an override."""

LARGEST_NUMBER = 10**15
"""Largest number of a config, either sign."""


class Config(BaseModel):
    """Base of every config: frozen, without infinite numbers, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Registered:
    """Annotation of a field whose `type:` key picks a class from `registry`.

    >>> Annotated[MixerConfig, Registered(MIXERS)]
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def choose(value: Any) -> Any:
            # The registry is read here and not when the schema is made: plug-ins come later.
            if isinstance(value, source):
                return value
            if not isinstance(value, Mapping) or "type" not in value:
                raise PydanticKnownError("union_tag_not_found", {"discriminator": "type"})
            name = str(value["type"])
            if name not in list(self.registry):
                known = ", ".join(f"'{known}'" for known in self.registry)
                raise PydanticKnownError(
                    "union_tag_invalid", {"discriminator": "type", "tag": name, "expected_tags": known}
                )
            rest = {key: item for key, item in value.items() if key != "type"}
            return pydantic.TypeAdapter(self.registry[name]).validate_python(rest)

        return core_schema.no_info_plain_validator_function(choose)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        options = []
        for name, cls in self.registry.items():
            option = pydantic.TypeAdapter(cls).json_schema()
            option.setdefault("properties", {})["type"] = {"const": name}
            options.append({**option, "title": f"{self.registry.kind} {name}"})
        return {"oneOf": options}


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(
    cls: type[ConfigT], path: Path | str, overrides: Sequence[str] = (), *, allow_plugins: bool = False
) -> ConfigT:
    """Read a YAML file, merge its bases, apply overrides, import its plug-ins and validate.

    Relative paths start at the file that holds them, those of overrides at the working folder. allow_plugins: also run
    plug-ins outside the folder of the file that names them. Raises ConfigError.
    """
    values = read_yaml(Path(path), cls, allow_plugins=allow_plugins)
    return validate(cls, overridden(cls, values, overrides), source=str(path))


def overridden(cls: type[Config], values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Values under overrides of the command line. Raises ConfigError."""
    for override in overrides:
        values = apply_override(values, override, cls)
    return values


def validate(cls: type[ConfigT], values: dict[str, Any], *, source: str, folder: Path | None = None) -> ConfigT:
    """Validate plain values, and import the plug-ins that they name, from wherever they are.

    folder: where relative paths start; None leaves the values as they are. Raises ConfigError with every problem.
    """
    if folder is not None:
        values = absolute(cls, values, folder, lambda name, place: checked_plugin(name, folder, True, source, place))
    if problems := list(unusable_numbers(values)):
        raise ConfigError(source, problems)
    plugins = values.get("plugins")
    for plugin in plugins if isinstance(plugins, list) else ():
        if isinstance(plugin, str):
            import_plugin(Path(plugin), source)
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(source, [_problem(cls, values, e) for e in error.errors(include_url=False)]) from None


def unusable_numbers(value: Any, place: str = "") -> Iterator[Problem]:
    """Numbers that are infinite, not a number, or beyond `LARGEST_NUMBER`."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from unusable_numbers(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from unusable_numbers(item, f"{place}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(place, value, "is no finite number", "write a number, or leave the key out for its default")
    elif isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        yield Problem(place, value, f"is out of range, beyond {LARGEST_NUMBER:,}", "write a smaller number")


def read_yaml(
    path: Path, cls: type[Config] | None = None, *, allow_plugins: bool = False, _seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Read a YAML mapping with its `base:` files merged below it.

    cls: the config class of the values, whose relative paths are made absolute, each from the file that holds it; None
    leaves them. allow_plugins: as in `load_config`. Raises ConfigError.
    """
    path = resolved(path)
    if path in _seen or len(_seen) >= MAX_BASES:
        chain = " → ".join(str(p) for p in (*_seen[-4:], path))
        cause = "includes itself" if path in _seen else f"has more than {MAX_BASES} bases below each other"
        raise ConfigError(str(path), [Problem("base", path.name, cause, f"break the circle {chain}")])
    try:
        text = read_text(path, "config", MAX_CONFIG_BYTES)
    except FileError as error:
        raise ConfigError(str(path), [_unread(path, error)]) from None
    values = parse_yaml(text, str(path), "file", path.name)
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ConfigError(str(path), [Problem("file", path.name, f"holds a {found}", "write `key: value` lines")])
    base = values.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(str(path), [Problem("base", base, "is no file's name", "give one YAML file to build upon")])
    if cls is not None:
        values = absolute(
            cls, values, path.parent,
            lambda name, place: checked_plugin(name, path.parent, allow_plugins, str(path), place),
        )  # fmt: skip
    if base is None:
        return values
    below = read_yaml(path.parent / os.path.expanduser(base), cls, allow_plugins=allow_plugins, _seen=(*_seen, path))
    return merge(*_taken_out(below, values))


def _unread(path: Path, error: FileError) -> Problem:
    """What is wrong with a config file that cannot be read."""
    if error.cause != "does not exist":
        return Problem("file", path.name, error.cause, error.hint)
    near = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    hint = suggest(path.name, near) if near else f"the folder {path.parent} has no config file"
    return Problem("file", path.name, "no such file", hint)


def _taken_out(below: dict[str, Any], above: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both files of a merge without the experts that the upper one sets to null. Raises ConfigError."""
    for place in EXPERT_PLACES:
        experts: Any = above
        for key in place:
            experts = experts.get(key) if isinstance(experts, Mapping) else None
        if not isinstance(experts, dict):
            continue
        for name in [name for name, value in experts.items() if value is None]:
            below = apply_override(below, ".".join((*place, name)) + "=null")
            del experts[name]
    return below, above


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Deep-merge two mappings; `above` wins. A mapping whose `type` differs replaces the one below as a whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = value
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("type", old.get("type")) == old.get("type")
        ):
            merged[key] = merge(old, value)
    return merged


EXPERT_PLACES = (("experts",), ("model", "experts"))
"""Where experts stand in a model config, and in a train config that holds its model."""


def apply_override(values: Mapping[str, Any], override: str, cls: type[Config] | None = None) -> dict[str, Any]:
    """Apply one `dotted.key=value`; the value is YAML, and items of a list go by number, as `stages.0.epochs=2`.

    `experts.sam=null` takes that expert out. cls: the config class of the values; relative paths in the new value start
    at the working folder. Raises ConfigError where there is no `=`, no such expert or item, where the value is not YAML
    or where the key reaches into something that is neither mapping nor list.
    """
    path, equals, text = override.partition("=")
    keys = tuple(path.split("."))
    if not equals or not all(keys) or len(keys) > MAX_KEYS:
        problem = Problem("override", override, "is not key=value", "write for example experts.clip.layer=-2")
        raise ConfigError("command line", [problem])
    value = parse_yaml(text, "command line", path, text)
    if cls is not None:
        value = _from_here(cls, keys, value)
    replaced = _replaced(values, (), keys, value)
    return _without_resample(replaced, keys[-1]) if value is None and keys[:-1] in EXPERT_PLACES else replaced


def _from_here(cls: type[Config], keys: Sequence[str], value: Any) -> Any:
    """The value of an override with relative paths that start at the working folder."""
    here = Path.cwd()
    nested = value
    for key in reversed(keys):
        nested = {key: nested}
    nested = absolute(cls, nested, here, lambda name, place: checked_plugin(name, here, True, "command line", place))
    for key in keys:
        nested = nested[key]
    return nested


def _without_resample(node: Any, name: str) -> Any:
    """A copy in which no `resample` speaks of an expert that was taken out."""
    if not isinstance(node, Mapping):
        return node
    copy = {key: _without_resample(value, name) for key, value in node.items()}
    if isinstance(copy.get("resample"), dict):
        copy["resample"].pop(name, None)
    return copy


def _replaced(node: Any, walked: tuple[str, ...], keys: tuple[str, ...], value: Any) -> Any:
    """A copy of `node` with the value at `keys` replaced; parts that the path does not touch are shared."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    here = ".".join((*walked, key))
    if isinstance(node, list):
        if not (key.isdigit() and int(key) < len(node)):
            cure = f"give a number from 0 to {len(node) - 1}"
            raise ConfigError("command line", [Problem(here, key, "is no item of this list", cure)])
        copy = list(node)
        copy[int(key)] = _replaced(node[int(key)], (*walked, key), rest, value)
        return copy
    if node is not None and not isinstance(node, Mapping):
        where = ".".join(walked)
        problem = Problem(where, node, "is a value, not a mapping", f"override {where} itself")
        raise ConfigError("command line", [problem])
    below = dict(node or {})
    removes = not rest and value is None
    if walked in EXPERT_PLACES and key not in below and (rest or removes):
        # A config of training names its experts in its model, if not in another file.
        cure = suggest(key, list(below)) if below else f"of the model that a config names, write model.{here}=…"
        raise ConfigError("command line", [Problem(here, key, "no such expert in this config", cure)])
    if walked in EXPERT_PLACES and removes:
        del below[key]
    else:
        below[key] = _replaced(below.get(key), (*walked, key), rest, value)
    return below


def _problem(cls: type[BaseModel], values: Any, error: Any) -> Problem:
    path, names = _locate(cls, values, error["loc"])
    key = path.rsplit(".", 1)[-1]
    kind, context = error["type"], error.get("ctx", {})
    value = error["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return Problem(path, value, f"unknown key '{key}'", suggest(key, names) if names else "leave it out")
    if kind == "union_tag_invalid":
        tag, known = context["tag"], [name.strip("' ") for name in context["expected_tags"].split(",")]
        return Problem(f"{path}.type", tag, f"unknown type '{tag}'", suggest(tag, known))
    if kind == "union_tag_not_found":
        return Problem(path, value, "has no `type` key", "say which one, as in `type: mlp`")
    if kind in ("missing", "missing_argument"):
        return Problem(path, None, "is missing", "add it")
    if kind in CURES:
        return Problem(path, value, error["msg"], CURES[kind])
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    cause, _, cure = message.partition("; " if kind == "value_error" and "; " in message else ": ")
    return Problem(path, value, cause, cure or "see `moe-vision schema` for what is valid here")


CURES = {
    "tuple_type": "write [height, width] in whole numbers, without a unit",
    "int_parsing": "write a whole number, without a unit",
    "int_type": "write a whole number, without a unit",
    "int_from_float": "write a whole number",
    "float_parsing": "write a number, without a unit",
    "float_type": "write a number, without a unit",
    "finite_number": "write a finite number",
    "bool_parsing": "write true or false",
    "string_type": "write text",
    "dict_type": "write `key: value` lines",
    "list_type": "write a list, as in [a, b]",
}
"""What to do about values of the wrong type, by pydantic's name of the fault."""


def _locate(cls: type[BaseModel], values: Any, loc: Sequence[Any]) -> tuple[str, list[str]]:
    """Path of an error as the user wrote it, and the names that are valid there."""
    parts: list[str] = []
    fields: Any = cls
    node: Any = values
    names = list(cls.model_fields)
    for key in loc:
        if isinstance(fields, Registered):
            chosen = node.get("type", parts[-1]) if isinstance(node, Mapping) else None
            fields = fields.registry[chosen] if chosen in list(fields.registry) else None
        parts.append(str(key))
        names = _names(fields)
        fields = _descend(fields, key)
        node = node.get(key) if isinstance(node, Mapping) else None
    return ".".join(parts) or "(whole file)", names


def _names(fields: Any) -> list[str]:
    if isinstance(fields, type) and issubclass(fields, BaseModel):
        return list(fields.model_fields)
    if dataclasses.is_dataclass(fields):
        return [field.name for field in dataclasses.fields(fields)]
    return []


def _descend(fields: Any, key: Any) -> Any:
    """Type of the value under `key` of a model, dataclass, mapping or list; None where it is not known."""
    if isinstance(fields, type) and issubclass(fields, BaseModel):
        info = fields.model_fields.get(key)
        if info is None:
            return None
        tags = [item for item in info.metadata if isinstance(item, Registered)]
        return tags[0] if tags else _unwrap(info.annotation)
    if typing.get_origin(fields) in (dict, list, tuple, Mapping):
        return _unwrap(typing.get_args(fields)[-1])
    return None


def _unwrap(annotation: Any) -> Any:
    """Annotated and optional annotations to what they hold."""
    if typing.get_origin(annotation) is typing.Annotated:
        tags = [item for item in typing.get_args(annotation)[1:] if isinstance(item, Registered)]
        return tags[0] if tags else _unwrap(typing.get_args(annotation)[0])
    inner = [item for item in typing.get_args(annotation) if item is not type(None)]
    if len(inner) == 1 and type(None) in typing.get_args(annotation):
        return _unwrap(inner[0])
    return annotation
