"""What the trainer costs beside a bare PyTorch loop and beside transformers' own LLaVA, and how fast pictures load.

    python benchmarks/training.py

Steps: the miniature with five frozen experts on pixels, adapters and language model train, the same records in batches
of 16. Two ways run side by side, a step of the one, then a step of the other, so that what else the machine does meets
both alike: steps of some hundredths of a second scatter by a tenth from one minute to the next. LLaVA: transformers'
`LlavaForConditionalGeneration` and Trainer against ours, with the same CLIP, projector, language model, tokens, records
and batches; all but CLIP trains. Loader: JPEGs of 12 megapixels, decoded and cut to the model's views on one thread.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    trainer,
)

from moe_vision.config import load_config, read_yaml, validate
from moe_vision.data.collate import Collator, ConversationDataset, views_of
from moe_vision.data.records import load_records
from moe_vision.data.synthetic import write_split
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.compose import compose
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from moe_vision.training.groups import freeze_all_but, learning_rates, modes_of, optimizer_groups
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig

RATES = {"adapters": 1e-3, "language_model": 3e-4}
BATCH = 16


class Relay(TrainerCallback):
    """Lets two threads take a step each in turn, and times them; the first steps of each warm up."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.seconds: dict[int, list[float]] = {}
        self.waiting: list[int] = []
        self.started = 0.0
        self.ended = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step()

    def step(self) -> None:
        """A step of this thread has ended: let the other one take its own, and wait for it."""
        me, now = threading.get_ident(), time.perf_counter()
        with self.condition:
            if me not in self.seconds:
                self.seconds[me] = []
                self.waiting.append(me)
            else:
                self.seconds[me].append(now - self.started)
                self.waiting.append(self.waiting.pop(0))
            self.condition.notify_all()
            self.condition.wait_for(lambda: self.ended or (len(self.seconds) == 2 and self.waiting[0] == me))
            self.started = time.perf_counter()

    def leave(self) -> None:
        """This thread takes no more steps, whether it is done or has failed: nobody waits for it."""
        with self.condition:
            self.ended = True
            self.condition.notify_all()


@contextmanager
def timed_by(relay: Relay) -> Iterator[None]:
    """Every Trainer that is made in this block takes part."""
    trainer.DEFAULT_CALLBACKS.append(relay)  # type: ignore[arg-type]
    try:
        yield
    finally:
        trainer.DEFAULT_CALLBACKS.remove(relay)  # type: ignore[arg-type]


def side_by_side(
    mine: Callable[[], None], theirs: Callable[[Relay], None], warm: int
) -> tuple[list[float], list[float]]:
    """Seconds of each step of both, from the same pairs of steps without the first `warm`. mine runs in this thread,
    where signals belong. Raises what either raises."""
    relay = Relay()

    def other() -> int:
        try:
            theirs(relay)
        finally:
            relay.leave()
        return threading.get_ident()

    with timed_by(relay), ThreadPoolExecutor(1) as pool:
        future = pool.submit(other)
        try:
            mine()
        finally:
            relay.leave()
        b = relay.seconds[future.result()]
    a = relay.seconds[threading.get_ident()]
    count = min(len(a), len(b))
    return a[warm:count], b[warm:count]


def said(mine: list[float], theirs: list[float]) -> str:
    """How much longer a step of mine takes: of medians, and the standard error of the mean over pairs."""
    more = [a / b - 1 for a, b in zip(mine, theirs, strict=True)]
    error = statistics.stdev(more) / len(more) ** 0.5
    return f"{statistics.median(mine) / statistics.median(theirs) - 1:+.1%} ± {error:.1%} ({len(more)} pairs of steps)"


def trainer_steps(data: Path, output: Path, steps: int, model: Any) -> None:
    """A run of ours. model: path of a config, or its plain values."""
    stage = {
        "name": "timed", "train": RATES, "data": {"path": str(data)}, "max_steps": steps, "batch_size": BATCH,
        "cache_features": False, "save_steps": 10 * steps,
    }  # fmt: skip
    config = TrainConfig.model_validate({"model": model, "stages": [stage]})
    train(config, output, console=Console(quiet=True))


def loop_steps(data: Path, steps: int, relay: Relay) -> None:
    """A loop that does the same and nothing more."""
    model, processor = compose(load_config(ModelConfig, packaged_config("model/micro.yaml")))
    rates = learning_rates(model, RATES)
    freeze_all_but(model, rates)
    for module, mode in modes_of(model):
        module.training = mode
    optimizer = torch.optim.AdamW(optimizer_groups(model, rates, 0.0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    dataset = ConversationDataset(load_records(data), processor)
    loader = DataLoader(dataset, BATCH, shuffle=True, collate_fn=Collator(processor.tokenizer.pad_token_id))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    taken = 0
    while taken < steps:
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            relay.step()
            taken += 1
            if taken == steps:
                break


def clip_alone() -> dict[str, Any]:
    """Plain values of the miniature with CLIP alone, and a projector as LLaVA's."""
    values = read_yaml(packaged_config("model/micro.yaml"))
    values["experts"] = {"clip": values["experts"]["clip"]}
    adapter = {"type": "mlp", "depth": 2, "pool": 1, "positions": False}
    values["branches"]["overview"] = {"mixer": {"type": "channel_concat", "grid": None}, "adapter": adapter}
    return values


class LlavaCollator:
    """Our batches as LLaVA takes them: views normalised, nothing beside them. It makes logits at every position, since
    its loss knows no `logits_to_keep`."""

    def __init__(self, model: MoeVisionForConditionalGeneration, pad_token_id: int) -> None:
        self.collator, self.expert = Collator(pad_token_id), model.model.vision_tower.experts["clip"]

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(items)
        del batch["image_sizes"], batch["logits_to_keep"]
        batch["pixel_values"] = self.expert.pixels(batch["pixel_values"])
        return batch


def llava_steps(data: Path, output: Path, steps: int) -> tuple[int, int]:
    """A run of transformers' LLaVA and Trainer; returns tokens of the first record, parameters."""
    ours, processor = compose(validate(ModelConfig, clip_alone(), source="clip alone"))
    tower: Any = ours.model.vision_tower.experts["clip"].model
    text = ours.config.text_config
    config = LlavaConfig(
        vision_config=tower.config, text_config=text, image_token_id=ours.config.image_token_id,
        image_seq_length=tower.embeddings.num_patches, vision_feature_layer=-1, projector_hidden_act="gelu",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).float()  # the config names the precision of the shipped file
    model.model.language_model.load_state_dict(ours.model.language_model.state_dict())
    model.model.vision_tower.requires_grad_(False)
    dataset = ConversationDataset(load_records(data), processor)
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=3e-4, use_cpu=True,
        lr_scheduler_type="cosine", weight_decay=0.0, logging_steps=10, save_strategy="no", remove_unused_columns=False,
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    collator = LlavaCollator(ours, processor.tokenizer.pad_token_id)
    llava = Trainer(model, arguments, collator, dataset)
    llava.remove_callback(PrinterCallback)
    llava.train()
    return len(dataset[0]["input_ids"]), sum(p.numel() for p in model.parameters())


def loader_speed(folder: Path, pictures: int) -> float:
    """JPEGs of 12 megapixels a second, decoded and cut to views, in this thread."""
    _, processor = compose(load_config(ModelConfig, packaged_config("model/micro.yaml")))
    noise = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = folder / "large.jpg"
    Image.fromarray(noise.numpy()).resize((4000, 3000), Image.Resampling.BICUBIC).save(path, quality=90)
    views_of((path,), processor)
    started = time.perf_counter()
    for _ in range(pictures):
        views_of((path,), processor)
    return pictures / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of each way")
    parser.add_argument("--warm", type=int, default=10, help="pairs of steps that are not counted")
    parser.add_argument("--scenes", type=int, default=640, help="drawn images of the data")
    parser.add_argument("--pictures", type=int, default=20, help="JPEGs of the loader's part")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.steps < arguments.warm + 3:
        parser.error(f"--steps {arguments.steps}: give {arguments.warm + 3} or more, for two pairs after --warm")
    torch.set_num_threads(arguments.threads)
    steps, micro = arguments.steps, str(packaged_config("model/micro.yaml"))
    sizes: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_split(folder, "train", arguments.scenes)["questions"]
        ours, loop = side_by_side(
            lambda: trainer_steps(data, folder / "run", steps, micro),
            lambda relay: loop_steps(data, steps, relay),
            arguments.warm,
        )
        alone, llava = side_by_side(
            lambda: trainer_steps(data, folder / "alone", steps, clip_alone()),
            lambda relay: sizes.append(llava_steps(data, folder / "llava", steps)),
            arguments.warm,
        )
        speed = loader_speed(folder, arguments.pictures)
    (tokens, parameters), rate = sizes[0], lambda seconds: f"{1 / statistics.median(seconds):.2f} steps/s"
    print(f"trainer {rate(ours)}, bare loop {rate(loop)}: the trainer takes {said(ours, loop)}")
    print(
        f"CLIP alone, {tokens} tokens in the first record: ours {rate(alone)}, LLaVA of {parameters:,} parameters and "
        f"transformers' Trainer {rate(llava)}: ours takes {said(alone, llava)}"
    )
    print(f"loader: {speed:.1f} pictures of 12 megapixels a second on one core; {arguments.threads} threads elsewhere")


if __name__ == "__main__":
    main()
