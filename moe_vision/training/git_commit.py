"""The commit of a Git checkout, read from its files.

Nothing is run: `git status` would run the programs that a folder's own configuration names, as `core.fsmonitor`.
Formats: gitrepository-layout(5), gitworktrees(1).
"""

import os
import re
import stat
from pathlib import Path

MAX_LINE_FILE = 4096
"""Most bytes of HEAD, of a reference and of a `.git` file."""

MAX_PACKED_REFS = 2**26
"""Most bytes of packed-refs."""

COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
REFERENCE = re.compile(r"refs/[^\s\0~^:?*\[\\]+")


def commit_of(folder: Path) -> str | None:
    """Hash of the commit that is checked out in a folder or in the nearest one above it; None outside a checkout, or
    where its files are not as Git writes them."""
    folder = Path(os.path.realpath(folder))
    for parent in (folder, *folder.parents):
        if os.path.lexists(parent / ".git"):
            return head_commit(parent / ".git")
    return None


def head_commit(git: Path) -> str | None:
    """The commit of HEAD in a `.git` folder, or in the one that a `.git` file of a worktree or a submodule names."""
    if not git.is_dir():
        pointer = line_of(git)
        if pointer is None or not pointer.startswith("gitdir: "):
            return None
        git = git.parent / pointer.removeprefix("gitdir: ")
    head = line_of(git / "HEAD")
    if head is None or COMMIT.fullmatch(head):
        return head
    name = head.removeprefix("ref: ")
    if name == head or not REFERENCE.fullmatch(name) or ".." in name:
        return None
    common = line_of(git / "commondir")  # of a worktree: where the references are
    for place in (git, *([git / common] if common else [])):
        commit = line_of(place / name)
        if commit is not None:
            return commit if COMMIT.fullmatch(commit) else None
    for place in (git, *([git / common] if common else [])):
        if (commit := packed_commit(place / "packed-refs", name)) is not None:
            return commit
    return None


def text_of(path: Path, limit: int) -> str | None:
    """Text of a regular file of at most `limit` bytes; None if it is no such file."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            return None
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8", errors="replace")
    except (OSError, ValueError):  # ValueError: a zero byte in a path
        return None


def line_of(path: Path) -> str | None:
    """The one line of a small file."""
    text = text_of(path, MAX_LINE_FILE)
    return None if text is None else text.strip()


def packed_commit(path: Path, name: str) -> str | None:
    """The commit of a reference in a packed-refs file."""
    for line in (text_of(path, MAX_PACKED_REFS) or "").splitlines():
        commit, _, found = line.partition(" ")
        if found == name and COMMIT.fullmatch(commit):
            return commit
    return None
