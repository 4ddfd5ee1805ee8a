"""A training's output folder: what it may be, how it opens, which checkpoint in it a run goes on from."""

import os
import shutil
from collections.abc import Set
from pathlib import Path

from safetensors import safe_open
from transformers.trainer_utils import get_last_checkpoint

from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.training.checkpoints import write_atomically
from moe_vision.training.data import STAGING

OWN_NAMES = frozenset({
    "config.yaml", "metrics.jsonl", "runs", "experts", "model", "data", "data_report.json", "environment.json",
    "curves",
})  # fmt: skip
"""What an output folder holds, besides `.…partial` files; one that holds more is never overwritten."""


class OutputError(ValueError):
    """An output folder that cannot be used."""


def check_output(
    output: Path, resolved: str, *, overwrite: bool, own: Set[str] = OWN_NAMES, what: str = "a training output"
) -> None:
    """Raise OutputError if `output` cannot take a run of this resolved config; changes nothing in it.

    own: the names that a folder of its kind holds.
    """
    nearest = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"output '{output}' cannot be written, because of '{nearest}': choose another --output")
    if not output.exists() or all(entry.name == STAGING for entry in output.iterdir()):
        return
    foreign = sorted(p.name for p in output.iterdir() if p.name not in own and not p.name.endswith(".partial"))
    if foreign or not (output / "config.yaml").is_file():
        found = f"holds {foreign[:3]}" if foreign else "has no config.yaml"
        raise OutputError(f"output '{output}' exists and is not {what} ({found}): choose another --output")
    if not overwrite and (output / "config.yaml").read_text(encoding="utf-8") != resolved:
        raise OutputError(f"output '{output}' exists and belongs to another config: choose another --output, or "
                          "--overwrite to start anew")  # fmt: skip


def open_output(output: Path, resolved: str, *, overwrite: bool) -> None:
    """Make or reopen a checked output folder. Raises OutputError."""
    try:
        for entry in output.iterdir() if overwrite and output.exists() else ():
            if entry.is_dir() and not entry.is_symlink():
                if entry.name != STAGING:  # the new run's own data
                    shutil.rmtree(entry)
            else:
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


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; one that a kill cut short is taken away."""
    while folder.is_dir() and (checkpoint := get_last_checkpoint(str(folder))) is not None:
        if (Path(checkpoint) / "trainer_state.json").is_file():  # Trainer writes this file last
            return checkpoint
        shutil.rmtree(checkpoint)
    return None
