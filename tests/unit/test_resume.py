"""What a second start takes for the same training: whole checkpoints, settings that decide nothing, equal data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from moe_vision.data.faults import RecordFault
from moe_vision.training.checkpoints import damage, write_digests
from moe_vision.training.identity import differences
from moe_vision.training.output import OutputError, last_checkpoint
from moe_vision.training.prealign import load_aligned, save_expert
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from tests.tiny import tiny_model
from tests.unit.test_training import Killed, assert_same, kill_at, train_killed, weights
from tests.unit.toy import train_values

RUN = "01-projector"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, dict[str, torch.Tensor]]:
    """A schedule's plain values, an output that a kill left with checkpoints 1 and 2, and an unbroken run's weights."""
    folder = tmp_path_factory.mktemp("resume")
    values = train_values(folder, logging_steps=2)
    values["stages"] = values["stages"][:1]
    schedule = TrainConfig.model_validate(values)
    whole = weights(train(schedule, folder / "whole"))
    with pytest.MonkeyPatch.context() as patched:
        kill_at(patched, RUN, 3)
        with pytest.raises(Killed):
            train(schedule, folder / "killed")
    return values, folder / "killed", whole


def copied(killed: Any, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The schedule's values, to be changed, and a copy of the output."""
    values, output, _ = killed
    shutil.copytree(output, tmp_path / "out")
    return json.loads(json.dumps(values)), tmp_path / "out"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = (
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
    "loss_since_log.json", "digests.json",
)  # fmt: skip


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    killed: Any, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    _, output = copied(killed, tmp_path)
    runs, said = output / "runs" / RUN, []
    harm(runs / "checkpoint-2" / name)
    found = last_checkpoint(runs, 1, said.append)
    assert found == str(runs / "checkpoint-1")
    (line,) = said
    assert "checkpoint-2' cannot be used" in line and "continues from checkpoint-1" in line
    assert name in line or (name == "digests.json" and harm is flip)  # it may name another file then


def test_every_file_of_a_checkpoint_has_a_digest(killed: Any) -> None:
    checkpoint = killed[1] / "runs" / RUN / "checkpoint-2"
    digests = json.loads((checkpoint / "digests.json").read_text())
    assert {path.name for path in checkpoint.iterdir()} == {*digests, "digests.json"} and set(FILES[:-1]) <= set(
        digests
    )


def test_a_run_from_the_checkpoint_before_ends_as_any_other(
    killed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, output = copied(killed, tmp_path)
    flip(output / "runs" / RUN / "checkpoint-2" / "optimizer.pt")
    assert_same(weights(train(TrainConfig.model_validate(values), output)), killed[2])
    said = " ".join(capsys.readouterr().out.split())
    assert "optimizer.pt is damaged: it differs from its checksum" in said and "step 2/4" in said
    assert "step 1/4" not in said and not list(output.glob("runs/*/*"))


def test_without_a_whole_checkpoint_the_run_begins_anew(killed: Any, tmp_path: Path) -> None:
    values, output = copied(killed, tmp_path)
    for number in (1, 2):
        (output / "runs" / RUN / f"checkpoint-{number}" / "scheduler.pt").unlink()
    assert_same(weights(train(TrainConfig.model_validate(values), output)), killed[2])


def test_digests_cover_folders_below_a_folder(tmp_path: Path) -> None:
    (tmp_path / "optimizer_0").mkdir()
    (tmp_path / "optimizer_0" / "shard.distcp").write_bytes(b"shard")
    write_digests(tmp_path)
    assert damage(tmp_path) is None
    (tmp_path / "optimizer_0" / "shard.distcp").write_bytes(b"Shard")
    assert damage(tmp_path) == "optimizer_0/shard.distcp is damaged: it differs from its checksum"
    (tmp_path / "digests.json").write_text("[]")
    assert damage(tmp_path) == "digests.json is damaged"


def test_another_number_of_processes_is_refused(killed: Any) -> None:
    with pytest.raises(OutputError, match="written by 1 processes, and this launch has 2"):
        last_checkpoint(killed[1] / "runs" / RUN, 2, print)


def test_a_damaged_model_of_a_finished_run_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule, output = TrainConfig.model_validate(train_values(tmp_path, max_steps=2)), tmp_path / "out"
    whole = weights(train(schedule, tmp_path / "whole"))
    train_killed(monkeypatch, schedule, output, "02-finetune", 2)
    flip(output / "runs" / RUN / "done" / "model.safetensors")
    capsys.readouterr()
    assert_same(weights(train(schedule, output)), whole)
    said = " ".join(capsys.readouterr().out.split())
    assert "model.safetensors is damaged" in said and "its run begins anew" in said and "[1/2] 01-projector" in said
    assert not list(output.glob("runs/*/*")) and not (output / "model" / "digests.json").exists()


def test_a_damaged_aligned_expert_is_named(tmp_path: Path) -> None:
    model, _ = tiny_model()
    path = tmp_path / "clip.safetensors"
    save_expert(model, "clip", path, "config")
    load_aligned(model, "clip", path, "config")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"clip\.safetensors' is damaged: it differs from its checksum"):
        load_aligned(model, "clip", path, "config")


def moved(values: dict[str, Any], tmp_path: Path) -> None:
    """The data file in one folder, its images in another."""
    old = Path(values["stages"][0]["data"]["path"])
    shutil.copytree(old.parent, tmp_path / "images")
    (tmp_path / "other.json").write_bytes(old.read_bytes())
    values["stages"][0]["data"] = {"path": str(tmp_path / "other.json"), "image_root": str(tmp_path / "images")}


NEUTRAL: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "num_workers": lambda values, _: values["stages"][0].update(num_workers=1),
    "logging_steps": lambda values, _: values["stages"][0].update(logging_steps=1),
    "save_steps": lambda values, _: values["stages"][0].update(save_steps=3),
    "cache_gb": lambda values, _: values["stages"][0].update(cache_gb=2.0),
    "report_to": lambda values, _: values.update(report_to=["tensorboard"]),
    "moved data": moved,
}


@pytest.mark.parametrize("setting", NEUTRAL)
def test_settings_that_decide_nothing_may_change(
    killed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    values, output = copied(killed, tmp_path)
    NEUTRAL[setting](values, tmp_path)
    schedule = TrainConfig.model_validate(values)
    if setting == "report_to":  # not installed here
        monkeypatch.setattr("moe_vision.training.runner.check_reporters", lambda names: None)
        monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda names: [])
    assert_same(weights(train(schedule, output)), killed[2])
    logs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [log["step"] for log in logs if "loss" in log]
    assert steps == ([1, 2, 3, 4] if setting == "logging_steps" else [1, 2, 4])


def test_settings_that_decide_are_shown_with_both_values(killed: Any, tmp_path: Path) -> None:
    values, output = copied(killed, tmp_path)
    values["stages"][0] |= {"max_steps": 9, "train": {"adapters": 0.01, "language_model": 0.5}}
    with pytest.raises(OutputError) as error:
        train(TrainConfig.model_validate(values), output)
    text = str(error.value)
    assert "stages.0.max_steps was 4 and is 9" in text and "'(not there)' and is 0.5" in text
    assert "batch_size" not in text and len(text) < 400 + len(str(output))


def test_few_of_many_differences_are_shown() -> None:
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    shown = differences({str(n): n for n in range(9)}, {str(n): -n - 1 for n in range(9)})
    assert shown is not None and shown.startswith("0 was 0 and is -1; 1 was 1") and shown.endswith(", and 5 more")


def other_answer(data: Path) -> None:
    data.write_text(data.read_text().replace("yes", "no"))


def one_record_less(data: Path) -> None:
    data.write_text(json.dumps(json.loads(data.read_text())[:-1]))


def other_image(data: Path) -> None:
    Image.new("RGB", (99, 99), "red").save(data.parent / "0.png")


@pytest.mark.parametrize("change", [other_answer, one_record_less, other_image])
def test_data_with_other_content_is_refused(killed: Any, tmp_path: Path, change: Callable[[Path], None]) -> None:
    values, output = copied(killed, tmp_path)
    moved(values, tmp_path)
    shutil.move(tmp_path / "other.json", tmp_path / "images" / "data.json")
    values["stages"][0]["data"] = {"path": str(tmp_path / "images" / "data.json")}
    change(tmp_path / "images" / "data.json")
    before = sorted(path.name for path in output.rglob("*"))
    with pytest.raises(
        OutputError, match=r"stage 'projector' has other content \(8 records then, . now\).*--overwrite"
    ):
        train(TrainConfig.model_validate(values), output)
    assert sorted(path.name for path in output.rglob("*")) == before


def test_the_last_step_is_logged_drawn_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = train_values(tmp_path, max_steps=3)
    values["stages"] = values["stages"][:1]
    train(TrainConfig.model_validate(values), tmp_path / "out")
    logs = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs if "loss" in log] == [1, 3] and "grad_norm/adapters" in logs[1]
    lines = [line for line in capsys.readouterr().out.splitlines() if "step 3/3" in line]
    assert len(lines) == 1 and f"loss {logs[1]['loss']:.3f}" in lines[0]


def test_a_fault_in_a_worker_comes_without_its_traceback(tmp_path: Path) -> None:
    values = train_values(tmp_path, num_workers=1, cache_features=False)
    path = tmp_path / "data" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(RecordFault) as error:
        train(TrainConfig.model_validate(values), tmp_path / "out")
    assert str(error.value).startswith(f"image '{path}': cannot be decoded") and "Traceback" not in str(error.value)
