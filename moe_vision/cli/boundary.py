"""One command from `sys.argv` to its exit code: expected faults end with a message and without a traceback."""

import atexit
import gc
import multiprocessing
import os
import sys
import threading

from rich.console import Console

from moe_vision.cli.common import app


def main() -> None:
    """The console script: one command in a process of its own."""
    # Importing torch and transformers makes objects by the hundred thousand that live to the end; collecting among them
    # at Python's default pace is a quarter of a short command's time.
    gc.set_threshold(100_000)
    try:
        command()
    except SystemExit as end:
        if end.code or threading.active_count() > 1 or multiprocessing.active_children():
            raise
        leave()


def command() -> None:
    """Run the command of `sys.argv`; a fault of the user's input ends with its message and exit code 2, without a
    traceback.

    Raises:
        SystemExit: always, with the command's exit code.
    """
    debug = "--debug" in sys.argv
    try:
        app()
    except SystemExit as end:
        if message := getattr(end, "message", None):  # training that was told to end says where it stands
            Console(stderr=True, soft_wrap=True).print(escape(message), highlight=False)
        raise
    except (ValueError, KeyError, OSError) as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
        sys.exit(2)


def leave() -> None:
    """End the process without taking a million objects apart one by one: a second of a short command. Only `main` may
    call it: whatever else the process was about to do is lost."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def escape(text: str) -> str:
    from rich.markup import escape as rich_escape

    return rich_escape(text)
