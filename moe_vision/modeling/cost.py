"""What a composition costs, before a weight exists: parameters, tokens and FLOPs, counted on the meta device."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from moe_vision.modeling.model_config import ModelConfig
from moe_vision.types import FeatureMap, VisualTokens

TEXT_TOKENS = 64
"""Text tokens beside the visual ones in the language model's cost."""


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
    """Costs of every part of a composition. visual_tokens: per image, as the language model sees them."""

    parts: list[PartCost]
    visual_tokens: int

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
            "parameters": self.parameters,
            "flops": self.flops,
        }


def cost(config: ModelConfig) -> CostTable:
    """Build every part on the meta device and count one image's forward pass."""
    parts = []
    maps = {name: expert.shape for name, expert in config.experts.items()}
    branch = config.branches.overview
    mixed = branch.mixer.shape(maps)
    text_config = config.language_model.text_config()
    tokens = branch.adapter.shape(mixed, text_config.hidden_size)
    with torch.device("meta"), torch.no_grad():
        for name, expert in config.experts.items():
            module, view = expert.build(), torch.empty(1, 3, *expert.size)
            parts.append(
                PartCost(
                    f"experts.{name}", f"{expert.type_name} {expert.variant}", expert.size, expert.shape.grid,
                    expert.channels, count(module), flops_of(module, view),
                )
            )  # fmt: skip
        inputs = {name: FeatureMap(torch.empty(1, shape.channels, *shape.grid)) for name, shape in maps.items()}
        mixer = branch.mixer.build(maps)
        parts.append(
            PartCost(
                "mixers.overview", branch.mixer.type_name, None, mixed.grid, mixed.channels, count(mixer),
                flops_of(mixer, inputs),
            )
        )  # fmt: skip
        adapter = branch.adapter.build(mixed, text_config.hidden_size)
        visual = VisualTokens(torch.empty(1, mixed.num_tokens, mixed.channels), mixed.grid)
        parts.append(
            PartCost(
                "adapters.overview", branch.adapter.type_name, None, tokens.grid, tokens.channels, count(adapter),
                flops_of(adapter, visual),
            )
        )  # fmt: skip
        language_model = AutoModelForCausalLM.from_config(text_config)
        length = tokens.num_tokens + TEXT_TOKENS
        embedded = torch.empty(1, length, text_config.hidden_size)
        causal = torch.ones(1, 1, length, length, dtype=torch.bool)  # given, since making one reads values
        parts.append(
            PartCost(
                "language_model", f"{text_config.model_type}, {tokens.num_tokens} + {TEXT_TOKENS} tokens", None, None,
                text_config.hidden_size, count(language_model),
                flops_of(language_model, inputs_embeds=embedded, attention_mask=causal, use_cache=False),
            )
        )  # fmt: skip
    return CostTable(parts, tokens.num_tokens)


def count(module: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops_of(module: nn.Module, *inputs: Any, **options: Any) -> int:
    """FLOPs of matrix products and convolutions in one call."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs, **options)
    return counter.get_total_flops()
