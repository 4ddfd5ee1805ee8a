"""Scenes on disk as a user's data would be: PNG files and LLaVA-format JSON."""

import json
import random
from pathlib import Path
from typing import Any

from moe_vision.data.synthetic.questions import CAPTION_PROMPT, QuestionAnswer, caption, questions
from moe_vision.data.synthetic.render import render
from moe_vision.data.synthetic.scene import make_scene, scene_seed


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions and answers as LLaVA conversation turns; the image marker stands before the first question."""
    conversation = []
    for i, (question, answer) in enumerate(pairs):
        marker = "<image>\n" if i == 0 else ""
        conversation.append({"from": "human", "value": marker + question})
        conversation.append({"from": "gpt", "value": answer})
    return conversation


def write_split(folder: Path, split: str, num_scenes: int, seed: int = 0, spread: int = 1) -> dict[str, Path]:
    """Write a split's pictures and JSON files below `folder`; returns the JSON files by name.

    `train` gets `captions` (one dense caption a picture) and `questions` (all eight in one conversation, in random
    order); `val` and `test` get `questions` with one record a question and its `task`. spread: as `render` has it.
    """
    images = folder / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    captions: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    for index in range(num_scenes):
        scene = make_scene(scene_seed(split, index, seed))
        name = f"images/{split}/{index:05d}.png"
        render(scene, spread).save(folder / name)
        pairs = questions(scene)
        if split == "train":
            captions.append(record(f"{split}-{index}", name, [(CAPTION_PROMPT, caption(scene))]))
            asked.append(record(f"{split}-{index}", name, shuffled(pairs, scene.seed)))
        else:
            for pair in pairs:
                one = record(f"{split}-{index}-{pair.task}", name, [(pair.question, pair.answer)])
                asked.append({**one, "task": pair.task})
    files = {"questions": asked} | ({"captions": captions} if split == "train" else {})
    paths = {}
    for name, records in files.items():
        paths[name] = folder / f"{split}_{name}.json"
        paths[name].write_text(json.dumps(records, indent=1), encoding="utf-8")
    return paths


def record(name: str, image: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    return {"id": name, "image": image, "conversations": turns(pairs)}


def shuffled(pairs: list[QuestionAnswer], seed: int) -> list[tuple[str, str]]:
    """All pairs in an order drawn from `seed`."""
    order = [(pair.question, pair.answer) for pair in pairs]
    random.Random(seed + 2).shuffle(order)
    return order
