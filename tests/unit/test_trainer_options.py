"""What a stage may say besides rates: decay, recomputing, grouping; what is logged; what a full disk leaves."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers.integrations import integration_utils

from moe_vision import cli
from moe_vision.config import ConfigError
from moe_vision.training import checkpoints, reporting, runner
from moe_vision.training.callbacks import ScheduleSteps
from moe_vision.training.checkpoints import WriteError, write_atomically, writing
from moe_vision.training.curves import curves
from moe_vision.training.groups import learning_rates, optimizer_groups
from moe_vision.training.interrupts import Preempted
from moe_vision.training.recompute import checkpointed_groups, recompute_in, switches
from moe_vision.training.runner import train
from moe_vision.training.schedule import StageConfig, TrainConfig
from moe_vision.training.trainer import EpochLengthSampler, GroupTrainer, OneDevice
from moe_vision.training.turns import total_steps
from tests.tiny import tiny_model
from tests.unit.test_training import assert_same, weights
from tests.unit.toy import lengthen_answers, train_values


def one_stage(folder: Path, train_groups: dict[str, float], **stage: Any) -> TrainConfig:
    values = train_values(folder, **{"max_steps": 3, "save_steps": 500, "logging_steps": 1, **stage})
    values["stages"] = [{**values["stages"][0], "train": train_groups}]
    return TrainConfig.model_validate(values)


def logs_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_decay_by_group_falls_on_matrices() -> None:
    model, _ = tiny_model()
    rates = learning_rates(model, {"experts.sam": 1e-3, "adapters": 1e-2})
    groups = optimizer_groups(model, rates, {"experts": 0.2})
    found = {(str(g["group"]), g["params"][0].ndim > 1): g["weight_decay"] for g in groups}  # type: ignore[index]
    assert found[("experts.sam", True)] == 0.2 and found[("adapters", True)] == 0.0
    assert all(decay == 0.0 for (_, matrix), decay in found.items() if not matrix)
    for group, said in (("language_model", "is frozen"), ("adapter", "known: adapters")):
        with pytest.raises(ValueError, match=f"weight_decay.*{said}"):
            optimizer_groups(model, rates, {group: 0.1})
    with pytest.raises(ValueError, match="0 to 1"):
        StageConfig(name="a", train={"adapters": 1e-3}, epochs=1, weight_decay={"adapters": 2.0})


def test_recomputing_changes_no_weight(tmp_path: Path) -> None:
    groups = {"adapters": 1e-2, "experts": 1e-3, "language_model": 1e-2}
    plain = weights(train(one_stage(tmp_path, groups), tmp_path / "plain"))
    stage = one_stage(tmp_path, groups, gradient_checkpointing=["experts.sam", "language_model"])
    for name, value in weights(train(stage, tmp_path / "recomputed")).items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-6)


def test_which_groups_recompute() -> None:
    model, _ = tiny_model()
    rates = {"experts.sam": 1e-3, "adapters": 1e-3}
    assert checkpointed_groups(model, True, rates) == {"experts.sam", "language_model"}
    assert checkpointed_groups(model, False, rates) == set()
    assert checkpointed_groups(model, ["experts"], rates) == {"experts.sam"}
    recompute_in(model, {"experts.sam"})
    flags = {n: [getattr(m, s) for m, s in switches([e])] for n, e in model.model.vision_tower.experts.items()}
    assert flags["sam"] and all(flags["sam"]) and not any(flags["clip"])
    for group, said in (("adapters", "cannot"), ("experts.clip", "is frozen"), ("expert", "unknown group")):
        with pytest.raises(ValueError, match=f"gradient_checkpointing.*{said}"):
            checkpointed_groups(model, [group], rates)


def test_eight_small_batches_are_one_large_one(tmp_path: Path) -> None:
    """One step: answers differ in length, so that a mean of means would show."""

    def gradient(name: str, **stage: Any) -> float:
        common = {"max_steps": 1, "warmup_ratio": 0.0, "scheduler": "constant", "cache_features": False}
        config = one_stage(tmp_path, {"adapters": 1e-3}, **common, **stage)
        lengthen_answers(tmp_path / "data" / "data.json")
        train(config, tmp_path / name)
        return logs_of(tmp_path / name)[0]

    large, small = gradient("large", batch_size=8), gradient("small", batch_size=1, gradient_accumulation=8)
    assert small["loss"] == pytest.approx(large["loss"], rel=1e-5)
    assert small["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-4)
    one, other = weights(tmp_path / "large" / "model"), weights(tmp_path / "small" / "model")
    for name, value in one.items():  # Adam's first step is the rate times a sign: a gradient near 0 may turn it
        close = (value - other[name]).abs() < 1e-5
        assert close.float().mean() > 0.99, name


def test_lengths_group_batches_and_an_epoch_has_one_order() -> None:
    lengths = [n % 7 + 1 for n in range(56)]

    def order(epoch: int) -> list[int]:
        sampler = EpochLengthSampler(4, lengths, seed=5)
        sampler.set_epoch(epoch)
        torch.rand(3)  # the global state is not asked
        return list(sampler)

    assert order(1) == order(1) and order(1) != order(2) and sorted(order(1)) == list(range(56))
    spread = [max(s) - min(s) for i in range(0, 56, 4) if (s := [lengths[j] for j in order(1)[i : i + 4]])]
    assert sum(spread) / len(spread) < 2  # of 6 at random almost


def test_logs_hold_norms_and_rates_of_groups_and_speed(tmp_path: Path) -> None:
    rates = {"adapters": 1e-2, "experts.sam": 1e-3}
    output = tmp_path / "out"
    train(one_stage(tmp_path, rates, scheduler="constant", warmup_ratio=0.0, max_grad_norm=1e-3), output)
    logs = logs_of(output)
    for log in logs[:-1]:
        norms = [log[f"grad_norm/{group}"] for group in rates]
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(log["grad_norm"], rel=1e-5)
        assert log["grad_norm"] > 1e-3  # before clipping
        assert {group: log[f"learning_rate/{group}"] for group in rates} == rates
        assert log["tokens_per_second"] > log["samples_per_second"] > 0
    assert logs[-1]["train_loss"] == pytest.approx(sum(log["loss"] for log in logs[:-1]) / 3, rel=1e-6)
    drawn = curves(logs, "01-projector")
    assert drawn["loss"]["all"] == ([1, 2, 3], [log["loss"] for log in logs[:-1]])
    assert set(drawn["learning_rate"]) == set(rates) and set(drawn["grad_norm"]) == {"all", *rates}
    assert (output / "curves" / "01-projector.png").read_bytes().startswith(b"\x89PNG")
    start = json.loads((output / "environment.json").read_text())[0]
    assert start["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "git", "device", "moe_vision"} <= set(start)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, output = one_stage(tmp_path, {"adapters": 1e-2}, save_steps=1), tmp_path / "out"
    whole = weights(train(schedule, tmp_path / "whole"))
    original = GroupTrainer._save_optimizer_and_scheduler

    def full(self: Any, folder: str) -> None:
        if self.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device", folder)
        original(self, folder)

    with monkeypatch.context() as patched:
        patched.setattr(GroupTrainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(WriteError, match=r"01-projector.*No space left.*make room"):
            train(schedule, output)
    assert [path.name for path in (output / "runs" / "01-projector").iterdir()] == ["checkpoint-1"]
    assert_same(weights(train(schedule, output)), whole)


def test_faults_of_writing_are_told_from_others(tmp_path: Path) -> None:
    with pytest.raises(WriteError), writing("it", tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    with pytest.raises(RuntimeError, match="CUDA"), writing("it", tmp_path):
        raise RuntimeError("CUDA error")


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_reporters_are_checked_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    reporting.check_reporters([])
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["mlflow"])
    reporting.check_reporters(["mlflow"])
    with pytest.raises(ConfigError, match=r"no such reporter; did you mean 'wandb'"):
        reporting.check_reporters(["wandbb"])
    with pytest.raises(ConfigError, match=r"not installed; install it.*mlflow"):
        reporting.check_reporters(["wandb"])


def test_one_process_trains_on_one_of_many_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    arguments = OneDevice(output_dir=str(tmp_path), per_device_train_batch_size=3, use_cpu=True)
    arguments._n_gpu = 8  # as transformers sets it where there are so many
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = TrainConfig.model_validate(train_values(tmp_path, max_steps=1))
    train(config, tmp_path / "run", console=Console(width=200))
    assert "one of 8 GPUs trains: `accelerate launch` takes all" in capsys.readouterr().out


def test_steps_of_a_schedule() -> None:
    steps = ScheduleSteps({"a": 10, "b": 15, "c": 20})
    assert (steps.total(), steps.before("a"), steps.before("b")) == (45, 0, 10)
    stage = StageConfig(name="a", train={"adapters": 1e-3}, epochs=2, batch_size=3, gradient_accumulation=2)
    assert total_steps(10, stage) == 4


def test_time_left_is_of_the_schedule(tmp_path: Path) -> None:
    lines: list[str] = []

    class Lines:
        def write(self, text: str) -> None:
            lines.append(text)

        def flush(self) -> None:
            pass

    train(
        TrainConfig.model_validate(train_values(tmp_path, max_steps=1)),
        tmp_path / "out",
        console=Console(file=Lines(), width=200),  # type: ignore[arg-type]
    )
    assert "about 0 s left" in "".join(lines) and threading.active_count() < 10


def test_the_command_line_tells_of_a_preemption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def preempted(*args: Any, **kwargs: Any) -> None:
        raise Preempted("ended by SIGTERM, with a checkpoint at step 2")

    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train_values(tmp_path)))
    monkeypatch.setattr(runner, "train", preempted)
    monkeypatch.setattr("sys.argv", ["moe-vision", "train", str(tmp_path / "train.yaml"), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.command()
    assert end.value.code == 143 and "checkpoint at step 2" in capsys.readouterr().err
