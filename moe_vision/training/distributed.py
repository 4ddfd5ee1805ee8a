"""Several processes as one: the first one writes, all know the same, and a model comes back whole from its shards.

`accelerate launch` starts the processes; without it there is one, and everything here does as good as nothing.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from rich.console import Console
from torch import nn
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.terminal import terminal
from moe_vision.training.groups import touches

T = TypeVar("T")

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)

PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: drawing pictures, reading weights and writing a model take their time."""


def processes() -> PartialState:
    """The processes of this launch; called first, it makes them know each other."""
    # TrainingArguments makes this state anew for every stage, so that it must not be kept.
    if torch.accelerator.is_available():
        return PartialState(timeout=PATIENCE)
    return PartialState(cpu=True, timeout=PATIENCE)


def on_main(work: Callable[[], T]) -> T:
    """What `work` returned in the main process, in every process. It begins when all have come here, since it may take
    away what one still reads; nobody goes on before it is done.

    Raises what `work` raised in the main process, which is the one that says why, and SystemExit in all others.
    """
    state = processes()
    if state.num_processes == 1:
        return work()
    state.wait_for_everyone()
    outcome: list[Any] = [False, None]
    error: Exception | None = None
    if state.is_main_process:
        try:
            outcome = [True, work()]
        except Exception as raised:  # whatever it is, the others must hear of it, or they wait for ever
            error = raised
    broadcast_object_list(outcome, from_process=0)
    if error is not None:
        raise error
    if not outcome[0]:
        raise SystemExit(2)
    return outcome[1]


def main_console(console: Console | None) -> Console:
    """A console that prints in the main process only."""
    return (console or terminal()) if processes().is_main_process else Console(quiet=True)


def shard_sensibly(trainer: Trainer, model: MoeVisionForConditionalGeneration, rates: Mapping[str, float]) -> None:
    """Tell FSDP2 what to wrap: every block of the language model and of experts that train. Frozen experts stay whole
    on each process: they have neither gradients nor optimizer state to share, and gathering them would cost each step.
    Experts that train on slices are gathered with the rest of the model, as often in every process.

    Does nothing where the launch is not FSDP. Raises ValueError for its first version.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError("fsdp_version is 1, which cannot mix trained and frozen parameters in a unit: write "
                         "fsdp_version: 2, as in configs/accelerate/fsdp2.yaml")  # fmt: skip
    experts = model.model.vision_tower.experts
    frozen = [expert for name, expert in experts.items() if not touches(f"experts.{name}", rates)]
    trained = [expert for name, expert in experts.items() if touches(f"experts.{name}", rates)]
    if not model.model.policy.one_view:  # processes would run them for other numbers of sizes, and wait for ever
        trained = []
    names = {type(b).__name__ for module in (model.model.language_model, *trained) for b in blocks_of(module)}
    plugin.transformer_cls_names_to_wrap = sorted(names)
    plugin.ignored_modules = frozen


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network: members of its outermost lists whose members are all of one class."""
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child) if isinstance(child, (nn.ModuleList, nn.Sequential)) else []
        alike = len({type(member) for member in members}) == 1
        if alike and any(True for member in members for _ in member.children()):
            found += members
        else:
            found += blocks_of(child)
    return found


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """All weights by name, gathered from the shards; None where the model is whole in every process. All processes
    must call it; only the main one is sure to get them."""
    if trainer.accelerator.distributed_type not in SHARDED:
        return None
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    unset_hf_deepspeed_config()  # under ZeRO-3 transformers would load the next stage's model in shards
    tied = cast(Any, trainer.model).all_tied_weights_keys  # gathered, they share no memory any more
    return {name: value for name, value in weights.items() if name not in tied}


def finish() -> None:
    """Let go of the other processes; the last thing a launched command does."""
    PartialState().destroy_process_group()
