"""SliME's mixture of adapters over the global view (Zhang et al., 2024): a gate weighs an MLP and a resampler.

After yfzhang114/SliME, multimodal_projector/builder.py, `GatedBlock`. Both share one MLP: the second sees what learned
queries, one for each token, gathered. The published noise takes its size from the gate's own weights, so that
`w_noise` never gets a gradient; here it has weights that learn, unless `published_noise` says otherwise.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from moe_vision.fusion.base import Adapter, AdapterConfig
from moe_vision.fusion.mlp import MlpConfig
from moe_vision.fusion.query_compressor import resampler
from moe_vision.registry import ADAPTERS
from moe_vision.types import TokenShape, VisualTokens

NOISE_EPSILON, GATE_EPSILON = 1e-2, 1e-6


@ADAPTERS.register("gated_mixture")
@dataclass(frozen=True, kw_only=True)
class GatedMixtureConfig(AdapterConfig):
    """depth, inner_size: of the MLP, as `mlp` has them. num_heads: of the resampler, null for heads of 128 channels.

    top_k: adapters that a token is given to. only: one of the two alone, without gate, as SliME's first stages train.
    noise: added to the gate's scores in training, of a size that is learnt. published_noise: of the published size.
    half_positions: round the resampler's fixed positions to 16 bits, as published. Both are for imported checkpoints.
    """

    depth: int = 2
    inner_size: int | None = None
    num_heads: int | None = None
    top_k: Literal[1, 2] = 2
    only: Literal["mlp", "resampler"] | None = None
    noise: bool = True
    published_noise: bool = False
    half_positions: bool = False

    @property
    def any_grid(self) -> bool:
        return False

    def projection_channels(self, inputs: TokenShape) -> int | None:
        return inputs.channels

    def shape(self, inputs: TokenShape, hidden_size: int) -> TokenShape:
        if inputs.grid is None or inputs.grid[0] != inputs.grid[1]:
            raise ValueError(
                f"gated_mixture has a query for each token of a square raster; this mixer gives {inputs.grid}: choose "
                "another grid, or mlp"
            )
        return TokenShape(inputs.num_tokens, hidden_size, inputs.grid)

    def build(self, inputs: TokenShape, hidden_size: int) -> "GatedMixture":
        self.shape(inputs, hidden_size)
        return GatedMixture(self, inputs, hidden_size)


class GatedMixture(Adapter):
    def __init__(self, config: GatedMixtureConfig, inputs: TokenShape, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.projection = MlpConfig(depth=config.depth, inner_size=config.inner_size).build(inputs, hidden_size)
        if config.only != "mlp":
            self.resampler = resampler(inputs.num_tokens, config.num_heads, inputs.channels, config.half_positions)
        if config.only is None:
            self.gate = nn.Parameter(torch.empty(inputs.channels, 2))
            self.noise = None
            if config.noise and not config.published_noise:
                self.noise = nn.Parameter(torch.empty(inputs.channels, 2))
        self.draw_weights()

    def draw_weights(self) -> None:
        if self.config.only is None:
            init.zeros_(self.gate)
            if self.noise is not None:
                init.zeros_(self.noise)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """[V, N, C] → [V, N, D]."""
        only = self.config.only
        if only == "mlp":
            return self.projection(tokens)
        resampled = self.projection(self.resampler(tokens))
        if only == "resampler":
            return resampled
        gates = self.gates(tokens.data)
        mixed = gates[..., :1] * self.projection(tokens).data + gates[..., 1:] * resampled.data
        return VisualTokens(mixed, tokens.grid, gates)

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """How much of each token [V, N, C] comes from the MLP and how much from the resampler: [V, N, 2]."""
        scores = x @ self.gate
        if self.training and self.config.noise:
            weight = self.gate if self.noise is None else self.noise
            scores = scores + torch.randn_like(scores) * (F.softplus(x @ weight) + NOISE_EPSILON)
        chosen, index = scores.softmax(-1).topk(self.config.top_k, dim=-1)
        # The published sum is of the softmax, not of the scores: rows sum to one but for the epsilon.
        return torch.zeros_like(scores).scatter(-1, index, chosen / (chosen.sum(-1, keepdim=True) + GATE_EPSILON))
