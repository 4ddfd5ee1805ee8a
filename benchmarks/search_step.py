"""What the store of features saves a search at full size: one training step of a trial, on pixels and on stored maps.

    python benchmarks/search_step.py                                   # Eagle's five experts, on a GPU
    python benchmarks/search_step.py configs/search/micro.yaml

The last stage of a search config, on random weights and generated pictures: what a step costs does not depend on them.
It runs as a trial's stage does (loader, collator, GroupTrainer), without what a trial does once: reading weights,
writing the model, asking it. A step's seconds are the mean after the first twelve, for which the loader has read ahead.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from moe_vision.config import validate
from moe_vision.data.config import DataConfig
from moe_vision.data.samples import samples_of
from moe_vision.evaluation import accelerator
from moe_vision.modeling.compose import compose
from moe_vision.modeling.cost import cost
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from moe_vision.search.config import SearchConfig
from moe_vision.training.callbacks import ScheduleProgress, ScheduleSteps
from moe_vision.training.data import read_data
from moe_vision.training.feature_store import FeatureStore
from moe_vision.training.groups import freeze_all_but, learning_rates
from moe_vision.training.interrupts import Preemption
from moe_vision.training.loading import load_schedule, model_config
from moe_vision.training.runner import run_stage
from moe_vision.training.schedule import Run, TrainConfig

READ_AHEAD = 12
"""Steps that are not counted: the first of all warm up, and those after it find their batch read."""


def random_model(config: SearchConfig) -> ModelConfig:
    """The config's model with random weights and the miniature's tokenizer."""
    plain = model_config(config).to_plain()
    experts = {name: {**values, "pretrained": None} for name, values in plain["experts"].items()}
    language = {**plain["language_model"], "tokenizer": "moe_vision:micro/language_model"}
    if language["architecture"] is not None:
        language["pretrained"] = None
    return validate(ModelConfig, {**plain, "experts": experts, "language_model": language}, source="random weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=packaged_config("search/eagle.yaml"))
    parser.add_argument("overrides", nargs="*", help="of the config, as stages.1.batch_size=4")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.steps <= READ_AHEAD:
        parser.error(f"--steps {arguments.steps}: the first {READ_AHEAD} are not counted")
    config = load_schedule(SearchConfig, arguments.config, arguments.overrides)
    device = accelerator()
    with device:
        model, processor = compose(random_model(config))
    # One long epoch: at the beginning of each the loader starts anew.
    epochs = math.ceil(arguments.steps * config.stages[-1].batch_size / arguments.pictures)
    part = {"synthetic": "questions", "scenes": arguments.pictures, "epochs": epochs}
    data = DataConfig.model_validate({"mixture": [part]})
    lengths = {"epochs": None, "max_steps": arguments.steps, "gradient_accumulation": 1, "logging_steps": 1}
    stage = config.stages[-1].model_copy(update={"data": data, **lengths})
    rates = learning_rates(model, stage.rates)
    freeze_all_but(model, rates)
    flops = {part.part: part.flops for part in cost(random_model(config)).parts}
    share = sum(value for part, value in flops.items() if part.startswith("experts.")) / flops["language_model"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{len(model.config.vision_config.experts)} experts, {share:.1f} times the language model's FLOPs; "
        f"{arguments.pictures} pictures, batches of {stage.batch_size}, {stage.precision}, {name}",
        flush=True,
    )
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        samples = samples_of(read_data(data, output / "data", config.seed), processor, None, config.seed)
        store = FeatureStore(output / "features", 100.0)
        for title, cached, cache in (("pixels", False, None), ("first", True, store), ("second", True, store)):
            run = Run(title, stage.model_copy(update={"cache_features": cached, "cache_gb": 0.001}))
            train = TrainConfig(model={}, stages=[run.stage], seed=config.seed)
            progress = ScheduleProgress(Console(quiet=True), title, "", ScheduleSteps({title: arguments.steps}))
            started = time.perf_counter()
            with Preemption() as preemption:
                run_stage(run, model, processor, samples, rates, output, train, 1, progress, preemption, cache)
            whole = time.perf_counter() - started
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            own = [line["step_seconds"] for line in lines if line["run"] == title and "loss" in line]
            seconds[title] = statistics.fmean(own[READ_AHEAD:])
            print(
                f"{title}: {seconds[title]:.3f} s a step, {seconds[title] / seconds['pixels']:.0%} of that on pixels; "
                f"{whole:.1f} s for {arguments.steps} steps and what comes before them",
                flush=True,
            )
        kept = sum(file.stat().st_size for file in (output / "features").glob("*/*.safetensors"))
        print(f"{kept / arguments.pictures / 1e6:.1f} MB a picture in the store")


if __name__ == "__main__":
    main()
