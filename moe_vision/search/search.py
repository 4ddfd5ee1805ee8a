"""Search for the experts of a model: rounds of candidates, trained and asked, in an output folder that a kill cannot
harm.

OUTPUT/config.yaml  what decides results          OUTPUT/search.db      journal: every job, SQLite
OUTPUT/search.yaml  the whole config of this call OUTPUT/best.yaml      for `moe-vision train`
OUTPUT/report.md    rounds, gains, uncertainty    OUTPUT/results.json   the same for scripts
OUTPUT/trials/      a training output for a trial OUTPUT/pictures/      curves of the search
OUTPUT/aligned/     experts aligned by themselves OUTPUT/data/          pictures that the config has drawn
OUTPUT/features/    what frozen experts made of pictures
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from rich.console import Console

from moe_vision.config import ConfigError, Problem
from moe_vision.data.records import Record
from moe_vision.evaluation import accelerator
from moe_vision.modeling.compose import compose
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.search.baselines import Baselines, answer_counts, baselines_of
from moe_vision.search.config import LocalExecutor, SearchConfig
from moe_vision.search.executors import executor_of
from moe_vision.search.journal import Journal, locked, opened
from moe_vision.search.methods import METHODS, Dropped, Experts, Failed, Outcome, Rules, Scored, in_order
from moe_vision.search.progress import Progress
from moe_vision.search.proxy import RidgeProxy
from moe_vision.search.report import write_report
from moe_vision.search.statistics import Metric
from moe_vision.search.subsets import alignment_stages, kept, pool_of, subset_model, subset_stages, with_pretrained
from moe_vision.search.summary import Found
from moe_vision.search.trials import Planned, Trials
from moe_vision.terminal import say, terminal
from moe_vision.training.checkpoints import write_atomically
from moe_vision.training.data import records_of, settle, staged
from moe_vision.training.feature_store import FeatureStore
from moe_vision.training.features import FeatureCache, expert_maps, pictures_of
from moe_vision.training.groups import touches
from moe_vision.training.identity import FREE, data_digests
from moe_vision.training.loading import model_config
from moe_vision.training.output import DATA_DIGESTS, check_data, check_output, open_output
from moe_vision.training.prealign import aligned_file
from moe_vision.training.schedule import DataConfig, TrainConfig
from moe_vision.viz.tables import marked

OWN_NAMES = frozenset({
    "config.yaml", "search.yaml", "search.db", "search.db-journal", "search.db-wal", "search.db-shm", "search.lock",
    "search.driver", "best.yaml", "report.md", "results.json", "trials", "aligned", "pictures", "data", "features",
    DATA_DIGESTS,
})  # fmt: skip
"""What the output of a search holds."""

DECIDES = ("model", "stages", "seed", "validation", "test", "max_new_tokens")
"""What an output belongs to. All else may change from call to call: it decides which trials there are, not their
outcome."""


def search(
    config: SearchConfig, output: Path, *, overwrite: bool = False, retry_failed: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Search, and return what results.json holds. The same call after a kill goes on; with other weights, methods or
    seeds it uses all trials that are there.

    Raises ConfigError, OutputError, DataError or SearchError before a weight loads where that can be known.
    """
    console = console or terminal()
    model = model_config(config)
    pool = pool_of(config, model)
    check_config(config, model)
    resolved = config.model_copy(update={"model": model.to_plain()}).model_dump(mode="json")
    identity = yaml.safe_dump({key: resolved[key] for key in DECIDES}, sort_keys=False)
    check_output(output, identity, overwrite=overwrite, own=OWN_NAMES, what="the output of a search", compared=deciding)
    if output.exists() and overwrite:
        with locked(output):
            pass  # nobody else searches there
    with staged(output, overwrite=overwrite) as folder:
        # All is checked before an old output goes.
        digests = data_digests({n: records_of(data, folder, config.seed) for n, data in data_of(config).items()})
        if not overwrite:
            check_data(output, digests)
        open_output(output, identity, overwrite=overwrite)
        write_atomically(output / DATA_DIGESTS, json.dumps(digests, indent=1))
        settle(folder, output)
    with opened(output) as journal:
        write_atomically(output / "search.yaml", yaml.safe_dump(resolved, sort_keys=False))
        names = {"validation": config.validation, "test": config.test, "train": config.stages[-1].data}
        records = {
            name: records_of(data, output / "data", config.seed) for name, data in names.items() if data is not None
        }
        if requeued := journal.requeue():
            say(console, f"going on: {requeued} jobs were under way")
        if retry_failed:
            journal.forget_failures()
        return decide(config, model, pool, output, journal, records, console)


def deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values that an output belongs to, without settings of stages that cannot change a result. Places of
    data stay: trials are known by them."""

    def without_free(stage: Any) -> Any:
        return {key: own for key, own in stage.items() if key not in FREE} if isinstance(stage, dict) else stage

    stages = values.get("stages")
    return {**values, "stages": [without_free(stage) for stage in stages] if isinstance(stages, list) else stages}


def planned_search(config: SearchConfig) -> str:
    """How many trials there are at most, for people. Raises ConfigError."""
    model = model_config(config)
    pool = pool_of(config, model)
    rounds, trained = candidates_of(config, pool), trained_of(config, pool)
    random = random_experts(config, model, pool)
    shown = ", ".join(marked([name], random) for name in pool)
    seen = "" if config.proxy is None else f", of {sum(rounds)} that the proxy sees"
    said = f"{config.method} search over {shown}: at most {sum(trained)} sets to train{seen}, "
    trials = f"{config.seeds} seeds each: {sum(trained) * config.seeds} trials"
    return f"{said}{trials} like the one above, which is of all experts"


def candidates_of(config: SearchConfig, pool: Experts) -> list[int]:
    """Sets of each round, if none stops the search: of the base or the whole pool first, where that is tried."""
    free, base = len(pool) - len(config.base_experts), len(config.base_experts)
    most = min(len(pool), config.max_experts or len(pool))
    if config.method == "exhaustive":
        return [sum(math.comb(free, size) for size in range(0 if base else 1, most - base + 1))]
    if config.method == "greedy":
        return [*([1] if base else []), *range(free, len(pool) - most, -1)]
    return [1, *range(free, 0 if base else 1, -1)]


def trained_of(config: SearchConfig, pool: Experts) -> list[int]:
    """Those of `candidates_of` that a proxy leaves."""
    sizes = candidates_of(config, pool)
    keep = max(sizes) if config.proxy is None or config.proxy.keep is None else config.proxy.keep
    return [min(size, keep) for size in sizes]


def check_config(config: SearchConfig, model: ModelConfig) -> None:
    """Raise ConfigError with all that a search needs and the config has not."""
    problems = []
    for field in ("validation", "test"):
        if getattr(config, field) is None:
            problems.append(Problem(field, None, "is missing", f"give --{field} FILE, or write {field}: {{path: …}}"))
    for stage in config.stages:
        if stage.data is None:
            cure = "give --data FILE, or write data: {path: …} into the stage"
            problems.append(Problem(f"stages.{stage.name}.data", None, "is missing", cure))
    if all(stage.prealign is not None for stage in config.stages):
        cure = "add a stage that trains them together, as train: {adapters: 1e-3}"
        problems.append(Problem("stages", [s.name for s in config.stages], "align experts and fuse none", cure))
    if config.proxy is not None and not model.slicing.one_view:
        cure = "leave proxy out, or choose slicing none"
        problems.append(Problem("proxy", config.proxy.type, "needs pictures that are seen whole", cure))
    if problems:
        raise ConfigError("search config", problems)
    config.runs(list(model.experts))


def data_of(config: SearchConfig) -> dict[str, DataConfig]:
    """Of every stage, of validation and of the test, by what messages call it."""
    every = {f"stage '{stage.name}'": stage.data for stage in config.stages}
    every |= {"validation": config.validation, "test": config.test}
    return {name: data for name, data in every.items() if data is not None}


def decide(
    config: SearchConfig, model: ModelConfig, pool: Experts, output: Path, journal: Journal,
    records: dict[str, list[Record]], console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Choose, ask the chosen set the test items, and report."""
    asked = {name: metric_of(records[name], config) for name in ("validation", "test")}
    workers = config.executor.processes if isinstance(config.executor, LocalExecutor) else 1
    random = random_experts(config, model, pool)
    rounds = [sets * config.seeds for sets in trained_of(config, pool)]
    progress = Progress(console, workers, rounds, random)
    executor = executor_of(config.executor, config.processes_per_trial)
    try:
        trials = Trials(config, model, output, journal, executor, asked["validation"], progress)
        looks = Looks(config, pool, trials, records, progress)
        cost = None if config.per is None else lambda experts: price(trials, experts, config.per or "")
        rules = Rules(0.0 if config.min_gain is None else config.min_gain, config.max_experts, cost)
        base = in_order(pool, config.base_experts)
        trace = METHODS[config.method](pool, base, looks.evaluate, rules)
        best = trace.best[0]
        test = asked_again(trials, best, [trials.test(best, seed) for seed in trials.seeds])
        baselines = baselines_by_split(config, trials, best, records)
    finally:
        executor.close()
    write_atomically(output / "best.yaml", best_config(config, model, best))
    found = Found(
        config, trace, pool, looks.answers, looks.proxied, {e: trials.cost_of(e) for e in looks.answers}, test,
        asked["validation"], asked["test"], {name: len(own) for name, own in records.items()}, random, baselines,
    )  # fmt: skip
    return write_report(found, output)


def asked_again(trials: Trials, best: Experts, planned: Sequence[Planned]) -> torch.Tensor:
    """Answers [seeds, items] of jobs that ask the best set's models. Raises RuntimeError if one fails."""
    rows = trials.do(planned)
    errors = [(item, row.error) for item in planned if (row := rows[item.job.key]).error is not None]
    for item, error in errors:
        raise RuntimeError(f"the job '{item.job.what}' of {' + '.join(best)} failed: {error}")
    return torch.tensor([rows[item.job.key].answers() for item in planned], dtype=torch.float32)


def baselines_by_split(
    config: SearchConfig, trials: Trials, best: Experts, records: dict[str, list[Record]]
) -> dict[str, Baselines]:
    """Baselines of the validation and the test split. Majorities are of the data of all stages."""
    parts = list({data.model_dump_json(): data for stage in config.stages if (data := stage.data) is not None}.values())
    counts = answer_counts(
        record for data in parts for record in records_of(data, trials.output / "data", config.seed)
    )  # fmt: skip
    found = {}
    for split, data in (("validation", config.validation), ("test", config.test)):
        blind = asked_again(trials, best, [trials.blind(best, seed, data) for seed in trials.seeds])
        found[split] = baselines_of(records[split], counts, blind)
    return found


def random_experts(config: SearchConfig, model: ModelConfig, pool: Experts) -> dict[str, str]:
    """Experts of the pool whose weights are random at the start, and whether a stage aligns or trains them: `frozen`
    or `trained`."""
    rates = [group for stage in config.stages if stage.prealign is None for group in stage.rates]
    return {
        name: "trained" if alignment_stages(config, name) or touches(f"experts.{name}", rates) else "frozen"
        for name in pool
        if model.experts[name].pretrained is None
    }


def metric_of(records: Sequence[Record], config: SearchConfig) -> Metric:
    pictures = [" ".join(map(str, record.images)) or record.id for record in records]
    return Metric([record.task for record in records], pictures, config.task_weights)


def price(trials: Trials, experts: Experts, per: str) -> float:
    """GFLOPs or visual tokens of one image."""
    costs = trials.cost_of(experts)
    return costs.flops / 1e9 if per == "gflop" else float(costs.visual_tokens)


def best_config(config: SearchConfig, model: ModelConfig, best: Experts) -> str:
    """A train config of the best set: its stages, alignment first where there is any."""
    aligning = [
        stage.model_copy(update={"prealign": stage.prealign.model_copy(update={"experts": aligned})})
        for stage in config.stages
        if stage.prealign is not None and (aligned := kept(stage.prealign.experts or best, best))
    ]
    stages = [*aligning, *subset_stages(config, best)]
    plain = {"model": subset_model(model, best).to_plain(), "stages": stages, "seed": config.seed}
    chosen = TrainConfig.model_validate(plain | {"report_to": config.report_to})
    said = f"# {' + '.join(best)}: found by a {config.method} search; `moe-vision train best.yaml --output run`.\n"
    return said + yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False)


class Looks:
    """The outcome of sets, by a cheap look where the config has one, then by whole trials. answers: [seeds, items] of
    every set that was tried to the end; proxied: [1, items] of every set that the proxy saw."""

    def __init__(
        self, config: SearchConfig, pool: Experts, trials: Trials, records: dict[str, list[Record]], progress: Progress
    ) -> None:
        self.config, self.pool, self.trials, self.records, self.progress = config, pool, trials, records, progress
        self.answers: dict[Experts, torch.Tensor] = {}
        self.proxied: dict[Experts, torch.Tensor] = {}
        self.ridge: RidgeProxy | None = None
        self.rounds = 0

    def evaluate(self, sets: Sequence[Experts]) -> list[Outcome]:
        self.rounds += 1
        self.progress.begin_round(self.rounds, sets)
        outcomes: dict[Experts, Outcome] = {}
        for experts in sets:
            if (why := self.trials.unfit(experts)) is not None:
                outcomes[experts] = Failed(why)
        left = [experts for experts in sets if experts not in outcomes]
        if self.config.proxy is not None:
            left = self.by_proxy(left, outcomes)
        for rung in self.config.halving:
            if len(left) > 1:
                answers = self.trials.answers(left, self.trials.seeds[: rung.seeds], rung.length)
                what = f"{rung.seeds} seeds, {rung.length:.0%} of the steps"
                left = self.better(left, answers, max(1, math.ceil(len(left) * rung.keep)), what, outcomes)
        for experts, answers in self.trials.answers(left, self.trials.seeds).items():
            if isinstance(answers, Failed):
                outcomes[experts] = answers
            else:
                self.answers[experts] = answers
                outcomes[experts] = Scored(self.trials.metric.value(answers))
        self.forget_models()
        return [outcomes[experts] for experts in sets]

    def better(
        self, sets: Sequence[Experts], answers: dict[Experts, Any], keep: int, what: str,
        outcomes: dict[Experts, Outcome],
    ) -> list[Experts]:  # fmt: skip
        """The best `keep` of sets by these answers, in their order; the others' outcomes are written down."""
        outcomes |= {experts: found for experts, found in answers.items() if isinstance(found, Failed)}
        values = {e: self.trials.metric.value(found) for e, found in answers.items() if not isinstance(found, Failed)}
        ranked = sorted(values, key=lambda experts: -values[experts])
        for place, experts in enumerate(ranked[keep:], start=keep + 1):
            outcomes[experts] = Dropped(f"{what}: {values[experts]:.3f}, place {place} of {len(ranked)}")
        return [experts for experts in sets if experts in ranked[:keep]]

    def by_proxy(self, sets: list[Experts], outcomes: dict[Experts, Outcome]) -> list[Experts]:
        """What the proxy leaves of them."""
        assert self.config.proxy is not None
        new = [experts for experts in sets if experts not in self.proxied]
        if new:
            ridge = self.made_ridge()
            self.proxied |= {experts: torch.tensor([ridge.right(experts)], dtype=torch.float32) for experts in new}
        keep = self.config.proxy.keep or len(sets)
        answers = {experts: self.proxied[experts] for experts in sets}
        return self.better(sets, answers, keep, "ridge", outcomes)

    def made_ridge(self) -> RidgeProxy:
        """The proxy over the maps of the whole pool, aligned from the first seed where the schedule aligns."""
        if self.ridge is None:
            assert self.config.proxy is not None
            experts, seed = self.pool, self.trials.seeds[0]
            jobs = {name: job for name in experts if (job := self.trials.alignment(name, seed)) is not None}
            self.trials.do(list(jobs.values()))
            files = {name: str(aligned_file(Path(item.job.folder), name)) for name, item in jobs.items()}
            model, processor = compose(with_pretrained(subset_model(self.trials.model, experts), files))
            store = self.config.feature_cache
            cache = FeatureCache()
            if store is not None:
                cache = FeatureStore(Path(store.folder or self.trials.output / "features"), store.gigabytes)
            paths = pictures_of([*self.records["train"], *self.records["validation"]])
            device = accelerator()
            cast(Any, model).to(device)
            maps = expert_maps(model, processor, paths, experts, self.config.stages[-1], cache)
            self.ridge = RidgeProxy(
                maps, self.records["train"], self.records["validation"], self.config.proxy, self.config.seed,
                partial(processor.tokenizer.encode, add_special_tokens=False), device,
            )  # fmt: skip
        return self.ridge

    def forget_models(self) -> None:
        """Remove trained models of sets that are not the best so far; what is needed again is trained again."""
        best = max(self.answers, key=lambda experts: self.trials.metric.value(self.answers[experts]), default=())
        for experts in self.answers:
            if experts != best:
                for seed in self.trials.seeds:
                    shutil.rmtree(Path(self.trials.trial(experts, seed).job.folder) / "model", ignore_errors=True)
