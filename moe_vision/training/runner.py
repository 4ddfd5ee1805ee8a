"""Run a schedule in an output folder, from the beginning or from where a killed one stood.

OUTPUT/config.yaml  the resolved config            OUTPUT/metrics.jsonl  every log
OUTPUT/state.json   runs that are finished         OUTPUT/runs/01-…/     checkpoints, and the run's own `done/` model
OUTPUT/model/       the finished model, a Hugging Face folder
OUTPUT/data/        pictures that the config has drawn
"""

import json
import os
import shutil
from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from moe_vision.config import ConfigError, Problem, apply_override, load_config, read_yaml, validate
from moe_vision.data.collate import Collator, ConversationDataset
from moe_vision.data.records import Record
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.compose import compile_experts, compose, load, save
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.training.callbacks import FiniteLoss, MetricsFile, ScheduleProgress
from moe_vision.training.data import on_disk, records_of
from moe_vision.training.distributed import main_console, on_main, shard_sensibly, whole_weights
from moe_vision.training.features import FeatureCache, stage_inputs
from moe_vision.training.groups import freeze_all_but, learning_rates
from moe_vision.training.lora import add_lora, check_lora, merge, merged
from moe_vision.training.schedule import DataConfig, StageConfig, TrainConfig, resolve_paths
from moe_vision.training.trainer import GroupTrainer, trained_and_frozen

OWN_NAMES = frozenset({"config.yaml", "state.json", "metrics.jsonl", "runs", "model", "data"})
"""What an output folder holds, besides `.…partial` files; one that holds more is never overwritten."""


class OutputError(ValueError):
    """An output folder that cannot be used."""


def model_config(config: TrainConfig) -> ModelConfig:
    """The model of a train config, from its file or its content. Raises ConfigError."""
    if isinstance(config.model, str):
        return load_config(ModelConfig, config.model)
    return validate(ModelConfig, config.model, source="model")


def train(
    config: TrainConfig,
    output: Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    cache: FeatureCache | None = None,
) -> Path:
    """Train a schedule and return the folder of the finished model; the same call after a kill goes on.

    cache: shares what frozen experts made of pictures with other runs over the same ones. Raises OutputError,
    ConfigError, DataError or WeightsError before any step is taken.
    """
    console = main_console(console)
    composition = model_config(config)
    resolved = yaml.safe_dump({**config.model_dump(mode="json"), "model": composition.to_plain()}, sort_keys=False)

    def is_finished() -> bool:
        check_output(output, resolved, overwrite=overwrite)
        return (output / "model").is_dir() and not overwrite

    if on_main(is_finished):
        console.print(f"{output} is finished: its model is in {output / 'model'}", highlight=False)
        return output / "model"
    data = {name: stage_data(stage) for name, stage in config.runs()}
    own = {n: records_of(d, output / "data", config.seed) for n, d in data.items() if d.synthetic is None}
    set_seed(config.seed)
    model, processor = compose(composition)
    rates = {name: learning_rates(model, stage.train) for name, stage in config.runs()}
    for _, stage in config.runs():
        check_lora(model, stage)
    # An old run goes only now that all else is in order.
    finished = on_main(lambda: open_output(output, resolved, overwrite=overwrite))
    on_main(lambda: [on_disk(d, output / "data", config.seed) for d in data.values()])
    drawn = {n: records_of(d, output / "data", config.seed) for n, d in data.items() if d.synthetic is not None}
    records = own | drawn
    if finished:
        model, _ = load(output / "runs" / finished[-1] / "done")
        compile_experts(model, composition)
    for number, (name, stage) in enumerate(config.runs(), start=1):
        if name in finished:
            continue
        position = f"[{number}/{len(config.stages)}]"
        freeze_all_but(model, rates[name])
        tuner = add_lora(model, stage.lora, config.seed + number)
        trains, frozen = trained_and_frozen(model, rates[name])
        shown = ", ".join(
            f"{group} ({count:,} parameters, rate {rates[name][group]:g})" for group, count in trains.items()
        )
        console.print(f"{position} {name}: trains {shown}; frozen: {', '.join(frozen) or 'nothing'}", highlight=False)
        progress = ScheduleProgress(console, name, position)
        try:
            weights = run_stage(
                stage,
                name,
                model,
                processor,
                records[name],
                rates[name],
                output,
                config.seed + number,
                progress,
                cache,
            )
        finally:
            progress.close()
        if weights is not None and stage.lora is not None:
            weights = merged(weights, stage.lora)
        elif tuner is not None:
            merge(model, tuner)
        finished.append(name)
        on_main(partial(finish_stage, model, processor, output, finished, weights))
        if weights is not None:  # this model has fallen into shards
            model, _ = load(output / "runs" / name / "done")
            compile_experts(model, composition)
    on_main(partial(finish_run, model, processor, output, config))
    return output / "model"


def finish_stage(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, output: Path, finished: list[str],
    weights: dict[str, torch.Tensor] | None,
) -> None:  # fmt: skip
    """Keep the model of the last finished run, or the `weights` that were gathered for it, and drop its checkpoints."""
    folder = output / "runs" / finished[-1]
    save(model, processor, folder / "done", weights)
    write_atomically(output / "state.json", json.dumps({"finished": finished}))
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def finish_run(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, output: Path, config: TrainConfig
) -> None:
    save(model, processor, output / "model")
    for name, _ in config.runs():
        shutil.rmtree(output / "runs" / name / "done", ignore_errors=True)


def stage_data(stage: StageConfig) -> DataConfig:
    """The data of a stage. Raises ConfigError where it has none."""
    if stage.data is None:
        cure = "give --data FILE, or write data: {path: …} into the stage"
        raise ConfigError("train config", [Problem(f"stages.{stage.name}.data", None, "is missing", cure)])
    return stage.data


def run_stage(
    stage: StageConfig, name: str, model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor,
    records: Sequence[Record], rates: dict[str, float], output: Path, seed: int, progress: ScheduleProgress,
    cache: FeatureCache | None = None,
) -> dict[str, torch.Tensor] | None:  # fmt: skip
    """Train what has gradients in place, from the stage's last checkpoint if there is one. Where that ends in shards,
    returns the gathered weights, which are whole in the main process."""
    folder = output / "runs" / name
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=stage.epochs or 1.0,
        max_steps=stage.max_steps or -1,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        warmup_steps=stage.warmup_ratio,
        lr_scheduler_type="constant_with_warmup" if stage.scheduler == "constant" else stage.scheduler,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),  # else Trainer refuses bf16 there
        save_steps=stage.save_steps,
        save_total_limit=2,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=stage.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    known = stage_inputs(cast(Any, model).to(arguments.device), processor, records, stage, rates, cache)
    trainer = GroupTrainer(
        model=model,
        args=arguments,
        rates=rates,
        train_dataset=ConversationDataset(records, processor, known),
        data_collator=Collator(processor.tokenizer.pad_token_id),
        callbacks=[progress, MetricsFile(output / "metrics.jsonl", name), FiniteLoss()],
    )
    quiet = {"PrinterCallback", "ProgressCallback"}
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ in quiet]:
        trainer.remove_callback(callback)
    shard_sensibly(trainer, model, rates)
    checkpoint = on_main(lambda: last_checkpoint(folder))
    if checkpoint is not None:
        check_keys(Path(checkpoint), model)
    trainer.train(resume_from_checkpoint=checkpoint)
    model.eval()
    return whole_weights(trainer)


def check_output(
    output: Path, resolved: str, *, overwrite: bool, own: Set[str] = OWN_NAMES, what: str = "a training output"
) -> None:
    """Raise OutputError if `output` cannot take a run of this resolved config; changes nothing in it.

    own: the names that a folder of its kind holds.
    """
    nearest = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"output '{output}' cannot be written, because of '{nearest}': choose another --output")
    if not output.exists() or not any(output.iterdir()):
        return
    foreign = sorted(p.name for p in output.iterdir() if p.name not in own and not p.name.endswith(".partial"))
    if foreign or not (output / "config.yaml").is_file():
        found = f"holds {foreign[:3]}" if foreign else "has no config.yaml"
        raise OutputError(f"output '{output}' exists and is not {what} ({found}): choose another --output")
    if not overwrite and (output / "config.yaml").read_text(encoding="utf-8") != resolved:
        raise OutputError(f"output '{output}' exists and belongs to another config: choose another --output, or "
                          "--overwrite to start anew")  # fmt: skip


def open_output(output: Path, resolved: str, *, overwrite: bool) -> list[str]:
    """Make or reopen a checked output folder; returns the runs that are finished. Raises OutputError."""
    try:
        if overwrite and output.exists():
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "config.yaml", resolved)
    except OSError as error:
        raise OutputError(f"output '{output}' cannot be written ({error}): choose another --output") from error
    state = output / "state.json"
    return json.loads(state.read_text(encoding="utf-8"))["finished"] if state.is_file() else []


def check_keys(checkpoint: Path, model: MoeVisionForConditionalGeneration) -> None:
    """Raise OutputError if a checkpoint's weights are not exactly those of `model`; Trainer would only warn."""
    found: set[str] = set()
    for file in checkpoint.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            found |= set(weights.keys())
    expected = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    expected &= set(model.state_dict())  # without buffers that are not kept; tied weights are named once
    missing, unexpected = sorted(expected - found), sorted(found - set(model.state_dict()))
    if missing or unexpected:
        raise OutputError(f"checkpoint '{checkpoint}' belongs to another composition (missing {missing[:4]}, "
                          f"unexpected {unexpected[:4]}): choose another --output, or "
                          "--overwrite to start anew")  # fmt: skip


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; one that a kill cut short is taken away."""
    while folder.is_dir() and (checkpoint := get_last_checkpoint(str(folder))) is not None:
        if (Path(checkpoint) / "trainer_state.json").is_file():  # Trainer writes this file last
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def inline_model(path: Path) -> dict[str, Any]:
    """Content of a model config file, for overrides that reach into it; plug-ins keep their place."""
    values = read_yaml(path)
    if values.get("plugins"):
        values["plugins"] = [str((path.parent / plugin).resolve()) for plugin in values["plugins"]]
    return values


TrainConfigT = TypeVar("TrainConfigT", bound=TrainConfig)


def load_train_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a train config; paths in it start at its folder. Raises ConfigError."""
    return load_schedule(TrainConfig, path, overrides)


def load_schedule(cls: type[TrainConfigT], path: Path, overrides: Sequence[str] = ()) -> TrainConfigT:
    """Read a train config, or another with a model and stages; paths in it start at its folder. Raises ConfigError."""
    values = resolve_paths(read_yaml(path), path.resolve().parent)
    if isinstance(values.get("model"), str) and any(override.startswith("model.") for override in overrides):
        values["model"] = inline_model(Path(values["model"]))
    for override in overrides:
        values = apply_override(values, override)
    config = validate(cls, values, source=str(path))
    if isinstance(config.model, str) and not Path(config.model).is_file():
        raise ConfigError(
            str(path), [Problem("model", config.model, "no such file", "give the path of a model config")]
        )
    return config
