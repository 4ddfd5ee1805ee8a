"""LLaVA-UHD's resampler as its paper has it (Guo et al., 2024): a few learned queries attend to the whole view.

Any grid of tokens becomes `num_queries` tokens. Queries and keys carry the place that they stand for, values do not.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from moe_vision.fusion.base import Adapter, AdapterConfig
from moe_vision.registry import ADAPTERS
from moe_vision.types import TokenShape, VisualTokens


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig(AdapterConfig):
    """num_queries: tokens of a view, a square number. num_heads: null for heads of 128 channels."""

    num_queries: int = 64
    num_heads: int | None = None

    def __post_init__(self) -> None:
        if self.num_queries < 1 or math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ValueError(
                f"num_queries {self.num_queries} of {self.type_name}: queries form a square, as 64 or 144 do"
            )
        if self.num_heads is not None and self.num_heads < 1:
            raise ValueError(f"num_heads {self.num_heads} of {self.type_name}: must be at least 1")

    @property
    def side(self) -> int:
        """Queries along one side of their square."""
        return math.isqrt(self.num_queries)

    def heads(self, hidden_size: int) -> int:
        return self.num_heads or max(hidden_size // 128, 1)

    def shape(self, inputs: TokenShape, hidden_size: int) -> TokenShape:
        if inputs.grid is None:
            raise ValueError(f"{self.type_name} needs tokens on a raster; this mixer gives none: choose another mixer")
        return TokenShape(self.num_queries, hidden_size, (self.side, self.side))

    def check_heads(self, width: int) -> None:
        """Raises ValueError where heads or positions do not divide the width."""
        heads = self.heads(width)
        if width % 4 or width % heads:
            raise ValueError(
                f"{self.type_name}: a width of {width} is no multiple of 4 and of {heads} heads: set num_heads to a "
                "divisor"
            )

    def build(self, inputs: TokenShape, hidden_size: int) -> Adapter:
        self.check_heads(hidden_size)
        return self.module()(self, inputs.channels, hidden_size)

    def module(self) -> "type[Resampler]":
        raise NotImplementedError(f"{type(self).__name__} must define module()")


@ADAPTERS.register("perceiver")
@dataclass(frozen=True, kw_only=True)
class PerceiverConfig(ResamplerConfig):
    """As `ResamplerConfig`; every query attends to all tokens.

    query_positions: whether queries carry a position, as in the paper and version 1 of the code. In versions 2 and 3 of
    LLaVA-UHD's code (`Resampler.forward` of `multimodal_projector/resampler.py`) only keys do.
    """

    query_positions: bool = True

    def module(self) -> "type[Resampler]":
        return Perceiver


class Resampler(Adapter):
    """Parameters of both resamplers; `attend` is what they differ in.

    projects: whether there are projections before and behind, or the attention works at the inputs' own width.
    half_positions: round the fixed positions to 16 bits, as SliME's published code does.
    """

    def __init__(
        self,
        config: ResamplerConfig,
        channels: int,
        hidden_size: int,
        projects: bool = True,
        half_positions: bool = False,
    ) -> None:
        super().__init__()
        self.config: ResamplerConfig = config
        self.half_positions = half_positions
        self.num_heads = config.heads(hidden_size)
        self.query = nn.Parameter(torch.empty(config.num_queries, hidden_size))
        self.input_proj = nn.Linear(channels, hidden_size, bias=False) if projects else nn.Identity()
        self.query_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.input_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.output_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        # A bias of the keys would move all of a query's scores alike: softmax does not see it, nor would it train.
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output_proj = nn.Linear(hidden_size, hidden_size, bias=False) if projects else nn.Identity()
        self.draw_weights()

    def draw_weights(self) -> None:
        init.trunc_normal_(self.query, std=0.02)
        if isinstance(self.output_proj, nn.Linear):
            init.normal_(self.output_proj.weight, std=self.output_proj.in_features**-0.5)

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Sine and cosine embedding of the queries' square, stretched over `grid`: [h * w, D]."""
        side = self.config.side
        table = sincos_positions(side, self.query.shape[1], self.query.device)
        if self.half_positions:
            table = table.half().float()
        if grid != (side, side):
            raster = table.T.unflatten(1, (side, side))[None]
            table = F.interpolate(raster, grid, mode="bicubic", align_corners=False)[0].flatten(1).T
        return table.to(self.query.dtype)

    def queries(self) -> torch.Tensor:
        """Projected queries [num_queries, D]; they depend on no input."""
        side = self.config.side
        return self.q_proj(self.query_norm(self.query) + self.positions((side, side)))

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """[V, h * w, C] on any grid → [V, num_queries, D]."""
        assert tokens.grid is not None  # shape() refused a mixer without a raster
        inputs = self.input_norm(self.input_proj(tokens.data))
        attended = self.out_proj(self.attend(inputs, tokens.grid))
        side = self.config.side
        return VisualTokens(self.output_proj(self.output_norm(attended)), (side, side))

    def attend(self, inputs: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Normalised inputs [V, h * w, D] → what the queries gather from their values, [V, num_queries, D]."""
        raise NotImplementedError(f"{type(self).__name__} must define attend()")


class Perceiver(Resampler):
    config: PerceiverConfig

    def queries(self) -> torch.Tensor:
        return super().queries() if self.config.query_positions else self.q_proj(self.query_norm(self.query))

    def attend(self, inputs: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        def by_head(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        keys = by_head(self.k_proj(inputs + self.positions(grid)))
        query = by_head(self.queries()[None].expand(inputs.shape[0], -1, -1))
        gathered = F.scaled_dot_product_attention(query, keys, by_head(self.v_proj(inputs)))
        return gathered.transpose(1, 2).flatten(2)


def sincos_positions(side: int, channels: int, device: torch.device) -> torch.Tensor:
    """Fixed embedding [side * side, channels] of a square, row by row: the first half tells the column, the second the
    row, each as sines and then cosines (MAE's function; LLaVA-UHD gives it the columns first)."""
    index = torch.arange(side, device=device, dtype=torch.float64)
    frequencies = 10000.0 ** -(torch.arange(channels // 4, device=device, dtype=torch.float64) / (channels / 4))
    angles = index[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat((columns, rows), dim=1).float()
