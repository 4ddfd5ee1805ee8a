"""Which files hold the weights of a Hugging Face folder, and which types they have: read from headers only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import safe_open
from torch import nn

from moe_vision.experts.weight_values import FLOATING, WeightsError, check_values
from moe_vision.modeling.model_files import ModelFilesError, find_file, read_object, reading

WHOLE = ("model.safetensors", "pytorch_model.bin")
FLOATING_NAMES = {"F16", "BF16", "F32", "F64", *map(str, FLOATING)}
"""As safetensors and torch call the types of weights."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor is and which type it has there."""

    file: Path
    type: str


def weight_files(source: str) -> list[Path]:
    """The files of a local folder or Hub repository that transformers reads, in its order of preference: one file, or
    the shards of an index. Empty if there are none.

    Raises ModelFilesError for an index that names a missing shard, or a file outside the folder.
    """
    for name in WHOLE:
        if (whole := find_file(source, name)) is not None:
            return [whole]
        index = find_file(source, f"{name}.index.json")
        if index is not None:
            return shards_of(source, index)
    return []


def shards_of(source: str, index: Path) -> list[Path]:
    """The shards that an index names. Raises ModelFilesError."""
    entries = read_object(index).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries.values()):
        raise ModelFilesError(f"'{index}': weight_map must be an object of tensor names and files; fetch it again")
    shards = []
    for name in sorted(set(entries.values())):
        parts = PurePosixPath(name).parts
        if ".." in parts or PurePosixPath(name).is_absolute():
            raise ModelFilesError(f"'{index}' names '{name}', which is outside its folder: fetch the folder again")
        shard = find_file(source, name)
        if shard is None:
            raise ModelFilesError(f"'{index}' names the shard '{name}', which is not there: fetch the folder again")
        shards.append(shard)
    return shards


def stored_types(files: list[Path]) -> dict[str, Stored]:
    """File and type of every tensor, by its stored name. Raises ModelFilesError for a file that cannot be read."""
    found = {}
    for file in files:
        with reading(file):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as weights:
                    for key in weights.keys():  # noqa: SIM118
                        found[key] = Stored(file, weights.get_slice(key).get_dtype())
            else:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                found |= {key: Stored(file, str(value.dtype)) for key, value in loaded.items()}
    return found


def check_types(stored: Mapping[str, Stored], floating: set[str]) -> None:
    """Raise WeightsError if a tensor of one of these names, or a `weight` of any name, is not stored as floating point:
    transformers would convert it without a message."""
    for key, entry in stored.items():
        if (key in floating or key.endswith(".weight")) and entry.type not in FLOATING_NAMES:
            kind = entry.type.removeprefix("torch.")
            raise WeightsError(
                f"'{entry.file}': {key} is {kind} instead of floating point: give the weights from before they were "
                "quantised or converted"
            )


def check_parameters(
    module: nn.Module, begins_at_zero: Callable[[str], bool], stored: Mapping[str, Stored], source: str
) -> None:
    """Raise WeightsError for parameters that are not finite, or zero everywhere and neither a bias nor zero at first.

    begins_at_zero: whether a new module has zeros in the parameter of this name; asked about parameters of zeros only.
    stored: names the file; either name may have a prefix that the other has not.
    """

    def place(key: str) -> str:
        names = [name for name in stored if name == key or name.endswith(f".{key}") or key.endswith(f".{name}")]
        return f"'{stored[names[0]].file}': {names[0]}" if names else f"weights '{source}': {key}"

    check_values(dict(module.named_parameters()), lambda key: key.endswith("bias") or begins_at_zero(key), place)
