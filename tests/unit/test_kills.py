"""Real kills: processes that SIGKILL ends at random moments leave a run that ends as an unbroken one does, bitwise.

Starting Python and importing torch takes seconds, so training processes are forked from this one, which has done it.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from moe_vision import cli
from moe_vision.data.collate import ConversationDataset
from moe_vision.training import checkpoints, runner
from moe_vision.training import output as outputs
from moe_vision.training.output import OutputError
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


def rarely_saved(schedule: TrainConfig) -> TrainConfig:
    stages = [stage.model_copy(update={"save_steps": 500}) for stage in schedule.stages]
    return schedule.model_copy(update={"stages": stages})


def signals_at_step_two(*numbers: signal.Signals) -> Callable[[], None]:
    """Get these signals in a step."""

    def prepare() -> None:
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        original = GroupTrainer.training_step
        GroupTrainer.training_step = step  # type: ignore[method-assign]

    return prepare


def test_sigterm_ends_after_the_step_with_a_checkpoint(
    unbroken: tuple[TrainConfig, Path, float], tmp_path: Path
) -> None:
    schedule, whole, _ = unbroken
    rare, output = rarely_saved(schedule), tmp_path / "out"
    process = fork(rare, output, signals_at_step_two(signal.SIGTERM))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 143
    assert [path.name for path in output.glob("runs/*/*")] == ["checkpoint-2"]
    assert_nothing_half(output)
    assert os.waitstatus_to_exitcode(os.waitpid(fork(rare, output), 0)[1]) == 0
    assert (output.parent / "log").read_text().count(": step 1/4") == len(schedule.stages)
    assert_same(weights(output / "model"), weights(whole / "model"))
    assert metrics(output) == metrics(whole)


def test_a_second_signal_ends_at_once(unbroken: tuple[TrainConfig, Path, float], tmp_path: Path) -> None:
    rare, output = rarely_saved(unbroken[0]), tmp_path / "out"
    process = fork(rare, output, signals_at_step_two(signal.SIGINT, signal.SIGINT))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    assert list(output.glob("runs/*/*")) == []


def test_ctrl_c_ends_the_command_after_the_step_and_says_how_to_continue(
    unbroken: tuple[TrainConfig, Path, float], tmp_path: Path
) -> None:
    """In the process of the command: a checkpoint, one line, no traceback."""
    output = tmp_path / "out"
    config_file = tmp_path / "train.yaml"
    config_file.write_text(yaml.safe_dump(rarely_saved(unbroken[0]).model_dump(mode="json")))
    process = os.fork()
    if process == 0:
        sys.stderr = (tmp_path / "err").open("w", buffering=1)
        sys.argv = ["moe-vision", "train", str(config_file), "-o", str(output)]
        signals_at_step_two(signal.SIGINT)()
        try:
            cli.command()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    assert (tmp_path / "err").read_text().splitlines() == [
        "ended by Ctrl-C, with a checkpoint at step 2; the same command continues the training"
    ]
    assert [path.name for path in output.glob("runs/*/*")] == ["checkpoint-2"]
    assert_nothing_half(output)


def test_two_processes_do_not_write_one_output(
    unbroken: tuple[TrainConfig, Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused for as long as the first lives."""
    schedule, output = unbroken[0], tmp_path / "out"

    def sleep_in_step_two() -> None:
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                (tmp_path / "sleeps").touch()
                time.sleep(60)
            return original(self, *args, **kwargs)

        original = GroupTrainer.training_step
        GroupTrainer.training_step = step  # type: ignore[method-assign]

    process = fork(schedule, output, sleep_in_step_two)
    until = time.monotonic() + 50
    while not (tmp_path / "sleeps").exists() and time.monotonic() < until:
        time.sleep(0.01)
    monkeypatch.setattr(outputs, "PATIENCE", 0.1)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is being written by another process"):
            train(schedule, output, overwrite=overwrite)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert (output / "config.yaml").is_file()
    with outputs.held(output):
        pass


def test_a_worker_that_is_killed_is_named_and_the_same_command_continues(
    unbroken: tuple[TrainConfig, Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, output = unbroken[0], tmp_path / "out"
    stage = schedule.stages[-1].model_copy(update={"num_workers": 1, "save_steps": 1})
    schedule = schedule.model_copy(update={"stages": [stage]})
    whole = train(schedule, tmp_path / "whole")
    parent, original = os.getpid(), ConversationDataset.__getitem__

    def dying(self: Any, index: int) -> Any:
        if os.getpid() != parent and not (tmp_path / "died").exists() and list(output.glob("runs/*/checkpoint-3")):
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    monkeypatch.setattr(ConversationDataset, "__getitem__", dying)
    with pytest.raises(
        ChildProcessError, match=r"run '01-s2'.*DataLoader worker.*lower num_workers \(1 now\).*continues"
    ):
        train(schedule, output)
    assert_same(weights(train(schedule, output)), weights(whole))
