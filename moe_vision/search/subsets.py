"""A search's config under a set of its experts: the model with them alone, and stages that know no others."""

from collections.abc import Sequence
from typing import Any, TypeVar

from moe_vision.config import ConfigError, Problem, validate
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.registry import suggest
from moe_vision.search.config import SearchConfig
from moe_vision.search.methods import Experts, in_order
from moe_vision.training.groups import within
from moe_vision.training.schedule import StageConfig, TrainConfig

T = TypeVar("T")


def pool_of(config: SearchConfig, model: ModelConfig) -> Experts:
    """The experts to choose from and those of the base, in the model's order. Raises ConfigError for unknown ones."""
    known = list(model.experts)
    problems = [
        Problem(field, name, f"the model has no expert '{name}'", suggest(name, known))
        for field, names in (("pool", config.pool or []), ("base_experts", config.base_experts))
        for name in names
        if name not in known
    ]
    if problems:
        raise ConfigError("search config", problems)
    return in_order(known, [*(config.pool or known), *config.base_experts])


def subset_model(model: ModelConfig, experts: Experts) -> ModelConfig:
    """The model with these experts alone, on the canvas of the whole one, so that every set sees the same pictures and
    an expert makes the same maps of them in every set.

    A mixer's settings by expert keep those that are there. Raises ConfigError where the rest does not fit together: a
    mixer's base is missing, a branch has no expert left.
    """
    plain = model.to_plain()
    branches = {
        name: {**branch, "experts": branch["experts"] and kept(branch["experts"], experts),
               "mixer": {key: by_expert(value, model, experts) for key, value in branch["mixer"].items()}}
        if name in ("overview", "slices") and branch is not None
        else branch
        for name, branch in plain["branches"].items()
    }  # fmt: skip
    values = {**plain, "experts": {name: plain["experts"][name] for name in experts}, "branches": branches}
    if plain["slicing"]["type"] == "none" and plain["slicing"]["size"] is None:
        values["slicing"] = {**plain["slicing"], "size": list(model.vision_config().canvas_size())}
    return validate(ModelConfig, values, source=" + ".join(experts))


def kept(names: Sequence[str], experts: Experts) -> list[str]:
    return [name for name in names if name in experts]


def by_expert(value: Any, model: ModelConfig, experts: Experts) -> Any:
    """A setting without what it says of experts that are left out."""
    if isinstance(value, dict) and value and set(value) <= set(model.experts):
        return {name: setting for name, setting in value.items() if name in experts}
    return value


def subset_stages(config: TrainConfig, experts: Experts, length: float = 1.0) -> list[StageConfig]:
    """The stages that train a set together, `length` of each, without groups of experts that are left out. Raises
    ValueError where a stage would train nothing."""
    absent = [f"experts.{name}" for name in all_named(config) if name not in experts]

    def present(groups: dict[str, T]) -> dict[str, T]:
        return {group: value for group, value in groups.items() if not any(within(group, name) for name in absent)}

    stages = []
    for stage in config.stages:
        if stage.prealign is not None:
            continue
        changes: dict[str, Any] = {}
        if stage.train is not None:
            changes["train"] = present(stage.train)
            if not changes["train"]:
                raise ValueError(f"stage '{stage.name}' trains {list(stage.train)}, none of which is in the set")
        if stage.alternate is not None:
            turns = [turn.model_copy(update={"train": present(turn.train)}) for turn in stage.alternate]
            changes["alternate"] = [turn for turn in turns if turn.train]
        if isinstance(stage.weight_decay, dict):
            changes["weight_decay"] = present(stage.weight_decay)
        if isinstance(stage.gradient_checkpointing, list):
            changes["gradient_checkpointing"] = list(present(dict.fromkeys(stage.gradient_checkpointing)))
        if length < 1:
            if stage.epochs is not None:
                changes["epochs"] = stage.epochs * length
            if stage.max_steps is not None:
                changes["max_steps"] = max(1, round(stage.max_steps * length))
        stages.append(StageConfig.model_validate(stage.model_copy(update=changes).model_dump()))
    return stages


def all_named(config: TrainConfig) -> list[str]:
    """Experts that the groups of any stage name."""
    groups: list[str] = []
    for stage in config.stages:
        if stage.prealign is None:
            groups += stage.rates
        groups += stage.weight_decay if isinstance(stage.weight_decay, dict) else []
        groups += stage.gradient_checkpointing if isinstance(stage.gradient_checkpointing, list) else []
    return list(dict.fromkeys(group.split(".")[1] for group in groups if group.startswith("experts.")))


def alignment_stages(config: TrainConfig, expert: str) -> list[StageConfig]:
    """The stages that align this expert by itself."""
    return [
        stage.model_copy(update={"prealign": stage.prealign.model_copy(update={"experts": [expert]})})
        for stage in config.stages
        if stage.prealign is not None and expert in (stage.prealign.experts or [expert])
    ]


def with_pretrained(model: ModelConfig, files: dict[str, str]) -> ModelConfig:
    """The model with these experts' weights from files."""
    plain = model.to_plain()
    experts = {
        name: {**values, "pretrained": files[name]} if name in files else values
        for name, values in plain["experts"].items()
    }
    return validate(ModelConfig, {**plain, "experts": experts}, source="aligned experts")
