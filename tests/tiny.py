"""A fused model with random weights, made in a second: for tests that need no knowledge, only shapes and rules."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from moe_vision.config import validate
from moe_vision.modeling import MoeVisionConfig, MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.compose import make_processor, marker_ids, question_turns
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.recipes.language_model import WORDS
from moe_vision.recipes.tokenizer import build_tokenizer

ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


Experts = Sequence[str] | dict[str, dict[str, Any]]
"""Names of families, or plain values of each expert by its name."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(WORDS)


def tiny_values(experts: Experts = ("clip", "sam"), **changes: Any) -> dict[str, Any]:
    """Plain values of a small model config with random weights, with `changes` on top."""
    return {
        "experts": experts
        if isinstance(experts, dict)
        else {name: {"variant": "micro", "pretrained": None} for name in experts},
        "branches": {
            "overview": {
                "mixer": {"type": "channel_concat", "grid": [4, 4]},
                "adapter": {"type": "mlp", "pool": 2},
            }
        },
        "language_model": {"architecture": ARCHITECTURE | {"vocab_size": len(tiny_tokenizer())}},
        **changes,
    }


def tiny_config(experts: Experts = ("clip", "sam"), **changes: Any) -> MoeVisionConfig:
    """The transformers config of `tiny_values`."""
    tokenizer = tiny_tokenizer()
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image_token_id, int)
    config = validate(ModelConfig, tiny_values(experts, **changes), source="tiny")
    return config.hf_config(image_token_id, marker_ids(config, tokenizer), question_turns(config, tokenizer))


def tiny_model(
    experts: Experts = ("clip", "sam"), seed: int = 0, **changes: Any
) -> tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor]:
    """Model and processor of `tiny_values`, seeded."""
    torch.manual_seed(seed)
    config = validate(ModelConfig, tiny_values(experts, **changes), source="tiny")
    hf_config = tiny_config(experts, **changes)
    model = MoeVisionForConditionalGeneration(hf_config).eval()
    with torch.no_grad():  # the default initialisation is so small that every answer would look alike
        for parameter in model.model.language_model.parameters():
            parameter.mul_(4)
    return model, make_processor(config, hf_config, tiny_tokenizer())
