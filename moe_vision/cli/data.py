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
    """The same schedule with this data in every stage."""
    stages = [stage.model_copy(update={"data": data}) for stage in config.stages]
    return config.model_copy(update={"stages": stages})
