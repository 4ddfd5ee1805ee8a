"""Fusion: mixers bring many experts' maps to one set of tokens, adapters bring those to the language model.

{name: FeatureMap [V, C, h, w]} ─ Mixer ─ VisualTokens [V, N, C] ─ Adapter ─ VisualTokens [V, N', D]
"""

from moe_vision.fusion.base import Adapter, AdapterConfig, FusionConfig, Mixer, MixerConfig
from moe_vision.fusion.base_expert import BaseExpertConfig
from moe_vision.fusion.cell import Cell, CellConfig
from moe_vision.fusion.channel_concat import ChannelConcat, ChannelConcatConfig
from moe_vision.fusion.deformable import Deformable, DeformableConfig
from moe_vision.fusion.gated_mixture import GatedMixture, GatedMixtureConfig
from moe_vision.fusion.grid import adapt_grid, adapted_shape
from moe_vision.fusion.mlp import Mlp, MlpConfig
from moe_vision.fusion.mr_adapter import MrAdapter, MrAdapterConfig
from moe_vision.fusion.patch_mining import PatchMining, PatchMiningConfig
from moe_vision.fusion.perceiver import Perceiver, PerceiverConfig
from moe_vision.fusion.query_compressor import QueryCompressor, QueryCompressorConfig
from moe_vision.fusion.region_attention import RegionAttention, RegionAttentionConfig
from moe_vision.fusion.selector import (
    PublishedConfig,
    PublishedSelector,
    RandomConfig,
    RandomSelector,
    Selection,
    Selector,
    SelectorConfig,
    Similarity,
    SimilarityConfig,
)
from moe_vision.fusion.sequence_append import SequenceAppend, SequenceAppendConfig
from moe_vision.registry import ADAPTERS, MIXERS, SELECTORS

__all__ = [
    "ADAPTERS", "MIXERS", "SELECTORS", "Adapter", "AdapterConfig", "BaseExpertConfig", "Cell", "CellConfig",
    "ChannelConcat", "ChannelConcatConfig", "Deformable", "DeformableConfig", "FusionConfig", "GatedMixture",
    "GatedMixtureConfig", "Mixer", "MixerConfig", "Mlp", "MlpConfig", "MrAdapter", "MrAdapterConfig", "PatchMining",
    "PatchMiningConfig", "Perceiver", "PerceiverConfig", "PublishedConfig", "PublishedSelector", "QueryCompressor",
    "QueryCompressorConfig", "RandomConfig", "RandomSelector", "RegionAttention", "RegionAttentionConfig", "Selection",
    "Selector", "SelectorConfig", "SequenceAppend", "SequenceAppendConfig", "Similarity", "SimilarityConfig",
    "adapt_grid", "adapted_shape",
]  # fmt: skip
