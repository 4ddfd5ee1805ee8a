"""Conversations → token ids and labels, by the tokenizer's own chat template; only answers are learnt."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from moe_vision.data.records import IMAGE_MARKER, Record, Turn, image_size
from moe_vision.modeling import MoeVisionProcessor
from moe_vision.slicing import PlanError

IGNORED = -100
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokenised:
    """Token ids with every image's placeholders, and labels: the id in answers, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def message(turn: Turn) -> dict[str, Any]:
    """A turn as a chat message; image markers become image parts, and the newline behind a marker goes with it."""
    if IMAGE_MARKER not in turn.text:
        return {"role": turn.role, "content": turn.text}
    parts: list[dict[str, str]] = []
    for i, text in enumerate(turn.text.split(IMAGE_MARKER)):
        if i:
            parts.append({"type": "image"})
            text = text.removeprefix("\n")
        if text:
            parts.append({"type": "text", "text": text})
    return {"role": turn.role, "content": parts}


def tokenise(record: Record, processor: MoeVisionProcessor) -> Tokenised:
    """Tokenise a record; an answer's label runs from its first token to the end token of its turn.

    Raises ValueError if the chat template does not print a conversation as the beginning of a longer one.
    """
    tokenizer = processor.tokenizer
    text, spans = answer_spans(record, processor)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = []
    labels: list[int] = []
    counts = iter(image_tokens(record.images, processor))
    for token, (start_at, end_at) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token == processor.image_token_id:
            count = next(counts)
            ids += [token] * count
            labels += [IGNORED] * count
        else:
            ids.append(token)
            learnt = any(start <= start_at and end_at <= end for start, end in spans)
            labels.append(token if learnt else IGNORED)
    return Tokenised(ids, labels)


def image_tokens(images: Sequence[Path], processor: MoeVisionProcessor) -> list[int]:
    """Placeholders of each image of one prompt, planned from the sizes in their headers.

    Raises PlanError naming the file whose size the slicing refuses.
    """
    policy = processor.image_processor.policy
    if policy.one_view:  # no header need be read
        return [policy.plan(policy.canvas).num_tokens] * len(images)
    counts = []
    for path in images:
        try:
            counts.append(policy.plan(image_size(path), len(images)).num_tokens)
        except PlanError as error:
            raise PlanError(f"image '{path}': {error}") from None
    return counts


def answer_spans(record: Record, processor: MoeVisionProcessor) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation, and where in it each answer begins and, with its end token, ends."""
    messages = [message(turn) for turn in record.turns]
    template: Any = processor.chat_template or processor.tokenizer.chat_template or ""
    if GENERATION_BLOCK.search(template):  # the template marks answers itself: one rendering, not two for each answer
        special = processor.tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **special
        )
        texts, marked = rendered
        text, end_token = texts[0], processor.tokenizer.eos_token or ""
        return text, [(a, b + len(end_token) * text.startswith(end_token, b)) for a, b in marked[0]]
    text = render(processor, messages)
    spans = []
    for i, turn in enumerate(record.turns):
        if turn.role == "assistant":
            start = render(processor, messages[:i], generation=True)
            end = text if i == len(messages) - 1 else render(processor, messages[: i + 1])
            if not (text.startswith(start) and text.startswith(end)):
                raise ValueError(
                    f"record {record.id!r}: the chat template rewrites earlier turns, so answers cannot be told from "
                    "questions; use a template that only appends"
                )
            spans.append((len(start), len(end)))
    return text, spans


def render(processor: MoeVisionProcessor, messages: list[dict[str, Any]], generation: bool = False) -> str:
    """Text of a conversation by the processor's chat template; `generation` opens the next answer."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is None:
        raise ValueError("the tokenizer has no chat template: choose a chat model, or set tokenizer.chat_template")
    return processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=generation
    )
