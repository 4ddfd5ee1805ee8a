"""Values that no usable weight has: other types than floating point, NaN, infinity, zeros everywhere."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights. Eight-bit floats are quantised: they mean nothing without the scales beside them."""


class WeightsError(ValueError):
    """Weights that are missing, broken, or belong to something else."""


class StoredWeights(dict[str, torch.Tensor]):
    """Tensors by the names of their files; `files` has the file of each name."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Path] = {}


def check_values(
    weights: Mapping[str, torch.Tensor], zero_is_fine: Callable[[str], bool], place: Callable[[str], str]
) -> None:
    """Raise WeightsError if one of `weights`, which are all used as floating point, has values that no training leaves.

    zero_is_fine: whether the tensor of this name may be zero everywhere, see `may_be_zero`. place: file and name of a
    tensor for the error.
    """
    problems = {key: problem for key, value in weights.items() if (problem := problem_of(key, value, zero_is_fine))}
    if problems:
        key, problem = next(iter(problems.items()))
        more = f" ({len(problems) - 1} more tensors are unusable)" if len(problems) > 1 else ""
        raise WeightsError(f"{place(key)} {problem}{more}")


def problem_of(key: str, value: torch.Tensor, zero_is_fine: Callable[[str], bool]) -> str | None:
    """What makes a tensor unusable as a weight, with a hint; None if it is usable. Reads it once."""
    if value.dtype not in FLOATING:
        kind = str(value.dtype).removeprefix("torch.")
        return f"is {kind} instead of floating point: give the weights from before they were quantised or converted"
    if not value.numel() or value.is_meta:
        return None
    low, high = (extreme.item() for extreme in value.detach().aminmax())
    if low == high == 0 and not zero_is_fine(key):
        return "is zero everywhere: the file was not written to its end, or was made without weights; fetch it again"
    if low > float("-inf") and high < float("inf"):  # false for NaN
        return None
    bad = (~value.detach().isfinite()).nonzero()
    index = bad[0].tolist()
    return (
        f"has {value[tuple(index)].item()} at {index} ({len(bad)} of {value.numel()} values are not finite): fetch the "
        "file again, or take a checkpoint from before training diverged"
    )


def may_be_zero(key: str, initial: torch.Tensor) -> bool:
    """Whether a tensor that begins as `initial` may be zero everywhere.

    Biases may, and what a module itself begins with at zero: gates, positions, last layers of a branch. On the meta
    device, where the beginning is not known, everything may but a matrix that is called `weight`.
    """
    if key.endswith("bias"):
        return True
    if initial.is_meta:
        return initial.ndim < 2 or not key.endswith("weight")
    return not bool(initial.any())


def origin(value: torch.Tensor, key: str, source: str, stored: Mapping[str, torch.Tensor] | None) -> str:
    """File and name of a tensor, also of one that is a part of a stored one; else `source` and our own name."""
    for name, whole in (stored or {}).items():
        size = whole.numel() * whole.element_size()
        if 0 <= value.data_ptr() - whole.data_ptr() < max(size, 1) and whole.dtype == value.dtype:
            files = stored.files if isinstance(stored, StoredWeights) else {}
            return f"'{files.get(name, source)}': {name}"
    return f"weights '{source}': {key}"
