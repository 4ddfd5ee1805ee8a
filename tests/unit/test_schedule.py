"""A schedule is checked as a value; what is wrong is told with its cure."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_vision.config import ConfigError, validate
from moe_vision.training.runner import load_train_config
from moe_vision.training.schedule import TrainConfig


def values(**stage: Any) -> dict[str, Any]:
    base = {"name": "projector", "train": {"adapters": 1e-3}, "data": {"path": "d.json"}, "epochs": 1}
    return {"model": "m.yaml", "stages": [{**base, **stage}]}


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"epochs": "3 days"}, "as 1 or 0.5"),
        ({"warmup_ratio": 500}, "as 0.03"),
        ({"warmup_ratio": 1}, "as 0.03"),
        ({"train": {"adapters": 100}}, "as 1e-3"),
        ({"train": {"adapters": -1e-3}}, "as 1e-3"),
        ({"train": {"adapters": float("nan")}}, "as 1e-3"),
        ({"train": {}}, "train"),
        ({"epochs": None}, "exactly one"),
        ({"max_steps": 3}, "exactly one"),
        ({"epochs": -1}, "more than 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"name": "a/b"}, "letters"),
        ({"warm_up": 1}, "unknown key"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_wrong_values_are_told_with_their_cure(stage: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(TrainConfig, values(**stage), source="test")


def test_runs_are_numbered_and_names_differ() -> None:
    config = values()
    config["stages"].append({**config["stages"][0], "name": "finetune"})
    names = [name for name, _ in validate(TrainConfig, config, source="test").runs()]
    assert names == ["01-projector", "02-finetune"]
    config["stages"][1]["name"] = "projector"
    with pytest.raises(ConfigError, match="share a name"):
        validate(TrainConfig, config, source="test")


def test_paths_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("{}")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values()))
    config = load_train_config(tmp_path / "train.yaml", ["seed=7"])
    assert (config.model, config.seed) == (str(tmp_path / "m.yaml"), 7)
    assert config.stages[0].data is not None and config.stages[0].data.path == str(tmp_path / "d.json")
    (tmp_path / "m.yaml").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        load_train_config(tmp_path / "train.yaml")
