"""Data files of the command line in place of those of a config."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moe_vision.files import resolved

if TYPE_CHECKING:
    from moe_vision.training.schedule import DataConfig, TrainConfig

ScheduleT = TypeVar("ScheduleT", bound="TrainConfig")


def data_config(path: Path, image_root: Path | None) -> "DataConfig":
    from moe_vision.training.schedule import DataConfig

    return DataConfig(path=str(resolved(path)), image_root=None if image_root is None else str(resolved(image_root)))


def on_file(config: "ScheduleT", data: "DataConfig") -> "ScheduleT":
    """The same schedule with this file as the data of every stage."""
    stages = [stage.model_copy(update={"data": read_alike(stage.data, data)}) for stage in config.stages]
    return config.model_copy(update={"stages": stages})


def read_alike(before: "DataConfig | None", data: "DataConfig") -> "DataConfig":
    """`data` with the settings of `before` that say how records are read: what to do with faults, and their length."""
    if before is None:
        return data
    return data.model_copy(update={"on_fault": before.on_fault, "max_length": before.max_length})
