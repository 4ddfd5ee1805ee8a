"""One command, from `sys.argv` to its exit code.

| what ended the command                                | printed                                | exit code   |
|-------------------------------------------------------|----------------------------------------|-------------|
| a fault of the input, the system or an unwritten file | `error: …`, with what to do            | 2           |
| Ctrl-C                                                | `interrupted`                          | 130         |
| a reader that closed the pipe                         | nothing                                | 1           |
| any other exception                                   | its type, its message, a hint          | 1           |
"""

import atexit
import contextlib
import errno
import gc
import multiprocessing
import os
import shlex
import sys
import threading

from moe_vision.cli.common import app
from moe_vision.files import WriteError, os_hint, reason
from moe_vision.registry import UnknownNameError
from moe_vision.terminal import say, terminal, tolerate_any_text

INTERRUPTED = 130
"""What a shell reports of a process that Ctrl-C ended."""


def main() -> None:
    """The console script: one command in a process of its own."""
    # Importing torch and transformers makes objects by the hundred thousand that live to the end; collecting among them
    # at Python's default pace is a quarter of a short command's time.
    gc.set_threshold(100_000)
    try:
        command()
    except SystemExit as end:
        if hasattr(end, "message"):  # a signal: whoever sent it may not wait long
            leave(int(end.code or 0))
        if end.code or threading.active_count() > 1 or multiprocessing.active_children():
            raise
        leave()


def command() -> None:
    """Run the command of `sys.argv`, as the table above says; `--debug` shows tracebacks.

    Raises:
        SystemExit: always, with the command's exit code.
    """
    tolerate_any_text()
    debug = "--debug" in sys.argv
    try:
        check_arguments(sys.argv[1:])
        try:
            app()
        finally:
            flush_output()
    except SystemExit as end:
        message = getattr(end, "message", None)
        if message:  # a training that a signal ended reports its step, in one process of several
            say(terminal(stderr=True), message, soft_wrap=True)
        elif message is None and end.code == INTERRUPTED:
            say(terminal(stderr=True), "interrupted")
        raise
    except KeyboardInterrupt:
        say(terminal(stderr=True), "interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        text, code = explained(error)
        console = terminal(stderr=True, soft_wrap=True)
        console.print("error: ", style="bold red", end="")
        say(console, text, soft_wrap=True)
        sys.exit(code)


def check_arguments(arguments: list[str]) -> None:
    """Raises ValueError for an argument that is not UTF-8: no config, report or model card could hold it."""
    for number, argument in enumerate(arguments, 1):
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ValueError(f"argument {number}, {argument!a}, is not UTF-8: rename the file, or type it in UTF-8")


def flush_output() -> None:
    """Write what standard output still holds. Raises OSError where it cannot; then nothing more is written there."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # else Python tries once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            raise
        raise WriteError(
            error.errno, f"standard output cannot be written ({reason(error)}): {os_hint(error)}"
        ) from None


def explained(error: Exception) -> tuple[str, int]:
    """A message for a person, and the exit code."""
    if isinstance(error, WriteError):
        return str(error.strerror or error), 2
    if isinstance(error, OSError) and error.errno is not None:
        if isinstance(error.filename, (str, bytes)):
            return f"'{os.fsdecode(error.filename)}': {reason(error)}: {os_hint(error)}", 2
        return f"standard output or a file failed ({reason(error)}): {os_hint(error)}", 2
    if isinstance(error, (ValueError, OSError, UnknownNameError)):
        return str(error) or type(error).__name__, 2
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"not enough memory ({brief(error)}): lower the batch size, or choose smaller models", 2
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):  # of Path.resolve, before Python 3.13
        return f"{brief(error)}: its links lead in a circle: give the file itself", 2
    called = shlex.join(sys.argv[1:3])
    return (
        f"unexpected {type(error).__name__} in `moe-vision {called}`: {brief(error)}; hint: run it again as "
        f"`moe-vision --debug …` to see where, and report it"
    ), 1


def brief(error: Exception) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else text[:499] + "…"


def leave(code: int = 0) -> None:
    """End the process without taking a million objects apart one by one: a second of a short command. Only `main` may
    call it: whatever else the process was about to do is lost."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)
