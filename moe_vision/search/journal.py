"""The journal of a search: a SQLite file that says what was done, what was under way, and what came of it.

One driver writes at a time; whoever likes may read. A row is a job by the hash of all that decides its result.
"""

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from moe_vision.search.methods import SearchError

FORMAT = 1

TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, experts TEXT NOT NULL, seed INTEGER NOT NULL, length REAL NOT NULL,
    config TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'done', 'failed')),
    "right" BLOB, value REAL, error TEXT, seconds TEXT, host TEXT, attempts INTEGER NOT NULL DEFAULT 0,
    started REAL, ended REAL
)
"""


@dataclass(frozen=True)
class Row:
    """A job that has ended. right: of each item, 1 or 0; error: of one that failed."""

    status: str
    right: bytes
    error: str | None
    seconds: dict[str, float]

    def answers(self) -> list[bool]:
        return [bool(value) for value in self.right]


class Journal:
    """Jobs by key, below a file. Made by `opened`, which holds its lock."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, timeout=60)
        try:
            self.connection.execute("PRAGMA synchronous = FULL")
            found = self.connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            self.close()
            raise SearchError(
                f"journal '{path}' cannot be read ({error}): restore it, or remove it; finished trials are asked again"
            ) from error
        if found not in (0, FORMAT):
            raise SearchError(
                f"journal '{path}' has format {found}, this version reads {FORMAT}: choose another output"
            )
        self.connection.execute(f"PRAGMA user_version = {FORMAT}")
        self.connection.execute(TABLE)

    def close(self) -> None:
        self.connection.close()

    def requeue(self) -> int:
        """Put what a killed driver had under way back into the queue; returns how much that was."""
        return self.connection.execute("UPDATE jobs SET status = 'queued' WHERE status = 'running'").rowcount

    def forget_failures(self) -> int:
        """Queue what failed, to be tried again."""
        return self.connection.execute(
            "UPDATE jobs SET status = 'queued', error = NULL WHERE status = 'failed'"
        ).rowcount

    def ended(self, key: str) -> Row | None:
        """What came of a job, if it has ended."""
        found = self.connection.execute(
            "SELECT status, \"right\", error, seconds FROM jobs WHERE key = ? AND status IN ('done', 'failed')", (key,)
        ).fetchone()
        if found is None:
            return None
        return Row(found[0], found[1] or b"", found[2], json.loads(found[3] or "{}"))

    def begin(self, key: str, kind: str, experts: tuple[str, ...], seed: int, length: float, config: str) -> None:
        """A job is under way."""
        self.connection.execute(
            "INSERT INTO jobs (key, kind, experts, seed, length, config, status, attempts, started, host) "
            "VALUES (?, ?, ?, ?, ?, ?, 'running', 1, ?, ?) ON CONFLICT (key) DO UPDATE SET status = 'running', "
            "attempts = attempts + 1, started = excluded.started, host = excluded.host",
            (key, kind, json.dumps(experts), seed, length, config, time.time(), socket.gethostname()),
        )

    def finish(self, key: str, right: list[bool], value: float | None, seconds: dict[str, float], host: str) -> None:
        """A job is done. value: the metric of its answers, for readers of the file."""
        self.connection.execute(
            "UPDATE jobs SET status = 'done', \"right\" = ?, value = ?, seconds = ?, host = ?, ended = ? WHERE key = ?",
            (bytes(right), value, json.dumps(seconds), host, time.time(), key),
        )

    def fail(self, key: str, error: str) -> None:
        self.connection.execute(
            "UPDATE jobs SET status = 'failed', error = ?, ended = ? WHERE key = ?", (error, time.time(), key)
        )


@contextmanager
def opened(output: Path) -> Iterator[Journal]:
    """OUTPUT/search.db, for this process alone. Raises SearchError while another one works on it."""
    lock = FileLock(output / "search.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = output / "search.driver"
        who = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another process"
        raise SearchError(
            f"output '{output}' is being searched by {who}: wait for it, or choose another --output"
        ) from None
    try:
        (output / "search.driver").write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        journal = Journal(output / "search.db")
        try:
            yield journal
        finally:
            journal.close()
    finally:
        lock.release()
