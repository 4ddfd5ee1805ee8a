"""Mixers against each other: each trained for the same budget from the same seeds, in one table.

OUTPUT/config.yaml   the resolved config          OUTPUT/data/                   pictures that the config has drawn
OUTPUT/report.md     table, tasks, settings       OUTPUT/runs/MIXER-seed-0/      a training output
OUTPUT/results.json  the same for scripts         OUTPUT/runs/MIXER-seed-0.json  its scores; such a run is not repeated
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field, field_validator
from rich.console import Console

from moe_vision.config import Config, ConfigError, Problem, merge, validate
from moe_vision.data.records import Record
from moe_vision.evaluation import evaluate, generate, load_on_accelerator, over_seeds
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.cost import CostTable, cost
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.registry import MIXERS, suggest
from moe_vision.terminal import headline, say, terminal
from moe_vision.training.checkpoints import write_atomically
from moe_vision.training.data import on_disk, records_of, settle, staged
from moe_vision.training.features import FeatureCache
from moe_vision.training.groups import learning_rates, within
from moe_vision.training.identity import data_digests
from moe_vision.training.loading import model_config
from moe_vision.training.output import DATA_DIGESTS, LOCK, check_data, check_output, held, open_output
from moe_vision.training.runner import train
from moe_vision.training.schedule import DataConfig, StageConfig, TrainConfig
from moe_vision.viz.tables import COMPARED, compared_row, markdown_table, plus_minus

OWN_NAMES = frozenset({"config.yaml", "data", "runs", "report.md", "results.json", LOCK, DATA_DIGESTS})
"""What the output of a comparison holds."""

TIMED_PROMPTS, TIMED_TOKENS, TIMED_REPEATS = 16, 16, 5
"""How generation is timed: so many prompts at once, so many tokens each, the fastest of so many times."""


class MixerSettings(Config):
    """Parts of a branch, laid over the config's `branches.overview`. mixer: its `type` is the entry's name by default;
    one of another type than the config's begins with its own defaults.
    """

    experts: list[str] | None = Field(default=None, min_length=1)
    mixer: dict[str, Any] = Field(default_factory=dict)
    adapter: dict[str, Any] = Field(default_factory=dict)


class CompareConfig(TrainConfig):
    """A train config whose model is trained with one mixer after the other. mixers: settings by name, which are needed
    only where a mixer's defaults and the config's adapter do not do. test: what all are asked.

    A stage's rate of `mixers` is left out for a mixer that has no parameter.
    """

    mixers: dict[str, MixerSettings] = Field(default_factory=dict)
    test: DataConfig | None = None

    @field_validator("test")
    @classmethod
    def _test_is_whole(cls, test: DataConfig | None) -> DataConfig | None:
        for part in test.parts if test is not None else ():
            if part.on_fault != "fatal" or part.max_length is not None:
                raise ValueError(f"on_fault and max_length leave records out, and all of the test '{part.title}' is "
                                 "asked: leave them out")  # fmt: skip
        return test


@dataclass(frozen=True)
class Contender:
    """One mixer as it will be trained. fusion_parameters: of mixers, adapters and markers."""

    name: str
    model: ModelConfig
    stages: list[StageConfig]
    costs: CostTable

    @property
    def fusion_parameters(self) -> int:
        others = ("experts.", "language_model")
        return sum(part.parameters for part in self.costs.parts if not part.part.startswith(others))


@dataclass(frozen=True)
class RunResult:
    """What one mixer did from one seed. steps: by stage."""

    mixer: str
    seed: int
    average: float
    by_task: dict[str, float]
    images_per_second: float
    tokens_per_second: float
    steps: dict[str, int]
    seconds: float


def compare(
    config: CompareConfig,
    names: Sequence[str],
    seeds: int,
    output: Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train and score every mixer from every seed; returns what results.json holds. The same call after a kill goes on.

    Raises ConfigError, OutputError or DataError before a weight loads.
    """
    console = console or terminal()
    contenders = plan(config, names)
    base = model_config(config)
    resolved = yaml.safe_dump({**config.model_dump(mode="json"), "model": base.to_plain()}, sort_keys=False)
    check_output(output, resolved, overwrite=overwrite, own=OWN_NAMES, what="the output of a comparison")
    with held(output):
        with staged(output, overwrite=overwrite) as folder:  # all is checked before an old output goes
            read = {name: records_of(data, folder, config.seed) for name, data in data_of(config).items()}
            digests = data_digests(read)
            if not overwrite:
                check_data(output, digests)
            open_output(output, resolved, overwrite=overwrite)
            write_atomically(output / DATA_DIGESTS, json.dumps(digests, indent=1))
            settle(folder, output)
        return compare_held(config, contenders, seeds, output, console)


def compare_held(
    config: CompareConfig, contenders: Sequence[Contender], seeds: int, output: Path, console: Console
) -> dict[str, Any]:
    """As `compare`, in an opened output that nobody else writes."""
    (output / "runs").mkdir(exist_ok=True)
    *seen, test = [records_of(data, output / "data", config.seed) for data in data_of(config).values()]
    images = [sum(len(record.images) for record in records) / len(records) for records in seen]
    cache = FeatureCache()
    results = []
    runs = [(contender, config.seed + number) for number in range(seeds) for contender in contenders]
    for number, (contender, seed) in enumerate(runs, start=1):
        headline(console, f"{number} of {len(runs)}: {contender.name}, seed {seed}")
        path = output / "runs" / f"{contender.name}-seed-{seed}.json"
        if path.is_file():
            say(console, f"is finished: {path}")
        else:
            result = run(contender, config, seed, output, test, images, cache, console)
            write_atomically(path, json.dumps(asdict(result), indent=1))
        results.append(RunResult(**json.loads(path.read_text(encoding="utf-8"))))
    summary = json.loads(json.dumps(summarise(contenders, results, config, len(test))))  # as a script will read it
    write_atomically(output / "results.json", json.dumps(summary, indent=1))
    write_atomically(output / "report.md", report(summary))
    return summary


def data_of(config: CompareConfig) -> dict[str, DataConfig]:
    """Of every stage, and of the test, by a name for people."""
    named = {f"stage '{stage.name}'": stage.data for stage in config.stages} | {"the test": config.test}
    return {name: data for name, data in named.items() if data is not None}


def plan(config: CompareConfig, names: Sequence[str]) -> list[Contender]:
    """Every mixer as it will be trained, without weights. Raises ConfigError with all that is wrong with any."""
    base = model_config(config).to_plain()
    problems = unknown_mixers(config, names)
    if not names:
        cure = f"name some, as --mixer {','.join(sorted(MIXERS))}"
        problems.append(Problem("--mixer", None, "names no mixer, and neither does the config", cure))
    for stage in config.stages:
        if stage.train is None:
            kind = "prealign" if stage.prealign is not None else "alternate"
            cure = "write train: {group: rate}; what else trains differs from mixer to mixer"
            problems.append(Problem(f"stages.{stage.name}.{kind}", None, "is not compared", cure))
        if stage.data is None:
            cure = "give --data FILE, or write data: {path: …} into the stage"
            problems.append(Problem(f"stages.{stage.name}.data", None, "is missing", cure))
    if config.test is None:
        problems.append(Problem("test", None, "is missing", "give --test FILE, or write test: {path: …}"))
    unknown = {problem.value for problem in problems}
    contenders = []
    for name in dict.fromkeys(names):
        if name in unknown:
            continue
        try:
            contenders.append(contender_of(config, base, name))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError("comparison", problems)
    return contenders


def schedules(config: CompareConfig) -> dict[str, TrainConfig]:
    """What each mixer of the config is trained by. Raises ConfigError with all that is wrong with any."""
    contenders = plan(config, [*config.mixers])
    return {c.name: TrainConfig(model=c.model.to_plain(), stages=c.stages, seed=config.seed) for c in contenders}


def unknown_mixers(config: CompareConfig, names: Sequence[str]) -> list[Problem]:
    """Names, here and in the config, that no mixer has, and those that cannot name a folder."""
    problems = []
    for name in dict.fromkeys([*names, *config.mixers]):
        settings = config.mixers.get(name, MixerSettings())
        where = f"mixers.{name}" if name in config.mixers else "--mixer"
        if name not in list(MIXERS) and "type" not in settings.mixer:
            cure = suggest(name, list(dict.fromkeys([*MIXERS, *config.mixers])))
            problems.append(Problem(where, name, f"unknown mixer '{name}'", cure))
        elif not name.isidentifier():
            problems.append(Problem(where, name, "becomes a folder", "use letters, digits and _ only"))
    return problems


def contender_of(config: CompareConfig, base: Mapping[str, Any], name: str) -> Contender:
    """The base's plain values under one mixer. Raises ConfigError, with paths as the user's file has them."""
    settings = config.mixers.get(name, MixerSettings()).model_dump(exclude_none=True)
    settings["mixer"] = {"type": name, **settings["mixer"]}
    overview = merge(base["branches"]["overview"], settings)
    try:
        model = validate(
            ModelConfig, {**base, "branches": {**base["branches"], "overview": overview}}, source=f"mixers.{name}"
        )
    except ConfigError as error:
        moved = [moved_to(problem, name, overview["mixer"]) for problem in error.problems]
        raise ConfigError(error.source, moved) from None
    costs = cost(model)
    trains = any(part.parameters for part in costs.parts if part.part.startswith("mixers."))
    stages = [stage if trains else without_mixers(stage) for stage in config.stages]
    with torch.device("meta"):
        skeleton = MoeVisionForConditionalGeneration(model.hf_config())
    problems = []
    for stage in stages:
        try:
            learning_rates(skeleton, stage.rates)
        except ValueError as error:
            cause, _, cure = str(error).removeprefix("train: ").partition(": ")
            problems.append(Problem(f"stages.{stage.name}.train", list(stage.rates), cause, cure))
        if not stage.rates:
            cause, cure = f"trains nothing with '{name}', which has no parameter", "train adapters beside mixers"
            problems.append(Problem(f"stages.{stage.name}.train", ["mixers"], cause, cure))
    if problems:
        raise ConfigError(f"mixers.{name}", problems)
    return Contender(name, model, stages, costs)


def moved_to(problem: Problem, name: str, mixer: Mapping[str, Any]) -> Problem:
    """A problem of a merged model config, told where its settings stand in the comparison's."""
    if problem.path == "(whole file)":  # the mixer does not fit the experts; the whole model would only hide that
        return replace(problem, path=f"mixers.{name}", value=dict(mixer))
    return replace(problem, path=problem.path.replace("branches.overview.", f"mixers.{name}.", 1))


def without_mixers(stage: StageConfig) -> StageConfig:
    return stage.model_copy(
        update={"train": {group: r for group, r in stage.rates.items() if not within(group, "mixers")}}
    )


def run(
    contender: Contender,
    config: CompareConfig,
    seed: int,
    output: Path,
    test: Sequence[Record],
    images: Sequence[float],
    cache: FeatureCache,
    console: Console,
) -> RunResult:
    """Train one mixer from one seed, score it and time it. images: those of a record, on average, by stage."""
    started = time.perf_counter()
    stages = []
    for stage in contender.stages:
        assert stage.data is not None  # plan() refused it
        stages.append(stage.model_copy(update={"data": on_disk(stage.data, output / "data", config.seed)}))
    schedule = TrainConfig(model=contender.model.to_plain(), stages=stages, seed=seed)
    folder = output / "runs" / f"{contender.name}-seed-{seed}"
    model, processor = load_on_accelerator(train(schedule, folder, console=console, cache=cache))
    scores = evaluate(model, processor, test)
    say(console, f"{contender.name}: {scores.average:.3f} of the test questions right")
    for warning in scores.warnings():
        say(console, f"warning: {warning}")
    steps, images_per_second = training_speed(folder, schedule, images)
    tokens_per_second = generation_speed(model, processor, test[:TIMED_PROMPTS])
    seconds = time.perf_counter() - started
    return RunResult(
        contender.name, seed, scores.average, scores.by_task, images_per_second, tokens_per_second, steps, seconds
    )


def training_speed(folder: Path, schedule: TrainConfig, images: Sequence[float]) -> tuple[dict[str, int], float]:
    """Steps of each stage, and images a second over all of them, from the median time of a step of each."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps: dict[str, int] = {}
    seen = seconds = 0.0
    for run, in_a_record in zip(schedule.runs([]), images, strict=True):
        stage = run.stage
        own = [line for line in lines if line["run"] == run.name]
        steps[stage.name] = max(line["step"] for line in own)
        seen += steps[stage.name] * stage.batch_size * stage.gradient_accumulation * in_a_record
        median = statistics.median(line["step_seconds"] for line in own if "step_seconds" in line)
        seconds += steps[stage.name] * median
    return steps, seen / seconds


@torch.inference_mode()
def generation_speed(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, records: Sequence[Record]
) -> float:
    """Tokens a second that a batch of records' questions is answered with, pictures and prompts included."""
    prompts = [(record.turns[:-1], record.images) for record in records]
    times = []
    for _ in range(TIMED_REPEATS):
        started = time.perf_counter()
        generate(model, processor, prompts, TIMED_TOKENS, min_new_tokens=TIMED_TOKENS)
        times.append(time.perf_counter() - started)
    return len(prompts) * TIMED_TOKENS / min(times)


def summarise(
    contenders: Sequence[Contender], results: Sequence[RunResult], config: CompareConfig, questions: int
) -> dict[str, Any]:
    """Plain values of the whole comparison: what results.json holds."""
    mixers = {}
    for contender in contenders:
        runs = [result for result in results if result.mixer == contender.name]
        overview = contender.model.branches.overview
        mixers[contender.name] = {
            "mixer": overview.mixer.to_dict(),
            "adapter": overview.adapter.to_dict(),
            "experts": overview.experts or list(contender.model.experts),
            "accuracy": over_seeds([run.average for run in runs]),
            "by_task": {task: over_seeds([run.by_task[task] for run in runs]) for task in runs[0].by_task},
            "visual_tokens": contender.costs.visual_tokens,
            "parameters": {"fusion": contender.fusion_parameters, "all": contender.costs.parameters},
            "flops": contender.costs.flops,
            "images_per_second": over_seeds([run.images_per_second for run in runs]),
            "tokens_per_second": over_seeds([run.tokens_per_second for run in runs]),
        }
    seeds = list(dict.fromkeys(result.seed for result in results))
    data = [data.title for data in data_of(config).values()]
    return {
        "seeds": seeds, "steps": results[0].steps, "questions": questions, "data": list(dict.fromkeys(data)),
        "seconds": sum(result.seconds for result in results), "mixers": mixers,
    }  # fmt: skip


def report(summary: Mapping[str, Any]) -> str:
    """report.md: the table, the tasks, the seeds, the settings."""
    mixers, seeds = summary["mixers"], summary["seeds"]
    steps = ", ".join(f"{stage} {count}" for stage, count in summary["steps"].items())
    lines = [
        "# Mixers compared", "",
        f"Seeds {', '.join(map(str, seeds))}; steps of each run: {steps}; data: {'; '.join(summary['data'])}; "
        f"{summary['questions']} test questions; {summary['seconds']:.0f} s in all. Spread is the sample standard "
        "deviation over the seeds.", "",
        *markdown_table(COMPARED, [compared_row(name, values) for name, values in mixers.items()]), "",
        "FLOPs are of one image with the experts and the language model. Images/s are those of a training step, whose "
        "frozen experts' maps come from memory where they fit there; tokens/s are those of "
        f"{TIMED_PROMPTS} prompts at once, pictures included, the fastest of {TIMED_REPEATS} times.", "",
        "## Exact match by task", "",
        *markdown_table(["mixer", *next(iter(mixers.values()))["by_task"]],
                        [[name, *map(plus_minus, values["by_task"].values())] for name, values in mixers.items()]), "",
        "## Exact match by seed", "",
        *markdown_table(["mixer", *map(str, seeds)],
                        [[n, *(f"{v:.3f}" for v in values["accuracy"]["values"])] for n, values in mixers.items()]), "",
        "## Settings", "",
    ]  # fmt: skip
    for name, values in mixers.items():
        lines.append(f"- {name}: `{json.dumps({key: values[key] for key in ('mixer', 'adapter', 'experts')})}`")
    return "\n".join([*lines, ""])
