"""Prompts of imported checkpoints: the text that the published `conversation.py` of each system writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_vision.interop.prompts import CheckpointError, conversation, prompt_template
from moe_vision.modeling.compose import load_tokenizer
from moe_vision.modeling.model_config import LanguageModelConfig
from tests.published import YI_SENTENCEPIECE, llama3_tokenizer, write_sentencepiece

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cup"}]},
    {"role": "user", "content": [{"type": "text", "text": "which colour?"}]},
]

LLAMA_3_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\na cup<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nwhich colour?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
VICUNA = f"<s>{SYSTEM} USER: <image>\nwhat is it? ASSISTANT: a cup</s>USER: which colour? ASSISTANT:"
YI = (
    "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nwhat is it?<|im_end|>"
    "<|im_start|>assistant\na cup<|im_end|><|im_start|>user\nwhich colour?<|im_end|><|im_start|>assistant\n"
)
EAGLE_LLAMA_3 = f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>{LLAMA_3_TURNS}"
"""Without the two tokens for the beginning, of which Eagle's code puts one by its text and one by its tokenizer."""


def vicuna(folder: Path) -> None:
    write_sentencepiece(folder)


def llama3(folder: Path) -> None:
    llama3_tokenizer().save_pretrained(folder)


def yi(folder: Path) -> None:
    write_sentencepiece(folder, **YI_SENTENCEPIECE)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}')


@pytest.mark.parametrize(
    ("system", "write", "expected", "end"),
    [
        ("eagle", vicuna, VICUNA, "</s>"),
        ("eagle", yi, YI, "<|im_end|>"),
        ("eagle", llama3, f"<|begin_of_text|>{EAGLE_LLAMA_3}", "<|eot_id|>"),
        ("slime", vicuna, VICUNA, "</s>"),
        ("slime", llama3, f"<|begin_of_text|>{LLAMA_3_TURNS}", "<|eot_id|>"),
        ("llava-uhd", vicuna, VICUNA, "</s>"),
    ],
)
def test_the_prompt_is_the_published_one(
    tmp_path: Path, system: str, write: Callable[[Path], None], expected: str, end: str
) -> None:
    write(tmp_path)
    found = load_tokenizer(str(tmp_path), "<image>")
    published = conversation(system, found)
    assert published is not None and published.end == end
    found.chat_template = prompt_template(system, language(), found)
    text = found.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    assert text == expected
    # The end of an answer is learnt with it, and nothing else is.
    result = found.apply_chat_template(TURNS[:2], return_dict=True, return_assistant_tokens_mask=True)
    learnt = [i for i, keep in zip(result["input_ids"], result["assistant_masks"], strict=True) if keep]
    assert found.decode(learnt).strip() == f"a cup{end}"


def language(**values: Any) -> LanguageModelConfig:
    return LanguageModelConfig(architecture={"model_type": "llama"}, **values)


def test_a_template_that_is_given_wins(tmp_path: Path) -> None:
    llama3(tmp_path)
    (tmp_path / "own.jinja").write_text("mine")
    found = load_tokenizer(str(tmp_path), "<image>")
    assert prompt_template("slime", language(chat_template=str(tmp_path / "own.jinja")), found) == "mine"
    assert "USER: " in prompt_template("slime", language(chat_template="vicuna_v1"), found)


def test_a_tokenizer_of_no_known_family_needs_a_template(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, bos_piece="[B]", eos_piece="[E]")
    found = load_tokenizer(str(tmp_path), "<image>")
    with pytest.raises(CheckpointError, match=r"none of the families that slime .*language_model\.chat_template=NAME"):
        prompt_template("slime", language(), found)


def test_the_folders_name_decides_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "SliME-vicuna-7B"
    folder.mkdir()
    llama3(folder)
    published = conversation("slime", load_tokenizer(str(folder), "<image>"))
    assert published is not None and published.end == "<|eot_id|>"
