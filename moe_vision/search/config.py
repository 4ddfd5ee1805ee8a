"""What a search config file may say: a train config as the budget of a trial, and how sets of experts are chosen."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from moe_vision.config import Config
from moe_vision.config_paths import FromFile
from moe_vision.search.methods import METHODS
from moe_vision.training.schedule import DataConfig, TrainConfig


class Proxy(Config):
    """A cheap first pass: ridge regression from cached features to answers ranks a round's candidates, and the best
    `keep` of them are trained, all if null. records: questions of the last stage's data that it learns from. ridge: the
    penalty, against a kernel whose mean on the diagonal is 1. grid: rows and columns that each expert's map is brought
    to; channels: principal components of each expert at most.
    """

    type: Literal["ridge"] = "ridge"
    keep: int | None = Field(default=2, ge=1)
    records: int = Field(default=4000, ge=2)
    ridge: float = Field(default=0.1, gt=0)
    grid: tuple[int, int] = (8, 8)
    channels: int = Field(default=128, ge=1)

    @field_validator("grid")
    @classmethod
    def _grid_has_cells(cls, grid: tuple[int, int]) -> tuple[int, int]:
        if min(grid) < 1:
            raise ValueError(f"grid {list(grid)} has no cells: write rows and columns, as [4, 4]")
        return grid


class Rung(Config):
    """One look of successive halving: so many seeds, this share of every stage's length; the better `keep` of the
    candidates go on."""

    seeds: int = Field(ge=1)
    length: float = Field(gt=0, le=1)
    keep: float = Field(gt=0, lt=1)


class LocalExecutor(Config):
    """Trials on this machine: one after the other, or in so many processes, with as many threads each."""

    type: Literal["local"] = "local"
    processes: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)


class RayExecutor(Config):
    """Trials as tasks of a Ray cluster, each with so many CPUs and GPUs. address: of a cluster that runs, as `auto`;
    null starts one on this machine. All its machines must see the output folder at the same path.
    """

    type: Literal["ray"]
    address: str | None = None
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)


class FeatureCacheConfig(Config):
    """Where what frozen experts made of pictures is kept, for all trials: OUTPUT/features if null, or a folder that
    searches share; `gigabytes` of it at most. Null in its place keeps nothing."""

    folder: Annotated[str | None, FromFile()] = None
    gigabytes: float = Field(default=20.0, gt=0)


class SearchConfig(TrainConfig):
    """A search for experts: the model names all there are, `stages` are what each set is trained by.

    pool: experts to choose from, all of the model's if null. base_experts: those that every set has; without one the
    first round chooses it. method: greedy, backward or exhaustive. validation: what sets are chosen by; test: what the
    chosen one is asked at the end. task_weights: of the mean over tasks of exact match; 1 where none is given.
    max_new_tokens: of an answer; eval_batch_size: how many are given at once. max_experts, min_gain: when to stop; an
    expert that gains less is not worth its place, 0 by default, and -1 never stops. per: divide gains by what an expert
    adds of it. seeds: how many, from `seed` on.

    proxy, halving: cheap looks that spare whole trials; none by default. processes_per_trial: above 1, each trial
    trains by `accelerate launch` with so many.
    """

    pool: list[str] | None = Field(default=None, min_length=1)
    base_experts: list[str] = []
    method: str = "greedy"
    validation: DataConfig | None = None
    test: DataConfig | None = None
    task_weights: dict[str, float] = {}
    max_new_tokens: int = Field(default=16, ge=1)
    eval_batch_size: int = Field(default=64, ge=1)
    max_experts: int | None = Field(default=None, ge=1)
    min_gain: float | None = Field(default=None, ge=-1, lt=1)
    per: Literal["gflop", "token"] | None = None
    seeds: int = Field(default=3, ge=1)
    proxy: Proxy | None = None
    halving: list[Rung] = []
    executor: Annotated[LocalExecutor | RayExecutor, Field(discriminator="type")] = LocalExecutor()
    processes_per_trial: int = Field(default=1, ge=1)
    feature_cache: FeatureCacheConfig | None = FeatureCacheConfig()

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(f"unknown method '{method}': known are {', '.join(METHODS)}")
        return method

    @field_validator("task_weights")
    @classmethod
    def _weights_are_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        for task, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weight {weight} of task '{task}' is none: write 0 or more")
        return weights

    @field_validator("validation", "test")
    @classmethod
    def _all_is_asked(cls, data: DataConfig | None) -> DataConfig | None:
        for part in data.parts if data is not None else ():
            if part.on_fault != "fatal" or part.max_length is not None:
                raise ValueError(f"on_fault and max_length leave records out, and all of '{part.title}' is asked: "
                                 "leave them out")  # fmt: skip
        return data

    @field_validator("halving")
    @classmethod
    def _rungs_rise(cls, rungs: list[Rung]) -> list[Rung]:
        for low, high in pairwise(rungs):
            if high.seeds < low.seeds or high.length < low.length:
                raise ValueError("a later rung of halving has fewer seeds or less length than the one before: let "
                                 "them rise")  # fmt: skip
        return rungs

    @model_validator(mode="after")
    def _settings_fit(self) -> "SearchConfig":
        if self.method == "exhaustive" and (self.min_gain is not None or self.per is not None):
            raise ValueError("min_gain and per decide step by step, and an exhaustive search takes no steps: leave "
                             "them out")  # fmt: skip
        if any(rung.seeds > self.seeds for rung in self.halving):
            raise ValueError(f"a rung of halving has more seeds than the search, which has {self.seeds}")
        if self.max_experts is not None and self.max_experts < len(self.base_experts):
            raise ValueError(
                f"max_experts is {self.max_experts}, and there are {len(self.base_experts)} base_experts already"
            )
        if len(set(self.pool or [])) < len(self.pool or []) or len(set(self.base_experts)) < len(self.base_experts):
            raise ValueError("pool or base_experts names an expert twice: name each once")
        return self
