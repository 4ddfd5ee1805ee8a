"""What a user sees of a schedule while it runs: a live bar in a terminal, plain lines without one, metrics as JSONL."""

import json
import math
import statistics
import time
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from moe_vision.terminal import say
from moe_vision.training.checkpoints import write_atomically

FEW_STEPS = 10
"""A run of fewer steps says nothing about where its loss goes."""

FALLEN = 0.999
"""A loss has fallen where less than this share of it is left."""


@dataclass
class ScheduleSteps:
    """Steps of every run of a schedule, in order."""

    of_run: dict[str, int]

    def total(self) -> int:
        """Steps of the whole schedule."""
        return sum(self.of_run.values())

    def before(self, run: str) -> int:
        """Steps of the runs before this one."""
        return sum(self.of_run[name] for name in takewhile(lambda name: name != run, self.of_run))


class ScheduleProgress(TrainerCallback):
    """A bar over the whole schedule, with the time that is left of it; without a terminal, a line at every tenth of a
    run. steps: learns from each run how long it really is."""

    def __init__(self, console: Console, run: str, position: str, steps: ScheduleSteps) -> None:
        self.console, self.run, self.position = console, run, position
        self.steps = steps
        self.resumed_at = 0
        self.loss = float("nan")
        self.started = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task(f"{position} {run}", loss=self.loss)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.of_run[self.run] = state.max_steps
        self.resumed_at, self.started = state.global_step, time.perf_counter()
        self.progress.update(self.task, total=self.steps.total(), completed=self.steps.before(self.run))
        self.progress.update(self.task, completed=self.completed(state))
        self.progress.start()

    def completed(self, state: Any) -> int:
        """Steps of the schedule that are done."""
        return self.steps.before(self.run) + state.global_step

    def seconds_left(self, state: Any) -> float:
        """Of the whole schedule, at the pace of this run since it began or went on."""
        done = state.global_step - self.resumed_at
        left = self.steps.total() - self.completed(state)
        return (time.perf_counter() - self.started) / done * left if done else math.nan

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        self.loss = logs["loss"]
        self.progress.update(self.task, loss=self.loss)
        if state.global_step == state.max_steps:  # its log comes after its end
            self.print_line(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=self.completed(state), loss=self.loss)
        if state.global_step == state.max_steps:
            control.should_log = True
        elif state.global_step % max(1, state.max_steps // 10) == 0:
            self.print_line(state)

    def print_line(self, state: Any) -> None:
        """Where the run is, if there is no bar."""
        if self.console.is_terminal:
            return
        seconds = time.perf_counter() - self.started
        loss = "" if math.isnan(self.loss) else f", loss {self.loss:.3f}"
        say(
            self.console,
            f"{self.position} {self.run}: step {state.global_step}/{state.max_steps}{loss}, {seconds:.0f} s; "
            f"schedule: about {self.seconds_left(state):.0f} s left",
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; also after an error, when `on_train_end` is not called."""
        self.progress.stop()


class FiniteLoss(TrainerCallback):
    """Stop at the first logged loss or gradient norm that is not a number: nothing can be learnt from there."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for key, what in (("loss", "loss"), ("grad_norm", "norm of the gradients")):
            check_finite(what, (logs or {}).get(key, 0.0), state.global_step)


def check_finite(what: str, value: float, step: int) -> None:
    """Raise ValueError, with a hint, for a value of training that is not a number."""
    if not math.isfinite(value):
        raise ValueError(f"the {what} is {value} at step {step}: lower the learning rates of this stage, lengthen its "
                         "warmup_ratio, or lower its max_grad_norm")  # fmt: skip


class LossFalls(TrainerCallback):
    """A warning at the end of a run whose loss did not fall. path: of its logs, those before a kill among them."""

    def __init__(self, console: Console, path: Path, run: str) -> None:
        self.console, self.path, self.run = console, path, run

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or state.global_step < max(state.max_steps, FEW_STEPS):
            return
        logs = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        losses = [log["loss"] for log in logs if log["run"] == self.run and "loss" in log]
        part = max(1, len(losses) // 4)
        first, last = statistics.fmean(losses[:part]), statistics.fmean(losses[-part:])
        if last > first * FALLEN:
            say(
                self.console,
                f"warning: the loss of {self.run} did not fall: {first:.3f} at its beginning, {last:.3f} at its end. "
                "Look at its curve; then change the learning rates, train longer, or train more groups",
            )


class MetricsFile(TrainerCallback):
    """Append every log of a run to a JSON Lines file, with the median seconds of a step since the log before; a resumed
    run takes back what it is about to repeat."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self.seconds: list[float] = []
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()
        if state.is_world_process_zero and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomically(self.path, "".join(line for line in lines if self.stands(line, state.global_step)))

    def stands(self, line: str, step: int) -> bool:
        """Whether a line is whole, and of another run or of a step that is not done again; a run's summary is always
        written again."""
        if not line.endswith("\n"):
            return False
        values = json.loads(line)
        return values["run"] != self.run or (values["step"] <= step and "train_loss" not in values)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        values = {"run": self.run, "step": state.global_step, **(logs or {})}
        if self.seconds:
            values["step_seconds"] = statistics.median(self.seconds)
            self.seconds = []
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
