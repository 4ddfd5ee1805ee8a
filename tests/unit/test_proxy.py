"""The closed form: what it can read from maps, what it cannot, and that its shortcuts change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_vision.data.records import Record, Turn
from moe_vision.search.config import Proxy
from moe_vision.search.proxy import Item, RidgeProxy, answer_tokens, items_of
from moe_vision.training.features import Maps

WORDS = ["red", "green", "star", "circle"]
COLOURS, SHAPES = WORDS[:2], WORDS[2:]


def tokenise(answer: str) -> list[int]:
    return [ord(letter) for letter in answer]


def world(count: int, split: str) -> tuple[list[Record], dict[str, Maps]]:
    """Pictures with one star and one circle, each red or green, in any two cells; an expert for colours, one for
    shapes, each with a channel a word, and one that is blind."""
    generator = torch.Generator().manual_seed(len(split))
    maps = {name: Maps() for name in ("colour", "shape", "blind")}
    records = []
    for number in range(count):
        path = Path(f"{split}-{number}")
        cells = torch.randperm(16, generator=generator)[:2].tolist()
        colours = torch.randint(0, 2, (2,), generator=generator).tolist()
        found = {name: torch.randn(2, 16, generator=generator) * 0.05 for name in maps}
        for shape, (cell, colour) in enumerate(zip(cells, colours, strict=True)):
            found["colour"][colour, cell] += 1
            found["shape"][shape, cell] += 1
            turns = (Turn("user", f"<image>\ncolour of {SHAPES[shape]}"), Turn("assistant", COLOURS[colour]))
            records.append(Record(f"{path}-{shape}", (path,), turns, "colour"))
        for name, values in found.items():
            maps[name].add([path], values.view(1, 2, 4, 4))
    return records, maps


@pytest.fixture(scope="module")
def made() -> tuple[list[Record], list[Record], dict[str, Maps]]:
    train, maps = world(200, "train")
    asked, others = world(60, "validation")
    for name, own in others.items():
        maps[name].kept |= own.kept
    return train, asked, maps


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def proxy(made: tuple[list[Record], list[Record], dict[str, Maps]], **settings: Any) -> RidgeProxy:
    train, asked, maps = made
    return RidgeProxy(maps, train, asked, Proxy(grid=(4, 4), **settings), 0, tokenise)


def test_two_experts_tell_what_neither_does_alone(made: Any) -> None:
    """Which colour the star has is in no expert alone: it takes what both say of one cell."""
    ridge = proxy(made)
    together = share(ridge.right(("colour", "shape")))
    alone = [share(ridge.right((name,))) for name in ("colour", "shape", "blind")]
    assert together > 0.95
    assert alone[0] < 0.85 and alone[1] < 0.7 and alone[2] < 0.7  # two of a colour are told by their count
    assert share(ridge.right(("colour", "shape", "blind"))) > max(alone)


def test_the_order_of_experts_does_not_matter(made: Any) -> None:
    ridge = proxy(made)
    assert ridge.right(("colour", "shape")) == ridge.right(("shape", "colour"))
    assert ridge.right(("colour", "shape")) == proxy(made).right(("colour", "shape"))


def test_fewer_channels_than_there_are_still_tell(made: Any) -> None:
    wide = {name: Maps() for name in made[2]}
    mixing = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    for name, own in made[2].items():
        for path, value in own.kept.items():
            wide[name].add([path], torch.einsum("kc,chw->khw", mixing, value)[None])
    ridge = proxy((made[0], made[1], wide), channels=2)
    assert ridge.cells["colour"].shape[-1] == 2
    assert share(ridge.right(("colour", "shape"))) > 0.9


def test_records_are_a_sample_by_the_seed(made: Any) -> None:
    assert len(proxy(made, records=50).learnt) == 50
    few, many = (share(proxy(made, records=n).right(("colour", "shape"))) for n in (6, 400))
    assert few < many


def test_answers_are_compared_token_by_token() -> None:
    def item(answer: str) -> Item:
        return Item((), "q", answer)

    targets, wanted = answer_tokens([item("ab"), item("a")], [item("a"), item("ba"), item("abc"), item("z")], tokenise)
    assert targets.shape == (2, 3, 3)  # two letters and an end; a, b and the end
    a, b, end = 0, 1, 2
    assert targets.argmax(2).tolist() == [[a, b, end], [a, end, end]]
    assert wanted.tolist() == [[a, end, end], [b, a, end], [-1, -1, -1], [-1, end, end]]


def test_every_answer_of_a_conversation_is_learnt_and_the_last_is_asked() -> None:
    turns = (
        Turn("system", "be short"), Turn("user", "<image>\none"), Turn("assistant", "1 "), Turn("user", "two"),
        Turn("assistant", "2"),
    )  # fmt: skip
    record = Record("r", (Path("p"),), turns)
    assert [(i.question.strip(), i.answer) for i in items_of([record], last_only=False)] == [("one", "1"), ("two", "2")]
    assert [i.answer for i in items_of([record], last_only=True)] == ["2"]


def test_data_without_pictures_is_refused() -> None:
    record = Record("r", (), (Turn("user", "one"), Turn("assistant", "1")))
    with pytest.raises(ValueError, match="learns from questions about pictures, and the last stage's data has none"):
        RidgeProxy({"clip": Maps()}, [record], [record], Proxy(), 0, tokenise)
