"""What the store of features saves a search: the micro search's trial of all five experts, with it and without.

    python benchmarks/search.py
    python benchmarks/search.py --sizes 256      # on images of 256 pixels alone; 0 stands for the experts' own sizes
    python benchmarks/search.py --config configs/search/eagle.yaml --random --scenes 64 --sizes 0      # on a GPU

`--random` takes random weights and generated pictures, `--scenes` of them, in the place of what a config names: what a
trial costs does not depend on them.

`without`: experts run on pixels in every step and in the evaluation. `first` and `second`: two trials, of other seeds,
that share a store which is empty before. Each is a job as the search runs it: training, loading, asking. The seconds of
a trial are all of it, a step's their median; the losses and answers of seed 1 must be the same bitwise with the store
and without on the CPU, while kernels of a GPU may sum in another order.

The store saves the experts' share of a trial, so that it matters how much work they are beside the language model. At
256 pixels that is about what Eagle's five are beside a language model of half a billion parameters (docs/search.md).
"""

import argparse
import json
import statistics
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
    sizes = (config.max_new_tokens, config.eval_batch_size)
    return Job(name, "trial", tuple(experts), seed, schedule, str(folder / name), config.seed, asked, *sizes)


def timed(job: Job) -> tuple[float, Result]:
    started = time.perf_counter()
    result = run_job(job)
    return time.perf_counter() - started, result


def logged(job: Job, name: str) -> list[float]:
    """A value of every log of a trial that has it."""
    lines = (Path(job.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [values[name] for line in lines if name in (values := json.loads(line))]


def random_values(config: SearchConfig, scenes: int) -> dict[str, Any]:
    """A config's values with random weights and generated pictures."""
    model = model_config(config).to_plain()
    experts = {name: {**values, "pretrained": None} for name, values in model["experts"].items()}
    language = {**model["language_model"], "tokenizer": "moe_vision:micro/language_model"}
    if language["architecture"] is not None:
        language["pretrained"] = None
    drawn = {"synthetic": "questions", "scenes": scenes}
    values = config.model_dump(mode="json")
    stages = [{**stage, "data": drawn} for stage in values["stages"]]
    changed = {"model": {**model, "experts": experts, "language_model": language}, "stages": stages}
    return {**values, **changed, "validation": {**drawn, "split": "val"}, "test": {**drawn, "split": "test"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", nargs="+", help="of the trial; all by default")
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 256], help="of images in pixels; 0: experts' own")
    parser.add_argument("--config", type=Path, default=packaged_config("search/micro.yaml"))
    parser.add_argument("--random", action="store_true", help="weights, and generated pictures")
    parser.add_argument("--scenes", type=int, default=64, help="of --random, in each split")
    parser.add_argument("overrides", nargs="*", help="of the config, as stages.0.epochs=1")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_schedule(SearchConfig, arguments.config, arguments.overrides)
    if arguments.random:
        config = validate(SearchConfig, random_values(config, arguments.scenes), source="random")
    experts = arguments.experts or pool_of(config, model_config(config))
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            measure(config, experts, size or None, Path(name), first_seed=1 if arguments.random else 0)


def measure(config: SearchConfig, experts: Sequence[str], size: int | None, folder: Path, first_seed: int) -> None:
    """Train the trial three times below `folder`, and print what each took. first_seed: of the first; random weights
    are the same by the same seed alone."""
    warm = job_of(config, experts[:1], size, 0, folder, "warm")  # imports, and pictures that are drawn
    run_job(replace(warm, schedule=short(warm.schedule)))
    store = (str(folder / "features"), 50.0)
    first_job = replace(job_of(config, experts, size, first_seed, folder, "first"), features=store)
    first, first_result = timed(first_job)
    stored = replace(job_of(config, experts, size, 1, folder, "second"), features=store)
    second, second_result = timed(stored)
    bare = job_of(config, experts, size, 1, folder, "without")
    schedule = bare.schedule
    stages = [{**stage, "cache_features": False} for stage in schedule["stages"]]
    bare = replace(bare, schedule={**schedule, "stages": stages})
    without, bare_result = timed(bare)
    losses, known_losses = logged(bare, "loss"), logged(stored, "loss")
    same = losses == known_losses and second_result.right == bare_result.right
    step = statistics.median(logged(bare, "step_seconds"))
    kept = sum(file.stat().st_size for file in (folder / "features").glob("*/*.safetensors"))
    flops = {part.part: part.flops for part in cost(ModelConfig.model_validate(schedule["model"])).parts}
    share = sum(flops[f"experts.{name}"] for name in experts) / flops["language_model"]
    shown = "their own sizes" if size is None else f"{size} pixels"
    print(
        f"{' + '.join(experts)} at {shown}, {where()}: "
        f"{share:.1f} times the language model's FLOPs; {kept / 1e6:.0f} MB in the store"
    )
    for title, seconds, result, job in (
        ("without", without, bare_result, bare), ("first", first, first_result, first_job),
        ("second", second, second_result, stored),
    ):  # fmt: skip
        parts = ", ".join(f"{part} {value:.1f} s" for part, value in result.seconds.items())
        own = statistics.median(logged(job, "step_seconds"))
        print(
            f"{title}: {seconds:.1f} s ({parts}), {seconds / without:.0%} of without; "
            f"a step {own:.3f} s, {own / step:.0%}"
        )
    apart = max(abs(known - loss) / loss for known, loss in zip(known_losses, losses, strict=True))
    verdict = "the same bitwise" if same else f"NOT the same, losses up to {apart:.1e} of their value apart"
    print(f"losses and answers of seed 1 with the store and without: {verdict}\n")


def where() -> str:
    """What a trial runs on."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{torch.get_num_threads()} threads"


def short(schedule: dict[str, Any]) -> dict[str, Any]:
    return {**schedule, "stages": [{**s, "epochs": None, "max_steps": 1} for s in schedule["stages"]]}


if __name__ == "__main__":
    main()
