"""Which schedule? Pre-aligned or not, alternating or joint, experts locked or not, on the miniature.

    python benchmarks/schedules.py --seeds 0 1 2 --json schedules.json

Every way has the same stages `projector` and `finetune`, the same pictures, steps and rates, and differs in what its
name says. A seed draws projectors and the order of batches; the pictures are the same. `longer` spends on a longer
projector stage, without alignment, the steps that alignment takes: is it the alignment, or the time?
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_vision.config import read_yaml
from moe_vision.data.records import load_records
from moe_vision.data.synthetic import write_split
from moe_vision.evaluation import evaluate
from moe_vision.modeling.compose import load
from moe_vision.modeling.model_config import packaged_config
from moe_vision.training.data import on_disk
from moe_vision.training.features import FeatureCache
from moe_vision.training.runner import train
from moe_vision.training.schedule import StageConfig, TrainConfig

EXPERT_RATE = 1e-4
"""Learning rate of experts that train in `finetune`."""

Values = dict[str, Any]


def preset(name: str) -> Values:
    path = packaged_config(f"train/{name}.yaml")
    return read_yaml(path, TrainConfig)


def unlocked(values: Values) -> Values:
    """The same with experts that train in the last stage too."""
    *first, last = values["stages"]
    return {**values, "stages": [*first, {**last, "train": {**last["train"], "experts": EXPERT_RATE}}]}


def without_alignment(values: Values) -> Values:
    return {**values, "stages": [stage for stage in values["stages"] if "prealign" not in stage]}


def longer(values: Values) -> Values:
    """Without alignment, and its epochs of every expert added to the projector's."""
    aligned, *rest = values["stages"]
    experts = len(read_yaml(Path(values["model"]))["experts"])
    projector = {**rest[0], "epochs": rest[0]["epochs"] + aligned["epochs"] * experts}
    return {**values, "stages": [projector, *rest[1:]]}


WAYS: dict[str, Callable[[], Values]] = {
    "joint": lambda: without_alignment(preset("micro-prealign")),
    "longer": lambda: longer(preset("micro-prealign")),
    "pre-aligned": lambda: preset("micro-prealign"),
    "unlocked": lambda: unlocked(without_alignment(preset("micro-prealign"))),
    "pre-aligned, unlocked": lambda: unlocked(preset("micro-prealign")),
    "alternating": lambda: preset("micro-alternate"),
}


def shortened(values: Values, scenes: int | None, max_steps: int | None) -> Values:
    """The same with so many drawn images and so many steps of each stage; as the preset says where None."""
    stages = []
    for stage in values["stages"]:
        if scenes is not None:
            stage = {**stage, "data": {**stage["data"], "scenes": scenes}}
        if max_steps is not None:
            stage = {**stage, "epochs": None, "max_steps": max_steps}
        stages.append(stage)
    return {**values, "stages": stages}


def run(values: Values, seed: int, folder: Path, drawn: Path, cache: FeatureCache) -> dict[str, Any]:
    """Train one way from one seed, and score it."""
    config = TrainConfig.model_validate({**values, "seed": seed})
    stages: list[StageConfig] = []
    for stage in config.stages:
        assert stage.data is not None
        stages.append(stage.model_copy(update={"data": on_disk(stage.data, drawn, 0)}))
    started = time.perf_counter()
    model = train(config.model_copy(update={"stages": stages}), folder, console=Console(quiet=True), cache=cache)
    seconds = time.perf_counter() - started
    report = evaluate(*load(model), load_records(drawn / "test_questions.json"))
    return {"average": report.average, "by_task": report.by_task, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--scenes", type=int, help="drawn images to train on; as the preset says by default")
    parser.add_argument("--max-steps", type=int, help="of each stage in place of its epochs, to see that it runs")
    parser.add_argument("--test-scenes", type=int, default=100)
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, dict[int, dict[str, Any]]] = {way: {} for way in arguments.ways}
    cache = FeatureCache()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = write_split(folder, arguments.split, arguments.test_scenes)["questions"]
        questions.replace(folder / "test_questions.json")
        for seed in arguments.seeds:
            for number, way in enumerate(arguments.ways):
                values = shortened(WAYS[way](), arguments.scenes, arguments.max_steps)
                result = run(values, seed, folder / f"{number}-{seed}", folder, cache)
                results[way][seed] = result
                print(f"seed {seed} {way}: {result['average']:.3f} ({result['seconds']:.0f} s)", flush=True)
                if arguments.json is not None:
                    arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    tasks = list(results[arguments.ways[0]][arguments.seeds[0]]["by_task"])
    print(f"| way | accuracy | by seed | {' | '.join(tasks)} | seconds |\n|---|{'---|' * (len(tasks) + 3)}")
    for way, by_seed in results.items():
        averages = [result["average"] for result in by_seed.values()]
        spread = f" ± {statistics.stdev(averages):.3f}" if len(averages) > 1 else ""
        cells = [f"{statistics.fmean(r['by_task'][task] for r in by_seed.values()):.3f}" for task in tasks]
        seconds = statistics.fmean(result["seconds"] for result in by_seed.values())
        seeds = ", ".join(f"{value:.3f}" for value in averages)
        print(f"| {way} | {statistics.fmean(averages):.3f}{spread} | {seeds} | {' | '.join(cells)} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
