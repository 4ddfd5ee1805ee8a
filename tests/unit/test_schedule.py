"""A schedule is checked as a value; what is wrong is told with its cure."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_vision.config import ConfigError, validate
from moe_vision.training.loading import load_train_config, model_config
from moe_vision.training.schedule import TrainConfig
from tests.tiny import tiny_values

MICRO = Path(__file__).parents[2] / "configs/train/micro.yaml"


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
        ({"train": {"adapters": float("nan")}}, "adapters = nan: is no finite number"),
        ({"train": {}}, "train"),
        ({"epochs": None}, "exactly one"),
        ({"max_steps": 3}, "exactly one"),
        ({"epochs": -1}, "more than 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"name": "a/b"}, "letters"),
        ({"warm_up": 1}, "unknown key"),
        ({"precision": "fp8"}, "precision"),
        ({"data": {}}, "path, synthetic, dataset, mixture; give exactly one"),
        ({"data": {"path": "d.json", "synthetic": "questions", "scenes": 3}}, "give exactly one"),
        ({"data": {"synthetic": "questions"}}, "add scenes, as 2000"),
        ({"data": {"synthetic": "questions", "scenes": 0}}, "greater than or equal to 1"),
        ({"data": {"synthetic": "answers", "scenes": 3}}, "'captions' or 'questions'"),
        ({"data": {"synthetic": "captions", "scenes": 3, "split": "val"}}, "write split: train"),
        ({"data": {"synthetic": "questions", "scenes": 3, "image_root": "d"}}, "image_root is where"),
        ({"data": {"path": "d.json", "scenes": 3}}, "leave it out"),
    ],
)
def test_wrong_values_are_told_with_their_cure(stage: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(TrainConfig, values(**stage), source="test")


def test_runs_are_numbered_and_names_differ() -> None:
    config = values()
    config["stages"].append({**config["stages"][0], "name": "finetune"})
    names = [run.name for run in validate(TrainConfig, config, source="test").runs([])]
    assert names == ["01-projector", "02-finetune"]
    config["stages"][1]["name"] = "projector"
    with pytest.raises(ConfigError, match="share a name"):
        validate(TrainConfig, config, source="test")


def test_paths_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(tiny_values()))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values()))
    config = load_train_config(tmp_path / "train.yaml", ["seed=7"])
    assert isinstance(config.model, dict) and list(config.model["experts"]) == ["clip", "sam"] and config.seed == 7
    assert config.stages[0].data is not None and config.stages[0].data.path == str(tmp_path / "d.json")
    (tmp_path / "m.yaml").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        load_train_config(tmp_path / "train.yaml")


def test_drawn_data_has_no_path_to_resolve(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(tiny_values()))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values(data={"synthetic": "questions", "scenes": 5})))
    data = load_train_config(tmp_path / "train.yaml").stages[0].data
    assert data is not None and (data.path, data.title) == (None, "questions of 5 scenes, train")
    again = validate(TrainConfig, values(data=data.model_dump()), source="as a run's config.yaml has it")
    assert again.stages[0].data == data


def test_overrides_reach_into_the_model_file() -> None:
    config = load_train_config(MICRO, ["model.experts.sam=null", "seed=4"])
    assert isinstance(config.model, dict) and "sam" not in config.model["experts"] and config.seed == 4
    assert list(model_config(config).experts) == ["clip", "convnext", "eva02", "pix2struct"]
    with pytest.raises(ConfigError, match=r"model.experts.smm = 'smm': no such expert.*did you mean 'sam'"):
        load_train_config(MICRO, ["model.experts.smm.layer=1"])


def test_overrides_reach_into_stages() -> None:
    config = load_train_config(MICRO, ["stages.1.epochs=2", "stages.0.train.adapters=1e-2"])
    assert config.stages[1].epochs == 2 and config.stages[0].train == {"adapters": 1e-2}
    with pytest.raises(ConfigError, match=r"stages.7 = '7': is no item of this list; give a number from 0 to 1"):
        load_train_config(MICRO, ["stages.7.epochs=2"])
