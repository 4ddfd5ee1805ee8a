"""How LLaVA-UHD's published code computes, written plainly on our modules' own weights: what the benchmark compares to.

After thunlp/LLaVA-UHD, branch LLaVA-UHD-v1: CLIP with attention scores in memory, all of its layers and every hidden
state kept; the resampler samples keys and values with RoIAlign and projects every sample. Version 1 runs view by view;
version 2 pads views to the longest and masks the padding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align
from transformers import CLIPVisionConfig, CLIPVisionModel

from moe_vision.experts import Expert
from moe_vision.experts.resolution import resize_positions
from moe_vision.fusion.cell import samples_of
from moe_vision.fusion.perceiver import Resampler


class PublishedClip(nn.Module):
    """CLIP as published, of the weights of our expert; the layers that ours leaves out have random ones."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert
        config = CLIPVisionConfig(**expert.config.settings)
        config._attn_implementation = "eager"
        self.model: Any = CLIPVisionModel(config)
        state = expert.get_submodule("model").state_dict()
        self.model.load_state_dict(state, strict=False)

    def embed(self, view: torch.Tensor) -> torch.Tensor:
        """One view [1, 3, h, w] in [0, 1] → its tokens with the class token, [1, 1 + n, C]."""
        embeddings, config = self.model.embeddings, self.expert.config
        mean, std = (torch.tensor(values).view(3, 1, 1).to(view) for values in config.statistics)
        patches = embeddings.patch_embedding((view - mean) / std)
        table = embeddings.position_embedding.weight
        side = config.native_size[0] // config.stride_px
        places = resize_positions(table[1:].view(1, side, side, -1), tuple(patches.shape[2:]), False)
        tokens = patches.flatten(2).transpose(1, 2) + places.flatten(1, 2)
        first = (embeddings.class_embedding + table[0]).expand(1, 1, -1)
        return torch.cat([first, tokens], dim=1)

    def hidden_states(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
        x = self.model.pre_layrnorm(tokens)
        states = [x]
        for layer in self.model.encoder.layers:
            x = layer(x, mask)
            states.append(x)
        return states

    def one_by_one(self, views: list[torch.Tensor]) -> list[torch.Tensor]:
        """Views [3, h, w] → tokens [1, n, C] of each, one forward pass for each."""
        return [self.hidden_states(self.embed(view[None]), None)[-2][:, 1:] for view in views]

    def padded(self, views: list[torch.Tensor]) -> list[torch.Tensor]:
        """Views [3, h, w] → tokens [1, n, C] of each, one forward pass of all with a mask over the padding."""
        embedded = [self.embed(view[None]) for view in views]
        lengths = [tokens.shape[1] for tokens in embedded]
        longest = max(lengths)
        joined = torch.cat([F.pad(tokens, (0, 0, 0, longest - tokens.shape[1])) for tokens in embedded])
        keys = torch.arange(longest, device=joined.device)[None] < torch.tensor(lengths, device=joined.device)[:, None]
        mask = torch.zeros_like(keys, dtype=joined.dtype).masked_fill(~keys, torch.finfo(joined.dtype).min)
        mask = mask[:, None, None, :].expand(-1, 1, longest, -1)
        found = self.hidden_states(joined, mask)[-2]
        return [found[row : row + 1, 1:length] for row, length in enumerate(lengths)]


def attention(resampler: Resampler) -> nn.MultiheadAttention:
    """torch's attention with a resampler's projections; keys get a bias of zero, as ours have none."""
    parts = (resampler.q_proj, resampler.k_proj, resampler.v_proj)
    width = resampler.q_proj.out_features
    module = nn.MultiheadAttention(width, resampler.num_heads).to(resampler.query)
    zeros = resampler.q_proj.bias.new_zeros(width)
    biases = [zeros if part.bias is None else part.bias for part in parts]
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        module.in_proj_bias.copy_(torch.cat(biases))
        module.out_proj.load_state_dict(resampler.out_proj.state_dict())
    return module.eval()


def cell(resampler: Resampler, attend: nn.MultiheadAttention, tokens: torch.Tensor, grid: tuple[int, int]) -> Any:
    """One view's tokens [1, h * w, C] → [1, queries, D]: RoIAlign of keys and values, then attention in each cell."""
    side, (height, width) = resampler.config.side, grid
    values = resampler.input_norm(resampler.input_proj(tokens))
    keys = values + resampler.positions(grid)
    boxes = torch.tensor(
        [
            [column * width / side, row * height / side, (column + 1) * width / side, (row + 1) * height / side]
            for row in range(side)
            for column in range(side)
        ]
    )
    across, down = samples_of(grid)

    def sampled(x: torch.Tensor) -> torch.Tensor:
        raster = x.transpose(1, 2).unflatten(2, grid).float()
        return roi_align(raster, [boxes.to(raster)], (down, across)).flatten(2).permute(2, 0, 1).to(x.dtype)

    query = resampler.query_norm(resampler.query) + resampler.positions((side, side))
    gathered = attend(query[None], sampled(keys), sampled(values))[0]  # [1, queries, D]: cells are the batch
    return resampler.output_proj(resampler.output_norm(gathered))


def perceiver(resampler: Resampler, attend: nn.MultiheadAttention, tokens: torch.Tensor, grid: tuple[int, int]) -> Any:
    """One view's tokens [1, h * w, C] → [1, queries, D]: every query attends to all of them."""
    side = resampler.config.side
    values = resampler.input_norm(resampler.input_proj(tokens))
    keys = values + resampler.positions(grid)
    query = resampler.query_norm(resampler.query) + resampler.positions((side, side))
    gathered = attend(query[:, None], keys.transpose(0, 1), values.transpose(0, 1))[0].transpose(0, 1)
    return resampler.output_proj(resampler.output_norm(gathered))
