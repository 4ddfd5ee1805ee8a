"""A user's own small set of images is learnt by the preset for it, and a run that learns nothing says so."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from moe_vision.data.chat import Tokenised
from moe_vision.data.records import Record, load_records
from moe_vision.data.samples import Sample, Samples
from moe_vision.evaluation import evaluate
from moe_vision.modeling.compose import load
from moe_vision.training.callbacks import FiniteLoss, LossFalls, check_finite
from moe_vision.training.data import unknown_lines
from moe_vision.training.loading import load_train_config
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from tests.unit.toy import train_values

PRESET = Path(__file__).parents[2] / "configs" / "train" / "finetune.yaml"
ANSWERS = ("cat", "a penguin", "New York", "42")


def own_data(folder: Path) -> Path:
    """Four images with answers of words that the miniature language model was never trained on."""
    folder.mkdir()
    records = []
    for number, answer in enumerate(ANSWERS):
        image = Image.effect_mandelbrot((160, 120), (-2 + number / 2, -1, 0.5 + number / 2, 1), 40 + 20 * number)
        image.save(folder / f"{number}.jpg")
        turns = [("human", "<image>\nWhat is in this picture?"), ("gpt", answer)]
        records.append(
            {"id": number, "image": f"{number}.jpg", "conversations": [{"from": f, "value": v} for f, v in turns]}
        )
    (folder / "mine.json").write_text(json.dumps(records))
    return folder / "mine.json"


def test_the_preset_learns_a_users_own_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = own_data(tmp_path / "data")
    schedule = load_train_config(PRESET, ["stages.0.max_steps=120", f"stages.0.data={{path: {data}}}"])
    report = evaluate(*load(train(schedule, tmp_path / "out")), load_records(data))
    assert [prediction.prediction.strip() for prediction in report.predictions] == list(ANSWERS)
    assert "warning" not in capsys.readouterr().out


def logs_file(path: Path, losses: list[float]) -> Path:
    logs = [{"run": "a", "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    path.write_text("".join(json.dumps(log) + "\n" for log in [*logs, {"run": "b", "step": 1, "loss": 0.0}]))
    return path


@pytest.mark.parametrize(
    ("losses", "steps", "warns"),
    [
        ([4.0, 3.0, 2.0, 1.0], 10, False),
        ([4.0, 3.0, 2.0, 4.0], 10, True),
        ([4.0, 4.0], 10, True),
        ([2.0, 9.0, 1.0], 30, False),
        ([4.0, 5.0], 9, False),  # too few steps to say
    ],
)
def test_a_loss_that_does_not_fall_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], losses: list[float], steps: int, warns: bool
) -> None:
    callback = LossFalls(Console(width=300), logs_file(tmp_path / "metrics.jsonl", losses), "a")
    state = SimpleNamespace(is_world_process_zero=True, global_step=steps, max_steps=steps)
    callback.on_train_end(None, state, None)
    assert ("warning: the loss of a did not fall" in capsys.readouterr().out) == warns
    state.max_steps += 1  # it was interrupted
    callback.on_train_end(None, state, None)
    assert capsys.readouterr().out == ""


def test_a_run_at_a_useless_rate_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = train_values(tmp_path, max_steps=20, logging_steps=1, save_steps=500, batch_size=8)
    values["stages"] = [values["stages"][0] | {"train": {"adapters": 1e-30}}]
    train(TrainConfig.model_validate(values), tmp_path / "out")
    assert "warning: the loss of 01-projector did not fall" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("logs", [{"loss": math.nan}, {"loss": 1.0, "grad_norm": math.inf}])
def test_values_that_are_not_numbers_end_a_run(logs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at step 7: lower the learning rates"):
        FiniteLoss().on_log(None, SimpleNamespace(global_step=7), None, logs)
    FiniteLoss().on_log(None, SimpleNamespace(global_step=7), None, {"loss": 1.0, "grad_norm": 3.0})
    with pytest.raises(ValueError, match="the loss is nan"):
        check_finite("loss", math.nan, 3)


def test_no_checkpoint_holds_what_is_not_a_number(tmp_path: Path) -> None:
    values = train_values(tmp_path, max_steps=6, logging_steps=100, scheduler="constant", warmup_ratio=0.0)
    values["stages"] = [values["stages"][0] | {"train": {"adapters": 1.0}, "weight_decay": 1.0, "max_grad_norm": 1e30}]
    values["model"]["branches"]["overview"]["adapter"]["inner_size"] = 8
    schedule = TrainConfig.model_validate(values)
    with pytest.MonkeyPatch.context() as patched:
        from moe_vision.training.trainer import GroupTrainer

        original = GroupTrainer.training_step

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, **kwargs) * (math.nan if self.state.global_step == 2 else 1.0)

        patched.setattr(GroupTrainer, "training_step", broken)
        with pytest.raises(ValueError, match="the loss is nan at step 3"):
            train(schedule, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("runs/*/*")) == ["checkpoint-1", "checkpoint-2"]


def test_text_that_a_tokenizer_does_not_know_is_warned_of() -> None:
    texts = [Tokenised([1, 5, 2], [-100, 5, 2]), Tokenised([1, 0, 2], [-100, 0, 2])]
    samples = {
        name: Samples(tuple(Sample(Record(str(n), (), ()), text) for n, text in enumerate(texts)), ())
        for name in ("01-a", "02-b")
    }

    def lines(unknown: int | None) -> Any:
        tokenizer: Any = SimpleNamespace(unk_token_id=unknown, bos_token_id=1, eos_token_id=2, unk_token="<unk>")
        return unknown_lines(samples, SimpleNamespace(tokenizer=tokenizer))  # type: ignore[arg-type]

    (line,) = lines(0)
    assert line.startswith("warning: 1 of 2 records") and "'<unk>', as record '1'" in line
    assert lines(None) == [] and lines(2) == [] and lines(9) == []
