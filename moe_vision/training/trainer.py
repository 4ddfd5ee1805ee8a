"""A thin `transformers.Trainer`: its own rate for every group, and frozen parts that stay in evaluation mode."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer

from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.training.groups import group_modules, optimizer_groups, parameter_groups


class GroupTrainer(Trainer):
    """rates: learning rate of each finest group that trains; every other parameter is frozen already."""

    def __init__(self, *args: Any, rates: Mapping[str, float], **kwargs: Any) -> None:
        self.rates = rates
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = optimizer_groups(
                cast(MoeVisionForConditionalGeneration, self.model), self.rates, self.args.weight_decay
            )
            self.optimizer = torch.optim.AdamW(groups, betas=(self.args.adam_beta1, self.args.adam_beta2))
        return self.optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        """None are counted: nothing reads them, and Trainer walks all parameters for them in each step, which takes a
        twentieth of a miniature's."""
        return 0

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Trainer has just put the whole model into training mode; what is frozen must not drop out."""
        for group, modules in group_modules(self.accelerator.unwrap_model(model)).items():
            for module in modules if group not in self.rates else ():
                module.eval()
        return super().compute_loss(model, *args, **kwargs)


def trained_and_frozen(model: Any, rates: Mapping[str, float]) -> tuple[dict[str, int], dict[str, int]]:
    """Parameter counts of the groups that train, of what has gradients in them, and of those that do not."""
    counts = {
        group: sum(p.numel() for _, p in members if p.requires_grad or group not in rates)
        for group, members in parameter_groups(model).items()
    }
    counts = {group: count for group, count in counts.items() if count}
    return {g: c for g, c in counts.items() if g in rates}, {g: c for g, c in counts.items() if g not in rates}
