"""A fused model small enough to build in a test, with random weights from a fixed seed."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast

from moe_vision.modeling import (
    MoeVisionConfig,
    MoeVisionForConditionalGeneration,
    MoeVisionImageProcessor,
    MoeVisionProcessor,
)
from moe_vision.recipes.tokenizer import build_tokenizer

WORDS = ("what", "is", "this", "a", "red", "circle", "in", "the", "picture")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(WORDS)


def tiny_config(
    experts: Sequence[str] = ("clip", "sam"), vocab_size: int = 512, image_token_id: int = 3
) -> MoeVisionConfig:
    """Micro experts on a grid of 8 x 8, pooled to 16 tokens, before a llama of two layers."""
    return MoeVisionConfig(
        vision_config={
            "experts": [{"name": name, "type": name, "variant": "micro"} for name in experts],
            "branches": {
                "overview": {
                    "mixer": {"type": "channel_concat", "grid": [8, 8]},
                    "adapter": {"type": "mlp", "pool": 2},
                }
            },
        },
        text_config={
            "model_type": "llama", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab_size, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
        },
        image_token_id=image_token_id,
    )  # fmt: skip


def tiny_model_and_processor(
    experts: Sequence[str] = ("clip", "sam"), seed: int = 0
) -> tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor]:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = tiny_config(experts, len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    model = MoeVisionForConditionalGeneration(config).eval()
    processor = MoeVisionProcessor(
        image_processor=MoeVisionImageProcessor(size={"height": 128, "width": 128}),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=tokenizer.chat_template,
    )
    return model, processor
