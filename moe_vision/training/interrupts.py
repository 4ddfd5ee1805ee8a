"""SIGTERM, as schedulers of clusters send it before they take a machine away, and Ctrl-C: end after the step, with a
checkpoint."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
"""What ends a training, and what people call it."""

SAME = 2.0
"""Seconds in which several processes get one Ctrl-C twice: from the terminal, and from what launched them."""


def asked_anywhere(asked: signal.Signals | None) -> signal.Signals | None:
    """The signal that any process of the launch got, if one did."""
    process = PartialState()
    if process.num_processes == 1:
        return asked
    got = torch.tensor([float(asked == number) for number in SIGNALS], device=process.device)
    counts = dict(zip(SIGNALS, reduce(got, reduction="sum").tolist(), strict=True))
    return next((number for number, count in counts.items() if count), None)


class Preempted(SystemExit):
    """The process was told to end, by a signal. Nothing is lost: what it wrote is whole. Its exit code is the one that
    a shell reports of a process that the signal ended. message: for people, empty where another process has it."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption(TrainerCallback):
    """Holds SIGTERM and SIGINT for as long as it is entered. While Trainer steps, the step is finished and a checkpoint
    written; at any other time, and at the second signal, `Preempted` is raised at once, since all that is written is
    written whole or not at all.

    Outside the main thread, where Python takes no signals, it changes nothing; nor for a signal that the process was
    started to ignore.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.asked_at = 0.0
        self.stepping = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """What a signal does."""
        again, now = self.asked is not None, time.monotonic()
        if again and now - self.asked_at < SAME and PartialState().num_processes > 1:
            return
        self.asked, self.asked_at = signal.Signals(number), now
        if again:
            self.end("at once, without a new checkpoint")
        if not self.stepping:
            self.end("between two runs or before the first step")

    def end(self, where: str) -> None:
        """Raise Preempted where a signal has come."""
        if self.asked is not None:
            message = f"ended by {SIGNALS[self.asked]}, {where}; the same command continues the training"
            raise Preempted(message if PartialState().is_main_process else "", self.asked)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepping = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if asked := asked_anywhere(self.asked):  # all processes have to save at the same step
            self.asked = asked
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepping = False
        self.end(f"with a checkpoint at step {state.global_step}")
