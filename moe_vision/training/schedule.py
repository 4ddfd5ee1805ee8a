"""A schedule is a value: stages in their order, each saying what trains at which rate, on which data, for how long."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moe_vision.config import Config


class DataConfig(Config):
    """path: a LLaVA-format JSON or JSONL file; image paths start at `image_root`, the file's own folder by default.

    synthetic, in place of path: dense captions of, or questions about, so many `scenes` that are drawn when the run
    begins; `split` says from which range of seeds, the config's `seed` which of them.
    """

    path: str | None = None
    image_root: str | None = None
    synthetic: Literal["captions", "questions"] | None = None
    scenes: int | None = Field(default=None, ge=1)
    split: Literal["train", "val", "test"] = "train"

    @model_validator(mode="after")
    def _has_one_source(self) -> "DataConfig":
        if (self.path is None) == (self.synthetic is None):
            raise ValueError("path and synthetic: give exactly one of them")
        if self.path is not None and (self.scenes is not None or self.split != "train"):
            raise ValueError("scenes and split say what is drawn, and path is given: leave them out")
        if self.synthetic is not None and self.image_root is not None:
            raise ValueError("image_root is where a file's pictures lie, and these are drawn: leave it out")
        if self.synthetic is not None and self.scenes is None:
            raise ValueError("synthetic has no number of pictures: add scenes, as 2000")
        if self.synthetic == "captions" and self.split != "train":
            raise ValueError(f"split '{self.split}' has no captions: ask for questions, or write split: train")
        return self

    @property
    def title(self) -> str:
        """What a table shows."""
        return self.path or f"{self.synthetic} of {self.scenes} scenes, {self.split}"


BARE_NUMBERS = {
    "epochs": "how often to see the data, as 1 or 0.5",
    "max_steps": "a count of optimizer steps, as 500",
    "warmup_ratio": "the part of all steps, as 0.03",
    "cache_gb": "gigabytes, as 1.0",
}
"""Fields that are easily given a unit, and what to write instead."""


class LoraSettings(Config):
    """Adapters of the language model's linear layers, scaled by alpha / rank; their rate is `train.language_model`.

    target_modules: names of layers, as [q_proj, v_proj]; null is every linear layer of the language model's blocks.
    """

    rank: int = Field(ge=1)
    alpha: int = Field(ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | None = Field(default=None, min_length=1)


class StageConfig(Config):
    """One run of training.

    train: learning rate by group: `experts` or `experts.<name>`, `mixers`, `adapters`, `language_model`; all else is
    frozen. epochs or max_steps: one of them. warmup_ratio: share of the steps, below 1. save_steps: a checkpoint every
    so many steps. data: null where the command line gives it. cache_features: run a frozen vision tower once a
    picture, where pictures are not sliced and the result fits into `cache_gb`. lora: adapters of the language model
    train in its place, and are merged into it at the end of the stage.
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
    lora: LoraSettings | None = None

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
    def _lora_has_a_rate(self) -> "StageConfig":
        if self.lora is not None and "language_model" not in self.train:
            raise ValueError("lora trains the language model, which has no rate: add train.language_model, as 1e-4")
        return self

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
        if not isinstance(data, dict):
            return holder
        return {**holder, key: {k: absolute(v) if k in ("path", "image_root") else v for k, v in data.items()}}

    resolved = dict(in_data(values, "test"))
    if isinstance(values.get("model"), str):
        resolved["model"] = absolute(values["model"])
    stages = values.get("stages")
    if isinstance(stages, list):
        resolved["stages"] = [in_data(stage, "data") for stage in stages]
    return resolved
