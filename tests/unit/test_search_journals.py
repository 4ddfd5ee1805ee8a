"""Journals of a search that are damaged, locked, older, or in the wrong place: a message that names the file and what
to do, and no journal that is whole is given up."""

import hashlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_vision.search import SearchError, executors, search
from moe_vision.search import journal as journals
from moe_vision.search.jobs import Job, Result
from moe_vision.search.journal import FORMAT, Journal, locked, opened
from moe_vision.training.output import OutputError
from tests.unit.toy_search import QUIET, search_config

ROWS = 60


def key_of(number: int) -> str:
    return hashlib.sha256(config_of(number).encode()).hexdigest()


def config_of(number: int) -> str:
    return f'{{"seed": {number}, "model": "{"m" * 200}"}}'


def right_of(number: int) -> list[bool]:
    return [(number * item) % 3 == 0 for item in range(150)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole journal of some pages."""
    path = tmp_path_factory.mktemp("journal") / "search.db"
    journal = Journal(path)
    journal.execute("PRAGMA synchronous = OFF")  # for the test's speed
    for number in range(ROWS):
        journal.begin(key_of(number), "trial", ("clip",), number, 1.0, config_of(number))
        journal.finish(key_of(number), right_of(number), 0.5, {"train": 1.0}, "here")
    journal.close()
    return path


@pytest.fixture
def written(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, beside the folder of its trials."""
    (tmp_path / "trials/0").mkdir(parents=True)
    shutil.copy(whole, tmp_path / "search.db")
    return tmp_path / "search.db"


def cut(share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def statement(*statements: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        connection = sqlite3.connect(path)
        for each in statements:
            connection.execute(each)
        connection.commit()
        connection.close()

    return change


def in_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cut(0), "is damaged (it has zero bytes, and there are trials): restore it from a copy, or move it away"),
        (cut(0.002), "is damaged ("),
        (cut(0.5), "is damaged ("),
        (cut(0.98), "is damaged ("),
        (lambda path: path.write_text("garbage" * 100), "is damaged (file is not a database): restore it"),
        (lambda path: path.write_bytes(bytes(4096)), "is damaged (file is not a database): restore it"),
        (statement("UPDATE jobs SET config = 'other' WHERE seed = 3"), "is not what a search wrote): restore it"),
        (statement("UPDATE jobs SET \"right\" = x'0002' WHERE seed = 3"), "is not what a search wrote): restore it"),
        (statement("UPDATE jobs SET \"right\" = NULL WHERE seed = 3"), "is not what a search wrote): restore it"),
        (statement("UPDATE jobs SET \"right\" = x'0001' WHERE seed = 3"), "is not what a search wrote): restore it"),
        (statement("UPDATE jobs SET status = 'queued' WHERE seed = 3"), "is not what a search wrote): restore it"),
        (statement("UPDATE jobs SET status = 'failed' WHERE seed = 3"), "is not what a search wrote): restore it"),
        (statement("UPDATE jobs SET seconds = '{' WHERE seed = 3"), "is not what a search wrote): restore it"),
        (statement("ALTER TABLE jobs RENAME COLUMN value TO score"), "is damaged (its table jobs has the columns key"),
        (in_place(statement("CREATE TABLE cats (id)")), "with the tables cats, and no journal of a search: move it"),
        (statement("PRAGMA user_version = 7"), f"has format 7, of a newer moe-vision; this version reads {FORMAT}: up"),
        (statement("PRAGMA user_version = 0"), f"has format 0, of an older moe-vision; this version reads {FORMAT}: c"),
        (in_place(Path.mkdir), "is a folder: move it away, or choose another --output"),
        (in_place(os.mkfifo), "is no regular file: move it away, or choose another --output"),
        (in_place(lambda path: path.symlink_to("nothing")), "is a link to nothing: remove the link, or mount"),
        (in_place(lambda path: path.symlink_to(path.name)), "is a link to nothing: remove the link, or mount"),
    ],
)  # fmt: skip
def test_a_journal_that_is_none_is_named(written: Path, change: Callable[[Path], object], says: str) -> None:
    path = written
    change(path)
    with pytest.raises(SearchError) as error:
        Journal(path)
    assert str(error.value).startswith(("journal '", "'")) and str(path) in str(error.value)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_flipped_bytes_are_found_or_change_no_answer(whole: Path, tmp_path: Path) -> None:
    chance, found = random.Random(0), 0
    for number in range(60):
        path = tmp_path / f"{number}.db"
        content = bytearray(whole.read_bytes())
        for _ in range(3):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            journal = Journal(path)
        except SearchError as error:
            assert str(path) in str(error)
            found += 1
            continue
        for row in range(ROWS):
            ended = journal.ended(key_of(row))
            assert ended is not None and ended.answers() == right_of(row)
        journal.close()
    assert found > 20


def test_a_journal_of_format_1_is_brought_to_this_one(written: Path) -> None:
    older = statement("ALTER TABLE jobs DROP COLUMN digest", "PRAGMA user_version = 1")
    older(written)
    for _ in range(2):  # the second time it is of this format
        journal = Journal(written)
        for row in range(ROWS):
            ended = journal.ended(key_of(row))
            assert ended is not None and ended.answers() == right_of(row)
        assert journal.format() == FORMAT
        journal.close()
    older(written)
    statement("UPDATE jobs SET config = 'other' WHERE seed = 3")(written)
    with pytest.raises(SearchError, match="is not what a search wrote"):
        Journal(written)


def test_failures_and_second_tries_are_kept_whole(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        for number in range(3):
            journal.begin(key_of(number), "trial", ("clip",), number, 1.0, config_of(number))
        journal.fail(key_of(0), "no such file: \udcff")
        journal.fail(key_of(1), "out of memory")
    with opened(tmp_path) as journal:
        failed = journal.ended(key_of(0))
        assert failed is not None and failed.error == "no such file: \\udcff"
        assert journal.requeue() == 1 and journal.forget_failures() == 2
    with opened(tmp_path) as journal:
        journal.begin(key_of(0), "trial", ("clip",), 0, 1.0, config_of(0))
        journal.finish(key_of(0), [True, False], 0.5, {}, "here")
    with opened(tmp_path) as journal:
        again = journal.ended(key_of(0))
        assert again is not None and again.answers() == [True, False] and again.error is None
        assert journal.ended(key_of(1)) is None


def test_an_empty_file_without_trials_is_a_search_that_was_killed_as_it_began(tmp_path: Path) -> None:
    (tmp_path / "search.db").touch()
    with opened(tmp_path) as journal:
        assert journal.ended("x") is None


LOCKS = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def locking(path: Path) -> subprocess.Popen[str]:
    """Another process that holds SQLite's lock of a file until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOCKS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_a_lock_is_never_a_reason_to_remove_a_journal(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "OPENING_SECONDS", 0.1)
    monkeypatch.setattr(journals, "WRITING_SECONDS", 0.1)
    path = written
    holder = locking(path)
    with pytest.raises(SearchError) as error:
        Journal(path)
    holder.communicate()
    said = [str(error.value)]
    journal = Journal(path)
    holder = locking(path)  # while the search is at work
    for call in (
        lambda: journal.begin(key_of(0), "trial", ("clip",), 0, 1.0, config_of(0)), lambda: journal.ended(key_of(0)),
        lambda: journal.finish(key_of(0), [True], 1.0, {}, "here"), journal.requeue, journal.forget_failures,
    ):  # fmt: skip
        with pytest.raises(SearchError) as error:
            call()
        said.append(str(error.value))
    holder.communicate()
    for line in said:
        assert f"journal '{path}' is locked by process " in line and "python" in line
        assert "let that program end" in line and "leave it where it is" in line
        assert not any(word in line for word in ("remove", "move it", "restore", "damaged", "delete"))
    assert f"process {holder.pid} " in said[-1]
    assert journal.ended(key_of(0)) is not None
    journal.close()


def test_a_full_disk_and_a_file_that_cannot_be_written_are_named(written: Path) -> None:
    journal = Journal(written)
    journal.execute("PRAGMA max_page_count = 1")  # SQLite's own error of a full disk
    with pytest.raises(SearchError, match=r"search.db' cannot be written \(the disk is full\): make room, then call"):
        for number in range(ROWS, 4 * ROWS):
            journal.begin(key_of(number), "trial", ("clip",), number, 1.0, config_of(number))
    ended = journal.ended(key_of(0))
    assert ended is not None and ended.answers() == right_of(0)
    journal.execute("PRAGMA query_only = 1")  # as a file without permission to write
    with pytest.raises(SearchError, match=r"search.db' cannot be opened or written \(attempt to write a readonly dat"):
        journal.requeue()
    journal.close()


def test_places_that_cannot_be_locked_are_named(tmp_path: Path) -> None:
    (tmp_path / "lock/search.lock").mkdir(parents=True)
    (tmp_path / "driver/search.driver").mkdir(parents=True)
    lock = pytest.raises(SearchError, match=r"lock' cannot be locked .*: make '.*search.lock' a writable")
    with lock, locked(tmp_path / "lock"):
        pass
    with pytest.raises(SearchError, match=r"search.driver' cannot be written "), locked(tmp_path / "driver"):
        pass
    (tmp_path / "busy").mkdir()
    with locked(tmp_path / "busy"):
        (tmp_path / "busy/search.driver").write_bytes(b"\xff")
        busy = pytest.raises(SearchError, match=r"is being searched by .*: wait for it")
        with busy, locked(tmp_path / "busy"):
            pass


def test_a_search_says_what_is_wrong_with_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, as a user meets it: nothing is lost, and --overwrite begins anew."""

    def run(job: Job) -> Result:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        return Result([True] * (0 if job.asked is None else 16 if "validation" in str(job.asked) else 12), {}, "here")

    monkeypatch.setattr(executors, "run_job", run)
    config, output = search_config(tmp_path, pool=["clip"], seeds=1), tmp_path / "out"
    search(config, output, console=QUIET)

    def refused(error: type[Exception], says: str, other: Any = config) -> None:
        files = [path for path in output.rglob("*") if path.is_file() and path.name != "search.lock"]
        before = {path: path.read_bytes() for path in files}
        with pytest.raises(error, match=says):
            search(other, output, console=QUIET)
        assert {path: path.read_bytes() for path in before} == before

    longer = config.model_copy(update={"max_new_tokens": 4})
    refused(OutputError, r"another config \(max_new_tokens was 3 and is 4\): ", longer)
    path = tmp_path / "test/data.json"
    whole = path.read_text()
    path.write_text(whole.replace("is it black", "is it dark"))
    refused(OutputError, r"began with other data: the data of test has other content")
    path.write_text(whole)
    shutil.copy(output / "search.db", tmp_path / "copy.db")
    (output / "search.db").write_bytes(b"")
    refused(SearchError, "search.db' is damaged \\(it has zero bytes")
    shutil.copy(tmp_path / "copy.db", output / "search.db")
    for name in ("search.db-wal", "search.db-shm", "search.db-journal"):  # of a reader that was killed
        (output / name).touch()
    monkeypatch.setattr(executors, "run_job", lambda job: pytest.fail("what has ended is done again"))
    search(config, output, console=QUIET)
    free = {"num_workers": 2, "logging_steps": 3, "save_steps": 7, "cache_gb": 2.0}  # which change no result
    stages = [stage.model_copy(update=free) for stage in config.stages]
    search(config.model_copy(update={"stages": stages}), output, console=QUIET)
    stages = [stage.model_copy(update={"max_steps": 13}) for stage in config.stages]
    refused(OutputError, r"stages.0.max_steps was 12 and is 13", config.model_copy(update={"stages": stages}))
    (output / "search.db").write_text("garbage" * 100)
    monkeypatch.setattr(executors, "run_job", run)
    assert search(config, output, console=QUIET, overwrite=True)["best"]["experts"] == ["clip"]
