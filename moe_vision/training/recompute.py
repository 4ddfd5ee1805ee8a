"""Gradient checkpointing by group: memory for time, the same gradients."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.registry import suggest
from moe_vision.training.groups import group_modules, touches


def switches(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Modules that can recompute, and the name of what switches it: a flag of transformers' blocks, or of ours, or a
    method of timm's models."""
    for module in modules:
        for inner in module.modules():
            if hasattr(inner, "timm_model") and getattr(inner, "supports_gradient_checkpointing", False):
                yield cast(nn.Module, inner.timm_model), "set_grad_checkpointing"
            elif isinstance(getattr(inner, "gradient_checkpointing", None), bool):
                yield inner, "gradient_checkpointing"


def checkpointed_groups(
    model: MoeVisionForConditionalGeneration, setting: bool | Sequence[str], rates: Mapping[str, float]
) -> set[str]:
    """The finest groups that recompute in a stage. True: every one that can and whose activations a gradient needs.

    Raises ValueError for a group that does not exist, that cannot, or that is a frozen expert: it keeps nothing.
    """
    groups = group_modules(model)
    able = {name for name, modules in groups.items() if any(True for _ in switches(modules))}
    useful = {name for name in able if touches(name, rates) or name == "language_model"}
    if isinstance(setting, bool):
        return useful if setting else set()
    chosen: set[str] = set()
    for name in setting:
        members = {group for group in groups if group == name or group.startswith(f"{name}.")}
        if not members:
            raise ValueError(f"gradient_checkpointing: unknown group '{name}': {suggest(name, ['experts', *groups])}")
        if not members & able:
            raise ValueError(f"gradient_checkpointing: '{name}' cannot recompute its activations; "
                             f"leave it out ({', '.join(sorted(able)) or 'no group'} can)")  # fmt: skip
        if not members & useful:
            raise ValueError(f"gradient_checkpointing: '{name}' is frozen and keeps no activations: leave it out, or "
                             "train it")  # fmt: skip
        incapable = {group for group in members - able if touches(group, rates)}
        if incapable:
            raise ValueError(f"gradient_checkpointing: '{name}' holds {sorted(incapable)}, which cannot recompute "
                             f"their activations: name the others, one by one "
                             f"({', '.join(sorted(useful))})")  # fmt: skip
        chosen |= members & useful
    return chosen


def recompute_in(model: MoeVisionForConditionalGeneration, chosen: set[str]) -> None:
    """Switch recomputing on in these groups and off in all others."""
    for group, modules in group_modules(model).items():
        for module, switch in switches(modules):
            if switch == "set_grad_checkpointing":
                # timm asks its own setting, whose default is the same
                getattr(module, switch)(group in chosen)
                continue
            # the reentrant kind neither sees frozen inputs nor gives bitwise the same random numbers
            holder: Any = module
            holder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            holder.gradient_checkpointing = group in chosen
