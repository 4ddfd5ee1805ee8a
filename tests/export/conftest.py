"""Two exported folders that every consumer is tried on: the micro preset's, and one of two experts."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moe_vision.config import load_config
from moe_vision.export import export
from moe_vision.modeling.compose import compose, save
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from tests.tiny import tiny_model


@dataclass(frozen=True)
class Exported:
    """source: the model folder that was exported. folder: the export."""

    source: Path
    folder: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Two experts with random weights, one view an image."""
    home = tmp_path_factory.mktemp("tiny")
    model, processor = tiny_model(("clip", "sam"))
    save(model, processor, home / "model")
    export(home / "model", home / "tiny-export")
    return Exported(home / "model", home / "tiny-export")


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The micro preset: five experts and a language model that are trained, an adapter that is not."""
    home = tmp_path_factory.mktemp("micro")
    torch.manual_seed(0)
    model, processor = compose(load_config(ModelConfig, packaged_config("model/micro.yaml")))
    save(model, processor, home / "model")
    export(home / "model", home / "micro-export")
    return Exported(home / "model", home / "micro-export")


@pytest.fixture(params=["micro", "tiny"])
def exported(request: pytest.FixtureRequest) -> Exported:
    found: Exported = request.getfixturevalue(request.param)
    return found
