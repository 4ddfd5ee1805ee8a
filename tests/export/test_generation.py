"""Generation of an exported folder: however it is asked, it gives the same answer. And what composes survives."""

from pathlib import Path
from typing import Any

import pytest

from moe_vision.export import export
from moe_vision.modeling.compose import save
from tests.export.conftest import Exported
from tests.export.isolated import isolated
from tests.sliced import COMPOSITIONS
from tests.tiny import tiny_model


def check(seen: dict[str, Any]) -> None:
    assert seen["batch"] == seen["singles"] == seen["uncached"]
    assert seen["static"] == seen["singles"][:2]
    assert len({tuple(answer) for answer in seen["singles"]}) == 3  # answers that would differ if rows were mixed up
    assert seen["beams"] == seen["single_beams"]
    assert seen["beam_scores"] == pytest.approx(seen["rescored"], abs=1e-4)
    assert sorted(seen["beam_scores"], reverse=True) == seen["beam_scores"]
    first, second = seen["drawn"]
    assert first == second and first[0] != first[1]
    assert seen["streamed"] == seen["decoded"] != ""
    assert seen["placeholders"] == sum(seen["image_tokens"])
    assert seen["order_changes_logits"] > 1e-3
    for fault in seen["faults"].values():
        assert "image placeholders" in fault or "views" in fault


def test_every_way_to_generate_gives_the_same_answer(exported: Exported, tmp_path: Path) -> None:
    check(isolated("generation", exported.folder, home=tmp_path))


@pytest.mark.parametrize("name", ["anyres", "slime, its own adapters and a selector"])
def test_sliced_folders_generate_alike(name: str, tmp_path: Path) -> None:
    model, processor = tiny_model(**COMPOSITIONS[name])
    save(model, processor, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "folder")
    check(isolated("generation", tmp_path / "folder", home=tmp_path / "home"))
