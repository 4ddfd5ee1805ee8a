"""What answers say: weighted means over tasks, and gains with an uncertainty that can be believed.

A gain is paired: both sets of experts answered the same items from the same seeds. Its interval comes from a bootstrap
(Efron, 1979) that draws pictures, not items, since questions about one picture stand and fall together, and seeds.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch

DRAWS = 10_000
CHUNK = 500
"""How many resamples, and how many of them at a time: a chunk's counts take CHUNK x pictures numbers."""


@dataclass(frozen=True)
class Gain:
    """What one set is ahead of another. low, high: of the interval at `level`. p: two-sided, of no difference."""

    mean: float
    low: float
    high: float
    p: float
    level: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


class Metric:
    """Exact match by task, averaged over tasks with weights.

    tasks, pictures: of each item, its task and what it is about. weights: by task; those that are not named have 1.
    Raises ValueError for a weight of a task that no item has, and if no task has any.
    """

    def __init__(self, tasks: Sequence[str], pictures: Sequence[str], weights: Mapping[str, float]) -> None:
        self.tasks = list(dict.fromkeys(tasks))
        if unknown := [task for task in weights if task not in self.tasks]:
            raise ValueError(
                f"task_weights names {unknown}, which no validation item has ({', '.join(self.tasks)} are)"
            )
        given = torch.tensor([weights.get(task, 1.0) for task in self.tasks], dtype=torch.float64)
        if not given.sum() > 0:
            raise ValueError("task_weights are all zero: leave a task above it")
        self.weights = given / given.sum()
        clusters = {name: number for number, name in enumerate(dict.fromkeys(pictures))}
        task_of = torch.tensor([self.tasks.index(task) for task in tasks])
        cell = torch.tensor([clusters[name] for name in pictures]) * len(self.tasks) + task_of
        self.cell, self.clusters = cell, len(clusters)
        self.counts = self.cells(torch.ones(1, len(cell)))[0]

    def cells(self, values: torch.Tensor) -> torch.Tensor:
        """Values [seeds, items] → their sums by picture and task [seeds, pictures, tasks]."""
        sums = torch.zeros(len(values), self.clusters * len(self.tasks), dtype=torch.float64)
        sums.index_add_(1, self.cell, values.double())
        return sums.view(len(values), self.clusters, len(self.tasks))

    def of_task(self, task: str) -> tuple["Metric", torch.Tensor]:
        """The metric of one task alone, and the rows of its items."""
        rows = (self.cell % len(self.tasks) == self.tasks.index(task)).nonzero().flatten()
        images = [str(number) for number in (self.cell[rows] // len(self.tasks)).tolist()]
        return Metric([task] * len(rows), images, {}), rows

    def without(self, task: str) -> "Metric | None":
        """The same metric with no weight on a task; null if no other task has any."""
        weights = self.weights.clone()
        weights[self.tasks.index(task)] = 0
        if not weights.sum() > 0:
            return None
        other = copy(self)
        other.weights = weights / weights.sum()
        return other

    def by_task(self, right: torch.Tensor) -> torch.Tensor:
        """right [seeds, items] → the share of each task [seeds, tasks]."""
        return self.cells(right).sum(1) / self.counts.sum(0)

    def values(self, right: torch.Tensor) -> list[float]:
        """right [seeds, items] → the weighted mean over tasks, of each seed."""
        shares: list[float] = (self.by_task(right) @ self.weights).tolist()
        return shares

    def value(self, right: torch.Tensor) -> float:
        """The mean over seeds."""
        values = self.values(right)
        return sum(values) / len(values)

    def draws(self, right: torch.Tensor, base: torch.Tensor, seed: int = 0) -> torch.Tensor:
        """Gains [DRAWS] of right over base, both [seeds, items], in resamples of pictures and seeds."""
        difference = self.cells(right.double() - base.double())
        seeds = len(difference)
        flat = difference.transpose(0, 1).reshape(self.clusters, -1)
        generator = np.random.default_rng(seed)
        found = []
        for start in range(0, DRAWS, CHUNK):
            size = min(CHUNK, DRAWS - start)
            of_pictures = torch.from_numpy(
                generator.multinomial(self.clusters, [1 / self.clusters] * self.clusters, size).astype(np.float64)
            )
            of_seeds = torch.from_numpy(generator.multinomial(seeds, [1 / seeds] * seeds, size) / seeds)
            sums = (of_pictures @ flat).view(size, seeds, -1)
            counts = of_pictures @ self.counts
            means = (sums * of_seeds[:, :, None]).sum(1) / counts.clamp(min=1)
            weights = self.weights * (counts > 0)  # a rare task may be in none of a draw's pictures
            found.append((means * weights).sum(1) / weights.sum(1).clamp(min=1e-12))
        return torch.cat(found)

    def gain(self, right: torch.Tensor, base: torch.Tensor, tests: int = 1, seed: int = 0) -> Gain:
        """What `right` [seeds, items] is ahead of `base` [seeds, items].

        tests: of how many gains this is one; the interval holds for all of them together at 95 % (Bonferroni).
        """
        draws = self.draws(right, base, seed)
        level = 1 - 0.05 / tests
        low, high = torch.quantile(draws, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=draws.dtype)).tolist()
        tail = min((draws <= 0).double().mean().item(), (draws >= 0).double().mean().item())
        return Gain(self.value(right) - self.value(base), low, high, min(1.0, max(2 * tail, 1 / DRAWS)), level)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b of two rankings of the same things: 1 where they agree on every pair, -1 where on none.

    Raises ValueError for fewer than two, or where all of one are equal.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"tau needs two rankings of the same two or more, and got {len(first)} and {len(second)}")
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (first, second))
    above, below = torch.triu_indices(len(a), len(a), offset=1)
    signs = torch.sign(a[above] - a[below]), torch.sign(b[above] - b[below])
    untied = (signs[0] != 0).sum().item() * (signs[1] != 0).sum().item()
    if untied == 0:
        raise ValueError("tau of a ranking in which all are equal is not defined")
    return float((signs[0] * signs[1]).sum().item() / untied**0.5)
