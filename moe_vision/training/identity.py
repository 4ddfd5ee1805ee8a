"""Whether a start continues what an output holds: the settings that decide its result, and what its data says."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from moe_vision.data.records import Record

FREE = ("num_workers", "logging_steps", "save_steps", "cache_gb")
"""Settings of a stage that change nothing about its result."""

PLACES = ("path", "image_root")
"""Where a source of data is; what it holds is compared by itself."""

SHOWN = 4
"""How many differences a message shows."""


def deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a resolved config without those that may change between two starts."""
    kept = {key: value for key, value in values.items() if key != "report_to"}
    if isinstance(kept.get("stages"), list):
        kept["stages"] = [deciding_of_stage(stage) for stage in kept["stages"]]
    return {key: without_places(value) if key in ("test", "validation") else value for key, value in kept.items()}


def deciding_of_stage(stage: Any) -> Any:
    """As `deciding`, of one stage."""
    if not isinstance(stage, dict):
        return stage
    return {key: without_places(value) if key == "data" else value for key, value in stage.items() if key not in FREE}


def without_places(data: Any) -> Any:
    """The values of data, or of each part of a mixture, without where it is."""
    if not isinstance(data, dict):
        return data
    kept = {key: value for key, value in data.items() if key not in PLACES}
    if kept.get("mixture"):
        kept["mixture"] = [without_places(part) for part in kept["mixture"]]
    return kept


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that holds no other, by its dotted path."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    found = False
    for key, value in inner:
        found = True
        yield from leaves(value, f"{path}.{key}" if path else str(key))
    if not found:
        yield path, values


def differences(before: Any, now: Any) -> str | None:
    """The settings that differ, with both values, for people; None if none does."""
    old, new = dict(leaves(before)), dict(leaves(now))
    absent = "(not there)"
    said = [
        f"{key} was {old.get(key, absent)!r} and is {new.get(key, absent)!r}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key, absent) != new.get(key, absent)
    ]
    more = f", and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return "; ".join(said[:SHOWN]) + more if said else None


def data_digests(records: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, Any]]:
    """By name, how many records there are and a digest of them: of their texts and of the sizes of their image files,
    wherever these are."""
    found = {}
    for name, own in records.items():
        digest = xxhash.xxh3_128()
        for record in own:
            sizes = [path.stat().st_size for path in record.images]
            digest.update(repr((replace(record, images=()), sizes)).encode("utf-8", "surrogatepass"))
        found[name] = {"records": len(own), "digest": digest.hexdigest()}
    return found


def changed_data(path: Path, now: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Which data differs from what a file of `data_digests` says, for people; None if none does or there is no file.
    Raises ValueError where that file is damaged."""
    if not path.is_file():
        return None
    try:
        before = {name: (values["records"], values["digest"]) for name, values in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged ({error}): restore it, or --overwrite to start anew") from None
    for name, values in now.items():
        count, digest = before.get(name, (values["records"], values["digest"]))
        if digest != values["digest"]:
            return f"the data of {name} has other content ({count} records then, {values['records']} now)"
    return None
