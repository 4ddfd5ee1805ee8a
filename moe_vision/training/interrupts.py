"""SIGTERM, as schedulers of clusters send it before they take a machine away: end after the step, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

EXIT_CODE = 128 + signal.SIGTERM
"""What a shell reports of a process that SIGTERM ended."""


def asked_anywhere(asked: bool) -> bool:
    """Whether any process of the launch has been told to end."""
    process = PartialState()
    if process.num_processes == 1:
        return asked
    return bool(reduce(torch.tensor(float(asked), device=process.device), reduction="sum").item())


class Preempted(SystemExit):
    """The process was told to end. Nothing is lost: what it wrote is whole."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption(TrainerCallback):
    """Holds SIGTERM for as long as it is entered. While Trainer steps, the step is finished and a checkpoint written;
    at any other time `Preempted` is raised at once, since all that is written is written whole or not at all.

    Outside the main thread, where Python takes no signals, it changes nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stepping = False
        self.before: Any = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self.ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.stepping:
            self.end("between two runs or before the first step")

    def end(self, where: str) -> None:
        """Raise Preempted where SIGTERM has come."""
        if self.asked:
            raise Preempted(f"ended by SIGTERM, {where}; give the same command again and it goes on")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepping = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if asked_anywhere(self.asked):  # all processes have to save at the same step
            self.asked = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepping = False
        self.end(f"with a checkpoint at step {state.global_step}")
