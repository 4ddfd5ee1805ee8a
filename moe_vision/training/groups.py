"""Parameter groups by name: what a stage trains, what it leaves frozen.

`experts.<name>`, `mixers`, `adapters`, `language_model` are every parameter once. What lies further down has a name by
its path, as `adapters.overview.resampler` or `experts.sam.model.neck`, and is a group of its own where it is named.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.registry import suggest

ROOTS = {
    "model.vision_tower.experts": "experts",
    "model.vision_tower.mixers": "mixers",
    "model.multi_modal_projector": "adapters",
    "model.selector": "adapters.selector",
    "model.markers": "adapters.markers",
    "model.language_model": "language_model",
    "lm_head": "language_model.lm_head",
}
"""Where the parts of a model lie, and by which name a schedule knows them."""


def within(name: str, group: str) -> bool:
    """Whether a name is that of a group or of something in it."""
    return name == group or name.startswith(f"{group}.")


def touches(part: str, groups: Iterable[str]) -> bool:
    """Whether one of the groups holds a part, or something in it."""
    return any(within(part, group) or within(group, part) for group in groups)


def path_of(parameter: str) -> str:
    """A schedule's name of a parameter."""
    root = next(root for root in ROOTS if within(parameter, root))
    return ROOTS[root] + parameter.removeprefix(root)


def parameter_groups(
    model: MoeVisionForConditionalGeneration, named: Iterable[str] = ()
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every parameter once, in the group with the longest name that holds it: one of the four kinds, an expert each, or
    one that is `named`."""
    names = [f"experts.{name}" for name in model.model.vision_tower.experts]
    names += ["mixers", "adapters", "language_model"]
    names += [name for name in named if name not in names]
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in names}
    for name, parameter in model.named_parameters():
        path = path_of(name)
        groups[max((group for group in names if within(path, group)), key=len)].append((name, parameter))
    return groups


def group_modules(model: MoeVisionForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The modules of each expert and of the three other kinds; the language model's head has no mode of its own and is
    left out."""
    inner = model.model
    modules: dict[str, list[nn.Module]] = {
        f"experts.{name}": [module] for name, module in inner.vision_tower.experts.items()
    }
    return modules | {
        "mixers": [inner.vision_tower.mixers],
        "adapters": [module for module in (inner.multi_modal_projector, inner.selector) if module is not None],
        "language_model": [inner.language_model],
    }


def learning_rates(
    model: MoeVisionForConditionalGeneration, train: Mapping[str, float], field: str = "train"
) -> dict[str, float]:
    """Rate of each group; `experts` stands for all of them, and the longer of two names that hold a parameter wins.

    Raises ValueError, which names `field`, for a group that does not exist or holds no parameter.
    """
    every_expert = {f"experts.{name}": rate for name in model.model.vision_tower.experts
                    if (rate := train.get("experts")) is not None}  # fmt: skip
    rates = every_expert | {name: rate for name, rate in sorted(train.items()) if name != "experts"}
    coarse = parameter_groups(model)
    paths = [path_of(name) for name, _ in model.named_parameters()]
    for name in rates:
        if any(within(path, name) for path in paths):
            continue
        if name not in coarse:
            raise ValueError(
                f"{field}: unknown group '{name}': {suggest(name, nearby(name, paths) or ['experts', *coarse])}"
            )
        filled = [group for group in coarse if coarse[group]]
        raise ValueError(
            f"{field}: group '{name}' has no parameter in this model; leave it out ({', '.join(filled)} have)"
        )
    for name, members in parameter_groups(model, rates).items():
        if name in rates and not members:
            inner = [other for other in rates if other != name and within(other, name)]
            raise ValueError(f"{field}: all of group '{name}' is in {inner}, which have their own rates: leave it out")
    return rates


def nearby(name: str, paths: Sequence[str]) -> list[str]:
    """What lies beside a name that does not exist: the children of the longest part of it that does."""
    while "." in name:
        name = name.rpartition(".")[0]
        depth = name.count(".") + 2
        found = dict.fromkeys(".".join(path.split(".")[:depth]) for path in paths if path.startswith(f"{name}."))
        if found:
            return list(found)
    return []


def freeze_all_but(model: MoeVisionForConditionalGeneration, trained: Collection[str]) -> None:
    """Let exactly the named groups have gradients."""
    for group, members in parameter_groups(model, trained).items():
        for _, parameter in members:
            parameter.requires_grad_(group in trained)


def modes_of(module: nn.Module, parent: bool = True) -> Iterator[tuple[nn.Module, bool]]:
    """Each module with whether it belongs into training mode: where something in it has a gradient, so that what is
    frozen does not drop out. One without parameters goes with what it is part of."""
    parameters = list(module.parameters())
    mode = any(parameter.requires_grad for parameter in parameters) if parameters else parent
    yield module, mode
    for child in module.children():
        yield from modes_of(child, mode)


def weight_decays(
    model: MoeVisionForConditionalGeneration, decay: float | Mapping[str, float], rates: Mapping[str, float]
) -> dict[str, float]:
    """Weight decay of each group that trains: one for all, or that of the longest name that holds it, else 0.

    Raises ValueError for a group that does not exist, holds no parameter, is frozen, or is only a part of one.
    """
    if not isinstance(decay, Mapping):
        return dict.fromkeys(rates, decay)
    learning_rates(model, decay, "weight_decay")
    for name in decay:
        if not any(within(group, name) for group in rates):
            raise ValueError(f"weight_decay: group '{name}' is frozen; leave it out, or train it "
                             f"({', '.join(rates)} train)")  # fmt: skip
    named = {group: [name for name in decay if within(group, name)] for group in rates}
    return {group: decay[max(names, key=len)] if names else 0.0 for group, names in named.items()}


def optimizer_groups(
    model: MoeVisionForConditionalGeneration, rates: Mapping[str, float], weight_decay: float | Mapping[str, float]
) -> list[dict[str, object]]:
    """Groups for torch's optimizers of what has gradients, each with its name as `group`; weight decay falls on
    matrices only. Raises ValueError as `weight_decays`."""
    decays = weight_decays(model, weight_decay, rates)
    result: list[dict[str, object]] = []
    groups = parameter_groups(model, rates)
    for group, rate in rates.items():
        trained = [parameter for _, parameter in groups[group] if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim > 1]
        vectors = [parameter for parameter in trained if parameter.ndim <= 1]
        for parameters, decay in ((matrices, decays[group]), (vectors, 0.0)):
            if parameters:
                result.append({"params": parameters, "lr": rate, "weight_decay": decay, "group": group})
    return result
