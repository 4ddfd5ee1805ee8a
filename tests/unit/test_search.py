"""Searches of a miniature model: what they find and report, kills, crashes, several processes, Ray."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from moe_vision.config import ConfigError, validate
from moe_vision.search import SearchConfig, SearchError, executors, jobs, planned_search, search
from moe_vision.search.config import LocalExecutor
from moe_vision.search.executors import Processes, attempt
from moe_vision.search.jobs import Job, Result, trained
from moe_vision.search.journal import opened
from moe_vision.search.subsets import pool_of, subset_model, subset_stages
from moe_vision.training.checkpoints import WriteError
from moe_vision.training.loading import load_train_config, model_config
from moe_vision.training.output import OutputError
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from tests.unit.test_kills import killed_after
from tests.unit.toy_search import EXPERTS, search_config, search_values

KILLS = 10
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchConfig, Path, dict[str, Any]]:
    """A greedy search with the proxy, its output, and what it returned."""
    folder = tmp_path_factory.mktemp("search")
    config = search_config(folder, proxy={"keep": 2, "grid": [2, 2]})
    return config, folder / "out", search(config, folder / "out", console=QUIET)


def journal(output: Path) -> list[dict[str, Any]]:
    connection = sqlite3.connect(output / "search.db")
    connection.row_factory = sqlite3.Row
    rows = [dict(row) for row in connection.execute("SELECT * FROM jobs ORDER BY started")]
    connection.close()
    return rows


def reported(output: Path) -> dict[str, bytes]:
    """What a search says, by file."""
    files = ["report.md", "results.json", "best.yaml", *(f"pictures/{p.name}" for p in output.glob("pictures/*"))]
    return {name: (output / name).read_bytes() for name in files}


def test_a_search_reports_rounds_gains_and_a_test_score(found: tuple[SearchConfig, Path, dict[str, Any]]) -> None:
    _, output, summary = found
    first = summary["rounds"][0]
    assert [c["experts"] for c in first["candidates"]] == [[name] for name in EXPERTS]
    trained = [c for c in first["candidates"] if c["value"] is not None]
    dropped = [c for c in first["candidates"] if c["dropped"] is not None]
    assert len(trained) == 2 and len(dropped) == 1 and "place 3 of 3" in dropped[0]["dropped"]
    assert first["chosen"] == max(trained, key=lambda c: c["value"]["mean"])["experts"]
    rows = journal(output)
    assert {row["status"] for row in rows} == {"done"} and all(row["attempts"] == 1 for row in rows)
    best = summary["best"]
    for row in rows:  # the report's numbers are the journal's
        if row["kind"] == "trial" and json.loads(row["experts"]) == best["experts"]:
            assert row["value"] in best["validation"]["value"]["values"] and len(row["right"]) == 16
    tests = [row for row in rows if row["kind"] == "test"]
    assert [json.loads(row["experts"]) for row in tests] == [best["experts"]] * 2
    assert all(len(row["right"]) == 12 for row in tests)
    report = (output / "report.md").read_text()
    assert f"**{' + '.join(best['experts'])}**: {best['test']['value']['mean']:.3f}" in report
    assert (output / "pictures/rounds.png").is_file() and (output / "pictures/cost.png").is_file()
    assert json.loads((output / "results.json").read_text()) == summary
    kept = [path for path in (output / "trials").glob("*/model")]
    assert len(kept) == 2  # the best set's, of each seed


def test_the_best_config_trains_as_it_is(found: tuple[SearchConfig, Path, dict[str, Any]], tmp_path: Path) -> None:
    _, output, summary = found
    config = load_train_config(output / "best.yaml")
    assert list(model_config(config).experts) == summary["best"]["experts"]
    model = train(config, tmp_path / "run", console=QUIET)
    (trial,) = [
        row for row in journal(output)
        if row["kind"] == "trial" and row["seed"] == 0 and json.loads(row["experts"]) == summary["best"]["experts"]
    ]  # fmt: skip
    from tests.unit.test_training import assert_same, weights

    assert_same(weights(model), weights(output / "trials" / trial["key"][:16] / "model"))


def test_another_method_or_weight_uses_the_trials_that_are_there(
    found: tuple[SearchConfig, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, output, _ = found
    before = {row["key"] for row in journal(output)}
    ran: list[Job] = []
    monkeypatch.setattr(executors, "run_job", lambda job: ran.append(job) or jobs.run_job(job))
    summary = search(config.model_copy(update={"task_weights": {"dark": 0.0}}), output, console=QUIET)
    assert summary["task_weights"] == {"dark": 0.0, "colour": 1.0}
    assert not before & {job.key for job in ran}
    ran.clear()
    exhaustive = config.model_copy(update={"method": "exhaustive", "proxy": config.proxy.model_copy(
        update={"keep": None})})  # fmt: skip
    summary = search(exhaustive, output, console=QUIET)
    assert len(summary["sets"]) == 7 and summary["proxy"]["seen"] == 7
    assert not before & {job.key for job in ran} and 0 < len([job for job in ran if job.kind == "trial"]) < 14
    assert summary["best"]["validation"]["value"]["mean"] == max(s["value"]["mean"] for s in summary["sets"].values())
    ran.clear()
    assert search(exhaustive, output, console=QUIET) == summary and not ran
    with pytest.raises(OutputError, match="belongs to another config"):
        search(config.model_copy(update={"max_new_tokens": 4}), output, console=QUIET)


def test_the_store_changes_no_metric(found: tuple[SearchConfig, Path, dict[str, Any]], tmp_path: Path) -> None:
    """With features from the disk, and with experts that run in every step: the same losses and answers, bitwise."""
    config, output, summary = found
    stages = [stage.model_copy(update={"cache_features": False}) for stage in config.stages]
    bare = config.model_copy(update={"stages": stages, "feature_cache": None})
    assert search(bare, tmp_path / "out", console=QUIET)["sets"] == summary["sets"]
    assert (output / "features").is_dir() and not (tmp_path / "out/features").exists()
    stored = {(row["kind"], row["experts"], row["seed"]): row for row in journal(output)}
    for row in journal(tmp_path / "out"):
        if row["kind"] == "trial":
            other = stored["trial", row["experts"], row["seed"]]
            assert other["right"] == row["right"]
            assert losses(output, other) == losses(tmp_path / "out", row)


def losses(output: Path, row: dict[str, Any]) -> list[float]:
    lines = (output / "trials" / row["key"][:16] / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line).get("loss") for line in lines]
    assert any(found)
    return found


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
    assert "in detail" in row["error"] and "test_search.py" in row["error"]  # where it crashed
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


def sleeps(job: Job) -> Result:
    (Path(job.folder) / "process").write_text(str(os.getpid()))
    time.sleep(60)
    raise AssertionError


KILLED_DRIVER = """
import sys
from moe_vision.search import executors
from moe_vision.search.config import LocalExecutor
from moe_vision.search.jobs import Job
from tests.unit.test_search import sleeps

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


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    config = search_config(tmp_path, pool=["clip", "sam"], seeds=2, max_experts=1)
    one = search(config, tmp_path / "one", console=QUIET)
    two = config.model_copy(update={"executor": LocalExecutor(processes=2, threads=1)})
    assert search(two, tmp_path / "two", console=QUIET) == one
    assert reported(tmp_path / "one") == reported(tmp_path / "two")


def test_a_trial_may_train_in_two_processes(tmp_path: Path) -> None:
    values = search_values(tmp_path, pool=["clip"], seeds=1)
    values["model"]["language_model"]["architecture"]["attention_dropout"] = 0.0  # which two processes draw apart
    config = validate(SearchConfig, values, source="toy")
    one = search(config, tmp_path / "one", console=QUIET)
    together = {"batch_size": 2}  # on each of two
    stages = [stage.model_copy(update=together) for stage in config.stages]
    two = search(
        config.model_copy(update={"stages": stages, "processes_per_trial": 2}), tmp_path / "two", console=QUIET
    )
    (a,), (b,) = (
        [losses(tmp_path / name, row) for row in journal(tmp_path / name) if row["kind"] == "trial"]
        for name in ("one", "two")
    )
    assert [x for x in a if x is not None] == pytest.approx([x for x in b if x is not None], abs=1e-4)
    assert two["best"]["experts"] == one["best"]["experts"] == ["clip"]


def test_experts_are_aligned_once_a_seed_and_shared(tmp_path: Path) -> None:
    values = search_values(tmp_path, pool=["clip", "sam"], seeds=2, min_gain=-1)
    from tests.unit.test_schedule_kinds import PREALIGN

    aligning = {"name": "prealign", **PREALIGN, "data": values["stages"][0]["data"], "max_steps": 2, "batch_size": 4}
    values["stages"] = [aligning, *values["stages"]]
    values["model"] = aligned_model(tmp_path)
    config = validate(SearchConfig, values, source="toy")
    summary = search(config, tmp_path / "out", console=QUIET)
    rows = journal(tmp_path / "out")
    aligned = [(json.loads(row["experts"]), row["seed"]) for row in rows if row["kind"] == "align"]
    assert sorted(aligned) == [(["clip"], 0), (["clip"], 1), (["sam"], 0), (["sam"], 1)]
    assert len(summary["sets"]) == 3
    best = yaml.safe_load((tmp_path / "out/best.yaml").read_text())
    assert best["stages"][0]["prealign"]["experts"] == summary["best"]["experts"]
    # A set that is aligned by `best.yaml` itself is the set of the search.
    model = train(load_train_config(tmp_path / "out/best.yaml"), tmp_path / "run", console=QUIET)
    from safetensors.torch import load_file

    name = summary["best"]["experts"][0]
    mine = load_file(tmp_path / "run/experts" / f"{name}.safetensors")
    row = next(r for r in rows if r["kind"] == "align" and r["seed"] == 0 and json.loads(r["experts"]) == [name])
    theirs = load_file(tmp_path / "out/aligned" / row["key"][:16] / "experts" / f"{name}.safetensors")
    assert all(torch.equal(mine[key], theirs[key]) for key in mine) and model.is_dir()


def aligned_model(folder: Path) -> dict[str, Any]:
    """The toy model with a language model on disk, which alignment needs."""
    from tests.unit.test_schedule_kinds import schedule

    model = schedule(folder / "aligned", {"train": {"adapters": 1e-3}}).model
    assert isinstance(model, dict)
    return model


def test_halving_drops_the_worse_half(tmp_path: Path) -> None:
    config = search_config(tmp_path, seeds=2, max_experts=1, halving=[{"seeds": 1, "length": 0.5, "keep": 0.5}])
    summary = search(config, tmp_path / "out", console=QUIET)
    candidates = summary["rounds"][0]["candidates"]
    assert sum(c["value"] is not None for c in candidates) == 2
    (dropped,) = [c["dropped"] for c in candidates if c["dropped"] is not None]
    assert dropped.startswith("1 seeds, 50% of the steps: 0.") and dropped.endswith("place 3 of 3")
    short = [row for row in journal(tmp_path / "out") if row["length"] == 0.5]
    assert len(short) == 3 and all(
        json.loads(row["config"])["schedule"]["stages"][0]["max_steps"] == 6 for row in short
    )


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


def test_sets_that_do_not_fit_are_named_and_left_out(tmp_path: Path) -> None:
    values = search_values(tmp_path, seeds=1, pool=["clip", "sam"], method="exhaustive")
    values["model"]["branches"]["overview"] = {
        "mixer": {"type": "deformable", "base": "sam"}, "adapter": {"type": "mlp", "inner_size": 16},
    }  # fmt: skip
    values["stages"][0]["train"]["mixers"] = 1e-3
    summary = search(validate(SearchConfig, values, source="toy"), tmp_path / "out", console=QUIET)
    clip, sam, both = summary["rounds"][0]["candidates"]
    assert clip["failed"] is not None and "base 'sam'" in clip["failed"] and sam["failed"] is not None
    assert summary["best"]["experts"] == both["experts"] == ["clip", "sam"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pool": ["clip", "samm"]}, "pool = 'samm': the model has no expert 'samm'; did you mean 'sam'"),
        ({"base": ["dino"]}, "base = 'dino': the model has no expert"),
        ({"validation": None}, "validation = None: is missing; give --validation FILE"),
        ({"test": None}, "test = None: is missing"),
        ({"method": "gready"}, "unknown method 'gready'; known are greedy, backward, exhaustive"),
        ({"method": "exhaustive", "per": "gflop"}, "an exhaustive search takes no steps; leave them out"),
        ({"max_experts": 0}, "max_experts"),
        ({"base": ["clip", "sam"], "max_experts": 1}, "max_experts is 1, and the base has 2"),
        ({"halving": [{"seeds": 3, "length": 1, "keep": 0.5}]}, "more seeds than the search, which has 2"),
        ({"pool": ["clip", "clip"]}, "names an expert twice"),
        ({"task_weights": {"dark": -1}}, "weight -1.0 of task 'dark' is none"),
        ({"executor": {"type": "slurm"}}, "executor"),
        ({"proxy": {"type": "ridge", "grid": [0, 4]}}, "has no cells"),
        ({"seed_count": 3}, "seed_count"),
    ],
)
def test_bad_configs_are_refused_before_any_work(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        search(search_config(tmp_path, **changes), tmp_path / "out", console=QUIET)
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_show_says_how_many_trials_there_are(tmp_path: Path) -> None:
    greedy = search_config(tmp_path, seeds=3)
    assert "over clip, sam, eva02: at most 6 sets to train, 3 seeds each: 18 trials" in planned_search(greedy)
    for changes, sets in (
        ({"proxy": {"keep": 2}}, "5 sets to train, of 6 that the proxy sees"), ({"base": ["sam"]}, "4 sets"),
        ({"max_experts": 2}, "5 sets"), ({"method": "backward"}, "6 sets"), ({"method": "exhaustive"}, "7 sets"),
        ({"method": "exhaustive", "base": ["sam"], "max_experts": 2}, "3 sets"),
    ):  # fmt: skip
        assert f"at most {sets}" in planned_search(search_config(tmp_path, **changes)), changes


def test_a_weight_of_no_task_is_refused_before_any_trial(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task_weights names \['ocr'\], which no validation item has \(dark, colour"):
        search(search_config(tmp_path, task_weights={"ocr": 2.0}), tmp_path / "out", console=QUIET)


def test_splits_with_other_tasks_are_reported_side_by_side(tmp_path: Path) -> None:
    values = search_values(tmp_path, pool=["clip"], seeds=1)
    asked = Path(values["test"]["path"])
    records = [record for record in json.loads(asked.read_text()) if record["task"] == "dark"]
    records[0]["task"] = "rare"
    asked.write_text(json.dumps(records))
    search(validate(SearchConfig, values, source="toy"), tmp_path / "out", console=QUIET)
    rows = [line for line in (tmp_path / "out/report.md").read_text().splitlines() if line.startswith("| ")]
    by_task = {row.split(" | ")[0].removeprefix("| "): row for row in rows if "none asked" in row}
    assert set(by_task) == {"colour", "rare"}
    assert by_task["colour"].endswith("| none asked |") and by_task["rare"].startswith("| rare |  | none asked |")


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
    with pytest.raises(SearchError, match=r"search.db' cannot be read \(file is not a database\): restore it"):
        search(config, tmp_path / "out", console=QUIET)


def test_stages_of_a_set_know_no_other_experts(tmp_path: Path) -> None:
    values = search_values(tmp_path)
    values["stages"][0] |= {
        "train": {"adapters": 1e-3, "experts.sam": 1e-4, "experts.clip": 1e-5},
        "weight_decay": {"experts.sam": 0.1, "adapters": 0.0},
        "gradient_checkpointing": ["experts.sam", "language_model"],
        "max_steps": None, "epochs": 3.0,
    }  # fmt: skip
    config = validate(SearchConfig, values, source="toy")
    (stage,) = subset_stages(config, ("clip", "eva02"), 0.5)
    assert stage.train == {"adapters": 1e-3, "experts.clip": 1e-5} and stage.weight_decay == {"adapters": 0.0}
    assert stage.gradient_checkpointing == ["language_model"] and stage.epochs == 1.5
    alone = {**values["stages"][0], "train": {"experts.sam": 1e-4}, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=r"stage 'together' trains \['experts.sam'\], none of which is in the set"):
        subset_stages(validate(SearchConfig, values | {"stages": [alone]}, source="toy"), ("clip",))


def test_a_set_sees_the_canvas_of_the_whole_model(tmp_path: Path) -> None:
    values = search_values(tmp_path)
    values["model"]["branches"]["overview"]["mixer"] = {
        "type": "sequence_append", "grids": {"clip": [2, 2], "sam": [4, 4]},
    }  # fmt: skip
    values["model"]["branches"]["overview"]["adapter"]["pool"] = 1
    config = validate(SearchConfig, values, source="toy")
    model = model_config(config)
    single = subset_model(model, ("clip",))
    assert single.to_plain()["slicing"]["size"] == [128, 128] == list(model.vision_config().canvas_size())
    assert single.vision_config().canvas_size() == (64, 64)  # what CLIP alone would see
    mixer: Any = single.branches.overview.mixer
    assert list(mixer.grids) == ["clip"]
    assert pool_of(config.model_copy(update={"pool": ["eva02", "clip"], "base": ["sam"]}), model) == EXPERTS


def test_a_launch_that_fails_names_its_fault_first(tmp_path: Path) -> None:
    config = search_config(tmp_path, pool=["clip"])
    schedule = {"model": config.model, "stages": [stage.model_dump(mode="json") for stage in config.stages]}
    schedule["stages"][0]["data"]["path"] = str(tmp_path / "nowhere.json")
    job = Job("key", "trial", ("clip",), 0, schedule, str(tmp_path / "run"), 0, processes=2)
    with pytest.raises(RuntimeError, match=r"(?s)^the launch ended with 1: error: .*nowhere.json.* all it said is in"):
        trained(TrainConfig.model_validate(schedule), tmp_path / "run", job)
    assert "nowhere.json" in (tmp_path / "run.launch.log").read_text()
