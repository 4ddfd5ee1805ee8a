"""Which tokens of a prompt are the user's question, told by the token ids that a chat template puts around turns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Turns:
    """starts: token ids before a user's turn, any of them. ends: those behind it, where the answer begins."""

    starts: list[list[int]] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)


def question_mask(input_ids: torch.Tensor, turns: Turns) -> torch.Tensor:
    """[B, T] → [B, T], true within users' turns; a row without any start of one is true as a whole."""
    events = torch.zeros_like(input_ids)  # 1 where a turn begins, -1 where one ends
    length = input_ids.shape[1]
    for ids in turns.starts:
        for row, column in found(input_ids, ids).nonzero().tolist():
            if column + len(ids) < length:
                events[row, column + len(ids)] = 1
    for ids in turns.ends:
        events[found(input_ids, ids)] = -1
    places = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    last = torch.where(events != 0, places, -1).cummax(dim=1).values
    inside = (last >= 0) & (events.gather(1, last.clamp(min=0)) == 1)
    return inside | ~(events == 1).any(dim=1, keepdim=True)


def found(input_ids: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """[B, T] → [B, T], true where the sequence `ids` begins."""
    places = torch.zeros_like(input_ids, dtype=torch.bool)
    if 0 < len(ids) <= input_ids.shape[1]:
        windows = input_ids.unfold(1, len(ids), 1)
        places[:, : windows.shape[1]] = (windows == torch.tensor(list(ids), device=input_ids.device)).all(-1)
    return places


QUESTIONS, ANSWER = ("what is in this picture", "where is it"), "a red square"


def turns_of(tokenizer: Any, template: str | None) -> Turns:
    """Token ids around the turns of a chat template, found by a conversation of two.

    Raises ValueError where the tokenizer has no template, or where its turns cannot be told apart by token ids.
    """
    cure = "give language_model.chat_template, or set the selector's `text: all`"
    if template is None:
        raise ValueError(
            f"the selector reads the question, and '{tokenizer.name_or_path}' has no chat template: {cure}"
        )
    messages = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    pieces = []
    cursor = 0
    for part in (QUESTIONS[0], ANSWER, QUESTIONS[1]):
        at = text.find(part, cursor)
        if at < 0:
            raise ValueError(f"the chat template of '{tokenizer.name_or_path}' does not print every turn: {cure}")
        pieces.append([i for i, (a, b) in zip(ids, offsets, strict=True) if cursor <= a and b <= at])
        cursor = at + len(part)
    pieces.append([i for i, (a, _) in zip(ids, offsets, strict=True) if a >= cursor])
    first, middle, second, last = pieces
    shared = common(first[::-1], second[::-1])[::-1]
    # A single plain token, as a colon, may stand anywhere: then what stands before each turn is taken as it is.
    distinct = len(shared) > 1 or (len(shared) == 1 and shared[0] in tokenizer.all_special_ids)
    starts = [shared] if distinct else [second, first[-max(len(second) - 1, 1) :]]
    turns = Turns([start for start in starts if start], [common(middle, last) or middle])
    mask = question_mask(torch.tensor([ids]), turns)[0]
    marked = tokenizer.decode([token for token, inside in zip(ids, mask.tolist(), strict=True) if inside])
    if "".join(marked.split()) != "".join("".join(QUESTIONS).split()):
        raise ValueError(
            f"the selector reads the question, and in the chat template of '{tokenizer.name_or_path}' that cannot be "
            f"told by its tokens (found {marked!r}): {cure}"
        )
    return turns


def common(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """What two sequences begin with alike."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return list(first[:length])
