"""What a person sees of a search while it runs: jobs as they end, and about how long the rest will take."""

import statistics
import time
from collections.abc import Sequence

from rich.console import Console

from moe_vision.search.jobs import Job


class Progress:
    """Lines of a search. workers: how many jobs run at once, for the time that is left."""

    def __init__(self, console: Console, workers: int) -> None:
        self.console, self.workers = console, workers
        self.left = 0
        self.durations: list[float] = []
        self.round = ""

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin_round(self, number: int, sets: Sequence[tuple[str, ...]]) -> None:
        """A round of candidates begins."""
        self.round = f"round {number}"
        shown = "; ".join(" + ".join(experts) for experts in sets[:8]) + ("; …" if len(sets) > 8 else "")
        self.say(f"{self.round}: {len(sets)} candidate{'s' if len(sets) > 1 else ''}: {shown}")

    def expect(self, jobs: int) -> None:
        """So many jobs are to do now."""
        self.left = jobs

    def ended(self, job: Job, value: float | None, seconds: float) -> None:
        self.left -= 1
        self.durations.append(seconds)
        shown = "" if value is None else f": {value:.3f}"
        self.say(f"  {job.name}{shown}, {seconds:.0f} s{self.rest()}")

    def failed(self, job: Job, error: str) -> None:
        self.left -= 1
        self.say(f"  {job.name}: FAILED: {error.splitlines()[0]}{self.rest()}")

    def rest(self) -> str:
        """How long the jobs that are left take, if they are like those before."""
        if not self.left or not self.durations:
            return ""
        waves = -(-self.left // self.workers)
        clock = time.strftime("%H:%M", time.localtime(time.time() + waves * statistics.median(self.durations)))
        return f"; {self.left} left in {self.round or 'this step'}, done about {clock}"
