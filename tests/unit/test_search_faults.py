"""A search that is killed, whose workers die, whose disk is full or whose files are broken goes on, or says so."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_vision.config import validate
from moe_vision.search import SearchConfig, SearchError, executors, jobs, search
from moe_vision.search.config import LocalExecutor
from moe_vision.search.executors import Processes, Worker, attempt
from moe_vision.search.jobs import Job, Result, trained
from moe_vision.search.journal import opened
from moe_vision.training.checkpoints import WriteError
from moe_vision.training.output import OutputError
from moe_vision.training.schedule import TrainConfig
from tests.unit.test_kills import killed_after
from tests.unit.toy_search import QUIET, journal, reported, search_config

KILLS = 10


def fork(config: SearchConfig, output: Path) -> int:
    """A process that searches; its id. It never returns into pytest."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            search(config, output, console=QUIET)
            code = 0
        finally:
            os._exit(code)
    return process


def test_ten_kills_of_the_driver_change_nothing(tmp_path: Path) -> None:
    config, chance = search_config(tmp_path, max_experts=2, seeds=1), random.Random(0)
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(fork(config, tmp_path / "whole"), 0)[1]) == 0
    seconds, kills, rounds = time.monotonic() - began, 0, 0
    whole = reported(tmp_path / "whole")
    while kills < KILLS:
        output, finished = tmp_path / f"killed-{rounds}", False
        while not finished:
            process = fork(config, output)
            if kills < KILLS:
                if killed_after(process, chance.uniform(0.05, 0.6) * seconds):
                    kills += 1
                    continue
                finished = True
            else:
                finished = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
                assert finished
        rounds += 1
        assert reported(output) == whole
        rows = journal(output)
        assert {row["status"] for row in rows} == {"done"}
        assert len(rows) == len(journal(tmp_path / "whole"))


def test_what_has_finished_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = search_config(tmp_path, pool=["clip", "sam"], seeds=1)
    calls: list[str] = []

    def counted(job: Job) -> Result:
        calls.append(job.key)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return jobs.run_job(job)

    monkeypatch.setattr(executors, "run_job", counted)
    with pytest.raises(KeyboardInterrupt):
        search(config, tmp_path / "out", console=QUIET)
    assert [row["status"] for row in journal(tmp_path / "out")] == ["done", "running"]
    search(config, tmp_path / "out", console=QUIET)
    assert calls.count(calls[0]) == 1 and calls.count(calls[1]) == 2
    attempts = {row["key"]: row["attempts"] for row in journal(tmp_path / "out")}
    assert attempts[calls[0]] == 1 and attempts[calls[1]] == 2


def test_two_drivers_on_one_journal(tmp_path: Path) -> None:
    config = search_config(tmp_path, pool=["clip"], seeds=1)
    search(config, tmp_path / "out", console=QUIET)
    whole = reported(tmp_path / "out")
    for overwrite in (False, True):
        busy = pytest.raises(SearchError, match=rf"is being searched by process {os.getpid()} on .*: wait for it")
        with opened(tmp_path / "out"), busy:
            search(config, tmp_path / "out", console=QUIET, overwrite=overwrite)
        assert reported(tmp_path / "out") == whole
    assert search(config, tmp_path / "out", console=QUIET)["best"]["experts"] == ["clip"]


def test_a_candidate_that_crashes_is_reported_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = search_config(tmp_path, pool=["clip", "sam"], seeds=2, max_experts=1)

    def crashes(job: Job) -> Result:
        if job.experts == ("sam",) and job.seed == 1:
            raise RuntimeError("out of memory\nin detail")
        return jobs.run_job(job)

    monkeypatch.setattr(executors, "run_job", crashes)
    summary = search(config, tmp_path / "out", console=QUIET)
    assert summary["best"]["experts"] == ["clip"]
    assert summary["rounds"][0]["candidates"][1]["failed"] == "RuntimeError: out of memory"
    assert "failed: RuntimeError: out of memory" in (tmp_path / "out/report.md").read_text()
    (row,) = [row for row in journal(tmp_path / "out") if row["status"] == "failed"]
    assert "in detail" in row["error"] and "test_search_faults.py" in row["error"]  # where it crashed
    monkeypatch.setattr(executors, "run_job", jobs.run_job)
    assert search(config, tmp_path / "out", console=QUIET) == summary  # what failed stays so, until it is asked for
    again = search(config, tmp_path / "out", console=QUIET, retry_failed=True)
    assert again["rounds"][0]["candidates"][1]["failed"] is None


def test_a_full_disk_is_no_fault_of_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("k", "trial", ("clip",), 0, {}, "f", 0)
    for error in (WriteError("the model cannot be written"), OSError(28, "No space left on device")):
        monkeypatch.setattr(executors, "run_job", raising(error))
        with pytest.raises(OSError, match=r"cannot be written|No space"):
            attempt(job)
    monkeypatch.setattr(executors, "run_job", raising(FileNotFoundError("weights.safetensors")))
    assert str(attempt(job)).startswith("FileNotFoundError: weights.safetensors")


def raising(error: Exception) -> Any:
    def run(job: Job) -> Result:
        raise error

    return run


def dies_once(job: Job) -> Result:
    """For a process of its own: the first call ends it."""
    marker = Path(job.folder) / job.key
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Result([True], {}, "here")


def always_dies(job: Job) -> Result:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_process_that_dies_takes_no_job_with_it_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [Job(str(number), "trial", ("clip",), number, {}, str(tmp_path), 0) for number in range(4)]
    pool = Processes(LocalExecutor(processes=2))
    begun: list[str] = []
    monkeypatch.setattr(executors, "attempt", dies_once)
    ended = {job.key: result for job, result in pool.run(every, lambda job: begun.append(job.key))}
    assert set(ended) == {"0", "1", "2", "3"} and {type(result) for result in ended.values()} == {Result}
    assert len(begun) > 4
    monkeypatch.setattr(executors, "attempt", always_dies)
    ((_, result),) = pool.run(every[:1], lambda job: None)
    assert result == "its process died 3 times while nothing else ran: out of memory, or killed"
    pool.close()


def dies_beside_one_that_stays(job: Job) -> Result:
    """The first job's process ends once the second's is at work, which does not end when it is told to."""
    begun, died = Path(job.folder) / "begun", Path(job.folder) / "dies"
    if job.key == "stays":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as while a trial trains
        begun.touch()
        while not died.exists():
            time.sleep(0.01)
        time.sleep(1)  # time to be noticed
    else:
        while not begun.exists():
            time.sleep(0.01)
        return dies_once(job)
    return Result([True], {}, "here")


def test_a_process_that_dies_leaves_one_at_work_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [Job(key, "trial", ("clip",), 0, {}, str(tmp_path), 0) for key in ("dies", "stays", "later")]
    stranger = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    stranger.start()
    pool = Processes(LocalExecutor(processes=2))
    monkeypatch.setattr(executors, "attempt", dies_beside_one_that_stays)
    begun: list[str] = []
    ended = {job.key: result for job, result in pool.run(every, lambda job: begun.append(job.key))}
    assert {key: type(result) for key, result in ended.items()} == dict.fromkeys(("dies", "stays", "later"), Result)
    assert begun.count("stays") == 1 and begun.count("dies") == 2
    for worker in list(pool.workers.values()):  # one that dies with nothing to do
        (process,) = worker.processes
        process.kill()
        process.join()
    assert len(list(pool.run(every[2:], lambda job: None))) == 1
    pool.close()
    assert stranger.is_alive()
    stranger.kill()


def test_processes_take_turns_with_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Processes(LocalExecutor(processes=5)).gpus == ["0", "1", "2", "3", "0"]
    assert Processes(LocalExecutor(processes=3), gpus=2).gpus == ["0,1", "2,3", "0,1"]
    assert Processes(LocalExecutor(processes=2), gpus=4).gpus == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d,GPU-absent")
    pool = Processes(LocalExecutor(processes=2))
    assert pool.gpus == ["GPU-a", "GPU-b"]
    worker = Worker(1, pool.gpus[1])
    assert worker.pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() == "GPU-b"
    assert os.environ["CUDA_VISIBLE_DEVICES"].startswith("GPU-a,")
    worker.close()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Processes(LocalExecutor(processes=2)).gpus == [None, None]


def sleeps(job: Job) -> Result:
    (Path(job.folder) / "process").write_text(str(os.getpid()))
    time.sleep(60)
    raise AssertionError


KILLED_DRIVER = """
import sys
from moe_vision.search import executors
from moe_vision.search.config import LocalExecutor
from moe_vision.search.jobs import Job
from tests.unit.test_search_faults import sleeps

if __name__ == "__main__":
    executors.attempt = sleeps
    job = Job("0", "trial", ("clip",), 0, {}, sys.argv[1], 0)
    list(executors.Processes(LocalExecutor(processes=2)).run([job], lambda job: None))
"""


def test_a_killed_driver_leaves_nobody_at_work(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(KILLED_DRIVER)
    root = str(Path(__file__).parents[2])
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py"), str(tmp_path)], env={**os.environ, "PYTHONPATH": root}
    )
    at_work = tmp_path / "process"
    until = time.monotonic() + 120
    while not (at_work.is_file() and at_work.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    worker = int(at_work.read_text())
    driver.kill()
    driver.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


KILL_A_WORKER = """
import os, signal, sys, time
from pathlib import Path

def workers():
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(b"ray::attempt_with"):
            yield int(folder.name)

until = time.monotonic() + 400
while time.monotonic() < until:
    # One that is in the middle of training: its metrics have begun.
    if any(Path(sys.argv[1]).glob("*/config.yaml")) and (found := list(workers())):
        os.kill(found[0], signal.SIGKILL)
        sys.exit(0)
    time.sleep(0.05)
sys.exit(1)
"""


def test_ray_with_two_workers_one_of_which_is_killed(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    config = search_config(tmp_path, pool=["clip", "sam"], seeds=2, max_experts=1)
    whole = search(config, tmp_path / "one", console=QUIET)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    values = {"executor": {"type": "ray", "address": cluster.address, "cpus": 1}}
    spread = validate(SearchConfig, config.model_dump(mode="json") | values, source="ray")
    try:
        killer = subprocess.Popen([sys.executable, "-c", KILL_A_WORKER, str(tmp_path / "two/trials")])
        assert search(spread, tmp_path / "two", console=QUIET) == whole
        assert killer.wait(10) == 0
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
    assert reported(tmp_path / "two") == reported(tmp_path / "one")
    asks_too_much = validate(
        SearchConfig, config.model_dump(mode="json") | {"executor": {"type": "ray", "gpus": 3}}, source="ray"
    )
    with pytest.raises(SearchError, match="asks for 3 GPU a trial, the cluster has 0"):
        search(asks_too_much, tmp_path / "three", console=QUIET)


def test_an_output_that_was_moved_is_no_fault_of_a_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def belongs_elsewhere(job: Job) -> Result:
        raise OutputError(f"output '{job.folder}' exists and belongs to another config")

    monkeypatch.setattr(executors, "run_job", belongs_elsewhere)
    with pytest.raises(SearchError, match=r"belongs to another config.*moved or copied\? .* put it back"):
        search(search_config(tmp_path, pool=["clip"], seeds=1), tmp_path / "out", console=QUIET)
    assert {row["status"] for row in journal(tmp_path / "out")} <= {"queued", "running"}


def test_a_journal_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    config = search_config(tmp_path, pool=["clip"], seeds=1)
    search(config, tmp_path / "out", console=QUIET)
    (tmp_path / "out/search.db").write_text("garbage" * 100)
    with pytest.raises(SearchError, match=r"search.db' is damaged \(file is not a database\): restore it"):
        search(config, tmp_path / "out", console=QUIET)


def test_a_launch_that_fails_names_its_fault_first(tmp_path: Path) -> None:
    config = search_config(tmp_path, pool=["clip"])
    schedule = {"model": config.model, "stages": [stage.model_dump(mode="json") for stage in config.stages]}
    schedule["stages"][0]["data"]["path"] = str(tmp_path / "nowhere.json")
    job = Job("key", "trial", ("clip",), 0, schedule, str(tmp_path / "run"), 0, processes=2)
    with pytest.raises(RuntimeError, match=r"(?s)^the launch ended with 1: error: .*nowhere.json.* all it said is in"):
        trained(TrainConfig.model_validate(schedule), tmp_path / "run", job)
    assert "nowhere.json" in (tmp_path / "run.launch.log").read_text()
