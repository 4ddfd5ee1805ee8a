"""Scenes as vectors without pixels: each cell is a sum of learned embeddings of its facts.

The miniature language model learns to look things up here; an expert's projector later takes the place of the table.
"""

import torch
from torch import nn

from moe_vision.data.synthetic.scene import (
    BARS,
    CELLS_PER_SIDE,
    COLOURS,
    MAX_BAR,
    MAX_BLOB,
    SHAPES,
    TEXTURES,
    Blob,
    Chart,
    Item,
    Label,
    Scene,
    Shape,
    Texture,
)  # fmt: skip

KINDS = (type(None), Shape, Label, Chart, Texture, Blob)
MAX_FACTS = 6


def _offsets() -> dict[str, int]:
    sizes = {
        "nothing": 1, "row": CELLS_PER_SIDE, "column": CELLS_PER_SIDE, "kind": len(KINDS), "shape": len(SHAPES),
        "colour": len(COLOURS), "digit": 30, "bar": len(BARS) * (MAX_BAR + 1), "texture": len(TEXTURES),
        "blob": MAX_BLOB + 1,
    }  # fmt: skip
    offsets, total = {}, 0
    for name, size in sizes.items():
        offsets[name], total = total, total + size
    return offsets | {"total": total}


OFFSETS = _offsets()


def item_facts(item: Item | None) -> list[int]:
    """Fact numbers of an item, its kind first."""
    facts = [OFFSETS["kind"] + KINDS.index(type(item))]
    match item:
        case Shape():
            facts += [OFFSETS["shape"] + SHAPES.index(item.shape), OFFSETS["colour"] + COLOURS.index(item.colour)]
        case Label():
            facts += [OFFSETS["digit"] + 10 * place + int(digit) for place, digit in enumerate(item.digits)]
        case Chart():
            facts += [OFFSETS["bar"] + (MAX_BAR + 1) * bar + value for bar, value in enumerate(item.values)]
        case Texture():
            facts.append(OFFSETS["texture"] + TEXTURES.index(item.name))
        case Blob():
            facts.append(OFFSETS["blob"] + item.size)
    return facts


def scene_facts(scene: Scene) -> torch.Tensor:
    """Fact numbers [16, MAX_FACTS] of every cell, row by row; 0 fills up."""
    facts = torch.zeros(CELLS_PER_SIDE**2, MAX_FACTS, dtype=torch.long)
    for row in range(CELLS_PER_SIDE):
        for column in range(CELLS_PER_SIDE):
            place = [OFFSETS["row"] + row, OFFSETS["column"] + column]
            numbers = place + item_facts(scene.cells.get((row, column)))
            facts[row * CELLS_PER_SIDE + column, : len(numbers)] = torch.tensor(numbers)
    return facts


class FactTable(nn.Module):
    """Facts [..., MAX_FACTS] → cell vectors [..., D]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(OFFSETS["total"], hidden_size, mode="sum", padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, facts: torch.Tensor) -> torch.Tensor:
        return self.embedding(facts.flatten(0, -2)).unflatten(0, facts.shape[:-1])
