"""A fused model of two miniature experts with random weights, and pictures with questions, for tests of training."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from PIL import Image

from moe_vision.recipes.tokenizer import build_tokenizer

COLOURS = ("red", "green", "blue", "black")
WORDS = (*COLOURS, "which", "colour", "is", "it", "yes", "no", "bright")


def model_values(folder: Path, **experts: Any) -> dict[str, Any]:
    """Plain values of a model config; its tokenizer is written below `folder`."""
    tokenizer = build_tokenizer(WORDS)
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "experts": experts
        or {"clip": {"variant": "micro", "pretrained": None}, "sam": {"variant": "micro", "pretrained": None}},
        "branches": {
            "overview": {
                "mixer": {"type": "channel_concat", "grid": [4, 4]},
                "adapter": {"type": "mlp", "inner_size": 16, "pool": 2},
            }
        },
        "language_model": {
            "tokenizer": str(folder / "tokenizer"),
            "architecture": {
                "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32,
                "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256,
                "attention_dropout": 0.1, "tie_word_embeddings": True, "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            },
        },
    }  # fmt: skip


def write_data(folder: Path, count: int = 8) -> Path:
    """Pictures of one colour each, two questions a picture, as LLaVA JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        colour = COLOURS[i % len(COLOURS)]
        Image.new("RGB", (20 + i, 30), colour).save(folder / f"{i}.png")
        turns = [
            ("<image>\nwhich colour is it", colour),
            ("is it black", "yes" if colour == "black" else "no"),
        ]
        conversation = []
        for question, answer in turns:
            conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(
            {
                "id": i,
                "image": f"{i}.png",
                "conversations": conversation,
                "task": "dark" if i % 2 else "light",
            }
        )
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def lengthen_answers(path: Path) -> None:
    """Make the answers of a `write_data` file differ in length, so that a mean of means over tokens shows."""
    records = json.loads(path.read_text(encoding="utf-8"))
    for number, record in enumerate(records):
        answer = record["conversations"][1]
        answer["value"] = " ".join([answer["value"]] * (1 + number % 4))
    path.write_text(json.dumps(records), encoding="utf-8")


def drop_images(path: Path, records: Collection[int]) -> None:
    """Take the images of these records of a `write_data` file away, and their markers."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for number in records:
        del values[number]["image"]
        question = values[number]["conversations"][0]
        question["value"] = question["value"].removeprefix("<image>\n")
    path.write_text(json.dumps(values), encoding="utf-8")


def train_values(folder: Path, **stage: Any) -> dict[str, Any]:
    """Plain values of a train config of two stages, projector and finetune; `stage` goes into both."""
    data = {"path": str(write_data(folder / "data"))}
    common = {"data": data, "max_steps": 4, "batch_size": 2, "warmup_ratio": 0.25, "save_steps": 1, **stage}
    return {
        "model": model_values(folder),
        "seed": 3,
        "stages": [
            {"name": "projector", "train": {"adapters": 1e-2}, **common},
            {"name": "finetune", "train": {"adapters": 1e-3, "language_model": 1e-2}, **common},
        ],
    }
