"""Parameter groups by name: what a stage trains, what it leaves frozen."""

from collections.abc import Mapping

from torch import nn

from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.registry import suggest


def parameter_groups(model: MoeVisionForConditionalGeneration) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every parameter once, in its finest group: `experts.<name>`, `mixers`, `adapters`, `language_model`."""
    prefixes: dict[str, str | tuple[str, ...]] = {
        f"experts.{name}": f"model.vision_tower.experts.{name}." for name in model.model.vision_tower.experts
    }
    prefixes |= {
        "mixers": "model.vision_tower.mixers.",
        "adapters": ("model.multi_modal_projector.", "model.selector.", "model.markers."),
        "language_model": "model.language_model.",
    }
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in prefixes}
    for name, parameter in model.named_parameters():
        group = next((group for group, prefix in prefixes.items() if name.startswith(prefix)), "language_model")
        groups[group].append((name, parameter))
    return groups


def group_modules(model: MoeVisionForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The modules of each finest group; the language model's head has no mode of its own and is left out."""
    inner = model.model
    modules: dict[str, list[nn.Module]] = {
        f"experts.{name}": [module] for name, module in inner.vision_tower.experts.items()
    }
    return modules | {
        "mixers": [inner.vision_tower.mixers],
        "adapters": [module for module in (inner.multi_modal_projector, inner.selector) if module is not None],
        "language_model": [inner.language_model],
    }


def learning_rates(model: MoeVisionForConditionalGeneration, train: Mapping[str, float]) -> dict[str, float]:
    """Rate of each finest group; `experts` stands for all of them, and `experts.<name>` beats it.

    Raises ValueError for a group that does not exist or holds no parameter.
    """
    groups = parameter_groups(model)
    valid = ["experts", *groups]
    rates: dict[str, float] = {}
    for name, rate in sorted(train.items()):  # `experts` sorts before `experts.<name>`
        if name not in valid:
            raise ValueError(f"train: unknown group '{name}': {suggest(name, valid)}")
        members = [group for group in groups if group == name or group.startswith(f"{name}.")]
        if not any(groups[group] for group in members):
            filled = [group for group in groups if groups[group]]
            raise ValueError(
                f"train: group '{name}' has no parameter in this model; leave it out ({', '.join(filled)} have)"
            )
        rates |= {group: rate for group in members if groups[group]}
    return rates


def freeze_all_but(model: MoeVisionForConditionalGeneration, trained: Mapping[str, float]) -> None:
    """Let exactly the named finest groups have gradients."""
    for group, members in parameter_groups(model).items():
        for _, parameter in members:
            parameter.requires_grad_(group in trained)


def optimizer_groups(
    model: MoeVisionForConditionalGeneration, rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, object]]:
    """Groups for torch's optimizers, of what has gradients; weight decay falls on matrices only."""
    result: list[dict[str, object]] = []
    groups = parameter_groups(model)
    for group, rate in rates.items():
        trained = [parameter for _, parameter in groups[group] if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim > 1]
        vectors = [parameter for parameter in trained if parameter.ndim <= 1]
        for parameters, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if parameters:
                result.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return result
