"""Tiny language models of families that people use, each with its real special tokens, settings and chat template.

Weights are random; tokenizers are trained on a few lines of text, in the way that the family's own works: byte-level,
or SentencePiece's with bytes for what it does not know. Templates are those that TRL ships as the families publish
them. SmolLM2's and Mistral's are not among them: they are written here, with the published output for user and
assistant turns.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

TEXT = [
    "which colour is it", "is it black", *["yes", "no"] * 9, "red green blue black yes no",
    "You are a helpful assistant.",
    "system user model assistant",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face", "the cat sat on the mat",
]  # fmt: skip

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "'[/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def byte_level(special: list[str], bos: str | None = None) -> Tokenizer:
    """As GPT-2's, Llama 3's and Qwen's. bos: what the tokenizer itself puts first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    return with_bos(tokenizer, bos, processors.ByteLevel(trim_offsets=False))


def sentence_piece(special: list[str | AddedToken], bos: str | None = None, prefix: bool = True) -> Tokenizer:
    """As Llama 2's, Mistral's and Phi-3's, or, without the prefix, as Gemma's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spaces = [normalizers.Prepend("▁")] if prefix else []
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    known = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=known, show_progress=False)
    words = [f"▁{word}" for line in TEXT for word in line.split()]  # no token goes across words
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    return with_bos(tokenizer, bos, None)


def with_bos(tokenizer: Tokenizer, bos: str | None, processor: Any) -> Tokenizer:
    if bos is not None:
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        processor = template if processor is None else processors.Sequence([processor, template])
    if processor is not None:
        tokenizer.post_processor = processor
    return tokenizer


def trl_template(name: str) -> str:
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Family:
    """model_type and values: of the config. rows: of the embeddings beyond the tokenizer's. tokens: by the tokenizer's
    names for them. ends: what generation_config.json stops at. template: text, or a name of TRL's."""

    model_type: str
    tokenizer: Callable[[], Tokenizer]
    tokens: dict[str, str]
    ends: tuple[str, ...]
    template: str
    rows: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN = [*CHATML, "<|object_ref_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"]
LLAMA3 = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>",
]  # fmt: skip
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
PHI3 = [
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    *(AddedToken(f"<|{name}|>", special=True, rstrip=True) for name in ("assistant", "system", "end", "user")),
]
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
FAMILIES = {
    "llama-3": Family(
        "llama", lambda: byte_level(LLAMA3, "<|begin_of_text|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        "llama3", rows=8, values={"rope_parameters": ROPE, "tie_word_embeddings": False}, defaults=SAMPLING,
    ),
    "qwen-2.5": Family(
        "qwen2", lambda: byte_level(QWEN), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_end|>", "<|endoftext|>"), "qwen2_5", rows=40,
        values={"tie_word_embeddings": True}, defaults={**SAMPLING, "top_k": 20, "repetition_penalty": 1.05},
    ),
    "qwen-3": Family(
        "qwen3", lambda: byte_level(QWEN), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_end|>", "<|endoftext|>"), "qwen3", rows=40,
        values={"tie_word_embeddings": True, "head_dim": 16}, defaults={**SAMPLING, "top_k": 20},
    ),
    "smollm2": Family(
        "llama", lambda: byte_level(CHATML),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, ("<|im_end|>",), SMOLLM2,
        values={"tie_word_embeddings": True},
    ),
    "gemma": Family(
        "gemma3_text", lambda: sentence_piece(GEMMA, "<bos>", prefix=False),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ("<eos>", "<end_of_turn>"), "gemma3", rows=8,
        values={"tie_word_embeddings": True, "head_dim": 16, "sliding_window": 64},
        defaults={"do_sample": True, "top_k": 64, "top_p": 0.95},
    ),
    "phi-3": Family(
        "phi3", lambda: sentence_piece(PHI3),
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"},
        ("<|endoftext|>", "<|assistant|>", "<|end|>"), "phi3", rows=12, values={"tie_word_embeddings": False},
    ),
    "mistral": Family(
        "mistral", lambda: sentence_piece(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>"),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, ("</s>",), MISTRAL,
        values={"tie_word_embeddings": False, "sliding_window": 64},
    ),
}  # fmt: skip


def save_family(name: str, folder: Path) -> None:
    """A folder as the family publishes it: weights in bfloat16, tokenizer, template, generation defaults."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    backend = family.tokenizer()
    template = family.template if "{" in family.template else trl_template(family.template)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **family.tokens)
    ids: Any = tokenizer.convert_tokens_to_ids
    size = max(tokenizer.get_vocab().values()) + 1 + family.rows
    config = AutoConfig.for_model(
        family.model_type, vocab_size=size, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        **{"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id, **family.values},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    defaults = {"eos_token_id": [ids(token) for token in family.ends], "bos_token_id": tokenizer.bos_token_id,
                "pad_token_id": tokenizer.pad_token_id, **family.defaults}  # fmt: skip
    model.generation_config = GenerationConfig(**{k: v for k, v in defaults.items() if v is not None})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
