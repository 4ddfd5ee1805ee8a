"""Which sets of experts to try next, and when to stop: pure decisions over a function that tries them.

greedy    from the base, add the expert that helps most, one a round (Eagle, arXiv 2408.15998, section 3.5)
backward  from all, drop the expert that is missed least, one a round
exhaustive  every set

A set is a tuple of names in the pool's order, so that the same experts are the same set whichever way led there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

Experts = tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """A set that was tried to the end."""

    value: float


@dataclass(frozen=True)
class Failed:
    """A set that could not be tried."""

    reason: str


@dataclass(frozen=True)
class Dropped:
    """A set that a cheaper look gave up before its whole trial."""

    reason: str


Outcome = Scored | Failed | Dropped

Evaluate = Callable[[Sequence[Experts]], Sequence[Outcome]]
"""Tries sets, which do not depend on each other; an outcome of each, in their order."""


class SearchError(ValueError):
    """A search that cannot begin or go on."""


@dataclass(frozen=True)
class Rules:
    """min_gain: an expert is worth its place if it gains as much, and more than 0; -1 never stops. max_experts: of a
    set. cost: of a set, which gains are divided by: what an expert adds in it; gains alone decide if null.
    """

    min_gain: float = 0.0
    max_experts: int | None = None
    cost: Callable[[Experts], float] | None = None

    def worth(self, gain: float) -> bool:
        """Whether an expert that gains so much has its place."""
        return gain >= self.min_gain if self.min_gain > 0 else gain > self.min_gain

    def room(self, size: int) -> bool:
        """Whether a set of so many may have one more."""
        return self.max_experts is None or size < self.max_experts

    def price(self, larger: Experts, smaller: Experts) -> float:
        """What the larger set costs beyond the smaller; 1 where cost does not count."""
        return 1.0 if self.cost is None else self.cost(larger) - (self.cost(smaller) if smaller else 0.0)


@dataclass(frozen=True)
class Candidate:
    """A set in a round. change: the expert that it adds or drops, all of them where it has no base. gain: over the
    round's base."""

    experts: Experts
    change: Experts
    outcome: Outcome
    gain: float | None = None

    @property
    def value(self) -> float | None:
        return self.outcome.value if isinstance(self.outcome, Scored) else None


@dataclass(frozen=True)
class Round:
    """What was tried from a base, in the pool's order, and what won. decision: what follows from it."""

    base: Experts
    candidates: list[Candidate]
    chosen: Candidate | None
    decision: str


@dataclass(frozen=True)
class Trace:
    """A whole search. path: the sets that it stood at, with their values; best: the one with the highest."""

    method: str
    rounds: list[Round] = field(default_factory=list)
    path: list[tuple[Experts, float]] = field(default_factory=list)
    stop: str = ""

    @property
    def best(self) -> tuple[Experts, float]:
        """Raises SearchError if nothing was tried to the end."""
        if not self.path:
            lost = [(c.experts, c.outcome.reason) for entry in self.rounds for c in entry.candidates
                    if isinstance(c.outcome, Failed)]  # fmt: skip
            why = [f"; {' + '.join(experts)}: {reason.splitlines()[0]}" for experts, reason in lost[:1]]
            raise SearchError(f"the search has no result: {self.stop}{''.join(why)}")
        return max(self.path, key=lambda entry: (entry[1], -len(entry[0])))


def in_order(pool: Sequence[str], experts: Sequence[str]) -> Experts:
    return tuple(name for name in pool if name in experts)


def greedy(pool: Sequence[str], base: Experts, evaluate: Evaluate, rules: Rules) -> Trace:
    """Add experts of the pool to the base, one a round: the one that gains most, or most for its cost.

    Raises SearchError for an empty pool and for a base that fails.
    """
    check_pool(pool)
    rounds: list[Round] = []
    path = [(base, value_of_start(base, evaluate))] if base else []
    current = base
    while True:
        left = [name for name in pool if name not in current]
        if not left or not rules.room(len(current)):
            stop = "every expert is in" if not left else f"max_experts is {rules.max_experts}"
            return Trace("greedy", rounds, path, stop)
        before = path[-1][1] if path else None
        sets = [in_order(pool, (*current, name)) for name in left]
        candidates = [
            Candidate(experts, (name,), outcome, gain_over(outcome, before))
            for name, experts, outcome in zip(left, sets, evaluate(sets), strict=True)
        ]
        winner = best_of(candidates, [rated(c, rules.price(c.experts, current)) for c in candidates])
        if winner is None:
            rounds.append(Round(current, candidates, None, "no candidate was tried to the end"))
            return Trace("greedy", rounds, path, "no candidate of the last round was tried to the end")
        if winner.gain is not None and not rules.worth(winner.gain):
            stop = f"the best candidate, +{winner.change[0]}, gains {winner.gain:+.4f}: not worth its place"
            rounds.append(Round(current, candidates, None, stop))
            return Trace("greedy", rounds, path, stop)
        rounds.append(Round(current, candidates, winner, f"{winner.change[0]} joins"))
        assert winner.value is not None
        current = winner.experts
        path.append((current, winner.value))


def backward(pool: Sequence[str], base: Experts, evaluate: Evaluate, rules: Rules) -> Trace:
    """Drop experts of the pool from all of them, one a round: the one whose loss is least, or least for what it saves;
    those of the base stay.

    Raises SearchError for an empty pool and if the whole set fails.
    """
    check_pool(pool)
    rounds: list[Round] = []
    current = tuple(pool)
    path = [(current, value_of_start(current, evaluate))]
    while True:
        left = [name for name in current if name not in base]
        too_many = rules.max_experts is not None and len(current) > rules.max_experts
        if not left or len(current) == 1:
            break_off = "one expert is left" if len(current) == 1 else "only the base is left"
            return allowed(Trace("backward", rounds, path, break_off), rules)
        sets = [tuple(other for other in current if other != name) for name in left]
        candidates = [
            Candidate(experts, (name,), outcome, gain_over(outcome, path[-1][1]))
            for name, experts, outcome in zip(left, sets, evaluate(sets), strict=True)
        ]
        winner = best_of(candidates, [saved(c, rules.price(current, c.experts)) for c in candidates])
        if winner is None:
            rounds.append(Round(current, candidates, None, "no candidate was tried to the end"))
            stop = "no candidate of the last round was tried to the end"
            return allowed(Trace("backward", rounds, path, stop), rules)
        assert winner.gain is not None and winner.value is not None
        if rules.worth(-winner.gain) and not too_many:
            stop = f"the expert that is missed least, {winner.change[0]}, is worth {-winner.gain:.4f}: it stays"
            rounds.append(Round(current, candidates, None, stop))
            return allowed(Trace("backward", rounds, path, stop), rules)
        rounds.append(Round(current, candidates, winner, f"{winner.change[0]} goes"))
        current = winner.experts
        path.append((current, winner.value))


def exhaustive(pool: Sequence[str], base: Experts, evaluate: Evaluate, rules: Rules) -> Trace:
    """Try every set that holds the base, of at most `max_experts`. Raises SearchError for an empty pool."""
    check_pool(pool)
    free = [name for name in pool if name not in base]
    most = len(pool) if rules.max_experts is None else rules.max_experts
    sets = [
        in_order(pool, (*base, *added))
        for size in range(max(0, most - len(base)) + 1)
        for added in combinations(free, size)
        if base or added
    ]
    candidates = [
        Candidate(experts, tuple(name for name in experts if name not in base), outcome)
        for experts, outcome in zip(sets, evaluate(sets), strict=True)
    ]
    winner = best_of(candidates, [rated(c, 1.0) for c in candidates])
    decision = "no set was tried to the end" if winner is None else f"{' + '.join(winner.experts)} is the best set"
    path = [] if winner is None or winner.value is None else [(winner.experts, winner.value)]
    return Trace("exhaustive", [Round(base, candidates, winner, decision)], path, "every set was tried")


METHODS: dict[str, Callable[[Sequence[str], Experts, Evaluate, Rules], Trace]] = {
    "greedy": greedy, "backward": backward, "exhaustive": exhaustive,
}  # fmt: skip


def check_pool(pool: Sequence[str]) -> None:
    if not pool:
        raise SearchError("the pool is empty: name the experts to choose from")


def value_of_start(experts: Experts, evaluate: Evaluate) -> float:
    """Raises SearchError if the set that a search begins with fails: no gain could be told."""
    (outcome,) = evaluate([experts])
    if not isinstance(outcome, Scored):
        raise SearchError(f"{' + '.join(experts)}, which the search begins with, failed: {outcome.reason}")
    return outcome.value


def gain_over(outcome: Outcome, base: float | None) -> float | None:
    return outcome.value - base if isinstance(outcome, Scored) and base is not None else None


def rated(candidate: Candidate, price: float) -> float:
    """Gain, or value where there is no base, for its price. What costs nothing more is priceless if it gains."""
    gain = candidate.gain if candidate.gain is not None else candidate.value
    if gain is None or gain <= 0:  # a loss does not become smaller by costing much
        return float("-inf") if gain is None else gain
    return gain / price if price > 0 else float("inf")


def saved(candidate: Candidate, price: float) -> float:
    """How little is lost for what is saved: the higher, the better to drop. A gain by dropping comes first."""
    if candidate.gain is None or candidate.gain >= 0:
        return float("-inf") if candidate.gain is None else candidate.gain
    return candidate.gain / price if price > 0 else float("-inf")


def best_of(candidates: Sequence[Candidate], ratings: Sequence[float]) -> Candidate | None:
    """The candidate that is rated highest, of equals the one of the higher value, then the first of the pool."""
    scored = [(r, c.value, c) for r, c in zip(ratings, candidates, strict=True) if c.value is not None]
    return max(scored, key=lambda entry: entry[:2])[2] if scored else None


def allowed(trace: Trace, rules: Rules) -> Trace:
    """A backward trace whose path begins where the set is small enough to be an answer."""
    most = rules.max_experts
    path = [entry for entry in trace.path if most is None or len(entry[0]) <= most]
    return Trace(trace.method, trace.rounds, path, trace.stop)
