"""Searches of a miniature model: what they find and report, in one process and in several."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_vision.config import ConfigError, validate
from moe_vision.search import SearchConfig, executors, jobs, planned_search, search
from moe_vision.search.config import LocalExecutor
from moe_vision.search.jobs import Job
from moe_vision.search.subsets import pool_of, subset_model, subset_stages
from moe_vision.training.loading import load_train_config, model_config
from moe_vision.training.output import OutputError
from moe_vision.training.runner import train
from moe_vision.viz.tables import marked
from tests.unit.toy_search import EXPERTS, QUIET, journal, reported, search_config, search_values


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchConfig, Path, dict[str, Any]]:
    """A greedy search with the proxy, its output, and what it returned."""
    folder = tmp_path_factory.mktemp("search")
    config = search_config(folder, proxy={"keep": 2, "grid": [2, 2]})
    return config, folder / "out", search(config, folder / "out", console=QUIET)


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
    assert f"**{marked(best['experts'], EXPERTS)}**: {best['test']['value']['mean']:.3f}" in report
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
        ({"base_experts": ["dino"]}, "base_experts = 'dino': the model has no expert"),
        ({"validation": None}, "validation = None: is missing; give --validation FILE"),
        ({"test": None}, "test = None: is missing"),
        ({"method": "gready"}, "unknown method 'gready'; known are greedy, backward, exhaustive"),
        ({"method": "exhaustive", "per": "gflop"}, "an exhaustive search takes no steps; leave them out"),
        ({"max_experts": 0}, "max_experts"),
        ({"base_experts": ["clip", "sam"], "max_experts": 1}, "max_experts is 1, and there are 2 base_experts"),
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
    assert (
        "over clip (random), sam (random), eva02 (random): at most 6 sets to train, 3 seeds each: 18 trials"
        in planned_search(greedy)
    )
    for changes, sets in (
        ({"proxy": {"keep": 2}}, "5 sets to train, of 6 that the proxy sees"), ({"base_experts": ["sam"]}, "4 sets"),
        ({"max_experts": 2}, "5 sets"), ({"method": "backward"}, "6 sets"), ({"method": "exhaustive"}, "7 sets"),
        ({"method": "exhaustive", "base_experts": ["sam"], "max_experts": 2}, "3 sets"),
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
    assert pool_of(config.model_copy(update={"pool": ["eva02", "clip"], "base_experts": ["sam"]}), model) == EXPERTS
