"""Mixers compared: one budget for all, one table, nothing finished is repeated, nothing loads that cannot run."""

import json
import statistics
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from moe_vision import comparison
from moe_vision.comparison import CompareConfig, compare, plan
from moe_vision.config import ConfigError, validate
from moe_vision.data.records import DataError
from moe_vision.experts.base import Expert
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.compose import load
from moe_vision.modeling.cost import cost, count
from moe_vision.training import features, runner
from moe_vision.training.loading import load_schedule
from moe_vision.training.output import OutputError
from moe_vision.viz.tables import COMPARED
from tests.unit.toy import train_values, write_data

PRESET = Path(__file__).parents[2] / "configs/compare/micro.yaml"
MICRO = {"variant": "micro", "pretrained": None}
MINING = {"mixer": {"base": "clip"}, "adapter": {"pool": 2}}


def values(folder: Path, **stage: Any) -> dict[str, Any]:
    """Plain values of a comparison of two random miniature experts."""
    made = train_values(folder, max_steps=3, **stage)
    made["stages"][0]["train"] = {"adapters": 1e-2, "mixers": 1e-2}
    made["stages"][1] |= {"max_steps": 12, "train": {"adapters": 1e-2, "language_model": 3e-2}}
    test = {"path": str(write_data(folder / "test", 4))}
    return {**made, "test": test, "mixers": {"patch_mining": MINING}}


def config(folder: Path, **stage: Any) -> CompareConfig:
    return validate(CompareConfig, values(folder, **stage), source="test")


def test_results_hold_what_the_runs_scored_and_the_models_cost(tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary = compare(config(tmp_path), ["channel_concat", "patch_mining"], 2, output)
    assert json.loads((output / "results.json").read_text()) == summary
    assert (summary["seeds"], summary["questions"], list(summary["mixers"])) == (
        [3, 4], 4, ["channel_concat", "patch_mining"],
    )  # fmt: skip
    assert max(row["accuracy"]["mean"] for row in summary["mixers"].values()) > 0
    for name, row in summary["mixers"].items():
        runs = [json.loads((output / "runs" / f"{name}-seed-{seed}.json").read_text()) for seed in (3, 4)]
        averages = [run["average"] for run in runs]
        assert row["accuracy"] == {
            "mean": statistics.fmean(averages), "spread": statistics.stdev(averages), "values": averages,
        }  # fmt: skip
        assert row["by_task"].keys() == {"light", "dark"}
        model, processor = load(output / "runs" / f"{name}-seed-3" / "model")
        fusion = count(model.model.vision_tower.mixers) + count(model.model.multi_modal_projector)
        assert row["parameters"] == {"fusion": fusion, "all": count(model)}
        assert row["visual_tokens"] == processor.num_image_tokens((50, 200)) == 4
        assert row["images_per_second"]["mean"] > 0 and row["tokens_per_second"]["mean"] > 0
    assert summary["mixers"]["patch_mining"]["flops"] != summary["mixers"]["channel_concat"]["flops"]
    report = (output / "report.md").read_text()
    assert f"| {' | '.join(COMPARED)} |" in report and "| mixer | light | dark |" in report
    assert report.count("| patch_mining |") == 3


def test_every_run_has_the_same_budget(tmp_path: Path) -> None:
    summary = compare(config(tmp_path), ["channel_concat", "patch_mining"], 1, tmp_path / "out")
    assert summary["steps"] == {"projector": 3, "finetune": 12}
    schedules = []
    for name in summary["mixers"]:
        folder = tmp_path / "out" / "runs" / f"{name}-seed-3"
        schedules.append(yaml.safe_load((folder / "config.yaml").read_text()))
        assert json.loads(folder.with_suffix(".json").read_text())["steps"] == summary["steps"]
    concat, mining = schedules
    assert concat.pop("model") != mining.pop("model")
    # channel_concat has no parameter of its own; everything else is the same.
    assert mining["stages"][0]["train"].pop("mixers") == 1e-2
    assert concat == mining


def test_experts_see_each_picture_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {"clip": 0, "sam": 0}
    forward = Expert.forward

    def counting(self: Expert, views: torch.Tensor, inject: Any = None) -> Any:
        if not torch.is_inference_mode_enabled() and not views.is_meta:  # as scoring is, and counting
            seen[self.config.type_name] += len(views)
        return forward(self, views, inject)

    monkeypatch.setattr(Expert, "forward", counting)
    plain = values(tmp_path)
    plain["model"]["experts"] = {
        "clip": {"variant": "micro"},
        "sam": {"variant": "micro"},
    }  # the same weights each time
    compare(validate(CompareConfig, plain, source="test"), ["channel_concat", "patch_mining"], 2, tmp_path / "out")
    assert seen == {"clip": 8, "sam": 8}


class Killed(Exception):
    """Stands for a kill: nothing in the package catches it."""


def test_killed_and_called_again_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, trained = ["channel_concat", "patch_mining"], []
    whole = compare(config(tmp_path), names, 2, tmp_path / "whole")

    def dying(schedule: Any, folder: Path, **options: Any) -> Path:
        if len(trained) == 3:
            raise Killed
        trained.append(folder.name)
        return runner.train(schedule, folder, **options)

    monkeypatch.setattr(comparison, "train", dying)
    with pytest.raises(Killed):
        compare(config(tmp_path), names, 2, tmp_path / "killed")
    assert not (tmp_path / "killed" / "results.json").exists()
    first = (tmp_path / "killed" / "runs" / "channel_concat-seed-3.json").read_text()
    trained.clear()
    again = compare(config(tmp_path), names, 2, tmp_path / "killed")
    assert trained == ["patch_mining-seed-4"]
    assert (tmp_path / "killed" / "runs" / "channel_concat-seed-3.json").read_text() == first
    assert {n: row["accuracy"] for n, row in again["mixers"].items()} == {
        n: row["accuracy"] for n, row in whole["mixers"].items()
    }
    trained.clear()
    assert compare(config(tmp_path), names, 2, tmp_path / "killed") == again
    assert trained == []
    more = compare(config(tmp_path), ["channel_concat"], 3, tmp_path / "killed")
    assert trained == ["channel_concat-seed-5"] and more["seeds"] == [3, 4, 5]


def test_another_config_and_other_folders_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    compare(config(tmp_path), ["channel_concat"], 1, output)
    with pytest.raises(OutputError, match="belongs to another config"):
        compare(config(tmp_path, batch_size=4), ["channel_concat"], 1, output)
    with pytest.raises(OutputError, match=r"stages\.0\.batch_size was 2 and is 4"):
        compare(config(tmp_path, batch_size=4), ["channel_concat"], 1, output)
    compare(config(tmp_path, num_workers=3, logging_steps=7), ["channel_concat"], 1, output)  # it is the same
    schedule = config(tmp_path)
    data = Path(schedule.stages[0].data.path or "")  # type: ignore[union-attr]
    before = data.read_text()
    data.write_text(before.replace("yes", "no"))
    with pytest.raises(OutputError, match="data of stage 'projector' has other content"):
        compare(schedule, ["channel_concat"], 1, output)
    data.write_text(before)
    with pytest.raises(OutputError, match="is not the output of a comparison"):
        compare(config(tmp_path), ["channel_concat"], 1, output / "runs" / "channel_concat-seed-3")
    compare(config(tmp_path, batch_size=4), ["channel_concat"], 1, output, overwrite=True)
    assert "batch_size: 4" in (output / "config.yaml").read_text()


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(runner, "compose", loaded)


def test_all_that_cannot_work_is_told_at_once_before_weights_load(tmp_path: Path, no_weights: None) -> None:
    plain = values(tmp_path)
    plain["mixers"] = {
        "patch_mining": {"mixer": {"base": "sam"}},
        "mr_adapter": {"mixer": {"base": "sam"}},
        "deformable": {"mixer": {"bass": "clip", "base": "dino"}},
        "sequence_append": {},
        "odd": {"mixer": {"type": "channel_concat", "grid": [3, 3], "resample": {"sam": "pool"}}},
    }
    plain["stages"][0]["train"] = {"mixers": 1e-2}
    plain["stages"][1]["data"] = None
    del plain["test"]
    names = ["channel_concat", "chanel_concat", *plain["mixers"]]
    with pytest.raises(ConfigError) as caught:
        compare(validate(CompareConfig, plain, source="test"), names, 1, tmp_path / "out")
    told = {problem.path: str(problem) for problem in caught.value.problems}
    assert set(told) == {
        "--mixer", "test", "stages.finetune.data", "stages.projector.train", "mixers.patch_mining", "mixers.mr_adapter",
        "mixers.deformable.mixer.bass", "mixers.sequence_append", "mixers.odd",
    }  # fmt: skip
    for path, part in {
        "--mixer": "did you mean 'channel_concat'?",
        "test": "give --test FILE",
        "stages.finetune.data": "give --data FILE",
        "stages.projector.train": "trains nothing with 'channel_concat', which has no parameter",
        "mixers.patch_mining": "expert 'clip': a grid of [4, 4] does not nest in one of [8, 8]",
        "mixers.mr_adapter": "expert 'sam' of type 'sam' does not let it; these do: ['clip']",
        "mixers.deformable.mixer.bass": "did you mean 'base'?",
        "mixers.sequence_append": "pool 2 of mlp needs tokens on a raster",
        "mixers.odd": "expert 'sam': pool cannot bring a grid of [8, 8] to [3, 3]",
    }.items():
        assert part in told[path]
    assert not (tmp_path / "out").exists()


def test_one_expert_alone_is_told_before_weights_load(tmp_path: Path, no_weights: None) -> None:
    plain = values(tmp_path)
    plain["model"]["experts"] = {"clip": MICRO}
    with pytest.raises(ConfigError, match="3 problems") as caught:
        compare(
            validate(CompareConfig, plain, source="test"), ["deformable", "mr_adapter", "patch_mining"], 1, tmp_path
        )
    assert all("this branch has no other" in problem.cause for problem in caught.value.problems)


def test_misspelt_groups_keys_and_missing_files_are_told_before_weights_load(tmp_path: Path, no_weights: None) -> None:
    plain = values(tmp_path)
    plain["stages"][0]["train"] = {"adapter": 1e-2}
    with pytest.raises(ConfigError, match=r"stages.projector.train = .*unknown group 'adapter'; .*adapters"):
        compare(validate(CompareConfig, plain, source="test"), ["patch_mining"], 1, tmp_path / "out")
    plain = values(tmp_path)
    plain["test"]["path"] = str(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="no such file"):
        compare(validate(CompareConfig, plain, source="test"), ["patch_mining"], 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"mixers.patch_mining.adaptor = .*did you mean 'adapter'"):
        validate(CompareConfig, plain | {"mixers": {"patch_mining": {"adaptor": {}}}}, source="test")


def test_settings_begin_with_the_configs_own_only_for_its_own_type(tmp_path: Path) -> None:
    plain = values(tmp_path)
    plain["model"]["branches"]["overview"]["mixer"]["align_corners"] = True
    plain["mixers"] = {
        "channel_concat": {"mixer": {"grid": [8, 8]}},
        "fine": {"mixer": {"type": "sequence_append", "hidden_size": 8}, "adapter": {"pool": 1}},
        "deformable": {},
    }
    made = plan(validate(CompareConfig, plain, source="test"), [*plain["mixers"]])
    overviews = {contender.name: contender.model.branches.overview for contender in made}
    assert overviews["channel_concat"].mixer.to_dict() == {
        "type": "channel_concat", "grid": [8, 8], "resample": {}, "align_corners": True,
    }  # fmt: skip
    assert overviews["fine"].mixer.to_dict()["type"] == "sequence_append"
    adapters = {name: overview.adapter.to_dict() for name, overview in overviews.items()}
    assert (adapters["fine"]["pool"], adapters["fine"]["inner_size"], adapters["deformable"]["pool"]) == (1, 16, 2)


def test_the_preset_fits_and_costs_what_its_models_do() -> None:
    schedule = load_schedule(CompareConfig, PRESET)
    contenders = plan(schedule, [*schedule.mixers])
    assert {contender.name: contender.costs.visual_tokens for contender in contenders} == {
        "channel_concat": 16, "sequence_append": 80, "deformable": 16, "mr_adapter": 16, "patch_mining": 16,
    }  # fmt: skip
    for contender in contenders:
        with torch.device("meta"), torch.no_grad():
            tower = MoeVisionForConditionalGeneration(contender.model.hf_config()).model.vision_tower
            with FlopCounterMode(display=False) as counter:
                tower(torch.empty(1, 3, 128, 128))
        vision = [part for part in contender.costs.parts if part.part.startswith(("experts.", "mixers."))]
        assert sum(part.flops for part in vision) == counter.get_total_flops(), contender.name
        assert contender.costs == cost(contender.model)


def test_features_are_told_apart_by_what_makes_them() -> None:
    expert = torch.nn.Linear(2, 2)
    before = features.digest_of(expert, {"size": 1})
    assert before == features.digest_of(expert, {"size": 1}) != features.digest_of(expert, {"size": 2})
    with torch.no_grad():
        expert.weight[0, 0] += 1e-3
    assert features.digest_of(expert, {"size": 1}) != before


@pytest.mark.parametrize("setting", [{"on_fault": "skip"}, {"max_length": 64}])
def test_a_test_is_asked_as_a_whole(tmp_path: Path, setting: dict[str, Any]) -> None:
    plain = values(tmp_path)
    plain["test"] |= setting
    with pytest.raises(ConfigError, match=r"all of the test '.*' is asked"):
        validate(CompareConfig, plain, source="test")


def test_mixers_share_the_pictures_of_a_table(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (20 + i, 30), "red") for i in range(4)]
    table = datasets.Dataset.from_dict({"picture": pictures, "ask": ["which colour"] * 4, "say": ["red"] * 4})
    table.save_to_disk(tmp_path / "saved")
    columns = {"images": "picture", "question": "ask", "answer": "say"}
    plain = values(tmp_path, data={"dataset": str(tmp_path / "saved"), "columns": columns})
    plain["stages"][1]["max_steps"] = 1
    compare(validate(CompareConfig, plain, source="test"), ["channel_concat", "patch_mining"], 1, tmp_path / "out")
    stored = [path for path in (tmp_path / "out").rglob("pictures/*")]
    assert len(stored) == 4 and all(path.is_relative_to(tmp_path / "out" / "data") for path in stored)
