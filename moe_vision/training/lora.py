"""LoRA on the language model for one stage, through peft: put in before it, merged into the weights after it."""

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.registry import suggest
from moe_vision.training.groups import parameter_groups
from moe_vision.training.schedule import LoraSettings, StageConfig

if TYPE_CHECKING:
    from peft import LoraModel

BASE = ".base_layer."


def check_lora(model: MoeVisionForConditionalGeneration, stage: StageConfig) -> None:
    """Raise ValueError if a stage asks for LoRA and peft is missing, or a target is no linear layer of the model."""
    if stage.lora is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"stages.{stage.name}.lora needs peft, which is not installed: "
                         "pip install 'moe-vision[lora]', or leave lora out")  # fmt: skip
    layers = {name.split(".")[-1]: layer for name, layer in model.model.language_model.named_modules()}
    linear = sorted(name for name, layer in layers.items() if isinstance(layer, nn.Linear))
    for target in stage.lora.target_modules or ():
        if target not in linear:
            raise ValueError(f"stages.{stage.name}.lora.target_modules: '{target}' is no linear layer of the language "
                             f"model: {suggest(target, linear)}")  # fmt: skip


def add_lora(model: MoeVisionForConditionalGeneration, settings: LoraSettings | None, seed: int) -> "LoraModel | None":
    """Put adapters into the language model, drawn from `seed`, and let only them train in it; what `merge` takes out.

    They are part of the model like any module, so that checkpoints hold them and the group `language_model` names them.
    """
    if settings is None:
        return None
    from peft import LoraConfig, LoraModel

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules or "all-linear",
    )
    with torch.random.fork_rng():  # the same adapters whether the stages before ran in this process or were loaded
        torch.manual_seed(seed)
        language_model: Any = model.model.language_model
        tuner = LoraModel(language_model, config, "default")
    for name, parameter in parameter_groups(model)["language_model"]:
        parameter.requires_grad_(".lora_" in name)  # peft does not see the head
    return tuner


def merge(model: MoeVisionForConditionalGeneration, tuner: "LoraModel") -> None:
    """Add adapters to the weights that they adapt; the model has its own modules and keys again."""
    tuner.merge_and_unload()
    vars(model.model.language_model).pop("peft_config", None)  # peft's newer versions take it away themselves


def merged(weights: Mapping[str, torch.Tensor], settings: LoraSettings) -> dict[str, torch.Tensor]:
    """As `merge`, for weights by name that were gathered from shards, whose modules cannot be merged in place."""
    result: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        down = weights.get(name.replace(".base_layer.weight", ".lora_A.default.weight")) if BASE in name else None
        if down is not None and name.endswith(".base_layer.weight"):
            up = weights[name.replace(".base_layer.weight", ".lora_B.default.weight")]
            value = value + (up @ down) * (settings.alpha / settings.rank)
        result[name.replace(BASE, ".")] = value
    return result
