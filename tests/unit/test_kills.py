"""Real kills: processes that SIGKILL ends at random moments leave a run that ends as an unbroken one does, bitwise.

Starting Python and importing torch takes seconds, so training processes are forked from this one, which has done it.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_vision.training import checkpoints, runner
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from moe_vision.training.trainer import GroupTrainer
from tests.unit.test_schedule_kinds import ALTERNATE, PREALIGN
from tests.unit.test_schedule_kinds import schedule as stages
from tests.unit.test_training import assert_same, weights

KILLS = 20
TIMED = ("second", "runtime")
"""Parts of the names of metrics that time alone decides."""


def config(folder: Path) -> TrainConfig:
    """An expert aligned by itself, groups in turn, and a joint stage."""
    aligned = {"prealign": {**PREALIGN["prealign"], "experts": ["sam"]}}
    joint = {"train": {"adapters": 1e-3, "language_model": 1e-2}}
    return stages(folder, aligned, ALTERNATE, joint, max_steps=4, logging_steps=3, batch_size=3, group_by_length=True)


def fork(schedule: TrainConfig, output: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """A process that trains; its id. It never returns into pytest."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            prepare()
            with (output.parent / "log").open("a", buffering=1) as log:
                train(schedule, output, console=Console(file=log))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    return process


def killed_after(process: int, seconds: float) -> bool:
    """Whether SIGKILL, sent then, met the process alive."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def metrics(output: Path) -> list[dict[str, Any]]:
    logs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in log.items() if not any(part in key for part in TIMED)} for log in logs]


def assert_nothing_half(output: Path) -> None:
    for checkpoint in output.glob("runs/*/checkpoint-*"):
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= {
            path.name for path in checkpoint.iterdir()
        }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path, float]:
    """A schedule, its output, and the seconds that a process took for it."""
    folder = tmp_path_factory.mktemp("unbroken")
    schedule, output = config(folder), folder / "out"
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(fork(schedule, output), 0)[1]) == 0
    return schedule, output, time.monotonic() - began


def test_twenty_kills_change_nothing(unbroken: tuple[TrainConfig, Path, float], tmp_path: Path) -> None:
    schedule, whole, seconds = unbroken
    chance, kills, rounds = random.Random(0), 0, 0
    while kills < KILLS:
        output = tmp_path / f"{rounds}" / "out"
        output.parent.mkdir()
        finished = False
        while not finished:
            process = fork(schedule, output)
            if kills < KILLS and killed_after(process, chance.uniform(0.05, 0.7) * seconds):
                kills += 1
                assert_nothing_half(output)
                continue
            if kills == KILLS:
                try:
                    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
                except ChildProcessError:
                    assert (output / "model").is_dir()
            finished = True
        rounds += 1
        assert_same(weights(output / "model"), weights(whole / "model"))
        assert metrics(output) == metrics(whole)
        assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_checkpoint() -> None:
    """Die when the weights of the third checkpoint are there and its optimizer is half-written."""

    def half(self: Any, folder: str) -> None:
        if self.state.global_step == 3:
            (Path(folder) / "optimizer.pt").write_bytes(b"half")
            die()
        original(self, folder)

    original = GroupTrainer._save_optimizer_and_scheduler
    GroupTrainer._save_optimizer_and_scheduler = half  # type: ignore[method-assign]


def between_runs() -> None:
    """Die when the first run is finished, before its checkpoints go."""

    def remove(*args: Any) -> None:
        die()

    runner.remove_checkpoints = remove


def in_a_removal() -> None:
    """Die when half of an old checkpoint is gone."""

    def remove(folder: Any, *args: Any, **kwargs: Any) -> None:
        if Path(folder).name.startswith(".checkpoint-"):
            (Path(folder) / "optimizer.pt").unlink()
            die()
        original(folder, *args, **kwargs)

    original = checkpoints.shutil.rmtree
    checkpoints.shutil.rmtree = remove  # type: ignore[assignment]


def before_a_run_is_finished() -> None:
    """Die when all steps are done, and nothing says so."""

    def saving(*args: Any) -> None:
        die()

    runner.save_synced = saving


@pytest.mark.parametrize("prepare", [in_a_checkpoint, in_a_removal, between_runs, before_a_run_is_finished])
def test_a_kill_at_the_worst_moment_changes_nothing(
    unbroken: tuple[TrainConfig, Path, float], tmp_path: Path, prepare: Callable[[], None]
) -> None:
    schedule, whole, _ = unbroken
    output = tmp_path / "out"
    status = os.waitpid(fork(schedule, output, prepare), 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert_nothing_half(output)
    if prepare is in_a_checkpoint:  # of the first run
        assert list(output.glob("runs/*/.checkpoint.partial/*")) and len(list(output.glob("runs/*/checkpoint-*"))) == 2
    assert os.waitstatus_to_exitcode(os.waitpid(fork(schedule, output), 0)[1]) == 0
    # A run that began anew would end alike: it has to go on.
    assert (output.parent / "log").read_text().count(": step 1/4") == len(schedule.stages)
    assert_same(weights(output / "model"), weights(whole / "model"))
    assert metrics(output) == metrics(whole)
    assert not list(output.rglob(".*.partial")) and not list(output.glob("runs/*/*"))


def test_sigterm_ends_after_the_step_with_a_checkpoint(
    unbroken: tuple[TrainConfig, Path, float], tmp_path: Path
) -> None:
    schedule, whole, _ = unbroken
    rare = schedule.model_copy(
        update={"stages": [stage.model_copy(update={"save_steps": 500}) for stage in schedule.stages]}
    )

    def at_step_two() -> None:
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args, **kwargs)

        original = GroupTrainer.training_step
        GroupTrainer.training_step = step  # type: ignore[method-assign]

    output = tmp_path / "out"
    assert os.waitstatus_to_exitcode(os.waitpid(fork(rare, output, at_step_two), 0)[1]) == 143
    assert [path.name for path in output.glob("runs/*/*")] == ["checkpoint-2"]
    assert_nothing_half(output)
    assert os.waitstatus_to_exitcode(os.waitpid(fork(rare, output), 0)[1]) == 0
    assert (output.parent / "log").read_text().count(": step 1/4") == len(schedule.stages)
    assert_same(weights(output / "model"), weights(whole / "model"))
    assert metrics(output) == metrics(whole)
