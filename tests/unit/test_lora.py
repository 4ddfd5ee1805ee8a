"""A stage with LoRA trains adapters alone, resumes bitwise, and leaves an ordinary model behind."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_vision.modeling.compose import load
from moe_vision.training.groups import freeze_all_but, learning_rates, optimizer_groups, parameter_groups
from moe_vision.training.lora import add_lora, merge, merged
from moe_vision.training.runner import train
from moe_vision.training.schedule import LoraSettings, TrainConfig
from moe_vision.training.trainer import trained_and_frozen
from tests.tiny import tiny_model
from tests.unit.test_training import assert_same, runner_model, train_killed, weights
from tests.unit.toy import train_values

LORA = {"rank": 2, "alpha": 4, "dropout": 0.1}


def values(folder: Path, **lora: Any) -> dict[str, Any]:
    made = train_values(folder)
    made["stages"][1]["lora"] = {**LORA, **lora}
    return made


def test_only_adapted_layers_move_and_the_finished_model_has_its_own_keys(tmp_path: Path) -> None:
    made = values(tmp_path, target_modules=["q_proj"])
    made["stages"] = made["stages"][1:]
    made["stages"][0]["train"] = {"language_model": 1e-2}
    before, _ = runner_model(made)
    after, _ = load(train(TrainConfig.model_validate(made), tmp_path / "out"))
    assert after.state_dict().keys() == before.state_dict().keys()
    moved = [n for n, value in before.state_dict().items() if not torch.equal(after.state_dict()[n], value)]
    assert moved == ["model.language_model.layers.0.self_attn.q_proj.weight"]
    change = after.state_dict()[moved[0]] - before.state_dict()[moved[0]]
    assert torch.linalg.matrix_rank(change, rtol=1e-3) <= LORA["rank"]


@pytest.mark.parametrize(("run", "step"), [("01-projector", 3), ("02-finetune", 1), ("02-finetune", 3)])
def test_killed_and_resumed_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, step: int
) -> None:
    schedule = TrainConfig.model_validate(values(tmp_path))
    whole = weights(train(schedule, tmp_path / "whole"))
    train_killed(monkeypatch, schedule, tmp_path / "killed", run, step)
    assert_same(weights(train(schedule, tmp_path / "killed")), whole)


def test_adapters_alone_train_in_their_group_and_both_ways_to_merge_agree() -> None:
    model, _ = tiny_model()
    settings = LoraSettings.model_validate(LORA)
    rates = learning_rates(model, {"adapters": 1e-3, "language_model": 1e-4})
    freeze_all_but(model, rates)
    names = set(model.state_dict())
    tuner = add_lora(model, settings, seed=0)
    assert tuner is not None
    groups = parameter_groups(model)
    trained = {name for name, parameter in groups["language_model"] if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    count = sum(dict(model.named_parameters())[name].numel() for name in trained)
    assert trained_and_frozen(model, rates)[0]["language_model"] == count
    by_rate: dict[Any, int] = {}
    for group in optimizer_groups(model, rates, 0.1):
        members: Any = group["params"]
        by_rate[group["lr"]] = by_rate.get(group["lr"], 0) + sum(p.numel() for p in members)
    assert by_rate[1e-4] == count
    for name in trained:
        torch.nn.init.normal_(dict(model.named_parameters())[name], std=0.1)
    gathered = merged(model.state_dict(), settings)
    merge(model, tuner)
    assert set(gathered) == names == set(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(gathered[name], value, rtol=1e-6, atol=1e-7)


def test_what_is_wrong_is_told_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = values(tmp_path, target_modules=["q_prog"])
    with pytest.raises(ValueError, match=r"finetune\.lora\.target_modules: 'q_prog'.*q_proj"):
        train(TrainConfig.model_validate(made), tmp_path / "out")
    made["stages"][1]["train"] = {"adapters": 1e-3}
    with pytest.raises(ValueError, match="add language_model to train"):
        TrainConfig.model_validate(made)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find_spec(name, *a))
    with pytest.raises(ValueError, match=r"pip install 'moe-vision\[lora\]'"):
        train(TrainConfig.model_validate(values(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
