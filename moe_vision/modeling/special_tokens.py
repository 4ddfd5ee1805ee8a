"""Special tokens that a tokenizer adds around a text: a chat template prints them too, and a prompt has them once."""

from collections.abc import Sequence
from typing import Any


def added_special_tokens(tokenizer: Any) -> tuple[str, str]:
    """Texts of the special tokens that the tokenizer puts before and after every text, as ('<s>', '')."""
    plain, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            around = (whole[:start], whole[start + len(plain) :])
            before, after = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in around)
            return before, after
    return "", ""


def with_special_tokens_once(texts: Sequence[str], tokenizer: Any) -> tuple[list[str], bool]:
    """Prompts to tokenise, and whether the tokenizer has to add its special tokens to them.

    It has to where no prompt begins with them. Prompts that a chat template wrote begin with them. An end token is not
    added: an answer follows a prompt.
    """
    before, after = added_special_tokens(tokenizer)
    begun = [text.startswith(before) for text in texts]
    if not any(begun) and not after:
        return list(texts), True
    return [text if done else before + text for text, done in zip(texts, begun, strict=True)], False
