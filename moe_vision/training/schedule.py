"""A schedule is a value: stages in their order, each saying what trains at which rate, on which data, for how long."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moe_vision.config import Config
from moe_vision.data.config import DataConfig, resolve_data

__all__ = ["DataConfig", "StageConfig", "TrainConfig", "resolve_paths"]


BARE_NUMBERS = {
    "epochs": "how often to see the data, as 1 or 0.5",
    "max_steps": "a count of optimizer steps, as 500",
    "warmup_ratio": "the part of all steps, as 0.03",
    "cache_gb": "gigabytes, as 1.0",
}
"""Fields that are easily given a unit, and what to write instead."""


class StageConfig(Config):
    """One run of training.

    train: learning rate by group: `experts` or `experts.<name>`, `mixers`, `adapters`, `language_model`; all else is
    frozen. epochs or max_steps: one of them. warmup_ratio: share of the steps, below 1. save_steps: a checkpoint every
    so many steps. data: null where the command line gives it. cache_features: run a frozen vision tower once a
    picture, where pictures are not sliced and the result fits into `cache_gb`.
    """

    name: str
    train: dict[str, float] = Field(min_length=1)
    data: DataConfig | None = None
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = Field(default=32, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    warmup_ratio: float = 0.03
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    save_steps: int = Field(default=500, ge=1)
    num_workers: int = Field(default=0, ge=0)
    cache_features: bool = True
    cache_gb: float = Field(default=1.0, gt=0)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not name.replace("-", "_").isidentifier():
            raise ValueError(f"stage name '{name}' becomes a folder: use letters, digits, - and _ only")
        return name

    @field_validator("epochs", "max_steps", "warmup_ratio", "cache_gb", mode="before")
    @classmethod
    def _is_a_bare_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, (str, bool)):
            raise ValueError(
                f"{info.field_name} is {value!r}, not a number: write {BARE_NUMBERS[info.field_name or '']}"
            )
        return value

    @field_validator("train")
    @classmethod
    def _rates_are_rates(cls, train: dict[str, float]) -> dict[str, float]:
        for group, rate in train.items():
            if not 0 < rate <= 1:
                raise ValueError(f"learning rate {rate} of '{group}' is out of range: write one above 0 and up to 1, "
                                 "as 1e-3; to freeze a group, leave it out")  # fmt: skip
        return train

    @field_validator("warmup_ratio")
    @classmethod
    def _warmup_is_a_share(cls, ratio: float) -> float:
        if not 0 <= ratio < 1:
            raise ValueError(
                f"warmup_ratio {ratio} is no share: write the part of all steps, 0 up to but not 1, as 0.03"
            )
        return ratio

    @model_validator(mode="after")
    def _has_one_length(self) -> "StageConfig":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("epochs and max_steps: give exactly one of them")
        length = self.epochs if self.epochs is not None else self.max_steps
        if length is not None and length <= 0:
            raise ValueError(f"a stage of length {length} trains nothing: give more than 0")
        return self


class TrainConfig(Config):
    """A model and the stages that train it. model: path of a model config, from this file's folder, or its content."""

    model: str | dict[str, Any]
    stages: list[StageConfig] = Field(min_length=1)
    seed: int = 0

    @field_validator("stages")
    @classmethod
    def _names_differ(cls, stages: list[StageConfig]) -> list[StageConfig]:
        names = [stage.name for stage in stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages {names} share a name: rename one, each has a folder of its own")
        return stages

    def runs(self) -> list[tuple[str, StageConfig]]:
        """Stages with the folder name of their run, in order."""
        return [(f"{number:02d}-{stage.name}", stage) for number, stage in enumerate(self.stages, start=1)]


def resolve_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make relative paths of a train config's or a comparison's plain values start at `folder`, where its file lies."""

    def absolute(path: Any) -> Any:
        return str((folder / path).resolve()) if isinstance(path, str) else path

    def in_data(holder: Any, key: str) -> Any:
        data = holder.get(key) if isinstance(holder, dict) else None
        return {**holder, key: resolve_data(data, folder)} if isinstance(data, dict) else holder

    resolved = dict(in_data(values, "test"))
    if isinstance(values.get("model"), str):
        resolved["model"] = absolute(values["model"])
    stages = values.get("stages")
    if isinstance(stages, list):
        resolved["stages"] = [in_data(stage, "data") for stage in stages]
    return resolved
