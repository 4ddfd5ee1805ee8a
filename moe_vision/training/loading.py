"""Train configs from files, with overrides that may reach into their model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from moe_vision.config import ConfigError, Problem, apply_override, load_config, read_yaml, validate
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.training.schedule import TrainConfig, resolve_paths


def model_config(config: TrainConfig) -> ModelConfig:
    """The model of a train config, from its file or its content. Raises ConfigError."""
    if isinstance(config.model, str):
        return load_config(ModelConfig, config.model)
    return validate(ModelConfig, config.model, source="model")


def inline_model(path: Path) -> dict[str, Any]:
    """Content of a model config file, for overrides that reach into it; plug-ins keep their place."""
    values = read_yaml(path)
    if values.get("plugins"):
        values["plugins"] = [str((path.parent / plugin).resolve()) for plugin in values["plugins"]]
    return values


TrainConfigT = TypeVar("TrainConfigT", bound=TrainConfig)


def load_train_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a train config; paths in it start at its folder. Raises ConfigError."""
    return load_schedule(TrainConfig, path, overrides)


def load_schedule(cls: type[TrainConfigT], path: Path, overrides: Sequence[str] = ()) -> TrainConfigT:
    """Read a train config, or another with a model and stages; paths in it start at its folder. Raises ConfigError."""
    values = resolve_paths(read_yaml(path), path.resolve().parent)
    if isinstance(values.get("model"), str) and any(override.startswith("model.") for override in overrides):
        values["model"] = inline_model(Path(values["model"]))
    for override in overrides:
        values = apply_override(values, override)
    config = validate(cls, values, source=str(path))
    if isinstance(config.model, str) and not Path(config.model).is_file():
        raise ConfigError(
            str(path), [Problem("model", config.model, "no such file", "give the path of a model config")]
        )
    return config
