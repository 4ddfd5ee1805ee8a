"""What a schedule will do, before any weight loads: runs, what they train, steps, tokens and an estimate of FLOPs."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_vision.data.chat import tokenise
from moe_vision.data.config import DataConfig, PartConfig
from moe_vision.data.faults import RecordFault, faults_of
from moe_vision.data.files import read_values
from moe_vision.data.records import Record, parse_record, read_records
from moe_vision.data.synthetic import write_split
from moe_vision.experts.weights import located
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.compose import load_tokenizer, make_processor, marker_ids, question_turns
from moe_vision.modeling.cost import SLICED_SIZE, TEXT_TOKENS, cost
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.slicing import Size
from moe_vision.training.groups import learning_rates, parameter_groups, touches
from moe_vision.training.prealign import alone
from moe_vision.training.schedule import Run, TrainConfig
from moe_vision.training.turns import Turns, steps_per_epoch, total_steps, turns_of

SAMPLED = 32
"""Records that are tokenised for the average length of all."""


@dataclass(frozen=True)
class PlannedRun:
    """One run. trains: parameters and learning rate by group; turns: groups and steps, where they alternate; tokens and
    flops: of the whole run, `flops` an estimate for pictures of one size; records, steps, tokens and flops are null
    where the data is not at hand."""

    name: str
    trains: dict[str, tuple[int, float]]
    frozen: dict[str, int]
    turns: list[tuple[list[str], int]]
    data: str | None
    batch: int
    records: int | None
    steps: int | None
    tokens: int | None
    flops: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_schedule(config: TrainConfig, composition: ModelConfig, size: Size = SLICED_SIZE) -> list[PlannedRun]:
    """Every run of a schedule. size: (height, width) of a picture, for FLOPs, where the model slices.

    Raises ValueError for an expert or a group that the model does not have.
    """
    return [plan_run(run, composition, config.seed, size) for run in config.runs(list(composition.experts))]


def plan_run(run: Run, composition: ModelConfig, seed: int, size: Size) -> PlannedRun:
    """One run on its own model."""
    stage = run.stage
    model_config = composition if run.expert is None else alone(composition, run.expert)
    with torch.device("meta"):
        skeleton = MoeVisionForConditionalGeneration(model_config.hf_config())
    rates = learning_rates(skeleton, stage.rates)
    counts = {group: sum(p.numel() for _, p in members) for group, members in parameter_groups(skeleton, rates).items()}
    sample, records = sampled(stage.data, seed) if stage.data is not None else ([], None)
    length = mean_length(sample, model_config) if sample else None
    steps = stage.max_steps if records is None else total_steps(records, stage)
    epoch = steps_per_epoch(records, stage) if records is not None else None
    batch = stage.batch_size * stage.gradient_accumulation
    seen = None if steps is None else steps * batch
    if seen is not None and records is not None and stage.epochs is not None:
        seen = min(seen, round(stage.epochs * records))  # the last batch of an epoch may be short
    turns = turns_of(stage, skeleton, epoch or 1)
    flops = None
    if seen is not None and length is not None:
        images = sum(len(record.images) for record in sample) / len(sample)
        once = stage.cache_features and model_config.slicing.one_view and records is not None
        distinct = min(seen, records) if once and records is not None else seen
        flops = run_flops(model_config, turns, seen, distinct, length, images, size)
    known = stage.alternate is None or epoch is not None or all(turn.steps for turn in stage.alternate)
    return PlannedRun(
        run.name,
        {group: (counts[group], rates[group]) for group in rates},
        {group: count for group, count in counts.items() if count and group not in rates},
        [(sorted(groups), n) for groups, n in zip(turns.groups, turns.steps, strict=True)]
        if turns.alternate and known
        else [],
        None if stage.data is None else stage.data.title,
        batch, records, steps,
        None if seen is None or length is None else round(seen * length),
        flops,
    )  # fmt: skip


def sampled(data: DataConfig, seed: int) -> tuple[list[Record], int | None]:
    """Some records, and how many an epoch sees; none of a part that is not at hand, and null where the config does not
    say how many that holds."""
    records: list[Record] = []
    sizes: list[int] = []
    for part in data.parts:
        found, size = sampled_part(part, seed)
        records += found
        size = part.records if size is None else size
        if size is None:
            return records, None
        sizes.append(size if part.weight is not None else round(size * (part.epochs or 1)))
    return records, sum(sizes)


def sampled_part(part: PartConfig, seed: int) -> tuple[list[Record], int | None]:
    """Some records of one source, and how many it holds."""
    if part.synthetic is not None:
        assert part.scenes is not None  # SourceConfig refused it
        drawn = min(part.scenes, SAMPLED)
        with tempfile.TemporaryDirectory() as folder:
            records, _ = read_records(write_split(Path(folder), part.split, drawn, seed)[part.synthetic], Path(folder))
        return records, len(records) * part.scenes // drawn
    if part.path is None or not Path(part.path).is_file():
        return [], None
    path = Path(part.path)
    root = Path(part.image_root) if part.image_root is not None else path.parent
    values = read_values(path)
    records = []
    for number, value in enumerate(values[:: max(1, len(values) // SAMPLED)][:SAMPLED]):
        try:
            records.append(parse_record(value, number, root))
        except RecordFault:
            continue  # training tells of it, by the setting for faults; an estimate goes by the others
    return records, len(values)


def mean_length(records: Sequence[Record], config: ModelConfig) -> float | None:
    """Tokens of a record, visual ones included; null where the tokenizer or the pictures are not at hand."""
    source = config.language_model.tokenizer or config.language_model.pretrained
    if source is None or not Path(located(source)).exists():  # one on the Hub is not fetched for an estimate
        return None
    if not config.slicing.one_view and not all(os.path.isfile(image) for record in records for image in record.images):
        return None
    tokenizer = load_tokenizer(located(source), config.language_model.image_token)
    image_token: Any = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    hf_config = config.hf_config(image_token, marker_ids(config, tokenizer), question_turns(config, tokenizer))
    processor = make_processor(config, hf_config, tokenizer)
    lengths = []
    for record in records:
        try:
            with faults_of(record.id):
                lengths.append(len(tokenise(record, processor).input_ids))
        except RecordFault:
            continue  # as in sampled_part
    return sum(lengths) / len(lengths) if lengths else None


def run_flops(
    config: ModelConfig, turns: Turns, seen: int, distinct: int, length: float, images: float, size: Size
) -> float:
    """FLOPs of a run over `seen` records of `length` tokens and so many images on average.

    distinct: records whose images a frozen expert sees, once each where its maps are kept. A part that trains takes two
    passes more than the forward one, for the gradients of its weights and its inputs; what a gradient goes through on
    its way to a part before it takes one more.
    """
    costs = cost(config, size)
    parts = {part.part: part.flops for part in costs.parts}
    parts |= {f"adapters.{name}": parts.pop(name) for name in ("selector", "markers") if name in parts}
    language = parts.pop("language_model") / (costs.visual_tokens + TEXT_TOKENS) * length
    total = 0.0
    for groups, steps in zip(turns.groups, turns.steps, strict=True):
        share = seen * steps / sum(turns.steps)
        experts = touches("experts", groups)
        for part, flops in parts.items():
            trains = touches(part, groups)
            if part.startswith("experts."):
                shown = share if touches(part, turns.all()) else distinct * steps / sum(turns.steps)
                total += flops * images * shown * (3 if trains else 1)
            else:
                before = experts or (not part.startswith("mixers.") and touches("mixers", groups))
                total += flops * images * share * (1 + before + trains)
        before = experts or touches("mixers", groups) or touches("adapters", groups)
        total += language * share * (1 + before + touches("language_model", groups))
    return total
