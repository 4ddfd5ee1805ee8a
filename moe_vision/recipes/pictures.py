"""Generated scenes in memory, with the class of every fact in every cell: what the recipes train experts on."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from moe_vision.data.synthetic import Scene, make_scene, render, scene_seed
from moe_vision.data.synthetic.scene import BARS, CELLS_PER_SIDE, COLOURS, MAX_BAR, MAX_BLOB, SHAPES, TEXTURES
from moe_vision.recipes.symbols import KINDS, OFFSETS, scene_facts

IGNORED = -100

FIELDS: Mapping[str, tuple[int, int]] = {
    "kind": (OFFSETS["kind"], len(KINDS)),
    "shape": (OFFSETS["shape"], len(SHAPES)),
    "colour": (OFFSETS["colour"], len(COLOURS)),
    **{f"digit{place}": (OFFSETS["digit"] + 10 * place, 10) for place in range(3)},
    **{f"bar{bar}": (OFFSETS["bar"] + (MAX_BAR + 1) * bar, MAX_BAR + 1) for bar in range(len(BARS))},
    "texture": (OFFSETS["texture"], len(TEXTURES)),
    "blob": (OFFSETS["blob"], MAX_BLOB + 1),
}
"""What can be asked of a cell: the first fact number of each field, and how many there are."""


class Pictures:
    """Rendered scenes of one split in memory: pixels [S, 3, 128, 128] uint8 and facts [S, 16, MAX_FACTS]."""

    def __init__(self, split: str, count: int, seed: int) -> None:
        scenes: list[Scene] = [make_scene(scene_seed(split, index, seed)) for index in range(count)]
        self.pixels = torch.stack([torch.from_numpy(np.array(render(scene))).permute(2, 0, 1) for scene in scenes])
        self.facts = torch.stack([scene_facts(scene) for scene in scenes])

    def __len__(self) -> int:
        return len(self.pixels)

    def views(self, rows: torch.Tensor) -> torch.Tensor:
        """[V, 3, 128, 128] in [0, 1]."""
        return self.pixels[rows].float() / 255

    def field(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """Class of a field in every cell [V, 16]; IGNORED where the cell has no such field."""
        first, size = FIELDS[name]
        facts = self.facts[rows]
        inside = (facts >= first) & (facts < first + size)
        return torch.where(inside.any(-1), (facts - first).where(inside, 0).sum(-1), IGNORED)


def pooled_cells(data: torch.Tensor) -> torch.Tensor:
    """Feature map [V, C, h, w] → one vector a cell [V, 16, 4 C] of its four quarters, or [V, 16, C] at 4 x 4."""
    factor = data.shape[-1] // CELLS_PER_SIDE
    return F.pixel_unshuffle(data, factor).flatten(2).transpose(1, 2)
