"""What a person sees of a search while it runs: jobs as they end, and about how long the rest will take."""

import statistics
import time
from collections.abc import Collection, Sequence

from rich.console import Console

from moe_vision.search.jobs import Job
from moe_vision.viz.tables import marked


class Progress:
    """Lines of a search. workers: how many jobs run at once; rounds: jobs of each round, if none stops the search;
    random: experts with random weights, which are marked."""

    def __init__(self, console: Console, workers: int, rounds: Sequence[int], random: Collection[str] = ()) -> None:
        self.console, self.workers, self.rounds, self.random = console, workers, rounds, random
        self.left = self.number = 0
        self.durations: list[float] = []

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin_round(self, number: int, sets: Sequence[tuple[str, ...]]) -> None:
        """A round of candidates begins."""
        self.number = number
        shown = "; ".join(marked(experts, self.random) for experts in sets[:8]) + ("; …" if len(sets) > 8 else "")
        what = "candidate" if len(sets) == 1 else "candidates"
        self.say(f"round {number} of at most {len(self.rounds)}: {len(sets)} {what}: {shown}")

    def expect(self, jobs: int) -> None:
        """So many jobs are to do now."""
        self.left = jobs

    def ended(self, job: Job, value: float | None, seconds: float) -> None:
        self.left -= 1
        self.durations.append(seconds)
        shown = "" if value is None else f": {value:.3f} of the validation split"
        self.say(f"  {self.title(job)}{shown}, {seconds:.0f} s{self.rest()}")

    def failed(self, job: Job, error: str) -> None:
        self.left -= 1
        self.say(f"  {self.title(job)}: FAILED: {error.splitlines()[0]}{self.rest()}")

    def title(self, job: Job) -> str:
        return f"{job.what} {marked(job.experts, self.random)}, seed {job.seed}"

    def rest(self) -> str:
        """What is left, and when it is done at the latest, if jobs are like those before."""
        ahead = sum(self.rounds[self.number :])
        if not (self.left or ahead) or not self.durations:
            return ""
        waves = -(-(self.left + ahead) // self.workers)
        until = time.time() + waves * statistics.median(self.durations)
        return (
            f"; {self.left} left of this round, the search is done by {time.strftime('%H:%M', time.localtime(until))}"
        )
