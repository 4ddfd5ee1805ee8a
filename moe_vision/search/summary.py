"""What a search found, as plain values: what results.json holds.

Nothing in it depends on when or where the search ran, so that one that was killed and resumed has the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_vision.evaluation import over_seeds
from moe_vision.modeling.cost import CostTable
from moe_vision.search.baselines import Baselines, Floor, carried, floors
from moe_vision.search.config import SearchConfig
from moe_vision.search.methods import Candidate, Dropped, Experts, Failed, Round, Scored, Trace
from moe_vision.search.statistics import Gain, Metric, kendall_tau
from moe_vision.viz.tables import marked


@dataclass(frozen=True)
class Found:
    """A finished search. answers: [seeds, items] of each set that was tried to the end; proxied: [1, items]; test:
    [seeds, test items] of the best set; random: experts with random weights, with what becomes of them (`frozen`,
    `trained`); baselines: by split."""

    config: SearchConfig
    trace: Trace
    pool: Experts
    answers: Mapping[Experts, torch.Tensor]
    proxied: Mapping[Experts, torch.Tensor]
    costs: Mapping[Experts, CostTable]
    test: torch.Tensor
    validation_metric: Metric
    test_metric: Metric
    counts: Mapping[str, int]
    random: Mapping[str, str]
    baselines: Mapping[str, Baselines]

    @property
    def splits(self) -> dict[str, tuple[Metric, torch.Tensor]]:
        """The metric of each split that is asked, and the best set's answers to it."""
        best = self.answers[self.trace.best[0]]
        return {"validation": (self.validation_metric, best), "test": (self.test_metric, self.test)}


def summarise(found: Found) -> dict[str, Any]:
    """Plain values of the whole search."""
    best, metric = found.trace.best[0], found.validation_metric
    config = found.config
    return {
        "method": config.method, "pool": list(found.pool), "base": list(config.base_experts),
        "seeds": [config.seed + number for number in range(config.seeds)],
        "items": dict(found.counts), "task_weights": dict(zip(metric.tasks, metric.weights.tolist(), strict=True)),
        "rules": {"min_gain": config.min_gain or 0.0, "max_experts": config.max_experts, "per": config.per},
        "stages": {stage.name: stage.model_dump(mode="json", include={"epochs", "max_steps", "batch_size"})
                   for stage in config.stages},
        "halving": [rung.model_dump() for rung in config.halving],
        "rounds": [summary_of_round(found, entry) for entry in found.trace.rounds],
        "path": [{"experts": list(experts), "value": value} for experts, value in found.trace.path],
        "stop": found.trace.stop,
        "best": {
            "experts": list(best), "validation": scores(metric, found.answers[best]),
            "test": scores(found.test_metric, found.test), "cheaper_equal": cheaper_equal(found),
        },
        "sets": {marked(experts, ()): {"experts": list(experts), **scores(metric, answers), **cost_of(found, experts)}
                 for experts, answers in found.answers.items()},
        "proxy": summary_of_proxy(found),
        "split": dict.fromkeys(("rounds", "path", "sets", "proxy", "cheaper_equal"), "validation"),
        "random_weights": dict(found.random),
        "baselines": {split: summary_of_baselines(found, split) for split in found.splits},
    }  # fmt: skip


def scores(metric: Metric, right: torch.Tensor) -> dict[str, Any]:
    """Weighted mean and shares by task of answers [seeds, items], over seeds."""
    shares = metric.by_task(right)
    by_task = {task: over_seeds(shares[:, i].tolist()) for i, task in enumerate(metric.tasks)}
    return {"value": over_seeds(metric.values(right)), "by_task": by_task}


def cost_of(found: Found, experts: Experts) -> dict[str, Any]:
    costs = found.costs[experts]
    return {"gflops": costs.flops / 1e9, "tokens": costs.visual_tokens, "parameters": costs.parameters}


def plain(gain: Gain) -> dict[str, Any]:
    return {**vars(gain), "distinguishable": gain.distinguishable}


def summary_of_gain(metric: Metric, right: torch.Tensor, base: torch.Tensor, tests: int = 1) -> dict[str, Any]:
    """The gain of answers over others, both [seeds, items], and the task that carries it, if one does."""
    gain = metric.gain(right, base, tests)
    by = carried(metric, right, base, gain)
    return {
        **vars(gain), "distinguishable": gain.distinguishable,
        "carried_by": None if by is None else {**vars(by), "rest": plain(by.rest)},
    }  # fmt: skip


def summary_of_baselines(found: Found, split: str) -> dict[str, Any]:
    """What the best set's score of a split is compared with: as a whole, and by task."""
    (metric, right), known = found.splits[split], found.baselines[split]
    majority = metric.value(known.majority) if set(metric.tasks) <= set(known.majority_answers) else None
    of_tasks = floors(metric, right, known)
    return {
        "value": {"blind": metric.value(known.blind), "majority": majority, "chance": metric.value(known.chance)},
        "over_blind": summary_of_gain(metric, right, known.blind),
        "tasks": {task: summary_of_floor(known, task, floor) for task, floor in of_tasks.items()},
    }


def summary_of_floor(known: Baselines, task: str, floor: Floor) -> dict[str, Any]:
    answers = {"answers": known.answers[task], "majority_answer": known.majority_answers.get(task)}
    return {**vars(floor), **answers, "gain": plain(floor.gain)}


def summary_of_round(found: Found, entry: Round) -> dict[str, Any]:
    """Candidates with their scores, gains over the base, and the winner's over the runner-up."""
    scored = [c for c in entry.candidates if isinstance(c.outcome, Scored)]
    start = found.answers.get(entry.base)
    gains = {
        c.experts: summary_of_gain(found.validation_metric, found.answers[c.experts], start, len(scored))
        for c in scored
        if start is not None and found.trace.method != "exhaustive"
    }
    ranked = sorted(scored, key=lambda c: -(c.value or 0.0))
    runner_up, over = None, None
    first = entry.chosen or (ranked[0] if ranked else None)
    others = [c for c in ranked if first is not None and c.experts != first.experts]
    if first is not None and others:
        runner_up = others[0]
        over = summary_of_gain(found.validation_metric, found.answers[first.experts], found.answers[runner_up.experts])
    return {
        "base": list(entry.base), "decision": entry.decision,
        "chosen": None if entry.chosen is None else list(entry.chosen.experts),
        "runner_up": None if runner_up is None else list(runner_up.experts), "over_runner_up": over,
        "candidates": [summary_of_candidate(found, c, gains.get(c.experts)) for c in entry.candidates],
    }  # fmt: skip


def summary_of_candidate(found: Found, candidate: Candidate, gain: dict[str, Any] | None) -> dict[str, Any]:
    experts, outcome = candidate.experts, candidate.outcome
    proxied, answers = found.proxied.get(experts), found.answers.get(experts)
    return {
        "experts": list(experts), "change": list(candidate.change),
        "proxy": None if proxied is None else found.validation_metric.value(proxied),
        "value": None if answers is None else over_seeds(found.validation_metric.values(answers)),
        "gain": gain,
        "failed": outcome.reason.splitlines()[0] if isinstance(outcome, Failed) else None,
        "dropped": outcome.reason if isinstance(outcome, Dropped) else None,
    }  # fmt: skip


def cheaper_equal(found: Found) -> dict[str, Any] | None:
    """The smallest set that is better than the best one or not distinguishable from it, among the best that were tried
    of each smaller size."""
    best = found.trace.best[0]
    for size in range(1, len(best)):
        tried = [experts for experts in found.answers if len(experts) == size]
        if not tried:
            continue
        experts = max(tried, key=lambda experts: found.validation_metric.value(found.answers[experts]))
        gain = found.validation_metric.gain(found.answers[best], found.answers[experts])
        if not gain.distinguishable or gain.mean < 0:
            return {"experts": list(experts), "gain": plain(gain)}
    return None


def summary_of_proxy(found: Found) -> dict[str, Any]:
    """Both values of every set that has them, and how well their ranks agree."""
    metric = found.validation_metric
    both = {e: (metric.value(found.proxied[e]), metric.value(found.answers[e]))
            for e in found.answers if e in found.proxied}  # fmt: skip
    ranks = [list(values) for values in zip(*both.values(), strict=True)]
    varied = len(both) > 1 and all(len(set(values)) > 1 for values in ranks)
    return {
        "sets": {marked(experts, ()): values for experts, values in both.items()},
        "seen": len(found.proxied), "tau": kendall_tau(ranks[0], ranks[1]) if varied else None,
        "keep": None if found.config.proxy is None else found.config.proxy.keep,
    }  # fmt: skip
