"""Compositions of every slicing policy in miniature, and pictures of several sizes."""

from typing import Any

import torch
from PIL import Image

NATIVE: dict[str, Any] = {"variant": "micro", "pretrained": None, "sizing": "native"}
FIXED: dict[str, Any] = {"variant": "micro", "pretrained": None}
FREE = {"type": "channel_concat", "grid": None}
QUERIES = {"type": "perceiver", "num_queries": 4, "num_heads": 2}
UHD = {"type": "uhd", "scale_resolution": 64, "patch_size": 16, "max_slices": 4}

COMPOSITIONS: dict[str, dict[str, Any]] = {
    "uhd, two experts, all views through one branch": {
        "experts": {"clip": NATIVE, "sam": NATIVE},
        "branches": {"shared": True, "overview": {"mixer": FREE, "adapter": QUERIES}},
        "slicing": UHD,
    },
    "uhd, cells": {
        "experts": {"clip": NATIVE},
        "branches": {"shared": True, "overview": {"mixer": FREE, "adapter": QUERIES | {"type": "cell"}}},
        "slicing": UHD | {"max_slices": 6},
    },
    "uhd, other experts for slices": {
        "experts": {"clip": FIXED, "sam": NATIVE, "convnext": FIXED},
        "branches": {
            "overview": {
                "experts": ["clip", "convnext"],
                "mixer": {"type": "channel_concat", "grid": [4, 4]},
                "adapter": {"type": "mlp", "pool": 2},
            },
            "slices": {"experts": ["sam", "clip"], "mixer": FREE, "adapter": QUERIES},
        },
        "slicing": UHD,
    },
    "tiles": {
        "experts": {"clip": FIXED, "eva02": FIXED},
        "branches": {
            "shared": True,
            "overview": {"mixer": {"type": "channel_concat", "grid": [4, 4]}, "adapter": {"type": "mlp", "pool": 2}},
        },
        "slicing": {"type": "tiles", "tile_size": 64, "max_tiles": 4, "start": "<", "end": ">"},
    },
    "anyres": {
        "experts": {"clip": FIXED},
        "branches": {"shared": True, "overview": {"mixer": FREE, "adapter": {"type": "mlp"}}},
        "slicing": {"type": "anyres", "tile_size": 64, "max_grid": 3, "max_views": 2},
    },
    "native": {
        "experts": {"clip": NATIVE, "pix2struct": NATIVE},
        "branches": {"overview": {"mixer": FREE, "adapter": {"type": "mlp", "merge": 2, "norm": "cell"}}},
        "slicing": {"type": "native", "factor": 32, "max_pixels": 128 * 128, "start": "[", "end": "]"},
    },
    "oryx": {
        "experts": {"clip": NATIVE},
        "branches": {"shared": True, "overview": {"mixer": FREE, "adapter": {"type": "mlp"}}},
        "slicing": {"type": "oryx", "low_size": 64, "max_size": 128},
    },
    "slime": {
        "experts": {"clip": FIXED, "sam": FIXED},
        "branches": {
            "overview": {"mixer": FREE, "adapter": {"type": "mlp"}},
            "slices": {"mixer": FREE, "adapter": QUERIES},
        },
        "slicing": {"type": "slime", "tile_size": 64, "max_tiles": 3},
    },
    "slime, its own adapters and a selector": {
        "experts": {"clip": FIXED},
        "branches": {
            "overview": {"mixer": FREE, "adapter": {"type": "gated_mixture", "num_heads": 2, "noise": False}},
            "slices": {
                "mixer": FREE,
                "adapter": {"type": "query_compressor", "num_queries": 4, "num_heads": 2, "projector": "overview"},
            },
            "selector": {"type": "similarity", "top_k": 5, "projection_size": 16},
        },
        "slicing": {"type": "slime", "tile_size": 64, "max_tiles": 3},
    },
    "uhd, a selector by share": {
        "experts": {"clip": NATIVE},
        "branches": {
            "shared": True,
            "overview": {"mixer": FREE, "adapter": QUERIES},
            "selector": {"type": "similarity", "top_p": 0.5, "reduce": "mean", "projection_size": 16, "text": "all"},
        },
        "slicing": UHD,
    },
}
SIZES = [(90, 140), (200, 64), (64, 64)]


def pictures(sizes: list[tuple[int, int]] = SIZES) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]
    return [Image.fromarray(image.numpy()) for image in noise]
