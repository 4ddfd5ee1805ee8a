"""The text half of a folder that LLaVA's descendants published, in miniature."""

from transformers import LlamaTokenizer

LLAMA = {
    "vocab_size": 90, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip


def tokenizer() -> LlamaTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-\n"
    symbols = ["<unk>", "<s>", "</s>", "▁", *letters, "▁a", "▁t"]
    merges = [("▁", "a"), ("▁", "t")]
    return LlamaTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges, legacy=True)
