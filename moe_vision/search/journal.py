"""The journal of a search: a SQLite file that says what was done, what was under way, and what came of it.

One driver writes at a time; whoever likes may read. A row is a job by the hash of all that decides its result.
"""

import hashlib
import json
import os
import socket
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moe_vision.search.methods import SearchError

FORMAT = 2
"""1 had no digest of results. Such a journal is brought to 2 when it is opened."""

TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, experts TEXT NOT NULL, seed INTEGER NOT NULL, length REAL NOT NULL,
    config TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'done', 'failed')),
    "right" BLOB, value REAL, error TEXT, seconds TEXT, host TEXT, attempts INTEGER NOT NULL DEFAULT 0,
    started REAL, ended REAL, digest TEXT
)
"""

COLUMNS = (
    "key", "kind", "experts", "seed", "length", "config", "status", "right", "value", "error", "seconds", "host",
    "attempts", "started", "ended", "digest",
)  # fmt: skip

STATUSES = ("queued", "running", "done", "failed")

OPENING_SECONDS, WRITING_SECONDS = 5.0, 60.0
"""How long to wait for other programs that lock the file: at the start, and with results at hand."""

ANEW = ("restore it from a copy, or move it away: then trials whose models are still in the output are only asked "
        "again, all others are trained again")  # fmt: skip


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
    """Jobs by key, below a file. Made by `opened`, which holds its lock. Every method raises SearchError where the file
    cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_place(path)
        try:
            self.connection = sqlite3.connect(path, isolation_level=None, timeout=OPENING_SECONDS)
        except sqlite3.Error as error:
            raise self.fault(error) from error
        try:
            self.check_file()
            self.execute("PRAGMA synchronous = FULL")
            self.begin_format()
            self.check_rows()
        except BaseException:
            self.close()
            raise
        self.execute(f"PRAGMA busy_timeout = {int(WRITING_SECONDS * 1000)}")

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Run a statement whose rows are read by `rows`."""
        try:
            return self.connection.execute(statement, values)
        except sqlite3.Error as error:
            raise self.fault(error) from error

    def rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement."""
        try:
            return self.connection.execute(statement, values).fetchall()
        except UnicodeDecodeError as error:  # of the schema; SQLite's errors are of all other text
            raise self.damaged(str(error)) from error
        except sqlite3.Error as error:
            raise self.fault(error) from error

    def begin_format(self) -> None:
        """Make a new file a journal, and bring one of format 1 to this one."""
        self.execute("BEGIN IMMEDIATE")  # whoever raises closes the file, which undoes it
        if "jobs" in self.tables() and self.format() == 1:
            self.execute("ALTER TABLE jobs ADD COLUMN digest TEXT")
            for key, status, right, error in self.rows(
                "SELECT key, status, \"right\", error FROM jobs WHERE status IN ('done', 'failed')"
            ):
                self.execute("UPDATE jobs SET digest = ? WHERE key = ?", (digest(key, status, right, error), key))
        self.execute(TABLE)
        self.execute(f"PRAGMA user_version = {FORMAT}")
        self.execute("COMMIT")

    def format(self) -> int:
        ((found,),) = self.rows("PRAGMA user_version")
        return int(found)

    def tables(self) -> list[str]:
        return [name for (name,) in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")]

    def check_file(self) -> None:
        """Raise SearchError if the file is damaged, of another format, or no journal."""
        found, tables = self.format(), self.tables()
        if found > FORMAT:
            raise SearchError(f"journal '{self.path}' has format {found}, of a newer moe-vision; this version reads "
                              f"{FORMAT}: update moe-vision, or choose another --output")  # fmt: skip
        if tables and "jobs" not in tables:
            raise SearchError(f"'{self.path}' is a SQLite file with the tables {', '.join(sorted(tables)[:4])}, and no "
                              "journal of a search: move it away, or choose another --output")  # fmt: skip
        if tables and found < 1:
            raise SearchError(f"journal '{self.path}' has format {found}, of an older moe-vision; this version reads "
                              f"{FORMAT}: continue with the version that wrote it, or choose another --output, where "
                              "every trial is trained again")  # fmt: skip
        ((verdict,),) = self.rows("PRAGMA integrity_check(1)")
        if verdict != "ok":
            raise self.damaged(verdict)
        columns = [name for _, name, *_ in self.rows("PRAGMA table_info(jobs)")]
        expected = COLUMNS if found == FORMAT else COLUMNS[:-1]
        if tables and sorted(columns) != sorted(expected):
            raise self.damaged(f"its table jobs has the columns {', '.join(columns)}")

    def check_rows(self) -> None:
        """Raise SearchError if a row is not what a search has written."""
        for key, config, status, right, error, seconds, own in self.rows(
            'SELECT key, config, status, "right", error, seconds, digest FROM jobs ORDER BY key'
        ):
            try:
                whole = hashlib.sha256(config.encode()).hexdigest() == key and status in STATUSES
                whole &= own == (digest(key, status, right, error) if status in ("done", "failed") else None)
                whole &= status != "done" or set(right) <= {0, 1}
                whole &= isinstance(json.loads(seconds or "{}"), dict)
            except (ValueError, TypeError, AttributeError):
                whole = False
            if not whole:
                raise self.damaged(f"the row of job {str(key)[:16]!r} is not what a search wrote")

    def damaged(self, what: str) -> SearchError:
        return SearchError(f"journal '{self.path}' is damaged ({' '.join(what.split())}): {ANEW}")

    def fault(self, error: sqlite3.Error) -> SearchError:
        """What SQLite's error means for whoever called the search."""
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            who = " and ".join(holders(self.path)) or "another program"
            return SearchError(f"journal '{self.path}' is locked by {who}: let that program end or close the file, "
                               "then call again; the journal is whole, leave it where it is")  # fmt: skip
        if name.startswith("SQLITE_FULL"):
            return SearchError(f"journal '{self.path}' cannot be written (the disk is full): make room, then call "
                               "again; what has ended is kept")  # fmt: skip
        if name.startswith(("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_CANTOPEN", "SQLITE_IOERR")):
            return SearchError(f"journal '{self.path}' cannot be opened or written ({error}): make the file and its "
                               "folder writable, or choose another --output")  # fmt: skip
        return self.damaged(str(error))

    def close(self) -> None:
        self.connection.close()

    def requeue(self) -> int:
        """Put what a killed driver had under way back into the queue; returns how much that was."""
        return self.execute("UPDATE jobs SET status = 'queued' WHERE status = 'running'").rowcount

    def forget_failures(self) -> int:
        """Queue what failed, to be tried again."""
        return self.execute(
            "UPDATE jobs SET status = 'queued', error = NULL, digest = NULL WHERE status = 'failed'"
        ).rowcount

    def ended(self, key: str) -> Row | None:
        """What came of a job, if it has ended."""
        found = self.rows(
            "SELECT status, \"right\", error, seconds FROM jobs WHERE key = ? AND status IN ('done', 'failed')", (key,)
        )
        if not found:
            return None
        ((status, right, error, seconds),) = found
        return Row(status, right or b"", error, json.loads(seconds or "{}"))

    def begin(self, key: str, kind: str, experts: tuple[str, ...], seed: int, length: float, config: str) -> None:
        """A job is under way."""
        self.execute(
            "INSERT INTO jobs (key, kind, experts, seed, length, config, status, attempts, started, host) "
            "VALUES (?, ?, ?, ?, ?, ?, 'running', 1, ?, ?) ON CONFLICT (key) DO UPDATE SET status = 'running', "
            "digest = NULL, attempts = attempts + 1, started = excluded.started, host = excluded.host",
            (key, kind, json.dumps(experts), seed, length, config, time.time(), socket.gethostname()),
        )

    def finish(self, key: str, right: list[bool], value: float | None, seconds: dict[str, float], host: str) -> None:
        """A job is done. value: the metric of its answers, for readers of the file."""
        own = digest(key, "done", bytes(right), None)
        self.execute(
            "UPDATE jobs SET status = 'done', \"right\" = ?, error = NULL, value = ?, seconds = ?, host = ?, "
            "ended = ?, digest = ? WHERE key = ?",
            (bytes(right), value, json.dumps(seconds), host, time.time(), own, key),
        )

    def fail(self, key: str, error: str) -> None:
        """A job has failed."""
        error = error.encode("utf-8", "backslashreplace").decode()  # names of files may hold what no text may
        own = digest(key, "failed", None, error)
        self.execute(
            "UPDATE jobs SET status = 'failed', \"right\" = NULL, error = ?, ended = ?, digest = ? WHERE key = ?",
            (error, time.time(), own, key),
        )


def digest(key: str, status: str, right: bytes | None, error: str | None) -> str:
    """Of a job that has ended: what tells that its result is the one that was written."""
    told = json.dumps([key, status, None if right is None else right.hex(), error])
    return hashlib.sha256(told.encode()).hexdigest()


def check_place(path: Path) -> None:
    """Raise SearchError if what is in the journal's place is no file, or lost its content."""
    if path.is_symlink() and not path.exists():
        raise SearchError(f"journal '{path}' is a link to nothing: remove the link, or mount what it leads to")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        kind = "a folder" if path.is_dir() else "no regular file"
        raise SearchError(f"journal '{path}' is {kind}: move it away, or choose another --output")
    began = [name for name in ("trials", "aligned") if any((path.parent / name).glob("*"))]
    if path.exists() and path.stat().st_size == 0 and began:  # without trials, a search that was killed as it began
        raise SearchError(f"journal '{path}' is damaged (it has zero bytes, and there are {began[0]}): {ANEW}")


def holders(path: Path) -> list[str]:
    """Processes of this machine that have locked a file, where the system tells."""
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: dict[int, str] = {}
    for line in lines:
        fields = [field for field in line.split() if field != "->"]
        process, place = int(fields[4]), fields[5].rpartition(":")[2]
        if place == str(inode) and process not in (-1, 0, os.getpid()):
            command = Path(f"/proc/{process}/comm")
            name = command.read_text(encoding="utf-8").strip() if command.is_file() else "ended"
            found[process] = f"process {process} ({name})"
    return list(found.values())


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other searches out of an output. Raises SearchError while another process searches there."""
    lock = FileLock(output / "search.lock")
    driver = output / "search.driver"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            who = driver.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            who = ""
        who = who or " and ".join(holders(output / "search.lock")) or "another process"
        raise SearchError(
            f"output '{output}' is being searched by {who}: wait for it, or choose another --output"
        ) from None
    except OSError as error:
        raise SearchError(f"output '{output}' cannot be locked ({error}): make '{output / 'search.lock'}' a writable "
                          "file, or choose another --output") from error  # fmt: skip
    try:
        try:
            driver.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except OSError as error:
            raise SearchError(f"'{driver}' cannot be written ({error}): make room and its folder writable, or choose "
                              "another --output") from error  # fmt: skip
        yield
    finally:
        lock.release()


@contextmanager
def opened(output: Path) -> Iterator[Journal]:
    """OUTPUT/search.db, for this process alone. Raises SearchError while another one works on it, and where it cannot
    be read or written."""
    with locked(output):
        journal = Journal(output / "search.db")
        try:
            yield journal
        finally:
            journal.close()
