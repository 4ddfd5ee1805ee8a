"""What a schedule asks for and its model or its data has not, before weights load."""

from collections.abc import Sequence

import torch

from moe_vision.config import ConfigError, Problem
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.registry import suggest
from moe_vision.training.groups import learning_rates, weight_decays
from moe_vision.training.lora import check_lora
from moe_vision.training.prealign import alone
from moe_vision.training.recompute import checkpointed_groups
from moe_vision.training.schedule import DataConfig, Run, StageConfig
from moe_vision.training.turns import turns_of


def check_only(only: Sequence[str], runs: Sequence[Run]) -> None:
    """Raise ConfigError for a run that does not exist, or that needs others that are not done by themselves."""
    names = [run.name for run in runs]
    for name in only:
        if name not in names:
            raise ConfigError("command line", [Problem("--only", name, "no such run", suggest(name, names))])
        if runs[names.index(name)].expert is None:
            cure = "leave --only out: one that aligns no expert goes on from all before it"
            raise ConfigError("command line", [Problem("--only", name, "is no run of its own", cure)])


def check_groups(runs: Sequence[Run], composition: ModelConfig) -> None:
    """Raise ValueError for a group of any setting that the model of these runs, which share one, does not have, before
    weights load."""
    expert = runs[0].expert
    config = composition if expert is None else alone(composition, expert)
    with torch.device("meta"):
        skeleton = MoeVisionForConditionalGeneration(config.hf_config())
    for run in runs:
        turns_of(run.stage, skeleton, 1)
        rates = learning_rates(skeleton, run.stage.rates)
        weight_decays(skeleton, run.stage.weight_decay, rates)
        checkpointed_groups(skeleton, run.stage.gradient_checkpointing, rates)
        check_lora(skeleton, run.stage)


def stage_data(stage: StageConfig) -> DataConfig:
    """The data of a stage. Raises ConfigError where it has none."""
    if stage.data is None:
        cure = "give --data FILE, or write data: {path: …} into the stage"
        raise ConfigError("train config", [Problem(f"stages.{stage.name}.data", None, "is missing", cure)])
    return stage.data
