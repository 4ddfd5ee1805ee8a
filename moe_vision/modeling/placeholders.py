"""Placeholders of a prompt: as many as its images have tokens, and what becomes of those whose tokens are dropped."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache


def with_kept(placeholders: torch.Tensor, keep: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, T], false on the placeholders of image tokens that are not kept; keep: [tokens] of each image."""
    return torch.ones_like(placeholders).masked_scatter(placeholders, torch.cat(list(keep)))


def hidden_from(attention_mask: torch.Tensor | None, valid: torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """The mask [B, past + T] of a prompt without tokens that are not valid [B, T]. Raises ValueError if it is 4-D."""
    if attention_mask is None:
        past = cache.get_seq_length() if cache is not None else 0
        attention_mask = torch.ones(len(valid), past + valid.shape[1], dtype=torch.long, device=valid.device)
    if attention_mask.ndim != 2:
        raise ValueError(
            f"a selector drops tokens from a mask [B, T], and attention_mask is {tuple(attention_mask.shape)}: give "
            "one of two dimensions"
        )
    past = attention_mask.shape[1] - valid.shape[1]
    return torch.cat([attention_mask[:, :past], attention_mask[:, past:] * valid.to(attention_mask)], dim=1)


def check_placeholders(placeholders: int, tokens: int, image_token_id: int) -> None:
    """Raise ValueError unless the text has exactly one placeholder for each token of its images."""
    if placeholders != tokens:
        raise ValueError(
            f"the text has {placeholders} image placeholders (token {image_token_id}), the images give {tokens} "
            "tokens: make both with this model's processor, and do not truncate through an image"
        )


def without_dropped(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, valid: torch.Tensor, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B, T] without padding and the tokens that are not valid [B, T], padded on the left to the longest, and
    their mask."""
    if attention_mask is not None:
        valid = valid & attention_mask.bool()
    rows = [ids[chosen] for ids, chosen in zip(input_ids, valid, strict=True)]
    length = max(len(row) for row in rows)
    short = torch.stack([F.pad(row, (length - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    return short, mask
