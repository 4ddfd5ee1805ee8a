"""Train configs from files, with overrides that may reach into their model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from moe_vision.config import load_config, overridden, read_yaml, validate
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.training.schedule import TrainConfig

TrainConfigT = TypeVar("TrainConfigT", bound=TrainConfig)


def model_config(config: TrainConfig) -> ModelConfig:
    """The model of a train config, from its file or its content. Raises ConfigError."""
    if isinstance(config.model, str):
        return load_config(ModelConfig, config.model)
    return validate(ModelConfig, config.model, source="model")


def load_train_config(path: Path, overrides: Sequence[str] = (), *, allow_plugins: bool = False) -> TrainConfig:
    """Read a train config, as `load_schedule` does."""
    return load_schedule(TrainConfig, path, overrides, allow_plugins=allow_plugins)


def load_schedule(
    cls: type[TrainConfigT], path: Path, overrides: Sequence[str] = (), *, allow_plugins: bool = False
) -> TrainConfigT:
    """Read a train config, or another with a model and stages; a model that it names by a file is read too.

    Relative paths start at the file that holds them, those of overrides at the working folder. allow_plugins: also run
    plug-ins outside the folder of the file that names them. Raises ConfigError.
    """
    values = read_yaml(path, cls, allow_plugins=allow_plugins)
    file = values.get("model")
    if isinstance(file, str):
        values["model"] = read_yaml(Path(file), ModelConfig, allow_plugins=allow_plugins)
    values = overridden(cls, values, overrides)
    if isinstance(file, str) and isinstance(values["model"], dict):
        values["model"] = validate(ModelConfig, values["model"], source=file).to_plain()  # its faults name its file
    return validate(cls, values, source=str(path))
