"""Make the miniature zoo again from nothing: every expert, the language model, and a manifest that says what came out.

rebuild(names) ─ pretrain each ─ <expert>.safetensors, language_model/ ─ manifest.json
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_vision.experts.weights import packaged
from moe_vision.recipes import experts, language_model
from moe_vision.recipes.pictures import Pictures
from moe_vision.registry import suggest

LANGUAGE_MODEL = "language_model"
NAMES = (*experts.RECIPES, LANGUAGE_MODEL)
NUM_SCENES, NUM_HELD_OUT = 8000, 256
RECIPE_SEED = 20
"""The recipes draw scenes of this number, so that no user's own training or test pictures are among them."""


def packaged_zoo() -> Path:
    """Folder of the zoo that ships with this package."""
    return packaged("micro")


def rebuild(
    names: Sequence[str] | None = None, output: Path | None = None, *, seed: int = 0, step_scale: float = 1.0
) -> dict[str, Any]:
    """Pre-train `names` (all if None) into `output` (the packaged zoo if None); return and write the manifest.

    The same seed gives the same weights on the same machine and thread count. step_scale below 1 shortens every
    recipe, to try it out. Raises ValueError for a name that the zoo does not have.
    """
    names, output = names or NAMES, output or packaged_zoo()
    for name in names:
        if name not in NAMES:
            raise ValueError(f"the micro zoo has no '{name}': {suggest(name, list(NAMES))}")
    pictures: tuple[Pictures, Pictures] | None = None
    for name in names:
        if name == LANGUAGE_MODEL:
            metrics = language_model.pretrain(
                output / LANGUAGE_MODEL, steps=scaled(language_model.STEPS, step_scale), seed=seed
            )
        else:
            # Rendering takes half a minute, so it waits until an expert wants it, and happens once.
            pictures = pictures or (
                Pictures("train", scaled(NUM_SCENES, min(1.0, step_scale)), RECIPE_SEED),
                Pictures("val", scaled(NUM_HELD_OUT, min(1.0, step_scale)), RECIPE_SEED),
            )
            steps = scaled(experts.RECIPES[name].steps, step_scale)
            metrics = experts.pretrain(name, output, *pictures, seed=seed, steps=steps)
        add_to_manifest(output, name, metrics)
    return read_manifest(output)


def scaled(count: int, scale: float) -> int:
    return max(20, round(count * scale))


def weight_file(folder: Path, name: str) -> Path:
    """The weights of one member of the zoo."""
    return folder / name / "model.safetensors" if name == LANGUAGE_MODEL else folder / f"{name}.safetensors"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a zoo; empty if there is none yet."""
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def add_to_manifest(folder: Path, name: str, metrics: dict[str, Any]) -> None:
    """Write down one member: its file, that file's sha256, and what the recipe measured."""
    path = weight_file(folder, name)
    entry = {"file": path.relative_to(folder).as_posix(), "sha256": sha256(path), **metrics}
    manifest = dict(sorted({**read_manifest(folder), name: entry}.items()))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def damaged(folder: Path) -> list[str]:
    """Members whose file is missing or is not the one that the manifest describes."""
    manifest = read_manifest(folder)
    paths = {name: folder / entry["file"] for name, entry in manifest.items()}
    return [n for n, path in paths.items() if not path.is_file() or sha256(path) != manifest[n]["sha256"]]
