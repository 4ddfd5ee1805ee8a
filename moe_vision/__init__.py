"""moe-vision: mixtures of vision experts in multimodal language models.

>>> import moe_vision
>>> model, processor = moe_vision.load("run/model")

Names are resolved on first use, so that importing this package does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_vision.config import Config, ConfigError, load_config
    from moe_vision.evaluation import answer, evaluate
    from moe_vision.export import export
    from moe_vision.modeling.compose import compose, load
    from moe_vision.modeling.model_config import ModelConfig
    from moe_vision.registry import ADAPTERS, EXPERTS, MIXERS, SLICING

__version__ = "0.1.0"

_HOMES = {
    "ADAPTERS": "moe_vision.fusion",
    "Config": "moe_vision.config",
    "ConfigError": "moe_vision.config",
    "EXPERTS": "moe_vision.experts",
    "MIXERS": "moe_vision.fusion",
    "ModelConfig": "moe_vision.modeling.model_config",
    "SLICING": "moe_vision.slicing",
    "answer": "moe_vision.evaluation",
    "compose": "moe_vision.modeling.compose",
    "evaluate": "moe_vision.evaluation",
    "export": "moe_vision.export",
    "load": "moe_vision.modeling.compose",
    "load_config": "moe_vision.config",
}

__all__ = [
    "ADAPTERS", "EXPERTS", "MIXERS", "SLICING", "Config", "ConfigError", "ModelConfig", "answer", "compose", "evaluate",
    "export", "load", "load_config",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_vision' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
