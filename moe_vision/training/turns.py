"""Whose turn it is to train: groups of parameters that take turns over one model and one optimizer.

The turn follows from the step alone, so that a resumed run goes on with the right one.
"""

import math
from dataclasses import dataclass

from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.training.groups import learning_rates
from moe_vision.training.schedule import StageConfig


@dataclass(frozen=True)
class Turns:
    """groups: finest groups of each turn. steps: how long each lasts."""

    groups: tuple[frozenset[str], ...]
    steps: tuple[int, ...]

    @property
    def alternate(self) -> bool:
        return len(self.groups) > 1

    def at(self, step: int) -> frozenset[str]:
        """Finest groups that train at an optimizer step, counted from 0."""
        step %= sum(self.steps)
        for groups, length in zip(self.groups, self.steps, strict=True):
            if step < length:
                return groups
            step -= length
        raise AssertionError("a step lies in one of the turns")

    def all(self) -> frozenset[str]:
        return frozenset().union(*self.groups)


def turns_of(stage: StageConfig, model: MoeVisionForConditionalGeneration, steps_per_epoch: int) -> Turns:
    """Turns of a stage over a model. Raises ValueError for a group that does not exist or holds no parameter."""
    if stage.alternate is None:
        return Turns((frozenset(learning_rates(model, stage.rates)),), (1,))
    groups = tuple(frozenset(learning_rates(model, turn.train)) for turn in stage.alternate)
    return Turns(
        groups, tuple(turn.steps or max(1, round((turn.epochs or 0) * steps_per_epoch)) for turn in stage.alternate)
    )


def steps_per_epoch(records: int, stage: StageConfig, processes: int = 1) -> int:
    """Optimizer steps that see every record once, as Trainer counts them."""
    batches = math.ceil(records / (stage.batch_size * processes))
    return max(1, math.ceil(batches / stage.gradient_accumulation))


def total_steps(records: int, stage: StageConfig, processes: int = 1) -> int:
    """Optimizer steps of a stage."""
    if stage.max_steps is not None:
        return stage.max_steps
    return math.ceil((stage.epochs or 0) * steps_per_epoch(records, stage, processes))
