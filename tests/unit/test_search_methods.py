"""Decisions of a search over toy functions, and the statistics that it says what can be told by."""

import itertools
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_vision.search.methods import (
    METHODS,
    Dropped,
    Experts,
    Failed,
    Outcome,
    Rules,
    Scored,
    SearchError,
    backward,
    exhaustive,
    greedy,
)
from moe_vision.search.statistics import Metric, kendall_tau
from moe_vision.search.summary import cheaper_equal

POOL = ("a", "b", "c", "d")
WORTH = {"a": 0.1, "b": 0.4, "c": 0.2, "d": -0.05}


class Toy:
    """Values of sets by a function; remembers which sets were tried."""

    def __init__(self, value: Callable[[Experts], float | Outcome]) -> None:
        self.value, self.tried = value, list[Experts]()

    def __call__(self, sets: Sequence[Experts]) -> list[Outcome]:
        self.tried += sets
        values = [self.value(experts) for experts in sets]
        return [Scored(value) if isinstance(value, float) else value for value in values]


def additive(experts: Experts) -> float:
    return sum(WORTH[name] for name in experts)


def test_greedy_adds_the_best_of_each_round_and_stops_at_a_loss() -> None:
    toy = Toy(additive)
    trace = greedy(POOL, (), toy, Rules())
    assert [experts for experts, _ in trace.path] == [("b",), ("b", "c"), ("a", "b", "c")]
    assert trace.best[0] == ("a", "b", "c") and trace.best[1] == pytest.approx(0.7)
    assert len(toy.tried) == 4 + 3 + 2 + 1 and trace.rounds[-1].chosen is None
    assert trace.stop == "the best candidate, +d, gains -0.0500: not worth its place"
    assert [c.gain for c in trace.rounds[1].candidates] == pytest.approx([0.1, 0.2, -0.05])
    assert [c.gain for c in trace.rounds[0].candidates] == [None] * 4


def test_min_gain_and_max_experts() -> None:
    assert greedy(POOL, (), Toy(additive), Rules(min_gain=0.15)).best[0] == ("b", "c")
    exact = Toy(lambda experts: 0.25 * len(experts))
    assert greedy(POOL, (), exact, Rules(min_gain=0.25)).best[0] == POOL  # as much is enough
    never = greedy(POOL, (), Toy(additive), Rules(min_gain=-1))
    assert len(never.path) == 4 and never.best[0] == ("a", "b", "c") and never.stop == "every expert is in"
    few = greedy(POOL, (), Toy(additive), Rules(max_experts=2))
    assert few.best[0] == ("b", "c") and few.stop == "max_experts is 2"
    same = greedy(POOL, ("a",), Toy(lambda experts: 0.5), Rules())
    assert same.best[0] == ("a",) and len(same.rounds) == 1  # what gains nothing has no place


def test_a_base_is_in_every_set_and_is_tried_first() -> None:
    toy = Toy(additive)
    trace = greedy(POOL, ("d",), toy, Rules())
    assert toy.tried[0] == ("d",) and all("d" in experts for experts in toy.tried)
    assert trace.path[0] == (("d",), WORTH["d"]) and trace.best[0] == POOL
    assert trace.rounds[0].candidates[0].experts == ("a", "d")  # in the pool's order, whichever came first


def test_of_equal_candidates_the_first_of_the_pool_wins() -> None:
    assert greedy(POOL, (), Toy(lambda experts: 0.1 * len(experts)), Rules(max_experts=2)).best[0] == ("a", "b")
    assert greedy(POOL[::-1], (), Toy(lambda experts: 0.1 * len(experts)), Rules(max_experts=1)).best[0] == ("d",)
    every = exhaustive(POOL, (), Toy(lambda experts: 0.5), Rules())
    assert every.best[0] == ("a",)


def test_failing_candidates_are_skipped_and_the_search_goes_on() -> None:
    def fails(experts: Experts) -> float | Outcome:
        return Failed("no memory") if "b" in experts else additive(experts)

    trace = greedy(POOL, (), Toy(fails), Rules())
    assert trace.best[0] == ("a", "c")
    assert all(any(c.outcome == Failed("no memory") for c in r.candidates) for r in trace.rounds)
    none = greedy(POOL, ("a",), Toy(lambda e: additive(e) if e == ("a",) else Failed("x")), Rules())
    assert none.best[0] == ("a",) and none.stop == "no candidate of the last round was tried to the end"
    with pytest.raises(SearchError, match="has no result: no candidate of the last round"):
        _ = greedy(POOL, (), Toy(lambda experts: Failed("x")), Rules()).best
    with pytest.raises(SearchError, match="a, which the search begins with, failed: x"):
        greedy(POOL, ("a",), Toy(lambda experts: Failed("x")), Rules())
    with pytest.raises(SearchError, match=r"a \+ b \+ c \+ d, which the search begins with, failed"):
        backward(POOL, (), Toy(lambda experts: Failed("x")), Rules())


def test_dropped_candidates_do_not_win() -> None:
    trace = greedy(POOL, (), Toy(lambda e: Dropped("ridge") if "b" in e else additive(e)), Rules())
    assert trace.best[0] == ("a", "c")


@pytest.mark.parametrize("method", list(METHODS))
def test_an_empty_pool_is_refused(method: str) -> None:
    with pytest.raises(SearchError, match="the pool is empty"):
        METHODS[method]((), (), Toy(additive), Rules())


def test_backward_drops_what_does_not_matter() -> None:
    toy = Toy(additive)
    trace = backward(POOL, (), toy, Rules())
    assert trace.best[0] == ("a", "b", "c") and trace.rounds[0].decision == "d goes"
    assert trace.stop == "the expert that is missed least, a, is worth 0.1000: it stays"
    assert backward(POOL, (), Toy(additive), Rules(min_gain=0.15)).path[-1][0] == ("b", "c")
    assert backward(POOL, ("d",), Toy(additive), Rules(min_gain=1)).path[-1][0] == ("d",)
    assert backward(POOL, (), Toy(additive), Rules(min_gain=1)).path[-1][0] == ("b",)
    few = backward(POOL, (), Toy(additive), Rules(max_experts=2))
    assert few.best[0] == ("b", "c") and all(len(experts) <= 2 for experts, _ in few.path)


def test_gains_per_cost() -> None:
    price = {"a": 1.0, "b": 10.0, "c": 3.0, "d": 0.5}

    def cost(experts: Experts) -> float:
        return sum(price[name] for name in experts)

    trace = greedy(POOL, (), Toy(additive), Rules(cost=cost))
    assert [experts for experts, _ in trace.path] == [("a",), ("a", "c"), ("a", "b", "c")]  # .1/1, .2/3, .4/10
    dropped = backward(("a", "b", "c"), (), Toy(additive), Rules(min_gain=1, cost=cost))
    assert [r.decision for r in dropped.rounds] == ["b goes", "c goes"]  # .4/10 lost for each saved, then .2/3
    free = greedy(POOL, ("a",), Toy(additive), Rules(cost=lambda experts: 1.0))
    assert free.best[0] == ("a", "b", "c") and free.rounds[0].decision == "b joins"  # free: by gain


def test_exhaustive_tries_every_set_with_the_base() -> None:
    toy = Toy(additive)
    assert exhaustive(POOL, (), toy, Rules()).best[0] == ("a", "b", "c")
    assert len(toy.tried) == len(set(toy.tried)) == 15
    toy = Toy(additive)
    assert exhaustive(POOL, ("d",), toy, Rules(max_experts=3)).best[0] == ("b", "c", "d")
    assert len(toy.tried) == 1 + 3 + 3 and all("d" in experts for experts in toy.tried)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(-1, 1), min_size=1), st.integers(0, 1000))
def test_searches_over_noisy_values_agree_where_they_must(worth: dict[str, float], seed: int) -> None:
    pool, noise = tuple(sorted(worth)), random.Random(seed)
    values: dict[Experts, float] = {
        experts: sum(worth[name] for name in experts) + noise.gauss(0, 0.2)
        for size in range(1, len(pool) + 1)
        for experts in itertools.combinations(pool, size)
    }
    found = {name: method(pool, (), Toy(values.__getitem__), Rules()) for name, method in METHODS.items()}
    best = max(values.values())
    assert found["exhaustive"].best[1] == best
    for name in ("greedy", "backward"):
        path = found[name].path
        assert all(values[experts] == value for experts, value in path) and found[name].best[1] <= best
        steps = [after[1] - before[1] for before, after in itertools.pairwise(path)]
        assert all(step > 0 if name == "greedy" else step >= 0 for step in steps)
    assert found["greedy"].path[0][1] == max(values[name,] for name in pool)


def metric(weights: dict[str, float] | None = None, pictures: int = 40) -> Metric:
    """Two questions of each task about each picture."""
    tasks = ["ocr", "ocr", "shape", "shape"] * pictures
    return Metric(tasks, [str(row // 4) for row in range(4 * pictures)], weights or {})


def answers(share: float, seeds: int = 3, items: int = 160, seed: int = 0) -> torch.Tensor:
    return (torch.rand(seeds, items, generator=torch.Generator().manual_seed(seed)) < share).float()


def test_values_are_weighted_means_over_tasks() -> None:
    right = torch.tensor([[1.0, 1.0, 0.0, 0.0] * 40, [1.0, 0.0, 1.0, 1.0] * 40])
    assert metric().values(right) == pytest.approx([0.5, 0.75])
    assert metric({"ocr": 3.0}).values(right) == pytest.approx([0.75, 0.625])
    assert metric({"ocr": 0.0}).values(right) == pytest.approx([0.0, 1.0])
    uneven = Metric(["x", "x", "x", "y"], list("1234"), {})
    assert uneven.value(torch.tensor([[1.0, 1.0, 1.0, 0.0]])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"task_weights names \['orc'\], which no validation item has \(ocr, shape"):
        metric({"orc": 1.0})
    with pytest.raises(ValueError, match="all zero"):
        metric({"ocr": 0.0, "shape": 0.0})


def test_a_gain_is_told_from_chance_only_where_it_is_one() -> None:
    m, base = metric(), answers(0.5)
    clear = m.gain(torch.maximum(base, answers(0.3, seed=1)), base)
    assert clear.distinguishable and 0 < clear.low < clear.mean < clear.high and clear.p < 0.001
    assert clear.mean == pytest.approx(m.value(torch.maximum(base, answers(0.3, seed=1))) - m.value(base))
    none = m.gain(base, base)
    assert (none.mean, none.low, none.high, none.p) == (0, 0, 0, 1) and not none.distinguishable
    assert m.gain(base, base, seed=1) == none
    back = m.gain(base, torch.maximum(base, answers(0.3, seed=1)))
    assert back.distinguishable and back.high < 0
    many = m.gain(torch.maximum(base, answers(0.3, seed=1)), base, tests=20)
    assert many.low < clear.low and many.high > clear.high  # one of twenty has to show more


def test_an_interval_holds_the_true_gain_about_as_often_as_it_says() -> None:
    m, inside = metric(), 0
    for trial in range(60):
        # Whole pictures are lost or won: an interval that drew items alone would be too narrow by a factor of two. One
        # seed, since what several add would hide that.
        generator = torch.Generator().manual_seed(trial)
        of_pictures = (torch.rand(1, 40, generator=generator) < 0.5).float().repeat_interleave(4, 1)
        gain = m.gain(of_pictures, torch.zeros(1, 160), seed=trial)
        inside += gain.low <= 0.5 <= gain.high
    assert 50 <= inside <= 60


def test_seeds_that_disagree_widen_the_interval() -> None:
    m, base = metric(), torch.zeros(3, 160)
    agree = m.gain(torch.tensor([1.0, 1.0, 1.0])[:, None] * answers(0.3, 1).repeat(3, 1), base)
    disagree = m.gain(torch.tensor([2.7, 0.3, 0.0])[:, None].clamp(max=1) * answers(0.3, 1).repeat(3, 1), base)
    assert disagree.high - disagree.low > 2 * (agree.high - agree.low)


def test_kendalls_tau() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 2, 3], [1, 2, 2, 3]) == pytest.approx(0.8)  # 4 / sqrt(5 * 5), ties in one ranking each
    with pytest.raises(ValueError, match="all are equal"):
        kendall_tau([1, 1], [1, 2])
    with pytest.raises(ValueError, match="two rankings of the same"):
        kendall_tau([1], [1])


def test_the_smallest_set_that_cannot_be_told_from_the_best_is_named() -> None:
    items = 200
    metric = Metric(["all"] * items, list(map(str, range(items))), {})
    right = {"abc": 200, "a": 100, "b": 20, "bc": 120, "ab": 199}
    answers = {tuple(name): (torch.arange(items) < count).float()[None] for name, count in right.items()}
    found: Any = SimpleNamespace(
        trace=SimpleNamespace(best=(tuple("abc"), 1.0), path=[]), answers=answers, validation_metric=metric
    )
    equal = cheaper_equal(found)
    assert equal is not None and equal["experts"] == ["a", "b"] and equal["gain"]["mean"] == pytest.approx(0.005)
    del answers[("a", "b")]
    assert cheaper_equal(found) is None
