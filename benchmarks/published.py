"""How the published Eagle towers compute, written plainly on our experts' own weights: what the benchmark compares to.

Sequential towers, resizing in fp32, attention with its scores and biases in memory, Pix2Struct padded to 2048 tokens.
From the description of NVlabs/Eagle at 783f656 with transformers 4.44: CLIP there has fused attention already, and
ConvNeXt nothing to change; both are taken as they are.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_vision.experts import Expert
from moe_vision.experts.eva02 import rotate, rotation
from moe_vision.experts.resolution import resize_positions

PADDED_TOKENS = 2048
"""Pix2Struct's `max_patches`; the published tower carries its padding through every layer."""


def sam(expert: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[V, 3, H, W] → [V, C, h, w], every [heads, tokens, tokens] score and bias in memory."""
    encoder = expert.model.vision_encoder
    x = encoder.patch_embed.projection(pixels).permute(0, 2, 3, 1)
    x = x + resize_positions(encoder.pos_embed, (x.shape[1], x.shape[2]), True)
    for layer in encoder.layers:
        residual, x = x, layer.layer_norm1(x)
        height, width = x.shape[1:3]
        if layer.window_size:
            x, padded = layer.window_partition(x, layer.window_size)
        x = sam_attention(layer.attn, x)
        if layer.window_size:
            x = layer.window_unpartition(x, layer.window_size, padded, (height, width))
        x = residual + x
        x = x + layer.mlp(layer.layer_norm2(x))
    return encoder.neck(x)


def sam_attention(attn: Any, x: torch.Tensor) -> torch.Tensor:
    batch, height, width, _ = x.shape
    heads = attn.num_attention_heads
    qkv = attn.qkv(x).reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.reshape(3, batch * heads, height * width, -1).unbind(0)
    scores = (query * attn.scale) @ key.transpose(-2, -1)
    at = query.view(batch * heads, height, width, -1)
    rows = torch.einsum("bhwc,hkc->bhwk", at, attn.relative(attn.rel_pos_h, height))
    columns = torch.einsum("bhwc,wkc->bhwk", at, attn.relative(attn.rel_pos_w, width))
    scores = (scores.view(-1, height, width, height, width) + rows[..., :, None] + columns[..., None, :]).view_as(
        scores
    )
    mixed = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
    mixed = mixed.view(batch, heads, height, width, -1).permute(0, 2, 3, 1, 4).reshape(batch, height, width, -1)
    return attn.proj(mixed)


def eva02(expert: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[V, 3, H, W] → [V, C, h, w], scores in memory, rotary tables in every block."""
    model = expert.model
    x = model.patch_embed(pixels)
    side = model.position_grid
    x = x + resize_positions(model.pos_embed[:, 1:].unflatten(1, (side, side)), (x.shape[1], x.shape[2]), False)
    for block in model.blocks:
        residual, x = x, block.norm1(x)
        _, height, width, channels = x.shape
        window = block.window(height, width)
        padded = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        rows, columns = padded.shape[1] // window[0], padded.shape[2] // window[1]
        tiles = padded.view(-1, rows, window[0], columns, window[1], channels).transpose(2, 3)
        windows = tiles.reshape(-1, window[0] * window[1], channels)
        mixed = eva02_attention(block.attn, windows, rotation(window, model.head_dim, model.rope_reference, x))
        tiles = mixed.view(-1, rows, columns, window[0], window[1], channels).transpose(2, 3)
        x = residual + tiles.reshape(padded.shape)[:, :height, :width]
        gate, up = block.mlp.w1(normed := block.norm2(x)), block.mlp.w2(normed)
        x = x + block.mlp.w3(block.mlp.ffn_ln(F.silu(gate) * up))
    return x.permute(0, 3, 1, 2)


def eva02_attention(attn: Any, x: torch.Tensor, by: Any) -> torch.Tensor:
    query, key, value = attn.q_proj(x) + attn.q_bias, attn.k_proj(x), attn.v_proj(x) + attn.v_bias
    query, key, value = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    query, key = rotate(query, by) * query.shape[-1] ** -0.5, rotate(key, by)
    return attn.proj(((query @ key.transpose(-2, -1)).softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


def pix2struct(expert: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[V, 3, H, W] → [V, C, h, w], padding carried along and a bias made of it in every layer."""
    model, patch = expert.model, expert.config.stride_px
    height, width = pixels.shape[2] // patch, pixels.shape[3] // patch
    tokens = height * width
    length = max(PADDED_TOKENS, tokens) if tokens > PADDED_TOKENS // 2 else tokens + 23
    blocks = pixels.unflatten(3, (width, patch)).unflatten(2, (height, patch))
    patches = blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    rows = torch.arange(1, height + 1, device=pixels.device).repeat_interleave(width)
    columns = torch.arange(1, width + 1, device=pixels.device).repeat(height)
    places = torch.stack([rows, columns], dim=-1).to(pixels.dtype).expand(len(pixels), -1, -1)
    flattened = F.pad(torch.cat([places, patches], dim=-1), (0, 0, 0, length - tokens))
    mask = (torch.arange(length, device=pixels.device) < tokens).to(pixels.dtype)
    x = model.embeddings(flattened)
    for layer in model.encoder.layer:
        normed, attn = layer.pre_attention_layer_norm(x), layer.attention
        query, key, value = (
            project(normed).unflatten(-1, (attn.n_heads, -1)).transpose(1, 2)
            for project in (attn.query, attn.key, attn.value)
        )
        scores = query @ key.transpose(-2, -1)
        bias = torch.zeros(1, attn.n_heads, length, length, dtype=x.dtype, device=x.device)
        bias = bias + (1 - mask).view(1, 1, 1, -1) * torch.finfo(x.dtype).min
        scores = scores + bias
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        x = x + attn.output((weights @ value).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.pre_mlp_layer_norm(x))
    return model.layernorm(x)[:, :tokens].transpose(1, 2).unflatten(2, (height, width))


PLAIN = {"sam": sam, "eva02": eva02, "pix2struct": pix2struct}
"""Plain forms by family; the others are plain already."""


def encode(expert: Expert, views: torch.Tensor) -> torch.Tensor:
    """One expert's map [V, C, h, w] of views in [0, 1], computed plainly."""
    pixels = expert.pixels(views)
    plain = PLAIN.get(expert.config.type_name)
    return expert.encode(pixels) if plain is None else plain(expert, pixels)


def concatenated(experts: Mapping[str, Expert] | nn.ModuleDict, mixer: Any, views: torch.Tensor) -> torch.Tensor:
    """Tokens [V, h * w, C]: one expert after the other, each brought to the grid in fp32, then stacked."""
    grid, parts = mixer.config.grid, []
    for name, expert in experts.items():
        data = encode(expert, views)  # type: ignore[arg-type]
        if mixer.config.resample.get(name, "bilinear") == "pixel_unshuffle":
            data = F.pixel_unshuffle(data, math.isqrt(data.shape[-2] * data.shape[-1] // (grid[0] * grid[1])))
        elif tuple(data.shape[-2:]) != tuple(grid):
            resized = F.interpolate(data.float(), grid, mode="bilinear", align_corners=mixer.config.align_corners)
            data = resized.to(data.dtype)
        parts.append(data.flatten(2).transpose(1, 2))
    return torch.cat(parts, dim=-1)
