"""One of the processes that test_distributed launches: trains a schedule whole, then killed and resumed, under FSDP2.

accelerate takes processes for FSDP on accelerators only; here it is told to on CPUs.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from moe_vision.cli import leave
from moe_vision.training import distributed, runner
from moe_vision.training.schedule import TrainConfig
from moe_vision.training.trainer import GroupTrainer

original = AcceleratorState.__init__


def fsdp_on_cpu(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


facts: list[dict[str, Any]] = []


def noting(trainer: Any) -> Any:
    """What is sharded and what has optimizer state at the end of a stage."""
    model = trainer.model
    named = dict(model.named_parameters())
    optimizer = trainer.optimizer.optimizer  # below accelerate's wrapper
    stated = {id(parameter) for parameter in optimizer.state}
    facts.append(
        {
            "sharded": [name for name, parameter in named.items() if isinstance(parameter, DTensor)],
            "whole": [name for name, parameter in named.items() if not isinstance(parameter, DTensor)],
            "stated": [name for name, parameter in named.items() if id(parameter) in stated],
            "units": [name for name, module in model.named_modules() if type(module).__name__.startswith("FSDP")],
        }
    )
    return distributed.whole_weights(trainer)


class Killed(Exception):
    """Stands for a kill."""


class Killer(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith("02-finetune") and state.global_step == 2:
            raise Killed


class KilledTrainer(GroupTrainer):
    def __init__(self, *args: Any, callbacks: list[Any], **kwargs: Any) -> None:
        super().__init__(*args, callbacks=[*callbacks, Killer()], **kwargs)


def main(config: Path, folder: Path) -> None:
    AcceleratorState.__init__ = fsdp_on_cpu  # type: ignore[method-assign]
    runner.whole_weights = noting
    schedule = TrainConfig.model_validate(yaml.safe_load(config.read_text()))
    runner.train(schedule, folder / "whole")
    if PartialState().is_main_process:
        (folder / "facts.json").write_text(json.dumps(facts))
    runner.GroupTrainer = KilledTrainer  # type: ignore[misc]
    try:
        runner.train(schedule, folder / "killed")
    except Killed:
        runner.GroupTrainer = GroupTrainer  # type: ignore[misc]
        runner.train(schedule, folder / "killed")
    distributed.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()  # as the command does: torch's threads may abort a process that is taken apart
