"""Eight tasks on a scene, one question each, and its dense caption. What is asked for stands at the question's end."""

import random
from dataclasses import dataclass

from moe_vision.data.synthetic.scene import (
    BARS,
    CELLS_PER_SIDE,
    Blob,
    Chart,
    Item,
    Label,
    Scene,
    Shape,
    Texture,
    cell_name,
)  # fmt: skip

TASKS = ("ocr", "count", "colour", "where", "relation", "chart", "texture", "area")
CAPTION_PROMPT = "describe"


@dataclass(frozen=True)
class QuestionAnswer:
    """One question of one task, and its only right answer."""

    task: str
    question: str
    answer: str


def questions(scene: Scene, rng: random.Random | None = None) -> list[QuestionAnswer]:
    """One question per task, in the order of `TASKS`; `rng`, the scene's own by default, draws what they ask about."""
    rng = rng or random.Random(scene.seed + 1)
    cells = list(scene.shapes)
    cell, other = rng.sample(cells, 2)
    shape = scene.shapes[cell]
    bar = rng.randrange(len(BARS))
    asked, answer = relation(cell, other, rng)
    label, chart, texture, blob = (scene.only(kind) for kind in (Label, Chart, Texture, Blob))
    assert isinstance(label, Label) and isinstance(chart, Chart)
    assert isinstance(texture, Texture) and isinstance(blob, Blob)
    return [
        QuestionAnswer("ocr", "read label", label.digits),
        QuestionAnswer("count", "how many shapes", str(len(cells))),
        QuestionAnswer("colour", f"colour of {shape.shape}", shape.colour),
        QuestionAnswer("where", f"where is {shape.shape}", cell_name(cell)),
        QuestionAnswer("relation", f"{shape.shape} {asked} {scene.shapes[other].shape}", answer),
        QuestionAnswer("chart", f"value of bar {BARS[bar]}", str(chart.values[bar])),
        QuestionAnswer("texture", "which texture", texture.name),
        QuestionAnswer("area", "size of blob", str(blob.size)),
    ]


def relation(cell: tuple[int, int], other: tuple[int, int], rng: random.Random) -> tuple[str, str]:
    """How `cell` lies to `other`: beside (left, right) or over (above, below); only what has an answer is asked."""
    possible = []
    if cell[1] != other[1]:
        possible.append(("beside", "left" if cell[1] < other[1] else "right"))
    if cell[0] != other[0]:
        possible.append(("over", "above" if cell[0] < other[0] else "below"))
    return rng.choice(possible)


def describe(item: Item | None) -> str:
    """One cell in words."""
    match item:
        case None:
            return "empty"
        case Shape():
            return f"{item.colour} {item.shape}"
        case Label():
            return f"label {item.digits}"
        case Chart():
            return "bars " + "".join(map(str, item.values))
        case Texture():
            return f"texture {item.name}"
        case Blob():
            return f"blob {item.size}"


def caption(scene: Scene) -> str:
    """Every cell in words, row by row: `a1 red star a2 empty a3 label 472 …`."""
    cells = [(row, column) for row in range(CELLS_PER_SIDE) for column in range(CELLS_PER_SIDE)]
    return " ".join(f"{cell_name(cell)} {describe(scene.cells.get(cell))}" for cell in cells)
