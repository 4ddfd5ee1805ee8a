"""Folders that a writer needs for a while: locked as long as it lives, removed by the next one if it was killed."""

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SELFTEST = "moe-vision-selftest-"
MARK = ".moe-vision-export"
"""File in a folder that is being exported."""

CODE = "modeling_moe_vision.py"
"""File in every export."""

GRACE = 60
"""Seconds in which a new self-test's folder may not be locked yet."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; the system lets go of it when the process ends. Raises BlockingIOError if another process
    has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_unused(folder: Path) -> bool:
    """Remove a folder of this user that no process has locked; returns whether it did."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            return False
        with locked(folder):
            shutil.rmtree(folder)
        return True
    except OSError:  # in use, gone meanwhile, or not to be removed: the next one tries again
        return False


def clear_killed_exports(destination: Path) -> None:
    """Take away what killed exports to a destination left beside it, and their self-tests' folders.

    An export that was moved aside goes back to its place if nothing is there: the kill came between two renames.
    """
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.(partial|replaced)-[0-9]+")
    parent = destination.absolute().parent
    found = [path for path in parent.iterdir() if pattern.fullmatch(path.name)] if parent.is_dir() else []
    for leftover in sorted(found):
        if (leftover / MARK).is_file():
            remove_unused(leftover)
        elif ".replaced-" in leftover.name and (leftover / CODE).is_file():
            if os.path.lexists(destination):
                remove_unused(leftover)
            else:
                restore(leftover, destination)
    for leftover in Path(tempfile.gettempdir()).glob(f"{SELFTEST}*"):
        if seconds_old(leftover) > GRACE:
            remove_unused(leftover)


def restore(aside: Path, destination: Path) -> None:
    """Bring an older export back to its place, unless an export is at work on it."""
    try:
        with locked(aside):
            aside.rename(destination)
    except BlockingIOError:
        return


def seconds_old(path: Path) -> float:
    """Since a file or folder changed; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder for a self-test, locked while it is in use."""
    with tempfile.TemporaryDirectory(prefix=SELFTEST) as name, locked(Path(name)):
        yield Path(name)
