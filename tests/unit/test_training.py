"""A killed and resumed schedule ends bitwise where an uninterrupted one does; only named groups move."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from moe_vision.config import ConfigError
from moe_vision.data.records import DataError
from moe_vision.experts.base import Expert
from moe_vision.training import runner
from moe_vision.training.feature_store import FeatureStore
from moe_vision.training.groups import (
    freeze_all_but,
    learning_rates,
    modes_of,
    optimizer_groups,
    parameter_groups,
)
from moe_vision.training.loading import model_config
from moe_vision.training.output import OutputError, check_keys
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from moe_vision.training.trainer import GroupTrainer
from tests.tiny import tiny_model
from tests.unit.toy import train_values


def config(folder: Path, **stage: Any) -> TrainConfig:
    return TrainConfig.model_validate(train_values(folder, **stage))


def weights(model_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(model_folder / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class Killed(Exception):
    """Stands for a kill: nothing in the package catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, run: str, step: int) -> None:
    """Die at the end of a step, before its checkpoint."""

    class Killer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.output_dir.endswith(run) and state.global_step == step:
                raise Killed

    class KilledTrainer(GroupTrainer):
        def __init__(self, *args: Any, callbacks: list[Any], **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[*callbacks, Killer()], **kwargs)

    monkeypatch.setattr(runner, "GroupTrainer", KilledTrainer)


def train_killed(monkeypatch: pytest.MonkeyPatch, schedule: TrainConfig, output: Path, run: str, step: int) -> None:
    """Train until it is killed at the end of a step."""
    with monkeypatch.context() as patched:
        kill_at(patched, run, step)
        with pytest.raises(Killed):
            train(schedule, output)


@pytest.mark.parametrize(("run", "step"), [("01-projector", 3), ("02-finetune", 1), ("02-finetune", 3)])
def test_killed_and_resumed_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, step: int
) -> None:
    schedule = config(tmp_path)
    whole = weights(train(schedule, tmp_path / "whole"))
    train_killed(monkeypatch, schedule, tmp_path / "killed", run, step)
    assert_same(weights(train(schedule, tmp_path / "killed")), whole)
    logs = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    first = [log["step"] for log in logs if log["run"] == run and "loss" in log]
    assert len(first) == len(set(first))


def test_cached_features_change_nothing(tmp_path: Path) -> None:
    cached = weights(train(config(tmp_path, cache_features=True), tmp_path / "cached"))
    plain = weights(train(config(tmp_path, cache_features=False), tmp_path / "plain"))
    small = weights(train(config(tmp_path, cache_gb=1e-9), tmp_path / "small"))
    assert_same(plain, small)
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-5)


def test_maps_of_frozen_experts_change_nothing_where_mixers_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str, **stage: Any) -> dict[str, torch.Tensor]:
        values = train_values(tmp_path, max_steps=8, **stage)
        overview = values["model"]["branches"]["overview"]
        overview["mixer"] = {"type": "mr_adapter", "base": "clip", "num_adapters": 1, "zero_init": False}
        values["stages"][0]["train"] |= {"mixers": 1e-3}
        values["stages"][1]["train"] |= {"mixers": 1e-3}
        return weights(train(TrainConfig.model_validate(values), tmp_path / name))

    calls: list[str] = []
    forward = Expert.forward

    def counting(self: Expert, *args: Any) -> Any:
        calls.append(self.config.type_name)
        return forward(self, *args)

    monkeypatch.setattr(Expert, "forward", counting)
    plain = trained("plain", cache_features=False)
    assert (calls.count("clip"), calls.count("sam")) == (16, 16)  # two stages of eight steps
    calls.clear()
    cached = trained("cached", cache_gb=1.0)
    assert (calls.count("clip"), calls.count("sam")) == (16, 8)  # four batches of two hold all pictures, in each stage
    for name, value in plain.items():  # Adam divides by a gradient's size, so that one near 0 may turn a step
        assert ((cached[name] - value).abs() < 1e-5).float().mean() > 0.999, name


def test_scenes_are_drawn_once_from_the_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = train_values(tmp_path, max_steps=2)
    for stage, synthetic in zip(values["stages"], ("captions", "questions"), strict=True):
        stage["data"] = {"synthetic": synthetic, "scenes": 3}
    schedule, output = TrainConfig.model_validate(values), tmp_path / "out"
    train_killed(monkeypatch, schedule, output, "02-finetune", 1)
    pictures = sorted((output / "data").rglob("*.png"))
    assert len(pictures) == 3
    times = [picture.stat().st_mtime_ns for picture in pictures]
    train(schedule, output)
    assert [picture.stat().st_mtime_ns for picture in pictures] == times
    assert_same(weights(output / "model"), weights(train(schedule, tmp_path / "whole")))
    other = TrainConfig.model_validate({**values, "seed": 4})
    train(other, output, overwrite=True)
    assert pictures[0].read_bytes() != (tmp_path / "whole" / pictures[0].relative_to(output)).read_bytes()


def test_only_named_groups_move(tmp_path: Path) -> None:
    values = train_values(tmp_path, max_steps=2, scheduler="constant", warmup_ratio=0.0, gradient_accumulation=2)
    values["stages"] = values["stages"][:1]
    values["stages"][0]["train"] = {"experts.sam": 1e-2}
    after = weights(train(TrainConfig.model_validate(values), tmp_path / "out"))
    before, _ = runner_model(values)
    moved = {
        name for name, value in before.state_dict().items() if name in after and not torch.equal(after[name], value)
    }
    assert moved and all(name.startswith("model.vision_tower.experts.sam.") for name in moved)


def runner_model(values: dict[str, Any]) -> Any:
    schedule = TrainConfig.model_validate(values)
    runner.set_seed(schedule.seed)
    return runner.compose(model_config(schedule))


def test_frozen_parts_stay_in_evaluation_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[bool, ...]] = []

    class Watching(GroupTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, *args, **kwargs)
            inner = model.model
            modes.append((inner.vision_tower.experts.training, inner.vision_tower.experts["sam"].training,
                          inner.language_model.training, inner.multi_modal_projector.training))  # fmt: skip
            return loss

    monkeypatch.setattr(runner, "GroupTrainer", Watching)
    train(config(tmp_path, max_steps=1, cache_features=False), tmp_path / "out")
    assert [mode[1:] for mode in modes] == [(False, False, True), (False, True, True)]


@pytest.mark.parametrize("stage", [{"precision": "bf16"}, {"num_workers": 1, "cache_features": False}])
def test_precision_and_workers_run(tmp_path: Path, stage: dict[str, Any]) -> None:
    after = weights(train(config(tmp_path, max_steps=1, **stage), tmp_path / "out"))
    assert {value.dtype for value in after.values()} == {torch.float32}


@pytest.mark.parametrize("gigabytes", [1.0, 1e-6])
def test_workers_hand_on_what_is_known_of_pictures(tmp_path: Path, gigabytes: float) -> None:
    """Mixed tokens from memory, or maps from the disk."""
    found = []
    for workers in (0, 2):
        schedule = config(tmp_path, num_workers=workers, cache_gb=gigabytes)
        store = FeatureStore(tmp_path / "features", 1.0)
        found.append(weights(train(schedule, tmp_path / f"out{workers}", cache=store)))
    assert_same(*found)


@pytest.mark.parametrize(("scheduler", "after"), [("constant", [1.0, 1.0]), ("linear", [1.0, 0.5])])
def test_a_warm_up_begins_above_zero(tmp_path: Path, scheduler: str, after: list[float]) -> None:
    train(config(tmp_path, scheduler=scheduler, warmup_ratio=0.5, logging_steps=1), tmp_path / "out")
    logs = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    rates = [log["learning_rate"] for log in logs if log["run"] == "01-projector" and "loss" in log]
    assert rates == pytest.approx([0.5e-2, 1e-2, *(1e-2 * share for share in after)])


def test_a_run_of_one_step_learns(tmp_path: Path) -> None:
    values = train_values(tmp_path, max_steps=1, warmup_ratio=0.03)
    values["stages"] = values["stages"][:1]
    before, _ = runner_model(values)
    after = weights(train(TrainConfig.model_validate(values), tmp_path / "out"))
    moved = [n for n, value in before.state_dict().items() if n in after and not torch.equal(after[n], value)]
    assert moved and all(name.startswith("model.multi_modal_projector.") for name in moved)


def test_a_finished_output_says_so_and_another_config_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule, output = config(tmp_path, max_steps=1), tmp_path / "out"
    train(schedule, output)
    capsys.readouterr()
    assert train(schedule, output) == output / "model"
    assert "finished" in capsys.readouterr().out
    other = schedule.model_copy(update={"seed": 9})
    with pytest.raises(OutputError, match="--overwrite"):
        train(other, output)
    train(other, output, overwrite=True)
    assert "seed: 9" in (output / "config.yaml").read_text()


def test_overwriting_destroys_nothing_before_all_else_is_in_order(tmp_path: Path) -> None:
    schedule, output = config(tmp_path, max_steps=1), tmp_path / "out"
    train(schedule, output)
    data = Path(train_values(tmp_path)["stages"][0]["data"]["path"])
    data.write_text("[]")
    with pytest.raises(DataError):
        train(schedule, output, overwrite=True)
    assert (output / "model" / "model.safetensors").is_file()


def test_folders_of_other_things_are_never_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name in ("config.yaml", "thesis.tex"):
        (output / name).write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        train(config(tmp_path), output, overwrite=True)
    assert (output / "thesis.tex").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        train(config(tmp_path), tmp_path / "file" / "out")


def test_data_that_is_missing_is_told_before_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        train(config(tmp_path, data=None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groups_cover_every_parameter_once() -> None:
    model, _ = tiny_model()
    groups = parameter_groups(model)
    assert sum(len(members) for members in groups.values()) == len(list(model.parameters()))
    assert groups["mixers"] == [] and groups["experts.clip"] and groups["adapters"] and groups["language_model"]
    freeze_all_but(model, {"adapters": 1e-3})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in groups["adapters"]}


def test_rates_are_inherited_and_wrong_groups_named() -> None:
    model, _ = tiny_model()
    rates = learning_rates(model, {"experts.sam": 1e-3, "experts": 1e-5})
    assert rates == {"experts.clip": 1e-5, "experts.sam": 1e-3}
    assert {group["lr"] for group in optimizer_groups(model, rates, 0.1)} == {1e-5, 1e-3}
    for group, known in (("adapter", "known: adapters"), ("experts.dino", r"known: experts\.clip, experts\.sam")):
        with pytest.raises(ValueError, match=known):
            learning_rates(model, {group: 1e-3})
    with pytest.raises(ValueError, match="'mixers' has no parameter"):
        learning_rates(model, {"mixers": 1e-3})


def test_a_checkpoint_of_another_composition_is_named(tmp_path: Path) -> None:
    model, _ = tiny_model()
    model.save_pretrained(tmp_path / "same")
    check_keys(tmp_path / "same", model)
    state = weights(tmp_path / "same")
    state["model.vision_tower.experts.dino.weight"] = state.pop(
        "model.multi_modal_projector.overview.0.weight", torch.ones(1)
    )
    (tmp_path / "other").mkdir()
    save_file(state, tmp_path / "other" / "model.safetensors")
    with pytest.raises(OutputError, match=r"experts\.dino"):
        check_keys(tmp_path / "other", model)


def test_what_lies_further_down_has_a_name_too() -> None:
    model, _ = tiny_model(
        branches={
            "overview": {
                "mixer": {"type": "channel_concat", "grid": [4, 4]},
                "adapter": {"type": "gated_mixture", "num_heads": 2},
            }
        }
    )
    rates = learning_rates(
        model, {"adapters": 1e-3, "adapters.overview.resampler": 1e-4, "experts.sam.model.vision_encoder.neck": 1e-5}
    )
    groups = parameter_groups(model, rates)
    assert {name.split(".")[3] for name, _ in groups["adapters"]} == {"projection", "gate", "noise"}
    assert {name.split(".")[3] for name, _ in groups["adapters.overview.resampler"]} == {"resampler"}
    assert groups["experts.sam"] and all(
        ".neck." in name for name, _ in groups["experts.sam.model.vision_encoder.neck"]
    )
    sized = {group["lr"] for group in optimizer_groups(model, rates, 0.0)}
    assert sized == set(rates.values())
    freeze_all_but(model, ["adapters.overview.resampler"])
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moving == {name for name, _ in groups["adapters.overview.resampler"]}
    with pytest.raises(ValueError, match=r"unknown group 'adapters\.overview\.resampeler': did you mean .*resampler"):
        learning_rates(model, {"adapters.overview.resampeler": 1e-3})
    with pytest.raises(ValueError, match=r"all of group 'adapters' is in \['adapters\.overview'\]"):
        learning_rates(model, {"adapters": 1e-3, "adapters.overview": 1e-4})


def test_modes_are_those_of_what_trains() -> None:
    model, _ = tiny_model()
    model.train()
    freeze_all_but(model, ["language_model.layers.1"])
    modes = {id(module): mode for module, mode in modes_of(model)}
    layers = model.model.language_model.layers
    assert all(modes[id(module)] for module in layers[1].modules() if not list(module.parameters()))
    assert modes[id(layers[1].mlp)] and modes[id(model)]
    assert not any(modes[id(module)] for module in [*layers[0].modules(), *model.model.vision_tower.modules()])
