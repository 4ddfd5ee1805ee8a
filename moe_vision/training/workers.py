"""Faults of the processes that read a run's images, in words for people."""

from collections.abc import Iterator
from contextlib import contextmanager

DIED = "DataLoader worker (pid"
"""How torch says that one is gone, or that it was killed."""

SHARED_MEMORY = "bus error"
"""What torch says of one that found no room in shared memory."""

CAUGHT = "in DataLoader worker process"
"""What torch puts before a fault that one raised, and its traceback."""


@contextmanager
def worker_faults(run: str, workers: int) -> Iterator[None]:
    """Raise ChildProcessError, with a hint, where a worker of this block's loader dies; what a worker raises comes
    without its traceback."""
    try:
        yield
    except Exception as error:
        text = str(error)
        full = SHARED_MEMORY in text.lower()
        if isinstance(error, RuntimeError) and (DIED in text or full):
            cause = " ".join(text.split())
            hint = "shared memory (/dev/shm) is full" if full else "often the memory is full"
            raise ChildProcessError(
                f"run '{run}': a process that reads images died ({cause}): {hint}; lower num_workers ({workers} now) "
                "or batch_size, and give the same command again: it continues from the last checkpoint"
            ) from error
        if CAUGHT in text:
            raise type(error)(last_words(text)) from None
        raise


def last_words(text: str) -> str:
    """The message of a traceback, without the name of its class."""
    lines = text.rstrip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith(" ")]
    message = "\n".join(lines[frames[-1] + 1 :] if frames else lines)
    return message.partition(": ")[2] or message
