"""What the store of features saves a search: the micro search's trial of all five experts, with it and without.

    python benchmarks/search.py
    python benchmarks/search.py --sizes 256      # on images of 256 pixels alone; 0 stands for the experts' own sizes

`without`: experts run on pixels in every step and in the evaluation. `first` and `second`: two trials, of other seeds,
that share a store which is empty before. Each is a job as the search runs it: training, loading, asking. The seconds of
a trial are all of it; the losses and answers of seed 1 must be the same bitwise with the store and without.

The store saves the experts' share of a trial, so that it matters how much work they are beside the language model. At
256 pixels that is about what Eagle's five are beside a language model of half a billion parameters (docs/search.md).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_vision.config import validate
from moe_vision.modeling.cost import cost
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from moe_vision.search.config import SearchConfig
from moe_vision.search.jobs import Job, Result, run_job
from moe_vision.search.subsets import pool_of, subset_model, subset_stages
from moe_vision.training.data import on_disk
from moe_vision.training.loading import load_schedule, model_config
from moe_vision.training.schedule import TrainConfig


def job_of(
    config: SearchConfig, experts: Sequence[str], size: int | None, seed: int, folder: Path, name: str
) -> Job:  # fmt: skip
    """A trial as the search would run it, its data below `folder`."""
    plain = model_config(config).to_plain()
    if size is not None:
        plain["experts"] = {
            expert: {**values, "image_size": [size, size]} for expert, values in plain["experts"].items()
        }
    model = subset_model(validate(ModelConfig, plain, source="larger images"), tuple(experts))
    stages = [
        stage.model_copy(update={"data": on_disk(stage.data, folder / "data", config.seed)})
        for stage in subset_stages(config, tuple(experts))
        if stage.data is not None
    ]
    schedule = TrainConfig(model=model.to_plain(), stages=stages, seed=seed).model_dump(mode="json")
    assert config.validation is not None
    asked = on_disk(config.validation, folder / "data", config.seed).model_dump(mode="json")
    return Job(name, "trial", tuple(experts), seed, schedule, str(folder / name), config.seed, asked)


def timed(job: Job) -> tuple[float, Result]:
    started = time.perf_counter()
    result = run_job(job)
    return time.perf_counter() - started, result


def losses(job: Job) -> list[Any]:
    lines = (Path(job.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line).get("loss") for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", nargs="+", help="of the trial; all by default")
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 256], help="of images in pixels; 0: experts' own")
    parser.add_argument("overrides", nargs="*", help="of configs/search/micro.yaml, as stages.0.epochs=1")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_schedule(SearchConfig, packaged_config("search/micro.yaml"), arguments.overrides)
    experts = arguments.experts or pool_of(config, model_config(config))
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            measure(config, experts, size or None, Path(name))


def measure(config: SearchConfig, experts: Sequence[str], size: int | None, folder: Path) -> None:
    """Train the trial three times below `folder`, and print what each took."""
    warm = job_of(config, experts[:1], size, 0, folder, "warm")  # imports, and pictures that are drawn
    run_job(replace(warm, schedule=short(warm.schedule)))
    store = (str(folder / "features"), 4.0)
    first, first_result = timed(replace(job_of(config, experts, size, 0, folder, "first"), features=store))
    stored = replace(job_of(config, experts, size, 1, folder, "second"), features=store)
    second, second_result = timed(stored)
    bare = job_of(config, experts, size, 1, folder, "without")
    schedule = bare.schedule
    stages = [{**stage, "cache_features": False} for stage in schedule["stages"]]
    bare = replace(bare, schedule={**schedule, "stages": stages})
    without, bare_result = timed(bare)
    same = losses(stored) == losses(bare) and second_result.right == bare_result.right
    kept = sum(file.stat().st_size for file in (folder / "features").glob("*/*.safetensors"))
    flops = {part.part: part.flops for part in cost(ModelConfig.model_validate(schedule["model"])).parts}
    share = sum(flops[f"experts.{name}"] for name in experts) / flops["language_model"]
    shown = "their own sizes" if size is None else f"{size} pixels"
    print(
        f"{' + '.join(experts)} at {shown}, {torch.get_num_threads()} threads: "
        f"{share:.1f} times the language model's FLOPs; {kept / 1e6:.0f} MB in the store"
    )
    for title, seconds, result in (
        ("without", without, bare_result), ("first", first, first_result), ("second", second, second_result),
    ):  # fmt: skip
        parts = ", ".join(f"{part} {value:.1f} s" for part, value in result.seconds.items())
        print(f"{title}: {seconds:.1f} s ({parts}), {seconds / without:.0%} of without")
    verdict = "the same bitwise" if same else "NOT the same"
    print(f"losses and answers of seed 1 with the store and without: {verdict}\n")


def short(schedule: dict[str, Any]) -> dict[str, Any]:
    return {**schedule, "stages": [{**s, "epochs": None, "max_steps": 1} for s in schedule["stages"]]}


if __name__ == "__main__":
    main()
