"""What a composition costs, before a weight exists: parameters, tokens and FLOPs, counted on the meta device."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from moe_vision.experts import EXPERTS, ExpertConfig
from moe_vision.experts.weights import spec_source
from moe_vision.fusion import Mixer
from moe_vision.modeling.configuration_moe_vision import MoeVisionVisionConfig
from moe_vision.modeling.model_config import ModelConfig, brief
from moe_vision.slicing import Size
from moe_vision.types import FeatureMap, VisualTokens

SLICED_SIZE = (672, 1008)
"""Image size (height, width) that a sliced model's cost is shown for: LLaVA-UHD's example."""

TEXT_TOKENS = 64
"""Text tokens beside the visual ones in the language model's cost, where a caller does not say otherwise."""


@dataclass(frozen=True)
class PartCost:
    """One part: `flops` for one image (a multiply-add counts as two), sizes (height, width)."""

    part: str
    what: str
    image_size: tuple[int, int] | None
    grid: tuple[int, int] | None
    channels: int
    parameters: int
    flops: int


@dataclass(frozen=True)
class CostTable:
    """Costs of every part of a composition for one image. visual_tokens: as the language model sees them, markers
    included and without what a selector drops; where that depends on the picture, as if it dropped none. size: of the
    image, where the cost depends on it.
    """

    parts: list[PartCost]
    visual_tokens: int
    size: Size | None = None
    views: int = 1

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "parts": [asdict(part) for part in self.parts],
            "visual_tokens": self.visual_tokens,
            "image_size": self.size,
            "views": self.views,
            "parameters": self.parameters,
            "flops": self.flops,
        }


def cost(config: ModelConfig, size: Size = SLICED_SIZE, text_tokens: int = TEXT_TOKENS) -> CostTable:
    """Build every part on the meta device and count the forward pass of one image of `size` (height, width).

    Without slicing every size costs the same. Raises PlanError if the slicing refuses the size.
    """
    text_config = config.language_model.text_config()
    width = text_config.hidden_size
    vision = config.vision_config()
    plan = vision.policy().plan(size)
    views = Counter((vision.branch_of(view.role), view.size) for view in plan.views)
    parts = []
    with torch.device("meta"), torch.no_grad():
        for name, expert in config.experts.items():
            with naming(f"experts.{name}"):
                module = expert.build()
            inputs = Counter[Size]()
            for (branch, view), number in views.items():
                if name in vision.branch_experts(branch):
                    inputs[expert.size_at(view)] += number
            with naming(f"experts.{name}"):
                flops = sum(n * flops_of(module, torch.empty(1, 3, *view)) for view, n in inputs.items())
            first = next(iter(inputs), expert.size)
            seen = f", {inputs.total()} views" if inputs.total() != 1 else ""
            parts.append(
                PartCost(
                    f"experts.{name}", f"{expert.type_name} {expert.variant}{seen}", first, expert.shape_at(first).grid,
                    expert.channels, count(module), flops,
                )
            )  # fmt: skip
        with naming("branches"):
            parts += fusion_costs(vision, views, width)
        if learnt := vision.policy().learnt_markers():
            parts.append(PartCost("markers", ", ".join(learnt), None, None, width, len(learnt) * width, 0))
        visual_tokens = plan.num_tokens
        if (selector := vision.selector_config()) is not None:
            local = sum(plan.local_tokens)
            kept = selector.kept(local)
            visual_tokens -= 0 if kept is None else local - kept
            chooser = selector.build(width)
            flops = flops_of(chooser, torch.empty(local, width), torch.empty(text_tokens, width), torch.empty(local, 2))
            keeps = f"{selector.type_name}, {'some' if kept is None else kept} of {local} tokens"
            parts.append(PartCost("selector", keeps, None, None, width, count(chooser), flops))
        with naming("language_model"):
            language_model = AutoModelForCausalLM.from_config(text_config)
        length = visual_tokens + text_tokens
        embedded = torch.empty(1, length, width)
        causal = torch.ones(1, 1, length, length, dtype=torch.bool)  # given, since making one reads values
        with naming("language_model"):
            flops = flops_of(language_model, inputs_embeds=embedded, attention_mask=causal, use_cache=False)
        parts.append(
            PartCost(
                "language_model", f"{text_config.model_type}, {visual_tokens} + {text_tokens} tokens", None, None,
                width, count(language_model),
                flops,
            )
        )  # fmt: skip
    return CostTable(parts, visual_tokens, None if config.slicing.one_view else size, len(plan.views))


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Raise ValueError, which names a part of the config, where a library cannot build or run it."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # libraries have their own kinds
        raise ValueError(f"{part} cannot be built ({brief(error)}): check its sizes and its architecture") from error


def fusion_costs(vision: MoeVisionVisionConfig, views: Mapping[tuple[str, Size], int], width: int) -> list[PartCost]:
    """Mixer and adapter of each branch, over all views of an image."""
    mixers, adapters = [], []
    modules: dict[str, Any] = {
        branch: vision.adapter(branch).build(vision.mixed_shape(branch), width) for branch in vision.branches
    }
    configs = vision.expert_configs()
    for branch in vision.branches:
        mixer = vision.mixer(branch).build(vision.map_shapes(branch))
        adapter, projected_by = modules[branch], vision.adapter(branch).projected_by
        mixer_flops = adapter_flops = 0
        sizes = {size: number for (name, size), number in views.items() if name == branch}
        for size, number in sizes.items():
            shapes = vision.map_shapes(branch, size)
            maps = {
                name: FeatureMap(torch.empty(number, shape.channels, *shape.grid)) for name, shape in shapes.items()
            }
            mixed = vision.mixed_shape(branch, size)
            mixer_flops += flops_of(Injected(mixer, configs), maps)
            # All views of a size together, as the model takes them: what depends on no view happens once.
            tokens = VisualTokens(torch.empty(number, mixed.num_tokens, mixed.channels), mixed.grid)
            adapter_flops += flops_of(adapter, tokens)
            if projected_by is not None:
                adapter_flops += flops_of(modules[projected_by].projection, adapter(tokens))
        first = next(iter(sizes), None)
        mixed = vision.mixed_shape(branch, first)
        out = vision.adapter(branch).shape(mixed, width)
        mixers.append(
            PartCost(
                f"mixers.{branch}", vision.mixer(branch).type_name, None, mixed.grid, mixed.channels, count(mixer),
                mixer_flops,
            )
        )  # fmt: skip
        adapters.append(
            PartCost(
                f"adapters.{branch}", vision.adapter(branch).type_name, None, out.grid, out.channels, count(adapter),
                adapter_flops,
            )
        )  # fmt: skip
    return [*mixers, *adapters]


class Injected(nn.Module):
    """A mixer, with what it does between the blocks of an expert, if it does."""

    def __init__(self, mixer: Mixer, experts: Mapping[str, ExpertConfig]) -> None:
        super().__init__()
        self.mixer = mixer
        self.blocks = experts[mixer.injected].num_blocks if mixer.injected is not None else None

    def forward(self, maps: dict[str, FeatureMap]) -> VisualTokens:
        """Maps [V, C, h, w], of which the injected expert's may be of any block → tokens [V, N, C]."""
        name = self.mixer.injected
        if name is not None and self.blocks is not None:
            inject, inner = self.mixer.injection(maps), maps[name].data
            for done in range(1, self.blocks + 1):
                inner = inject(done, self.blocks, inner)
            maps = {**maps, name: FeatureMap(inner)}
        return self.mixer(maps)


@dataclass(frozen=True)
class ZooEntry:
    """One checkpoint of the zoo with its cost for one image at its own size."""

    expert: str
    variant: str
    weights: str
    revision: str | None
    licence: str
    pretraining: str
    image_size: tuple[int, int]
    stride_px: int
    channels: int
    tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    parameters: int
    flops: int


def zoo(names: Sequence[str] = ()) -> Iterator[ZooEntry]:
    """Every checkpoint of the registered families (of `names`, if any), built on the meta device one by one."""
    for name in names or EXPERTS:
        for variant, spec in EXPERTS[name].specs.items():
            config: ExpertConfig = EXPERTS[name](variant=variant, pretrained=None)
            with torch.device("meta"), torch.no_grad():
                module = config.build()
                flops = flops_of(module, torch.empty(1, 3, *config.size))
            mean, std = config.statistics
            height, width = config.shape.grid
            yield ZooEntry(
                name, variant, spec_source(spec), spec.revision, spec.licence, spec.pretraining, config.size,
                config.stride_px, config.channels, height * width, mean, std, count(module), flops,
            )  # fmt: skip


def count(module: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops_of(module: nn.Module, *inputs: Any, **options: Any) -> int:
    """FLOPs of matrix products and convolutions in one call on the meta device.

    Of blocks that are alike and get inputs that are alike, one runs and counts for all.
    """
    blocks = [block for item in module.modules() if isinstance(item, nn.ModuleList) for block in item]
    seen: dict[Any, tuple[int, Any]] = {}
    repeated = 0
    with FlopCounterMode(display=False) as counter:

        def once(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal repeated
            key = (signature(block), described((args, kwargs)))
            if key in seen:
                repeated += seen[key][0]
            else:
                before = counter.get_total_flops() + repeated
                output = forward(*args, **kwargs)
                seen[key] = (counter.get_total_flops() + repeated - before, output)
            return seen[key][1]  # meta tensors hold no values, so one output is as good as another

        for block in blocks:
            block.forward = partial(once, block, block.forward)
        try:
            module(*inputs, **options)
        finally:
            for block in blocks:
                del block.forward
    return counter.get_total_flops() + repeated


PLAIN = (int, float, str, type(None))


def signature(block: nn.Module) -> Any:
    """What a block computes, short of its values: types, plain attributes, shapes of parameters."""
    parts: list[Any] = []
    for name, module in block.named_modules():
        # A layer's number tells its place in a cache, which is not in use here.
        plain = [(k, v) for k, v in vars(module).items() if isinstance(v, PLAIN) and k != "layer_idx"]
        parameters = [(k, value.shape) for k, value in module.named_parameters(recurse=False)]
        parts.append((name, type(module), tuple(plain), tuple(parameters)))
    return tuple(parts)


def described(value: Any) -> Any:
    """Arguments as something that compares: tensors by shape and dtype."""
    leaves, structure = tree_flatten(value)
    return tuple((leaf.shape, leaf.dtype) if torch.is_tensor(leaf) else leaf for leaf in leaves), str(structure)
