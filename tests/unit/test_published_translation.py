"""The benchmark's plain translation computes what our experts compute, and the benchmark runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_vision.experts import EXPERTS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import published  # noqa: E402

TINY: dict[str, dict[str, Any]] = {
    "clip": {"variant": "vit_large_patch14_336", "class_token": False, "image_size": (56, 84),
             "architecture": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                              "num_attention_heads": 2, "image_size": 56}},
    "convnext": {"variant": "micro"},
    "sam": {"variant": "vit_large", "image_size": (224, 320),
            "architecture": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64,
                             "global_attn_indexes": [1], "image_size": 224}},
    "eva02": {"variant": "large_coco_det", "image_size": (272, 512),
              "architecture": {"hidden_size": 32, "depth": 2, "num_heads": 2, "global_blocks": [1]}},
    "pix2struct": {"variant": "micro", "image_size": (96, 160)},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TINY))
def test_ours_equals_the_plain_translation(name: str) -> None:
    torch.manual_seed(0)
    expert = EXPERTS[name](pretrained=None, **TINY[name]).build().eval()
    with torch.no_grad():
        for parameter in expert.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        views = torch.rand(2, 3, 300, 200)
        torch.testing.assert_close(expert(views).data, published.encode(expert, views), atol=1e-4, rtol=1e-3)


def test_the_benchmark_runs_and_names_every_row() -> None:
    command = [sys.executable, str(BENCHMARKS / "experts.py"), "--experts", "clip,sam", "--towers", "x4", "--tiny"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    ways = ["ours", "published", "library"]
    assert [(row["model"], row["way"]) for row in report["rows"]] == [
        *[("clip", way) for way in ways], *[("sam", way) for way in ways], ("x4", "ours"), ("x4", "published"),
    ]  # fmt: skip
    assert report["peak_before"] > 0 and all(row["seconds"] > 0 for row in report["rows"])
