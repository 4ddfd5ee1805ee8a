"""A training's output folder: what it may be, how it opens, which checkpoint in it a run goes on from."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import safe_open
from transformers.trainer_utils import get_last_checkpoint

from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.training.checkpoints import damage, set_aside, write_atomically
from moe_vision.training.data import STAGING
from moe_vision.training.identity import changed_data, deciding, differences

LOCK = "train.lock"
"""Held by whoever writes to an output. It stays there, free, when they have ended."""

DATA_DIGESTS = "data_digests.json"
"""In an output: what its data held when it began."""

OWN_NAMES = frozenset({
    "config.yaml", "metrics.jsonl", "runs", "experts", "model", "data", "data_report.json", "environment.json",
    "curves", LOCK, DATA_DIGESTS,
})  # fmt: skip
"""What an output folder holds, besides `.…partial` files; one that holds more is never overwritten."""

PATIENCE = 5.0
"""Seconds to wait for the lock of an output: workers of a killed training may hold it for a moment longer."""


class OutputError(ValueError):
    """An output folder that cannot be used."""


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Keep others from writing to a checked output for as long as it is entered; a killed process keeps nobody out. If
    the output was not there and nothing was written to it, nothing is left of it. Raises OutputError."""
    new = not output.exists()
    lock = FileLock(output / LOCK)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE, poll_interval=0.2)
    except Timeout:
        raise OutputError(f"output '{output}' is being written by another process, which holds its {LOCK}: wait until "
                          "that ends, or choose another --output") from None  # fmt: skip
    except OSError as error:
        raise OutputError(f"output '{output}' cannot be written ({error}): choose another --output") from error
    try:
        yield
    finally:
        if new and output.is_dir() and all(entry.name == LOCK for entry in output.iterdir()):
            (output / LOCK).unlink(missing_ok=True)
            output.rmdir()
        lock.release()


def check_output(
    output: Path, resolved: str, *, overwrite: bool, own: Set[str] = OWN_NAMES, what: str = "a training output",
    compared: Callable[[Mapping[str, Any]], Any] = deciding,
) -> None:  # fmt: skip
    """Raise OutputError if `output` cannot take a run of this resolved config; changes nothing in it.

    own: the names that a folder of its kind holds. compared: what of two configs has to be equal.
    """
    nearest = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"output '{output}' cannot be written, because of '{nearest}': choose another --output")
    if not output.exists() or all(entry.name in (STAGING, LOCK) for entry in output.iterdir()):
        return
    foreign = sorted(p.name for p in output.iterdir() if p.name not in own and not p.name.endswith(".partial"))
    if foreign or not (output / "config.yaml").is_file():
        found = f"holds {foreign[:3]}" if foreign else "has no config.yaml"
        raise OutputError(f"output '{output}' exists and is not {what} ({found}): choose another --output")
    if overwrite:
        return
    try:
        before = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OutputError(f"'{output / 'config.yaml'}' is damaged ({' '.join(str(error).split())}): restore it, or "
                          "choose another --output") from None  # fmt: skip
    now = yaml.safe_load(resolved)
    if isinstance(before, dict):
        before, now = compared(before), compared(now)
    if different := differences(before, now):
        raise OutputError(f"output '{output}' exists and belongs to another config ({different}): choose another "
                          "--output, or --overwrite to start anew")  # fmt: skip


def check_data(output: Path, digests: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise OutputError if the data is not what it was when an output began."""
    if different := changed_data(output / DATA_DIGESTS, digests):
        raise OutputError(f"output '{output}' began with other data: {different}; give the data that it began with, "
                          "choose another --output, or --overwrite to start anew")  # fmt: skip


def open_output(output: Path, resolved: str, *, overwrite: bool) -> None:
    """Make or reopen a checked output folder. Raises OutputError."""
    try:
        for entry in output.iterdir() if overwrite and output.exists() else ():
            if entry.is_dir() and not entry.is_symlink():
                if entry.name != STAGING:  # the new run's own data
                    shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "config.yaml", resolved)
    except OSError as error:
        raise OutputError(f"output '{output}' cannot be written ({error}): choose another --output") from error


def check_keys(checkpoint: Path, model: MoeVisionForConditionalGeneration) -> None:
    """Raise OutputError if a checkpoint's weights are not exactly those of `model`; Trainer would only warn."""
    found: set[str] = set()
    for file in checkpoint.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            found |= set(weights.keys())
    expected = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    expected &= set(model.state_dict())  # without buffers that are not kept; tied weights are named once
    missing, unexpected = sorted(expected - found), sorted(found - set(model.state_dict()))
    if missing or unexpected:
        raise OutputError(f"checkpoint '{checkpoint}' belongs to another composition (missing {missing[:4]}, "
                          f"unexpected {unexpected[:4]}): choose another --output, or "
                          "--overwrite to start anew")  # fmt: skip


def last_checkpoint(folder: Path, processes: int, say: Callable[[str], None]) -> str | None:
    """The newest checkpoint of a run that is whole. One that is not is set aside, and `say` gets a line about it.

    Raises OutputError if another number of processes wrote it: their random states are not those of these.
    """
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))) is not None:
        checkpoint = Path(found)
        fault = damage(checkpoint)
        if fault is None:
            check_processes(checkpoint, processes)
            return found
        aside = set_aside(checkpoint)
        before = get_last_checkpoint(str(folder))
        then = "the run begins anew" if before is None else f"the run continues from {Path(before).name}"
        say(f"checkpoint '{checkpoint}' cannot be used: {fault}. It is now '{aside.name}'; {then}")
    return None


def check_processes(checkpoint: Path, processes: int) -> None:
    """Raise OutputError unless this number of processes wrote a checkpoint."""
    wrote = len(list(checkpoint.glob("rng_state*.pth")))
    if wrote != processes:
        raise OutputError(f"checkpoint '{checkpoint}' was written by {wrote} processes, and this launch has "
                          f"{processes}: launch {wrote}, or --overwrite to start anew")  # fmt: skip
