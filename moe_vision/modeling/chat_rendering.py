"""Render conversations with a chat template, and find what it prints around an answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

Message = Mapping[str, Any]


def render_chat(
    tokenizer: Any, template: str, messages: Sequence[Message], generation: bool = False, **variables: Any
) -> str:
    """Text of a conversation. `generation` opens the next answer. variables: others of the template.

    Raises jinja2.TemplateError, as templates do.
    """
    try:
        rendered: Any = render_jinja_template(
            [[dict(message) for message in messages]],
            chat_template=template,
            add_generation_prompt=generation,
            **{**tokenizer.special_tokens_map, **variables},
        )
    except OverflowError as error:  # a loop that is longer than Jinja's sandbox allows
        raise TemplateError(str(error)) from None
    text: str = rendered[0][0]
    return text


def turn(role: str, text: str) -> dict[str, str]:
    """A message with plain text."""
    return {"role": role, "content": text}


def stand_in(index: int) -> str:
    """Text in place of answer `index`. Its characters are for private use, so no conversation has it."""
    return f"\ue0a0{index}\ue0a1"


def first_special(tokenizer: Any, text: str) -> str:
    """The beginning of `text` up to its first special token, if only whitespace comes before that; else ''."""
    found = special_pattern(tuple(special_texts(tokenizer))).match(text)
    return "" if found is None else found.group()


def special_texts(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer always reads as one token, without those for runs of whitespace."""
    return [text for text in tokenizer.get_added_vocab() if text.strip()]


@lru_cache(maxsize=16)
def special_pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    """Whitespace and one of the texts, the longest that fits."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, longest))})" if texts else "(?!)")


@dataclass(frozen=True)
class AnswerFrame:
    """What a template prints around an answer.

    gap: spaces between the generation prompt and an answer, which tokenizers join to the answer's first word.
    end: the end of an answer that another turn follows, up to its end-of-turn token; '' where there is none.
    last_end: the same for the last answer of a conversation. tail: what the template prints after that.
    """

    gap: str
    end: str
    last_end: str
    tail: str


@lru_cache(maxsize=16)
def answer_frame(tokenizer: Any, template: str) -> AnswerFrame:
    """Find the frame by rendering two short conversations. Raises ValueError if the template loses the answer."""
    question, answer, more = turn("user", "question one"), turn("assistant", stand_in(0)), turn("user", "question two")
    prompt = render_chat(tokenizer, template, [question], generation=True)
    before, after = split_at(render_chat(tokenizer, template, [question, answer, more]), stand_in(0))
    _, last = split_at(render_chat(tokenizer, template, [question, answer]), stand_in(0))
    gap = before.removeprefix(prompt) if before.startswith(prompt) else ""
    end, last_end = first_special(tokenizer, after), first_special(tokenizer, last)
    if end == last_end:  # Cohere 2 ends its answers with two tokens
        while (more_end := first_special(tokenizer, last[len(end) :])) and after.startswith(end + more_end):
            if more_end != more_end.strip():
                break
            end = last_end = end + more_end
    if not last_end:  # GLM 4.5 ends an answer with the token that opens the user's next turn
        last = last_end = end
    return AnswerFrame("" if gap.strip() else gap, end, last_end, last.removeprefix(last_end))


def split_at(text: str, part: str) -> tuple[str, str]:
    """Text before and after a part. Raises ValueError unless it occurs exactly once."""
    pieces = text.split(part)
    if len(pieces) != 2:
        raise ValueError(f"the chat template prints an answer {len(pieces) - 1} times: {shortened(text)!r}")
    return pieces[0], pieces[1]


def shortened(text: str, length: int = 300) -> str:
    """The end of a long text."""
    return text if len(text) <= length else f"…{text[-length:]}"


def end_of_turn_ids(tokenizer: Any, template: str | None) -> list[int]:
    """Ids of the tokens that end an answer under a chat template: generation must stop at any of them.

    The list is empty without a template, or where it prints no special token after an answer.
    """
    if template is None:
        return []
    try:
        frame = answer_frame(tokenizer, template)
    except (ValueError, TemplateError):
        return []
    ends = [tokenizer(end, add_special_tokens=False)["input_ids"][-1:] for end in (frame.end, frame.last_end)]
    return list(dict.fromkeys(token for ids in ends for token in ids))


def mark_as_special(tokenizer: Any, ids: Sequence[int]) -> None:
    """Make tokens special, so that an answer is decoded without them: some tokenizers have the token that ends a turn
    as a plain added token."""
    texts = [tokenizer.convert_ids_to_tokens(token) for token in ids if token not in tokenizer.all_special_ids]
    if texts:
        special = [AddedToken(text, special=True, normalized=False) for text in texts]
        tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
