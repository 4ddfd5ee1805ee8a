"""Every benchmark runs to its end in its smallest setting, on the code path that its figures come from."""

import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = {"published.py", "published_uhd.py"}
"""Files there that others import."""

SEARCH = [f"stages.{stage}.{value}" for stage in (0, 1) for value in ("epochs=null", "max_steps=2")]
SEARCH += ["--random", "--scenes", "4", "--sizes", "0", "--experts", "clip"]

SMALLEST: dict[str, tuple[list[str], list[str]]] = {
    "experts.py": (["--experts", "sam", "--towers", "x4", "--backward", "--tiny"], ["sam", "x4", "published"]),
    "gpu.py": (
        ["--tiny", "--repeats", "1", "--largest", "1", "--models", "0.5", "--parts", "answer,train"],
        ["first token", "train adapters", "TFLOP/s"],
    ),
    "schedules.py": (
        ["--seeds", "0", "--ways", "longer", "alternating", "--scenes", "8", "--max-steps", "1", "--test-scenes", "1"],
        ["| longer |", "| alternating |"],
    ),
    "search.py": (SEARCH, ["without:", "second:", "the store and without: the same bitwise"]),
    "search_step.py": (
        [
            str(BENCHMARKS.parent / "configs/search/micro.yaml"),
            "stages.1.batch_size=1",
            "--pictures",
            "4",
            "--steps",
            "13",
        ],
        ["second:", "MB a picture in the store"],
    ),
    "selector.py": (["--tokens", "8", "--words", "4", "--width", "16"], ["L=8 T=4 D=16", "ratio"]),
    "selector_learning.py": (["--seeds", "0", "--scenes", "8", "--test-scenes", "2"], ["| average |"]),
    "slicing.py": (["--tiny", "--sizes", "336x336,336x672"], ["view by view", "GFLOP of one image"]),
    "startup.py": (["--rounds", "1", "--only", "import moe_vision"], ["import torch", "import moe_vision"]),
    "training.py": (
        ["--steps", "4", "--warm", "1", "--scenes", "16", "--pictures", "1"],
        ["the trainer takes", "LLaVA of", "pictures of 12 megapixels a second"],
    ),
}
"""By file: arguments that make it small, and what it prints then."""


def test_every_benchmark_is_here() -> None:
    assert {path.name for path in BENCHMARKS.glob("*.py")} - MODULES == set(SMALLEST)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs(name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, printed = SMALLEST[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    try:
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    except SystemExit as end:  # typer ends so
        assert not end.code
    shown = capfd.readouterr().out
    for words in printed:
        assert words in shown
