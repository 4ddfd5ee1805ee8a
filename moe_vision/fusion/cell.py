"""LLaVA-UHD's resampler as its code has it: each query attends to samples of its own cell of the view.

After thunlp/LLaVA-UHD, branch LLaVA-UHD-v1, multimodal_projector/adapt_spatial_resampler.py. The published order of
work samples first and projects every sample's key and value then, more of them than there are tokens. Projections are
linear, so here none is made of a sample: a query takes the key projection upon itself, once for all views, and the
value projection follows the attention, once for each query.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from moe_vision.fusion.perceiver import Resampler, ResamplerConfig
from moe_vision.registry import ADAPTERS

SAMPLES = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))
"""Samples across and down a cell; the pair nearest to the view's shape is taken."""

CACHED_CHANNELS = 256
"""Channels of a view's samples that are held at a time on a CPU where no gradient is needed: what its cache keeps."""


@ADAPTERS.register("cell")
@dataclass(frozen=True, kw_only=True)
class CellConfig(ResamplerConfig):
    """As `ResamplerConfig`. align: `centered` samples a cell about its centre; `reference` half a token further right
    and down, and past the edge of thin views, as the published code does: for imported checkpoints.
    """

    num_queries: int = 144
    align: Literal["centered", "reference"] = "centered"

    def module(self) -> type[Resampler]:
        return Cell


class Cell(Resampler):
    config: CellConfig
    cached: tuple[Any, torch.Tensor] | None = None

    def attend(self, inputs: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        absorbed = self.absorbed_queries()  # [Q, heads, D]
        places = self.sample(self.positions(grid)[None].to(inputs.dtype), grid)[0]
        bias = torch.matmul(absorbed, places.transpose(-1, -2))  # [Q, heads, S]: what places add to the scores
        if torch.is_grad_enabled() or inputs.device.type != "cpu":
            gathered = self.gather(inputs, grid, absorbed, bias, inputs.shape[-1])
        else:
            views = [self.gather(view, grid, absorbed, bias, CACHED_CHANNELS) for view in inputs.split(1)]
            gathered = torch.cat(views)
        # Weights sum to one, so the value's bias passes through whole.
        return gathered + self.v_proj.bias

    def gather(
        self, inputs: torch.Tensor, grid: tuple[int, int], absorbed: torch.Tensor, bias: torch.Tensor, channels: int
    ) -> torch.Tensor:
        """What each query gathers of the values of inputs [V, h * w, D] in its cell, so many channels at a time:
        [V, Q, D]."""
        value = self.v_proj.weight.unflatten(0, (self.num_heads, -1))  # [heads, head size, D]
        parts = [self.sample(part, grid) for part in inputs.split(channels, dim=-1)]  # [V, Q, S, d] each
        scores = bias.expand(len(inputs), -1, -1, -1)
        for part, query in zip(parts, absorbed.split(channels, dim=-1), strict=True):
            scores = scores + torch.matmul(query, part.transpose(-1, -2))
        weights = scores.softmax(-1, dtype=torch.float32).to(inputs.dtype)  # [V, Q, heads, S]
        gathered: torch.Tensor | float = 0.0
        for part, projection in zip(parts, value.split(channels, dim=-1), strict=True):
            by_head = torch.matmul(weights, part).permute(2, 0, 1, 3).flatten(1, 2)  # [heads, V * Q, d]
            gathered = gathered + torch.bmm(by_head, projection.transpose(1, 2))
        assert isinstance(gathered, torch.Tensor)
        return gathered.unflatten(1, (len(inputs), -1)).permute(1, 2, 0, 3).flatten(2)

    def absorbed_queries(self) -> torch.Tensor:
        """Queries times the key projection of their head, scaled: [Q, heads, D]; kept while no weight changes."""
        parameters = (self.query, *self.query_norm.parameters(), *self.q_proj.parameters(), self.k_proj.weight)
        keeps = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not keeps or any(parameter.is_inference() or parameter.is_meta for parameter in parameters):
            return self.absorb()
        state = [(parameter.data_ptr(), parameter._version, parameter.dtype) for parameter in parameters]
        if self.cached is None or self.cached[0] != state:
            self.cached = (state, self.absorb())
        return self.cached[1]

    def absorb(self) -> torch.Tensor:
        queries = self.queries().unflatten(-1, (self.num_heads, -1))  # [Q, heads, head size]
        keys = self.k_proj.weight.unflatten(0, (self.num_heads, -1))  # [heads, head size, D]
        return torch.einsum("qhc,hcd->qhd", queries, keys) * queries.shape[-1] ** -0.5

    def sample(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[V, h * w, D] → samples of each query's cell, [V, Q, S, D]: interpolation along rows, then columns."""
        side, (across, down) = self.config.side, samples_of(grid)
        centered = self.config.align == "centered"
        rows = sampling_matrix(grid[0], side, down, centered).to(x)
        columns = sampling_matrix(grid[1], side, across, centered).to(x)
        by_rows = torch.einsum("rh,vhwd->vrwd", rows, x.unflatten(1, grid))
        samples = torch.einsum("cw,vrwd->vrcd", columns, by_rows)
        cells = samples.unflatten(2, (side, across)).unflatten(1, (side, down)).transpose(2, 3)
        return cells.flatten(3, 4).flatten(1, 2)


def samples_of(grid: tuple[int, int]) -> tuple[int, int]:
    """Samples (across, down) of a cell, by the shape of a view's grid (height, width)."""
    log_ratio = math.log(grid[1] / grid[0])
    return min(SAMPLES, key=lambda pair: abs(log_ratio - math.log(pair[0] / pair[1])))


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # because it is kept: what is made in inference mode can take no part in training later
def sampling_matrix(length: int, cells: int, bins: int, centered: bool) -> torch.Tensor:
    """Weights [cells * bins, length] with which each bin of each cell reads a line of `length` tokens.

    One direction of torchvision's `roi_align`, which samples bilinearly and averages within a bin; `centered` is its
    `aligned`. Places beyond the line by more than a token count as zero, nearer ones as its end.
    """
    # On the CPU whatever device is the default, because it is kept for later calls.
    matrix = torch.zeros(cells * bins, length, dtype=torch.float64, device="cpu")
    for cell in range(cells):
        start, width = cell * length / cells, length / cells
        start, width = (start - 0.5, width) if centered else (start, max(width, 1.0))
        points = math.ceil(width / bins)
        for position in range(bins):
            for point in range(points):
                place = start + (position + (point + 0.5) / points) * width / bins
                if not -1.0 <= place <= length:
                    continue
                place = min(max(place, 0.0), length - 1.0)
                low = min(int(place), length - 1)
                high = min(low + 1, length - 1)
                matrix[cell * bins + position, low] += (1 - (place - low)) / points
                matrix[cell * bins + position, high] += (place - low) / points
    return matrix.float()
