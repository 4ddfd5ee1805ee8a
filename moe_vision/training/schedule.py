"""A schedule is a value: stages in their order, each saying what trains at which rate, on which data, for how long."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from moe_vision.config import Config
from moe_vision.config_paths import FromFile
from moe_vision.data.config import DataConfig
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.registry import suggest

__all__ = ["DataConfig", "Run", "StageConfig", "TrainConfig"]


BARE_NUMBERS = {
    "epochs": "how often to see the data, as 1 or 0.5",
    "max_steps": "a count of optimizer steps, as 500",
    "warmup_ratio": "the part of all steps, as 0.03",
    "cache_gb": "gigabytes, as 1.0",
}
"""Fields that are easily given a unit, and what to write instead."""


def check_rates(rates: dict[str, float]) -> dict[str, float]:
    """Raises ValueError for a learning rate that is none."""
    for group, rate in rates.items():
        if not 0 < rate <= 1:
            raise ValueError(f"learning rate {rate} of '{group}' is out of range: write one above 0 and up to 1, "
                             "as 1e-3; to freeze a group, leave it out")  # fmt: skip
    return rates


MAX_WORKERS = 256
"""Most processes that read data for one process that trains."""

Rates = Annotated[dict[str, float], Field(min_length=1), AfterValidator(check_rates)]
"""Learning rate by group: `experts` or `experts.<name>`, `mixers`, `adapters`, `language_model`."""


class Turn(Config):
    """Groups that train until the next ones have their turn: for so many optimizer `steps`, or `epochs` of the data."""

    train: Rates
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_one_length(self) -> "Turn":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps and epochs of a turn: give exactly one of them")
        return self


class Prealign(Config):
    """Learning rates of an expert and of a projector of its own. experts: which are aligned, all of the model's if
    null; those that saw text in their own training may be left out.
    """

    experts: list[str] | None = Field(default=None, min_length=1)
    expert: float
    projector: float

    @model_validator(mode="after")
    def _rates_are_rates(self) -> "Prealign":
        check_rates({"expert": self.expert, "projector": self.projector})
        if self.experts is not None and len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts {self.experts} of prealign: one is named twice; name each once")
        return self


class LoraSettings(Config):
    """Adapters of the language model's linear layers, scaled by alpha / rank; their rate is `train.language_model`.

    target_modules: names of layers, as [q_proj, v_proj]; null is every linear layer of the language model's blocks.
    """

    rank: int = Field(ge=1)
    alpha: int = Field(ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | None = Field(default=None, min_length=1)


class StageConfig(Config):
    """One stage of training: `train`, `alternate` or `prealign` says what trains, and all else is frozen.

    train: these groups together. alternate: groups in turn, over and over until the stage ends; while others have their
    turn, a group's optimizer state stays as it is (SliME, arXiv 2406.08487, goes through its groups once). prealign:
    each expert by itself, before they are fused, with the language model frozen (Eagle, arXiv 2408.15998, section 3.4).

    epochs or max_steps: one of them. warmup_ratio: share of the steps, below 1. save_steps: a checkpoint every
    so many steps. weight_decay: one for all, or by group as `train`. gradient_checkpointing: groups whose activations
    are computed again in the backward pass, or true for all that can. group_by_length: batches of records of about the
    same number of tokens, those of images counted. logging_steps: a log every so many steps. data: null where the
    command line gives it. cache_features: run a frozen vision tower once a picture, where pictures are not sliced and
    the result fits into `cache_gb`. lora: adapters of the language model train in its place, and are merged into it at
    the end of the stage.
    """

    name: str
    train: Rates | None = None
    alternate: list[Turn] | None = Field(default=None, min_length=2)
    prealign: Prealign | None = None
    data: DataConfig | None = None
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = Field(default=32, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    warmup_ratio: float = 0.03
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float | dict[str, float] = 0.0
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool | list[str] = False
    group_by_length: bool = False
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=500, ge=1)
    num_workers: int = Field(default=0, ge=0, le=MAX_WORKERS)
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

    @field_validator("alternate")
    @classmethod
    def _groups_are_apart(cls, turns: list[Turn] | None) -> list[Turn] | None:
        for at, turn in enumerate(turns or []):
            for name, other in product(
                turn.train, [group for later in (turns or [])[at + 1 :] for group in later.train]
            ):
                if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                    raise ValueError(f"'{name}' and '{other}' are in two turns: a group has one rate and one turn")
        return turns

    @field_validator("weight_decay")
    @classmethod
    def _decays_are_decays(cls, decay: float | dict[str, float]) -> float | dict[str, float]:
        for group, value in decay.items() if isinstance(decay, dict) else [("all groups", decay)]:
            if not 0 <= value <= 1:
                raise ValueError(f"weight decay {value} of '{group}' is out of range: write one from 0 to 1, as 0.01")
        return decay

    @field_validator("warmup_ratio")
    @classmethod
    def _warmup_is_a_share(cls, ratio: float) -> float:
        if not 0 <= ratio < 1:
            raise ValueError(
                f"warmup_ratio {ratio} is no share: write the part of all steps, 0 up to but not 1, as 0.03"
            )
        return ratio

    @model_validator(mode="after")
    def _has_one_kind(self) -> "StageConfig":
        given = [kind for kind in ("train", "alternate", "prealign") if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"train, alternate and prealign: found {found}; give exactly one, it says what trains")
        return self

    @model_validator(mode="after")
    def _lora_has_a_rate(self) -> "StageConfig":
        if self.lora is not None and "language_model" not in self.rates:
            raise ValueError("lora trains the language model, which has no rate: add language_model to train, as 1e-4")
        return self

    @model_validator(mode="after")
    def _has_one_length(self) -> "StageConfig":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("epochs and max_steps: give exactly one of them")
        length = self.epochs if self.epochs is not None else self.max_steps
        if length is not None and length <= 0:
            raise ValueError(f"a stage of length {length} trains nothing: give more than 0")
        return self

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate by group, of all that trains at any step."""
        if self.prealign is not None:
            return {"experts": self.prealign.expert, "adapters": self.prealign.projector}
        if self.train is not None:
            return self.train
        return {group: rate for turn in self.alternate or [] for group, rate in turn.train.items()}


@dataclass(frozen=True)
class Run:
    """One run of a schedule: a call of Trainer. expert: the one that is aligned by itself; null where all are there."""

    name: str
    stage: StageConfig
    expert: str | None = None


class TrainConfig(Config):
    """A model and the stages that train it. model: path of a model config, from this file's folder, or its content.

    report_to: services that transformers' Trainer knows, as tensorboard or wandb, which get the logs too.
    """

    model: Annotated[str | dict[str, Any], FromFile(content=ModelConfig)]
    stages: list[StageConfig] = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    report_to: list[str] = []

    @field_validator("stages")
    @classmethod
    def _names_differ(cls, stages: list[StageConfig]) -> list[StageConfig]:
        names = [stage.name for stage in stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages {names} share a name: rename one, each has a folder of its own")
        return stages

    @field_validator("stages")
    @classmethod
    def _alignment_comes_first(cls, stages: list[StageConfig]) -> list[StageConfig]:
        for before, stage in pairwise(stages):
            if stage.prealign is not None and before.prealign is None:
                raise ValueError(
                    f"stage '{stage.name}' aligns experts after '{before.name}' has trained them together: put it first"
                )
        return stages

    def runs(self, experts: Sequence[str]) -> list[Run]:
        """Every run in its order, of a model with these experts. Raises ValueError for one that it has not."""
        runs: list[Run] = []
        for stage in self.stages:
            if stage.prealign is None:
                runs.append(Run(f"{len(runs) + 1:02d}-{stage.name}", stage))
                continue
            for expert in stage.prealign.experts or experts:
                if expert not in experts:
                    raise ValueError(
                        f"stages.{stage.name}.prealign.experts names '{expert}': {suggest(expert, list(experts))}"
                    )
                runs.append(Run(f"{len(runs) + 1:02d}-{stage.name}-{expert}", stage, expert))
        return runs
