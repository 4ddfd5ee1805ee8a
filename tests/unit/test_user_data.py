"""A user's own photographs, in mixed sizes and formats, through the real miniature: train, kill, resume, ask."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

CONFIGS = Path(__file__).parents[2] / "configs"
PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Parts of a photograph that matplotlib ships, saved as people save pictures, with a LLaVA-format JSON."""
    with Image.open(PHOTOGRAPH) as opened:
        photograph = opened.convert("RGB")
    width, height = photograph.size
    variants = {
        "whole.jpg": photograph,
        "wide.png": photograph.crop((0, 0, width, height // 4)),
        "tall.webp": photograph.crop((width // 3, 0, width // 2, height)),
        "print.tif": photograph.resize((300, 200)).convert("CMYK"),
        "old.gif": photograph.resize((90, 120)).convert("P"),
        "grey.bmp": photograph.resize((33, 57)).convert("L"),
    }
    records = []
    for name, picture in variants.items():
        picture.save(tmp_path / name)
        turns = [
            {"from": "human", "value": "<image>\nwhat is it"},
            {"from": "gpt", "value": f"a {picture.mode} picture"},
        ]
        records.append({"id": name, "image": name, "conversations": turns})
    (tmp_path / "photographs.json").write_text(json.dumps(records))
    stages = [
        {"name": "projector", "train": {"adapters": 1e-3}, "max_steps": 3, "batch_size": 3},
        {"name": "finetune", "train": {"adapters": 1e-3, "language_model": 1e-3, "experts": 1e-4}, "max_steps": 9,
         "batch_size": 2, "save_steps": 2},
    ]  # fmt: skip
    model = str(CONFIGS.resolve() / "model" / "micro.yaml")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"model": model, "stages": stages}))
    return tmp_path


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "moe_vision", *arguments]


def train(folder: Path, output: str) -> list[str]:
    data = str(folder / "photographs.json")
    return command(folder, "train", str(folder / "train.yaml"), "--data", data, "--output", str(folder / output))


def test_photographs_train_die_resume_and_answer(photographs: Path) -> None:
    whole = subprocess.run(train(photographs, "whole"), capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    assert "Traceback" not in whole.stderr

    dying = subprocess.Popen(train(photographs, "killed"), stdout=subprocess.DEVNULL)
    stage = photographs / "killed" / "runs" / "02-finetune"
    deadline = time.monotonic() + 120
    while not list(stage.glob("checkpoint-*/trainer_state.json")) and dying.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)
    dying.send_signal(signal.SIGKILL)
    dying.wait()
    assert not (photographs / "killed" / "model").exists()

    resumed = subprocess.run(train(photographs, "killed"), capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    expected = load_file(photographs / "whole" / "model" / "model.safetensors")
    found = load_file(photographs / "killed" / "model" / "model.safetensors")
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    ask = command(
        photographs, "generate", str(photographs / "whole"), "what is it", "--image", str(photographs / "tall.webp")
    )
    answered = subprocess.run(ask, capture_output=True, text=True, check=False)
    assert answered.returncode == 0 and answered.stdout.strip(), answered.stderr
