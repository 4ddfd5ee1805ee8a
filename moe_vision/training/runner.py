"""Run a schedule in an output folder, from the beginning or from where a killed one stood.

OUTPUT/config.yaml  the resolved config            OUTPUT/metrics.jsonl  every log
OUTPUT/model/       the finished model             OUTPUT/runs/01-…/     checkpoints, and the run's own `done/` model
OUTPUT/experts/     those aligned by themselves    OUTPUT/data/          pictures that were drawn, or lay in tables
OUTPUT/curves/      a picture of each run's curves OUTPUT/environment.json  versions, commit and device of every start
OUTPUT/data_report.json  what was read, and every record that was skipped
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from rich.console import Console
from transformers import set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from moe_vision.data.collate import Collator, ConversationDataset
from moe_vision.data.samples import Samples, Source, samples_of
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.compose import compile_experts, compose, load, save
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.terminal import say
from moe_vision.training.callbacks import FiniteLoss, LossFalls, MetricsFile, ScheduleProgress, ScheduleSteps
from moe_vision.training.checkpoints import (
    DIGESTS,
    damage,
    discard,
    remove_leftovers,
    set_aside,
    sync,
    sync_tree,
    write_atomically,
    write_digests,
    writing,
)
from moe_vision.training.checks import check_groups, check_only, stage_data
from moe_vision.training.curves import write_curves
from moe_vision.training.data import read_stages, records_in, report_of, settle, skipped_lines, staged, unknown_lines
from moe_vision.training.distributed import main_console, on_main, processes, shard_sensibly, whole_weights
from moe_vision.training.features import FeatureCache, stage_inputs
from moe_vision.training.groups import freeze_all_but, learning_rates
from moe_vision.training.identity import data_digests, deciding
from moe_vision.training.interrupts import Preemption
from moe_vision.training.loading import model_config
from moe_vision.training.lora import add_lora, merge, merged
from moe_vision.training.output import (
    DATA_DIGESTS,
    check_data,
    check_keys,
    check_output,
    held,
    last_checkpoint,
    open_output,
)
from moe_vision.training.prealign import aligned_file, alone, load_aligned, save_expert
from moe_vision.training.provenance import record_environment
from moe_vision.training.recompute import checkpointed_groups, recompute_in
from moe_vision.training.reporting import check_reporters
from moe_vision.training.schedule import Run, TrainConfig
from moe_vision.training.trainer import GroupTrainer, OneDevice, trained_and_frozen
from moe_vision.training.turns import steps_per_epoch, total_steps, turns_of
from moe_vision.training.workers import worker_faults


def train(
    config: TrainConfig,
    output: Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    cache: FeatureCache | None = None,
    only: Sequence[str] = (),
) -> Path:
    """Train a schedule and return the folder of the finished model; the same call after a kill goes on.

    only: names of runs that each align an expert, to do these and no others: the output is returned then, if others
    are left. cache: shares what frozen experts made of pictures with other runs over the same ones. Raises OutputError,
    ConfigError, DataError or WeightsError before any step is taken.
    """
    console = main_console(console)
    composition = model_config(config)
    resolved = resolved_text(config, composition)
    with Preemption(), ExitStack() as stack:

        def hold() -> None:
            check_output(output, resolved, overwrite=overwrite)
            stack.enter_context(held(output))

        on_main(hold)
        if on_main(lambda: (output / "model").is_dir() and not overwrite):
            say(console, f"{output} is finished: its model is in {output / 'model'}")
            return output / "model"
        return train_held(config, composition, output, console, cache, only, overwrite=overwrite)


def train_held(
    config: TrainConfig, composition: ModelConfig, output: Path, console: Console, cache: FeatureCache | None,
    only: Sequence[str], *, overwrite: bool,
) -> Path:  # fmt: skip
    """As `train`, in an output that nobody else writes."""
    check_reporters(config.report_to)
    if processes().num_processes == 1 and (here := torch.cuda.device_count()) > 1:
        say(console, f"one of {here} GPUs trains: `accelerate launch` takes all (docs/training.md)")
    runs = config.runs(list(composition.experts))
    check_only(only, runs)
    for expert in dict.fromkeys(run.expert for run in runs):
        check_groups([run for run in runs if run.expert == expert], composition)
    set_seed(config.seed)
    model, processor, samples = prepare(config, composition, runs, output, console, overwrite=overwrite)
    digest = on_main(lambda: digest_of(output))
    finished = on_main(lambda: finished_runs(output, runs, console))
    steps = ScheduleSteps(
        {run.name: total_steps(len(samples[run.name].items), run.stage, processes().num_processes) for run in runs
         if run.name not in finished and (not only or run.name in only)}
    )  # fmt: skip
    stood = True  # whether `model` is what the runs so far have made
    for number, run in enumerate(runs, start=1):
        if run.name in finished:
            on_main(partial(remove_checkpoints, output, run))  # a kill may have come before this
            stood = False
            continue
        if only and run.name not in only:
            continue
        own = samples[run.name]
        progress = ScheduleProgress(console, run.name, f"[{number}/{len(runs)}]", steps)
        if run.expert is None:
            if not stood:
                model = stand(output, runs[: number - 1], composition, model, digest)
            weights = run_and_show(run, model, processor, own, output, config, number, progress, cache)
            on_main(partial(save_done, model, processor, output / "runs" / run.name, weights))
            stood = weights is None  # else this model has fallen into shards
        else:
            set_seed(config.seed)
            single, its_processor = compose(alone(composition, run.expert))
            own = own.tokenised_by(its_processor)
            weights = run_and_show(run, single, its_processor, own, output, config, number, progress, cache)
            on_main(partial(save_expert, single, run.expert, aligned_file(output, run.expert), digest, weights))
            stood = False
        on_main(partial(remove_checkpoints, output, run))
    if missing := on_main(lambda: [run.name for run in runs if not is_finished(output, run)]):
        say(console, f"{', '.join(only)}: finished; still to do: {', '.join(missing)}")
        return output
    if runs[-1].expert is not None:  # it left an expert behind, and no whole model
        model = stand(output, runs, composition, model, digest)
    on_main(partial(finish_run, model, processor, output, runs))
    return output / "model"


def finish_run(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, output: Path, runs: Sequence[Run]
) -> None:
    """Make the last run's model the finished one, or write it where the last run aligned an expert; take those of the
    other runs away."""
    if runs[-1].expert is None:
        with writing("the model", output / "model"):
            (output / "runs" / runs[-1].name / "done").replace(output / "model")
            sync(output)
    else:
        save_synced(model, processor, output / "model")
    for run in runs:
        for name in ("done", ".done.damaged"):
            shutil.rmtree(output / "runs" / run.name / name, ignore_errors=True)
        (output / "runs" / run.name / DIGESTS).unlink(missing_ok=True)


def resolved_text(config: TrainConfig, composition: ModelConfig) -> str:
    """A train config with its model's content, as YAML."""
    return yaml.safe_dump({**config.model_dump(mode="json"), "model": composition.to_plain()}, sort_keys=False)


def digest_of(output: Path) -> str:
    """Names what decides the result of an opened output: its config and its data."""
    values = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    decides = json.dumps(deciding(values), sort_keys=True) + (output / DATA_DIGESTS).read_text(encoding="utf-8")
    return hashlib.sha256(decides.encode()).hexdigest()


def prepare(
    config: TrainConfig, composition: ModelConfig, runs: Sequence[Run], output: Path, console: Console, *,
    overwrite: bool,
) -> tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor, dict[str, Samples]]:  # fmt: skip
    """The model, its processor and what each run learns from, in an opened output. Data is read before weights load,
    and an old run goes only when all else is in order. With several processes the main one writes, and all read what it
    has written.
    """
    data = {run.name: (stage_data(run.stage), run.stage.num_workers) for run in runs}
    resolved = resolved_text(config, composition)
    read: dict[str, list[Source]] = {}
    with ExitStack() as stack:

        def read_all() -> None:
            folders.append(stack.enter_context(staged(output, overwrite=overwrite)))
            read.update(read_stages(data, folders[0], config.seed))
            records = {f"stage '{run.stage.name}'": records_in(read[run.name]) for run in runs}
            digests.update(data_digests(records))
            if not overwrite:
                check_data(output, digests)

        def open_all() -> None:
            samples.update({name: tokenised(sources) for name, sources in read.items()})
            open_output(output, resolved, overwrite=overwrite)
            write_atomically(output / DATA_DIGESTS, json.dumps(digests, indent=1))
            target = settle(folders[0], output)
            samples.update({name: own.moved(folders[0], target) for name, own in samples.items()})
            record_environment(output / "environment.json")
            write_atomically(output / "data_report.json", report_of(samples))
            for line in (*skipped_lines(samples, output / "data_report.json"), *unknown_lines(samples, processor)):
                say(console, line)

        def tokenised(sources: Sequence[Source]) -> Samples:
            context = getattr(model.config.text_config, "max_position_embeddings", None)
            return samples_of(sources, processor, context, config.seed)

        folders: list[Path] = []
        digests: dict[str, dict[str, Any]] = {}
        samples: dict[str, Samples] = {}
        on_main(read_all)
        model, processor = compose(composition)
        on_main(open_all)
    if not samples:  # another process than the main one
        read = read_stages(data, output.resolve() / "data", config.seed)
        samples = {name: tokenised(sources) for name, sources in read.items()}
    return model, processor, samples


def remove_checkpoints(output: Path, run: Run) -> None:
    """Those of a finished run, and what a kill has left of them."""
    folder = output / "runs" / run.name
    for checkpoint in (*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*.damaged")):
        discard(checkpoint)
    remove_leftovers(folder)


def save_synced(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """`save`, and nothing that it replaces may go before it is on the disk. Raises WriteError."""
    with writing("the model", folder):
        save(model, processor, folder, weights)
        sync_tree(folder)


def save_done(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, folder: Path,
    weights: dict[str, torch.Tensor] | None,
) -> None:  # fmt: skip
    """Write what a run has made to its folder's `done`, and the checksums of that beside it. Raises WriteError."""
    (folder / DIGESTS).unlink(missing_ok=True)
    save_synced(model, processor, folder / "done", weights)
    write_digests(folder / "done", folder / DIGESTS)


def finished_runs(output: Path, runs: Sequence[Run], console: Console) -> set[str]:
    """Names of the runs that are done. The last model that is there is compared with its checksums: if it is damaged it
    is set aside, and its run is done again."""
    done = [run for run in runs if is_finished(output, run)]
    for run in reversed([run for run in done if run.expert is None]):
        folder = output / "runs" / run.name
        fault = damage(folder / "done", folder / DIGESTS) if (folder / DIGESTS).is_file() else None
        if fault is None:
            break
        aside = set_aside(folder / "done")
        say(console, f"'{folder / 'done'}' cannot be used: {fault}. It is now '{aside.name}'; its run begins anew")
        done.remove(run)
    return {run.name for run in done}


def is_finished(output: Path, run: Run) -> bool:
    """Whether what a run makes is there."""
    if run.expert is not None:
        return aligned_file(output, run.expert).is_file()
    return (output / "runs" / run.name / "done").is_dir()


def stand(
    output: Path, done: Sequence[Run], composition: ModelConfig, model: MoeVisionForConditionalGeneration, digest: str
) -> MoeVisionForConditionalGeneration:
    """The model as these finished runs left it: of the last that trained it whole, or with the experts they aligned."""
    whole = [run for run in done if run.expert is None]
    if whole:
        model, _ = load(output / "runs" / whole[-1].name / "done")
        compile_experts(model, composition)
        return model
    for run in done:
        if run.expert is not None:
            load_aligned(model, run.expert, aligned_file(output, run.expert), digest)
    return model


def run_and_show(
    run: Run, model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, samples: Samples,
    output: Path, config: TrainConfig, number: int, progress: ScheduleProgress, cache: FeatureCache | None,
) -> dict[str, torch.Tensor] | None:  # fmt: skip
    """Train one run, with a line before, a bar while it lasts, and curves after it. Where that ends in shards, returns
    the gathered weights, which are whole in the main process. Raises Preempted on SIGTERM."""
    rates = learning_rates(model, run.stage.rates)
    freeze_all_but(model, rates)
    tuner = add_lora(model, run.stage.lora, config.seed + number)
    trains, frozen = trained_and_frozen(model, rates)
    shown = ", ".join(f"{group} ({count:,} parameters, rate {rates[group]:g})" for group, count in trains.items())
    how = "trains in turn" if run.stage.alternate is not None else "trains"
    still = ", ".join(frozen) or "nothing"
    say(progress.console, f"{progress.position} {run.name}: {how} {shown}; frozen: {still}")
    try:
        with Preemption() as preemption:
            weights = run_stage(
                run, model, processor, samples, rates, output, config, number, progress, preemption, cache
            )
    finally:
        progress.close()
    on_main(partial(write_curves, output / "metrics.jsonl", run.name, output / "curves"))
    if weights is not None and run.stage.lora is not None:
        return merged(weights, run.stage.lora)
    if tuner is not None:
        merge(model, tuner)
    return weights


def run_stage(
    run: Run, model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, samples: Samples,
    rates: dict[str, float], output: Path, config: TrainConfig, number: int, progress: ScheduleProgress,
    preemption: Preemption, cache: FeatureCache | None,
) -> dict[str, torch.Tensor] | None:  # fmt: skip
    """Train what has gradients in place, from the run's last checkpoint if there is one."""
    stage, folder, seed = run.stage, output / "runs" / run.name, config.seed + number
    on_main(partial(remove_leftovers, folder))
    recompute_in(model, checkpointed_groups(model, stage.gradient_checkpointing, rates))
    turns = turns_of(stage, model, steps_per_epoch(len(samples.items), stage, processes().num_processes))
    arguments = OneDevice(
        output_dir=str(folder),
        num_train_epochs=stage.epochs or 1.0,
        max_steps=stage.max_steps or -1,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        warmup_steps=stage.warmup_ratio,
        lr_scheduler_type="constant_with_warmup" if stage.scheduler == "constant" else stage.scheduler,
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),  # else Trainer refuses bf16 there
        save_steps=stage.save_steps,
        save_total_limit=2,
        logging_steps=stage.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=stage.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=turns.alternate,  # those whose turn it is not
        disable_tqdm=True,
        run_name=run.name,
        report_to=config.report_to or "none",
        train_sampling_strategy="group_by_length" if stage.group_by_length else "random",
    )
    if is_deepspeed_zero3_enabled() and not all(record.images for record in samples.records):
        stage = stage.model_copy(update={"cache_features": False})  # sharded experts run in all processes or in none
    metrics = output / "metrics.jsonl"
    known = stage_inputs(cast(Any, model).to(arguments.device), processor, samples.records, stage, rates, cache)
    trainer = GroupTrainer(
        model=model,
        args=arguments,
        rates=rates,
        turns=turns,
        weight_decay=stage.weight_decay,
        train_dataset=ConversationDataset(samples.records, processor, known.item if known else None, samples.texts),
        data_collator=Collator(processor.tokenizer.pad_token_id),
        callbacks=[
            progress,
            MetricsFile(metrics, run.name),
            FiniteLoss(),
            LossFalls(progress.console, metrics, run.name),
            preemption,
        ],
    )
    quiet = {"PrinterCallback", "ProgressCallback"}
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ in quiet]:
        trainer.remove_callback(callback)
    shard_sensibly(trainer, model, rates)
    checkpoint = on_main(lambda: last_checkpoint(folder, processes().num_processes, partial(say, progress.console)))
    if checkpoint is not None:
        check_keys(Path(checkpoint), model)
    with worker_faults(run.name, stage.num_workers):
        trainer.train(resume_from_checkpoint=checkpoint)
    model.eval()
    return whole_weights(trainer)
