"""Records → batches: pictures decode in `__getitem__`, so that workers can do it; text is tokenised once, up front."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from moe_vision.data.chat import IGNORED, Tokenised, tokenise
from moe_vision.data.records import Record, load_image
from moe_vision.modeling import MoeVisionProcessor
from moe_vision.modeling.image_processing_moe_vision import join_views


class ConversationDataset(Dataset[dict[str, Any]]):
    """Tokenised records with what the model takes of their pictures.

    pictures: from the paths of a prompt's pictures to what the Collator takes; `views_of`, which decodes, if null.
    texts: the records' tokens, where they are known; made here if null.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: MoeVisionProcessor,
        pictures: Callable[[Sequence[Path]], dict[str, Any]] | None = None,
        texts: Sequence[Tokenised] | None = None,
    ) -> None:
        self.records = list(records)
        self.processor = processor
        self.pictures = pictures or partial(views_of, processor=processor)
        self.texts = [tokenise(record, processor) for record in self.records] if texts is None else list(texts)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, text = self.records[index], self.texts[index]
        item: dict[str, Any] = {"input_ids": text.input_ids, "labels": text.labels}
        if record.images:
            item |= self.pictures(record.images)
        return item


def views_of(images: Sequence[Path], processor: MoeVisionProcessor) -> dict[str, torch.Tensor]:
    """pixel_values [V, 3, H, W] in [0, 1] and image_sizes [V, 3] of the pictures of one prompt."""
    pictures = [load_image(path) for path in images]
    inputs = processor.image_processor(pictures, images_per_prompt=[len(images)] * len(images), return_tensors="pt")
    return {name: inputs[name] for name in ("pixel_values", "image_sizes")}


class Collator:
    """Pads a list of items on the right: input_ids, attention_mask, labels [B, T]; views, or what stands for them, are
    joined. logits_to_keep [K]: positions at which some row learns its next token; most are images and questions, and a
    vocabulary is large."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        length = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), length), self.pad_token_id)
        labels = torch.full((len(items), length), IGNORED)
        mask = torch.zeros(len(items), length, dtype=torch.long)
        for row, item in enumerate(items):
            size = len(item["input_ids"])
            ids[row, :size] = torch.tensor(item["input_ids"])
            labels[row, :size] = torch.tensor(item["labels"])
            mask[row, :size] = 1
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch["logits_to_keep"] = (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()
        for key, join in (("pixel_values", join_views), ("image_sizes", torch.cat), ("mixed_tokens", joined)):
            if parts := [item[key] for item in items if key in item]:
                batch[key] = join(parts)
        if maps := [item["feature_maps"] for item in items if "feature_maps" in item]:
            batch["feature_maps"] = {name: joined([known[name] for known in maps]) for name in maps[0]}
        return batch


def joined(parts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """[n, …] of the tensors in all parts: copied once, by a worker to where the training process reads it. Maps of
    large experts are 50 MB a picture."""
    return default_collate([tensor for part in parts for tensor in part])
