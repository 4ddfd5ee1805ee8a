"""The commit of a checkout is read from files: as `git rev-parse HEAD` has it, and without running anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch  # noqa: F401 - `record_environment` asks for versions

from moe_vision.training import provenance
from moe_vision.training.git_commit import commit_of

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="compares with git itself")


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "deep/er").mkdir(parents=True)
    git(folder, "init")
    for text in ("one", "two"):
        (folder / "deep/er/file").write_text(text)
        git(folder, "add", ".")
        git(folder, "commit", "-m", text)
    return folder


@needs_git
@pytest.mark.parametrize(
    "state", ["branch", "detached", "packed", "worktree", "worktree packed", "submodule", "nested branch", "no commit"]
)
def test_the_commit_is_what_git_says(checkout: Path, state: str) -> None:
    folder = checkout
    if state == "detached":
        git(checkout, "checkout", git(checkout, "rev-parse", "HEAD~1"))
    if state == "nested branch":
        git(checkout, "checkout", "-b", "a/b-c/d")
    if state.startswith("worktree"):
        git(checkout, "worktree", "add", "../tree", "-b", "other")
        folder = checkout.parent / "tree"
    if state == "submodule":
        git(checkout, "-c", "protocol.file.allow=always", "submodule", "add", str(checkout), "inner")
        folder = checkout / "inner"
    if "packed" in state:
        git(checkout, "pack-refs", "--all")
        assert not (checkout / ".git/refs/heads/main").exists()
    if state == "no commit":
        folder = checkout.parent / "new"
        folder.mkdir()
        git(folder, "init")
        assert commit_of(folder) is None
        return
    deep = folder / "deep/er"
    assert commit_of(folder) == commit_of(deep) == git(folder, "rev-parse", "HEAD")


@needs_git
def test_no_program_of_the_checkout_runs(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {ran}\n")
    hook.chmod(0o755)
    git(checkout, "config", "core.fsmonitor", str(hook))
    monkeypatch.chdir(checkout)
    provenance.record_environment(tmp_path / "environment.json")
    assert not ran.exists() and git(checkout, "rev-parse", "HEAD") in (tmp_path / "environment.json").read_text()
    git(checkout, "status")
    assert ran.exists()  # so that this test can fail


EVIL = {
    "pipe": lambda git: os.mkfifo(git / "HEAD"), "loop": lambda git: (git / "HEAD").symlink_to("HEAD"),
    "large": lambda git: (git / "HEAD").write_text("0" * 10**6),
    "binary": lambda git: (git / "HEAD").write_bytes(b"\xff\0"),
    "outside": lambda git: (git / "HEAD").write_text("ref: refs/../../secret"),
    "absolute": lambda git: (git / "HEAD").write_text("ref: /etc/passwd"),
    "text": lambda git: (git / "HEAD").write_text("ref: refs/heads/main"), "empty": lambda git: None,
}  # fmt: skip


@pytest.mark.parametrize("kind", list(EVIL))
def test_files_that_git_did_not_write_are_not_believed(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x/.git/refs/heads").mkdir(parents=True)
    (tmp_path / "x/.git/refs/heads/main").write_text("a secret")
    (tmp_path / "secret").write_text("0" * 40)
    EVIL[kind](tmp_path / "x/.git")
    assert commit_of(tmp_path / "x") is None


@pytest.mark.parametrize(
    "text", ["", "gitdir: ", "gitdir: .git", "gitdir: \0", "gitdir: /dev", "nothing", "gitdir: " + "x" * 9999]
)
def test_a_git_file_that_leads_nowhere(tmp_path: Path, text: str) -> None:
    (tmp_path / ".git").write_text(text)
    assert commit_of(tmp_path) is None
