"""Conversations → token ids and labels, by the processor's chat template; only answers are learnt."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from moe_vision.data.faults import RecordFault
from moe_vision.data.records import IMAGE_MARKER, Record, Turn, image_size
from moe_vision.modeling import MoeVisionProcessor
from moe_vision.modeling.chat_rendering import answer_frame, render_chat, shortened, stand_in
from moe_vision.modeling.chat_template import SHIPPED, usable_template
from moe_vision.slicing import PlanError

IGNORED = -100

Token = tuple[int, int, int]
"""Id, and where its characters begin and end in the text."""


@dataclass(frozen=True)
class Tokenised:
    """Token ids with every image's placeholders, and labels: the id in answers, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def message(turn: Turn) -> dict[str, Any]:
    """A turn as a chat message. Image markers become image parts, without the newline after a marker. Whitespace
    around an answer is left out: its first and last token would be joined to those of the template.
    """
    if turn.role == "assistant":
        return {"role": turn.role, "content": turn.text.strip()}
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
    """Tokenise a record. Labels are the answers with their end-of-turn tokens. The tokens before the last answer are
    those of the generation prompt.

    Raises RecordFault where the chat template refuses the conversation, or where a text contains the image token.
    """
    text, spans = answer_spans(record, processor)
    check_texts(record.turns, f"record {record.id!r}: its text", processor)
    check_markers(text, len(record.images), f"record {record.id!r}: its text", processor)
    ids: list[int] = []
    labels: list[int] = []
    counts = iter(image_tokens(record.images, processor))
    for token, start, _ in encoded(text, [start for start, _ in spans], processor.tokenizer):
        if token == processor.image_token_id:
            count = next(counts)
            ids += [token] * count
            labels += [IGNORED] * count
        else:
            ids.append(token)
            learnt = any(first <= start < last for first, last in spans)
            labels.append(token if learnt else IGNORED)
    return Tokenised(ids, labels)


def check_texts(turns: Sequence[Turn], title: str, processor: MoeVisionProcessor) -> None:
    """Raises RecordFault for a text that contains a special token of the tokenizer, other than its image token: an
    answer would end in its middle, or a question would open a turn. title: what to call the text.
    """
    for turn in turns:
        text = turn.text.replace(IMAGE_MARKER, "")  # some tokenizers have a special token of this text
        for token in special_texts_but(processor.tokenizer, processor.image_token):
            if token in text:
                raise RecordFault(
                    f"{title} contains {token!r}, which is a special token of the tokenizer: remove it", "text"
                )


@lru_cache(maxsize=16)
def special_texts_but(tokenizer: Any, image_token: str) -> tuple[str, ...]:
    """Texts of the tokenizer's special tokens without the image token, which has a check of its own."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(token for token in special if token.strip() and token != image_token)


def check_markers(text: str, images: int, title: str, processor: MoeVisionProcessor) -> None:
    """Raises RecordFault unless a rendered conversation has one image token for each image. title: what to call it."""
    token = processor.image_token
    if text.count(token) != images:
        raise RecordFault(
            f"{title} contains {token!r}, which is the tokenizer's image token: remove it, or write {IMAGE_MARKER} "
            "where an image belongs",
            "markers",
        )


def encoded(text: str, cuts: Sequence[int], tokenizer: Any) -> Iterator[Token]:
    """Tokens of a text. None crosses a cut: a generation prompt ends there, and has to have the same tokens."""
    tokens = encoded_piece(text, tokenizer)
    crossed = [cut for cut in cuts if any(start < cut < end for _, start, end in tokens)]
    if not crossed:
        yield from tokens
        return
    yield from encoded_piece(text[: crossed[0]], tokenizer)
    for start, end in zip(crossed, [*crossed[1:], len(text)], strict=True):
        for token, first, last in continuation(text[start:end], tokenizer):
            yield token, first + start, last + start


def encoded_piece(text: str, tokenizer: Any) -> list[Token]:
    """Tokens of a text without special tokens of the tokenizer: the chat template prints them."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [
        (token, start, end) for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def continuation(text: str, tokenizer: Any) -> list[Token]:
    """Tokens of a text that follows another. SentencePiece puts a space before a text, so it is read after a newline,
    which is then removed."""
    tokens = encoded_piece("\n" + text, tokenizer)
    if any(start < 1 < end for _, start, end in tokens):
        return encoded_piece(text, tokenizer)
    return [(token, start - 1, end - 1) for token, start, end in tokens if start >= 1]


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
    """Text of a conversation up to its last answer, and where in it each answer begins and, with its end-of-turn token,
    ends. The text is the last answer's generation prompt with that answer added.

    Raises RecordFault where the chat template refuses the conversation or changes its answers.
    """
    messages = [message(turn) for turn in record.turns]
    answers = [index for index, turn in enumerate(record.turns) if turn.role == "assistant"]
    stands = {index: {"role": "assistant", "content": stand_in(index)} for index in answers}
    before = [stands.get(index, turn) for index, turn in enumerate(messages[: answers[-1]])]
    template = chat_template(processor)
    with refusals(f"record {record.id!r}: "):
        frame = answer_frame(processor.tokenizer, template)
        prompt = render_chat(processor.tokenizer, template, before, generation=True)
    prompt += f"{frame.gap}{stand_in(answers[-1])}{frame.last_end}{frame.tail}"
    text = ""
    spans = []
    for index in answers:
        if prompt.count(stand_in(index)) != 1:
            raise RecordFault(
                f"record {record.id!r}: the chat template does not print answer {index} once: {shortened(prompt)!r}; "
                "choose another language_model.chat_template",
                "text",
            )
        head, prompt = prompt.split(stand_in(index))
        text += head
        start = len(text) - len(frame.gap) * head.endswith(frame.gap)
        text += messages[index]["content"]
        end = frame.last_end if index == answers[-1] else frame.end
        spans.append((start, len(text) + len(end) * prompt.startswith(end)))
    return text + prompt, spans


@contextmanager
def refusals(title: str = "") -> Iterator[None]:
    """Turn the errors of a chat template, which may be of any kind, into a RecordFault."""
    try:
        yield
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise RecordFault(
            f"{title}the chat template refuses the conversation ({error}): change its turns, or choose another "
            "language_model.chat_template",
            "text",
        ) from None


def chat_template(processor: MoeVisionProcessor) -> str:
    """The processor's chat template, fit for images. Raises ValueError if it has none, or one that cannot be used."""
    template: Any = processor.chat_template or processor.tokenizer.chat_template
    if template is None:
        raise ValueError(
            "the tokenizer has no chat template: use a chat model, or set language_model.chat_template to one of "
            f"{', '.join(SHIPPED)}, or to a Jinja file"
        )
    return usable_template(processor.tokenizer, template, "the processor's chat template")


def render(processor: MoeVisionProcessor, messages: list[dict[str, Any]], generation: bool = False) -> str:
    """Text of a conversation by the processor's chat template; `generation` opens the next answer. Raises RecordFault
    where the template refuses the conversation.
    """
    template = chat_template(processor)
    with refusals():
        return render_chat(processor.tokenizer, template, messages, generation)
