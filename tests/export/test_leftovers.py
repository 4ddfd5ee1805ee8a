"""What a killed export leaves goes with the next one, and nothing else does."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moe_vision.export import export, hf
from moe_vision.export.leftovers import CODE, GRACE, MARK, clear_killed_exports, locked, workplace
from moe_vision.modeling.compose import save
from tests.export.conftest import Exported
from tests.tiny import tiny_model


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """No self-test: other files test that."""
    monkeypatch.setattr(hf, "run_selftest", lambda *_: {"max_difference": 0.0, "new_tokens": 4})


def partial(destination: Path, number: int = 4711, kind: str = "partial") -> Path:
    folder = destination.parent / f".{destination.name}.{kind}-{number}"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    (folder / (MARK if kind == "partial" else CODE)).touch()
    return folder


@pytest.mark.usefixtures("proven")
def test_the_next_export_removes_what_killed_ones_left(tiny: Exported, tmp_path: Path) -> None:
    destination = tmp_path / "out"
    gone = [partial(destination, number) for number in (1, 22)]
    in_use = partial(destination, 333)
    foreign = tmp_path / ".out.partial-1x"
    foreign.mkdir()
    unmarked = tmp_path / ".out.partial-5"
    unmarked.mkdir()
    other = partial(tmp_path / "other")
    with locked(in_use):
        export(tiny.source, destination)
    assert not any(folder.exists() for folder in gone)
    assert all(folder.exists() for folder in (in_use, foreign, unmarked, other, destination / CODE))
    assert not (destination / MARK).exists()


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    folder = partial(destination)
    code = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('holds', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
    clear_killed_exports(destination)
    assert folder.exists()
    holder.kill()
    holder.wait()
    clear_killed_exports(destination)
    assert not folder.exists()


def test_an_export_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    aside = partial(destination, kind="replaced")
    clear_killed_exports(destination)
    assert not aside.exists() and (destination / CODE).exists()
    aside = partial(destination, kind="replaced")  # the kill came after both renames
    clear_killed_exports(destination)
    assert not aside.exists() and (destination / CODE).exists()


def test_folders_of_killed_self_tests_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new = tmp_path / "moe-vision-selftest-old", tmp_path / "moe-vision-selftest-new"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    with workplace() as place:
        os.utime(place, (0, 0))
        clear_killed_exports(tmp_path / "out")
        assert place.exists() and new.exists() and not old.exists()
    assert GRACE > 1


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_folders_of_models_have_the_modes_of_the_umask(tiny: Exported, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save(*tiny_model(("clip",)), tmp_path / "model")
        export(tmp_path / "model", tmp_path / "out")
    finally:
        os.umask(before)
    for folder in (tmp_path / "model", tmp_path / "out"):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}
