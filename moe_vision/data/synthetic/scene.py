"""Scenes as facts: what stands in each of 4 x 4 cells. Pure and deterministic by seed; pixels come in `render.py`."""

import random
from dataclasses import dataclass

CELLS_PER_SIDE = 4
CELL_PX = 32
IMAGE_PX = CELLS_PER_SIDE * CELL_PX

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
TEXTURES = ("rows", "columns", "slants", "checks", "dots", "mesh")
BARS = ("red", "green", "blue")
MAX_BAR = 9
MAX_BLOB = 6
ROWS, COLUMNS = "abcd", "1234"

SPLITS = {"train": 0, "val": 1, "test": 3}
"""Every split draws from its own range of seeds, so that no scene is in two. Range 2 was used up while the miniature's
settings were chosen; nothing is chosen on `test`."""
SEEDS_PER_SPLIT = 10_000_000


@dataclass(frozen=True)
class Shape:
    """A coloured shape."""

    shape: str
    colour: str


@dataclass(frozen=True)
class Label:
    """Three printed digits."""

    digits: str


@dataclass(frozen=True)
class Chart:
    """Three bars, of 1 to 9 units, in the order of `BARS`."""

    values: tuple[int, int, int]


@dataclass(frozen=True)
class Texture:
    """A fine texture with a period of 4 pixels."""

    name: str


@dataclass(frozen=True)
class Blob:
    """A faint disc of one of six sizes."""

    size: int


Item = Shape | Label | Chart | Texture | Blob


@dataclass(frozen=True)
class Scene:
    """Items by cell (row, column); a cell that is not named is empty. `seed` also draws the renderer's jitter."""

    seed: int
    cells: dict[tuple[int, int], Item]

    @property
    def shapes(self) -> dict[tuple[int, int], Shape]:
        return {cell: item for cell, item in self.cells.items() if isinstance(item, Shape)}

    def only(self, kind: type) -> Item:
        """The one item of a kind that every scene has once."""
        return next(item for item in self.cells.values() if isinstance(item, kind))


def cell_name(cell: tuple[int, int]) -> str:
    """`a1` is the upper left cell, `d4` the lower right one."""
    return ROWS[cell[0]] + COLUMNS[cell[1]]


def scene_seed(split: str, index: int, seed: int = 0) -> int:
    """Seed of scene `index` of a split. Raises KeyError for an unknown split, ValueError beyond the split's range."""
    number = seed * 100_000 + index
    if not 0 <= number < SEEDS_PER_SPLIT:
        raise ValueError(
            f"scene {index} with seed {seed} of split '{split}': seed must be 0..99 and index below 100,000"
        )
    return SPLITS[split] * SEEDS_PER_SPLIT + number


def make_scene(seed: int) -> Scene:
    """Draw a scene: a label, a chart, a texture, a blob, and two to six shapes of different kinds."""
    rng = random.Random(seed)
    count = rng.randint(2, len(SHAPES))
    items: list[Item] = [Shape(shape, rng.choice(COLOURS)) for shape in rng.sample(SHAPES, count)]
    items.append(Label("".join(rng.choice("0123456789") for _ in range(3))))
    items.append(Chart((rng.randint(1, MAX_BAR), rng.randint(1, MAX_BAR), rng.randint(1, MAX_BAR))))
    items.append(Texture(rng.choice(TEXTURES)))
    items.append(Blob(rng.randint(1, MAX_BLOB)))
    all_cells = [(row, column) for row in range(CELLS_PER_SIDE) for column in range(CELLS_PER_SIDE)]
    return Scene(seed, dict(zip(rng.sample(all_cells, len(items)), items, strict=True)))
