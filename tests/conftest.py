"""Shared fixtures. Tests run offline and leave nothing behind."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# What is asserted bitwise holds on the CPU, and two processes of a launch need two GPUs. With CUDA_VISIBLE_DEVICES=0 in
# the environment most tests run on a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# pytest runs a process a core, and more threads than cores wait for each other; a forked child, besides, must not wait
# for threads that only its parent has. What tests start inherits it.
os.environ["OMP_NUM_THREADS"] = "1"

from moe_vision.data.synthetic import write_split


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LLaVA-format files of a few generated pictures: train captions and questions, test questions."""
    folder = tmp_path_factory.mktemp("scenes")
    files = write_split(folder, "train", 24)
    return {**files, "test": write_split(folder, "test", 6)["questions"]}
