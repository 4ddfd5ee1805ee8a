"""What a search's scores are compared with: answers that need no look at the image.

blind     the best set's own trained models, each image replaced by a grey one of its size
majority  always the task's most frequent answer in the training data
chance    one of the task's answers, drawn uniformly: those of the training data and of the split
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_vision.data.records import Record
from moe_vision.search.statistics import Gain, Metric

FEWEST_IMAGES = 6
"""Of a task that can be compared: with fewer not even a sign test of all images finds p < 0.05."""

LARGE_SHARE = 0.5
"""Of a gain: what one task must contribute to be the one that carries it."""


def answer_counts(records: Iterable[Record]) -> dict[str, Counter[str]]:
    """How often each answer occurs in training records, by task; every answer of a conversation counts."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        own = counts.setdefault(record.task, Counter())
        own.update(turn.text.strip() for turn in record.turns if turn.role == "assistant")
    return counts


@dataclass(frozen=True)
class Baselines:
    """Baselines of one split. blind: right or wrong [seeds, items]; majority: of each item, 1 or 0 [1, items]; chance:
    of each item, the probability of its answer [1, items]. answers: how many each task has; majority_answers: by task,
    without the tasks that no training record has."""

    blind: torch.Tensor
    majority: torch.Tensor
    chance: torch.Tensor
    answers: Mapping[str, int]
    majority_answers: Mapping[str, str]


def baselines_of(records: Sequence[Record], learnt: Mapping[str, Counter[str]], blind: torch.Tensor) -> Baselines:
    """Baselines of a split's records, which are asked their last question. learnt: `answer_counts` of the training
    data; blind: [seeds, items]."""
    wanted = [record.turns[-1].text.strip() for record in records]
    known: dict[str, set[str]] = {record.task: set(learnt.get(record.task, ())) for record in records}
    for record, answer in zip(records, wanted, strict=True):
        known[record.task].add(answer)
    majority = {task: learnt[task].most_common(1)[0][0] for task in known if learnt.get(task)}
    right = [float(majority.get(record.task) == answer) for record, answer in zip(records, wanted, strict=True)]
    chance = [1 / len(known[record.task]) for record in records]
    counts = {task: len(answers) for task, answers in known.items()}
    return Baselines(blind, torch.tensor([right]), torch.tensor([chance]), counts, majority)


@dataclass(frozen=True)
class Floor:
    """A task's score beside its baselines. baselines: their mean by name; best: name of the highest; gain: of the score
    over it. verdict: `above`, `floor` (not distinguishable from the best baseline, or below it), or `too few images`.
    """

    baselines: dict[str, float]
    best: str
    gain: Gain
    images: int
    verdict: str


def floors(metric: Metric, right: torch.Tensor, known: Baselines) -> dict[str, Floor]:
    """Of every task of a split, whether answers [seeds, items] are better than those of the best baseline."""
    found = {}
    for task in metric.tasks:
        own, rows = metric.of_task(task)
        names = ["blind", *(["majority"] if task in known.majority_answers else []), "chance"]
        answers = {name: getattr(known, name)[:, rows].expand(len(right), -1) for name in names}
        values = {name: own.value(answer) for name, answer in answers.items()}
        best = max(values, key=lambda name: values[name])
        gain = own.gain(right[:, rows], answers[best], tests=len(metric.tasks))
        if own.clusters < FEWEST_IMAGES:
            verdict = "too few images"
        else:
            verdict = "above" if gain.distinguishable and gain.mean > 0 else "floor"
        found[task] = Floor(values, best, gain, own.clusters, verdict)
    return found


@dataclass(frozen=True)
class Carried:
    """A gain that one task carries. share: of the gain that comes from it; rest: the gain of all other tasks."""

    task: str
    share: float
    rest: Gain


def carried(metric: Metric, right: torch.Tensor, base: torch.Tensor, gain: Gain) -> Carried | None:
    """The task that carries a gain of `right` over `base`, both [seeds, items], if one does: at least half of the gain
    comes from it, and the other tasks' gain is not distinguishable from zero although the whole one is, or is not
    positive at all."""
    of_tasks = (metric.by_task(right).mean(0) - metric.by_task(base).mean(0)) * metric.weights
    whole = of_tasks.sum().item()
    place = int(of_tasks.argmax())
    others = metric.without(metric.tasks[place])
    if whole <= 0 or others is None or of_tasks[place].item() < LARGE_SHARE * whole:
        return None
    rest = others.gain(right, base)
    nothing_else = rest.mean <= 0 or (gain.distinguishable and not rest.distinguishable)
    return Carried(metric.tasks[place], of_tasks[place].item() / whole, rest) if nothing_else else None
