"""What the trainer costs beside a bare PyTorch loop and beside transformers' own LLaVA, and how fast pictures load.

    python benchmarks/training.py

Steps: the miniature with five frozen experts on pixels, adapters and language model train, the same records in batches
of 16. All ways take turns, a block of steps each, so that what else the machine does meets them all; ratios are those
of medians over all steps. LLaVA: transformers' `LlavaForConditionalGeneration` and Trainer against ours, with the same
CLIP, projector, language model, tokens, records and batches; all but CLIP trains. Loader: JPEGs of 12 megapixels,
decoded and cut to the model's views on one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
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


def trainer_steps(data: Path, output: Path, steps: int, model: Any) -> list[float]:
    """Seconds of each step but the first of a run of ours. model: path of a config, or its plain values."""
    stage = {
        "name": "timed", "train": RATES, "data": {"path": str(data)}, "max_steps": steps, "batch_size": BATCH,
        "cache_features": False, "save_steps": 10 * steps,
    }  # fmt: skip
    config = TrainConfig.model_validate({"model": model, "stages": [stage]})
    train(config, output, console=Console(quiet=True))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["step_seconds"] for line in lines if "loss" in line][1:]


def loop_steps(data: Path, steps: int) -> list[float]:
    """Seconds of each step but the first of a loop that does the same and nothing more."""
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
    seconds: list[float] = []
    while len(seconds) < steps:
        started = time.perf_counter()
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            now = time.perf_counter()
            seconds.append(now - started)
            started = now
            if len(seconds) == steps:
                break
    return seconds[1:]


def clip_alone() -> dict[str, Any]:
    """Plain values of the miniature with CLIP alone, and a projector as LLaVA's."""
    values = read_yaml(packaged_config("model/micro.yaml"))
    values["experts"] = {"clip": values["experts"]["clip"]}
    adapter = {"type": "mlp", "depth": 2, "pool": 1, "positions": False}
    values["branches"]["overview"] = {"mixer": {"type": "channel_concat", "grid": None}, "adapter": adapter}
    return values


class LlavaCollator:
    """Our batches as LLaVA takes them: views normalised, nothing beside them."""

    def __init__(self, model: MoeVisionForConditionalGeneration, pad_token_id: int) -> None:
        self.collator, self.expert = Collator(pad_token_id), model.model.vision_tower.experts["clip"]

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(items)
        batch.pop("image_sizes")
        batch["pixel_values"] = self.expert.pixels(batch["pixel_values"])
        return batch


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def llava_steps(data: Path, output: Path, steps: int) -> tuple[list[float], int, int]:
    """Seconds of each step but the first of transformers' LLaVA and Trainer; tokens of the first record, parameters."""
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
    times = StepTimes()
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=3e-4, use_cpu=True,
        lr_scheduler_type="cosine", weight_decay=0.0, logging_steps=1, save_strategy="no", remove_unused_columns=False,
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    collator = LlavaCollator(ours, processor.tokenizer.pad_token_id)
    trainer = Trainer(model, arguments, collator, dataset, callbacks=[times])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = [after - before for before, after in pairwise(times.times)]
    return seconds, len(dataset[0]["input_ids"]), sum(p.numel() for p in model.parameters())


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
    parser.add_argument("--steps", type=int, default=40, help="of each block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=20)
    arguments = parser.parse_args()
    ours: list[float] = []
    bare: list[float] = []
    alone: list[float] = []
    llava: list[float] = []
    micro = str(packaged_config("model/micro.yaml"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_split(folder, "train", 640)["questions"]
        for block in range(arguments.blocks):
            bare += loop_steps(data, arguments.steps)
            ours += trainer_steps(data, folder / f"run-{block}", arguments.steps, micro)
            alone += trainer_steps(data, folder / f"alone-{block}", arguments.steps, clip_alone())
            seconds, tokens, parameters = llava_steps(data, folder / f"llava-{block}", arguments.steps)
            llava += seconds
        speed = loader_speed(folder, arguments.pictures)
    mine, loop = statistics.median(ours), statistics.median(bare)
    print(f"steps/s: trainer {1 / mine:.2f}, bare loop {1 / loop:.2f}; the trainer takes {mine / loop - 1:+.1%}")
    mine, theirs = statistics.median(alone), statistics.median(llava)
    print(
        f"CLIP alone, {tokens} tokens in the first record: ours {1 / mine:.2f} steps/s, LLaVA of {parameters:,} "
        f"parameters and transformers' Trainer {1 / theirs:.2f}; ours takes {mine / theirs - 1:+.1%}"
    )
    print(f"loader: {speed:.1f} pictures of 12 megapixels a second on one core")


if __name__ == "__main__":
    main()
