"""A data file of the command line takes the place of a config's data, and is read as that would have been."""

from pathlib import Path

from moe_vision.cli.data import data_config, on_file
from moe_vision.config import validate
from moe_vision.training.schedule import TrainConfig


def test_a_file_of_the_command_line_keeps_how_records_are_read(tmp_path: Path) -> None:
    settings = [{"on_fault": "skip", "max_length": 100}, {}]
    stages = [
        {"name": f"s{number}", "train": {"adapters": 1e-3}, "max_steps": 1, "data": {"path": "old.json", **values}}
        for number, values in enumerate(settings)
    ]
    schedule = validate(TrainConfig, {"model": {}, "stages": stages}, source="stages")
    replaced = on_file(schedule, data_config(tmp_path / "new.json", None))
    data = [stage.data for stage in replaced.stages]
    assert [Path(str(part and part.path)).name for part in data] == ["new.json", "new.json"]
    assert [(part.on_fault, part.max_length) for part in data if part] == [("skip", 100), ("fatal", None)]
