"""Small tokenizers of the kinds that language models have, with the special tokens of a chat template."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import trl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moe_vision.modeling.chat_template import SHIPPED, TEMPLATES

TRL = {path.stem: path.read_text() for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
"""Chat templates of published language models, as TRL has them."""

OURS = {name: (TEMPLATES / f"{name}.jinja").read_text() for name in SHIPPED}

KINDS = ("byte_level", "byte_level_trimmed", "metaspace", "sentencepiece")
MARKS = re.compile(
    r"<[|｜][A-Za-z0-9_▁]+[|｜]>|<(?:start|end)_of_(?:turn|utterance|image)>|<turn\|>|<\|turn>|\[gMASK\]|<sop>"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CORPUS = (
    "is it a dog yes what is it cat which colour red how many two squares",
    "what is in the picture a red circle no zebra and the blue dog where is it",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: ASSISTANT: user assistant system",
    "You are a helpful assistant. Answer the questions.",
)


def marks(template: str) -> tuple[str, ...]:
    """Special tokens that a template writes."""
    return tuple(sorted(set(MARKS.findall(template)) - {*SPECIAL}))


@cache
def small_tokenizer(kind: str, marks: tuple[str, ...] = (), begins: bool = True) -> Any:
    """A tokenizer of a kind. begins: it puts <s> before every text, as Llama's do."""
    special = [*SPECIAL, *marks]
    trimmed = kind == "byte_level_trimmed"
    post = []
    if kind.startswith("byte_level"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trimmed)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        post.append(processors.ByteLevel(trim_offsets=trimmed))
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?'-<>[]/|_")
        special += [f"<0x{number:02X}>" for number in range(256)]
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if not kind.startswith("byte_level"):  # bytes are tokens of the model, not special ones
        values = json.loads(tokenizer.to_str())
        values["added_tokens"] = [t for t in values["added_tokens"] if not t["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(values))
    if kind == "metaspace":  # as converters of SentencePiece models write it today
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind == "sentencepiece":  # and as they did for Llama 2
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    if begins:
        bos = [("<s>", tokenizer.token_to_id("<s>"))]
        post.append(processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=bos))
    if post:
        tokenizer.post_processor = processors.Sequence(post)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=4096,
    )  # fmt: skip
