"""Which files of a checkpoint folder hold its weights, and reading exactly those.

folder ─ weight_files() ─ file: the keys that the index promises in it ─ read_files() ─ state dict

`model.safetensors.index.json` or `pytorch_model.bin.index.json` decides, as in transformers; a file that it does not
list is not opened. Published folders hold leftovers such as `model-00001-of-00003_old.safetensors`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moe_vision.experts.weight_values import StoredWeights, WeightsError

WeightFiles = Mapping[Path, frozenset[str] | None]
"""Files to read, each with the keys that an index promises in it; None where no index lists it."""

STEMS = {".safetensors": "model", ".bin": "pytorch_model"}
"""Name of a whole checkpoint's file, and beginning of its index's, for each suffix."""


def weight_files(folder: Path, suffixes: Sequence[str]) -> WeightFiles | None:
    """The files that hold a folder's weights, of the first suffix that has any; None where none has.

    For each suffix: the files of its index; else the whole checkpoint's file (`model.safetensors`,
    `pytorch_model.bin`); else the only file of that suffix. Raises WeightsError for an index that cannot be obeyed, and
    for several files that no index lists.
    """
    for suffix in suffixes:
        stem = STEMS.get(suffix)
        if stem is not None and (index := folder / f"{stem}{suffix}.index.json").is_file():
            return listed_files(index)
        if stem is not None and (whole := folder / f"{stem}{suffix}").is_file():
            return {whole: None}
        found = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
        if len(found) > 1:
            wanted = f"{stem}{suffix}.index.json" if stem else "an index"
            raise WeightsError(
                f"folder '{folder}' holds {len(found)} {suffix} files ({listed([path.name for path in found])}) and no "
                f"{wanted} that says which belong together: fetch it too, or name one file"
            )
        if found:
            return {found[0]: None}
    return None


def listed_files(index: Path) -> WeightFiles:
    """The files of an index, each with its keys. Raises WeightsError for a broken index or a file that is not there."""
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise WeightsError(f"'{index}' cannot be read as JSON ({error}): fetch it again") from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise WeightsError(f"'{index}' has no weight_map of keys and file names: fetch it again")
    files: dict[Path, frozenset[str]] = {}
    for name in sorted(set(weight_map.values())):
        file = inside(name, index.parent, index)
        if not file.is_file():
            raise WeightsError(f"'{index}' lists '{name}', which is not in its folder: fetch the folder again")
        files[file] = frozenset(key for key, value in weight_map.items() if value == name)
    return files


def inside(name: str, folder: Path, source: Path) -> Path:
    """The file of a folder by its name in an index. Raises WeightsError for one that leaves the folder.

    A link may lead to the `blobs` of the Hub's cache that the folder is a snapshot of.
    """
    parts = PurePosixPath(name)
    leaves = parts.is_absolute() or ".." in parts.parts or "\\" in name or not name.strip() or "\0" in name
    file, home = folder / name, folder.resolve()
    allowed = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if leaves or not any(file.resolve().is_relative_to(place) for place in allowed):
        raise WeightsError(
            f"'{source}': the weights file {name!r} is outside of the folder: copy the file into the folder, and list "
            "it by its name alone"
        )
    return file


def read_files(files: WeightFiles) -> StoredWeights:
    """Read and join files; pickles with `weights_only=True`. Raises WeightsError naming the file that is broken.

    Of a file that an index lists, keys that the index promises elsewhere are left out; a promised key that is not there
    is an error.
    """
    elsewhere = frozenset(key for keys in files.values() for key in keys or ())
    state = StoredWeights()
    for file, promised in files.items():
        found = read_file(file)
        if missing := sorted((promised or frozenset()) - found.keys()):
            raise WeightsError(f"'{file}' lacks {listed(missing)}, which the folder's index promises: fetch it again")
        for key, value in found.items():
            if promised is None or key in promised or key not in elsewhere:
                state[key] = value
                state.files[key] = file
    return state


def read_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, by name."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, UnpicklingError) as error:
        raise WeightsError(f"'{file}' cannot be read ({error}): it may be truncated, fetch it again") from error
    return tensors_of(loaded, file)


def tensors_of(loaded: Any, file: Path) -> dict[str, torch.Tensor]:
    """The state dict in what a pickle holds. Raises WeightsError where it holds none, or values that are no tensors."""
    hint = "give a file with a state dict: names and tensors, below `model` or `state_dict` if not at the top"
    for name in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and name in loaded:
            loaded = loaded[name]
            break
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"'{file}' holds a {type(loaded).__name__} and no state dict: {hint}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(f"'{file}': {key!r} is a {type(value).__name__} and no tensor: {hint}")
    return dict(loaded)


def listed(names: Sequence[str]) -> str:
    """The first four names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) + more) if names else "none"
