"""Exports of models that slice: the folder plans, encodes and packs by itself, without the package."""

import json
from pathlib import Path

import pytest
import torch

from moe_vision.export import export
from moe_vision.modeling.compose import load, save
from tests.sliced import COMPOSITIONS, pictures
from tests.tiny import tiny_model

CHOSEN = ["uhd, other experts for slices", "uhd, cells", "anyres", "native", "slime, its own adapters and a selector"]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_sliced_folder_proves_itself(name: str, tmp_path: Path) -> None:
    model, processor = tiny_model(**COMPOSITIONS[name])
    save(model, processor, tmp_path / "model")
    report = export(tmp_path / "model", tmp_path / "folder")
    assert report.max_difference == 0 and report.new_tokens >= 1
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["vision_config"]["slicing"]["type"] == COMPOSITIONS[name]["slicing"]["type"]
    code = (tmp_path / "folder" / "modeling_moe_vision.py").read_text()
    policies = {"UhdSlicing", "AnyresSlicing", "NativeSlicing", "OryxSlicing", "SlimeSlicing", "TileSlicing"}
    assert len({policy for policy in policies if f"class {policy}" in code}) == 1  # the one in use
    _, again = load(tmp_path / "folder")
    found, expected = (maker.image_processor(pictures(), return_tensors="pt") for maker in (again, processor))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
