"""Sets of experts, tried: what each costs, its jobs, and what came of them, by way of the journal.

A set's trial is one job a seed. Where the schedule aligns experts, that is a job for each expert and seed, which all
sets share.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_vision.config import ConfigError
from moe_vision.modeling.cost import CostTable, cost
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.search.config import SearchConfig
from moe_vision.search.executors import Executor
from moe_vision.search.jobs import Job, Kind, Result
from moe_vision.search.journal import Journal, Row
from moe_vision.search.methods import Experts, Failed
from moe_vision.search.progress import Progress
from moe_vision.search.statistics import Metric
from moe_vision.search.subsets import alignment_stages, subset_model, subset_stages, with_pretrained
from moe_vision.training.checks import check_groups
from moe_vision.training.data import on_disk
from moe_vision.training.identity import FREE
from moe_vision.training.prealign import aligned_file, alone
from moe_vision.training.schedule import DataConfig, StageConfig, TrainConfig

FORMAT = 1
"""Of what a job's hash is over; another one makes every trial new."""


FREE_DEFAULTS = {name: StageConfig.model_fields[name].default for name in FREE}
"""What stands in a job's hash for settings of a stage that cannot change its result."""


@dataclass(frozen=True)
class Planned:
    """A job with what the journal keeps of it. config: all that its key is the hash of."""

    job: Job
    config: str
    length: float = 1.0


class Trials:
    """Tries sets of the pool in an output folder. asked: the validation items' metric."""

    def __init__(
        self, config: SearchConfig, model: ModelConfig, output: Path, journal: Journal, executor: Executor,
        metric: Metric, progress: Progress,
    ) -> None:  # fmt: skip
        self.config, self.model, self.output = config, model, output.resolve()
        self.journal, self.executor, self.metric, self.progress = journal, executor, metric, progress
        self.costs: dict[Experts, CostTable] = {}
        self.seeds = [config.seed + number for number in range(config.seeds)]

    def cost_of(self, experts: Experts) -> CostTable:
        """Of a set that can be composed. Raises ConfigError."""
        if experts not in self.costs:
            self.costs[experts] = cost(subset_model(self.model, experts))
        return self.costs[experts]

    def unfit(self, experts: Experts) -> str | None:
        """Why a set cannot be composed or trained, before any work is lost."""
        try:
            self.cost_of(experts)
            stages = subset_stages(self.config, experts)
            runs = TrainConfig(model={}, stages=stages).runs([])
            check_groups(runs, subset_model(self.model, experts))
        except ConfigError as error:
            return "; ".join(f"{problem.path}: {problem.cause}; {problem.cure}" for problem in error.problems)
        except ValueError as error:
            return str(error)
        return None

    # What is to be done

    def alignment(self, expert: str, seed: int) -> Planned | None:
        """The job that aligns an expert, if the schedule has any."""
        stages = alignment_stages(self.config, expert)
        if not stages:
            return None
        config = TrainConfig(model=alone(self.model, expert).to_plain(), stages=stages, seed=seed)
        return self.planned("align", (expert,), seed, config, "aligned", {})

    def trial(self, experts: Experts, seed: int, length: float = 1.0) -> Planned:
        """The job that trains a set and asks it the validation items."""
        model = subset_model(self.model, experts)
        aligned = {name: planned.job for name in experts if (planned := self.alignment(name, seed)) is not None}
        files = {name: str(aligned_file(Path(job.folder), name)) for name, job in aligned.items()}
        stages = subset_stages(self.config, experts, length)
        config = TrainConfig(model=with_pretrained(model, files).to_plain(), stages=stages, seed=seed)
        names = {"model": model.to_plain(), "aligned": {name: job.key for name, job in aligned.items()}}
        return self.planned("trial", experts, seed, config, "trials", names, self.config.validation, length)

    def test(self, experts: Experts, seed: int) -> Planned:
        """The job that asks a set's trained model the test items."""
        return self.question("test", experts, seed, self.config.test)

    def blind(self, experts: Experts, seed: int, data: DataConfig | None) -> Planned:
        """The job that asks a set's trained model items without their images."""
        return self.question("blind", experts, seed, data)

    def question(self, kind: Kind, experts: Experts, seed: int, data: DataConfig | None) -> Planned:
        """A job that asks the model of a trial."""
        trial = self.trial(experts, seed)
        config = TrainConfig.model_validate(trial.job.schedule)
        planned = self.planned(kind, experts, seed, config, "trials", {"trial": trial.job.key}, data)
        return replace(planned, job=replace(planned.job, folder=trial.job.folder))

    def planned(
        self, kind: Kind, experts: Experts, seed: int, schedule: TrainConfig, folder: str, named: dict[str, Any],
        asked: DataConfig | None = None, length: float = 1.0,
    ) -> Planned:  # fmt: skip
        """A job under the hash of all that decides its result. named: what stands for paths that lie in the output."""
        stages = [stage.model_copy(update=FREE_DEFAULTS) for stage in schedule.stages]
        hashed = schedule.model_copy(update={"stages": stages})
        decides = {
            "format": FORMAT, "kind": kind, "schedule": hashed.model_dump(mode="json") | named,
            "data_seed": self.config.seed, "asked": asked and asked.model_dump(mode="json"),
            "max_new_tokens": self.config.max_new_tokens,
            **({"processes": self.config.processes_per_trial} if self.config.processes_per_trial > 1 else {}),
        }  # fmt: skip
        text = json.dumps(decides, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        data, store = self.output / "data", self.config.feature_cache
        stages = [self.stage_on_disk(stage, data) for stage in schedule.stages]
        job = Job(
            key, kind, experts, seed, schedule.model_copy(update={"stages": stages}).model_dump(mode="json"),
            str(self.output / folder / key[:16]), self.config.seed,
            None if asked is None else on_disk(asked, data, self.config.seed).model_dump(mode="json"),
            self.config.max_new_tokens, self.config.eval_batch_size,
            None if store is None else (store.folder or str(self.output / "features"), store.gigabytes),
            self.config.processes_per_trial,
        )  # fmt: skip
        return Planned(job, text, length)

    def stage_on_disk(self, stage: StageConfig, folder: Path) -> StageConfig:
        assert stage.data is not None  # the search refused it
        return stage.model_copy(update={"data": on_disk(stage.data, folder, self.config.seed)})

    # What came of it

    def do(self, planned: Sequence[Planned]) -> dict[str, Row]:
        """Do what the journal does not know the end of; returns how each ended, by key."""
        left = [item for item in planned if self.journal.ended(item.job.key) is None]
        by_key = {item.job.key: item for item in left}

        def begun(job: Job) -> None:
            item = by_key[job.key]
            self.journal.begin(job.key, job.kind, job.experts, job.seed, item.length, item.config)

        self.progress.expect(len(left))
        for job, result in self.executor.run([item.job for item in by_key.values()], begun):
            if isinstance(result, Result):
                value = self.value_of(job, result.right)
                self.journal.finish(job.key, result.right, value, result.seconds, result.host)
                self.progress.ended(job, value, sum(result.seconds.values()))
            else:
                self.journal.fail(job.key, result)
                self.progress.failed(job, result)
        rows = {item.job.key: self.journal.ended(item.job.key) for item in planned}
        return {key: row for key, row in rows.items() if row is not None}

    def value_of(self, job: Job, right: list[bool]) -> float | None:
        return self.metric.value(torch.tensor([right])) if job.kind == "trial" else None

    def answers(self, sets: Sequence[Experts], seeds: Sequence[int], length: float = 1.0) -> dict[Experts, Any]:
        """Of each set that fits, the answers [seeds, items] of its trials, or Failed. All experts are aligned first."""
        needed = [
            planned
            for experts in sets
            for seed in seeds
            for name in experts
            if (planned := self.alignment(name, seed)) is not None
        ]
        aligned = self.do(list({item.job.key: item for item in needed}.values()))
        lost = {item.job.experts[0]: row.error for item in needed
                if (row := aligned[item.job.key]).status == "failed"}  # fmt: skip
        found: dict[Experts, Any] = {
            experts: Failed(f"aligning {failed[0]}: {lost[failed[0]]}")
            for experts in sets
            if (failed := [name for name in experts if name in lost])
        }
        todo = {e: [self.trial(e, seed, length) for seed in seeds] for e in sets if e not in found}
        rows = self.do([item for of_seed in zip(*todo.values(), strict=True) for item in of_seed])
        for experts, items in todo.items():
            own = [rows[item.job.key] for item in items]
            errors = [row.error for row in own if row.error is not None]
            found[experts] = (
                Failed(errors[0]) if errors else torch.tensor([row.answers() for row in own], dtype=torch.float32)
            )
        return found
