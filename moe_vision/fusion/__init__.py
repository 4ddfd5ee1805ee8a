"""Fusion: mixers bring many experts' maps to one set of tokens, adapters bring those to the language model.

{name: FeatureMap [V, C, h, w]} ─ Mixer ─ VisualTokens [V, N, C] ─ Adapter ─ VisualTokens [V, N', D]
"""

from moe_vision.fusion.base import Adapter, AdapterConfig, FusionConfig, Mixer, MixerConfig
from moe_vision.fusion.cell import Cell, CellConfig
from moe_vision.fusion.channel_concat import ChannelConcat, ChannelConcatConfig
from moe_vision.fusion.grid import adapt_grid, adapted_shape
from moe_vision.fusion.mlp import Mlp, MlpConfig
from moe_vision.fusion.perceiver import Perceiver, PerceiverConfig
from moe_vision.registry import ADAPTERS, MIXERS

__all__ = [
    "ADAPTERS", "MIXERS", "Adapter", "AdapterConfig", "Cell", "CellConfig", "ChannelConcat", "ChannelConcatConfig",
    "FusionConfig", "Mixer", "MixerConfig", "Mlp", "MlpConfig", "Perceiver", "PerceiverConfig", "adapt_grid",
    "adapted_shape",
]  # fmt: skip
