"""A thin `transformers.Trainer`: rate and decay of every group, groups that take turns, frozen parts that stay in
evaluation mode, checkpoints that are whole or not there, logs that a resumed run repeats exactly."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.training.callbacks import check_finite
from moe_vision.training.checkpoints import discard, put_in_place, write_digests, writing
from moe_vision.training.groups import modes_of, optimizer_groups, parameter_groups
from moe_vision.training.turns import Turns

STAGING = ".checkpoint.partial"
"""Below a run's folder: where a checkpoint is written before it gets its name."""

LOSS_FILE = "loss_since_log.json"
"""In a checkpoint: the sum of losses that no log holds yet. Trainer forgets it, and the next log of a resumed run would
be about fewer steps."""


class OneDevice(TrainingArguments):
    """As transformers', with one device for each process: with several, Trainer would wrap the model in nn.DataParallel
    and multiply the batch by their number."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


class EpochLengthSampler(LengthGroupedSampler):
    """transformers' sampler in an order that seed and epoch alone decide, so that a resumed epoch is the same; theirs
    draws from the global state, which is another one there."""

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


def warmed_up(warmup: int, way: Callable[[int], float], step: int) -> float:
    """Share of the rate at a step, counted from 0. way: what it is after the warm-up."""
    return (step + 1) / warmup if step < warmup else way(step)


class GroupTrainer(Trainer):
    """rates: learning rate of each group that trains at any step; every other parameter is frozen already.

    turns: which of them train at which step. The others get no gradient then, so that neither they nor their optimizer
    state change. weight_decay: one for all groups, or by group.
    """

    def __init__(
        self,
        *args: Any,
        rates: Mapping[str, float],
        turns: Turns,
        weight_decay: float | Mapping[str, float] = 0.0,
        **kwargs: Any,
    ) -> None:
        self.rates, self.turns, self.weight_decay = rates, turns, weight_decay
        self.training_now: frozenset[str] = frozenset()
        self.evaluating: list[nn.Module] = []
        self.moving: list[nn.Parameter] = []
        self.resumed: Path | None = None
        self.staging: Path | None = None
        self.group_logs: dict[str, torch.Tensor | float] = {}
        self.window: float | None = None
        self.seen = torch.zeros(2, dtype=torch.long)
        super().__init__(*args, **kwargs)
        model = cast(MoeVisionForConditionalGeneration, self.model)
        self.names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.trained: dict[str, list[nn.Parameter]] = {}
        self.add_callback(LossSinceLog(self))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, from a checkpoint's path or the beginning; a resumed run logs what an unbroken one does."""
        self.resumed = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = optimizer_groups(
                cast(MoeVisionForConditionalGeneration, self.model), self.rates, self.weight_decay
            )
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's, but a warm-up of w steps goes 1/w, 2/w, … 1: Trainer's begins at 0, and its first step would
        learn nothing."""
        if self.lr_scheduler is None:
            made: Any = super().create_scheduler(num_training_steps, optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            for group, rate in zip(made.optimizer.param_groups, made.base_lrs, strict=True):
                group["lr"] = rate
            self.lr_scheduler = LambdaLR(made.optimizer, [partial(warmed_up, warmup, way) for way in made.lr_lambdas])
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As Trainer's; lengths come from the texts, where every token of an image has its place, without decoding a
        picture."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochLengthSampler(size, [len(text.input_ids) for text in dataset.texts], seed)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, unless all steps are done: from a checkpoint of the last step, in the middle of an epoch,
        Trainer would take one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """None are counted: nothing reads them, and Trainer walks all parameters for them in each step, which takes a
        twentieth of a miniature's."""
        return 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.window is None:
            self.window = time.perf_counter()
        mask = inputs["attention_mask"]
        self.seen = self.seen.to(mask.device) + torch.stack([mask.new_tensor(len(mask)), mask.sum()])
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Trainer has just put the whole model into training mode; what is frozen must not drop out."""
        trains = self.turns.at(self.state.global_step)
        if trains != self.training_now:
            inner = cast(MoeVisionForConditionalGeneration, self.accelerator.unwrap_model(model))
            # By name and not before the first step: wrapping for several processes may have made new parameters.
            members = parameter_groups(inner, self.rates)
            self.trained = {group: [p for name, p in members[group] if name in self.names] for group in self.rates}
            for group, parameters in self.trained.items():
                for parameter in parameters:
                    parameter.requires_grad_(group in trains)
            self.moving = [parameter for parameter in inner.parameters() if parameter.requires_grad]
            # A frozen block that recomputes asks for training mode of itself; what drops out in it are its children.
            self.evaluating = [
                module for module, trains_here in modes_of(inner)
                if not trains_here and getattr(module, "gradient_checkpointing", False) is not True
            ]  # fmt: skip
            self.training_now = trains
        for module in self.evaluating:
            module.training = False
        return super().compute_loss(model, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As Trainer's, and before it each group's norm and rate, in steps that will be logged."""
        step = self.state.global_step + 1
        first, last = step == 1 and self.args.logging_first_step, step == self.state.max_steps
        if step % self.state.logging_steps == 0 or first or last:
            for group, parameters in self.trained.items():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                if gradients:  # else it is another group's turn
                    norm: Any = get_total_norm(gradients)
                    self.group_logs[f"grad_norm/{group}"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
            for values in cast(torch.optim.Optimizer, self.optimizer).param_groups:
                self.group_logs[f"learning_rate/{values['group']}"] = values["lr"]
        if self.accelerator.num_processes > 1:
            return super()._clip_grad_norm(model)
        # Trainer walks all parameters, several times; most are frozen, and a miniature's step is short.
        return self.accelerator.clip_grad_norm_(self.moving, self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with norms and rates of groups, and what was seen a second since the log before: records, and
        tokens, of images too, without padding."""
        if "loss" in logs:
            logs |= {name: float(value) for name, value in self.group_logs.items()}
            self.group_logs = {}
            now = time.perf_counter()
            if self.window is not None:
                samples, tokens = self.accelerator.reduce(self.seen.to(self.args.device)).tolist()
                logs["samples_per_second"] = samples / (now - self.window)
                logs["tokens_per_second"] = tokens / (now - self.window)
            self.window, self.seen = now, torch.zeros_like(self.seen)
        if "train_loss" in logs:  # Trainer divides by the steps of this process alone
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer puts `checkpoint-N`; while one is written, a folder that nobody looks into."""
        return str(self.staging) if self.staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, but whole or not at all; older ones go once this one stands. Raises WriteError, and ValueError
        where the loss is not a number: no later start could learn from there."""
        check_finite("loss", float(self._tr_loss), self.state.global_step)
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = self.staging = folder / STAGING
        try:
            with writing("a checkpoint", folder):
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    values = {"loss": self._tr_loss.item(), "logged": self._globalstep_last_logged}
                    values["total"] = self._total_loss_scalar
                    (staging / name / LOSS_FILE).write_text(json.dumps(values), encoding="utf-8")
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_digests(staging / name)
                    put_in_place(staging / name, folder / name)
        finally:
            self.staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if self.args.should_save:
            for old in sort_checkpoints(str(folder))[: -cast(int, self.args.save_total_limit)]:
                discard(Path(old))


class LossSinceLog(TrainerCallback):
    """Gives a resumed Trainer back the losses that it had summed up since its last log, and this start's own steps
    between logs and checkpoints; it takes them from the checkpoint."""

    def __init__(self, trainer: GroupTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.resumed is not None:
            values = json.loads((self.trainer.resumed / LOSS_FILE).read_text(encoding="utf-8"))
            self.trainer._tr_loss = torch.tensor(values["loss"], device=args.device)
            self.trainer._globalstep_last_logged = values["logged"]
            self.trainer._total_loss_scalar = values["total"]
            state.compute_steps(args, state.max_steps)


def trained_and_frozen(model: Any, rates: Mapping[str, float]) -> tuple[dict[str, int], dict[str, int]]:
    """Parameter counts of the groups that train, of what has gradients in them, and of those that do not."""
    counts = {
        group: sum(p.numel() for _, p in members if p.requires_grad or group not in rates)
        for group, members in parameter_groups(model, rates).items()
    }
    counts = {group: count for group, count in counts.items() if count}
    return {g: c for g, c in counts.items() if g in rates}, {g: c for g, c in counts.items() if g not in rates}
