"""Two processes train what one trains: the same losses, the same weights, one output folder."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe_vision.data.collate import Collator
from moe_vision.training import distributed, runner
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from tests.unit.toy import drop_images, lengthen_answers, train_values

ROOT = Path(__file__).parents[2]


def launch(config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes of `accelerate launch` with a config file of ours, to their end."""
    command = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / config)]
    done = subprocess.run(
        [sys.executable, *command, "--num_processes", "2", "--main_process_port", "0", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # whole: the rank that failed first stands far above the end
    return done


def logged(output: Path) -> list[tuple[str, int, float]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(line["run"], line["step"], line["loss"]) for line in lines if "loss" in line]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def values(folder: Path, batch_size: int) -> dict[str, Any]:
    """Ten steps of the projector, of which the first and the last are logged, and three of an expert and all behind it,
    without dropout: each process would draw its own. Eight pictures are two whole batches of four; their answers differ
    in length, so that a mean of the processes' means would show. Five records have no image: in some steps only one
    process has any."""
    made = train_values(folder, batch_size=batch_size)
    lengthen_answers(folder / "data" / "data.json")
    drop_images(folder / "data" / "data.json", (0, 2, 3, 5, 6))
    made["model"]["language_model"]["architecture"]["attention_dropout"] = 0.0
    made["stages"][0] |= {"max_steps": 10, "save_steps": 10}
    made["stages"][1] |= {"max_steps": 3, "cache_features": False}
    made["stages"][1]["train"] = {"adapters": 1e-3, "experts.sam": 1e-4, "language_model": 1e-3}
    return made


class Watching(Collator):
    """Notes for each batch of four whether its first two and its last two records have images: the batches of two
    processes."""

    def __init__(self, halves: list[tuple[bool, bool]], pad_token_id: int) -> None:
        super().__init__(pad_token_id)
        self.halves = halves

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        first, last = (any({"mixed_tokens", "pixel_values"} & item.keys() for item in items[i : i + 2]) for i in (0, 2))
        self.halves.append((first, last))
        return super().__call__(items)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` trained in one process on four records a step, and `two.yaml`, which has two on each process."""
    folder = tmp_path_factory.mktemp("distributed")
    halves: list[tuple[bool, bool]] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "Collator", partial(Watching, halves))
        train(TrainConfig.model_validate(values(folder, 4)), folder / "one")
    assert {(True, False), (False, True)} & set(halves[:10]) and {(True, False), (False, True)} & set(halves[10:])
    (folder / "two.yaml").write_text(yaml.safe_dump(values(folder, 2)))
    return folder


def assert_as_one(output: Path, one: Path) -> None:
    """The same steps with the same losses, and weights that differ by the rounding of a sum in two parts: AdamW divides
    a gradient by its own size, so that a gradient of nearly nothing may move a weight the other way, by the rate."""
    assert [log[:2] for log in logged(output)] == [log[:2] for log in logged(one)]
    assert [log[2] for log in logged(output)] == pytest.approx([log[2] for log in logged(one)], rel=1e-5)
    ours, theirs = weights(output), weights(one)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_train_what_one_does(folder: Path) -> None:
    output = folder / "ddp"
    done = launch("ddp.yaml", "-m", "moe_vision", "train", str(folder / "two.yaml"), "-o", str(output))
    assert [done.stdout.count(text) for text in ("[1/2] 01-projector: trains", "model:")] == [1, 1]  # one prints
    assert {path.name for path in output.iterdir()} == {
        "config.yaml", "metrics.jsonl", "runs", "model", "data_report.json", "environment.json", "curves", "train.lock",
        "data_digests.json",
    }  # fmt: skip
    assert_as_one(output, folder / "one")


def test_fsdp2_trains_what_one_process_does_and_resumes(folder: Path) -> None:
    launch(
        "fsdp2.yaml", str(Path(__file__).with_name("fsdp_worker.py")), str(folder / "two.yaml"), str(folder / "fsdp")
    )
    assert_as_one(folder / "fsdp" / "whole", folder / "one")
    whole, resumed = weights(folder / "fsdp" / "whole"), weights(folder / "fsdp" / "killed")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    _, finetune = json.loads((folder / "fsdp" / "facts.json").read_text())
    clip = [name for name in weights(folder / "one") if ".experts.clip." in name]
    assert clip and sorted(finetune["whole"]) == sorted(clip)  # the frozen expert, and nothing else, stays whole
    assert finetune["stated"] == finetune["sharded"]  # all else trains, and only that has optimizer state
    assert any(".experts.sam.blocks" in unit or ".experts.sam." in unit for unit in finetune["units"])
    assert "model.language_model.layers.0" in finetune["units"]


def test_the_main_process_waits_before_it_takes_anything_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may still read what its work removes: a finished run's model, a checkpoint."""
    happened: list[str] = []
    state = SimpleNamespace(num_processes=2, is_main_process=True, wait_for_everyone=lambda: happened.append("waited"))
    monkeypatch.setattr(distributed, "processes", lambda: state)
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda outcome, from_process: happened.append("told"))
    assert distributed.on_main(lambda: happened.append("worked")) is None
    assert happened == ["waited", "worked", "told"]
