"""Folders that LLaVA's descendants published, in miniature: tokenizers, language models, shards."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

LLAMA = {
    "vocab_size": 90, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip
GOLDEN = Path(__file__).parent / "golden" / "uhd"
CLIP = json.loads((GOLDEN / "manifest.json").read_text())["adapt_clip"]["config"]
UHD_OVERRIDES = [
    "experts.clip.architecture="
    + json.dumps(
        {
            "hidden_size": CLIP["hidden"], "intermediate_size": CLIP["inter"], "num_hidden_layers": CLIP["layers"],
            "num_attention_heads": CLIP["heads"], "image_size": CLIP["image_size"], "patch_size": CLIP["patch"],
        }
    ),
    "experts.clip.image_size=[112, 112]",
    "experts.clip.mean=[0, 0, 0]",
    "experts.clip.std=[1, 1, 1]",
    "slicing.scale_resolution=112",
    "branches.overview.adapter.num_queries=16",
    "branches.overview.adapter.num_heads=2",
]  # fmt: skip
"""What makes LLaVA-UHD's released composition as small as the golden weights, which take pixels as they are."""

UHD_CONFIG = {
    "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "/models/openai/clip-vit-large-patch14-336", "mm_projector_type": "adapt_spatial_resampler_v1",
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
    "tie_word_embeddings": False,
}  # fmt: skip
UHD_LLAMA = LLAMA | {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}

TEXT = """A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,
and polite answers to the user's questions. USER: What is written on the sign? ASSISTANT: It says 20, 45 and 1999.
system Answer the questions. user what is this assistant a red cup, two blue plates; (three) spoons - and a naive cafe!
""".splitlines()


def tokenizer() -> LlamaTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-\n"
    symbols = ["<unk>", "<s>", "</s>", "▁", *letters, "▁a", "▁t"]
    merges = [("▁", "a"), ("▁", "t")]
    return LlamaTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges, legacy=True)


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with Llama 3's special tokens and its own chat template, which no system here was trained with."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    special = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in special])
    begin = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin[0], eos_token="<|end_of_text|>",
        chat_template="{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['content'] }}{% endfor %}",
    )  # fmt: skip


def write_sentencepiece(folder: Path, **settings: Any) -> int:
    """Train a `tokenizer.model` as Llama's (byte pairs, identity, byte fallback) unless `settings` differ; its size."""
    data = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=data, minloglevel=2,
        **{
            "model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "split_digits": True, "pad_id": -1,
            "unk_id": 0, "bos_id": 1, "eos_id": 2, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "hard_vocab_limit": False,
            **settings,
        },
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(data.getvalue())
    return int(settings.get("vocab_size", 400))


YI_SENTENCEPIECE = {
    "add_dummy_prefix": False, "bos_piece": "<|startoftext|>", "eos_piece": "<|endoftext|>",
    "user_defined_symbols": ["<|im_start|>", "<|im_end|>"],
}  # fmt: skip
"""What sets Yi's `tokenizer.model` apart from Llama's (01.AI, "Yi: Open Foundation Models", 2024, section 2.1)."""


def uhd_state(values: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a LLaVA-UHD folder by its published name, the language model's large enough to matter."""
    torch.manual_seed(seed)
    llama = LlamaForCausalLM(LlamaConfig(**values))
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(4)
    clip = load_file(GOLDEN / "adapt_clip_weights.safetensors")
    parts = load_file(GOLDEN / "spatial_schema.safetensors")
    state = {f"model.vision_tower.vision_tower.{key}": value for key, value in clip.items()}
    state |= {f"model.mm_projector.{k.removeprefix('proj.')}": v for k, v in parts.items() if k.startswith("proj.")}
    return {**state, **llama.state_dict()}


def write_shards(folder: Path, state: Mapping[str, torch.Tensor], suffix: str = ".safetensors") -> list[Path]:
    """Two shards and their index, as published."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = list(state)
    files, weight_map = [], {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = folder / f"{stem}-0000{i}-of-00002{suffix}"
        tensors = {name: state[name].clone() for name in part}
        save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return files
